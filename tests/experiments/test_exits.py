# SPDX-License-Identifier: GPL-2.0-or-later
"""What is counted where it is known which exits went on to user space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from qvis import InfraError, Transport
from qvis.experiments import compare, exits
from qvis.experiments.operations import OPERATIONS, Target
from qvis.trace.model import Cause, Clock, Kind
from qvis.trace.store import Trace
from tests.trace.synthetic import START, provenance, step, store

COUNT = 10
TARGET = Target(irq=57, vector=34, device="virtio0", cpu=0, cpus=2)


def requests(folder: Path, *, user: bool | None, clock: Clock = Clock.INSTRUCTIONS) -> Trace:
    """COUNT requests: a notification 1,000 long, then the interrupt and its EOI, 200 long."""
    at = START + np.arange(COUNT) * 10_000

    def row(after: int, kind: Kind, **columns: Any) -> pl.DataFrame:
        return step(at + after, 0, kind, **columns)

    number = np.arange(COUNT) + 1
    exit_: dict[str, Any] = {"user": user, "write": True}
    frame = pl.concat(
        [
            row(0, Kind.EXIT, device="blk0", register="QueueNotify", cause=Cause.NOTIFY,
                duration=1000, **exit_),
            row(2000, Kind.RAISE, vector=34, interrupt=number),
            row(2300, Kind.DELIVER, vector=34, interrupt=number),
            row(3000, Kind.EXIT, device="LAPIC", register="EOI", cause=Cause.EOI, duration=200,
                interrupt=number, **exit_),
            # None of the disk's: the console's, a timer's, another device's.
            row(4000, Kind.EXIT, device="serial0", cause=Cause.CONSOLE, **exit_),
            row(5000, Kind.EXIT, device="LAPIC", cause=Cause.TIMER, **exit_),
            row(6000, Kind.EXIT, device="nic0", cause=Cause.NOTIFY, **exit_),
            row(7000, Kind.EXIT, reason="hlt", user=user),
        ]
    ).sort("time")  # fmt: skip
    return store(folder, frame, provenance("msi", kvm=True, clock=clock, reader="kvm-nested"))


def measured(trace: Trace) -> dict[str, float]:
    measure = OPERATIONS["interrupt"].measure
    assert measure
    return measure(trace, TARGET, COUNT)


def test_exits_to_user_space_are_those_of_the_disk_and_of_no_device(tmp_path: Path) -> None:
    assert measured(requests(tmp_path / "all", user=True))["exits to user space per interrupt"] == 3
    assert measured(requests(tmp_path / "no", user=False))["exits to user space per interrupt"] == 0


def test_where_nobody_tells_there_is_no_zero(tmp_path: Path) -> None:
    trace = requests(tmp_path / "t", user=None)
    assert not exits.tells(trace)
    assert not [name for name in measured(trace) if "user space" in name or "exit of" in name]


def test_lengths_are_medians_in_the_clocks_unit(tmp_path: Path) -> None:
    found = measured(requests(tmp_path / "t", user=False))
    assert found["exit of a notification"] == 1000
    assert found["exit of an EOI"] == 200
    assert found["arrival to delivery"] == 300


@pytest.mark.parametrize(("after", "want"), [(2100, 1.0), (1900, 0.0), (2400, 0.0)])
def test_an_exit_to_user_space_while_an_interrupt_waits(
    tmp_path: Path, after: int, want: float
) -> None:
    whole = requests(tmp_path / "t", user=False)
    late = step(START + np.arange(COUNT) * 10_000 + after, 0, Kind.EXIT, reason="io", user=True)
    other = step(START + np.arange(COUNT) * 10_000 + 2100, 1, Kind.EXIT, reason="io", user=True)
    frame = pl.concat([whole.events().collect(), late, other]).sort("time")
    trace = store(tmp_path / "u", frame, whole.manifest.provenance)
    assert measured(trace)["exits to user space before delivery"] == want


@pytest.fixture
def by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A nested machine whose every boot has the trace ``boot["trace"]``."""
    boot: dict[str, Any] = {"trace": requests(tmp_path / "t", user=False)}
    monkeypatch.setattr(compare, "_nested", lambda backend: True)
    monkeypatch.setattr(compare, "record_boot", lambda *args, **machine: (boot["trace"], 0))
    monkeypatch.setitem(compare.scripted.COUNTS, "interrupt", COUNT)
    monkeypatch.setattr(
        compare.scripted, "cut", lambda trace, counts: {"interrupt": trace.events()}
    )
    return boot


def run(folder: Path) -> dict[str, tuple[float, ...]]:
    result = compare.compare(
        folder, [Transport.MSI], ["interrupt"], 2, backend="nested", icount=True, smp=1, queues=1
    )
    return {name: values for (name, _), values in result.series.items()}


def test_where_instructions_are_counted_a_boot_is_measured_as_a_whole(
    by_itself: dict[str, Any], tmp_path: Path
) -> None:
    found = run(tmp_path / "c")
    assert found["exits to user space per interrupt"] == (0, 0)
    assert found["exit of a notification"] == (1000, 1000)


def test_it_must_be_clear_which_interrupt_is_the_disks(
    by_itself: dict[str, Any], tmp_path: Path
) -> None:
    trace = by_itself["trace"]
    again = step(START + np.arange(COUNT) * 10_000 + 500, 0, Kind.DELIVER, vector=35)
    frame = pl.concat([trace.events().collect(), again]).sort("time")
    by_itself["trace"] = store(tmp_path / "two", frame, trace.manifest.provenance)
    with pytest.raises(InfraError, match="2 vectors came so often"):
        run(tmp_path / "c")


@pytest.mark.parametrize(("lost", "partial"), [(3, ()), (0, ("the disk was full",))])
def test_a_trace_that_lacks_something_is_no_measurement(
    by_itself: dict[str, Any], tmp_path: Path, lost: int, partial: tuple[str, ...]
) -> None:
    trace = by_itself["trace"]
    by_itself["trace"] = store(
        tmp_path / "lost", trace.events().collect(), trace.manifest.provenance,
        lost=lost, partial=partial,
    )  # fmt: skip
    with pytest.raises(InfraError, match=r"3 events were lost|the disk was full"):
        run(tmp_path / "c")
