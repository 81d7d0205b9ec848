# SPDX-License-Identifier: GPL-2.0-or-later
"""The page of a comparison: every number beside its raw runs and the trace that proves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import median

from ..experiments.pairs import EFFECTS, Pair
from ..experiments.result import Evidence, Metric, Result, Row
from ..trace.export import whole_file
from ..trace.model import Cause
from .figures import Segment, bars, mark, strip
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
    table,
    tcg,
)

__all__ = ["write_comparison_report"]

CHANCE = 0.05  # a p below this is called unlikely to be chance
COUNTED = {"accesses": "access", "exits": "exit"}  # units that have a singular


def write_comparison_report(result: Result, path: Path) -> None:
    """Write a page about ``result``: one HTML file that loads nothing.

    :class:`~qvis.errors.InfraError` when the disk is full.
    """
    source = _source(result)
    title = _headline(result)
    parts: list[Html] = [_head(result, title)]
    said = (
        "Median of the runs, and the least and the most of them where they differ. Coloured: the "
        "best, and those whose runs overlap with its."
    )
    parts.append(figure("Side by side", _big(result), said, source))
    ops = list(dict.fromkeys(e.op for e in result.evidence if e.operations))
    if ops:
        drawn = [h("div", h("h3", f"per {op}"), _causes(result, op)) for op in ops]
        said = "Averages over all operations in the traces, by cause."
        noun = "accesses" if _tcg(result) else "exits"
        parts.append(figure(f"Where the {noun} come from", join(drawn), said, source))
    varying = [metric for metric in result.metrics if _varies(result, metric)]
    if varying:
        drawn = [h("div", h("h3", _label(m, whole=True)), _strip(result, m)) for m in varying]
        said = "Each dot is a run, each bar a median. The scales do not begin at zero."
        body = h("div", *drawn, class_="multiples")
        parts.append(figure("Every run", body, said, source))
    pairs = result.compare_pairs()
    if pairs:
        parts.append(figure("Are the differences chance?", _pairs(result, pairs), None, source))
    parts.append(_about(result))
    with whole_file(path) as temporary:
        temporary.write_text(page(title, *parts), encoding="utf-8")


def _tcg(result: Result) -> bool:
    return any(tcg(provenance) for provenance in result.provenance.values())


def _source(result: Result) -> str:
    """Where the numbers come from, once if the transports differ in nothing else."""
    together = ", ".join(result.transports)
    lines = {
        dataclasses.replace(provenance, transport=together).line()
        for provenance in result.provenance.values()
    }
    if len(lines) == 1:
        return lines.pop()
    return " | ".join(provenance.line() for provenance in result.provenance.values())


def _label(metric: Metric, whole: bool = False) -> str:
    """Its name and unit, without what its place says already, if not ``whole``."""
    name = metric.name if whole else metric.name.removesuffix(f" per {metric.per}")
    return name if metric.unit in name.split() else f"{name}, {metric.unit}"


def _amount(value: float, noun: str) -> str:
    *rest, unit = noun.split()
    one = COUNTED.get(unit, unit) if value == 1 else unit
    return " ".join([number(value), *rest, one])


def _headline(result: Result) -> str:
    """The first metric over all transports, in a sentence."""
    for metric in result.metrics:
        values = {
            t: median(series) for t in result.transports if (series := _runs(result, metric, t))
        }
        if values:
            name = metric.name.removesuffix(f" per {metric.per}")
            counted = metric.unit in name.split()
            noun = name if counted else metric.unit
            first, *others = values.items()
            said = [f"{_amount(first[1], noun)} over {first[0]}"]
            said += [f"{number(value)} over {transport}" for transport, value in others]
            words = f"{', '.join(said[:-1])} and {said[-1]}" if others else said[0]
            return f"Per {metric.per}{'' if counted else f', {name}'}: {words}"
    return f"Nothing was measured over {', '.join(result.transports) or 'any transport'}"


def _head(result: Result, title: str) -> Html:
    runs = [f"{number(result.runs(t))} over {t}" for t in result.transports]
    note = None
    if _tcg(result):
        note = h(
            "p",
            "The guests ran under TCG, where nothing exits: what is counted are accesses to "
            "registers. Counts hold; times say nothing about hardware.",
            class_="note",
        )
    if any(modelled(source) for source in result.provenance.values()):
        note = h("p", MODELLED, class_="note")
    if any(nested(source) for source in result.provenance.values()):
        note = h("p", NESTED, class_="note")
    # Runs of one transport after the other may differ in more than the transport.
    turns = len(list(groupby(result.order)))
    how = "Runs, interleaved" if turns > len(set(result.order)) else "Runs"
    order = h("p", f"{how}: {', '.join(runs)}.", class_="lead")
    over = h("p", f"Comparison of {', '.join(result.transports)}", class_="over")
    return h("header", over, h("h1", title), order, note)


def _runs(result: Result, metric: Metric, transport: str) -> Sequence[float]:
    return result.series.get((metric.name, transport), ())


def _varies(result: Result, metric: Metric) -> bool:
    return any(len(set(_runs(result, metric, t))) > 1 for t in result.transports)


def _big(result: Result) -> Html:
    """Operations by transports; under each row what it was made of."""
    columns = len(result.transports) + 1
    heads = (h("th", transport, class_="n") for transport in result.transports)
    parts: list[Html] = [h("thead", h("tr", h("th", ""), *heads))]
    style = f"--n:{columns - 1}"
    ordered = sorted(result.metrics, key=lambda m: [x.per for x in result.metrics].index(m.per))
    for per, metrics in groupby(ordered, key=lambda metric: metric.per):
        heading = h(
            "tr", h("th", f"per {per}", colspan=f"{columns}", scope="rowgroup"), class_="op"
        )
        rows = [heading]
        for metric in metrics:
            rows += [_measured(result, metric), _proof(result, metric, columns)]
        parts.append(h("tbody", *rows))
    return h("div", h("table", *parts, class_="big", style=style), class_="scroll", tabindex="0")


def _measured(result: Result, metric: Metric) -> Html:
    medians = {t: median(runs) for t in result.transports if (runs := _runs(result, metric, t))}
    best = _best(result, metric, medians)
    cells = []
    for transport in result.transports:
        runs = _runs(result, metric, transport)
        if not runs:
            cells.append(h("td", h("span", "-", class_="none"), class_="n"))
            continue
        spread = (
            "in every run"
            if min(runs) == max(runs)
            else f"{number(min(runs))} to {number(max(runs))}"
        )
        class_ = "n best" if transport in best else "n"
        cells.append(h("td", number(medians[transport]), h("small", spread), class_=class_))
    return h("tr", h("td", _label(metric)), *cells, class_="measured")


def _best(result: Result, metric: Metric, medians: dict[str, float]) -> list[str]:
    """The best transport and those whose runs overlap with its; none if that is all of them."""
    if not medians:
        return []
    choose = min if metric.better == "lower" else max
    first = _runs(result, metric, choose(medians, key=lambda transport: medians[transport]))
    best = [
        transport
        for transport in medians
        if min(_runs(result, metric, transport)) <= max(first)
        and max(_runs(result, metric, transport)) >= min(first)
    ]
    return best if len(best) < len(medians) else []


def _proof(result: Result, metric: Metric, columns: int) -> Html:
    sides = []
    for transport in result.transports:
        runs = _runs(result, metric, transport)
        listed = ", ".join(number(value) for value in runs)
        said = [h("p", f"{len(runs)} runs: {listed}")] if runs else []
        for evidence in result.evidence:
            if (evidence.op, evidence.transport) == (metric.per, transport):
                said += _traced(evidence)
        if said:
            sides.append(h("div", h("h3", transport), *said))
    traced = any(evidence.op == metric.per for evidence in result.evidence)
    summary = h("summary", "raw runs and traces" if traced else "raw runs")
    body = h("details", summary, h("div", *sides, class_="sides")) if sides else None
    return h("tr", h("td", body, colspan=f"{columns}"), class_="proof")


def _traced(evidence: Evidence) -> list[Html]:
    rows = [
        [
            join([_register(row), h("small", f" {row.direction}")]),
            join([mark(row.cause), row.cause]),
            number(row.count),
        ]
        for row in evidence.rows
    ]
    said = f"{number(evidence.operations)} operations in trace "
    where = h("p", said, h("a", h("code", evidence.trace), href=evidence.trace))
    if not rows:
        return [where, h("p", "No register was touched.", class_="soft")]
    return [where, table(["register", "cause", "count"], rows, text=2)]


def _register(row: Row) -> str:
    return f"{row.device or 'unknown'}.{row.register or 'unknown'}"


def _causes(result: Result, op: str) -> Html:
    rows = []
    for transport in result.transports:
        counts: dict[Cause, int] = {}
        operations = 0
        for evidence in result.evidence:
            if (evidence.op, evidence.transport) == (op, transport):
                operations += evidence.operations
                for row in filter(lambda row: row.touched, evidence.rows):
                    counts[row.cause] = counts.get(row.cause, 0) + row.count
        if operations:
            segments = [
                Segment(cause, cause, round(counts[cause] / operations, 3))
                for cause in Cause
                if cause in counts
            ]
            rows.append((transport, segments))
    return bars(rows)


def _strip(result: Result, metric: Metric) -> Html:
    rows = [
        (transport, f"--c:var(--s{i % 5})", runs, median(runs))
        for i, transport in enumerate(result.transports)
        if (runs := _runs(result, metric, transport))
    ]
    return strip(rows)


def _pairs(result: Result, pairs: list[Pair]) -> Html:
    metrics = {metric.name: metric for metric in result.metrics}
    starts = [pair.metric for pair in pairs]
    rows = [
        [
            # Named once, at the first of its pairs.
            _label(metrics[pair.metric], whole=True) if starts.index(pair.metric) == i else "",
            f"{pair.b} against {pair.a}",
            _verdict(pair),
            _signed(pair.difference),
            number(pair.ratio) if pair.ratio is not None else "-",
            f"{pair.p:.4f}" if pair.p >= 0.0001 else "<0.0001",
            _signed(round(pair.delta, 2)),
        ]
        for i, pair in enumerate(pairs)
    ]
    head = ["metric", "pair", "in words", "difference", "ratio", "p", "delta"]
    words = ", ".join(f"{word} from {least}" for least, word in reversed(EFFECTS) if least)
    explained = (
        h(
            "p",
            "p is the chance of means this far apart if the transport made no difference: all "
            "ways to deal the runs out to the two sides are tried (permutation test, two-sided). "
            "With few runs it cannot fall far, however clear the difference is.",
        ),
        h(
            "p",
            "delta compares each run of one side with each of the other (Cliff's delta): +1, all "
            f"are above; -1, all are below; 0, neither. Its words are {words} "
            "(Romano and others, 2006).",
        ),
    )
    return join(
        [table(head, rows, text=3, class_="pairs"), h("div", *explained, class_="soft after")]
    )


def _signed(value: float) -> str:
    sign = "+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else ""
    return sign + number(abs(round(value, 9)))


def _verdict(pair: Pair) -> str:
    if not pair.delta:
        return "no difference"
    if pair.p < CHANCE:
        chance = "unlikely to be chance"
    else:
        chance = "too few runs to test" if pair.least_p >= CHANCE else "could be chance"
    way = "more" if pair.delta > 0 else "less"
    always = " in every run" if abs(pair.delta) == 1 else ""
    return f"{way}{always}: {pair.effect} effect, {chance}"


def _about(result: Result) -> Html:
    names = ["", *result.transports]
    some = next(iter(result.provenance.values()), None)
    fields = some.__dataclass_fields__ if some else ()
    rows = [[name, *(str(getattr(p, name)) for p in result.provenance.values())] for name in fields]
    order = h("p", f"Order of runs: {', '.join(result.order)}.", class_="soft")
    summary = h("summary", "Where these numbers come from")
    return h("section", h("details", summary, order, table(names, rows, text=len(names))))
