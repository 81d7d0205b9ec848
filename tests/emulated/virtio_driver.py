# SPDX-License-Identifier: GPL-2.0-or-later
"""A driver for tests: rings in guest memory, registers of either transport."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qvis.emulated.events import Events
from qvis.emulated.memory import Memory
from qvis.emulated.mmio import MmioTransport
from qvis.emulated.virtio import Device

__all__ = ["INDIRECT", "MIB", "NEXT", "WRITE", "Bench", "Ring", "negotiate", "place"]

NEXT, WRITE, INDIRECT = 1, 2, 4
MIB = 1 << 20


class Ring:
    """The driver's side of a split ring of ``size`` entries from ``base`` on, aligned to 4096."""

    def __init__(self, memory: Memory, base: int, size: int) -> None:
        self.memory = memory
        self.size = size
        self.desc = base
        self.avail = base + 16 * size
        self.used = (self.avail + 6 + 2 * size + 4095) & ~4095
        self.end = self.used + 6 + 8 * size
        self.available = 0
        self.seen = 0
        self.free = 0

    def describe(
        self, index: int, address: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        at = self.desc + 16 * index
        self.memory.write(at, address.to_bytes(8, "little") + length.to_bytes(4, "little"))
        self.memory.write(at + 12, flags.to_bytes(2, "little") + following.to_bytes(2, "little"))

    def offer(self, head: int) -> None:
        self.memory.u16[(self.avail + 4 >> 1) + self.available % self.size] = head
        self.available = (self.available + 1) & 0xFFFF
        self.memory.u16[self.avail + 2 >> 1] = self.available

    def add(self, *buffers: tuple[int, int, bool]) -> int:
        """Make a chain of (address, length, writable) available; its head."""
        head = self.free
        for number, (address, length, writable) in enumerate(buffers):
            last = number == len(buffers) - 1
            following = (head + number + 1) % self.size
            flags = (WRITE if writable else 0) | (0 if last else NEXT)
            self.describe((head + number) % self.size, address, length, flags, following)
        self.free = (head + len(buffers)) % self.size
        self.offer(head)
        return head

    def used_index(self) -> int:
        return self.memory.u16[self.used + 2 >> 1]

    def take(self) -> list[tuple[int, int]]:
        """Heads and lengths of what has been used since."""
        done = []
        while self.seen != self.used_index():
            at = (self.used + 4 >> 2) + 2 * (self.seen % self.size)
            done.append((self.memory.u32[at], self.memory.u32[at + 1]))
            self.seen = (self.seen + 1) & 0xFFFF
        return done


@dataclass
class Bench:
    """A machine's worth of things that a device is plugged into."""

    events: Events = field(default_factory=Events)
    memory: Memory = field(default_factory=lambda: Memory(4 * MIB))
    levels: list[bool] = field(default_factory=list)
    messages: list[tuple[int, int]] = field(default_factory=list)

    def mmio(self, device: Device, **options: Any) -> MmioTransport:
        return MmioTransport(
            device,
            self.memory,
            self.levels.append,
            lambda address, data: self.messages.append((address, data)),
            **options,
        )

    def start(
        self,
        transport: MmioTransport,
        features: int,
        rings: int = 1,
        base: int = MIB,
        size: int = 16,
    ) -> list[Ring]:
        """Negotiate, set up so many rings, and say DRIVER_OK."""
        negotiate(transport, features)
        made = []
        for index in range(rings):
            ring = Ring(self.memory, base, size)
            base = (ring.end + 4095) & ~4095
            place(transport, index, ring)
            made.append(ring)
        transport.write(0x70, 4, 0xF)
        return made


def negotiate(transport: MmioTransport, features: int) -> None:
    for status in (0, 1, 3):
        transport.write(0x70, 4, status)
    for select in (0, 1):
        transport.write(0x24, 4, select)
        transport.write(0x20, 4, features >> 32 * select & 0xFFFFFFFF)
    transport.write(0x70, 4, 0xB)


def place(transport: MmioTransport, index: int, ring: Ring) -> None:
    transport.write(0x30, 4, index)
    transport.write(0x38, 4, ring.size)
    for register, address in ((0x80, ring.desc), (0x90, ring.avail), (0xA0, ring.used)):
        transport.write(register, 4, address & 0xFFFFFFFF)
        transport.write(register + 4, 4, address >> 32)
    transport.write(0x44, 4, 1)
