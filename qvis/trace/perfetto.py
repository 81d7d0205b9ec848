# SPDX-License-Identifier: GPL-2.0-or-later
"""Traces in Perfetto's own format, to be walked through on ui.perfetto.dev.

======================  ====================================================
track                   what is on it
======================  ====================================================
qvis                    where the trace comes from, at its first moment
vCPUs / vCPU n          an interrupt is a slice from its delivery to its
                        last event on that vCPU; accesses, ends of interrupt
                        and functions are instants
vCPUs / vCPU n exits    exits, as slices when their duration is known in ns
devices / d / source    what asked for interrupts: an instant each
devices / d / ends      ends that an interrupt controller saw, on no vCPU
======================  ====================================================

Arrows lead from raise over deliver and handler to the end of one interrupt.
Exits have a track of their own because a delivery falls into the exit before
it and outlasts it, and slices of one track must nest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
from perfetto.protos.perfetto.trace import (  # type: ignore[import-untyped]
    perfetto_trace_pb2 as proto,
)

from ..emulated.costs import FREQUENCY
from .export import whole_file
from .model import Cause, Clock, Kind
from .store import Trace

__all__ = ["to_perfetto"]

HEXADECIMAL = ("address", "pc")  # are shown so
REGISTER = ("direction", "address", "space", "value")
ARGUMENTS = (*REGISTER, "vector", "irq", "interrupt", "clock", "pc", "duration")
CHUNK = 1000  # packets that are serialized together
BATCH = 100_000  # events; an interrupt that lasts longer than twice this is cut short
SEQUENCE = 1
GROUPS = {"qvis": 1, "vCPUs": 2, "devices": 3}  # fixed ids of the outermost tracks
LEAST_SPAN = 1_000_000  # ns of trace from which a TSC's rate is taken

BEGUN = {"interrupt": pl.UInt32, "begun": pl.Boolean}

Row = dict[str, Any]


def to_perfetto(trace: Trace, path: Path) -> None:
    """Write ``trace`` as a Perfetto trace; no more than some batches of events are in memory."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        writer = _Writer(file, trace, _per_ns(trace))
        writer.start()
        for row in _linked(trace):
            writer.event(row)
        writer.finish()


class _Writer:
    """Turns rows, in order of time, into packets of one sequence."""

    def __init__(self, file: BinaryIO, trace: Trace, per_ns: float | None) -> None:
        self._file = file
        self._chunk = proto.Trace()  # parts of a serialized message may be joined
        self._trace = trace
        self._per_ns = per_ns
        self._tracks: dict[tuple[str, ...], int] = {(name,): id for name, id in GROUPS.items()}
        self._names: dict[tuple[str, str], int] = {}  # (kind of name, name) to its number
        self._open: dict[int, list[list[int]]] = {}  # vCPU to [last row, end time], outermost first
        self._exits: dict[int, int] = {}  # vCPU to the end of the exit that it is in

    def start(self) -> None:
        """Clock, outermost tracks and where the trace comes from."""
        first = self._trace.events().select(pl.col("time").min()).collect().item() or 0
        packet = self._packet(None)
        packet.sequence_flags = proto.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        packet.trace_packet_defaults.timestamp_clock_id = proto.BUILTIN_CLOCK_MONOTONIC
        snapshot = packet.clock_snapshot
        snapshot.primary_trace_clock = proto.BUILTIN_CLOCK_MONOTONIC
        snapshot.clocks.add(clock_id=proto.BUILTIN_CLOCK_MONOTONIC, timestamp=first)
        manifest = self._trace.manifest
        line = manifest.provenance.line()
        for rank, (name, uuid) in enumerate(GROUPS.items()):
            self._describe(uuid, name, 0, rank, line)
        packet = self._named(first, GROUPS["qvis"], "provenance")
        said = {
            "provenance": line,
            "machine": manifest.machine,
            "command": manifest.command,
            "clock": manifest.provenance.clock,
            "events": manifest.events,
            "lost": manifest.lost,
            "partial": " ".join(manifest.partial) or None,
        }
        self._arguments(packet, said, said)

    def event(self, row: Row) -> None:
        """Write what ``row`` says, after the ends of the slices that are over by then."""
        vcpu = row["vcpu"]
        if vcpu is not None:
            self._close(vcpu, row["row"])
            if row["kind"] == Kind.EXIT:
                self._end_exit(vcpu, row["time"])
        packet = self._named(row["time"], self._track(row), _name(row))
        event = packet.track_event
        if row["flow"] == "on":
            event.flow_ids.append(row["interrupt"] + 1)  # 0 is no id
        elif row["flow"] == "end":
            event.terminating_flow_ids.append(row["interrupt"] + 1)
        self._arguments(packet, ARGUMENTS, row)
        if row["kind"] == Kind.DELIVER and vcpu is not None:
            event.type = proto.TrackEvent.TYPE_SLICE_BEGIN
            self._begin(vcpu, row)
        elif row["kind"] == Kind.EXIT and vcpu is not None and self._per_ns and row["duration"]:
            event.type = proto.TrackEvent.TYPE_SLICE_BEGIN
            self._exits[vcpu] = row["time"] + round(row["duration"] / self._per_ns)

    def finish(self) -> None:
        """End the slices that are open."""
        for vcpu in self._open:
            self._close(vcpu, None)
        for vcpu in list(self._exits):
            self._end_exit(vcpu, None)
        self._flush()

    def _begin(self, vcpu: int, row: Row) -> None:
        stack = self._open.setdefault(vcpu, [])
        last = [row["last_row"], row["last_time"]]
        stack.append(last)
        for outer in stack[:-1]:
            # An interrupt that another one interrupts ends no earlier than that.
            if outer[0] < last[0]:
                outer[:] = last

    def _close(self, vcpu: int, row: int | None) -> None:
        stack = self._open.get(vcpu)
        while stack and (row is None or stack[-1][0] < row):
            packet = self._packet(stack.pop()[1])
            packet.track_event.type = proto.TrackEvent.TYPE_SLICE_END
            packet.track_event.track_uuid = self._tracks["vCPUs", f"vCPU {vcpu}"]

    def _end_exit(self, vcpu: int, time: int | None) -> None:
        """End the last exit of ``vcpu``: it is over when the next one begins, at ``time``."""
        end = self._exits.pop(vcpu, None)
        if end is not None:
            packet = self._packet(end if time is None else min(end, time))
            packet.track_event.type = proto.TrackEvent.TYPE_SLICE_END
            packet.track_event.track_uuid = self._tracks["vCPUs", f"vCPU {vcpu} exits"]

    def _track(self, row: Row) -> int:
        vcpu = row["vcpu"]
        if row["kind"] == Kind.RAISE or vcpu is None:
            if row["kind"] != Kind.RAISE:
                source = "ends" if row["kind"] == Kind.EOI else "accesses"
            elif row["device"] is None:
                source = f"vector {row['vector']}"
            else:
                source = row["source"] or "line"
            return self._child("devices", row["device"] or "unknown", source)
        if row["kind"] == Kind.EXIT:
            return self._child("vCPUs", f"vCPU {vcpu} exits", rank=2 * vcpu + 1)
        return self._child("vCPUs", f"vCPU {vcpu}", rank=2 * vcpu)

    def _child(self, *path: str, rank: int = 0) -> int:
        """The track of that path; it and those above it are described at first use."""
        uuid = self._tracks.get(path)
        if uuid is None:
            parent = self._child(*path[:-1])
            uuid = self._tracks[path] = len(self._tracks) + 1
            self._describe(uuid, path[-1], parent, rank)
        return uuid

    def _describe(
        self, uuid: int, name: str, parent: int, rank: int, description: str = ""
    ) -> None:
        track = self._packet(None).track_descriptor
        track.uuid = uuid
        track.name = name
        track.sibling_order_rank = rank
        numbered = uuid == GROUPS["vCPUs"]
        order = proto.TrackDescriptor.EXPLICIT if numbered else proto.TrackDescriptor.LEXICOGRAPHIC
        track.child_ordering = order
        if parent:
            track.parent_uuid = parent
        if description:
            track.description = description

    def _packet(self, time: int | None) -> Any:
        """A packet to be filled before the next one is asked for."""
        if len(self._chunk.packet) >= CHUNK:
            self._flush()
        return self._chunk.packet.add(
            timestamp=time,
            trusted_packet_sequence_id=SEQUENCE,
            sequence_flags=proto.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE,
        )

    def _named(self, time: int, track: int, name: str) -> Any:
        packet = self._packet(time)
        packet.track_event.type = proto.TrackEvent.TYPE_INSTANT
        packet.track_event.track_uuid = track
        packet.track_event.name_iid = self._intern(packet, "event_names", name)
        return packet

    def _arguments(self, packet: Any, names: Iterable[str], values: Row) -> None:
        add = packet.track_event.debug_annotations.add
        for name in names:
            value = values[name]
            if value is None:
                continue
            argument = add()
            argument.name_iid = self._intern(packet, "debug_annotation_names", name)
            if isinstance(value, str):
                argument.string_value = value
            elif name in HEXADECIMAL:
                argument.pointer_value = value
            else:
                argument.uint_value = value

    def _intern(self, packet: Any, kind: str, name: str) -> int:
        iid = self._names.get((kind, name))
        if iid is None:
            iid = self._names[kind, name] = len(self._names) + 1
            getattr(packet.interned_data, kind).add(iid=iid, name=name)
        return iid

    def _flush(self) -> None:
        self._file.write(self._chunk.SerializeToString())
        self._chunk = proto.Trace()  # a message that is cleared keeps its memory


def _name(row: Row) -> str:
    kind = row["kind"]
    if kind == Kind.FUNCTION:
        return row["function"] or "function"
    if kind in (Kind.ACCESS, Kind.EXIT):
        place = ".".join(part for part in (row["device"], row["register"]) if part)
        words = (row["reason"], place, row["cause"])
        return " ".join(word for word in words if word) or str(kind)
    owner = " ".join(part for part in (row["device"], row["source"]) if part)
    return f"{kind} {owner or row['function'] or row['vector']}"


def _linked(trace: Trace) -> Iterator[Row]:
    """Each event with its ``row``, and its part in its interrupt.

    ``last_row`` and ``last_time``: of a deliver, the last event of the same
    interrupt on the same vCPU. ``flow``: "on" when a later event of the
    interrupt takes the arrow over, "end" when none does and one led here. To
    know this, each batch is read with the next one in sight.
    """
    batches = trace.events().with_row_index("row").collect_batches(
        chunk_size=BATCH, maintain_order=True
    )  # fmt: skip
    begun = pl.DataFrame(schema=BEGUN)
    batch = next(batches, None)
    while batch is not None:
        following = next(batches, None)
        both = batch if following is None else pl.concat([batch, following])
        rows, begun = _link(batch, both, begun)
        yield from rows.iter_rows(named=True)
        batch = following


def _link(
    batch: pl.DataFrame, both: pl.DataFrame, begun: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """``batch`` with the columns that :func:`_linked` adds, by what is known from ``both``.

    ``begun``: interrupts whose arrow comes into the batch, and then those
    whose arrow leaves it.
    """
    row = pl.col("row")
    linked = pl.col("kind").is_in((Kind.RAISE, Kind.DELIVER, Kind.FUNCTION, Kind.EOI))
    arrow = linked | (pl.col("cause") == Cause.EOI)
    known = both.filter(pl.col("interrupt").is_not_null())
    own = known.group_by("interrupt", "vcpu").agg(
        row.max().alias("last_row"), pl.col("time").max().alias("last_time")
    )
    arrows = known.filter(arrow).group_by("interrupt").agg(
        row.min().alias("head"), row.max().alias("tail")
    )  # fmt: skip
    arrows = arrows.join(begun, on="interrupt", how="left")
    led_here = (row > pl.col("head")) | pl.col("begun")
    flow = (
        pl.when(arrow & (row < pl.col("tail"))).then(pl.lit("on"))
        .when(arrow & led_here).then(pl.lit("end"))
    )  # fmt: skip
    direction = (
        pl.when(pl.col("write")).then(pl.lit("write"))
        .when(~pl.col("write")).then(pl.lit("read"))
    )  # fmt: skip
    rows = (
        batch.join(own, on=["interrupt", "vcpu"], how="left", maintain_order="left")
        .join(arrows, on="interrupt", how="left", maintain_order="left")
        .with_columns(
            flow.alias("flow"),
            direction.alias("direction"),
            pl.col("last_row").fill_null(row),
            pl.col("last_time").fill_null(pl.col("time")),
        )
    )
    end = batch["row"][-1]
    leaves = arrows.filter((pl.col("head") <= end) | pl.col("begun"), pl.col("tail") > end)
    return rows, leaves.select("interrupt", pl.lit(True).alias("begun"))


def _per_ns(trace: Trace) -> float | None:
    """How many units of ``duration`` are a nanosecond; None: they are no time."""
    clock = trace.manifest.provenance.clock
    if clock is Clock.NANOSECONDS:
        return 1.0
    if clock is Clock.MODELLED:
        return FREQUENCY / 1e9
    if clock is not Clock.TSC:
        return None
    both = pl.col("time").is_not_null() & pl.col("clock").is_not_null()
    of_vcpus = (
        trace.events()
        .filter(both)
        .group_by("vcpu")
        .agg(
            (pl.col("time").max() - pl.col("time").min()).alias("time"),
            (pl.col("clock").max() - pl.col("clock").min()).alias("clock"),
        )
        .sort("time")
        .collect(engine="streaming")
    )
    if of_vcpus.is_empty():
        return None
    longest = of_vcpus.row(-1, named=True)
    if longest["time"] < LEAST_SPAN or not longest["clock"]:
        return None
    return float(longest["clock"] / longest["time"])
