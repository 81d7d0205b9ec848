# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis calibrate``"""

from __future__ import annotations

import argparse
from pathlib import Path

from ._output import print_table

NOTES = """\
The traces are of one host's KVM (`qvis trace` on a machine with --backend kvm). What they have
no exits of keeps the cost and the source that it had. `--costs` of `qvis sweep` and of
`qvis up --backend emulated` take the table."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = NOTES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="costs.toml")
    parser.add_argument("--costs", type=Path, metavar="BASE",
                        help="the table to begin with (default: qvis's own)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from ..emulated.costs import Costs
    from ..experiments.calibrate import LEAST, calibrate, write_costs
    from ..trace.store import Trace

    found = calibrate([Trace.open(path) for path in args.traces], Costs.load(args.costs))
    write_costs(found.costs, args.output)
    fits = {(fit.reason, fit.handler): fit for fit in found.fits}
    rows = []
    for kind, base in found.base.exits.items():
        row = ["/".join(kind), str(base.cycles), "kept", "0", ""]
        if fit := fits.get(kind):
            row[3:] = [str(fit.count), f"{fit.low} to {fit.high}"]
            if fit.count >= LEAST:
                row[2] = str(fit.cycles)
        rows.append(row)
    print_table(["exit", "base", "fitted", "n", "quartiles"], rows)
    print(f"\nin modelled cycles, of which {found.costs.frequency} make a second\n")
    print_table(
        ["trace", "exits took", "of kinds in the table", "by the table", "explained"],
        [
            [str(one.trace), str(one.measured), str(one.known), str(one.predicted),
             f"{one.explained:.1%}"]
            for one in found.traces
        ],
    )  # fmt: skip
    print(f"\n{args.output}")
    return 0
