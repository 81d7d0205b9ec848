# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis up``"""

from __future__ import annotations

import argparse
from typing import Any

from ._output import print_json
from ._spec import add_spec, spec_arguments


def configure(parser: argparse.ArgumentParser) -> None:
    add_spec(parser)
    parser.add_argument("--name", help="default: the first free one of vm1, vm2...")
    parser.add_argument("--json", action="store_true", help="describe the machine in JSON")


def run(args: argparse.Namespace) -> int:
    from ..machine.machine import up

    with up(name=args.name, **spec_arguments(args)) as machine:
        machine.detach()
    if args.json:
        print_json(machine.info)
        return 0
    info, spec = machine.info, machine.spec
    source = info["provenance"]
    host = f"  qvis ssh {machine.name} --host one in the inner host\n" if machine.host else ""
    print(
        f"{machine.name} is up: {spec.transport}, {spec.smp} vCPUs, {spec.memory} MiB, "
        f"{spec.queues} queues, booted in {info['boot']['total']:.1f} s\n"
        f"  QEMU {source['qemu']} (series {source['qemu_series']}), accelerator "
        f"{source['accelerator']}\n"
        f"  Linux {source['linux']} (series {source['linux_series']})\n{_kvm(info)}"
        f"  qvis ssh {machine.name}        a shell in it\n"
        f"  qvis irq {machine.name}        its interrupts\n"
        f"{host}  qvis down {machine.name}       end it\n"
        f"  {machine.folder / 'qmp.sock'}  QMP for your own tools"
    )
    return 0


def _kvm(info: dict[str, Any]) -> str:
    """What there is to say of KVM, as whole lines."""
    source, lines = info["provenance"], ""
    if "kvm_series" in source:
        lines += f"  inner host: Linux {source['host_linux']} (series {source['kvm_series']})\n"
    if "vis_in_kvm" in info:
        lines += f"  VIS: {'inside KVM' if info['vis_in_kvm'] else 'by cached routes'}\n"
    return lines
