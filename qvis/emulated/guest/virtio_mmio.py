# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio over MMIO: drivers/virtio/virtio_mmio.c with our series, access by access.

Registers: virtio 1.3, 4.2.2, and docs/virtio-interrupts.md, section 3.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .chips import MmioChip, VisChip
from .msi import MsiVectors, Storage
from .ring import Ring
from .virtio import Parent, QueueInfo, VirtioDevice

if TYPE_CHECKING:
    from ..machine import Attached
    from ..vcpu import Vcpu
    from .kernel import Kernel

__all__ = ["MmioParent"]

MAGIC, VERSION, DEVICE_ID, VENDOR_ID = 0x000, 0x004, 0x008, 0x00C
DEVICE_FEATURES, DEVICE_FEATURES_SEL = 0x010, 0x014
DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x020, 0x024
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY = 0x030, 0x034, 0x038, 0x044
QUEUE_NOTIFY, INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x050, 0x060, 0x064, 0x070
QUEUE_ADDRESSES = (0x080, 0x090, 0x0A0)
MSI_VECTOR_NUM, CONFIG_MSIX_VECTOR, QUEUE_MSIX_VECTOR = 0x0D0, 0x0D8, 0x0DC
GENERATION, CONFIG = 0x0FC, 0x100
MAGIC_VALUE = 0x74726976
NO_VECTOR = 0xFFFF
MOST_VECTORS = 2048
MSI_FEATURE, VIS_FEATURE = 1 << 49, 1 << 48
VRING, CONFIG_CHANGED = 1, 2
ALIGN = 4096


class MmioParent(Parent):
    """The platform device of one virtio-mmio slot, and its line ``gsi``."""

    bus = "platform"
    transport_driver = "virtio-mmio"

    def __init__(self, kernel: Kernel, attached: Attached, name: str) -> None:
        super().__init__(kernel, attached, name)
        self.base = attached.start
        self.line = kernel.gsi(attached.line)
        """Its interrupt line, used or not."""
        self._msi: MsiVectors | Storage | None = None
        self._pages: list[tuple[int, int]] = []
        self._features = 0

    def _read(self, vcpu: Vcpu, register: int) -> int:
        return vcpu.read(self.base + register, 4)

    def _write(self, vcpu: Vcpu, register: int, value: int) -> None:
        vcpu.write(self.base + register, 4, value)

    def identify(self, vcpu: Vcpu) -> VirtioDevice:
        if self._read(vcpu, MAGIC) != MAGIC_VALUE:
            raise OSError(errno.ENODEV, "No such device")
        if self._read(vcpu, VERSION) != 2:
            raise OSError(errno.ENXIO, "No such device or address")
        kind = self._read(vcpu, DEVICE_ID)
        if not kind:
            raise OSError(errno.ENODEV, "No such device")
        return VirtioDevice(self, kind, self._read(vcpu, VENDOR_ID))

    def shut_down(self, vcpu: Vcpu) -> None:
        """``virtio_mmio_shutdown()``: memory may be something else soon, so no storage in it."""
        if isinstance(self._msi, Storage):
            self.reset(vcpu)

    def get_status(self, vcpu: Vcpu) -> int:
        return self._read(vcpu, STATUS) & 0xFF

    def set_status(self, vcpu: Vcpu, status: int) -> None:
        self._write(vcpu, STATUS, status)

    def reset(self, vcpu: Vcpu) -> None:
        self._write(vcpu, STATUS, 0)
        if self._msi is not None:
            self._msi.forget()
            for desc in self.irqs:
                if isinstance(desc.hardware, MmioChip):
                    desc.hardware.masked = desc.hardware.stale = True

    def get_features(self, vcpu: Vcpu) -> int:
        self._write(vcpu, DEVICE_FEATURES_SEL, 1)
        high = self._read(vcpu, DEVICE_FEATURES)
        self._write(vcpu, DEVICE_FEATURES_SEL, 0)
        return high << 32 | self._read(vcpu, DEVICE_FEATURES)

    def accept(self, vcpu: Vcpu, features: int, offered: int) -> int:
        self._features = features = features | offered & (MSI_FEATURE | VIS_FEATURE)
        self._write(vcpu, DRIVER_FEATURES_SEL, 1)
        self._write(vcpu, DRIVER_FEATURES, features >> 32)
        self._write(vcpu, DRIVER_FEATURES_SEL, 0)
        self._write(vcpu, DRIVER_FEATURES, features & 0xFFFFFFFF)
        return features

    def config(self, vcpu: Vcpu, offset: int, size: int) -> int:
        return vcpu.read(self.base + CONFIG + offset, size)

    def generation(self, vcpu: Vcpu) -> int:
        return self._read(vcpu, GENERATION)

    # Queues

    def find_queues(
        self, vcpu: Vcpu, queues: Sequence[QueueInfo], affinities: Sequence[frozenset[int]] | None
    ) -> list[Ring]:
        if self._features & (MSI_FEATURE | VIS_FEATURE):
            most = self._read(vcpu, MSI_VECTOR_NUM)
            if 0 < most <= MOST_VECTORS:
                for feature in (VIS_FEATURE, MSI_FEATURE):
                    if not self._features & feature:
                        continue
                    for per_queue in (True, False):
                        try:
                            return self._with_messages(
                                vcpu, queues, affinities, most, feature == VIS_FEATURE, per_queue
                            )
                        except OSError:
                            continue
        return self._with_line(vcpu, queues)

    def _with_line(self, vcpu: Vcpu, queues: Sequence[QueueInfo]) -> list[Ring]:
        assert self.device is not None
        self.line.request(vcpu, self.device.name, self._interrupt)
        try:
            for index, info in enumerate(queues):
                self._setup(vcpu, index, info, NO_VECTOR)
        except OSError:
            self.delete_queues(vcpu)
            raise
        return list(self.rings)

    def _with_messages(
        self,
        vcpu: Vcpu,
        queues: Sequence[QueueInfo],
        affinities: Sequence[frozenset[int]] | None,
        most: int,
        vis: bool,
        per_queue: bool,
    ) -> list[Ring]:
        heard = [index for index, info in enumerate(queues) if info.callback is not None]
        count = 1 + (len(heard) if per_queue else 1)
        if count > most:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._allocate(vcpu, count, vis, affinities if per_queue else None)
        try:
            if not vis:
                self._write(vcpu, CONFIG_MSIX_VECTOR, 0)
            self._request(vcpu, 0, "config", self._config_changed)
            vector = 0
            for index, info in enumerate(queues):
                wanted = NO_VECTOR
                if info.callback is not None:
                    vector = wanted = vector + 1 if per_queue else 1
                ring = self._setup(vcpu, index, info, wanted)
                if per_queue and wanted != NO_VECTOR:
                    self._request(vcpu, wanted, info.name, ring.interrupt)
            if not per_queue:
                self._request(vcpu, 1, "virtqueues", self._all_queues)
        except OSError:
            self.delete_queues(vcpu)
            raise
        return list(self.rings)

    def _allocate(
        self, vcpu: Vcpu, count: int, vis: bool, affinities: Sequence[frozenset[int]] | None
    ) -> None:
        """``vm_msi_alloc()``."""
        kernel = self.kernel
        name = f"MMIO-{'VIS' if vis else 'MSI'}-{self.name}"
        if vis:
            size = Storage.size(count)
            address = kernel.pages.take(size)
            self._pages.append((address, size))
            storage = Storage(kernel.memory, self.base, address, count)
            self._msi = storage
            chips: list[VisChip] | list[MmioChip] = [
                VisChip(kernel, name, n, storage) for n in range(count)
            ]
        else:
            vectors = MsiVectors(self.base)
            self._msi = vectors
            chips = [MmioChip(kernel, name, n, vectors) for n in range(count)]
        wanted: list[frozenset[int] | None] = [None] * count
        if affinities is not None:
            wanted[1:] = affinities
        self.irqs = [
            kernel.irqs.create(chip, affinity or None)
            for chip, affinity in zip(chips, wanted, strict=True)
        ]
        if not self._msi.enable(vcpu):
            self._free_vectors()
            raise OSError(errno.ENODEV, "The device refuses interrupt storage")

    def _request(
        self, vcpu: Vcpu, vector: int, name: str, handler: Callable[[Vcpu, int], object]
    ) -> None:
        assert self.device is not None
        self.irqs[vector].request(vcpu, f"{self.device.name}-{name}", handler)

    def _setup(self, vcpu: Vcpu, index: int, info: QueueInfo, vector: int) -> Ring:
        """``vm_setup_vq()``."""
        write, base = vcpu.write, self.base
        self._write(vcpu, QUEUE_SEL, index)
        if self._read(vcpu, QUEUE_READY):
            raise OSError(errno.ENOENT, "No such file or directory")
        size = self._read(vcpu, QUEUE_NUM_MAX)
        if not size or size & (size - 1):
            raise OSError(errno.ENOENT, "No such file or directory")
        notify_at = base + QUEUE_NOTIFY

        def notify(vcpu: Vcpu) -> None:
            vcpu.write(notify_at, 4, index)

        kernel = self.kernel
        ring = Ring(
            kernel.pages, kernel.memory, index, info.name, size, ALIGN, self._features,
            info.callback, notify,
        )  # fmt: skip
        self._map(vcpu, index, vector)
        write(base + QUEUE_NUM, 4, size)
        for register, address in zip(QUEUE_ADDRESSES, ring.addresses, strict=True):
            write(base + register, 4, address & 0xFFFFFFFF)
            write(base + register + 4, 4, address >> 32)
        write(base + QUEUE_READY, 4, 1)
        self.rings.append(ring)
        return ring

    def _map(self, vcpu: Vcpu, index: int, vector: int) -> None:
        """``vm_msi_map_vq()``: write only what differs from what the queue has."""
        if self._msi is None:
            return
        known, mapped = True, NO_VECTOR
        if not isinstance(self._msi, Storage):
            known = not self._features & VIS_FEATURE
        elif index + 1 < len(self.irqs):
            mapped = index + 1
        if not known or vector != mapped:
            self._write(vcpu, QUEUE_MSIX_VECTOR, vector)

    def delete_queues(self, vcpu: Vcpu) -> None:
        """``vm_del_vqs()``."""
        if self._msi is not None:
            self._msi.disable(vcpu)
            for desc in self.irqs:
                for name in list(desc.actions):
                    desc.free(vcpu, name)
        for ring in self.rings:
            self._write(vcpu, QUEUE_SEL, ring.index)
            if isinstance(self._msi, MsiVectors):
                self._write(vcpu, QUEUE_MSIX_VECTOR, NO_VECTOR)
            self._write(vcpu, QUEUE_READY, 0)
            self._read(vcpu, QUEUE_READY)
            ring.delete()
        self.rings.clear()
        if self._msi is not None:
            self._free_vectors()
        else:
            assert self.device is not None
            self.line.free(vcpu, self.device.name)

    def _free_vectors(self) -> None:
        for desc in self.irqs:
            self.kernel.irqs.remove(desc)
        self.irqs = []
        self._msi = None
        for address, size in self._pages:
            self.kernel.pages.give(address, size)
        self._pages.clear()

    def set_queue_affinity(self, vcpu: Vcpu, ring: Ring, cpus: frozenset[int]) -> None:
        for desc in self.irqs:
            if desc.handlers and desc.handlers[0] == ring.interrupt:
                desc.set_affinity(vcpu, cpus)

    # Interrupts

    def _interrupt(self, vcpu: Vcpu, irq: int) -> None:
        """``vm_interrupt()``."""
        vcpu.enter("vm_interrupt", irq)
        base = self.base
        status = vcpu.read(base + INTERRUPT_STATUS, 4)
        vcpu.write(base + INTERRUPT_ACK, 4, status)
        if status & CONFIG_CHANGED and self.device is not None:
            self.device.config_changed(vcpu)
        if status & VRING:
            for ring in reversed(self.rings):
                ring.interrupt(vcpu, irq)

    def _config_changed(self, vcpu: Vcpu, irq: int) -> None:
        """``vm_msi_config_changed()``."""
        vcpu.enter("vm_msi_config_changed", irq)
        if self.device is not None:
            self.device.config_changed(vcpu)

    def _all_queues(self, vcpu: Vcpu, irq: int) -> None:
        """``vm_msi_vring_interrupt()``."""
        vcpu.enter("vm_msi_vring_interrupt", irq)
        for ring in self.rings:
            ring.interrupt(vcpu, irq)
