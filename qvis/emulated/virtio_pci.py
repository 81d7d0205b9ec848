# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio over PCI: virtio 1.3, 4.1, in the places where QEMU's hw/virtio/virtio-pci.c puts it.

The functions are transitional ones, as QEMU's are on a root bus: their IDs are those of the
legacy interface, and the ports for it can be sized, but no window leads there.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import pack
from typing import ClassVar

from .pci import MASTER, STATUS_INTERRUPT, Bar, Msix, PciFunction, Region
from .virtio import NO_VECTOR, QUEUES, Device, Feature, Status
from .virtqueue import Staged

__all__ = ["VirtioPci"]

# By virtio device ID: PCI device ID; class and subclass.
_IDENTITY = {1: (0x1000, 0x0200), 2: (0x1001, 0x0100), 3: (0x1003, 0x0780), 4: (0x1005, 0x00FF)}
_VECTORS = {3: 2}  # where it is not one for each queue and one for the configuration
_MSIX, _VENDOR = 0x11, 0x09  # capabilities
_COMMON, _NOTIFY, _ISR, _DEVICE, _ACCESS = 1, 2, 3, 4, 5  # their virtio types
_NOTIFY_STRIDE = 4

_Read = Callable[[int, int], int]
_Write = Callable[[int, int, int], None]


class VirtioPci(PciFunction):
    """A virtio device as a PCI function with MSI-X; ``msi`` takes an address and data."""

    def __init__(self, device: Device, msi: Callable[[int, int], object]) -> None:
        identity, code = _IDENTITY[device.ID]
        super().__init__(0x1AF4, identity, code, (0x1AF4, device.ID))
        self.device = device
        device.offered |= Feature.VERSION_1
        device.transport = self
        self._msi = msi
        self.space[0x3D] = 1  # pin A, though no line leads anywhere
        self._put_capabilities()
        self.msix = Msix(_VECTORS.get(device.ID, len(device.queues) + 1), self._send)
        self._msix_at = self.add_capability(
            _MSIX, pack("<HII", self.msix.vectors - 1, 1, self.msix.pba_offset | 1)
        )
        self._allow(self._msix_at + 3, 1, 0xC0)
        self.add_io_bar(0, 1 << (24 + len(device.config()) - 1).bit_length())
        self.add_bar(Bar(1, self.msix.bar_size, self.msix.regions(), wide=False))
        self._modern = Bar(4, 0x4000, self._modern_regions(), wide=True)
        self.add_bar(self._modern)
        self._feature_select = [0, 0]  # the device's, the driver's
        self._forget()

    def _put_capabilities(self) -> None:
        def capability(kind: int, bar: int, start: int, size: int, more: bytes = b"") -> int:
            body = pack("<BBB3xII", 16 + len(more), kind, bar, start, size) + more
            return self.add_capability(_VENDOR, body)

        capability(_COMMON, 4, 0x0000, 0x1000)
        capability(_ISR, 4, 0x1000, 0x1000)
        capability(_DEVICE, 4, 0x2000, 0x1000)
        capability(_NOTIFY, 4, 0x3000, 0x1000, pack("<I", _NOTIFY_STRIDE))
        self._access_at = capability(_ACCESS, 0, 0, 0, bytes(4))
        self._allow(self._access_at + 4, 1, 0xFF)
        self._allow(self._access_at + 8, 12, (1 << 96) - 1)

    def _modern_regions(self) -> list[Region]:
        device = self.device

        def region(kind: str, start: int, read: _Read, write: _Write) -> Region:
            return Region(f"virtio-pci-{kind}-{device.NAME}", start, 0x1000, read, write)

        return [
            region("common", 0x0000, self._read_common, self._write_common),
            region("isr", 0x1000, self._read_isr, lambda offset, size, value: None),
            region("device", 0x2000, device.read_config, device.write_config),
            region("notify", 0x3000, lambda offset, size: 0, self._notify),
        ]

    def _forget(self) -> None:
        self._queue = 0
        self._driver_features = [0, 0]
        self._rings: dict[int, Staged] = {}
        self._config_vector = NO_VECTOR
        self._queue_vectors = [NO_VECTOR] * QUEUES

    def _virtio_reset(self) -> None:
        self.device.reset()
        self.msix.unuse_all()
        self._forget()
        self._show_interrupt(False)

    def reset(self) -> None:
        self._virtio_reset()
        self._feature_select = [0, 0]
        self.msix.reset()
        self.space[self._msix_at + 3] &= 0x3F
        super().reset()

    # Interrupts.

    def _send(self, address: int, data: int) -> None:
        if not self.space[0x04] & MASTER:
            return
        if address >> 20 == 0xFEE:
            self._msi(address, data)
        else:
            self.device.store(address, data)

    def interrupt(self, queue: int) -> None:
        """Tell the driver that this queue has used buffers."""
        self.device.isr |= 1
        msix = self.msix
        if not msix.enabled:
            self._show_interrupt(True)
            return
        vector = self._queue_vectors[queue]
        if vector < msix.vectors:
            message = msix.messages[vector]
            if message is None:
                msix.notify(vector)
            elif message[0] >> 20 == 0xFEE:
                self._msi(*message)
            else:
                self.device.store(*message)

    def config_changed(self) -> None:
        """Tell the driver that the configuration has changed."""
        if self.msix.enabled:
            self.msix.notify(self._config_vector)
        else:
            self._show_interrupt(True)

    def _show_interrupt(self, level: bool) -> None:
        self.space[0x06] = self.space[0x06] & ~STATUS_INTERRUPT | STATUS_INTERRUPT * level

    # Configuration space.

    def read_config(self, offset: int, size: int) -> int:
        at = self._access_at
        if offset < at + 20 and offset + size > at + 16:
            start, length = self._get(at + 8, 4), self._get(at + 12, 4)
            if length in (1, 2, 4) and start < self._modern.size:
                value = self._modern.read(start & -length, length)
                self._put(at + 16, length, value)
        return super().read_config(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        super().write_config(offset, size, value)
        if offset <= 0x04 < offset + size:
            master = bool(self.space[0x04] & MASTER)
            self.device.set_disabled(not master)
            if not master:
                self.device.set_status(self.device.status & ~Status.DRIVER_OK)
        if offset <= self._msix_at + 3 < offset + size:
            self.msix.control(self._get(self._msix_at + 2, 2))
            if self.msix.enabled:
                self._show_interrupt(False)
        at = self._access_at
        if offset < at + 20 and offset + size > at + 16:
            start, length = self._get(at + 8, 4), self._get(at + 12, 4)
            if length in (1, 2, 4) and start < self._modern.size:
                self._modern.write(start & -length, length, self._get(at + 16, length))

    # What lies in BAR 4.

    def _notify(self, offset: int, size: int, value: int) -> None:
        self.device.notified(offset // _NOTIFY_STRIDE)

    def _read_isr(self, offset: int, size: int) -> int:
        value, self.device.isr = self.device.isr, 0
        self._show_interrupt(False)
        return value

    def _read_common(self, offset: int, size: int) -> int:
        register = self._READ.get(offset)
        return register(self) & (1 << 8 * size) - 1 if register is not None else 0

    def _write_common(self, offset: int, size: int, value: int) -> None:
        register = self._WRITE.get(offset)
        if register is not None:
            register(self, value & (1 << 8 * size) - 1)

    def _exists(self) -> bool:
        return self._queue < len(self.device.queues)

    def _staged(self) -> Staged:
        return self._rings.setdefault(self._queue, Staged())

    def _select_features(self, side: int, value: int) -> None:
        self._feature_select[side] = value

    def _read_offered(self) -> int:
        select = self._feature_select[0]
        return self.device.offered >> 32 * select & 0xFFFFFFFF if select < 2 else 0

    def _read_features(self) -> int:
        select = self._feature_select[1]
        return self._driver_features[select] if select < 2 else 0

    def _write_features(self, value: int) -> None:
        select = self._feature_select[1]
        if select < 2:
            self._driver_features[select] = value
            self.device.accept_features(self._driver_features[0] | self._driver_features[1] << 32)

    def _map_vector(self, old: int, value: int) -> int:
        """The vector that a mapping becomes."""
        vector = value & 0xFFFF if value < self.msix.vectors else NO_VECTOR
        self.msix.unuse(old)
        self.msix.use(vector)
        return vector

    def _write_config_vector(self, value: int) -> None:
        self._config_vector = self._map_vector(self._config_vector, value)

    def _write_queue_vector(self, value: int) -> None:
        old = self._queue_vectors[self._queue]
        self._queue_vectors[self._queue] = self._map_vector(old, value)

    def _write_status(self, value: int) -> None:
        if value & 0xFF:
            self.device.set_status(value & 0xFF)
        else:
            self._virtio_reset()

    def _select_queue(self, value: int) -> None:
        if value < QUEUES:
            self._queue = value

    def _read_size(self) -> int:
        return self.device.queues[self._queue].size if self._exists() else 0

    def _write_size(self, value: int) -> None:
        self._staged().size = value & 0xFFFF
        if self._exists():
            self.device.queues[self._queue].resize(value & 0xFFFF)

    def _read_enable(self) -> int:
        rings = self._rings.get(self._queue)
        return int(rings is not None and rings.ready)

    def _write_enable(self, value: int) -> None:
        if value != 1:
            self.device.error(f"wrong value for queue_enable: {value:#x}")
            return
        rings = self._staged()
        rings.ready = True
        if self._exists():
            rings.apply(self.device.queues[self._queue])

    def _write_reset(self, value: int) -> None:
        if value == 1:
            self._staged().ready = False
            if self._exists():
                self.device.queues[self._queue].reset()
            self._queue_vectors[self._queue] = NO_VECTOR

    def _read_part(self, part: int, shift: int) -> int:
        rings = self._rings.get(self._queue)
        return rings.parts[part] >> shift & 0xFFFFFFFF if rings is not None else 0

    _READ: ClassVar[dict[int, Callable[[VirtioPci], int]]] = {
        0x00: lambda self: self._feature_select[0],
        0x04: _read_offered,
        0x08: lambda self: self._feature_select[1],
        0x0C: _read_features,
        0x10: lambda self: self._config_vector,
        0x12: lambda self: len(self.device.queues),
        0x14: lambda self: self.device.status,
        0x15: lambda self: self.device.generation,
        0x16: lambda self: self._queue,
        0x18: _read_size,
        0x1A: lambda self: self._queue_vectors[self._queue],
        0x1C: _read_enable,
        0x1E: lambda self: self._queue,
        0x20: lambda self: self._read_part(0, 0),
        0x24: lambda self: self._read_part(0, 32),
        0x28: lambda self: self._read_part(1, 0),
        0x2C: lambda self: self._read_part(1, 32),
        0x30: lambda self: self._read_part(2, 0),
        0x34: lambda self: self._read_part(2, 32),
    }
    _WRITE: ClassVar[dict[int, Callable[[VirtioPci, int], None]]] = {
        0x00: lambda self, value: self._select_features(0, value),
        0x08: lambda self, value: self._select_features(1, value),
        0x0C: _write_features,
        0x10: _write_config_vector,
        0x14: _write_status,
        0x16: _select_queue,
        0x18: _write_size,
        0x1A: _write_queue_vector,
        0x1C: _write_enable,
        0x20: lambda self, value: self._staged().write(0, 0, value),
        0x24: lambda self, value: self._staged().write(0, 32, value),
        0x28: lambda self, value: self._staged().write(1, 0, value),
        0x2C: lambda self, value: self._staged().write(1, 32, value),
        0x30: lambda self, value: self._staged().write(2, 0, value),
        0x34: lambda self, value: self._staged().write(2, 32, value),
        0x3A: _write_reset,
    }
