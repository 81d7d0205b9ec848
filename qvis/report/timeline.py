# SPDX-License-Identifier: GPL-2.0-or-later
"""When things happened: the whole trace in bins, and some interrupts in a row.

The whole is counted, never drawn event by event, so that a trace of any length
makes a page of the same size.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import polars as pl

from ..trace.model import Cause, Kind
from ..trace.stats import Stats
from ..trace.store import Trace
from .figures import axis, colour, key, svg
from .page import Html, duration, h, join, number, whose_time
from .words import plural

__all__ = ["caused", "row_of", "whole"]

BINS = 480
LANES = 24  # of each sort; the busiest are drawn
HEIGHT = 100
IN_A_ROW = 12  # interrupts


def whole(trace: Trace, stats: Stats) -> tuple[Html, str]:
    """The whole trace, and in words what is seen there."""
    first, last = stats.first or 0, stats.last or 0
    width = max(1, -(-(last - first + 1) // BINS))
    lane = _lane(trace)
    counted = (
        trace.events()
        .with_columns(((pl.col("time") - first) // width).alias("bin"), sort=lane[0], name=lane[1])
        .filter(pl.col("name").is_not_null())
        .group_by("sort", "name", "bin")
        .agg(pl.len().alias("all"), (pl.col("kind") == Kind.DELIVER).sum().alias("hit"))
        .collect(engine="streaming")
    )
    parts: list[Html] = []
    left_out = 0
    heights = {}
    for sort, title in (("queue", "Interrupts asked for, by queue"), ("cpu", "Events, by vCPU")):
        rows = counted.filter(pl.col("sort") == sort)
        if rows.is_empty():
            continue
        highest = heights[sort] = int(rows.select(pl.col("all").max()).item())
        names, more = _busiest(rows)
        left_out += more
        parts.append(h("div", title, class_="group"))
        for name in names:
            own = rows.filter(pl.col("name") == name).sort("bin")
            columns = own.select("bin", "all", "hit").rows()
            if sort == "queue":
                shapes = [_columns([(b, n) for b, n, _ in columns], highest, "hit")]
            else:
                shapes = [
                    _columns([(b, n) for b, n, _ in columns], highest, "all"),
                    _columns([(b, n) for b, _, n in columns], highest, "hit"),
                ]
            drawing = h("div", svg(BINS, HEIGHT, *shapes), class_="lane")
            parts += [h("div", name, class_="name", title=name), drawing]
    scale = axis(0, width * BINS, duration)
    entries = [("--c:var(--accent)", "", "interrupts"), ("--c:var(--other)", "", "all events")]
    said = f"Each column counts {duration(width)}"
    tops = [
        f"{number(heights[sort])} {plural(what, heights[sort])} of a {place}"
        for sort, what, place in (("queue", "interrupt", "queue"), ("cpu", "event", "vCPU"))
        if sort in heights
    ]
    if tops:
        said += f"; the highest are {' and '.join(tops)}"
    said += (
        ". Heights are square roots, so that little is seen beside much. Nothing is sampled: "
        "every request and everything on a vCPU is in a column."
    )
    if left_out:
        said += f" {left_out} less busy lanes are left out."
    return join([key(entries), h("div", *parts, scale, class_="lanes")]), said


def caused(row: dict[str, Any]) -> Cause | None:
    """What an event is coloured for: its cause, or that an interrupt controller saw the end."""
    if row["cause"] is None:
        return Cause.EOI if row["kind"] == Kind.EOI else None
    return Cause(row["cause"])


def row_of(trace: Trace, table: pl.DataFrame, chosen: int) -> tuple[Html, str]:
    """Some interrupts around ``chosen``, each from its beginning, beneath each other.

    ``table`` is what :func:`~qvis.trace.stats.interrupts` found.
    """
    begin = pl.min_horizontal("raised", "delivered").alias("begin")
    device = table.filter(pl.col("interrupt") == chosen)["device"]
    own = table.filter(pl.col("device").eq_missing(device.item())).with_columns(begin)
    own = own.filter(pl.col("begin").is_not_null()).sort("begin", "interrupt")
    place = own["interrupt"].to_list().index(chosen)
    first = max(0, min(place - IN_A_ROW // 2, own.height - IN_A_ROW))
    near = own.slice(first, IN_A_ROW)
    # A straggler must not make all others too short to see.
    lengths = [end - start for start, end in near.select("begin", "last").iter_rows()]
    reach = max(1, min(max(lengths), round(3 * median(lengths)) or 1))
    reach += max(1, reach // 25)
    events = (
        trace.events()
        .filter(
            pl.col("time").is_between(near["begin"].min(), near["last"].max()),
            pl.col("interrupt").is_in(near["interrupt"].to_list()),
        )
        .collect(engine="streaming")
    )
    drawn: list[Html] = []
    for row in near.iter_rows(named=True):
        rows = events.filter(pl.col("interrupt") == row["interrupt"]).to_dicts()
        taken = f"vCPU {row['vcpu']}" if row["vcpu"] is not None else "?"
        name = f"{row['source'] or row['device'] or '?'} to {taken}"
        shapes = _life(rows, row, reach)
        class_ = "name chosen" if row["interrupt"] == chosen else "name"
        drawn += [
            h("div", name, class_=class_, title=f"interrupt {number(row['interrupt'])}"),
            h("div", svg(1000, HEIGHT, *shapes), class_="lane life"),
        ]
    causes = [cause for row in events.to_dicts() if (cause := caused(row)) is not None]
    entries = [("--c:var(--wait)", "", "asked for"), ("--c:var(--taken)", "", "taken by a vCPU")]
    entries += [(colour(cause), "", str(cause)) for cause in dict.fromkeys(causes)]
    if events.filter(pl.col("kind") == Kind.FUNCTION).height:
        entries.append(("--c:var(--ink)", "", "function of the kernel"))
    whose = whose_time(trace.manifest.provenance)
    said = (
        f"{number(near.height)} interrupts of {device.item() or 'an unknown device'} that "
        f"followed on each other, each from its first event on; time is {whose}."
    )
    over = near.filter(pl.col("last") - pl.col("begin") > reach).height
    if over:
        said += f" {over} of them {'lasts' if over == 1 else 'last'} longer than what is drawn."
    return join([key(entries), h("div", *drawn, axis(0, reach, duration), class_="lanes")]), said


def _life(rows: list[dict[str, Any]], life: dict[str, Any], reach: int) -> list[Html]:
    """What happened in one interrupt, by time since its beginning."""

    def x(time: int) -> float:
        return min(1000.0, 1000 * (time - int(life["begin"])) / reach)

    def span(start: int, end: int, class_: str) -> Html:
        width = f"{x(end) - x(start):.2f}"
        box = {"y": "22", "width": width, "height": "56"}
        return h("rect", class_=class_, x=f"{x(start):.2f}", **box)

    shapes = []
    if life["raised"] is not None and life["delivered"] is not None:
        shapes.append(span(life["raised"], max(life["raised"], life["delivered"]), "wait"))
    if life["delivered"] is not None:
        shapes.append(span(life["delivered"], max(life["delivered"], life["last"]), "taken"))
    for row in rows:
        if row["time"] - life["begin"] > reach:
            continue
        at = f"{x(row['time']):.2f}"
        if row["kind"] == Kind.FUNCTION:
            shapes.append(h("line", class_="thin", x1=at, x2=at, y1="22", y2="78"))
        elif (cause := caused(row)) is not None:
            style = colour(cause)
            shapes.append(h("line", class_="tick", style=style, x1=at, x2=at, y1="4", y2="96"))
    return shapes


def _lane(trace: Trace) -> tuple[pl.Expr, pl.Expr]:
    """The lane that an event belongs to: its sort, and its name or null."""
    is_raise = pl.col("kind") == Kind.RAISE
    source = pl.col("source").cast(pl.String).fill_null("").replace("", "line")
    device = pl.col("device").cast(pl.String)
    queue = pl.concat_str(device, source, separator=" ").fill_null("others")
    cpu = pl.when(pl.col("vcpu").is_not_null()).then(pl.format("vCPU {}", "vcpu"))
    sort = pl.when(is_raise).then(pl.lit("queue")).otherwise(pl.lit("cpu"))
    return sort, pl.when(is_raise).then(queue).otherwise(cpu)


def _busiest(rows: pl.DataFrame) -> tuple[list[str], int]:
    """Names of the lanes to draw, in order, and how many are not drawn."""
    by_name = rows.group_by("name").agg(pl.col("all").sum().alias("weight"))
    kept = by_name.sort("weight", "name", descending=[True, False]).head(LANES)["name"]
    ordered = sorted(kept, key=lambda name: (len(name) if name.startswith("vCPU") else 0, name))
    return ordered, by_name.height - len(ordered)


def _columns(counts: list[tuple[int, int]], highest: int, class_: str) -> Html:
    path = ""
    for bin_, count in counts:
        if count:
            # By its square root: one event must be seen beside ten thousand.
            high = max(4.0, HEIGHT * math.sqrt(count / highest))
            path += f"M{bin_},{HEIGHT}v{-high:.3g}h1V{HEIGHT}z"
    return h("path", d=path, class_=class_)
