# SPDX-License-Identifier: GPL-2.0-or-later
"""Results of comparisons: round trips, tests of pairs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from qvis.errors import UsageError
from qvis.experiments.pairs import compare
from qvis.experiments.result import Evidence, Metric, Result, Row, merge
from qvis.trace.model import Cause, Clock

from ..trace.synthetic import provenance

ACCESSES = Metric("accesses per interrupt", "accesses", "interrupt")
BOOT = Metric("boot to SSH", "s", "boot")


def result(**series: tuple[float, ...]) -> Result:
    """Of boots over the transports that are named, with these times in s."""
    values = series or {"pci": (1.38, 1.40, 1.36), "intx": (1.58, 1.55, 1.61)}
    return Result(
        metrics=(BOOT,),
        provenance={name: provenance(name) for name in values},
        series={(BOOT.name, name): numbers for name, numbers in values.items()},
        order=tuple(name for name, numbers in values.items() for _ in numbers),
    )


def full() -> Result:
    """With everything that a result can have."""
    rows = (
        Row("blk0", "InterruptStatus", "read", Cause.STATUS, 1000),
        Row(None, None, "", Cause.OTHER, 3),
    )
    one = result()
    return dataclasses.replace(
        one,
        metrics=(ACCESSES, BOOT),
        series={**one.series, (ACCESSES.name, "intx"): (3.0, 3.0, 3.0)},
        evidence=(Evidence("interrupt", "intx", "traces/intx-1", 1000, rows),),
    )


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    full().save(path)
    assert Result.load(path) == full()
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert full().runs("pci") == 3
    assert full().transports == ("pci", "intx")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", "null", "{}", '{"format": 1}', '{"kind": "qvis comparison", "format": 1}',
        '{"kind": "qvis comparison", "format": 1, "metrics": 5}', "\x00",
    ],
)  # fmt: skip
def test_damaged_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"result\.json"):
        Result.load(path)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with pytest.raises(UsageError, match="there is no"):
        Result.load(path)
    full().save(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "format": 2}))
    with pytest.raises(UsageError, match="of format 2"):
        Result.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError):
        Result.load(path)


def change(data: dict[str, Any], *path: str | int, value: Any) -> str:
    inner: Any = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("provenance", "pci", "clock"), "sundial"),
        (("evidence", 0, "rows", 0, "cause"), "boredom"),
        (("series", 0, "values"), ["many"]),
        (("series", 0, "metric"), "beauty"),
        (("metrics", 0, "better"), "prettier"),
    ],
)
def test_damage_within(tmp_path: Path, path: tuple[str | int, ...], value: Any) -> None:
    file = tmp_path / "result.json"
    full().save(file)
    file.write_text(change(json.loads(file.read_text()), *path, value=value))
    with pytest.raises(UsageError):
        Result.load(file)


def test_pairs() -> None:
    (pair,) = result().compare_pairs()
    assert (pair.a, pair.b, pair.runs) == ("pci", "intx", (3, 3))
    assert pair.medians == (1.38, 1.58)
    assert pair.difference == pytest.approx(0.2)
    assert pair.ratio == pytest.approx(1.58 / 1.38)
    assert pair.p == pytest.approx(0.1)  # 2 of the 20 ways to deal out 3 + 3 runs
    assert pair.least_p == pytest.approx(0.1)
    assert (pair.delta, pair.effect) == (1.0, "large")
    three = result(pci=(1.0, 2.0), intx=(2.0, 3.0), msi=(1.0, 2.0)).compare_pairs()
    assert [(p.a, p.b) for p in three] == [("pci", "intx"), ("pci", "msi"), ("intx", "msi")]
    assert full().compare_pairs()[0].metric == BOOT.name  # accesses are known of intx only


@pytest.mark.parametrize(
    ("a", "b", "p", "delta"),
    [
        ((3, 3, 3), (3, 3, 3), 1.0, 0.0),
        ((0,) * 6, (2,) * 6, 2 / 924, 1.0),
        ((0,) * 6, (0,) * 6, 1.0, 0.0),
        ((5, 5), (7, 7, 7), 2 / 10, 1.0),
        ((1, 2, 3), (1, 2, 3), 1.0, 0.0),
        ((1.5,), (2.5,), 1.0, 1.0),
        ((4, 5, 6, 7), (0, 1, 2, 3), 2 / 70, -1.0),
    ],
)
def test_p_of_small_series_is_exact(
    a: tuple[float, ...], b: tuple[float, ...], p: float, delta: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = compare("m", ("a", a), ("b", b))
    assert pair.p == pytest.approx(p)
    assert pair.delta == delta
    assert pair.least_p <= pair.p
    if not any(a):
        assert pair.ratio is None


def test_p_of_long_series_is_repeatable() -> None:
    a, b = tuple(range(30)), tuple(range(4, 34))
    first, second = (compare("m", ("a", a), ("b", b)) for _ in range(2))
    assert first == second
    assert 0.03 < first.p < 0.12
    assert first.least_p <= compare("m", ("a", a), ("b", tuple(range(90, 120)))).p < 0.001


@pytest.mark.parametrize(
    ("above", "effect"),
    [(50, "negligible"), (57, "negligible"), (58, "small"), (67, "medium"), (74, "large")],
)
def test_words_of_effects(above: int, effect: str) -> None:
    # One against a hundred, of which so many are above: delta is (2 * above - 100) / 100.
    pair = compare("m", ("a", (0,)), ("b", (1,) * above + (-1,) * (100 - above)))
    assert pair.delta == pytest.approx((2 * above - 100) / 100)
    assert pair.effect == effect


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": "elsewhere"}, {"qemu_series": "0000"}, {"clock": Clock.TSC}, {"smp": 8},
        {"accelerator": "kvm"}, {"linux": "6.12.108"},
    ],
)  # fmt: skip
def test_what_differs_is_not_compared(changes: dict[str, Any]) -> None:
    name, value = next(iter(changes.items()))
    other = provenance("intx", **changes)
    with pytest.raises(UsageError, match=rf"pci and intx.*{name}: .* against {value}"):
        dataclasses.replace(result(), provenance={"pci": provenance("pci"), "intx": other})
    one, two = result(pci=(1.0,)), result(intx=(2.0,))
    two = dataclasses.replace(two, provenance={"intx": other})
    with pytest.raises(UsageError, match=name):
        merge([one, two])
    again = result(pci=(3.0,))
    again = dataclasses.replace(again, provenance={"pci": provenance("pci", **changes)})
    with pytest.raises(UsageError, match=rf"two results of pci.*{name}"):
        merge([one, again])


def test_clocks_are_never_mixed() -> None:
    cycles = Metric("to handler", "TSC cycles", "interrupt")
    with pytest.raises(UsageError, match="TSC cycles, but the clock of pci counts instructions"):
        dataclasses.replace(result(), metrics=(BOOT, cycles))
    instructions = dataclasses.replace(cycles, unit="instructions")
    one = dataclasses.replace(result(), metrics=(BOOT, instructions))
    two = dataclasses.replace(
        result(msi=(1.0,)), metrics=(BOOT, dataclasses.replace(BOOT, name="x"))
    )
    assert [m.name for m in merge([one, two]).metrics] == ["boot to SSH", "to handler", "x"]
    minutes = dataclasses.replace(
        result(msi=(1.0,)), metrics=(dataclasses.replace(BOOT, unit="min"),)
    )
    with pytest.raises(UsageError, match="min per boot here and in s per boot there"):
        merge([one, minutes])


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="no metric"):
        dataclasses.replace(result(), metrics=())
    with pytest.raises(UsageError, match="no number"):
        result(pci=(1.0, float("nan")))
    with pytest.raises(UsageError, match="given as those of msi"):
        dataclasses.replace(result(pci=(1.0,)), provenance={"msi": provenance("pci")})
    with pytest.raises(UsageError, match="where the numbers of pci come from"):
        dataclasses.replace(result(pci=(1.0,)), provenance={})
    with pytest.raises(UsageError, match="same name"):
        dataclasses.replace(result(), metrics=(BOOT, BOOT))


def test_merge() -> None:
    merged = merge([full(), result(pci=(1.41, 1.42), msi=(1.5,))])
    assert merged.transports == ("pci", "intx", "msi")
    assert merged.series[BOOT.name, "pci"] == (1.38, 1.40, 1.36, 1.41, 1.42)
    assert merged.series[BOOT.name, "msi"] == (1.5,)
    assert (merged.runs("pci"), merged.runs("msi")) == (5, 1)
    assert merged.evidence == full().evidence
    with pytest.raises(UsageError, match="twice"):
        merge([full(), result(msi=(1.0,)), full()])
    with pytest.raises(UsageError, match="no result"):
        merge([])
