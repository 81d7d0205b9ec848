# SPDX-License-Identifier: GPL-2.0-or-later
"""What a trace says in numbers: how often, by whom, at what cost.

The events are streamed; what is held in memory is one row an interrupt
(about 100 bytes each).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import polars as pl

from .model import Cause, Clock, Kind
from .store import Trace
from .symbols import FUNCTIONS

__all__ = ["Cost", "Delivered", "Quantiles", "Stats", "Touched", "interrupts"]

TOUCH = (Kind.ACCESS, Kind.EXIT)
HANDLERS = [name for name, role in FUNCTIONS.items() if role == "handler"]


@dataclass(frozen=True)
class Touched:
    """How often a register was touched, by accesses or by exits."""

    kind: Kind  # ACCESS or EXIT
    device: str | None  # None: nobody knows whose address it was
    register: str | None
    write: bool | None  # None: not known, or an exit for no register
    cause: Cause | None
    reason: str | None  # KVM's, of an exit for no register
    count: int
    share: float  # of all touches of this kind, 0 to 1


@dataclass(frozen=True)
class Delivered:
    """How often a vCPU took an interrupt."""

    device: str | None
    source: str | None  # "": a line for the whole device
    irq: int | None  # Linux's number
    vector: int | None  # where Linux has no number for it
    function: str | None  # the kernel's entry, likewise: "sysvec_apic_timer_interrupt"
    vcpu: int | None
    count: int


@dataclass(frozen=True)
class Quantiles:
    """Of ``count`` measurements, in the unit that the field's name or comment says."""

    count: int
    least: float
    median: float
    p90: float
    p99: float
    most: float


@dataclass(frozen=True)
class Cost:
    """What the interrupts of one device cost. None: no interrupt has both ends."""

    device: str | None
    interrupts: int
    handler: Quantiles | None  # from deliver to handler, same vCPU, in the trace's clock
    eoi: Quantiles | None  # from deliver to EOI, likewise
    latency: Quantiles | None  # from raise to deliver, ns; of the host, or modelled as the clock
    touches: dict[Cause, float]  # accesses or exits per interrupt, on average
    usual: dict[Cause, int]  # what most interrupts needed: the most common combination
    usual_count: int  # how many needed exactly that
    ended: float  # ends seen by an interrupt controller, per interrupt, with access or without


@dataclass(frozen=True)
class Stats:
    """A trace in numbers; :meth:`of` counts them."""

    clock: Clock
    events: int
    first: int | None  # ns, as the events' time; None: there are no events
    last: int | None
    kinds: dict[Kind, int]
    touched: tuple[Touched, ...]  # most frequent first
    other: float  # of touches of a register, the share whose cause is unknown or "other"
    delivered: tuple[Delivered, ...]  # by device, source and vCPU
    costs: tuple[Cost, ...]  # most interrupts first, and last those of no known device

    @classmethod
    def of(cls, trace: Trace) -> Stats:
        """Count everything in ``trace``."""
        events = trace.events()
        order = ["device", "source", "irq", "vector", "function", "vcpu"]
        no_register = pl.col("register").is_null()
        touches = (
            events.filter(pl.col("kind").is_in(TOUCH))
            .with_columns(pl.when(no_register).then(pl.col("reason")).alias("reason"))
            .group_by("kind", "device", "register", "write", "cause", "reason")
            .len("count")
        )
        unnamed = pl.col("irq").is_null()
        named_by = (pl.when(unnamed).then(pl.col(n)).alias(n) for n in ("vector", "function"))
        delivers = (
            events.filter(pl.col("kind") == Kind.DELIVER)
            .with_columns(*named_by)
            .group_by(*order)
            .len("count")
        )
        span = events.select(
            pl.col("time").min().alias("first"), pl.col("time").max().alias("last")
        )
        # Exits for no register, such as a halt, have no cause and need none.
        unclaimed = pl.col("cause").is_null() | (pl.col("cause") == Cause.OTHER)
        addressed = events.filter(
            pl.col("kind").is_in(TOUCH), pl.col("address").is_not_null()
        ).select(pl.len().alias("all"), unclaimed.sum().alias("other"))
        kinds, touch, deliver, times, registers, table = pl.collect_all(
            [events.group_by("kind").len(), touches, delivers, span, addressed, interrupts(trace)],
            engine="streaming",
        )
        counted = {Kind(kind): count for kind, count in kinds.iter_rows()}
        touched = tuple(_touched(touch.to_dicts(), counted))
        clock = trace.manifest.provenance.clock
        found = costs(table)
        if clock is Clock.NONE:  # then times are no measure either
            found = tuple(dataclasses.replace(cost, latency=None) for cost in found)
        names = pl.col("device", "source", "function").cast(pl.String)
        strings = deliver.with_columns(names)
        return cls(
            clock=clock,
            events=sum(counted.values()),
            first=times["first"][0],
            last=times["last"][0],
            kinds={kind: counted[kind] for kind in Kind if kind in counted},
            touched=touched,
            other=registers["other"][0] / max(1, registers["all"][0]),
            delivered=tuple(
                Delivered(**row) for row in strings.sort(order, nulls_last=True).to_dicts()
            ),
            costs=found,
        )

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return dataclasses.asdict(self)


def interrupts(trace: Trace) -> pl.LazyFrame:
    """One row for each interrupt that attribution has put together, in their order.

    ``interrupt``, ``device``, ``source``, ``irq`` and ``vcpu`` are as in the
    events; ``raised``, ``delivered`` and ``last`` (event) are times in ns; ``handler`` and
    ``eoi`` are units of the clock from deliver to the first driver's handler
    and the first EOI on the vCPU that took it;
    ``ended`` counts EOI events, and a column named after each
    :class:`~qvis.trace.model.Cause` the touches that belong to it.
    """
    kind = pl.col("kind")
    asked = kind.is_in((Kind.RAISE, Kind.DELIVER, Kind.FUNCTION))  # not the registers' devices
    handler = (kind == Kind.FUNCTION) & pl.col("function").cast(pl.String).is_in(HANDLERS)
    # Linux reads a register on the way to the EOI of a line: that is not its end yet.
    wrote = (pl.col("cause") == Cause.EOI) & pl.col("write").fill_null(True)
    end = (kind == Kind.EOI) | wrote
    clock = pl.col("clock").cast(pl.Int64)

    def of(what: pl.Expr, column: pl.Expr) -> pl.Expr:
        return pl.when(what).then(column)

    per_vcpu = (
        trace.events()
        .filter(pl.col("interrupt").is_not_null())
        .group_by("interrupt", "vcpu")
        .agg(
            of(asked, pl.col("device").cast(pl.String)).max().alias("device"),
            of(asked, pl.col("source").cast(pl.String)).max().alias("source"),
            pl.col("irq").max(),
            of(kind == Kind.RAISE, pl.col("time")).min().alias("raised"),
            of(kind == Kind.DELIVER, pl.col("time")).min().alias("delivered"),
            pl.col("time").max().alias("last"),
            of(kind == Kind.DELIVER, clock).min().alias("start"),
            of(handler, clock).min().alias("handler"),
            of(end, clock).min().alias("eoi"),
            (kind == Kind.EOI).sum().alias("ended"),
            *((kind.is_in(TOUCH) & (pl.col("cause") == c)).sum().alias(c) for c in Cause),
        )
    )
    return (
        per_vcpu.with_columns(
            of(pl.col("delivered").is_not_null(), pl.col("vcpu")).alias("vcpu"),
            *(
                of(pl.col(name) >= pl.col("start"), pl.col(name) - pl.col("start")).alias(name)
                for name in ("handler", "eoi")
            ),
        )
        .group_by("interrupt")
        .agg(
            pl.col("device", "source", "irq", "last").max(),
            pl.col("vcpu", "raised", "delivered", "handler", "eoi").min(),
            pl.col("ended", *Cause).sum(),
        )
        .sort("interrupt")
    )


def costs(table: pl.DataFrame) -> tuple[Cost, ...]:
    """The costs by device, of a table that :func:`interrupts` made."""
    found = []
    for (device,), rows in table.group_by("device"):
        combinations = rows.group_by(*Cause).len("count").sort("count", *Cause, descending=True)
        usual = combinations.row(0, named=True)
        latency = rows.select(pl.col("delivered") - pl.col("raised")).to_series()
        found.append(
            Cost(
                device=str(device) if device is not None else None,
                interrupts=rows.height,
                handler=_quantiles(rows["handler"]),
                eoi=_quantiles(rows["eoi"]),
                latency=_quantiles(latency),
                touches={c: mean for c in Cause if (mean := _mean(rows[c]))},
                usual={cause: usual[cause] for cause in Cause if usual[cause]},
                usual_count=usual["count"],
                ended=_mean(rows["ended"]),
            )
        )
    return tuple(sorted(found, key=lambda c: (c.device is None, -c.interrupts, c.device)))


def _mean(series: pl.Series) -> float:
    return int(series.sum()) / len(series)


def _quantiles(series: pl.Series) -> Quantiles | None:
    values = series.drop_nulls().cast(pl.Float64)
    if values.is_empty():
        return None
    at = (values.quantile(share, "linear") for share in (0, 0.5, 0.9, 0.99, 1))
    least, median, p90, p99, most = (float(value or 0) for value in at)
    return Quantiles(len(values), least, median, p90, p99, most)


def _touched(rows: list[dict[str, Any]], kinds: dict[Kind, int]) -> list[Touched]:
    found = []
    for row in rows:
        kind = Kind(row["kind"])
        cause = Cause(row["cause"]) if row["cause"] is not None else None
        found.append(
            Touched(**{**row, "kind": kind, "cause": cause, "share": row["count"] / kinds[kind]})
        )
    return sorted(found, key=lambda t: (-t.count, t.device or "", t.register or "", str(t.write)))
