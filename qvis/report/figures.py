# SPDX-License-Identifier: GPL-2.0-or-later
"""Pieces that figures are made of. Ink stretches with the page, letters never do.

Drawings are SVG without letters, stretched to the width there is; what is
written stands beside them as HTML, so it is as readable on a telephone as on
a wall. Lengths are in percent of the drawing's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from ..trace.model import Cause
from .page import Html, h, join, number

__all__ = ["Segment", "axis", "bars", "colour", "curves", "key", "mark", "strip", "svg", "ticks"]

CURVE_POINTS = 240
BEYOND = 0.99  # share of the values that a frame must hold; the rest is said in words


@dataclass(frozen=True)
class Segment:
    """A part of a bar."""

    name: str
    cause: Cause | None  # which colour it has
    value: float


def colour(cause: Cause | None) -> str:
    """The style that gives an element the colour of ``cause``."""
    return f"--c:var(--{(cause or Cause.OTHER).lower().replace(' ', '-')})"


def mark(cause: Cause | None) -> Html:
    """A small square of the cause's colour."""
    return h("span", class_="mark", style=colour(cause))


def svg(width: float, height: float, *shapes: str) -> Html:
    """A drawing that is stretched to the place it is given."""
    box = f"0 0 {width:g} {height:g}"
    return h("svg", *shapes, viewBox=box, preserveAspectRatio="none", aria_hidden="true")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``, about ``count`` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def axis(low: float, high: float, write: Callable[[float], str] = number) -> Html:
    """The numbers beneath a drawing that reaches from ``low`` to ``high``."""
    spans = []
    marks = ticks(low, high, 4)
    places = 0
    if write is number and len(marks) > 1:  # all with as many places
        places = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
    for value in marks:
        at = 100 * (value - low) / ((high - low) or 1)
        edge = "first" if at < 3 else "last" if at > 97 else None
        text = f"{value:,.{places}f}" if write is number else write(value)
        spans.append(h("span", text, style=f"left:{at:.2f}%", class_=edge))
    return h("div", *spans, class_="axis")


def key(entries: Iterable[tuple[str, str, str]], *, line: bool = False) -> Html:
    """What colours mean: style, number and name of each."""
    shape = "line" if line else "mark"
    return h(
        "ul",
        *(
            h(
                "li",
                h("span", class_=shape, style=style),
                h("b", value) if value else None,
                f" {name}",
            )
            for style, value, name in entries
        ),
        class_="key",
    )


def bars(rows: Iterable[tuple[str, Sequence[Segment]]]) -> Html:
    """A bar a row, all to one scale, made of segments that are named beneath it."""
    rows = list(rows)
    longest = max((sum(s.value for s in segments) for _, segments in rows), default=0) or 1
    drawn = []
    for name, segments in rows:
        total = sum(segment.value for segment in segments)
        parts = [
            # 88 leaves room for the total behind the longest bar.
            h("i", style=f"{colour(s.cause)};width:{88 * s.value / longest:.3f}%", title=s.name)
            for s in segments
            if s.value
        ]
        names = key((colour(s.cause), number(s.value), s.name) for s in segments if s.value)
        stack = h("div", *parts, h("span", number(total)), class_="stack")
        drawn.append(h("div", h("b", name), stack, names if parts else None, class_="bar"))
    return h("div", *drawn, class_="bars")


def curves(series: Sequence[tuple[str, pl.Series]], unit: str) -> Html:
    """The share of values up to each: one curve for each named, non-empty series."""
    ends = [float(values.quantile(BEYOND, "higher") or 0) for _, values in series]
    high = max(ends) * 1.06 or 1.0
    paths, entries, beyond = [], [], []
    for i, (name, values) in enumerate(series):
        ordered = values.sort()
        style = f"--c:var(--s{i})"
        paths.append(h("path", d=_ecdf(ordered, high), style=style))
        at = [float(ordered.quantile(q, "linear") or 0) for q in (0.5, 0.9, 0.99)]
        middle, p90, p99 = (number(value) for value in at)
        entries.append((style, middle, f"{name} (median; 90%: {p90}, 99%: {p99})"))
        most = float(ordered[-1])
        if most > high:
            beyond.append(f"{name}: up to {number(most)}")
    rules = [
        h("line", class_="rule", x1="0", x2="100", y1=f"{100 - y}", y2=f"{100 - y}")
        for y in (50, 90, 100)
    ]
    scale = [h("span", f"{y}%", class_="y", style=f"top:{100 - y}%") for y in (0, 50, 90, 100)]
    outside = f"Beyond the frame, {'; '.join(beyond)}." if beyond else None
    return join(
        [
            key(entries, line=True),
            h("div", svg(100, 100, *rules, *paths), *scale, class_="curve"),
            axis(0, high),
            h("p", f"{unit} →", class_="unit"),
            h("p", outside, class_="unit") if outside else None,
        ]
    )


def _ecdf(ordered: pl.Series, high: float) -> str:
    """The curve as an SVG path, by at most so many points, steps where values are few."""
    count = len(ordered)
    picked = sorted({round(i * (count - 1) / CURVE_POINTS) for i in range(CURVE_POINTS + 1)})
    path, y = "M0,100", 100.0
    for i in picked:
        x = 100 * float(ordered[i]) / high
        if x > 100:
            break
        path += f"L{x:.2f},{y:.2f}"
        y = 100 - 100 * (i + 1) / count
        path += f"L{x:.2f},{y:.2f}"
    return f"{path}L100,{y:.2f}"


def strip(rows: Sequence[tuple[str, str, Sequence[float], float]]) -> Html:
    """A dot for each value of each row (name, style, values, median), a bar at its median."""
    values = [value for _, _, row, _ in rows for value in row]
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or 1
    low, high = low - margin, high + margin

    def at(value: float) -> str:
        return f"left:{100 * (value - low) / (high - low):.2f}%"

    drawn: list[Html] = []
    for name, style, row, median in rows:
        dots = [
            # Neighbours are set apart in height, so that equal values are all seen.
            h("i", style=f"{style};{at(v)};top:{9 + i % 3 * 6}px", title=number(v))
            for i, v in enumerate(row)
        ]
        drawn += [
            h("div", name, class_="name"),
            h("div", *dots, h("u", style=at(median)), class_="dots"),
            h("div", number(median), class_="value"),
        ]
    return h("div", *drawn, axis(low, high), class_="strip")
