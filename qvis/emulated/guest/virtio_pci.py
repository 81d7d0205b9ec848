# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio over PCI: drivers/virtio/virtio_pci_{common,modern,modern_dev}.c, access by access.

Registers: virtio 1.3, 4.1.4; MSI-X: PCI 3.0, 6.8.2, and drivers/pci/msi.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .chips import MsixChip
from .probe_pci import COMMAND, INTX_DISABLE, PIN, VENDOR, Function
from .ring import Ring
from .virtio import Parent, QueueInfo, VirtioDevice

if TYPE_CHECKING:
    from ..machine import Attached
    from ..vcpu import Vcpu
    from .irq import IrqDesc
    from .kernel import Kernel

__all__ = ["PciParent"]

COMMON, NOTIFY, ISR, DEVICE = 1, 2, 3, 4
MEMORY, MASTER = 2, 4
LATENCY = 0x0D
MSIX_ENABLE, MSIX_MASK_ALL = 0x8000, 0x4000
DEVICE_FEATURE_SELECT, DEVICE_FEATURE = 0x00, 0x04
DRIVER_FEATURE_SELECT, DRIVER_FEATURE = 0x08, 0x0C
CONFIG_VECTOR, NUM_QUEUES, DEVICE_STATUS, GENERATION = 0x10, 0x12, 0x14, 0x15
QUEUE_SELECT, QUEUE_SIZE, QUEUE_VECTOR, QUEUE_ENABLE = 0x16, 0x18, 0x1A, 0x1C
QUEUE_NOTIFY_OFF, QUEUE_ADDRESSES = 0x1E, (0x20, 0x28, 0x30)
NO_VECTOR = 0xFFFF
RING_RESET = 1 << 40
ALIGN = 64
STATUS_READS = 10


class PciParent(Parent):
    """A virtio function of a PCI bus."""

    bus = "pci"
    transport_driver = "virtio-pci"

    def __init__(self, kernel: Kernel, attached: Attached, function: Function) -> None:
        super().__init__(kernel, attached, function.name)
        self.function = function
        self.line: IrqDesc | None = None
        """Of INTx, which is given a number and not used."""
        self._common = self._isr = self._notify = self._config = 0
        self._multiplier = 0
        self._features = 0
        self._msix = 0
        self._enabled = False

    # The transport's driver

    def identify(self, vcpu: Vcpu) -> VirtioDevice:
        """``virtio_pci_probe()`` and ``vp_modern_probe()``, up to the reset."""
        function, kernel = self.function, self.kernel
        read, write = function.read, function.write
        command = read(vcpu, COMMAND, 2)
        if not command & MEMORY:
            write(vcpu, COMMAND, 2, command | MEMORY)
        if read(vcpu, PIN, 1) and self.line is None:
            self.line = kernel.intx(function.where)
        read(vcpu, COMMAND, 2)
        common = self._capability(vcpu, COMMON)
        isr = self._capability(vcpu, ISR)
        notify = self._capability(vcpu, NOTIFY)
        if not (common and isr and notify):
            raise OSError(errno.ENODEV, "No such device")
        config = self._capability(vcpu, DEVICE)
        self._common = self._map(vcpu, common)
        self._isr = self._map(vcpu, isr)
        self._multiplier = read(vcpu, notify + 16, 4)
        read(vcpu, notify + 12, 4)
        read(vcpu, notify + 8, 4)
        self._notify = self._map(vcpu, notify)
        self._config = self._map(vcpu, config) if config else 0
        command = read(vcpu, COMMAND, 2)
        if not command & MASTER:
            write(vcpu, COMMAND, 2, command | MASTER)
        # pcibios_set_master(): once, since it stays what it is then.
        latency = read(vcpu, LATENCY, 1)
        if latency < 16:
            write(vcpu, LATENCY, 1, 64)
        return VirtioDevice(self, function.device, function.vendor)

    def unbind(self, vcpu: Vcpu) -> None:
        self.function.read(vcpu, 0, 4)  # whether it is still there, pci_device_is_present()
        super().unbind(vcpu)

    def _capability(self, vcpu: Vcpu, wanted: int) -> int:
        function = self.function
        at = function.find(vcpu, VENDOR)
        while at:
            kind = function.read(vcpu, at + 3, 1)
            bar = function.read(vcpu, at + 4, 1)
            if kind == wanted and bar in function.bars:
                return at
            at = function.find_next(vcpu, at, VENDOR)
        return 0

    def _map(self, vcpu: Vcpu, at: int) -> int:
        function = self.function
        bar = function.read(vcpu, at + 4, 1)
        offset = function.read(vcpu, at + 8, 4)
        function.read(vcpu, at + 12, 4)
        if bar not in function.bars:
            raise OSError(errno.EINVAL, "Invalid argument")
        return function.bars[bar] + offset

    def release(self, vcpu: Vcpu) -> None:
        """``pci_disable_device()``."""
        command = self.function.read(vcpu, COMMAND, 2)
        if command & MASTER:
            self.function.write(vcpu, COMMAND, 2, command & ~MASTER)

    # Registers

    def get_status(self, vcpu: Vcpu) -> int:
        return vcpu.read(self._common + DEVICE_STATUS, 1)

    def set_status(self, vcpu: Vcpu, status: int) -> None:
        vcpu.write(self._common + DEVICE_STATUS, 1, status)

    def reset(self, vcpu: Vcpu) -> None:
        self.set_status(vcpu, 0)
        for _ in range(STATUS_READS):  # Linux waits as long as it takes
            if not self.get_status(vcpu):
                break

    def get_features(self, vcpu: Vcpu) -> int:
        features = 0
        for word in range(2):
            vcpu.write(self._common + DEVICE_FEATURE_SELECT, 4, word)
            features |= vcpu.read(self._common + DEVICE_FEATURE, 4) << 32 * word
        return features

    def accept(self, vcpu: Vcpu, features: int, offered: int) -> int:
        self._features = features = features | offered & RING_RESET
        for word in range(2):
            vcpu.write(self._common + DRIVER_FEATURE_SELECT, 4, word)
            vcpu.write(self._common + DRIVER_FEATURE, 4, features >> 32 * word & 0xFFFFFFFF)
        return features

    def config(self, vcpu: Vcpu, offset: int, size: int) -> int:
        return vcpu.read(self._config + offset, size)

    def generation(self, vcpu: Vcpu) -> int:
        return vcpu.read(self._common + GENERATION, 1)

    # Queues

    def find_queues(
        self, vcpu: Vcpu, queues: Sequence[QueueInfo], affinities: Sequence[frozenset[int]] | None
    ) -> list[Ring]:
        heard = [info for info in queues if info.callback is not None]
        count = 1 + len(heard)
        per_queue = self._enable_msix(vcpu, count, affinities)
        if not per_queue and not self._enable_msix(vcpu, 2, None):
            raise OSError(errno.ENOSPC, "No space left on device")
        try:
            self._set_up_queues(vcpu, queues, per_queue)
        except OSError:
            self.delete_queues(vcpu)
            raise
        for ring in self.rings:
            vcpu.write(self._common + QUEUE_SELECT, 2, ring.index)
            vcpu.write(self._common + QUEUE_ENABLE, 2, 1)
        return list(self.rings)

    def _set_up_queues(self, vcpu: Vcpu, queues: Sequence[QueueInfo], per_queue: bool) -> None:
        assert self.device is not None
        name = self.device.name
        self.irqs[0].request(vcpu, f"{name}-config", self._config_changed)
        vcpu.write(self._common + CONFIG_VECTOR, 2, 0)
        if vcpu.read(self._common + CONFIG_VECTOR, 2) == NO_VECTOR:
            raise OSError(errno.EBUSY, "Device or resource busy")
        if not per_queue:
            self.irqs[1].request(vcpu, f"{name}-virtqueues", self._all_queues)
        vector = 0
        for index, info in enumerate(queues):
            wanted = NO_VECTOR
            if info.callback is not None:
                vector = wanted = vector + 1 if per_queue else 1
            ring = self._set_up(vcpu, index, info, wanted)
            if per_queue and wanted != NO_VECTOR:
                self.irqs[wanted].request(vcpu, f"{name}-{info.name}", ring.interrupt)

    def _set_up(self, vcpu: Vcpu, index: int, info: QueueInfo, vector: int) -> Ring:
        """``setup_vq()`` and ``vp_active_vq()``."""
        common = self._common
        if index >= vcpu.read(common + NUM_QUEUES, 2):
            raise OSError(errno.EINVAL, "Invalid argument")
        size = self._of_queue(vcpu, index, QUEUE_SIZE)
        if not size or size & (size - 1) or self._of_queue(vcpu, index, QUEUE_ENABLE):
            raise OSError(errno.ENOENT, "No such file or directory")
        kernel = self.kernel
        ring = Ring(
            kernel.pages, kernel.memory, index, info.name, size, ALIGN, self._features,
            info.callback, _nothing,
        )  # fmt: skip
        vcpu.write(common + QUEUE_SELECT, 2, index)
        vcpu.write(common + QUEUE_SIZE, 2, size)
        vcpu.write(common + QUEUE_SELECT, 2, index)
        for register, address in zip(QUEUE_ADDRESSES, ring.addresses, strict=True):
            vcpu.write(common + register, 4, address & 0xFFFFFFFF)
            vcpu.write(common + register + 4, 4, address >> 32)
        self.rings.append(ring)
        if vector != NO_VECTOR and self._set_vector(vcpu, index, vector) == NO_VECTOR:
            raise OSError(errno.EBUSY, "Device or resource busy")
        at = self._notify + self._of_queue(vcpu, index, QUEUE_NOTIFY_OFF) * self._multiplier

        def notify(vcpu: Vcpu) -> None:
            vcpu.write(at, 2, index)

        ring.notify = notify
        return ring

    def _of_queue(self, vcpu: Vcpu, index: int, register: int) -> int:
        vcpu.write(self._common + QUEUE_SELECT, 2, index)
        return vcpu.read(self._common + register, 2)

    def _set_vector(self, vcpu: Vcpu, index: int, vector: int) -> int:
        vcpu.write(self._common + QUEUE_SELECT, 2, index)
        vcpu.write(self._common + QUEUE_VECTOR, 2, vector)
        return vcpu.read(self._common + QUEUE_VECTOR, 2)

    def delete_queues(self, vcpu: Vcpu) -> None:
        """``vp_del_vqs()``."""
        for ring in self.rings:
            for desc in self.irqs[1:]:
                if desc.handlers and desc.handlers[0] == ring.interrupt:
                    desc.free(vcpu, desc.actions[0])
            self._set_vector(vcpu, ring.index, NO_VECTOR)
            ring.delete()
        self.rings.clear()
        for desc in self.irqs:
            for name in list(desc.actions):
                desc.free(vcpu, name)
        if self._enabled:
            vcpu.write(self._common + CONFIG_VECTOR, 2, NO_VECTOR)
            vcpu.read(self._common + CONFIG_VECTOR, 2)
            self._disable_msix(vcpu)

    def set_queue_affinity(self, vcpu: Vcpu, ring: Ring, cpus: frozenset[int]) -> None:
        for desc in self.irqs:
            if desc.handlers and desc.handlers[0] == ring.interrupt:
                desc.set_affinity(vcpu, cpus)

    # MSI-X

    def _enable_msix(
        self, vcpu: Vcpu, count: int, affinities: Sequence[frozenset[int]] | None
    ) -> bool:
        """``pci_alloc_irq_vectors()``: whether there are so many; table entries are masked."""
        function, kernel = self.function, self.kernel
        read, write = function.read, function.write
        at = self._msix = function.msix
        if not at:
            return False
        control = read(vcpu, at + 2, 2)
        if (control & 0x7FF) + 1 < count:
            return False
        control = read(vcpu, at + 2, 2)
        write(vcpu, at + 2, 2, control | MSIX_ENABLE | MSIX_MASK_ALL)
        read(vcpu, at + 2, 2)
        place = read(vcpu, at + 4, 4)
        read(vcpu, at + 2, 2)
        table = function.bars.get(place & 7, 0) + (place & ~7)
        name = f"PCI-MSIX-{function.name}"
        chips = [MsixChip(kernel, name, number, table) for number in range(count)]
        for number in range(count):
            vcpu.read(table + 16 * number + 12, 4)
        wanted: list[frozenset[int] | None] = [None] * count
        if affinities is not None:
            wanted[1:] = affinities
        self.irqs = [
            kernel.irqs.create(chip, affinity or None)
            for chip, affinity in zip(chips, wanted, strict=True)
        ]
        for chip in chips:
            chip.reserve(vcpu)
        self._intx(vcpu, off=True)
        for number in range((control & 0x7FF) + 1):
            vcpu.write(table + 16 * number + 12, 4, 1)
        control = read(vcpu, at + 2, 2)
        write(vcpu, at + 2, 2, control & ~MSIX_MASK_ALL)
        self._enabled = True
        return True

    def _disable_msix(self, vcpu: Vcpu) -> None:
        """``pci_disable_msix()``."""
        function, at = self.function, self._msix
        for desc in self.irqs:
            assert isinstance(desc.hardware, MsixChip)
            desc.hardware.mask_entry(vcpu)
            self.kernel.irqs.remove(desc)
        self.irqs = []
        control = function.read(vcpu, at + 2, 2)
        function.write(vcpu, at + 2, 2, control & ~MSIX_ENABLE)
        self._intx(vcpu, off=False)
        self._enabled = False

    def _intx(self, vcpu: Vcpu, *, off: bool) -> None:
        command = self.function.read(vcpu, COMMAND, 2)
        wanted = command | INTX_DISABLE if off else command & ~INTX_DISABLE
        if wanted != command:
            self.function.write(vcpu, COMMAND, 2, wanted)

    # Interrupts

    def _config_changed(self, vcpu: Vcpu, irq: int) -> None:
        """``vp_config_changed()``."""
        vcpu.enter("vp_config_changed", irq)
        if self.device is not None:
            self.device.config_changed(vcpu)

    def _all_queues(self, vcpu: Vcpu, irq: int) -> None:
        """``vp_vring_interrupt()``."""
        vcpu.enter("vp_vring_interrupt", irq)
        for ring in self.rings:
            ring.interrupt(vcpu, irq)


def _nothing(vcpu: Vcpu) -> None:
    """A queue's notification, before it is known where that goes."""
