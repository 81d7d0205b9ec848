# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's RAM."""

from __future__ import annotations

import mmap

__all__ = ["Memory"]


class Memory:
    """``size`` bytes from guest-physical address 0; pages that nobody touched cost nothing.

    The views are for naturally aligned accesses, by address divided by the width: with
    ``m.u64[a >> 3]`` eight bytes are read in one go. They raise IndexError past the end;
    whoever follows an address that a guest gave asks :meth:`contains` first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        # Private, or giving pages back would not make them zeros (madvise(2)).
        self._pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.u8 = memoryview(self._pages)
        self.u16 = self.u8.cast("H")
        self.u32 = self.u8.cast("I")
        self.u64 = self.u8.cast("Q")

    def contains(self, address: int, length: int) -> bool:
        """Whether all of [address, address + length) is RAM; an empty range is nowhere."""
        return length > 0 and address >= 0 and address + length <= self.size

    def read(self, address: int, length: int) -> bytes:
        """A copy of those bytes."""
        return bytes(self.u8[address : address + length])

    def write(self, address: int, data: bytes) -> None:
        """Put ``data`` there."""
        self.u8[address : address + len(data)] = data

    def clear(self) -> None:
        """Make it as it was when the machine was switched on."""
        self._pages.madvise(mmap.MADV_DONTNEED)
