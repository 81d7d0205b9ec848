# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupt storage, the device's side: docs/virtio-interrupts.md, section 5."""

from __future__ import annotations

from collections.abc import Callable

from .memory import Memory

__all__ = ["ALIGN", "ENTRY", "Storage", "usable"]

ALIGN = 128  # of the storage, and of each area in it
ENTRY = 1  # of a cached byte: the device keeps a copy of the entry


def _area(vectors: int) -> int:
    return -(-vectors // ALIGN) * ALIGN


def usable(memory: Memory, address: int, vectors: int) -> bool:
    """Whether storage for so many vectors can be at ``address`` (VIS-DEV-2)."""
    return not address % ALIGN and memory.contains(address, 3 * _area(vectors) + 8 * vectors)


class Storage:
    """The vectors of a device which has VIS enabled.

    Nothing happens in the guest while a vector fires, so F1 to F11 are one step: nobody can
    have changed a mask or an entry in between, F4 and F11 would find what F1 and F8 found, and
    copies for one fire would be announced and taken back unseen. The mask and the entry are
    read live, once. RAM does not go away either (RST-DEV-2).

    With ``keep_entries`` a vector's entry is copied when it first fires, and the copy stays
    until VIS is disabled, as on a host whose interrupt controller has a table of routes.
    """

    __slots__ = (
        "_cached",
        "_copies",
        "_entries",
        "_high",
        "_mask",
        "_msi",
        "_pending",
        "_store",
        "address",
        "vectors",
    )

    def __init__(
        self,
        memory: Memory,
        address: int,
        vectors: int,
        high: int,
        *,
        msi: Callable[[int, int], object],
        store: Callable[[int, int], None],
        keep_entries: bool,
    ) -> None:
        """``high`` is bits 63:32 of message addresses; ``store`` takes those that are no MSI."""
        self.address = address
        self.vectors = vectors
        area, data = _area(vectors), memory.u8
        self._mask = data[address : address + vectors]
        self._pending = data[address + area : address + area + vectors]
        self._cached = data[address + 2 * area : address + 2 * area + vectors]
        entries = address + 3 * area
        self._entries = data[entries : entries + 8 * vectors].cast("Q")
        self._high = high << 32
        self._msi = msi
        self._store = store
        self._copies: list[int | None] | None = [None] * vectors if keep_entries else None

    def fire(self, vector: int) -> None:
        """Signal a vector, or have it pend: F0 to F11."""
        if vector >= self.vectors:
            return
        copies = self._copies
        if copies is not None:
            self._keep(vector)
        if self._mask[vector] & 1:
            self._pending[vector] = 1
            return
        entry = self._entries[vector] if copies is None else copies[vector] or 0
        address = self._high | (entry & 0xFFFFFFFF)
        if address >> 20 == 0xFEE:
            msi = self._msi
            msi(address, entry >> 32)
        else:
            self._store(address, entry >> 32)

    def _keep(self, vector: int) -> None:
        """Announce a copy, and take it: C1 to C3."""
        if self._copies is not None and self._copies[vector] is None:
            self._cached[vector] = ENTRY
            self._copies[vector] = self._entries[vector]

    def update(self, vector: int) -> None:
        """The doorbell: C4. It is a fence in any case, as no fire is ever under way."""
        if vector >= self.vectors:
            return
        if self._copies is not None and self._copies[vector] is not None:
            self._copies[vector] = self._entries[vector]
        else:
            self._cached[vector] = 0  # another host may have had a copy (RST-DEV-7)
