# SPDX-License-Identifier: GPL-2.0-or-later
"""PCI: configuration spaces behind an ECAM, base addresses, MSI-X.

PCI Local Bus 3.0, chapter 6, and PCI Express Base, 7.2.2 (ECAM). What is writable and what
reads as what is as in QEMU's hw/pci; functions are conventional ones of 256 bytes, since
that is what virtio functions on a root bus are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Bar", "HostBridge", "Msix", "PciBus", "PciFunction", "Region"]

WINDOW32 = range(0xC0000000, 0xE0000000)
WINDOW64 = range(0xC000000000, 0x10000000000)
SPACE = 256  # bytes of a configuration space

MEMORY, MASTER, INTX_DISABLE, SERR, IO = 0x002, 0x004, 0x400, 0x100, 0x001  # of the command
STATUS_INTERRUPT, STATUS_CAPABILITIES = 0x08, 0x10
MSIX_ENABLE, MSIX_MASKALL = 0x8000, 0x4000
HEADER_TYPE, MULTIFUNCTION = 0x0E, 0x80  # PCI 3.0, 6.1
MASKED = 1  # of an MSI-X entry's vector control


@dataclass(frozen=True)
class Region:
    """Registers in a BAR: from ``start`` on, ``size`` bytes; handlers take offsets in it."""

    name: str
    start: int
    size: int
    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]


class Bar:
    """One base address register's memory, and where it is mapped, if it is."""

    def __init__(self, number: int, size: int, regions: list[Region], *, wide: bool) -> None:
        """``wide``: it is a prefetchable one of 64 bits, and takes up two registers."""
        self.number = number
        self.size = size
        self.regions = regions
        self.wide = wide
        self.start: int | None = None
        """Guest-physical address; None: not mapped."""

    def _find(self, offset: int, size: int) -> Region | None:
        for region in self.regions:
            if region.start <= offset and offset + size <= region.start + region.size:
                return region
        return None

    def read(self, offset: int, size: int) -> int:
        """What lies at ``offset``; all ones where there is nothing."""
        region = self._find(offset, size)
        if region is None:
            return (1 << 8 * size) - 1
        return region.read(offset - region.start, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """The same, written."""
        region = self._find(offset, size)
        if region is not None:
            region.write(offset - region.start, size, value)


class PciFunction:
    """A function of a device: its configuration space, and what its BARs hold."""

    def __init__(self, vendor: int, device: int, code: int, subsystem: tuple[int, int]) -> None:
        """``code`` is class and subclass; ``subsystem`` its vendor and device IDs."""
        self.bus: PciBus | None = None
        self.bars: list[Bar] = []
        self.space = bytearray(SPACE)
        # What is no capability is free for whoever wants it.
        self._writable = bytearray(64) + bytearray(b"\xff") * (SPACE - 64)
        self._clearable = bytearray(SPACE)
        self._put(0x00, 2, vendor)
        self._put(0x02, 2, device)
        self._put(0x0A, 2, code)
        self._put(0x2C, 2, subsystem[0])
        self._put(0x2E, 2, subsystem[1])
        self._allow(0x04, 2, IO | MEMORY | MASTER | SERR | INTX_DISABLE)
        self._allow(0x0C, 1, 0xFF)  # cache line size
        self._allow(0x3C, 1, 0xFF)  # interrupt line
        self._clearable[0x07] = 0xF9
        self._end = 0x40
        self._io_bits = 0

    def _put(self, offset: int, size: int, value: int) -> None:
        self.space[offset : offset + size] = value.to_bytes(size, "little")

    def _get(self, offset: int, size: int) -> int:
        return int.from_bytes(self.space[offset : offset + size], "little")

    def _allow(self, offset: int, size: int, mask: int) -> None:
        self._writable[offset : offset + size] = mask.to_bytes(size, "little")

    @property
    def command(self) -> int:
        """The command register."""
        return self._get(0x04, 2)

    def add_capability(self, number: int, body: bytes) -> int:
        """Put a capability, ``body`` without its first two bytes, at the head of the list."""
        at = self._end
        self._put(at, 2, number | self.space[0x34] << 8)
        self.space[at + 2 : at + 2 + len(body)] = body
        size = -(-(2 + len(body)) // 4) * 4
        self._writable[at : at + size] = bytes(size)
        self._end = at + size
        self.space[0x34] = at
        self.space[0x06] |= STATUS_CAPABILITIES
        return at

    def add_bar(self, bar: Bar) -> None:
        """A memory BAR, not mapped yet."""
        self.bars.append(bar)
        at = 0x10 + 4 * bar.number
        self._put(at, 4, 0xC if bar.wide else 0)
        self._allow(at, 8 if bar.wide else 4, (1 << (64 if bar.wide else 32)) - bar.size)

    def add_io_bar(self, number: int, size: int) -> None:
        """A BAR of ports, for sizing alone: no window leads to ports."""
        self._put(0x10 + 4 * number, 4, 1)
        self._allow(0x10 + 4 * number, 4, (1 << 32) - size)

    def read_config(self, offset: int, size: int) -> int:
        """Up to four bytes of configuration space; all ones behind its end."""
        if offset >= SPACE:
            return (1 << 8 * size) - 1
        return self._get(offset, min(size, SPACE - offset))

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write what of it can be written."""
        for at in range(offset, min(offset + size, SPACE)):
            byte, mask = value >> 8 * (at - offset) & 0xFF, self._writable[at]
            kept = self.space[at] & ~mask | byte & mask
            self.space[at] = kept & ~(byte & self._clearable[at])
        if offset < 0x28 and offset + size > 0x04:
            self._map()

    def _map(self) -> None:
        enabled = self.command & MEMORY
        for bar in self.bars:
            start = self._get(0x10 + 4 * bar.number, 8 if bar.wide else 4) & -bar.size
            window = WINDOW64 if bar.wide and start in WINDOW64 else WINDOW32
            inside = enabled and start in window and start + bar.size - 1 in window
            if self.bus is not None:
                self.bus.move(bar, start if inside else None)

    def reset(self) -> None:
        """What a power cycle of the machine does to the configuration space."""
        self._put(0x04, 2, self.command & ~(IO | MEMORY | MASTER | SERR | INTX_DISABLE))
        self.space[0x06] &= ~STATUS_INTERRUPT
        self.space[0x0C] = self.space[0x3C] = 0
        for at in range(0x10, 0x28):
            self.space[at] &= ~self._writable[at]
        self._map()


class HostBridge(PciFunction):
    """QEMU's generic PCI Express host bridge."""

    def __init__(self) -> None:
        super().__init__(0x1B36, 0x0008, 0x0600, (0x1AF4, 0x1100))


class Msix:
    """The MSI-X table and pending bits of a function: PCI 3.0, 6.8.2, QEMU's hw/pci/msix.c.

    ``send`` takes an address and data.
    """

    def __init__(self, vectors: int, send: Callable[[int, int], object]) -> None:
        self.vectors = vectors
        self.table_size = 16 * vectors
        self.pba_size = -(-vectors // 64) * 8
        self.pba_offset = max(2048, self.table_size)
        self.bar_size = 1 << (max(4096, self.pba_offset + self.pba_size) - 1).bit_length()
        self._send = send
        self.messages: list[tuple[int, int] | None] = []
        """Address and data of each vector that is not masked."""
        self.reset()

    def reset(self) -> None:
        """Every vector is masked, and none pends."""
        self.enabled = False
        self._closed = True  # the whole function is masked, or MSI-X is not enabled
        self._table = bytearray(self.table_size)
        self._pending = 0
        self._users = [0] * self.vectors
        self.messages = [None] * self.vectors
        for vector in range(self.vectors):
            self._table[16 * vector + 12] = MASKED

    def control(self, value: int) -> None:
        """The message control register now is ``value``."""
        self.enabled = bool(value & MSIX_ENABLE)
        closed = not self.enabled or bool(value & MSIX_MASKALL)
        if closed != self._closed:
            self._closed = closed
            for vector in range(self.vectors):
                self._update(vector)

    def _update(self, vector: int) -> None:
        """See whether a vector is masked, and if it is not, send what pends."""
        at = 16 * vector
        if self._closed or self._table[at + 12] & MASKED:
            self.messages[vector] = None
            return
        address = int.from_bytes(self._table[at : at + 8], "little")
        data = int.from_bytes(self._table[at + 8 : at + 12], "little")
        self.messages[vector] = address, data
        if self._pending >> vector & 1:
            self._pending &= ~(1 << vector)
            self._send(address, data)

    def use(self, vector: int) -> None:
        """Something has been mapped to a vector."""
        if vector < self.vectors:
            self._users[vector] += 1

    def unuse(self, vector: int) -> None:
        """It is no longer; what pends is forgotten with the last."""
        if vector < self.vectors and self._users[vector]:
            self._users[vector] -= 1
            if not self._users[vector]:
                self._pending &= ~(1 << vector)

    def unuse_all(self) -> None:
        """Nothing is mapped to anything any more."""
        self._users = [0] * self.vectors
        self._pending = 0

    def notify(self, vector: int) -> None:
        """Signal a vector, or have it pend."""
        if vector >= self.vectors:
            return
        message = self.messages[vector]
        if message is None:
            self._pending |= 1 << vector
        else:
            self._send(*message)

    def read_table(self, offset: int, size: int) -> int:
        """Four aligned bytes of the table; fewer cannot be read."""
        return int.from_bytes(self._table[offset : offset + 4], "little") if size == 4 else 0

    def write_table(self, offset: int, size: int, value: int) -> None:
        """The same, written."""
        if size == 4:
            self._table[offset : offset + 4] = (value & 0xFFFFFFFF).to_bytes(4, "little")
            self._update(offset // 16)

    def read_pba(self, offset: int, size: int) -> int:
        """Four aligned bytes of pending bits."""
        return self._pending >> 8 * offset & 0xFFFFFFFF if size == 4 else 0

    def write_pba(self, offset: int, size: int, value: int) -> None:
        """Without effect."""

    def regions(self) -> list[Region]:
        """Where they are in the BAR."""
        return [
            Region("msix-table", 0, self.table_size, self.read_table, self.write_table),
            Region("msix-pba", self.pba_offset, self.pba_size, self.read_pba, self.write_pba),
        ]


class PciBus:
    """All functions, by ECAM; and what of the machine's addresses their BARs answer."""

    PER_BUS = 32  # devices of a bus; the first of bus 0 is the host bridge

    def __init__(self) -> None:
        self.functions: dict[int, PciFunction] = {}
        """By bus << 8 | device << 3 | function."""
        self._pages: dict[int, list[Bar]] = {}
        self.add(HostBridge(), 0)

    def add(self, function: PciFunction, where: int) -> None:
        """Plug a function in; :class:`ValueError` if there is one already."""
        if where in self.functions:
            raise ValueError(f"PCI function {where:#x} is taken")
        self.functions[where] = function
        function.bus = self
        # A driver looks for functions 1 to 7 only if function 0 says that there are more.
        if where & 7 and (first := self.functions.get(where & ~7)):
            first.space[HEADER_TYPE] |= MULTIFUNCTION

    def remove(self, where: int) -> None:
        """Pull it out."""
        function = self.functions.pop(where)
        function.bus = None
        for bar in function.bars:
            self.move(bar, None)

    @classmethod
    def place(cls, number: int) -> int:
        """Where device ``number``, counted from 0, goes: functions 0 of bus 0 first.

        Then come functions 1 to 7 of the same slots, then the next bus.
        """
        bus, number = divmod(number, 8 * (cls.PER_BUS - 1))
        function, slot = divmod(number, cls.PER_BUS - 1)
        return bus << 8 | (slot + 1) << 3 | function

    def read(self, offset: int, size: int) -> int:
        """``offset`` in the ECAM; all ones where there is no function."""
        function = self.functions.get(offset >> 12)
        if function is None:
            return (1 << 8 * size) - 1
        return function.read_config(offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """The same for a write."""
        function = self.functions.get(offset >> 12)
        if function is not None:
            function.write_config(offset & 0xFFF, size, value)

    def move(self, bar: Bar, start: int | None) -> None:
        """Map a BAR at an address, or nowhere."""
        if start == bar.start:
            return
        if bar.start is not None:
            for page in range(bar.start >> 12, bar.start + bar.size >> 12):
                self._pages[page].remove(bar)
                if not self._pages[page]:
                    del self._pages[page]
        if start is not None:
            for page in range(start >> 12, start + bar.size >> 12):
                self._pages.setdefault(page, []).append(bar)
        bar.start = start

    def find(self, address: int) -> Bar | None:
        """The BAR that is mapped at a guest-physical address, ``bar.start`` on; None: none is.

        Of several the one that was there first.
        """
        bars = self._pages.get(address >> 12)
        return bars[0] if bars else None

    def regions(self) -> Iterator[tuple[PciFunction, str, int, int]]:
        """Of each mapped region its function, name, first address, and the one behind its last."""
        for function in self.functions.values():
            for bar in function.bars:
                if bar.start is not None:
                    for region in bar.regions:
                        start = bar.start + region.start
                        yield function, region.name, start, start + region.size

    def reset(self) -> None:
        """What a power cycle of the machine does."""
        for function in self.functions.values():
            function.reset()
