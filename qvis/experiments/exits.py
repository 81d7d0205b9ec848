# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known of an operation where real exits were recorded: where they led, how long they took.

Only KVM's tracepoints tell that. Whether an exit went on to user space is known of those
that ended within the recording; a length, where the clock is a measure of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from ..trace.model import Cause, Kind
from ..trace.stats import interrupts
from ..trace.store import Trace

__all__ = ["before_delivery", "length", "lengths", "raise_to_delivery", "tells", "to_user_space"]

ELSEWHERE = (Cause.TIMER, Cause.IPI, Cause.CONSOLE)


def tells(trace: Trace) -> bool:
    """Whether the recorder tells which exits went on to user space."""
    known = trace.events().select(pl.col("user").is_not_null().any()).collect().item()
    return bool(known)


def to_user_space(trace: Trace, devices: pl.Expr) -> int:
    """How many exits went on to user space.

    Those of registers of ``devices``, and those of no device's register at all; not those for
    timers, IPIs and the console.
    """
    of_none = pl.col("device").is_null()
    elsewhere = pl.col("cause").is_in(list(ELSEWHERE)).fill_null(False)
    return _count(trace, pl.col("user"), devices | of_none, ~elsewhere)


def before_delivery(trace: Trace, numbers: Sequence[int]) -> int:
    """How many exits went on to user space while one of these interrupts waited for its vCPU.

    From when it arrived at the local APIC until the vCPU took it, and on that vCPU: what QEMU
    had to do in between.
    """
    waits = (
        interrupts(trace)
        .filter(pl.col("interrupt").is_in(numbers))
        .select("vcpu", "raised", "delivered")
        .drop_nulls()
    )
    exits = trace.events().filter(pl.col("user")).select("vcpu", "time")
    both = waits.join(exits, on="vcpu")
    within = pl.col("time").is_between(pl.col("raised"), pl.col("delivered"))
    return int(both.filter(within).select(pl.len()).collect().item())


def lengths(trace: Trace, *conditions: pl.Expr) -> int:
    """What these exits took together, in units of the clock."""
    return int(_exits(trace, *conditions).select(pl.col("duration").sum()).collect().item())


def length(trace: Trace, *conditions: pl.Expr) -> float | None:
    """What one of these exits took, the median, in units of the clock; None: there is none."""
    found = _exits(trace, *conditions).select(pl.col("duration").median()).collect().item()
    return None if found is None else float(found)


def raise_to_delivery(trace: Trace, numbers: Sequence[int]) -> float | None:
    """From an interrupt's arrival at the local APIC until the vCPU has it: the median, likewise.

    The clock must be one for all vCPUs, as KVM's is.
    """
    kind, clock = pl.col("kind"), pl.col("clock").cast(pl.Int64)
    found = (
        trace.events()
        .filter(pl.col("interrupt").is_in(numbers))
        .group_by("interrupt")
        .agg(
            pl.when(kind == Kind.RAISE).then(clock).min().alias("raised"),
            pl.when(kind == Kind.DELIVER).then(clock).min().alias("delivered"),
        )
        .select((pl.col("delivered") - pl.col("raised")).median())
        .collect()
        .item()
    )
    return None if found is None else float(found)


def _exits(trace: Trace, *conditions: pl.Expr) -> pl.LazyFrame:
    return trace.events().filter(pl.col("kind") == Kind.EXIT, *conditions)


def _count(trace: Trace, *conditions: pl.Expr) -> int:
    return int(_exits(trace, *conditions).select(pl.len()).collect().item())
