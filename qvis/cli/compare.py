# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis compare``"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..transport import COMPARED, Transport
from ._output import print_table
from ._spec import add_shape, shape_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..experiments.result import Result

NOTES = """\
Measures in a new folder, which then holds result.json and every run's traces; or, with
results named, puts them together and shows those. Counts come from traces of the real
driver in a real guest. On TCG they are accesses, and its times say nothing about hardware."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = NOTES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT",
                        help="folders or files of earlier comparisons")  # fmt: skip
    parser.add_argument("--transports", default=",".join(COMPARED), metavar="T,T...",
                        help="default: %(default)s; there is vis-doorbell too")  # fmt: skip
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--op", action="append", metavar="OP",
                        help="interrupt, mask, unmask, change-of-CPU, set-up or boot; may be "
                        "repeated (default: all)")  # fmt: skip
    add_shape(parser, smp=4)
    parser.add_argument("--icount", action="store_true",
                        help="count instructions: on nested, each run is the same")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER",
                        help="default: compare-1 or the first number that is free")  # fmt: skip
    parser.add_argument("--html", action="store_true", help="write report.html there too")
    parser.add_argument("--json", action="store_true", help="print the result in JSON")


def run(args: argparse.Namespace) -> int:
    from ..experiments.compare import OPERATIONS, RESULT, compare
    from ..experiments.result import Result, merge

    if args.results:
        if args.output is None and args.html:
            raise UsageError("where is the report of these results to go? name it with -o")
        files = [path / RESULT if path.is_dir() else path for path in args.results]
        folder = args.output
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        here = folder or Path()
        result = merge([_moved(Result.load(file), file.parent, here) for file in files])
    else:
        folder = args.output or _free()
        result = compare(
            folder,
            [Transport.parse(name) for name in args.transports.split(",")],
            [name.replace("-of-", " of ") for name in args.op or OPERATIONS],
            args.runs,
            icount=args.icount,
            **shape_arguments(args),
        )
        print(f"{folder / RESULT}")
    if args.html:
        from ..report.comparison import write_comparison_report

        write_comparison_report(result, folder / "report.html")
        print(f"{folder / 'report.html'}")
    if args.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        _print(result)
    return 0


def _moved(result: Result, folder: Path, here: Path) -> Result:
    """The result of ``folder`` with the places of its traces as they are seen from ``here``."""
    seen = [
        dataclasses.replace(e, trace=os.path.relpath(folder / e.trace, here))
        for e in result.evidence
    ]
    return dataclasses.replace(result, evidence=tuple(seen))


def _print(result: Result) -> None:
    for transport in result.transports:
        print(result.provenance[transport].line())
    print()
    print_table(
        ["per", "", *result.transports, "unit"],
        [
            [
                metric.per,
                metric.name.removesuffix(f" per {metric.per}"),
                *(_series(result.series.get((metric.name, t), ())) for t in result.transports),
                metric.unit,
            ]
            for metric in result.metrics
        ],
    )
    print(f"\nmedian (least to most) of {max(map(result.runs, result.transports))} runs\n")
    pairs = [pair for pair in result.compare_pairs() if pair.difference]
    if pairs:
        print_table(
            ["", "", "difference", "p", "at least", "effect"],
            [
                [pair.metric, f"{pair.b} - {pair.a}", f"{pair.difference:+.4g}",
                 f"{pair.p:.3g}", f"{pair.least_p:.3g}", f"{pair.delta:+.2f} ({pair.effect})"]
                for pair in pairs
            ],
        )  # fmt: skip


def _series(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if min(values) == max(values):
        return f"{values[0]:.4g}"
    return f"{median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def _free() -> Path:
    number = 1
    while (path := Path(f"compare-{number}")).exists():
        number += 1
    return path
