# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things are in a machine's address space: QEMU's microvm.

virtio-mmio slots go on beyond those that QEMU has, and share their lines then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from ..x86 import Irqchip
from .irqchip import Exit
from .ports import SERIAL

if TYPE_CHECKING:
    from .machine import Machine

__all__ = [
    "ECAM",
    "ECAM_SIZE",
    "IOAPICS",
    "LAPIC",
    "LAPIC_END",
    "LAPIC_PAGE",
    "LINES",
    "MIB",
    "MMIO_SLOTS",
    "MOST_SLOTS",
    "NOTHING",
    "ONES",
    "PCI_NOTIFY",
    "PCI_NOTIFY_BAR",
    "SLOT_SIZE",
    "WINDOWS",
    "Messages",
    "Place",
    "regions",
    "slot_address",
    "slot_path",
]

MIB = 1 << 20
SLOT_SIZE = 512
MMIO_BASE, MMIO_SLOTS, MOST_SLOTS = 0xFEB00000, 24, 1100
LINES = 24  # of an IOAPIC; virtio-mmio devices are on the second one
IOAPICS = (0xFEC00000, 0xFEC10000)
LAPIC, LAPIC_END = 0xFEE00000, 0xFEF00000
LAPIC_PAGE = LAPIC + 0x1000  # what is behind it are messages
ECAM, ECAM_SIZE = 0xE0000000, 256 * MIB
WINDOWS = (range(0xC0000000, ECAM), range(0xC000000000, 0x10000000000))
"""Where PCI functions' registers may be."""
PCI_NOTIFY_BAR, PCI_NOTIFY = 4, range(0x3000, 0x4000)
"""Where QEMU's functions are notified."""

MEMORY, PORT = "memory", "port"
UNATTACHED = "path=/machine/unattached"


def slot_address(slot: int) -> int:
    """Where the registers of a virtio-mmio slot begin."""
    return MMIO_BASE + slot * SLOT_SIZE


class Handler(Protocol):
    """Something with registers, ``size`` bytes (1, 2 or 4) at an offset."""

    def read(self, offset: int, size: int) -> int:
        """What is there."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Write there."""


class Place:
    """Addresses from ``start`` on that belong to ``handler``, and what an access exits for.

    A write from offset ``first`` to before ``last`` is a notification, with an exit of its
    own. An access goes to the device as QEMU's memory API would have it: in aligned
    pieces of four bytes at most.
    """

    __slots__ = ("_read", "_write", "exit", "first", "last", "notify", "start")

    def __init__(
        self,
        start: int,
        handler: Handler,
        exit_: Exit,
        notify: Exit | None = None,
        notify_at: range = range(0),
    ) -> None:
        self.start = start
        self._read = handler.read
        self._write = handler.write
        self.exit = exit_
        self.notify = notify or exit_
        self.first = notify_at.start
        self.last = notify_at.stop

    def read(self, offset: int, size: int) -> int:
        """What the device answers."""
        if size <= 4 and not offset & (size - 1):
            return self._read(offset, size)
        value = done = 0
        while done < size:
            piece = _piece(offset + done, size - done)
            value |= self._read(offset + done, piece) << done * 8
            done += piece
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Have the device take it."""
        if size <= 4 and not offset & (size - 1):
            self._write(offset, size, value)
            return
        done = 0
        while done < size:
            piece = _piece(offset + done, size - done)
            self._write(offset + done, piece, value >> done * 8 & ((1 << piece * 8) - 1))
            done += piece


def _piece(offset: int, left: int) -> int:
    """How many of ``left`` bytes go together."""
    return min(4, offset & -offset or 4, 1 << left.bit_length() - 1)


class _Constant:
    """Where nothing is."""

    def __init__(self, *, ones: bool) -> None:
        self._ones = ones

    def read(self, offset: int, size: int) -> int:
        return (1 << size * 8) - 1 if self._ones else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """It is lost."""


class Messages:
    """Where a vCPU writes an MSI as a device would: QEMU's kvm_apic_mem_ops."""

    def __init__(self, msi: Callable[[int, int], object]) -> None:
        self._msi = msi

    def read(self, offset: int, size: int) -> int:
        """Nothing is there to be read."""
        return (1 << size * 8) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Send a message."""
        self._msi(LAPIC + offset, value)


NOTHING = _Constant(ones=False)
"""What no region has: unassigned_mem_read() in QEMU's system/memory.c."""

ONES = _Constant(ones=True)
"""What no function of a PCI bus has."""


def slot_path(machine: Machine, slot: int) -> str:
    """QOM path of a virtio-mmio transport."""
    first = 3 + machine.config.smp if slot < MMIO_SLOTS else 100 + machine.config.smp
    return f"/machine/unattached/device[{first + slot}]"


def regions(machine: Machine) -> Iterator[tuple[str, str, str, int, int]]:
    """As :meth:`~qvis.emulated.machine.Machine.regions`, in no order."""
    smp, irqchip = machine.config.smp, machine.config.platform.irqchip
    slots = {attached.slot for attached in machine.devices.values()} if not machine.pci else set()
    for slot in sorted({*range(MMIO_SLOTS), *slots}):
        start = slot_address(slot)
        owner = f"path={slot_path(machine, slot)}"
        yield "virtio-mmio", owner, MEMORY, start, start + SLOT_SIZE
    kvm = "" if irqchip is Irqchip.OFF else "kvm-"
    lapic = f"{UNATTACHED}/device[0]/lapic"
    yield f"{kvm}apic-msi", lapic, MEMORY, LAPIC, LAPIC_END
    all_in_kvm = "kvm-" if irqchip is Irqchip.ON else ""
    owners = ("path=/machine/ioapic", f"{UNATTACHED}/device[{2 + smp}]")
    for start, owner in zip(IOAPICS, owners, strict=True):
        yield f"{all_in_kvm}ioapic", owner, MEMORY, start, start + 4096
    last = 3 + smp + MMIO_SLOTS  # what QEMU makes after the slots
    if machine.pci is not None:
        last += 1
        owner = f"{UNATTACHED}/device[{last}]"
        yield from _pci_regions(machine, owner)
    ports = [("pic", 1, 0x20, 2), ("pic", 2, 0xA0, 2), ("elcr", 1, 0x4D0, 1), ("elcr", 2, 0x4D1, 1)]
    for name, number, start, size in ports:
        owner = f"{UNATTACHED}/device[{last + number}]"
        yield f"{all_in_kvm}{name}", owner, PORT, start, start + size
    yield "serial", f"{UNATTACHED}/device[{last + 5}]", PORT, SERIAL, SERIAL + 8


def _pci_regions(machine: Machine, bridge: str) -> Iterator[tuple[str, str, str, int, int]]:
    """The functions' registers, what their windows have besides, and all configuration spaces."""
    assert machine.pci is not None
    ids = {id(attached.transport): attached.id for attached in machine.devices.values()}
    mapped = sorted(
        (start, end, name, f"id={ids[id(function)]}")
        for function, name, start, end in machine.pci.regions()
        if id(function) in ids
    )
    for window in WINDOWS:
        at = window.start
        for start, end, name, owner in mapped:
            if start not in window:
                continue
            if at < start:
                yield "gpex_mmio_window", bridge, MEMORY, at, start
            yield name, owner, MEMORY, start, end
            at = end
        if at < window.stop:
            yield "gpex_mmio_window", bridge, MEMORY, at, window.stop
    yield "pcie-mmcfg-mmio", bridge, MEMORY, ECAM, ECAM + ECAM_SIZE
