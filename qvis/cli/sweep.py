# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis sweep``"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InfraError, UsageError
from ._output import print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..experiments.grid import Grid

NOTES = """\
Every combination of the lists is an emulated machine, whose disks are offered requests. Its
times are modelled cycles, by a table of costs: they say nothing about this host. Killed at any
moment, the same command does what is missing."""

SHOWN = 1000  # rows of the table; results.csv has all
HELP = {
    "transport": "pci, intx, msi, vis, vis-doorbell",
    "smp": "vCPUs",
    "queues": "of each disk",
    "rate": "requests/s of modelled time, offered to each queue",
    "apic": "xapic, x2apic",
    "apicv": "on, off: posted interrupts, virtual EOI",
    "pv-eoi": "on, off: KVM's paravirtual EOI",
    "irqchip": "on, split, off",
    "disks": "virtio-blk devices",
}


def configure(parser: argparse.ArgumentParser) -> None:
    from ..experiments.grid import AXES, DEFAULTS

    parser.epilog = NOTES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    for axis in AXES:
        parser.add_argument(f"--{axis}", default=DEFAULTS[axis], metavar="A,B...",
                            help=f"{HELP[axis]} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--requests", type=int, default=1000, metavar="N",
                        help="of each machine, in all (default: %(default)s)")  # fmt: skip
    parser.add_argument("--costs", type=Path, metavar="FILE",
                        help="what exits cost, by `qvis calibrate`")  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, metavar="N", help="processes (default: one a CPU)")
    where.add_argument("--scheduler", metavar="ADDRESS",
                       help="of a Dask cluster, such as tcp://host:8786")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print all results in JSON")


def run(args: argparse.Namespace) -> int:
    from ..emulated.costs import Costs
    from ..experiments.grid import AXES, Grid
    from ..experiments.sweep import CSV, sweep

    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {args.jobs}")
    lists = {axis: getattr(args, axis.replace("-", "_")) for axis in AXES}
    grid = Grid.parse(lists, args.requests)
    costs = Costs.load(args.costs)
    outcome = sweep(args.output, grid, costs=costs, jobs=args.jobs, scheduler=args.scheduler)
    if args.json:
        print_json(outcome.lines)
    else:
        _print(grid, outcome.lines)
        known = len(outcome.lines) - outcome.measured
        already = f", {known} of them known already" if known else ""
        print(f"\n{len(outcome.lines)} points{already}: {outcome.path}, {CSV} beside it")
    if outcome.failed:
        raise InfraError(
            f'{outcome.failed} of {len(outcome.lines)} points failed: see "error" in {outcome.path}'
        )
    return 0


def _print(grid: Grid, lines: Sequence[dict[str, Any]]) -> None:
    """The lines under the axes that differ among them."""
    axes = [axis for axis, values in grid.values.items() if len(values) > 1]
    same = [
        f"{axis} {_word(values[0])}" for axis, values in grid.values.items() if axis not in axes
    ]
    print(", ".join(same))
    times = ("to delivery", "to handler", "to EOI")
    print_table(
        [*axes, "interrupts", "exits each", "to QEMU", *times, "lost"],
        [
            [*(_word(line[axis.replace("-", "_")]) for axis in axes), *_numbers(line, times)]
            for line in lines[:SHOWN]
        ],
    )
    if len(lines) > SHOWN:
        print(f"and {len(lines) - SHOWN} more")
    print("\ntimes: median and p99 from the raise, in modelled cycles (2 GHz); exits: those of")
    print("the whole machine meanwhile, by interrupt of a disk")


def _numbers(line: dict[str, Any], times: Sequence[str]) -> list[str]:
    if "error" in line:
        return [f"failed: {line['error']}"]
    cycles = [line["modelled cycles from raise"][name] for name in times]
    exits = line["exits per interrupt"]
    return [
        str(line["interrupts"]),
        f"{exits['all']:.2f}",
        f"{exits['to user space']:.2f}",
        *(f"{one['median']}, {one['p99']}" if line["interrupts"] else "-" for one in cycles),
        str(line["lost"]),
    ]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
