# SPDX-License-Identifier: GPL-2.0-or-later
"""Costs from traces: those that a trace was made with are found again."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from qvis.emulated.costs import Cost, Costs, Handler, Reason
from qvis.errors import InfraError, UsageError
from qvis.experiments.calibrate import LEAST, calibrate, write_costs
from qvis.trace.attribution import attribute
from qvis.trace.kvm import Reader
from qvis.trace.model import Cause, Clock, Kind, Space
from qvis.trace.store import Manifest, Trace
from tests.trace.recordings import unpack
from tests.trace.synthetic import START, make, provenance, step, store
from tests.trace.test_kvm_attribution import regions

Cli = Callable[..., subprocess.CompletedProcess[str]]
Columns = dict[str, Any]

MEMORY: Columns = {"space": Space.MEMORY, "size": 4, "write": True}
MSR: Columns = {"space": Space.MSR, "size": 8, "write": True}
VIRTIO, LAPIC, IOAPIC = 0xFEB00000, 0xFEE00000, 0xFEC00000
BASE = Costs.load()

# Kind of an exit, TSC cycles that it is made to take, and what a trace tells of it.
INTEL: dict[tuple[Reason, Handler], tuple[int, list[Columns]]] = {
    (Reason.EPT_MISCONFIG, Handler.FAST): (
        1900, [{"space": Space.MEMORY, "write": True, "address": VIRTIO + 0x50,
                "cause": Cause.NOTIFY}],
    ),
    (Reason.EPT_MISCONFIG, Handler.KERNEL): (
        3300, [{**MEMORY, "address": VIRTIO + 0x50, "cause": Cause.NOTIFY}],
    ),
    (Reason.EPT_MISCONFIG, Handler.USER): (
        12000, [{**MEMORY, "address": VIRTIO + 0x64, "cause": Cause.ACKNOWLEDGE},
                {**MEMORY, "address": IOAPIC + 0x10, "cause": Cause.MASK}],
    ),
    (Reason.IO_INSTRUCTION, Handler.USER): (
        9000, [{"space": Space.PORT, "size": 1, "write": True, "address": 0x3F8}],
    ),
    (Reason.MSR_WRITE, Handler.FAST): (
        1100, [{**MSR, "address": 0x830, "value": 2 << 32 | 0xFD}, {**MSR, "address": 0x6E0}],
    ),
    (Reason.MSR_WRITE, Handler.KERNEL): (
        2200, [{**MSR, "address": 0x830, "value": 2 << 32 | 1 << 11 | 0xFD},
               {**MSR, "address": 0x830, "value": 0xFFFFFFFF << 32 | 0xFD},
               {**MSR, "address": 0x80B, "cause": Cause.EOI}],
    ),
    (Reason.MSR_READ, Handler.KERNEL): (2000, [{**MSR, "write": False, "address": 0x802}]),
    (Reason.APIC_ACCESS, Handler.FAST): (1500, [{**MEMORY, "address": LAPIC + 0xB0}]),
    (Reason.APIC_ACCESS, Handler.KERNEL): (2500, [{**MEMORY, "address": LAPIC + 0x300}]),
    (Reason.APIC_WRITE, Handler.KERNEL): (1700, [{**MEMORY, "address": LAPIC + 0x300}]),
    (Reason.EXTERNAL_INTERRUPT, Handler.KERNEL): (2800, [{}]),
    (Reason.PREEMPTION_TIMER, Handler.FAST): (1200, [{}]),
}  # fmt: skip


def recorded(
    folder: Path, kinds: dict[str, tuple[int, list[Columns]]], *, ghz: float = 2.0,
    count: int = 300, **source: Any,
) -> Trace:  # fmt: skip
    """A trace of such exits, in TSC cycles at ``ghz``, with noise of 5 % and interruptions."""
    random = np.random.default_rng(7)
    frames = []
    for place, (reason, (cycles, happenings)) in enumerate(kinds.items()):
        for number, columns in enumerate(happenings):
            time = START + np.arange(count) * 1_000_000 + place * 10_000 + number * 1000
            duration = random.normal(cycles, cycles / 20, count)
            duration[::10] += 3_000_000  # something else had the CPU
            frames.append(
                step(time, 0, Kind.EXIT, reason=reason.split("/")[0],
                     duration=duration.astype(np.uint64), **columns)
            )  # fmt: skip
    sleep = START + np.arange(count) * 1_000_000 + 500_000
    frames.append(step(sleep, 0, Kind.EXIT, reason="HLT", duration=400_000))
    frame = pl.concat(frames).sort("time").with_columns(
        clock=(pl.col("time") * ghz).cast(pl.UInt64)
    )  # fmt: skip
    return store(folder, frame, provenance(**{"kvm": True, **source}))


def intel(folder: Path, **more: Any) -> Trace:
    return recorded(folder, {f"{r}/{h}": entry for (r, h), entry in INTEL.items()}, **more)


@pytest.mark.parametrize("ghz", [2.0, 3.4])
def test_the_costs_of_a_trace_are_found_again(tmp_path: Path, ghz: float) -> None:
    found = calibrate([intel(tmp_path / "t", ghz=ghz)], BASE)
    for kind, (cycles, happenings) in INTEL.items():
        want = cycles * 2.0 / ghz  # the same time in cycles of the nominal processor
        assert found.costs.exit(*kind) == pytest.approx(want, rel=0.02), kind
        fit = next(fit for fit in found.fits if (fit.reason, fit.handler) == kind)
        assert fit.count == 300 * len(happenings)
        assert fit.low < fit.cycles < fit.high < 1.2 * want


def test_what_a_trace_does_not_tell_stays(tmp_path: Path) -> None:
    found = calibrate([intel(tmp_path / "t")], BASE)
    fitted = set(INTEL)
    for kind, cost in BASE.exits.items():
        if kind not in fitted:
            assert found.costs.exits[kind] == cost
    assert (Reason.HLT, Handler.KERNEL) not in {(fit.reason, fit.handler) for fit in found.fits}
    assert found.costs.steps == BASE.steps


def test_a_few_exits_are_told_but_not_believed(tmp_path: Path) -> None:
    one = {"IO_INSTRUCTION": (9000, [{"space": Space.PORT, "address": 0x3F8}])}
    found = calibrate([recorded(tmp_path / "t", one, count=LEAST - 1)], BASE)
    assert [fit.count for fit in found.fits] == [LEAST - 1]
    assert found.costs == BASE


def test_a_source_says_who_measured_what(tmp_path: Path) -> None:
    trace = intel(tmp_path / "t")
    source = calibrate([trace], BASE).costs.exits[Reason.APIC_WRITE, Handler.KERNEL].source
    assert source.startswith("measured: median of 300 exits, quartiles ")
    assert trace.manifest.provenance.line() in source


def test_the_exits_of_amd_are_those_of_intel(tmp_path: Path) -> None:
    kinds = {
        "npf": (12000, [{**MEMORY, "address": VIRTIO + 0x64}]),
        "msr": (2200, [{**MSR, "address": 0x80B}, {**MSR, "address": 0x6E0}]),
        "interrupt": (2800, [{}]),
        "io": (9000, [{"space": Space.PORT, "address": 0x3F8}]),
        "npf/of RAM": (5000, [{}]),
        "avic_incomplete_ipi": (1700, [{**MEMORY, "address": LAPIC + 0x300}]),
    }
    found = calibrate([recorded(tmp_path / "t", kinds)], BASE)
    assert {(fit.reason, fit.handler): fit.count for fit in found.fits} == {
        (Reason.EPT_MISCONFIG, Handler.USER): 300,
        (Reason.MSR_WRITE, Handler.KERNEL): 600,  # its TSC deadline has no fast path
        (Reason.EXTERNAL_INTERRUPT, Handler.KERNEL): 300,
        (Reason.IO_INSTRUCTION, Handler.USER): 300,
        (Reason.APIC_WRITE, Handler.KERNEL): 300,
    }


def test_ends_of_levels_are_nobodys_since_some_go_to_user_space(tmp_path: Path) -> None:
    kinds = {"MSR_WRITE": (2200, [{**MSR, "address": 0x80B}, {**MSR, "address": 0x838}])}
    found = calibrate([recorded(tmp_path / "t", kinds, transport="intx")], BASE)
    assert [fit.count for fit in found.fits] == [300]
    assert found.traces[0].explained < 0.6


def test_goodness_is_the_share_of_time_that_the_table_explains(tmp_path: Path) -> None:
    # 300 exits of 1,000 cycles, a tenth of them 3,000,000 longer.
    one = {"PREEMPTION_TIMER": (1000, [{}])}
    (explained,) = calibrate([recorded(tmp_path / "t", one)], BASE).traces
    assert explained.measured == pytest.approx(30 * 3_000_000 + 300_000, rel=0.01)
    assert explained.known == explained.measured
    assert explained.predicted == pytest.approx(300_000, rel=0.01)
    assert explained.explained == pytest.approx(explained.predicted / explained.measured)
    (whole,) = calibrate([make(tmp_path / "whole", kvm=True)], BASE).traces
    assert whole.explained == pytest.approx(1.0, abs=0.001)


def test_several_traces_are_one_measurement(tmp_path: Path) -> None:
    traces = [intel(tmp_path / "a"), intel(tmp_path / "b", transport="vis")]
    found = calibrate(traces, BASE)
    assert {fit.count for fit in found.fits} == {600, 1200, 1800}
    assert [one.trace for one in found.traces] == [tmp_path / "a", tmp_path / "b"]
    source = found.costs.exits[Reason.APIC_WRITE, Handler.KERNEL].source
    assert all(trace.manifest.provenance.line() in source for trace in traces)


def test_nanoseconds_are_two_cycles_each(tmp_path: Path) -> None:
    trace = intel(tmp_path / "t", clock=Clock.NANOSECONDS)
    found = calibrate([trace], BASE)
    assert found.costs.exit(Reason.APIC_WRITE, Handler.KERNEL) == pytest.approx(3400, rel=0.02)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"kvm": False}, "is of tcg,thread=multi, whose times say nothing about hardware"),
        ({"clock": Clock.MODELLED}, "is of an emulated machine: its times come from a table"),
        ({"clock": Clock.NANOSECONDS}, "has clock nanoseconds, and"),
        ({"host": "another"}, "has host another, and"),
    ],
)
def test_traces_that_say_nothing_are_refused(
    tmp_path: Path, source: dict[str, Any], says: str
) -> None:
    good = intel(tmp_path / "good", count=10)
    with pytest.raises(UsageError) as problem:
        calibrate([good, intel(tmp_path / "bad", count=10, **source)], BASE)
    assert says in str(problem.value)
    assert "\n" not in str(problem.value)


def test_a_trace_without_exits_or_without_time_is_refused(tmp_path: Path) -> None:
    nothing = recorded(tmp_path / "t", {"TRIPLE_FAULT": (1000, [{}])})
    with pytest.raises(UsageError, match="has no exit of a kind that the table has"):
        calibrate([nothing], BASE)
    moment = recorded(tmp_path / "m", {"PREEMPTION_TIMER": (1000, [{}])}, count=1)
    with pytest.raises(UsageError, match="too short to tell how fast its TSC ran"):
        calibrate([moment], BASE)


@pytest.fixture(params=["msi", "line"])
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Trace:
    """A recording of a real KVM (tests/trace/data/kvm), attributed."""
    reader = Reader(unpack(request.param, tmp_path))
    where = provenance("intx" if request.param == "line" else "msi", kvm=True)
    manifest = Manifest(where, "vm", "qvis-load", 0, 0.0, 0.0, regions=regions())
    events = pl.concat(attribute(reader.frames(), manifest))
    trace = Trace(tmp_path / "trace", dataclasses.replace(manifest, events=len(events)))
    (trace.path / "events").mkdir(parents=True)
    events.write_parquet(trace.path / "events" / "0.parquet")
    trace.write_manifest()
    return trace


def test_a_real_recording(real: Trace, tmp_path: Path, cli: Cli) -> None:
    found = calibrate([real], BASE)
    fits = {(fit.reason, fit.handler): fit for fit in found.fits}
    requests = {"msi": 200, "intx": 60}[real.manifest.provenance.transport]
    notify = fits[Reason.EPT_MISCONFIG, Handler.KERNEL]
    assert notify.count == requests
    # An emulated processor under TCG: a hundred times slower, in the right order.
    port = fits[Reason.IO_INSTRUCTION, Handler.USER]
    assert 50_000 < fits[Reason.CPUID, Handler.KERNEL].cycles < port.cycles < 1_000_000
    (explained,) = found.traces
    assert 0.1 < explained.explained < 0.9
    # Its TSC ran at 2.596 GHz, so in cycles of 2 GHz it is less.
    exits = real.events().filter(pl.col("reason").cast(pl.String) == "cpuid").collect()
    raw = exits["duration"].median()
    ratio = fits[Reason.CPUID, Handler.KERNEL].cycles / raw  # type: ignore[operator]
    assert ratio == pytest.approx(2 / 2.596, rel=0.002)

    output = tmp_path / "costs.toml"
    done = cli("calibrate", str(real.path), "-o", str(output))
    assert done.returncode == 0, done.stderr
    assert "modelled cycles" in done.stdout
    assert Costs.load(output) == found.costs
    again = cli("calibrate", str(real.path), "-o", str(output), "--costs", str(output))
    assert again.returncode == 0
    assert Costs.load(output) == found.costs


def test_a_table_survives_being_written(tmp_path: Path) -> None:
    odd = Cost(7, 'a "source"\\n with \N{GRINNING FACE}, \x7f')
    costs = dataclasses.replace(BASE, exits={**BASE.exits, (Reason.HLT, Handler.USER): odd})
    write_costs(costs, tmp_path / "costs.toml")
    written = Costs.load(tmp_path / "costs.toml")
    assert written.exits[Reason.HLT, Handler.USER].source == odd.source.replace("\x7f", "")
    assert dataclasses.replace(written, exits=BASE.exits) == BASE
    with pytest.raises(InfraError, match="cannot write"):
        write_costs(costs, tmp_path / "nowhere" / "costs.toml")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("calibrate", "required: TRACE, -o"),
        ("calibrate /nonexistent -o x", "/nonexistent is no trace"),
        ("calibrate /nonexistent -o x --costs /nonexistent", "/nonexistent"),
    ],
)
def test_bad_words_are_one_line(cli: Cli, words: str, says: str) -> None:
    done = cli(*words.split())
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path("x").exists()
