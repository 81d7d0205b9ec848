# SPDX-License-Identifier: GPL-2.0-or-later
"""The page of one trace: what was found, in a sentence, then in pictures, then in tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ..trace.export import whole_file
from ..trace.model import Cause, Clock, Kind
from ..trace.stats import Cost, Quantiles, Stats, interrupts
from ..trace.store import Trace
from .figures import Segment, bars, colour, curves, mark
from .page import (
    MODELLED,
    NESTED,
    Html,
    figure,
    h,
    join,
    modelled,
    nested,
    number,
    page,
    share,
    table,
    tcg,
    whose_time,
)
from .timeline import caused, row_of, whole
from .words import headline, plural, touch

__all__ = ["write_trace_report"]

DEVICES = 4  # that have curves of their own, the busiest
REGISTERS = 30  # that are listed at once; the rest is a click away
STEPS = 60  # of one interrupt, at most


def write_trace_report(trace: Trace, path: Path) -> None:
    """Write a page about ``trace``: one HTML file that loads nothing.

    :class:`~qvis.errors.InfraError` when the disk is full.
    """
    stats = Stats.of(trace)
    found = interrupts(trace).collect(engine="streaming")
    source = trace.manifest.provenance.line()
    title, *more = headline(stats, trace)
    parts = [_warning(trace), _head(trace, title, more), _facts(stats, trace)]
    typical = _typical(found, stats)
    if typical is not None:
        steps, said = _steps(trace, typical)
        parts.append(figure("One interrupt, step by step", steps, said, source))
        drawing, said = row_of(trace, found, typical)
        parts.append(figure("Its neighbours, from request to end", drawing, said, source))
    if stats.events:
        drawing, said = whole(trace, stats)
        parts.append(figure("From start to end", drawing, said, source))
    if stats.touched:
        noun = plural(touch(stats, trace), 2)
        parts.append(
            figure(f"Why registers were touched: {noun} by cause", _causes(stats), None, source)
        )
    curves_of = _distribution(stats, found)
    if curves_of:
        said = f"For each length, the share of interrupts that took no longer, in {stats.clock}"
        said += " of the vCPU that took them."
        if tcg(trace.manifest.provenance):
            said += " They ran under TCG and say nothing about hardware."
        if modelled(trace.manifest.provenance):
            said += f" {MODELLED}"
        parts.append(figure("How long an interrupt takes", curves_of, said, source))
    if stats.costs:
        parts.append(figure("What it costs, in numbers", _costs(stats), None, source))
    if stats.delivered:
        parts.append(figure("Which vCPU took what", _matrix(stats), None, source))
    if stats.touched:
        said = f"{share(stats.other)} of them have no known cause."
        parts.append(figure("Registers", _registers(stats), said, source))
    parts.append(_about(trace, stats))
    with whole_file(path) as temporary:
        temporary.write_text(page(title, *(part for part in parts if part)), encoding="utf-8")


def _warning(trace: Trace) -> Html | None:
    manifest = trace.manifest
    said = list(manifest.partial)
    if manifest.lost:
        said.append(f"{number(manifest.lost)} events were seen and not kept: counts are too low.")
    if not said:
        return None
    return h(
        "div", h("p", h("strong", "This is not all.")), *(h("p", s) for s in said), class_="warning"
    )


def _head(trace: Trace, title: str, more: list[str]) -> Html:
    manifest = trace.manifest
    command = h("code", manifest.command) if manifest.command else "from boot to shutdown"
    over = join(["Trace of ", h("b", manifest.machine), ", ", command])
    note = None
    if tcg(manifest.provenance):
        note = h(
            "p",
            "The guest ran under TCG, where nothing exits: what is counted are accesses to "
            "registers. Counts hold; times say nothing about hardware.",
            class_="note",
        )
    if modelled(manifest.provenance):
        note = h("p", MODELLED, class_="note")
    if nested(manifest.provenance):
        note = h("p", NESTED, class_="note")
    lead = (h("p", f"{sentence}.", class_="lead") for sentence in more)
    return h("header", h("p", over, class_="over"), h("h1", title), *lead, note)


def _facts(stats: Stats, trace: Trace) -> Html:
    facts: list[tuple[str, str, str]] = []
    if stats.costs:
        top = stats.costs[0]
        device = top.device or "unknown devices"
        facts.append((number(top.interrupts), "", f"interrupts of {device}"))
        own = sum(mean for cause, mean in top.touches.items() if cause is not Cause.EOI)
        noun = plural(touch(stats, trace), 2)
        facts.append((number(round(own, 6)), "", f"device {noun} per interrupt, besides the EOI"))
        for what, place in ((top.handler, "handler"), (top.eoi, "EOI")):
            if what:
                said = f"from delivery to {place}, median"
                facts.append((number(what.median), str(stats.clock), said))
    facts.append((number(stats.events), "", f"events in {number(trace.manifest.seconds)} s"))
    items = (
        h("div", h("dt", said), h("dd", value, " ", h("small", unit) if unit else None))
        for value, unit, said in facts
    )
    return h("dl", *items, class_="facts")


def _typical(found: pl.DataFrame, stats: Stats) -> int | None:
    """An interrupt of the busiest device that costs what half of them cost at most."""
    if not stats.costs:
        return None
    device = pl.col("device").eq_missing(pl.lit(stats.costs[0].device))
    own = found.filter(device & pl.col("delivered").is_not_null())
    length = pl.coalesce("eoi", "handler", pl.col("delivered") - pl.col("raised"))
    own = own.with_columns(length.fill_null(0).alias("length"))
    if own.is_empty():
        return None
    distance = (pl.col("length") - pl.col("length").median()).abs()
    middle = (pl.col("delivered") - pl.col("delivered").median()).abs()
    return int(own.sort(distance, middle, "interrupt")["interrupt"][0])


def _steps(trace: Trace, interrupt: int) -> tuple[Html, str]:
    rows = (
        trace.events()
        .filter(pl.col("interrupt") == interrupt)
        .head(STEPS)
        .collect(engine="streaming")
        .to_dicts()
    )
    start = rows[0]["time"]
    taken = next((row for row in rows if row["kind"] == Kind.DELIVER), None)
    unit = str(trace.manifest.provenance.clock)
    head = ("ns", "" if trace.manifest.provenance.clock is Clock.NONE else unit, "", "what happens")
    classes = ("at", "clock", "dot", None)
    cells = (h("span", text, class_=class_) for text, class_ in zip(head, classes, strict=True))
    lines = [h("li", *cells, class_="head")]
    for row in rows:
        clock = ""
        same = taken and row["vcpu"] == taken["vcpu"]
        if same and taken and None not in (row["clock"], taken["clock"]):
            clock = f"{row['clock'] - taken['clock']:+,}" if row is not taken else "0"
        cause = caused(row)
        style = colour(cause) if cause else None
        lines.append(
            h(
                "li",
                h("span", f"{row['time'] - start:+,}" if lines[1:] else "0", class_="at"),
                h("span", clock, class_="clock"),
                h("span", class_="dot", style=style),
                h("span", *_told(row)),
            )
        )
    whose = whose_time(trace.manifest.provenance).capitalize()
    said = f"Interrupt {number(interrupt)}, a typical one. {whose} nanoseconds count from its first"
    if trace.manifest.provenance.clock is Clock.NONE:
        said += " event, and tell in which order things happened."
    else:
        said += f" event, {unit} of the vCPU that took it from delivery."
    return h("ol", *lines, class_="steps"), said


def _told(row: dict[str, Any]) -> Iterator[Html | str]:
    """A step in words."""
    kind = row["kind"]
    place = f"vCPU {row['vcpu']}" if row["vcpu"] is not None else None
    owner = " ".join(part for part in (row["device"], row["source"]) if part)
    vector = f" vector {row['vector']}" if row["vector"] is not None else " an interrupt"
    detail = []
    if kind == Kind.RAISE:
        yield f"{owner or 'a device'} asks for{vector}"
    elif kind == Kind.DELIVER:
        yield f"{place or 'a vCPU'} takes{vector}"
        if row["pc"] is not None:
            detail.append(f"was at {row['pc']:#x}")
        if row["irq"] is not None:
            detail.append(f"IRQ {row['irq']} in Linux")
    elif kind == Kind.FUNCTION:
        yield "the kernel enters "
        yield h("code", row["function"] or "a function")
    elif kind == Kind.EOI:
        yield f"{row['device'] or 'the interrupt controller'} sees the end of{vector}"
    else:
        verb = {True: "writes", False: "reads", None: "touches"}[row["write"]]
        register = f"{row['device'] or '?'}.{row['register'] or '?'}"
        yield f"{verb} "
        yield h("code", register)
        if row["value"] is not None:
            detail.append(f"{row['value']:#x}")
        detail.append(row["cause"] or "of unknown cause")
        if kind == Kind.EXIT:
            detail.append(f"exit {row['reason'] or ''}".strip())
    if detail:
        yield h("small", f" · {' · '.join(detail)}")


def _causes(stats: Stats) -> Html:
    rows: dict[str, list[Segment]] = {}
    for touched in stats.touched:
        device = touched.device or (
            "exits for no register" if touched.reason else "unknown address"
        )
        name = touched.cause or touched.reason or "unknown cause"
        segments = rows.setdefault(device, [])
        same = next((s for s in segments if s.name == name), None)
        if same:
            segments.remove(same)
        count = touched.count + (same.value if same else 0)
        segments.append(Segment(name, touched.cause, count))
    order = list(Cause)

    def rank(segment: Segment) -> tuple[int, float]:
        return (order.index(segment.cause) if segment.cause else len(order), -segment.value)

    by_total = sorted(rows.items(), key=lambda row: -sum(s.value for s in row[1]))
    return bars((device, sorted(segments, key=rank)) for device, segments in by_total)


def _distribution(stats: Stats, found: pl.DataFrame) -> Html | None:
    drawn = []
    for cost in stats.costs[:DEVICES]:
        own = found.filter(pl.col("device").eq_missing(pl.lit(cost.device)))
        series = [
            (f"to {name}", values)
            for name, column in (("handler", "handler"), ("EOI", "eoi"))
            if not (values := own[column].drop_nulls()).is_empty()
        ]
        if series:
            title = f"{cost.device or 'unknown devices'}, {number(cost.interrupts)} interrupts"
            drawn.append(h("div", h("h3", title), curves(series, str(stats.clock))))
    return h("div", *drawn, class_="multiples") if drawn else None


def _costs(stats: Stats) -> Html:
    rows = []
    for cost in stats.costs:
        measures: list[tuple[str, Quantiles | None, str]] = [
            ("raise to delivery", cost.latency, "ns"),
            ("delivery to handler", cost.handler, str(stats.clock)),
            ("delivery to EOI", cost.eoi, str(stats.clock)),
        ]
        rows += [
            [
                cost.device or "unknown",
                name,
                unit,
                number(q.count),
                *(number(value) for value in (q.least, q.median, q.p90, q.p99, q.most)),
            ]
            for name, q, unit in measures
            if q
        ]
    head = ["device", "from, to", "unit", "measured", "least", "median", "90%", "99%", "most"]
    return join([_touches(stats.costs), table(head, rows, text=3) if rows else None])


def _touches(costs: Sequence[Cost]) -> Html:
    """Averages by cause; an EOI that nobody trapped is one too."""
    causes = [cause for cause in Cause if any(cause in cost.touches for cost in costs)]
    head = ["device", "", "interrupts", *causes, "EOIs seen by a controller"]
    rows = [
        [
            cost.device or "unknown",
            "on average" if cost.usual_count < cost.interrupts else "each",
            number(cost.interrupts),
            *(number(round(cost.touches.get(cause, 0), 3)) for cause in causes),
            number(round(cost.ended, 3)),
        ]
        for cost in costs
    ]
    return table(head, rows, text=2)


def _matrix(stats: Stats) -> Html:
    cpus = sorted({d.vcpu for d in stats.delivered if d.vcpu is not None})
    counts: dict[tuple[str, str, str], dict[int | None, int]] = {}
    for d in stats.delivered:
        vector = f"vector {d.vector}" if d.vector is not None else ""
        named = f"{d.irq}" if d.irq is not None else d.function or vector or "unknown"
        source = d.source if d.source is not None else ""
        if d.irq is not None and not source:
            source = "line"
        row = counts.setdefault((d.device or "", source, named), {})
        row[d.vcpu] = row.get(d.vcpu, 0) + d.count
    rows = []
    for names, row in sorted(counts.items(), key=lambda item: (not item[0][2].isdigit(), item[0])):
        total = sum(row.values())
        cells: list[str] = [_heat(row.get(cpu, 0), total) for cpu in cpus]
        rows.append([*names, *cells, number(total)])
    head = ["device", "source", "IRQ", *(f"vCPU {cpu}" for cpu in cpus), "all"]
    return table(head, rows, text=3, class_="matrix")


def _heat(count: int, total: int) -> Html:
    if not count:
        return h("span", "0", class_="none")
    return h("span", number(count), class_="heat", style=f"--w:{count / total:.3f}")


def _registers(stats: Stats) -> Html:
    rows = [
        [
            t.device or "unknown",
            t.register or t.reason or "unknown",
            {True: "write", False: "read", None: ""}[t.write],
            join([mark(t.cause), t.cause or "unknown"]) if t.cause or not t.reason else "",
            number(t.count),
            join([share(t.share), _meter(t.share)]),
        ]
        for t in stats.touched
    ]
    head = ["device", "register", "direction", "cause", "count", "share"]
    shown = table(head, rows[:REGISTERS], text=4)
    if len(rows) <= REGISTERS:
        return shown
    more = table(head, rows[REGISTERS:], text=4)
    summary = h("summary", f"{number(len(rows) - REGISTERS)} more registers")
    return join([shown, h("details", summary, more)])


def _meter(value: float) -> Html:
    return h("span", h("i", style=f"width:{100 * value:.2f}%"), class_="meter")


def _about(trace: Trace, stats: Stats) -> Html:
    provenance = trace.manifest.provenance
    rows = [[name, str(getattr(provenance, name))] for name in provenance.__dataclass_fields__]
    rows += [["lost events", number(trace.manifest.lost)]]
    rows += [[f"{kind} events", number(count)] for kind, count in stats.kinds.items()]
    said = "Where these numbers come from"
    return h("section", h("details", h("summary", said), table(["", ""], rows, text=2)))
