# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis trace``"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ._output import print_json, print_table
from ._spec import add_spec, spec_arguments

if TYPE_CHECKING:
    from ..trace.stats import Stats
    from ..trace.store import Trace

USAGE = """\
qvis trace NAME [-o FOLDER] [--vmlinux FILE] [--deadline S] [-- CMD]
       qvis trace --boot [--transport T] [--icount]... [-o FOLDER] -- CMD
       qvis trace show TRACE [--device D] [--cause C] [--limit N]
       qvis trace stats TRACE [--json]
       qvis trace export TRACE jsonl|csv|perfetto|html [-o FILE]
       qvis trace attribute TRACE"""

NOTES = """\
Records what a guest does to devices, and the interrupts that it takes, while CMD runs in
it, or until Ctrl-C; CMD's exit status is passed on. With --boot a machine of its own is
recorded (on tcg and nested) from its first instruction until CMD is done and it has shut down;
with --icount as well, each such trace has the same events. A trace is a folder; `attribute`
makes its events anew from what was recorded, after a full disk, say."""

SHOWN = ("time", "vcpu", "clock", "kind", "device", "register", "write", "value", "cause",
         "vector", "function", "reason", "user", "source", "interrupt")  # fmt: skip
SUFFIXES = {"jsonl": ".jsonl", "csv": ".csv", "perfetto": ".pftrace", "html": ".html"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = USAGE
    parser.epilog = NOTES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(after_dashes=[])
    parser.add_argument("words", metavar="NAME | ACTION TRACE", nargs="*")
    parser.add_argument("-o", "--output", type=Path, metavar="PATH",
                        help="default: NAME-1.trace or the first number that is free")  # fmt: skip
    parser.add_argument("--vmlinux", type=Path, metavar="FILE",
                        help="symbols of the guest's kernel, if qvis did not build it")  # fmt: skip
    parser.add_argument("--deadline", type=float, default=600.0, metavar="S",
                        help="seconds for CMD (default: 600)")  # fmt: skip
    parser.add_argument("--boot", action="store_true", help="record a machine of its own")
    add_spec(parser)
    parser.add_argument("--device", help="show: only this one's registers, such as blk0")
    parser.add_argument("--cause", help='show: only these, such as mask or "route change"')
    parser.add_argument("--limit", type=int, default=100, metavar="N",
                        help="show: at most so many events (default: 100, 0 for all)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="stats: in JSON")


def run(args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace, Trace], int]] = {
        "show": _show,
        "stats": _stats,
        "export": _export,
        "attribute": _attribute,
    }
    if args.deadline <= 0:
        raise UsageError(f"--deadline must be more than 0 seconds, not {args.deadline:g}")
    if args.limit < 0:
        raise UsageError(f"--limit must be at least 0, not {args.limit}")
    if args.boot:
        return _boot(args)
    if args.words and args.words[0] in actions:
        if len(args.words) < 2:
            raise UsageError(f"which trace? qvis trace {args.words[0]} TRACE")
        return _act(actions[args.words[0]], args)
    if len(args.words) != 1:
        raise UsageError("name one machine, or an action and a trace (see `qvis trace --help`)")
    return _record(args)


def _act(action: Callable[[argparse.Namespace, Trace], int], args: argparse.Namespace) -> int:
    from polars.exceptions import ComputeError

    from ..trace.store import Trace

    trace = Trace.open(Path(args.words[1]))
    try:
        return action(args, trace)
    except ComputeError as problem:  # of a Parquet file that cannot be read
        reason = str(problem).splitlines()[0]
        raise UsageError(
            f"the events of {trace.path} are damaged ({reason}): `qvis trace attribute "
            f"{trace.path}` makes them anew"
        ) from problem


def _record(args: argparse.Namespace) -> int:
    from ..machine.machine import Machine
    from ..progress import note
    from ..trace.record import record, recording

    name = args.words[0]
    output = args.output or _free(name)
    with Machine.attach(name) as machine:
        if args.after_dashes:
            command = shlex.join(args.after_dashes)
            trace, completed = record(
                machine, output, command, vmlinux=args.vmlinux, deadline=args.deadline
            )
            sys.stdout.write(completed.stdout)
            sys.stderr.write(completed.stderr)
            _tell(trace)
            return completed.status
        with recording(machine, output, vmlinux=args.vmlinux) as session:
            note(f"recording {name} until Ctrl-C")
            _wait_for_interrupt()
        assert session.trace is not None  # or an error was raised
        _tell(session.trace)
    return 0


def _boot(args: argparse.Namespace) -> int:
    from ..trace.record import record_boot

    if args.words or not args.after_dashes:
        raise UsageError("usage: qvis trace --boot [options] -- CMD")
    trace, status = record_boot(
        args.output or _free("boot"),
        shlex.join(args.after_dashes),
        deadline=args.deadline,
        **spec_arguments(args),
    )
    _tell(trace)
    return status


def _show(args: argparse.Namespace, trace: Trace) -> int:
    import polars as pl

    from ..trace.model import Cause

    events = trace.events()
    if args.device:
        events = events.filter(pl.col("device").cast(pl.String) == args.device)
    if args.cause:
        if args.cause not in list(Cause):
            raise UsageError(f"no cause {args.cause!r}: there are {', '.join(Cause)}")
        events = events.filter(pl.col("cause") == args.cause)
    shown = (events.head(args.limit) if args.limit else events).select(SHOWN).collect()
    columns = [name for name in SHOWN if shown[name].null_count() < len(shown)]
    start = shown["time"][0] if len(shown) else 0
    rows = [[_cell(name, row[name], start) for name in columns] for row in shown.to_dicts()]
    print_table(["us" if name == "time" else name for name in columns], rows)
    if args.limit and len(shown) == args.limit:
        print(f"... the first {args.limit}; --limit 0 shows all", file=sys.stderr)
    _warn(trace)
    return 0


def _cell(column: str, value: Any, start: int) -> str:
    if value is None:
        return ""
    if column == "time":
        return f"{(value - start) / 1000:.3f}"
    if column == "value":
        return f"{value:#x}"
    if column == "write":
        return "write" if value else "read"
    if column == "user":
        return "yes" if value else "no"
    return str(value)


def _stats(args: argparse.Namespace, trace: Trace) -> int:
    from ..trace.stats import Stats

    stats = Stats.of(trace)
    if args.json:
        print_json({"manifest": trace.manifest.to_json(), "stats": stats.to_json()})
        return 0
    _print_stats(stats, trace)
    return 0


def _print_stats(stats: Stats, trace: Trace) -> None:
    print(trace.manifest.provenance.line())
    print(f"{stats.events:,} events in {trace.manifest.seconds:.2f} s\n")
    print_table(
        ["", "device", "register", "", "cause", "count", "share"],
        [
            [
                str(touch.kind), touch.device or "", touch.register or touch.reason or "",
                {None: "", True: "write", False: "read"}[touch.write], touch.cause or "",
                f"{touch.count:,}", f"{touch.share:.2%}",
            ]
            for touch in stats.touched
        ],
    )  # fmt: skip
    print(f"\nof cause other: {stats.other:.2%}\n")
    unit = str(stats.clock)
    print_table(
        ["interrupts of", "count", f"to handler, {unit}", f"to EOI, {unit}", "touches of each"],
        [
            [
                cost.device or "(no device)",
                f"{cost.interrupts:,}",
                f"{cost.handler.median:,.0f}" if cost.handler else "",
                f"{cost.eoi.median:,.0f}" if cost.eoi else "",
                ", ".join(f"{mean:.3g} {cause}" for cause, mean in cost.touches.items()),
            ]
            for cost in stats.costs
        ],
    )
    _warn(trace)


def _export(args: argparse.Namespace, trace: Trace) -> int:
    from ..report.trace import write_trace_report
    from ..trace.export import to_csv, to_jsonl
    from ..trace.perfetto import to_perfetto

    writers = {
        "jsonl": to_jsonl,
        "csv": to_csv,
        "perfetto": to_perfetto,
        "html": write_trace_report,
    }
    kind = args.words[2] if len(args.words) == 3 else None
    if kind not in writers:
        raise UsageError(f"export as what? one of {', '.join(writers)}")
    output = args.output or trace.path.with_name(f"{trace.path.name}{SUFFIXES[kind]}")
    writers[kind](trace, output)
    print(output)
    _warn(trace)
    return 0


def _attribute(args: argparse.Namespace, trace: Trace) -> int:
    from ..trace.record import attribute_trace

    _tell(attribute_trace(trace))
    return 0


def _free(name: str) -> Path:
    """The first of NAME-1.trace, NAME-2.trace... that is not there."""
    number = 1
    while (path := Path(f"{name}-{number}.trace")).exists():
        number += 1
    return path


def _tell(trace: Trace) -> None:
    print(
        f"qvis: {trace.path}: {trace.manifest.events:,} events in "
        f"{trace.manifest.seconds:.2f} s; `qvis trace stats {trace.path}` counts them",
        file=sys.stderr,
    )
    _warn(trace)


def _warn(trace: Trace) -> None:
    for reason in trace.manifest.partial:
        print(f"qvis: partial: {reason}", file=sys.stderr)


def _wait_for_interrupt() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print(file=sys.stderr)
