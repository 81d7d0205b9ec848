# SPDX-License-Identifier: GPL-2.0-or-later
"""Statistics of traces whose every number is known beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from qvis.trace.model import Cause, Clock, Kind
from qvis.trace.stats import Cost, Quantiles, Stats, interrupts

from .synthetic import SETUP, TIMER, events, make, provenance, store


def cost_of(stats: Stats, device: str | None) -> Cost:
    return next(cost for cost in stats.costs if cost.device == device)


def counts(stats: Stats, device: str | None) -> dict[str | None, int]:
    return {t.register: t.count for t in stats.touched if t.device == device}


def test_counts_of_a_line(tmp_path: Path) -> None:
    stats = Stats.of(make(tmp_path / "trace", "intx"))
    assert stats.events == 10050
    assert stats.kinds == {
        Kind.ACCESS: 4040, Kind.RAISE: 1000, Kind.DELIVER: 1010, Kind.FUNCTION: 3000,
        Kind.EOI: 1000,
    }  # fmt: skip
    assert counts(stats, "blk0") == {
        "InterruptStatus": 900, "InterruptACK": 900, "QueueNotify": 900, "Status": SETUP
    }  # fmt: skip
    assert counts(stats, "LAPIC") == {"EOI": 1000, "TMICT": 10}
    first = stats.touched[0]
    assert (first.register, first.cause, first.write) == ("EOI", Cause.EOI, True)
    assert first.share == pytest.approx(1000 / 4040)
    assert sum(t.share for t in stats.touched) == pytest.approx(1)
    assert stats.other == pytest.approx(10 / 4040)


@pytest.mark.parametrize("transport", ["pci", "msi"])
def test_each_queue_has_its_cpu(tmp_path: Path, transport: str) -> None:
    stats = Stats.of(make(tmp_path / "trace", transport))
    found = [(d.source, d.irq, d.vcpu, d.count) for d in stats.delivered if d.device == "blk0"]
    assert found == [
        ("req.0", 57, 0, 250), ("req.1", 58, 1, 200), ("req.2", 59, 2, 250), ("req.3", 60, 3, 200)
    ]  # fmt: skip
    timer = [d for d in stats.delivered if d.device is None]
    assert {(d.function, d.vector) for d in timer} == {(TIMER, None)}
    assert sum(d.count for d in timer) == 10


def test_a_line_has_one_cpu(tmp_path: Path) -> None:
    stats = Stats.of(make(tmp_path / "trace", "intx"))
    found = [(d.source, d.irq, d.vcpu, d.count) for d in stats.delivered if d.irq]
    assert found == [("", 57, 0, 900), ("", 70, 0, 100)]


def test_cost_of_an_interrupt(tmp_path: Path) -> None:
    line = cost_of(Stats.of(make(tmp_path / "line", "intx")), "blk0")
    assert line.interrupts == line.usual_count == 900
    assert line.usual == {Cause.STATUS: 1, Cause.ACKNOWLEDGE: 1, Cause.EOI: 1}
    assert line.touches == {Cause.STATUS: 1.0, Cause.ACKNOWLEDGE: 1.0, Cause.EOI: 1.0}
    # 300 + 10 * (i % 10) for the digits 0 to 8, since each tenth is of the network card.
    assert line.handler == Quantiles(900, 300, 340, 380, 380, 380)
    assert line.eoi == Quantiles(900, 900, 940, 980, 980, 980)
    assert line.latency is not None
    assert (line.latency.least, line.latency.median, line.latency.most) == (700, 1000, 1300)

    edge = cost_of(Stats.of(make(tmp_path / "edge", "msi")), "net0")
    assert edge.usual == {Cause.EOI: 1}
    assert edge.handler == Quantiles(100, 390, 390, 390, 390, 390)
    assert edge.eoi == Quantiles(100, 120, 120, 120, 120, 120)


def test_quantiles_lie_between(tmp_path: Path) -> None:
    frame = events("msi", 101, kvm=False, queues=1)
    entered = pl.col("function").cast(pl.String) == "vring_interrupt"
    delay = pl.when(entered).then(pl.col("interrupt").cast(pl.UInt64) ** 2)
    frame = frame.with_columns((pl.col("clock") + delay.fill_null(0)).alias("clock"))
    frame = frame.with_columns(pl.lit("blk0").cast(frame.schema["device"]).alias("device"))
    handler = Stats.of(store(tmp_path / "trace", frame, provenance())).costs[0].handler
    assert handler is not None
    values = sorted(300 + i % 10 * 10 + (i + 1) ** 2 for i in range(101))
    assert (handler.median, handler.p90, handler.p99) == (values[50], values[90], values[99])


def test_kvm_counts_exits_and_ends_without_exit(tmp_path: Path) -> None:
    stats = Stats.of(make(tmp_path / "trace", "pci", kvm=True))
    assert stats.clock is Clock.TSC
    assert Kind.ACCESS not in stats.kinds
    halt = next(t for t in stats.touched if t.reason)
    assert (halt.kind, halt.reason, halt.register, halt.count) == (Kind.EXIT, "HLT", None, 1000)
    assert stats.other == pytest.approx(10 / 1040)  # to halt is no touch of a register
    cost = cost_of(stats, "blk0")
    assert cost.touches == {}
    assert cost.ended == 1
    assert cost.handler == Quantiles(900, 600, 680, 760, 760, 760)  # two cycles a nanosecond


def test_without_clocks(tmp_path: Path) -> None:
    cost = cost_of(Stats.of(make(tmp_path / "trace", clock=False)), "blk0")
    assert (cost.handler, cost.eoi) == (None, None)
    assert cost.latency is not None
    assert cost.latency.median == 1000


def test_clocks_of_two_cpus_are_never_subtracted(tmp_path: Path) -> None:
    frame = events("msi", 10, kvm=False, queues=1)
    moved = pl.when(pl.col("kind") == Kind.FUNCTION).then(3).otherwise(pl.col("vcpu"))
    frame = frame.with_columns(moved.cast(pl.UInt16).alias("vcpu"))
    cost = cost_of(Stats.of(store(tmp_path / "trace", frame, provenance())), "blk0")
    assert cost.handler is None
    assert cost.eoi is not None


def test_an_interrupt_without_its_end_is_not_the_usual_one(tmp_path: Path) -> None:
    frame = events("intx", 100, kvm=False, queues=4)
    cut = (pl.col("interrupt") == 100) & (pl.col("kind") == Kind.ACCESS)
    rare = (pl.col("interrupt") == 50) & (pl.col("cause") == Cause.EOI)
    frame = frame.filter(~(cut | rare).fill_null(False))
    cost = cost_of(Stats.of(store(tmp_path / "trace", frame, provenance("intx"))), "net0")
    assert (cost.interrupts, cost.usual_count) == (10, 8)
    assert cost.touches[Cause.STATUS] == pytest.approx(0.9)
    assert cost.touches[Cause.EOI] == pytest.approx(0.8)


def test_empty_trace(tmp_path: Path) -> None:
    trace = make(tmp_path / "trace", interrupts=0)
    stats = Stats.of(trace)
    assert (stats.events, stats.first, stats.last, stats.kinds) == (0, None, None, {})
    assert (stats.touched, stats.delivered, stats.costs, stats.other) == ((), (), (), 0)
    assert interrupts(trace).collect().is_empty()


def test_json(tmp_path: Path) -> None:
    data = json.loads(json.dumps(Stats.of(make(tmp_path / "trace", "intx")).to_json()))
    assert data["clock"] == "instructions"
    assert data["kinds"]["deliver"] == 1010
    assert data["costs"][0]["usual"] == {"interrupt status": 1, "acknowledge": 1, "EOI": 1}
    assert data["costs"][0]["eoi"]["median"] == 940


def test_interrupts_of_no_known_device_come_last(tmp_path: Path) -> None:
    frame = events("msi", 100, kvm=False, queues=4)
    own = pl.col("device").cast(pl.String).is_in(["blk0", "LAPIC"])
    bare = pl.when(~own).then(pl.col("device")).alias("device")
    costs = Stats.of(store(tmp_path / "trace", frame.with_columns(bare), provenance())).costs
    assert [(cost.device, cost.interrupts) for cost in costs] == [("net0", 10), (None, 90)]
    assert costs[1].usual == {Cause.EOI: 1}


def test_the_handler_is_the_drivers(tmp_path: Path) -> None:
    """What the interrupt controller's functions do before it is no handler."""
    frame = events("msi", 100, kvm=False, queues=4)
    driver = (pl.col("function").cast(pl.String) == "vring_interrupt").fill_null(False)
    costs = Stats.of(store(tmp_path / "trace", frame.filter(~driver), provenance())).costs
    assert {cost.handler for cost in costs} == {None}


def test_a_read_on_the_way_to_the_end_is_not_the_end(tmp_path: Path) -> None:
    frame = events("intx", 100, kvm=False, queues=4)
    end = (pl.col("cause") == Cause.EOI) & (pl.col("kind") == Kind.ACCESS)
    reads = frame.filter(end).with_columns(
        pl.col("time") - 4, pl.col("clock") - 4, pl.lit(False).alias("write")
    )
    both = pl.concat([frame, reads]).sort("time", maintain_order=True)
    cost = cost_of(Stats.of(store(tmp_path / "trace", both, provenance("intx"))), "net0")
    assert cost.usual[Cause.EOI] == 2
    assert cost.eoi == Quantiles(10, 990, 990, 990, 990, 990)
