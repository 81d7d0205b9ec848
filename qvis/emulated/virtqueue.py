# SPDX-License-Identifier: GPL-2.0-or-later
"""Split virtqueues as a device sees them: virtio 1.3, 2.7.

Limits and what is made of a broken ring are those of QEMU's hw/virtio/virtio.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Protocol

from .memory import Memory

__all__ = [
    "MAX_SIZE",
    "Chain",
    "Owner",
    "Segment",
    "Staged",
    "Virtqueue",
    "gather",
    "scatter",
    "total",
]

MAX_SIZE = 1024  # entries of a ring, and buffers of a chain
NEXT, WRITE, INDIRECT = 1, 2, 4  # flags of a descriptor
NO_INTERRUPT = 1  # flag of an available ring

Segment = tuple[int, int]
"""A piece of guest memory: guest-physical address, length in bytes (at least one)."""

_descriptor = Struct("<QIHH").unpack_from


class Owner(Protocol):
    """What a queue wants of the device it belongs to."""

    memory: Memory
    event_idx: bool
    """Whether VIRTIO_RING_F_EVENT_IDX has been accepted."""
    stopped: bool
    """Whether the device neither takes buffers nor interrupts, since it is broken or disabled."""

    def error(self, why: str) -> None:
        """The driver has broken a rule: nothing but a reset helps."""


class Chain:
    """Buffers of one request: the device reads ``readable`` and fills ``writable``.

    ``room`` is how many bytes it can fill.
    """

    __slots__ = ("head", "readable", "room", "writable")

    def __init__(
        self, head: int, readable: list[Segment], writable: list[Segment], room: int
    ) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.room = room


class Virtqueue:
    """One ring. It is live from :meth:`place` on; counters run on until :meth:`reset`."""

    __slots__ = (
        "_avail",
        "_bytes",
        "_last_avail",
        "_limit",
        "_owner",
        "_shadow_avail",
        "_signalled",
        "_signalled_valid",
        "_used16",
        "_used32",
        "_used_index",
        "avail",
        "default_size",
        "desc",
        "in_use",
        "index",
        "ready",
        "scheduled",
        "size",
        "used",
    )

    def __init__(self, owner: Owner, index: int, size: int) -> None:
        self._owner = owner
        self._bytes = owner.memory.u8
        self._limit = owner.memory.size
        self.index = index
        self.default_size = size
        self.scheduled = False
        """Whether the device is to look at it at a later time."""
        self.reset()

    def reset(self) -> None:
        """What a reset of the device, or of this queue, leaves."""
        self.size = self.default_size
        self.ready = False
        self.desc = self.avail = self.used = 0
        self.in_use = 0
        """Chains that the device has taken and not given back."""
        self._last_avail = 0
        self._shadow_avail = 0
        self._used_index = 0
        self._signalled = 0
        self._signalled_valid = False
        self._avail: memoryview | None = None
        self._used16: memoryview | None = None
        self._used32: memoryview | None = None

    def resize(self, size: int) -> None:
        """Take another size; what is none leaves the old one (1 to 1024, as QEMU)."""
        if 0 < size <= MAX_SIZE:
            self.size = size
        self.map()

    def place(self, desc: int, avail: int, used: int, size: int = 0) -> None:
        """Take the guest-physical addresses of the three parts, and a size if it is one."""
        if 0 < size <= MAX_SIZE:
            self.size = size
        self.desc, self.avail, self.used = desc, avail, used
        self.ready = True
        self.map()

    def map(self) -> None:
        """Find the parts in memory. If one is not all RAM, the device is broken."""
        self._avail = self._used16 = self._used32 = None
        if not self.desc:
            return
        size, extra = self.size, 2 if self._owner.event_idx else 0
        contains = self._owner.memory.contains
        for name, address, length in (
            ("descriptor", self.desc, 16 * size),
            ("used", self.used, 4 + 8 * size + extra),
            ("available", self.avail, 4 + 2 * size + extra),
        ):
            if not contains(address, length):
                self._owner.error(f"no memory for the {name} ring at {address:#x}")
                return
        # Slices, so that rings which are not aligned work too.
        data = self._bytes
        self._avail = data[self.avail : self.avail + 4 + 2 * size + extra].cast("H")
        self._used16 = data[self.used : self.used + 4 + 8 * size + extra].cast("H")
        self._used32 = data[self.used : self.used + 4 + 8 * size].cast("I")

    def pop(self) -> Chain | None:
        """The next chain that the driver has made available; None if there is none.

        There is none either if the ring makes no sense: then the device is broken.
        """
        avail = self._avail
        if avail is None or self._owner.stopped:
            return None
        last, size = self._last_avail, self.size
        if last == self._shadow_avail:
            self._shadow_avail = shadow = avail[1]
            if shadow == last:
                if self._owner.event_idx and self._used16 is not None:
                    self._used16[2 + 4 * size] = last
                return None
            # QEMU looks at this only where it counts buffers before it takes them.
            if (shadow - last) & 0xFFFF > size:
                return self._error(f"available index has moved from {last} to {shadow}")
        if self.in_use >= size:
            return self._error("more chains are available than the ring has entries")
        head = avail[2 + last % size]
        self._last_avail = (last + 1) & 0xFFFF
        if head >= size:
            return self._error(f"descriptor {head} is available, of {size}")

        data, limit = self._bytes, self._limit
        table = self.desc
        address, length, flags, following = _descriptor(data, table + 16 * head)
        if flags & INDIRECT:
            if not length or length % 16:
                return self._error(f"an indirect table of {length} bytes")
            if address + length > limit:
                return self._error("an indirect table outside memory")
            table, size = address, length // 16
            address, length, flags, following = _descriptor(data, table)
        readable: list[Segment] = []
        writable: list[Segment] = []
        room = 0
        left = size if size < MAX_SIZE else MAX_SIZE
        while True:
            if not length:
                return self._error("a buffer of no length")
            if address + length > limit:
                return self._error("a buffer outside memory")
            if flags & WRITE:
                writable.append((address, length))
                room += length
            elif writable:
                return self._error("a readable buffer behind a writable one")
            else:
                readable.append((address, length))
            left -= 1
            if left < 0:
                return self._error("a chain that is too long, or a loop")
            if not flags & NEXT:
                break
            if following >= size:
                return self._error(f"a chain leads to descriptor {following}, of {size}")
            address, length, flags, following = _descriptor(data, table + 16 * following)
        self.in_use += 1
        return Chain(head, readable, writable, room)

    def _error(self, why: str) -> Chain | None:
        """There is no chain, and never will be."""
        self._owner.error(f"queue {self.index}: {why}")
        return None

    def rewind(self, chains: int) -> None:
        """Act as if the last so many had not been taken."""
        self._last_avail = (self._last_avail - chains) & 0xFFFF
        self.in_use -= chains

    def detach(self) -> None:
        """Take a chain out of the count which will never be given back."""
        self.in_use -= 1

    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back, ``written`` bytes of which have been filled."""
        ring, words = self._used32, self._used16
        if ring is None or words is None:
            return
        index = self._used_index
        at = 2 * (index % self.size)
        ring[at + 1] = chain.head
        ring[at + 2] = written & 0xFFFFFFFF
        self._used_index = index = (index + 1) & 0xFFFF
        words[1] = index
        self.in_use -= 1
        if not 0 < (index - self._signalled) & 0xFFFF < 0x8000:
            # So long since the last interrupt that the two cannot be compared.
            self._signalled_valid = False

    def should_interrupt(self) -> bool:
        """Whether the driver wants to hear of what has been pushed since this was last asked."""
        avail = self._avail
        if avail is None:
            return not self._owner.event_idx
        if not self._owner.event_idx:
            return not avail[0] & NO_INTERRUPT
        new, old = self._used_index, self._signalled
        self._signalled = new
        if not self._signalled_valid:
            self._signalled_valid = True
            return True
        event = avail[2 + self.size]
        return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF

    @property
    def indices(self) -> tuple[int, int, int]:
        """For onlookers: last available index taken, the same as last read, used index."""
        return self._last_avail, self._shadow_avail, self._used_index


class Staged:
    """What a driver has written about a queue, before it makes the queue ready."""

    __slots__ = ("parts", "ready", "size")

    def __init__(self) -> None:
        self.size = 0
        self.ready = False
        """What the driver reads back; a queue that it makes unready keeps its rings, in QEMU."""
        self.parts = [0, 0, 0]
        """Addresses of the descriptors, the available and the used ring."""

    def write(self, part: int, shift: int, value: int) -> None:
        """Half an address: bits 31:0, or with ``shift`` 32 the others."""
        self.parts[part] = self.parts[part] & 0xFFFFFFFF << (32 - shift) | value << shift

    def apply(self, queue: Virtqueue) -> None:
        """Make it what the queue has."""
        desc, avail, used = self.parts
        queue.place(desc, avail, used, self.size)


def total(segments: Sequence[Segment]) -> int:
    """Bytes in all."""
    return sum(length for _, length in segments)


def gather(memory: Memory, segments: Sequence[Segment], limit: int, offset: int = 0) -> bytes:
    """Up to ``limit`` bytes of what lies in ``segments``, from ``offset`` on."""
    parts = []
    for address, length in segments:
        if offset >= length:
            offset -= length
            continue
        take = min(length - offset, limit)
        if take <= 0:
            break
        parts.append(memory.read(address + offset, take))
        limit -= take
        offset = 0
    return b"".join(parts)


def scatter(memory: Memory, segments: Sequence[Segment], data: bytes, offset: int = 0) -> int:
    """Write ``data`` into ``segments`` from ``offset`` on; how many bytes there was room for."""
    if not offset and segments and segments[0][1] >= len(data):
        memory.write(segments[0][0], data)
        return len(data)
    done = 0
    for address, length in segments:
        if offset >= length:
            offset -= length
            continue
        if done == len(data):
            break
        piece = data[done : done + length - offset]
        memory.write(address + offset, piece)
        done += len(piece)
        offset = 0
    return done
