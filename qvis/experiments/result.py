# SPDX-License-Identifier: GPL-2.0-or-later
"""What a comparison of transports found, as data.

Raw series are kept, one number a run, so that whoever doubts a summary can
make another. Results of machines that differ are never put together: see
:meth:`~qvis.trace.store.Provenance.clashes`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..trace.export import whole_file
from ..trace.model import Cause, Clock
from ..trace.store import Provenance
from .pairs import Pair, compare

__all__ = ["Evidence", "Metric", "Result", "Row", "merge"]

FORMAT = 1
KIND = "qvis comparison"


@dataclass(frozen=True)
class Metric:
    """Something that is measured once in each run."""

    name: str  # "accesses", "boot to SSH"
    unit: str  # "accesses", "s", "MiB"; of a clock: a value of Clock
    per: str  # the operation that it is the cost of: "interrupt", "mask", "boot"
    better: str = "lower"  # or "higher"


@dataclass(frozen=True)
class Row:
    """How often a register was touched."""

    device: str | None
    register: str | None
    direction: str  # "read", "write", or "" where that is not known
    cause: Cause
    count: int
    touched: bool = True  # False: an end that an interrupt controller saw, with no touch of its own


@dataclass(frozen=True)
class Evidence:
    """The trace that tells what an operation costs on a transport."""

    op: str  # as in Metric.per
    transport: str
    trace: str  # its folder, relative to the result's file
    operations: int  # how often the operation was done in it
    rows: tuple[Row, ...]


Series = Mapping[tuple[str, str], tuple[float, ...]]


@dataclass(frozen=True)
class Result:
    """Transports compared. Making one whose parts do not belong together is a UsageError."""

    metrics: tuple[Metric, ...]
    provenance: Mapping[str, Provenance]  # by transport
    series: Series  # by metric's name and transport: one number a run, in their order
    order: tuple[str, ...]  # the transport of each run, as they followed on each other
    evidence: tuple[Evidence, ...] = ()
    format: int = field(default=FORMAT)

    def __post_init__(self) -> None:
        _check_provenance(self.provenance)
        units = {metric.name: metric.unit for metric in self.metrics}
        if len(units) < len(self.metrics):
            raise UsageError("two metrics have the same name")
        for metric in self.metrics:
            _check_clock(metric, self.provenance)
        for (name, transport), values in self.series.items():
            if name not in units:
                raise UsageError(f"there are numbers for {name!r}, which is no metric")
            if not all(math.isfinite(value) for value in values):
                raise UsageError(f"{name} over {transport} has a value that is no number")
        for transport in {transport for _, transport in self.series} | set(self.order):
            if transport not in self.provenance:
                raise UsageError(f"nothing says where the numbers of {transport} come from")

    @property
    def transports(self) -> tuple[str, ...]:
        """In the order in which they are to be shown."""
        return tuple(self.provenance)

    def runs(self, transport: str) -> int:
        """How many runs there were over that transport."""
        return self.order.count(transport)

    def compare_pairs(self) -> list[Pair]:
        """Each metric of each two transports that have it, tested against each other."""
        return [
            compare(metric.name, (a, self.series[metric.name, a]), (b, self.series[metric.name, b]))
            for metric in self.metrics
            for a, b in combinations(self.transports, 2)
            if self.series.get((metric.name, a)) and self.series.get((metric.name, b))
        ]

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "kind": KIND,
            "format": self.format,
            "order": self.order,
            "metrics": [dataclasses.asdict(metric) for metric in self.metrics],
            "provenance": {name: dataclasses.asdict(p) for name, p in self.provenance.items()},
            "series": [
                {"metric": name, "transport": transport, "values": values}
                for (name, transport), values in self.series.items()
            ],
            "evidence": [dataclasses.asdict(evidence) for evidence in self.evidence],
        }

    def save(self, path: Path) -> None:
        """Write it as JSON; :class:`~qvis.errors.InfraError` when the disk is full."""
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """What :meth:`save` wrote; :class:`UsageError` if ``path`` is anything else."""
        try:
            data = json.loads(path.read_text())
            kind, version = data["kind"], data["format"]
        except FileNotFoundError:
            raise UsageError(f"there is no {path}") from None
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise UsageError(f"{path} is no result of a comparison: {problem!r}") from problem
        if (kind, version) != (KIND, FORMAT):
            raise UsageError(
                f"{path} is a {kind} of format {version}; this qvis reads a {KIND} of {FORMAT}"
            )
        try:
            return cls._from_json(data)
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise UsageError(f"{path} is damaged: {problem!r}") from problem

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Result:
        def provenance(source: dict[str, Any]) -> Provenance:
            return Provenance(**{**source, "clock": Clock(source["clock"])})

        def evidence(source: dict[str, Any]) -> Evidence:
            rows = (Row(**{**row, "cause": Cause(row["cause"])}) for row in source["rows"])
            return Evidence(**{**source, "rows": tuple(rows)})

        return cls(
            metrics=tuple(Metric(**metric) for metric in data["metrics"]),
            provenance={name: provenance(p) for name, p in data["provenance"].items()},
            series={
                (s["metric"], s["transport"]): tuple(float(value) for value in s["values"])
                for s in data["series"]
            },
            order=tuple(data["order"]),
            evidence=tuple(evidence(e) for e in data["evidence"]),
        )


def merge(results: Sequence[Result]) -> Result:
    """One result of several: more transports, more metrics, or more runs of the same.

    :class:`UsageError`, naming the difference, when they do not belong together.
    """
    if not results:
        raise UsageError("there is no result to merge")
    for a, b in combinations(results, 2):
        if a == b:
            raise UsageError("the same result is given twice: its runs would count double")
    metrics: dict[str, Metric] = {}
    provenance: dict[str, Provenance] = {}
    series: dict[tuple[str, str], tuple[float, ...]] = {}
    for result in results:
        for metric in result.metrics:
            known = metrics.setdefault(metric.name, metric)
            if known != metric:
                raise UsageError(
                    f"{metric.name} is in {metric.unit} per {metric.per} here "
                    f"and in {known.unit} per {known.per} there"
                )
        for transport, source in result.provenance.items():
            clashes = provenance.setdefault(transport, source).clashes(source)
            if clashes:
                raise UsageError(_refusal(transport, transport, clashes))
        for key, values in result.series.items():
            series[key] = series.get(key, ()) + values
    return Result(
        metrics=tuple(metrics.values()),
        provenance=provenance,
        series=series,
        order=tuple(transport for result in results for transport in result.order),
        evidence=tuple(evidence for result in results for evidence in result.evidence),
    )


def _check_provenance(provenance: Mapping[str, Provenance]) -> None:
    for transport, source in provenance.items():
        if source.transport != transport:
            raise UsageError(f"numbers of {source.transport} are given as those of {transport}")
    for (a, one), (b, other) in combinations(provenance.items(), 2):
        if clashes := one.clashes(other):
            raise UsageError(_refusal(a, b, clashes))


def _check_clock(metric: Metric, provenance: Mapping[str, Provenance]) -> None:
    """A metric in a clock's unit is of the clock that was recorded: they are never mixed.

    Nanoseconds are exempt: each trace has times besides its clock.
    """
    if metric.better not in ("lower", "higher"):
        raise UsageError(f"{metric.name}: better is {metric.better!r}, not lower or higher")
    if metric.unit not in set(Clock) - {Clock.NANOSECONDS}:
        return
    for transport, source in provenance.items():
        if source.clock != metric.unit:
            raise UsageError(
                f"{metric.name} is in {metric.unit}, but the clock of {transport} "
                f"counts {source.clock}"
            )


def _refusal(a: str, b: str, clashes: list[str]) -> str:
    both = f"{a} and {b}" if a != b else f"two results of {a}"
    return f"{both} cannot be compared: {'; '.join(clashes)}"
