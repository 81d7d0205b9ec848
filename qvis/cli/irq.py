# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis irq``"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..cpus import format_cpus
from ..errors import UsageError
from ._output import print_json, print_table

if TYPE_CHECKING:
    from ..guest.interrupts import Vector


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "qvis irq NAME [set IRQ CPUS | spread] [--json]"
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("action", metavar="set|spread", nargs="?")
    parser.add_argument("rest", metavar="IRQ CPUS", nargs="*", help="such as 27 0-3,5")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    wanted = {None: 0, "spread": 0, "set": 2}
    if args.action not in wanted:
        raise UsageError(f"unknown action {args.action!r}: set IRQ CPUS, or spread")
    if len(args.rest) != wanted[args.action]:
        raise UsageError("usage: qvis irq NAME [set IRQ CPUS | spread]")
    if args.action == "set" and not args.rest[0].isdigit():
        raise UsageError(f"bad IRQ {args.rest[0]!r}: give its number")
    from ..machine.machine import Machine

    with Machine.attach(args.name) as machine:
        irqs = machine.irqs
        if args.action == "set":
            vectors = [irqs.set_affinity(int(args.rest[0]), args.rest[1])]
        else:
            vectors = irqs.spread() if args.action == "spread" else irqs.vectors()
    if args.json:
        print_json([_json(vector) for vector in vectors])
    else:
        _print(vectors)
    return 0


def _json(vector: Vector) -> dict[str, Any]:
    data = asdict(vector)
    return {**data, **{key: format_cpus(data[key]) for key in ("affinity", "effective")}}


def _print(vectors: list[Vector]) -> None:
    cpus = list(vectors[0].counts) if vectors else []
    columns = ["irq", "device", "driver", "source", "chip", "affinity", "effective"]
    print_table(
        [*columns, *(f"CPU{cpu}" for cpu in cpus)],
        [
            [
                str(vector.irq), vector.device, vector.driver, vector.source or "(all)",
                vector.chip, format_cpus(vector.affinity), format_cpus(vector.effective),
                *(str(vector.counts[cpu]) for cpu in cpus),
            ]
            for vector in vectors
        ],
    )  # fmt: skip
