# SPDX-License-Identifier: GPL-2.0-or-later
"""Perfetto traces, read back with Perfetto's own messages and held to its rules.

trace_processor, which would be the better judge, comes in no package of PyPI
or Debian: the ``perfetto`` package downloads it when it is first used.
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from perfetto.protos.perfetto.trace import (  # type: ignore[import-untyped]
    perfetto_trace_pb2 as proto,
)

from qvis.trace import perfetto
from qvis.trace.model import Kind
from qvis.trace.perfetto import to_perfetto
from qvis.trace.store import Trace

from .synthetic import START, events, make, provenance, store

Event = proto.TrackEvent


@dataclass
class Slice:
    """Something on a track; instants have no length."""

    track: str
    name: str
    start: int
    end: int | None
    depth: int
    flows: list[int]
    ended: list[int]
    arguments: dict[str, Any]


@dataclass
class Read:
    """A Perfetto trace as its user interface would understand it."""

    slices: list[Slice] = field(default_factory=list)
    tracks: dict[int, str] = field(default_factory=dict)
    clock: int | None = None

    def on(self, track: str) -> list[Slice]:
        return [s for s in self.slices if s.track == track]


def read(path: Path) -> Read:
    """Parse and check what holds for every trace: names, tracks, nesting, order, flows."""
    whole = proto.Trace()
    whole.ParseFromString(path.read_bytes())
    found = Read()
    names: dict[tuple[str, int], str] = {}
    described: dict[int, Any] = {}
    open_: dict[int, list[Slice]] = defaultdict(list)
    latest: dict[int, int] = defaultdict(int)
    default_clock = None
    for number, packet in enumerate(whole.packet):
        assert packet.trusted_packet_sequence_id
        if packet.sequence_flags & proto.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED:
            assert number == 0
            default_clock = packet.trace_packet_defaults.timestamp_clock_id
        if packet.HasField("clock_snapshot"):
            found.clock = packet.clock_snapshot.primary_trace_clock
        for kind in ("event_names", "debug_annotation_names"):
            for entry in getattr(packet.interned_data, kind):
                assert (kind, entry.iid) not in names
                names[kind, entry.iid] = entry.name
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            assert track.uuid not in described
            assert not track.parent_uuid or track.parent_uuid in described
            described[track.uuid] = track
            above = found.tracks.get(track.parent_uuid)
            found.tracks[track.uuid] = f"{above} / {track.name}" if above else track.name
        if not packet.HasField("track_event"):
            continue
        event = packet.track_event
        assert default_clock == found.clock
        assert event.track_uuid in described
        assert packet.timestamp >= latest[event.track_uuid]
        latest[event.track_uuid] = packet.timestamp
        stack = open_[event.track_uuid]
        if event.type == Event.TYPE_SLICE_END:
            stack.pop().end = packet.timestamp
            continue
        assert event.type in (Event.TYPE_SLICE_BEGIN, Event.TYPE_INSTANT)
        arguments = {}
        for a in event.debug_annotations:
            which = a.WhichOneof("value")
            arguments[names["debug_annotation_names", a.name_iid]] = getattr(a, which)
        now = Slice(
            found.tracks[event.track_uuid],
            names["event_names", event.name_iid],
            packet.timestamp,
            None,
            len(stack),
            list(event.flow_ids),
            list(event.terminating_flow_ids),
            arguments,
        )
        found.slices.append(now)
        if event.type == Event.TYPE_SLICE_BEGIN:
            stack.append(now)
    assert not any(open_.values()), "a slice has no end"
    flows: dict[int, list[bool]] = defaultdict(list)
    for s in sorted(found.slices, key=lambda s: s.start):
        for flow in s.flows:
            flows[flow].append(False)
        for flow in s.ended:
            flows[flow].append(True)
    for flow, ends in flows.items():
        assert flow
        assert len(ends) >= 2, f"flow {flow} leads nowhere"
        assert ends[-1], f"flow {flow} has no end"
        assert sum(ends) == 1, f"flow {flow} ends more than once"
    return found


def exported(tmp_path: Path, trace: Trace) -> Read:
    to_perfetto(trace, tmp_path / "out.pftrace")
    return read(tmp_path / "out.pftrace")


def test_interrupts_of_a_line(tmp_path: Path) -> None:
    found = exported(tmp_path, make(tmp_path / "trace", "intx"))
    assert found.clock == proto.BUILTIN_CLOCK_MONOTONIC
    interrupts = [s for s in found.on("vCPUs / vCPU 0") if s.name == "deliver blk0"]
    assert len(interrupts) == 900
    first = interrupts[0]
    assert first.start == START + 700
    assert first.end == first.start + 905  # the IOAPIC's end, after the write of EOI
    assert first.arguments["irq"] == 57
    assert first.arguments["pc"] == 0xFFFFFFFF81A01234
    within = [s for s in found.on("vCPUs / vCPU 0") if first.start < s.start <= first.end]
    assert [s.name for s in within] == [
        "vm_interrupt",
        "blk0.InterruptStatus interrupt status",
        "blk0.InterruptACK acknowledge",
        "vring_interrupt",
        "ioapic_ack_level",
        "LAPIC.EOI EOI",
        "eoi IOAPIC",
    ]
    assert {s.depth for s in within} == {1}
    status = within[1].arguments
    assert status["address"] == 0xFEB00060
    assert (status["direction"], status["value"], status["clock"]) == ("read", 1, 2_001_080)


def test_tracks(tmp_path: Path) -> None:
    found = exported(tmp_path, make(tmp_path / "trace", "msi"))
    assert set(found.tracks.values()) == {
        "qvis", "vCPUs", "devices", "devices / blk0", "devices / net0",
        *(f"vCPUs / vCPU {n}" for n in range(4)),
        *(f"devices / blk0 / req.{n}" for n in range(4)), "devices / net0 / input.0",
    }  # fmt: skip
    assert len(found.on("devices / blk0 / req.2")) == 250
    assert len(found.on("devices / net0 / input.0")) == 100


@pytest.mark.parametrize("transport", ["pci", "intx", "msi", "vis"])
def test_arrows_lead_from_raise_to_end(tmp_path: Path, transport: str) -> None:
    found = exported(tmp_path, make(tmp_path / "trace", transport))
    raised = {s.flows[0] for s in found.slices if s.name.startswith("raise")}
    taken = {s.flows[0] for s in found.slices if s.name.startswith("deliver") and s.flows}
    ended = {flow: s for s in found.slices for flow in s.ended}
    assert raised == taken == set(ended) == set(range(2, 1002))
    last = "eoi IOAPIC" if transport == "intx" else "vring_interrupt"
    assert {s.name for s in ended.values()} == {last}


def test_exits_are_slices_in_nanoseconds(tmp_path: Path) -> None:
    found = exported(tmp_path, make(tmp_path / "trace", "pci", kvm=True))
    halts = [s for s in found.on("vCPUs / vCPU 1 exits") if s.name == "HLT"]
    assert len(halts) == 200
    # 9,000 cycles of a TSC that runs at 2 GHz, as time and clock of the trace tell.
    assert {s.end - s.start for s in halts if s.end} == {4500}
    notify = next(s for s in found.slices if "notify" in s.name)
    assert notify.name == "EPT_MISCONFIG blk0.QueueNotify notify"


def test_exits_are_instants_when_the_rate_is_unknown(tmp_path: Path) -> None:
    found = exported(tmp_path, make(tmp_path / "trace", "pci", kvm=True, clock=False))
    halts = [s for s in found.on("vCPUs / vCPU 1 exits") if s.name == "HLT"]
    assert len(halts) == 200
    assert {s.end for s in halts} == {None}


def test_an_exit_is_over_when_the_next_begins(tmp_path: Path) -> None:
    trace = make(tmp_path / "trace", "pci", kvm=True)
    longer = trace.events().collect().with_columns(pl.col("duration") * 20)
    trace = store(tmp_path / "longer", longer, trace.manifest.provenance)
    slices = exported(tmp_path, trace).on("vCPUs / vCPU 0 exits")
    assert {s.depth for s in slices} == {0}
    cut = [(a.end, b.start) for a, b in pairwise(slices) if a.name == "HLT" and a.end]
    assert any(end == start for end, start in cut)
    assert all(end <= start for end, start in cut)


def test_an_interrupt_within_an_interrupt(tmp_path: Path) -> None:
    frame = events("intx", 1, kvm=False, queues=1)
    handler = frame.filter(pl.col("kind") == Kind.FUNCTION)["time"][0]
    other = pl.col("kind") == Kind.DELIVER, pl.col("interrupt") == 1
    inner = frame.filter(*other).with_columns(
        pl.lit(handler + 10).alias("time"), pl.lit(2, pl.UInt32).alias("interrupt")
    )
    # It even outlasts the one that it interrupted, by whatever mistake.
    late = inner.with_columns(
        pl.lit(handler + 5000).alias("time"), pl.lit("eoi").cast(frame.schema["kind"]).alias("kind")
    )
    both = pl.concat([frame, inner, late]).sort("time", maintain_order=True)
    found = exported(tmp_path, store(tmp_path / "trace", both, provenance("intx")))
    outer, nested = (s for s in found.on("vCPUs / vCPU 0") if s.name.startswith("deliver blk0"))
    assert (outer.depth, nested.depth) == (0, 1)
    assert outer.end == nested.end == handler + 5000


def test_batches_leave_no_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make(tmp_path / "trace", "intx", interrupts=300, parts=7)
    to_perfetto(trace, tmp_path / "whole.pftrace")
    for size in (7, 100):
        monkeypatch.setattr(perfetto, "BATCH", size)
        to_perfetto(trace, tmp_path / "seams.pftrace")
        if size == 100:
            assert read(tmp_path / "seams.pftrace") == read(tmp_path / "whole.pftrace")
        read(tmp_path / "seams.pftrace")  # shorter than an interrupt: still well-formed


def test_says_where_it_comes_from(tmp_path: Path) -> None:
    trace = make(tmp_path / "trace", partial=("The buffer was full.",), lost=7)
    (said,) = exported(tmp_path, trace).on("qvis")
    assert said.arguments["provenance"] == trace.manifest.provenance.line()
    assert said.arguments["partial"] == "The buffer was full."
    assert (said.arguments["lost"], said.arguments["clock"]) == (7, "instructions")
    assert said.start == trace.events().collect()["time"].min()


def test_unattributed_events_and_none_at_all(tmp_path: Path) -> None:
    frame = events("intx", 20, kvm=False, queues=1)
    bare = frame.with_columns(
        pl.lit(None).cast(frame.schema[name]).alias(name)
        for name in ("device", "register", "cause", "source", "irq", "interrupt")
    )
    found = exported(tmp_path, store(tmp_path / "bare", bare, provenance("intx")))
    assert len(found.on("devices / unknown / vector 43")) == 18
    assert not any(s.flows or s.ended for s in found.slices)
    empty = exported(tmp_path, make(tmp_path / "empty", interrupts=0))
    assert [s.track for s in empty.slices] == ["qvis"]


def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from qvis.trace import perfetto, store\n"
        "perfetto.BATCH = 5000\n"
        "perfetto.to_perfetto(store.Trace.open(Path(sys.argv[1])), Path(sys.argv[1]) / 'out')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = []
    for interrupts in (4000, 28_000):
        trace = make(tmp_path / f"{interrupts}", "msi", interrupts=interrupts, parts=6)
        command = [sys.executable, "-c", script, str(trace.path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 80  # MiB; its packets alone would be 150
