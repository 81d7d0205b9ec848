# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupt controllers' drivers: what mask, unmask and a move are on each.

    IoApicChip  a pin of an IOAPIC      arch/x86/kernel/apic/io_apic.c
    MsixChip    a vector of PCI MSI-X   drivers/pci/msi, arch/x86/kernel/apic/msi.c
    MmioChip    a vector of virtio-mmio with MSI     drivers/virtio/virtio_mmio.c of our series
    VisChip     a vector of virtio-mmio with VIS     the same

Each does the accesses of its Linux driver, in order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from .apic import Vector, message

if TYPE_CHECKING:
    from ..vcpu import Vcpu
    from .irq import IrqDesc
    from .kernel import Kernel
    from .msi import MsiVectors, Storage

__all__ = ["Chip", "IoApicChip", "MmioChip", "MsixChip", "VisChip"]

IOREGSEL = 0x00
IOWIN = 0x10
LEVEL = 1 << 15
REMOTE_IRR = 1 << 14
MASKED = 1 << 16


class Chip(ABC):
    """One interrupt input of a controller. ``desc`` is whose it is."""

    edge = True
    moves_in_interrupt = False
    """It can be moved safely only while an interrupt of it is handled."""
    desc: IrqDesc

    def __init__(self, kernel: Kernel, name: str, hwirq: int) -> None:
        self.kernel = kernel
        self.name = name
        self.hwirq = hwirq

    @property
    def target(self) -> int:
        """The APIC ID that it goes to."""
        return self.kernel.machine.vcpus[self.desc.cpu].apic.id

    @abstractmethod
    def mask(self, vcpu: Vcpu) -> None:
        """Let nothing through."""

    @abstractmethod
    def unmask(self, vcpu: Vcpu) -> None:
        """Let through what comes, and what came."""

    @abstractmethod
    def write(self, vcpu: Vcpu) -> None:
        """Tell the hardware the vector and CPU of ``desc``."""

    def activate(self, vcpu: Vcpu) -> None:
        """A vector was assigned for the first time."""
        self.write(vcpu)

    def startup(self, vcpu: Vcpu) -> None:
        """The first unmask."""
        self.unmask(vcpu)

    def set_affinity(self, vcpu: Vcpu, wanted: frozenset[int]) -> None:
        """Move to one of ``wanted``; raises what :meth:`IrqDesc.assign` does."""
        vcpu.enter("apic_set_affinity")
        self.desc.assign(wanted)
        self.write(vcpu)

    def synchronize(self, vcpu: Vcpu) -> None:
        """Wait until none is under way; in this model none ever is."""

    def deactivate(self, vcpu: Vcpu) -> None:
        """The vector is going to be given back."""

    def in_service(self, vcpu: Vcpu) -> bool:
        """Whether it still waits for its EOI."""
        return False

    def force_eoi(self, vcpu: Vcpu) -> None:
        """A level that came as an edge: the EOI has not reached it."""


class IoApicChip(Chip):
    """Pin ``hwirq`` of the IOAPIC at ``base``."""

    def __init__(self, kernel: Kernel, base: int, pin: int, *, level: bool) -> None:
        super().__init__(kernel, "IO-APIC", pin)
        self.edge = not level
        self.moves_in_interrupt = True
        self._base = base
        self._low = 0x10 + 2 * pin
        self._masked = MASKED if level else 0  # until it is requested, mp_setup_entry()

    def _write(self, vcpu: Vcpu, register: int, value: int) -> None:
        vcpu.write(self._base + IOREGSEL, 4, register)
        vcpu.write(self._base + IOWIN, 4, value)

    def _read(self, vcpu: Vcpu, register: int) -> int:
        vcpu.write(self._base + IOREGSEL, 4, register)
        return vcpu.read(self._base + IOWIN, 4)

    def _entry(self) -> int:
        return self.desc.vector | (0 if self.edge else LEVEL) | self._masked

    def mask(self, vcpu: Vcpu) -> None:
        vcpu.enter("mask_ioapic_irq")
        self._masked = MASKED
        self._write(vcpu, self._low, self._entry())
        vcpu.read(self._base + IOWIN, 4)  # waits until it has arrived

    def unmask(self, vcpu: Vcpu) -> None:
        vcpu.enter("unmask_ioapic_irq")
        self.startup(vcpu)

    def startup(self, vcpu: Vcpu) -> None:
        self._masked = 0
        self._write(vcpu, self._low, self._entry())

    def write(self, vcpu: Vcpu) -> None:
        apic = self.target
        # APIC IDs above 255: bits 14:8 are in bits 55:49 (io_apic.h, virt_destid_8_14).
        self._write(vcpu, self._low + 1, (apic & 0xFF) << 24 | (apic >> 8 & 0x7F) << 17)
        self._write(vcpu, self._low, self._entry())

    def set_affinity(self, vcpu: Vcpu, wanted: frozenset[int]) -> None:
        vcpu.enter("ioapic_set_affinity", self.desc.number)
        super().set_affinity(vcpu, wanted)

    def synchronize(self, vcpu: Vcpu) -> None:
        self._read(vcpu, self._low)
        self._read(vcpu, self._low + 1)

    def deactivate(self, vcpu: Vcpu) -> None:
        self._masked = MASKED
        self._write(vcpu, self._low, MASKED)
        self._write(vcpu, self._low + 1, 0)

    def in_service(self, vcpu: Vcpu) -> bool:
        return bool(self._read(vcpu, self._low) & REMOTE_IRR)

    def force_eoi(self, vcpu: Vcpu) -> None:
        vcpu.write(self._base + 0x40, 4, self.desc.vector)


class MsixChip(Chip):
    """Entry ``hwirq`` of the MSI-X table at ``table``, a guest-physical address."""

    moves_in_interrupt = True

    def __init__(self, kernel: Kernel, name: str, hwirq: int, table: int) -> None:
        super().__init__(kernel, name, hwirq)
        self._table = table
        self._entry = table + 16 * hwirq

    def mask(self, vcpu: Vcpu) -> None:
        vcpu.enter("pci_irq_mask_msix")
        self.mask_entry(vcpu)

    def mask_entry(self, vcpu: Vcpu) -> None:
        """Mask it, and read something back, which waits until that has arrived."""
        vcpu.write(self._entry + 12, 4, 1)
        vcpu.read(self._table, 4)

    def unmask(self, vcpu: Vcpu) -> None:
        vcpu.enter("pci_irq_unmask_msix")
        vcpu.write(self._entry + 12, 4, 0)

    def _message(self, vcpu: Vcpu, address: int, data: int) -> None:
        vcpu.enter("pci_msi_domain_write_msg")
        entry = self._entry
        vcpu.write(entry, 4, address)
        vcpu.write(entry + 4, 4, 0)
        vcpu.write(entry + 8, 4, data)
        vcpu.read(entry + 8, 4)

    def reserve(self, vcpu: Vcpu) -> None:
        """It is set up long before somebody requests it, so with a vector of nobody's."""
        self._message(vcpu, *message(0, int(Vector.SHUTDOWN)))

    def write(self, vcpu: Vcpu) -> None:
        self._message(vcpu, *message(self.target, self.desc.vector))

    def set_affinity(self, vcpu: Vcpu, wanted: frozenset[int]) -> None:
        """``msi_set_affinity()``.

        Address and data are two writes. So the new vector is first taken on the old CPU,
        which is this one, and only then the new CPU; who came in between is sent again.
        """
        desc = self.desc
        vcpu.enter("msi_set_affinity", desc.number)
        vcpu.enter("apic_set_affinity", desc.number)
        cpu, vector = desc.cpu, desc.vector
        desc.assign(wanted)
        if not desc.started or desc.vector == vector or desc.cpu == cpu or cpu != vcpu.index:
            self.write(vcpu)
            return
        old = self.kernel.machine.vcpus[cpu].apic.id
        self._message(vcpu, *message(old, desc.vector))
        self.write(vcpu)
        if self.kernel.apic.pending(vcpu, desc.vector):
            self.kernel.apic.ipi(vcpu, self.target, desc.vector)

    def deactivate(self, vcpu: Vcpu) -> None:
        self._message(vcpu, 0, 0)


class _MmioChip(Chip):
    """What both chips of virtio-mmio have in common; ``functions`` is how theirs begin."""

    functions = ""

    def mask(self, vcpu: Vcpu) -> None:
        vcpu.enter(f"{self.functions}_irq_mask")
        self._mask(vcpu)

    def unmask(self, vcpu: Vcpu) -> None:
        vcpu.enter(f"{self.functions}_irq_unmask")
        self._unmask(vcpu)

    def write(self, vcpu: Vcpu) -> None:
        self._write(vcpu, *message(self.target, self.desc.vector))

    def _write(self, vcpu: Vcpu, address: int, data: int) -> None:
        vcpu.enter(f"{self.functions}_irq_write_msg")
        self._message(vcpu, address, data)

    def set_affinity(self, vcpu: Vcpu, wanted: frozenset[int]) -> None:
        vcpu.enter("msi_domain_set_affinity", self.desc.number)
        super().set_affinity(vcpu, wanted)

    def deactivate(self, vcpu: Vcpu) -> None:
        self._write(vcpu, 0, 0)

    @abstractmethod
    def _mask(self, vcpu: Vcpu) -> None: ...

    @abstractmethod
    def _unmask(self, vcpu: Vcpu) -> None: ...

    @abstractmethod
    def _message(self, vcpu: Vcpu, address: int, data: int) -> None: ...


class MmioChip(_MmioChip):
    """Vector ``hwirq`` of a virtio-mmio device with MSI.

    A masked vector's message waits for the unmask, which takes it along.
    """

    functions = "vm_msi"

    def __init__(self, kernel: Kernel, name: str, hwirq: int, vectors: MsiVectors) -> None:
        super().__init__(kernel, name, hwirq)
        self._vectors = vectors
        self._wanted = (0, 0)
        self.masked = True
        self.stale = False

    def _mask(self, vcpu: Vcpu) -> None:
        if not self.masked:
            self.masked = True
            self._vectors.mask(vcpu, self.hwirq)

    def _unmask(self, vcpu: Vcpu) -> None:
        if self.masked:
            self.masked = False
            self._vectors.unmask(vcpu, self.hwirq, self._stale())

    def _message(self, vcpu: Vcpu, address: int, data: int) -> None:
        if self._wanted != (address, data):
            self._wanted = (address, data)
            self.stale = True
        if not self.masked and self.stale:
            self._vectors.set_message(vcpu, self.hwirq, self._stale())

    def _stale(self) -> tuple[int, int] | None:
        stale, self.stale = self.stale, False
        return self._wanted if stale else None


class VisChip(_MmioChip):
    """Vector ``hwirq`` of a virtio-mmio device with interrupt storage.

    Each step is a store, and a doorbell only if the device has said that it has a copy.
    """

    functions = "vm_vis"

    def __init__(self, kernel: Kernel, name: str, hwirq: int, storage: Storage) -> None:
        super().__init__(kernel, name, hwirq)
        self._storage = storage

    def _mask(self, vcpu: Vcpu) -> None:
        self._storage.mask(vcpu, self.hwirq)

    def _unmask(self, vcpu: Vcpu) -> None:
        if self._storage.unmask(vcpu, self.hwirq):
            self.kernel.apic.ipi(vcpu, self.target, self.desc.vector)

    def _message(self, vcpu: Vcpu, address: int, data: int) -> None:
        if address or data:
            self._storage.set_entry(vcpu, self.hwirq, address, data)
        else:
            self._storage.shut_down(vcpu, self.hwirq)
