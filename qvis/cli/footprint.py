# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis footprint``"""

from __future__ import annotations

import argparse
from pathlib import Path

from ._output import print_json, print_table


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="auto", help="auto, kvm or tcg (default: %(default)s)")
    parser.add_argument(
        "--runs", type=int, default=3, metavar="N",
        help="boots of each transport (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="every figure and every boot, in JSON")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page")


def run(args: argparse.Namespace) -> int:
    from ..experiments.footprint import footprint
    from ..report.footprint import html, source, tables

    result = footprint(args.backend, args.runs)
    if args.html:
        from ..trace.export import whole_file

        with whole_file(args.html) as unfinished:
            unfinished.write_text(html(result))
    if args.json:
        print_json(result.to_json())
        return 0
    print(source(result))
    for table in tables(result):
        print(f"\n{table.title}")
        print_table(table.columns, table.rows)
    print()
    for note in result.notes:
        print(f"* {note}")
    return 0
