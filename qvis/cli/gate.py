# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis gate``"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import (
    BootError,
    BuildError,
    GuestError,
    InfraError,
    LostMachineError,
    QvisError,
    UsageError,
)
from ..progress import note
from ..transport import COMPARED, Transport
from ._output import print_json, print_table
from ._spec import add_shape, shape_arguments

if TYPE_CHECKING:
    from ..experiments.gate import Change, Golden

USAGE = """\
qvis gate record FILE [--backend B] [--transports T,T...] [--op OP]... [shape]
       qvis gate check FILE [--transports T,T...] [--linux FOLDER] [--host-linux FOLDER] [--json]
       qvis gate bisect FILE --series qemu|linux|kvm [--good N]"""

NOTES = """\
`record` counts what a guest touches, on each transport, while it boots, takes interrupts,
masks, unmasks and moves them, and sets a device up, and writes the counts to FILE; it does all
twice, and writes nothing if there is a difference. `check` counts again. `bisect` finds the
patch of a series since which they differ.

Exit status of `check`: 0 the same; 1 another count; 125 what is to be tested does not build,
boot or get to its end (for `git bisect run`); 2 and 122 to 130 as ever, and no verdict."""

BACKGROUND = "timers, IPIs, console, halts"
SAME, DIFFERS, UNTESTABLE = 0, 1, 125
LAUNCH = "launch"  # QEMU did not start: it may lack what the machine needs


SHAPE = ("backend", "smp", "memory", "queues", "irqchip", "apic", "apicv", "pv_eoi", "costs")
OWN = {  # the options that an action looks at
    "record": ("transports", "op", *SHAPE),
    "check": ("transports", "linux", "host_linux", "json"),
    "bisect": ("series", "good"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = USAGE
    parser.epilog = NOTES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=("record", "check", "bisect"))
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--transports", metavar="T,T...",
                        help=f"default: {','.join(COMPARED)}, or what FILE has")  # fmt: skip
    parser.add_argument("--op", action="append", metavar="OP",
                        help="record: boot, interrupt, mask, unmask, change-of-CPU or set-up; "
                        "may be repeated (default: all)")  # fmt: skip
    add_shape(parser, smp=4)
    parser.set_defaults(backend="nested")
    parser.add_argument("--linux", type=Path, metavar="FOLDER",
                        help="check on nested: the guest's kernel is FOLDER's")  # fmt: skip
    parser.add_argument("--host-linux", type=Path, metavar="FOLDER",
                        help="check: likewise that of the inner host, with its KVM")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="check: the difference in JSON")
    parser.add_argument("--series", choices=("qemu", "linux", "kvm"), help="bisect: whose patches")
    parser.add_argument("--good", type=int, metavar="N",
                        help="bisect: with the first N patches it was good")  # fmt: skip


def _refuse_foreign(args: argparse.Namespace) -> None:
    """Raise UsageError for an option that the action would not look at."""
    parser = argparse.ArgumentParser()
    configure(parser)
    own = OWN[args.action]
    for name, value in vars(args).items():
        foreign = any(name in names for names in OWN.values()) and name not in own
        if foreign and value != parser.get_default(name):
            option = name.replace("_", "-")
            raise UsageError(
                f"--{option} is not for `qvis gate {args.action}`"
                + (": the file says it" if name in OWN["record"] else "")
            )


def run(args: argparse.Namespace) -> int:
    _refuse_foreign(args)
    if args.action == "record":
        return _record(args)
    if args.action == "bisect":
        return _bisect(args)
    try:
        return _check(args)
    except (BuildError, BootError, LostMachineError, GuestError) as problem:
        return _untestable(problem)
    except InfraError as problem:
        if problem.stage != LAUNCH:
            raise
        return _untestable(problem)


def _untestable(problem: QvisError) -> int:
    from . import report

    report(problem)
    return UNTESTABLE


def _record(args: argparse.Namespace) -> int:
    import dataclasses

    from ..experiments.gate import Shape, record
    from ..experiments.scripted import COUNTS, chosen

    shape = shape_arguments(args)
    if shape.pop("costs"):
        raise UsageError("--costs is for the emulated machine, which has no kernel to be gated")
    platform = shape.pop("platform")
    names = [name.replace("-of-", " of ") for name in args.op or COUNTS]
    operations = chosen({name: COUNTS.get(name, 1) for name in names})
    transports = _transports(args.transports) or COMPARED
    if args.file.exists():
        _load(args.file)
    elif not os.access(args.file.absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write {args.file}: its folder is not there, or not ours")
    golden, changes = record(
        Shape(**shape, platform=dataclasses.asdict(platform) if platform else None),
        transports,
        operations,
    )
    if any(change.cell for change in changes):
        print("two runs differ, so nothing is recorded:\n")
        _print_changes(changes)
        return DIFFERS
    golden.save(args.file)
    if changes:
        first, second = sum(c.before for c in changes), sum(c.after for c in changes)
        note(f"{BACKGROUND} were not the same twice ({first:,}, {second:,}): all else was")
    _print_totals(golden)
    return SAME


def _check(args: argparse.Namespace) -> int:
    from ..experiments.gate import Golden, check, differences, measure, with_kernels

    golden = Golden.load(args.file)
    run = measure
    if args.linux or args.host_linux:
        backend = with_kernels(golden.shape.backend, args.linux, args.host_linux)
        run = partial(measure, backend=backend)
    now, changes = check(golden, _transports(args.transports), run)
    if args.json:
        print_json({"file": str(args.file), "changes": [change.to_json() for change in changes]})
        return DIFFERS if changes else SAME
    cells = sum(len(c.cells) for counts in now.counts.values() for c in counts.values())
    if changes:
        print(f"{len(changes)} of {cells} counts differ from {args.file}:\n")
        _print_changes(changes)
    else:
        print(f"all {cells} counts are those of {args.file}")
    _print_origins(golden, now)
    moved = [c for c in differences(golden, now, background=True) if c.cell is None]
    if moved:
        sums = f"{sum(c.before for c in moved):,} -> {sum(c.after for c in moved):,}"
        print(f"not decisive, since they follow the time: {BACKGROUND}: {sums}")
    return DIFFERS if changes else SAME


def _bisect(args: argparse.Namespace) -> int:
    from ..experiments.bisect import bisect

    if args.series is None:
        raise UsageError("whose patches? --series qemu, linux or kvm")
    found = bisect(args.file, args.series, good=args.good)
    for line in found.lines():
        print(line)
    if found.changes:
        print()
        _print_changes(found.changes)
    return SAME


def _transports(text: str | None) -> list[Transport]:
    return [Transport.parse(name) for name in text.split(",")] if text else []


def _load(file: Path) -> None:
    """:class:`UsageError` now rather than after ten minutes, should something else be there."""
    from ..experiments.gate import Golden

    Golden.load(file, any_format=True)


def _print_changes(changes: Sequence[Change]) -> None:
    rows = []
    for change in changes:
        cell = change.cell
        how = [cell.cause, cell.kind if cell.kind in ("eoi", "deliver") else "",
               cell.reason if cell.device else "", cell.user] if cell else []  # fmt: skip
        rows.append([
            change.operation,
            str(change.transport),
            str(cell) if cell else BACKGROUND,
            ", ".join(word for word in how if word),
            f"{change.before:,} -> {change.after:,}",
            f"{change.each:+.4g}",
        ])  # fmt: skip
    print_table(["operation", "on", "touches", "for", "count", "each time"], rows)


def _print_origins(golden: Golden, now: Golden) -> None:
    for what, version, series in (
        ("QEMU", "qemu", "qemu_series"),
        ("Linux", "linux", "linux_series"),
        ("the inner host's Linux", "host_linux", "kvm_series"),
    ):
        then, here = (
            f"{g.provenance.get(version, '')} ({g.provenance.get(series, '')})"
            for g in (golden, now)
        )
        if then != here:
            print(f"{what}: recorded with {then}, now {here}")


def _print_totals(golden: Golden) -> None:
    print_table(
        ["touches while", "times", *map(str, golden.counts)],
        [
            [name, str(times), *(f"{c[name].total:,}" for c in golden.counts.values())]
            for name, times in golden.operations.items()
        ],
    )
    sys.stdout.flush()
