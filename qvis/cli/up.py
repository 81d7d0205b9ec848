# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis up``"""

from __future__ import annotations

import argparse

from ._output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="auto", help="auto, kvm or tcg (default: %(default)s)")
    parser.add_argument(
        "--transport", default="msi", help="pci, intx or msi (default: %(default)s)"
    )
    parser.add_argument("--smp", type=int, default=2, metavar="N", help="vCPUs (default: 2)")
    parser.add_argument(
        "--memory", default="512M", metavar="M", help="such as 512M or 2G (default: %(default)s)"
    )
    parser.add_argument(
        "--queues", type=int, default=2, metavar="N",
        help="request queues of the virtio-blk device (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--icount", action="store_true",
        help="count instructions for time: slower, and the same every time (TCG)",
    )  # fmt: skip
    parser.add_argument("--name", help="default: the first free one of vm1, vm2...")
    parser.add_argument("--json", action="store_true", help="describe the machine in JSON")


def run(args: argparse.Namespace) -> int:
    from ..machine.machine import up
    from ..spec import parse_memory

    with up(
        name=args.name,
        transport=args.transport,
        backend=args.backend,
        smp=args.smp,
        memory=parse_memory(args.memory),
        queues=args.queues,
        icount=args.icount,
    ) as machine:
        machine.detach()
    if args.json:
        print_json(machine.info)
        return 0
    info, spec = machine.info, machine.spec
    source = info["provenance"]
    print(
        f"{machine.name} is up: {spec.transport}, {spec.smp} vCPUs, {spec.memory} MiB, "
        f"{spec.queues} queues, booted in {info['boot']['total']:.1f} s\n"
        f"  QEMU {source['qemu']} (series {source['qemu_series']}), accelerator "
        f"{source['accelerator']}\n"
        f"  Linux {source['linux']} (series {source['linux_series']})\n"
        f"  qvis ssh {machine.name}        a shell in it\n"
        f"  qvis irq {machine.name}        its interrupts\n"
        f"  qvis down {machine.name}       end it\n"
        f"  {machine.folder / 'qmp.sock'}  QMP for your own tools"
    )
    return 0
