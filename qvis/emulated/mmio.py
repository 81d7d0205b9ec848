# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio over MMIO, version 2, with vectors: virtio 1.3, 4.2, and docs/virtio-interrupts.md.

Where those leave a choice, registers answer as QEMU's hw/virtio/virtio-mmio.c does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from .memory import Memory
from .virtio import NO_VECTOR, QUEUES, Device, Feature, Status
from .virtqueue import MAX_SIZE, Staged
from .vis import Storage, usable

__all__ = ["EmptySlot", "MmioTransport"]

MAGIC, VERSION, VENDOR = 0x74726976, 2, 0x554D4551
CONFIG = 0x100  # where the configuration space begins
ENABLE_VIS = 1 << 16
SET_MSG, MASK, UNMASK, PENDING = 1 << 16, 1 << 17, 1 << 18, 1 << 19


class EmptySlot:
    """A transport into which nothing is plugged; a driver sees that from its device ID."""

    def read(self, offset: int, size: int) -> int:
        """Zero everywhere but in the registers that say what kind of thing it is."""
        return {0x000: MAGIC, 0x004: VERSION, 0x00C: VENDOR}.get(offset, 0) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Without effect."""


class MmioTransport:
    """The registers of one device, and how its interrupts leave it.

    ``line`` takes the level of the interrupt line, ``msi`` an address and data; ``vectors`` is
    how many there are in registers or in storage, if at all. ``cache_entries`` has the device
    keep copies of entries, as QEMU's property vis-cache-entries.
    """

    def __init__(
        self,
        device: Device,
        memory: Memory,
        line: Callable[[bool], None],
        msi: Callable[[int, int], object],
        *,
        vectors: int = 0,
        msi_feature: bool = False,
        vis: bool = False,
        cache_entries: bool = False,
    ) -> None:
        self.device = device
        self.storage: Storage | None = None
        """VIS is enabled, with this storage."""
        self.msi_enabled = False
        self._memory = memory
        self._line = line
        self._msi = msi
        self._count = vectors
        self._cache_entries = cache_entries
        device.offered |= Feature.VERSION_1
        if vectors and msi_feature:
            device.offered |= Feature.MMIO_MSI
        if vectors and vis:
            device.offered |= Feature.VIS
        device.transport = self
        self.interrupt: Callable[[int], None] = self._interrupt_line
        """Signal a queue, in the way that is in force."""
        self._power_on()

    def _power_on(self) -> None:
        self._feature_select = [0, 0]  # the device's, the driver's
        self._driver_features = [0, 0]
        self._queue = 0
        self._rings: dict[int, Staged] = {}
        self._forget_mappings()
        self._forget_vectors()

    def _forget_mappings(self) -> None:
        self._config_vector = NO_VECTOR
        self._queue_vectors = [NO_VECTOR] * QUEUES
        self._address = self._data = self._selected = 0  # staged; the vector last written
        self._storage_address = 0

    def _forget_vectors(self) -> None:
        self._messages = [(0, 0)] * self._count
        self._masked = bytearray(b"\1") * self._count
        self._pending = bytearray(self._count)

    def reset(self) -> None:
        """What a power cycle of the machine does."""
        self._soft_reset()
        self._power_on()

    def _soft_reset(self) -> None:
        """A driver's write of 0 to the status. What it has staged about queues stays."""
        self._queue = 0
        self.device.reset()
        self._reset_vectors()
        self._line(False)
        for rings in self._rings.values():
            rings.ready = False

    def _reset_vectors(self) -> None:
        self._set_delivery(msi=False, storage=None)
        self._forget_mappings()
        self._forget_vectors()

    # Interrupts.

    def _set_delivery(self, *, msi: bool, storage: Storage | None) -> None:
        """Signal by the line, by messages in registers, or by those in storage, from now on."""
        if msi == self.msi_enabled and storage is self.storage:
            return
        if storage is not self.storage:
            self._forget_vectors()  # VIS-DEV-8
        self.msi_enabled, self.storage = msi, storage
        if msi:
            self.interrupt = self._interrupt_msi
        elif storage is not None:
            self.interrupt = self._interrupt_vis
        else:
            self.interrupt = self._interrupt_line
        self.device.isr = 0
        self._line(False)

    def _interrupt_line(self, queue: int) -> None:
        self.device.isr |= 1
        self._line(True)

    def _interrupt_msi(self, queue: int) -> None:
        self._signal(self._queue_vectors[queue])

    def _interrupt_vis(self, queue: int) -> None:
        if self.storage is not None:
            self.storage.fire(self._queue_vectors[queue])

    def config_changed(self) -> None:
        """Signal a change of the configuration."""
        if self.storage is not None:
            self.storage.fire(self._config_vector)
        elif self.msi_enabled:
            self._signal(self._config_vector)
        else:
            self._line(True)

    def _signal(self, vector: int) -> None:
        """A vector in registers: send its message, or have it pend."""
        if vector >= self._count:
            return
        if self._masked[vector]:
            self._pending[vector] = 1
            return
        address, data = self._messages[vector]
        if address >> 20 == 0xFEE:
            self._msi(address, data)
        else:
            self.device.store(address, data)

    # Registers.

    def read(self, offset: int, size: int) -> int:
        """What a driver reads at ``offset``; an aligned access of 1, 2 or 4 bytes.

        Zero where there is no register, and from a register if it is not read as four bytes.
        """
        if offset >= CONFIG:
            return self.device.read_config(offset - CONFIG, size)
        register = self._READ.get(offset)
        return register(self) if register is not None and size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The same for a write; without effect where there is nothing to write."""
        if offset == 0x050 and size == 4:
            self.device.notified(value & 0xFFFF)
        elif offset >= CONFIG:
            self.device.write_config(offset - CONFIG, size, value)
        elif size == 4:
            register = self._WRITE.get(offset)
            if register is not None:
                register(self, value & 0xFFFFFFFF)

    def _exists(self) -> bool:
        return self._queue < len(self.device.queues)

    def _staged(self) -> Staged:
        return self._rings.setdefault(self._queue, Staged())

    def _read_features(self) -> int:
        return self.device.offered >> 32 * self._feature_select[0] & 0xFFFFFFFF

    def _select_features(self, side: int, value: int) -> None:
        self._feature_select[side] = 1 if value else 0

    def _write_features(self, value: int) -> None:
        self._driver_features[self._feature_select[1]] = value

    def _select_queue(self, value: int) -> None:
        if value < QUEUES:
            self._queue = value

    def _write_size(self, value: int) -> None:
        self._staged().size = value & 0xFFFF
        if self._exists():
            self.device.queues[self._queue].resize(value)

    def _read_ready(self) -> int:
        rings = self._rings.get(self._queue)
        return int(rings is not None and rings.ready)

    def _write_ready(self, value: int) -> None:
        rings = self._staged()
        rings.ready = bool(value)
        if value and self._exists():
            rings.apply(self.device.queues[self._queue])

    def _acknowledge(self, value: int) -> None:
        self.device.isr &= ~value
        # A device that is broken leaves its line as it is, in QEMU.
        if not self._vectored and not self.device.stopped:
            self._line(self.device.isr != 0)

    def _write_status(self, value: int) -> None:
        device, value = self.device, value & 0xFF
        if value & Status.FEATURES_OK:
            before = device.accepted
            device.accept_features(self._driver_features[0] | self._driver_features[1] << 32)
            if (before ^ device.accepted) & (Feature.MMIO_MSI | Feature.VIS):
                self._reset_vectors()
        if value:
            device.set_status(value)
        else:
            self._soft_reset()

    @property
    def _vectored(self) -> bool:
        return self.msi_enabled or self.storage is not None

    # Registers of vectors. They do not exist before a driver has accepted the features.

    @property
    def _has_msi(self) -> bool:
        return bool(self.device.accepted & Feature.MMIO_MSI)

    @property
    def _has_vis(self) -> bool:
        return bool(self.device.accepted & Feature.VIS)

    @property
    def _has_vectors(self) -> bool:
        return bool(self.device.accepted & (Feature.MMIO_MSI | Feature.VIS))

    def _checked(self, value: int) -> int:
        """The vector that a mapping becomes (REG-DEV-3)."""
        limit = self._count if self.storage is None else self.storage.vectors
        return value if value < limit else NO_VECTOR

    def _write_config_vector(self, value: int) -> None:
        if self._has_vectors:
            self._config_vector = self._checked(value)

    def _write_queue_vector(self, value: int) -> None:
        if self._has_vectors:
            self._queue_vectors[self._queue] = self._checked(value)

    def _write_msi_control(self, value: int) -> None:
        if self._has_msi and self.storage is None:
            self._set_delivery(msi=bool(value & 1), storage=None)

    def _stage_low(self, value: int) -> None:
        if self._has_msi:
            self._address = self._address & ~0xFFFFFFFF | value

    def _stage_high(self, value: int) -> None:
        if self._has_vectors:
            self._address = self._address & 0xFFFFFFFF | value << 32

    def _stage_data(self, value: int) -> None:
        if self._has_msi:
            self._data = value

    def _read_vector(self) -> int:
        vector = self._selected
        if not self._has_msi or self.storage is not None:
            return 0
        return vector | MASK * self._masked[vector] | PENDING * self._pending[vector]

    def _write_vector(self, value: int) -> None:
        vector, mask, unmask = value & 0xFFFF, value & MASK, value & UNMASK
        if not self._has_msi or self.storage is not None or vector >= self._count:
            return
        if value >> 19 or (mask and unmask):
            return
        self._selected = vector
        if value & SET_MSG:
            self._messages[vector] = self._address, self._data
        if mask:
            self._masked[vector] = 1
        elif unmask:
            self._masked[vector] = 0
            if self._pending[vector]:
                self._pending[vector] = 0
                self._signal(vector)

    def _stage_storage(self, shift: int, value: int) -> None:
        if self._has_vis:
            kept = self._storage_address & 0xFFFFFFFF << (32 - shift)
            self._storage_address = kept | value << shift

    def _read_vis_control(self) -> int:
        return 0 if self.storage is None else ENABLE_VIS | self.storage.vectors

    def _write_vis_control(self, value: int) -> None:
        if not self._has_vis or value >> 17:
            return
        if not value & ENABLE_VIS:
            if self.storage is not None:
                self._set_delivery(msi=False, storage=None)
            return
        vectors = value & 0xFFFF
        if self.msi_enabled or self.storage is not None or not 1 <= vectors <= self._count:
            return
        if not usable(self._memory, self._storage_address, vectors):
            return
        storage = Storage(
            self._memory,
            self._storage_address,
            vectors,
            self._address >> 32,
            msi=self._msi,
            store=self.device.store,
            keep_entries=self._cache_entries,
        )
        self._set_delivery(msi=False, storage=storage)
        self._config_vector = 0
        self._queue_vectors = [n + 1 if n + 1 < vectors else NO_VECTOR for n in range(QUEUES)]

    def _doorbell(self, value: int) -> None:
        if self.storage is not None:
            self.storage.update(value)

    _READ: ClassVar[dict[int, Callable[[MmioTransport], int]]] = {
        0x000: lambda self: MAGIC,
        0x004: lambda self: VERSION,
        0x008: lambda self: self.device.ID,
        0x00C: lambda self: VENDOR,
        0x010: _read_features,
        0x034: lambda self: MAX_SIZE if self._exists() else 0,
        0x044: _read_ready,
        0x060: lambda self: 0 if self._vectored else self.device.isr,
        0x070: lambda self: self.device.status,
        0x0B0: lambda self: 0xFFFFFFFF,  # there is no shared memory
        0x0B4: lambda self: 0xFFFFFFFF,
        0x0D0: lambda self: self._count if self._has_vectors else 0,
        0x0D4: lambda self: int(self.msi_enabled),
        0x0D8: lambda self: self._config_vector if self._has_vectors else 0,
        0x0DC: lambda self: self._queue_vectors[self._queue] if self._has_vectors else 0,
        0x0EC: _read_vector,
        0x0F8: _read_vis_control,
        0x0FC: lambda self: self.device.generation,
    }
    _WRITE: ClassVar[dict[int, Callable[[MmioTransport, int], None]]] = {
        0x014: lambda self, value: self._select_features(0, value),
        0x020: _write_features,
        0x024: lambda self, value: self._select_features(1, value),
        0x030: _select_queue,
        0x038: _write_size,
        0x044: _write_ready,
        0x064: _acknowledge,
        0x070: _write_status,
        0x080: lambda self, value: self._staged().write(0, 0, value),
        0x084: lambda self, value: self._staged().write(0, 32, value),
        0x090: lambda self, value: self._staged().write(1, 0, value),
        0x094: lambda self, value: self._staged().write(1, 32, value),
        0x0A0: lambda self, value: self._staged().write(2, 0, value),
        0x0A4: lambda self, value: self._staged().write(2, 32, value),
        0x0C4: _doorbell,
        0x0D4: _write_msi_control,
        0x0D8: _write_config_vector,
        0x0DC: _write_queue_vector,
        0x0E0: _stage_low,
        0x0E4: _stage_high,
        0x0E8: _stage_data,
        0x0EC: _write_vector,
        0x0F0: lambda self, value: self._stage_storage(0, value),
        0x0F4: lambda self, value: self._stage_storage(32, value),
        0x0F8: _write_vis_control,
    }
