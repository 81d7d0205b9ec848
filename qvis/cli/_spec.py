# SPDX-License-Identifier: GPL-2.0-or-later
"""The arguments by which several verbs are told what machine to make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..x86 import Apic, Irqchip, Platform

__all__ = ["add_shape", "add_spec", "shape_arguments", "spec_arguments"]


def add_spec(parser: argparse.ArgumentParser) -> None:
    """The arguments of a machine, but for its name."""
    add_shape(parser)
    parser.add_argument(
        "--transport", default="msi",
        help="pci, intx, msi, vis or vis-doorbell (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--icount", action="store_true",
        help="count instructions for time: slower, and the same every time (tcg, nested)",
    )  # fmt: skip


def add_shape(parser: argparse.ArgumentParser, smp: int = 2) -> None:
    """Those of them that machines which are to be compared have in common."""
    parser.add_argument(
        "--backend", default="auto",
        help="auto, kvm, tcg, nested or emulated (default: %(default)s); nested is KVM in an inner "
        "host, on any machine",
    )  # fmt: skip
    parser.add_argument(
        "--smp", type=int, default=smp, metavar="N", help="vCPUs (default: %(default)s)"
    )
    parser.add_argument(
        "--memory", default="512M", metavar="M", help="such as 512M or 2G (default: %(default)s)"
    )
    parser.add_argument(
        "--queues", type=int, default=smp, metavar="N",
        help="request queues of the virtio-blk device (default: %(default)s)",
    )  # fmt: skip
    add_platform(parser)


def add_platform(parser: argparse.ArgumentParser) -> None:
    """What of a machine can be chosen where the backend has a choice."""
    group = parser.add_argument_group("interrupt hardware", "of --backend kvm, nested and emulated")
    group.add_argument(
        "--irqchip", choices=[str(each) for each in Irqchip],
        help="who has the interrupt controllers: on: KVM, off: user space, split: KVM the local "
        "APICs (default)",
    )  # fmt: skip
    group.add_argument(
        "--apic",
        choices=[str(each) for each in Apic],
        help="default: x2apic, and xapic with --irqchip off",
    )
    group.add_argument(
        "--apicv", action="store_true",
        help="posted interrupts, EOI virtualization and the rest (emulated only)",
    )  # fmt: skip
    group.add_argument(
        "--pv-eoi", action=argparse.BooleanOptionalAction,
        help="KVM's paravirtual EOI (default: on under KVM, off on an emulated machine)",
    )  # fmt: skip
    group.add_argument(
        "--costs", type=Path, metavar="FILE",
        help="what exits cost, of `qvis calibrate` (emulated only)",
    )  # fmt: skip


def spec_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_spec` parsed, as arguments of :func:`qvis.up`."""
    return {**shape_arguments(args), "transport": args.transport, "icount": args.icount}


def shape_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_shape` parsed, likewise."""
    from ..spec import parse_memory

    platform = None
    if args.irqchip or args.apic or args.apicv or args.pv_eoi is not None:
        irqchip = Irqchip(args.irqchip or Irqchip.SPLIT)
        # KVM offers x2APIC with its own local APICs only.
        apic = Apic.XAPIC if irqchip is Irqchip.OFF else Apic.X2APIC
        platform = Platform(
            irqchip=irqchip,
            apic=Apic(args.apic or apic),
            apicv=args.apicv,
            pv_eoi=args.pv_eoi,
        )
    return {
        "platform": platform,
        "costs": args.costs,
        "backend": args.backend,
        "smp": args.smp,
        "memory": parse_memory(args.memory),
        "queues": args.queues,
    }
