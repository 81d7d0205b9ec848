# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest did, as rows that two guests can be compared by; and those of a real one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qvis.transport import Transport

from .replay import DEVICE_VECTORS, Step, load

__all__ = ["OTHERS", "Notes", "Row", "real"]

OTHERS = " of others"
"""What the name of an end has when no device's interrupt was taken before it on that CPU."""
SERIAL_PIN = 4


@dataclass(frozen=True)
class Row:
    """An access, a function ("function", its name) or an interrupt taken ("deliver").

    Accesses are "read" and "write" of registers, "load" and "store" of interrupt storage; a
    store of what is there is "store again".
    """

    phase: str
    vcpu: int | None
    kind: str
    name: str
    size: int | None
    value: Any

    @property
    def device(self) -> str:
        return self.name.split(".")[0]

    @property
    def register(self) -> str:
        return self.name.partition(".")[2]


class Notes:
    """What is needed to name rows: where storage is, and what each CPU took last."""

    def __init__(self) -> None:
        self.taken: dict[int | None, int] = {}
        """The vector."""
        self._low: dict[str, int] = {}
        self._areas: dict[str, tuple[int, int]] = {}  # where, and for how many vectors
        self._content: dict[int, int] = {}  # what the guest stored last, by byte

    def wrote(self, name: str, value: int) -> None:
        """A register was written."""
        device, _, register = name.partition(".")
        if register == "VisStorageLow":
            self._low[device] = value
        elif register == "VisControl" and value >> 16:
            self._areas[device] = start, count = self._low[device], value & 0xFFFF
            for address in range(start, start + _entries(count) + 8 * count):
                self._content.pop(address, None)
        elif register == "VisControl" or (register == "Status" and not value):
            self._areas.pop(device, None)

    def place(self, address: int) -> str | None:
        """What is there of a device's interrupt storage (docs/virtio-interrupts.md, 5.1)."""
        for device, (start, count) in self._areas.items():
            area, offset = _entries(count) // 3, address - start
            if 0 <= offset < 3 * area + 8 * count:
                number = min(offset // area, 3)
                part = ("mask", "pending", "cached", "entries")[number]
                return f"{device}.storage.{part}+{offset - number * area:#x}"
        return None

    def stored(self, address: int, size: int, value: int) -> str:
        """The kind of a store to it."""
        data = dict(enumerate(value.to_bytes(size, "little"), start=address))
        again = all(self._content.get(at) == byte for at, byte in data.items())
        self._content.update(data)
        return "store again" if again else "store"

    def end(self, vcpu: int | None, name: str) -> str:
        """The name of an EOI, or of the function that does it."""
        return name if self.taken.get(vcpu) in DEVICE_VECTORS else name + OTHERS


def _entries(count: int) -> int:
    """Where the entries of a storage for ``count`` vectors begin."""
    return (count + 127) // 128 * 384


def real(transport: Transport) -> list[Row]:
    """Its rows; those of the serial line's interrupt have the device "ttyS0"."""
    rows: list[Row] = []
    notes, phase, serial, selected, last = Notes(), "boot", (-1, -1), 0, None
    for step in load(transport):
        name, value, vcpu = step.name or "", step.value or 0, step.vcpu
        if vcpu is None and step.kind in ("load", "store"):
            vcpu = last  # one thread runs all of them, and it came by a function
        last = vcpu
        at_serial = (vcpu, notes.taken.get(vcpu)) == serial
        if step.kind == "phase":
            phase = name
        elif step.kind == "deliver":
            notes.taken[vcpu] = value
            if value in DEVICE_VECTORS:
                name = "ttyS0" if (vcpu, value) == serial else "device"
                rows.append(Row(phase, vcpu, "deliver", name, None, value))
        elif step.kind == "function":
            if name == "native_apic_mem_eoi":
                name = notes.end(vcpu, name)
            its_own = ("apic_ack_edge", "mask_ioapic_irq", "unmask_ioapic_irq",
                       "native_apic_mem_eoi")  # fmt: skip
            if at_serial and name in its_own:
                name = "ttyS0." + name
            rows.append(Row(phase, vcpu, "function", name, None, None))
        elif step.kind in ("load", "store") and step.address is not None:
            place = notes.place(step.address)
            if place is not None and step.size:
                kind = step.kind
                if kind == "store":
                    kind = notes.stored(step.address, step.size, value)
                rows.append(Row(phase, vcpu, kind, place, step.size, value))
        elif step.kind in ("port-read", "port-write"):
            name = f"{name}.{step.address:#x}"
            rows.append(Row(phase, vcpu, step.kind.removeprefix("port-"), name, step.size, value))
        elif step.kind in ("read", "write"):
            if step.kind == "write":
                notes.wrote(name, value)
                serial, selected = _serial(step, serial, selected)
            if name == "LAPIC.EOI":
                name = "ttyS0.EOI" if at_serial else notes.end(vcpu, name)
            rows.append(Row(phase, vcpu, step.kind, name, step.size, value))
    return _without_the_serial_test(_without_the_second_time(rows))


def _serial(step: Step, serial: tuple[int, int], selected: int) -> tuple[tuple[int, int], int]:
    """The CPU and vector of the serial line after a write, and the IOAPIC's register then."""
    value = step.value or 0
    if step.name == "IOAPIC.IOREGSEL":
        return serial, value
    if step.name == "IOAPIC.IOWIN" and selected == 0x11 + 2 * SERIAL_PIN:
        return (value >> 24, serial[1]), selected
    if step.name == "IOAPIC.IOWIN" and selected == 0x10 + 2 * SERIAL_PIN:
        return (serial[0], value & 0xFF), selected
    return serial, selected


def _without_the_serial_test(rows: list[Row]) -> list[Row]:
    """The 8250 driver's test for interrupts of its own masks its pin once and unmasks it."""
    low = 0x10 + 2 * SERIAL_PIN
    at = [
        n
        for n, row in enumerate(rows)
        if row.phase == "boot"
        and row.name == "IOAPIC.IOWIN"
        and row.kind == "write"
        and isinstance(row.value, int)
        and row.value & 0x100FF > 0x10000
        and rows[n - 1].value == low
    ]
    assert len(at) == 1
    mine = [n for n in range(at[0] - 1, len(rows)) if rows[n].device == "IOAPIC"][:5]
    for n in range(mine[0] - 2, mine[-1] + 1):
        row = rows[n]
        if n in mine:
            rows[n] = Row(row.phase, row.vcpu, row.kind, "ttyS0." + row.register, 4, None)
        elif row.name in ("mask_ioapic_irq", "unmask_ioapic_irq"):
            rows[n] = Row(row.phase, row.vcpu, row.kind, "ttyS0." + row.name, None, None)
    return rows


def _without_the_second_time(rows: list[Row]) -> list[Row]:
    """The card's three commands, which are on its third queue, may be given twice at boot."""
    notify = ("nic0.virtio-pci-notify", "nic0.QueueNotify")
    commands = [
        n
        for n, row in enumerate(rows)
        if row.name in notify and row.value == 2 and row.phase == "boot"
    ]
    assert len(commands) in (3, 6)
    for n in commands[3:]:
        rows[n] = Row(rows[n].phase, rows[n].vcpu, rows[n].kind, "again", rows[n].size, None)
    return rows
