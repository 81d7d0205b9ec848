# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own trace events, from the file that its "simple" backend writes.

They tell what the TCG plugin cannot see, since no vCPU does it: that a device
raised an interrupt, and that an IOAPIC saw the end of one. Time is QEMU's
``get_clock()``, which on Linux is CLOCK_MONOTONIC, as the plugin's is. The
format is that of ``trace/simple.c`` (header version 4).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from ..errors import UsageError
from .model import SCHEMA, Kind

__all__ = ["EVENTS", "Events", "frames", "read"]

ARGUMENTS = {"apic_deliver_irq": 5, "ioapic_eoi_broadcast": 1}
EVENTS = tuple(ARGUMENTS)
"""What is enabled while a trace is recorded."""

HEADER = struct.Struct("<QQQ")
HEADER_EVENT = 0xFFFFFFFFFFFFFFFF
MAGIC = 0xF2B177CB0AA429B4
VERSION = 4
MAPPING, EVENT = 0, 1
DROPPED = 0xFFFFFFFFFFFFFFFE
NAME = struct.Struct("<QL")  # event number, length of its name
RECORD = struct.Struct("<QQLL")  # event number, ns, bytes with this, process
TYPE_SIZE = 8
PIECE = 1 << 22  # bytes read at a time
LONGEST_RECORD = 1 << 18  # bytes: all of QEMU's buffer
LONGEST_NAME = 1 << 12
# ns that an event may be behind one that was written after it: a thread takes the time first
# and its place in the buffer then.
LATE = 250_000_000
# SDM volume 3, 11.6.1: the ICR's delivery modes that carry a vector
FIXED, LOWEST_PRIORITY = 0, 1
EVERYBODY = (0xFF, 0xFFFFFFFF)  # 11.6.2.1, in xAPIC and x2APIC mode


@dataclass(frozen=True)
class Events:
    """The events of one name: their times in ns and their arguments, one row an event."""

    name: str
    time: npt.NDArray[np.int64]
    arguments: npt.NDArray[np.uint64]


def read(path: Path, partial: list[str]) -> Iterator[list[Events]]:
    """The events in the file, some at a time; all arguments must be numbers.

    What QEMU dropped, and a file cut short, are added to ``partial``. Raises
    :class:`UsageError` when it is not such a file.
    """
    names: dict[int, str] = {}
    dropped = 0
    with path.open("rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            partial.append(f"{path.name} is empty")
            return
        if HEADER.unpack(head) != (HEADER_EVENT, MAGIC, VERSION):
            raise UsageError(f"{path} is no trace of QEMU's simple backend, version {VERSION}")
        rest = b""
        while piece := file.read(PIECE):
            data = rest + piece
            places, used, lost = _scan(data, names, path)
            dropped += lost
            rest = data[used:]
            words = np.frombuffer(data[:used].ljust((used + 7) & ~7, b"\0"), dtype=np.uint8)
            yield [_gather(words, names.get(event, "?"), at, count)
                   for (event, count), at in places.items()]  # fmt: skip
    if rest:
        partial.append(f"{path.name} ends in the middle of an event")
    if dropped:
        partial.append(f"QEMU dropped {dropped} of its trace events: its buffer was full")


def _scan(
    data: bytes, names: dict[int, str], path: Path
) -> tuple[dict[tuple[int, int], list[int]], int, int]:
    """Where which event's record begins; how many bytes are whole records; how many dropped."""
    places: dict[tuple[int, int], list[int]] = {}
    at = dropped = 0
    end = len(data)
    while at + TYPE_SIZE + NAME.size <= end:
        kind = data[at]
        if kind == EVENT:
            if at + TYPE_SIZE + RECORD.size > end:
                break
            event, _, length, _ = RECORD.unpack_from(data, at + TYPE_SIZE)
            if not RECORD.size <= length <= LONGEST_RECORD:
                raise UsageError(f"{path} is damaged: a record of {length} bytes")
            if at + TYPE_SIZE + length > end:
                break
            if event == DROPPED:
                dropped += int.from_bytes(data[at + TYPE_SIZE + RECORD.size :][:8], "little")
            else:
                count = (length - RECORD.size) // 8
                places.setdefault((event, count), []).append(at + TYPE_SIZE)
            at += TYPE_SIZE + length
        elif kind == MAPPING:
            event, length = NAME.unpack_from(data, at + TYPE_SIZE)
            if length > LONGEST_NAME:
                raise UsageError(f"{path} is damaged: a name of {length} bytes")
            stop = at + TYPE_SIZE + NAME.size + length
            if stop > end:
                break
            names[event] = data[stop - length : stop].decode(errors="replace")
            at = stop
        else:
            raise UsageError(f"{path} is damaged: a record of type {kind}")
    return places, at, dropped


def _gather(data: npt.NDArray[np.uint8], name: str, places: list[int], count: int) -> Events:
    at = np.array(places)[:, None]

    def field(offset: int) -> npt.NDArray[np.uint64]:
        return data[at + offset + np.arange(8)].copy().view("<u8")[:, 0]

    columns = [field(RECORD.size + 8 * n) for n in range(count)]
    arguments = np.stack(columns, axis=1) if columns else np.empty((len(at), 0), dtype=np.uint64)
    return Events(name, field(8).astype(np.int64), arguments)


def frames(path: Path, device_vectors: range, partial: list[str]) -> Iterator[pl.DataFrame]:
    """Raises of device vectors, and ends seen by an IOAPIC, in order of time.

    A raise's ``vcpu`` is its target, where it has a single one.
    """
    held = SCHEMA.to_frame()
    for several in read(path, partial):
        parts = [held]
        for events in several:
            if events.name not in ARGUMENTS:
                continue
            if events.arguments.shape[1] != ARGUMENTS[events.name]:
                raise UsageError(
                    f"{path} is of a QEMU that qvis does not know: it has {events.name} with "
                    f"{events.arguments.shape[1]} arguments"
                )
            raises = events.name == "apic_deliver_irq"
            parts.append(_raises(events, device_vectors) if raises else _ends(events))
        held = pl.concat(parts).sort("time", maintain_order=True)
        if len(held):
            split = held["time"].search_sorted(held["time"][-1] - LATE, "left")
            yield held[:split]
            held = held[split:]
    yield held


def _raises(events: Events, device_vectors: range) -> pl.DataFrame:
    destination, logical, mode, vector, _ = events.arguments.astype(np.int64).T
    wanted = np.isin(mode, (FIXED, LOWEST_PRIORITY)) & np.isin(vector, list(device_vectors))
    # Logical destinations in the flat model are one bit a vCPU (SDM volume 3, 11.6.2.2).
    physical = (logical == 0) & ~np.isin(destination, EVERYBODY)
    single = physical | (logical != 0) & (destination & (destination - 1) == 0) & (destination > 0)
    bit = np.log2(np.maximum(destination, 1)).astype(np.int64)
    target = np.where(single, np.where(logical == 0, destination, bit), -1)
    frame = _frame(events.time, Kind.RAISE, vector, target)
    return frame.filter(pl.Series(wanted))


def _ends(events: Events) -> pl.DataFrame:
    vector = events.arguments[:, 0].astype(np.int64)
    frame = _frame(events.time, Kind.EOI, vector, np.full(len(vector), -1))
    return frame.with_columns(pl.lit("IOAPIC", SCHEMA["device"]).alias("device"),
                              pl.lit("EOI", SCHEMA["cause"]).alias("cause"))  # fmt: skip


def _frame(
    time: npt.NDArray[np.int64],
    kind: Kind,
    vector: npt.NDArray[np.int64],
    vcpu: npt.NDArray[np.int64],
) -> pl.DataFrame:
    rest = [pl.lit(None, dtype).alias(name) for name, dtype in SCHEMA.items()]
    return (
        pl.DataFrame({"row": time})
        .with_columns(rest)
        .with_columns(
            pl.Series("time", time),
            pl.Series("vcpu", vcpu).replace(-1, None),
            pl.lit(str(kind)).alias("kind"),
            pl.Series("vector", vector),
        )
        .select(SCHEMA.names())
        .cast(SCHEMA)
    )
