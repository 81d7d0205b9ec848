# SPDX-License-Identifier: GPL-2.0-or-later
"""What of a guest's memory its virtio devices share, found in a recording of all of it.

Beside the registers, where rings and interrupt storage are, this takes the ring's format
(virtio 1.3, 2.7) and that of the storage (docs/virtio-interrupts.md, 5.1), and follows the
driver's side of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Row", "merged", "shared_memory"]

# tests/emulated/recordings/shared.c
TOUCH = np.dtype([("time", "<u8"), ("value", "<u8"), ("where", "<u8")])
LOAD = 0x80
Touches = npt.NDArray[np.void]
PAGE = 12  # bits
FOREVER = 1 << 63
NEXT, WRITE, INDIRECT = 1, 2, 4  # a descriptor's flags


class Row(NamedTuple):
    """One row of a recording, and when it was; its README tells what a kind has where."""

    time: int
    vcpu: int | None
    kind: str
    address: int | None
    size: int | None
    value: int | None
    name: str


@dataclass(frozen=True)
class Area:
    """Bytes that a device can look at, or write, from one time to another."""

    start: int
    end: int
    begin: int
    until: int


@dataclass
class Ring:
    """A split virtqueue while a device has it."""

    size: int
    desc: int
    driver: int
    device: int
    begin: int
    until: int = FOREVER

    @property
    def read(self) -> list[Area]:
        """What of it the device reads."""
        return [
            Area(self.desc, self.desc + 16 * self.size, self.begin, self.until),
            Area(self.driver, self.driver + 2 * self.size + 6, self.begin, self.until),
        ]

    @property
    def written(self) -> Area:
        """What of it the device writes."""
        return Area(self.device, self.device + 8 * self.size + 6, self.begin, self.until)


def shared_memory(path: Path, rows: Iterable[Row]) -> list[Row]:
    """What vCPUs stored where a device reads, and loaded where one has written.

    ``path`` is what ``shared.c`` wrote, ``rows`` are the accesses to registers. Stores are in
    rings and storage while a device has them, in descriptors, and in what those make available.
    One that changes nothing is left out.
    """
    touches = np.memmap(path, dtype=TOUCH, mode="r")
    rings, storage = _handed_over(rows)
    read = [*storage, *(area for ring in rings for area in ring.read)]
    written = [*storage, *(ring.written for ring in rings)]
    walk = _Walk(rings)
    while True:
        pages = _units([*read, *written, *walk.read, *walk.written], PAGE)
        some = touches[np.isin(touches["where"] >> np.uint64(PAGE + 8), pages)]
        is_load = some["where"] & np.uint64(LOAD) != 0
        walk = _Walk(rings)
        walk.run(some[~is_load])
        if not len(np.setdiff1d(_units([*walk.read, *walk.written], PAGE), pages)):
            break
    loads, seen = _loads(some, written, walk.written)
    # A load may have more bytes than those that a device has written.
    around = [
        replace(area, until=area.begin)
        for area in walk.written
        if not seen.isdisjoint(range(area.start, area.end))
    ]
    around += [replace(ring.written, until=ring.begin) for ring in rings]
    stores = _needed(some[~is_load], [*read, *walk.read, *around])
    return [*loads, *_changes(stores, [*written, *walk.written])]


def merged(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows, with stores that follow each other in time and place as one of up to 8."""
    held: Row | None = None
    for row in rows:
        if held is not None and (joined := _joined(held, row)):
            held = joined
            continue
        if held is not None:
            yield held
        held = row
    if held is not None:
        yield held


def _joined(one: Row, other: Row) -> Row | None:
    if one.kind != "store" or other.kind != "store":
        return None
    assert one.address is not None and one.size is not None and one.value is not None
    assert other.size is not None and other.value is not None
    size = one.size + other.size
    if one.address + one.size != other.address or size > 8:
        return None
    return one._replace(size=size, value=one.value | other.value << 8 * one.size)


def _handed_over(rows: Iterable[Row]) -> tuple[list[Ring], list[Area]]:
    """The rings, and the interrupt storage, that registers were told of."""
    rings: list[Ring] = []
    areas: list[Area] = []
    live: dict[tuple[str, int], Ring] = {}
    storage: dict[str, int] = {}  # the index in areas of what a device has
    told: dict[tuple[str, int | None], dict[str, int]] = {}

    def ended(device: str, queue: int | None, time: int) -> None:
        for key in [key for key in live if key[0] == device and queue in (None, key[1])]:
            live.pop(key).until = time

    def storage_ended(device: str, time: int) -> None:
        if (index := storage.pop(device, None)) is not None:
            old = areas[index]
            areas[index] = Area(old.start, old.end, old.begin, time)

    for row in rows:
        if row.kind != "write" or row.address is None or row.value is None:
            continue
        device, _, register = row.name.partition(".")
        selected = told.setdefault((device, None), {}).get("selected", 0)
        if register in ("QueueSel", "queue_select"):
            told[device, None]["selected"] = row.value
            continue
        # virtio-pci has all of them for each queue: Linux sets all queues up, then enables all.
        queue = selected if register[:5].lower() == "queue" else None
        state = told.setdefault((device, queue), {})
        high = row.address & 4 and row.size == 4 and register.startswith("queue_d")
        state[register + ("High" if high else "")] = row.value
        if register in ("QueueReady", "queue_enable"):
            ended(device, selected, row.time)
            if row.value:
                live[device, selected] = _ring(state, row.time)
                rings.append(live[device, selected])
        elif register in ("QueueReset", "queue_reset"):
            ended(device, selected, row.time)
        elif register in ("Status", "device_status") and not row.value:
            ended(device, None, row.time)
            storage_ended(device, row.time)
            for key in [key for key in told if key[0] == device]:
                del told[key]
        elif register == "VisControl":
            storage_ended(device, row.time)
            if row.value >> 16:
                storage[device] = len(areas)
                areas.append(_storage(state, row.value & 0xFFFF, row.time))
    return rings, areas


def _ring(state: dict[str, int], time: int) -> Ring:
    """From virtio-mmio's registers or virtio-pci's."""

    def address(mmio: str, pci: str) -> int:
        low = state.get(f"{mmio}Low", state.get(pci, 0))
        return state.get(f"{mmio}High", state.get(f"{pci}High", 0)) << 32 | low

    return Ring(
        state.get("QueueNum", state.get("queue_size", 0)),
        address("QueueDesc", "queue_desc"),
        address("QueueDriver", "queue_driver"),
        address("QueueDevice", "queue_device"),
        time,
    )


def _storage(state: dict[str, int], vectors: int, time: int) -> Area:
    start = state.get("VisStorageHigh", 0) << 32 | state["VisStorageLow"]
    area = 128 * -(-vectors // 128)
    return Area(start, start + 3 * area + 8 * vectors, time, FOREVER)


class _Walk:
    """Follows the driver's side of rings through what the guest stored."""

    def __init__(self, rings: list[Ring]) -> None:
        self._rings = sorted(rings, key=lambda ring: ring.begin, reverse=True)
        self._memory: dict[int, bytearray] = {}
        self._indices: dict[int, Ring] = {}  # where an available ring's index is
        self._seen: dict[int, int] = {}  # what it was there
        self.read: list[Area] = []
        """What descriptors have a device read, at the time when they were made available."""
        self.written: list[Area] = []
        """The same of what they have it write."""

    def run(self, stores: Touches) -> None:
        """Apply stores in order."""
        for time, value, where in stores.tolist():
            while self._rings and self._rings[-1].begin <= time:
                ring = self._rings.pop()
                self._indices[ring.driver + 2] = ring
                self._seen[ring.driver + 2] = 0
                self._look(ring.driver + 2, ring.begin)
            address, size = where >> 8, where & 0xFF
            self._put(address, value.to_bytes(8, "little")[:size])
            for at in (address, address + 2):  # the index alone, or with the flags before it
                if at in self._indices and at < address + size:
                    self._look(at, time)

    def _look(self, at: int, time: int) -> None:
        """See what an index, which may have moved, makes available."""
        ring = self._indices[at]
        now = self._number(at, 2) if time <= ring.until else self._seen[at]
        while self._seen[at] != now:
            slot = at + 2 + 2 * (self._seen[at] % ring.size)
            self._chain(ring, ring.desc, ring.size, self._number(slot, 2), time)
            self._seen[at] = (self._seen[at] + 1) & 0xFFFF

    def _chain(self, ring: Ring, table: int, size: int, head: int, time: int) -> None:
        for _ in range(size):
            at = table + 16 * head
            address, length = self._number(at, 8), self._number(at + 8, 4)
            flags, head = self._number(at + 12, 2), self._number(at + 14, 2)
            if flags & WRITE:
                self.written.append(Area(address, address + length, time, ring.until))
            else:
                self.read.append(Area(address, address + length, time, time))
            if flags & INDIRECT:
                self._chain(ring, address, length // 16, 0, time)
            if not flags & NEXT or head >= size:
                break

    def _put(self, address: int, data: bytes) -> None:
        page = self._memory.setdefault(address >> PAGE, bytearray(1 << PAGE))
        offset = address & ((1 << PAGE) - 1)
        data = data[: (1 << PAGE) - offset]
        page[offset : offset + len(data)] = data

    def _number(self, address: int, size: int) -> int:
        page = self._memory.get(address >> PAGE, bytearray(1 << PAGE))
        offset = address & ((1 << PAGE) - 1)
        return int.from_bytes(page[offset : offset + size], "little")


def _units(areas: Iterable[Area], bits: int) -> npt.NDArray[np.uint64]:
    """Numbers of the pieces of 2**bits bytes that areas are in."""
    spans = {
        (area.start >> bits, (area.end - 1) >> bits) for area in areas if area.end > area.start
    }
    units = {unit for first, last in spans for unit in range(first, last + 1)}
    return np.array(sorted(units), dtype=np.uint64)


def _near(touches: Touches, areas: list[Area]) -> list[tuple[int, int, int]]:
    """Those that may touch an area, for the fewer to look at one by one."""
    words = _units(areas, 3)
    first = touches["where"] >> np.uint64(8)
    last = first + (touches["where"] & np.uint64(0xF)) - np.uint64(1)
    near = np.isin(first >> np.uint64(3), words) | np.isin(last >> np.uint64(3), words)
    found: list[tuple[int, int, int]] = touches[near].tolist()
    return found


def _loads(touches: Touches, kept: list[Area], lent: list[Area]) -> tuple[list[Row], set[int]]:
    """Loads of what a device may have written, and the bytes that they are of.

    What is ``lent`` is the device's until the driver stores there: that is not recorded.
    """
    rows: list[Row] = []
    seen: set[int] = set()
    shared: dict[int, int] = {}  # by byte of the areas that have begun: until when
    loan: dict[int, int] = {}
    pending = sorted(
        [*((area, shared) for area in kept), *((area, loan) for area in lent)],
        key=lambda each: each[0].begin,
        reverse=True,
    )
    for time, value, where in _near(touches, [*kept, *lent]):
        while pending and pending[-1][0].begin <= time:
            area, untils = pending.pop()
            untils.update(dict.fromkeys(range(area.start, area.end), area.until))
        address, size = where >> 8, where & 0xF
        touched = range(address, address + size)
        if not where & LOAD:
            for byte in touched:
                loan.pop(byte, None)
        elif all(max(shared.get(byte, 0), loan.get(byte, 0)) >= time for byte in touched):
            rows.append(Row(time, None, "load", address, size, value, ""))
            seen.update(touched)
    return rows, seen


def _needed(stores: Touches, areas: list[Area]) -> list[tuple[int, int, int]]:
    """Stores to an area while it can be looked at, and of those before it the last to each byte."""
    some = _near(stores, areas)
    needed = [False] * len(some)
    latest: dict[int, int] = {}  # by byte
    live: dict[int, int] = {}  # by byte, until when
    pending = sorted(areas, key=lambda area: area.begin, reverse=True)

    def begin(area: Area) -> None:
        for byte in range(area.start, area.end):
            if byte in latest:
                needed[latest[byte]] = True
            if area.until > area.begin:
                live[byte] = max(live.get(byte, 0), area.until)

    for number, (time, _, where) in enumerate(some):
        while pending and pending[-1].begin <= time:
            begin(pending.pop())
        for byte in range(where >> 8, (where >> 8) + (where & 0xFF)):
            latest[byte] = number
            needed[number] |= live.get(byte, 0) >= time
    for area in reversed(pending):
        begin(area)
    return [store for store, wanted in zip(some, needed, strict=True) if wanted]


def _changes(stores: Iterable[tuple[int, int, int]], foreign: list[Area]) -> Iterator[Row]:
    """Those that change what is there: at first zeros, in ``foreign`` areas nobody knows what."""
    content: dict[int, int | None] = {}
    pending = sorted(foreign, key=lambda area: area.begin, reverse=True)
    for time, value, where in stores:
        while pending and pending[-1].begin <= time:
            area = pending.pop()
            content.update(dict.fromkeys(range(area.start, area.end)))
        address, size = where >> 8, where & 0xFF
        data = dict(enumerate(value.to_bytes(8, "little")[:size], start=address))
        if any(content.get(at, 0) != byte for at, byte in data.items()):
            content.update(data)
            yield Row(time, None, "store", address, size, value, "")
