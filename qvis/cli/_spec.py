# SPDX-License-Identifier: GPL-2.0-or-later
"""The arguments by which several verbs are told what machine to make."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_spec", "spec_arguments"]


def add_spec(parser: argparse.ArgumentParser) -> None:
    """The arguments of a machine, but for its name."""
    add_shape(parser)
    parser.add_argument(
        "--transport", default="msi",
        help="pci, intx, msi, vis or vis-doorbell (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--icount", action="store_true",
        help="count instructions for time: slower, and the same every time (TCG)",
    )  # fmt: skip


def add_shape(parser: argparse.ArgumentParser, smp: int = 2) -> None:
    """Those of them that machines which are to be compared have in common."""
    parser.add_argument("--backend", default="auto", help="auto, kvm or tcg (default: %(default)s)")
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


def spec_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_spec` parsed, as arguments of :func:`qvis.up`."""
    return {**shape_arguments(args), "transport": args.transport, "icount": args.icount}


def shape_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_shape` parsed, likewise."""
    from ..spec import parse_memory

    return {
        "backend": args.backend,
        "smp": args.smp,
        "memory": parse_memory(args.memory),
        "queues": args.queues,
    }
