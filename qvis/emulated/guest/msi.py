# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver's side of virtio-mmio's MSI registers and of VIS's storage.

As drivers/virtio/virtio_mmio.c of our series does it; docs/virtio-interrupts.md, sections
4 (MSI) and 5 (VIS), says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..memory import Memory
    from ..vcpu import Vcpu

__all__ = ["MsiVectors", "Storage"]

VIS_UPDATE = 0x0C4
MSI_CONTROL = 0x0D4
MSI_ADDR_LOW = 0x0E0
MSI_ADDR_HIGH = 0x0E4
MSI_DATA = 0x0E8
MSI_VECTOR = 0x0EC
VIS_STORAGE_LOW = 0x0F0
VIS_STORAGE_HIGH = 0x0F4
VIS_CONTROL = 0x0F8
SET_MESSAGE = 1 << 16
MASK = 1 << 17
UNMASK = 1 << 18
ENABLE = 1
VIS_ENABLE = 1 << 16
CACHED_ENTRY = 1
CACHED_MASK = 2


class MsiVectors:
    """A device's MSI registers; what they hold is not written again."""

    def __init__(self, base: int) -> None:
        self._base = base
        self._staged: tuple[int, int] | None = None

    def enable(self, vcpu: Vcpu) -> bool:
        """Messages take the place of the line."""
        vcpu.write(self._base + MSI_CONTROL, 4, ENABLE)
        return True

    def disable(self, vcpu: Vcpu) -> None:
        """And back."""
        vcpu.write(self._base + MSI_CONTROL, 4, 0)

    def forget(self) -> None:
        """The device was reset."""
        self._staged = None

    def mask(self, vcpu: Vcpu, vector: int) -> None:
        """One access."""
        vcpu.write(self._base + MSI_VECTOR, 4, vector | MASK)

    def unmask(self, vcpu: Vcpu, vector: int, message: tuple[int, int] | None) -> None:
        """One access, or with another ``message`` (address, data) what that takes too."""
        self._command(vcpu, vector | UNMASK, message)

    def set_message(self, vcpu: Vcpu, vector: int, message: tuple[int, int] | None) -> None:
        """Likewise for a vector that stays unmasked."""
        self._command(vcpu, vector, message)

    def _command(self, vcpu: Vcpu, command: int, message: tuple[int, int] | None) -> None:
        base = self._base
        if message is not None:
            staged, self._staged = self._staged, message
            address, data = message
            if staged is None or staged[0] != address:
                vcpu.write(base + MSI_ADDR_LOW, 4, address)
            if staged is None:
                vcpu.write(base + MSI_ADDR_HIGH, 4, 0)
            if staged is None or staged[1] != data:
                vcpu.write(base + MSI_DATA, 4, data)
            command |= SET_MESSAGE
        vcpu.write(base + MSI_VECTOR, 4, command)


class Storage:
    """A device's interrupt storage, at guest-physical ``address``, for ``count`` vectors."""

    def __init__(self, memory: Memory, base: int, address: int, count: int) -> None:
        self._base = base
        self._memory = memory
        self.address = address
        self.count = count
        self._stale = [False] * count
        self._enabled = False
        self.mask_at = address
        area = (count + 127) // 128 * 128
        self.pending_at = address + area
        self.cached_at = address + 2 * area
        self.entries_at = address + 3 * area
        memory.u8[address : address + self.size(count)] = bytes(self.size(count))
        memory.u8[address : address + count] = b"\1" * count

    @staticmethod
    def size(count: int) -> int:
        """Bytes that it takes."""
        return (count + 127) // 128 * 384 + 8 * count

    def enable(self, vcpu: Vcpu) -> bool:
        """Hand it over; whether the device takes it."""
        control = self.count | VIS_ENABLE
        vcpu.write(self._base + VIS_STORAGE_LOW, 4, self.address & 0xFFFFFFFF)
        vcpu.write(self._base + VIS_STORAGE_HIGH, 4, self.address >> 32)
        vcpu.write(self._base + VIS_CONTROL, 4, control)
        self._enabled = vcpu.read(self._base + VIS_CONTROL, 4) == control
        if not self._enabled:
            vcpu.write(self._base + VIS_CONTROL, 4, 0)
        return self._enabled

    def disable(self, vcpu: Vcpu) -> None:
        """Take it back."""
        vcpu.write(self._base + VIS_CONTROL, 4, 0)
        self.forget()

    def forget(self) -> None:
        """The device does not use it any more, and has no copies."""
        self._enabled = False
        self._memory.u8[self.cached_at : self.cached_at + self.count] = bytes(self.count)

    def mask(self, vcpu: Vcpu, vector: int) -> None:
        """Steps M1 to M3."""
        vcpu.write(self.mask_at + vector, 1, 1)
        self._update(vcpu, vector, CACHED_MASK)

    def unmask(self, vcpu: Vcpu, vector: int) -> bool:
        """Steps U0 to U4; whether one was pending, which the driver now has to deliver."""
        if self._stale[vector]:
            return False
        vcpu.write(self.mask_at + vector, 1, 0)
        self._update(vcpu, vector, CACHED_MASK)
        pending = self.pending_at + vector
        if not vcpu.read(pending, 1) & 1:
            return False
        vcpu.write(pending, 1, 0)
        return True

    def set_entry(self, vcpu: Vcpu, vector: int, address: int, data: int) -> None:
        """Steps R1 to R4."""
        vcpu.write(self.entries_at + 8 * vector, 8, data << 32 | address)
        self._update(vcpu, vector, CACHED_ENTRY)

    def shut_down(self, vcpu: Vcpu, vector: int) -> None:
        """The entry stays; the device must have done with it."""
        if self._enabled:
            vcpu.write(self._base + VIS_UPDATE, 4, vector)

    def _update(self, vcpu: Vcpu, vector: int, what: int) -> None:
        if vcpu.read(self.cached_at + vector, 1) & what:
            vcpu.write(self._base + VIS_UPDATE, 4, vector)
