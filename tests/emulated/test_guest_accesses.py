# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest model does what the real guest did, access by access.

The model does what recordings/phases.sh has the real one do, on a machine of the same shape,
and each device's accesses (register, width, direction, value), the interrupts that CPUs take
and the kernel's functions on their way are compared, in order. Where they differ is listed
in DIFFERENCES with the reason; an entry that is not needed fails.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from qvis.emulated.config import Config, DeviceSpec
from qvis.emulated.devices import Block
from qvis.emulated.guest.apic import XApic
from qvis.emulated.guest.chips import IoApicChip, MsixChip
from qvis.emulated.guest.irq import IrqDesc
from qvis.emulated.guest.kernel import Kernel
from qvis.emulated.guest.msi import MsiVectors, Storage
from qvis.emulated.guest.tasks import Task
from qvis.emulated.guest.virtio import Parent, VirtioDevice
from qvis.emulated.guest.virtio_pci import PciParent
from qvis.emulated.machine import Machine
from qvis.emulated.vcpu import Vcpu
from qvis.transport import Transport
from qvis.x86 import Apic, Platform

from .replay import load, provenance

PHASES = (
    "boot", "interrupts", "mask", "pending", "move", "move pending",
    "unbind", "bind", "remove", "add", "control", "end",
)  # fmt: skip
DEVICES = ("blk0", "nic0", "IOAPIC", "IOAPIC2", "LAPIC", "PCI host bridge")
DEVICE_VECTORS = range(0x20, 0xEB)
SERIAL_PIN = 4
MS = 1_000_000


@dataclass(frozen=True)
class Row:
    """An access, a function ("function", its name) or an interrupt taken ("deliver")."""

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


@dataclass(frozen=True)
class Difference:
    """Something that is not the same: rows of the guests that are left out, or a value."""

    reason: str
    left_out: Callable[[Row], bool] = lambda row: False
    any_value: Callable[[Row], bool] = lambda row: False


def _ring(row: Row) -> bool:
    return row.register.startswith(
        ("QueueDesc", "QueueDriver", "QueueDevice", "VisStorageLow", "queue_desc", "queue_driver",
         "queue_device")
    )  # fmt: skip


def _ipi(row: Row) -> bool:
    """An IPI, or half of one; but not that which sends a device's interrupt again."""
    if row.register == "ICR_Low" and row.kind == "write":
        return row.phase != "boot" and row.value not in DEVICE_VECTORS
    return row.register in ("ICR_Low", "ICR_High") and row.phase != "boot"


DIFFERENCES = (
    Difference("pages come from an allocator of the model's own", any_value=lambda row: _ring(row)),
    Difference(
        "time passes differently, so timers are set to other values",
        any_value=lambda row: row.register in ("TimerInitial", "TimerCurrent"),
    ),
    Difference(
        "a CPU with nothing to do has no tick here, and is woken by other CPUs at other times: "
        "how often timers are programmed and CPUs are told to reschedule differs",
        left_out=lambda row: (row.register == "TimerInitial" and row.phase != "boot") or _ipi(row),
    ),
    Difference(
        "during the boot the real kernel's threads wake each other all the time, and its timer "
        "ticks: of IPIs only those that start processors are compared",
        left_out=lambda row: (
            row.phase == "boot"
            and (
                row.register in ("ICR_High", "TimerInitial")
                or (row.register == "ICR_Low" and (row.kind == "read" or row.value & 0x700 == 0))
            )
        ),
    ),
    Difference(
        "ends of interrupts: those of devices are compared as what CPUs took, and others' "
        "(timer, IPIs, the serial line) differ in number",
        left_out=lambda row: row.name in ("LAPIC.EOI", "native_apic_mem_eoi"),
    ),
    Difference(
        "a function that only IPIs go through",
        left_out=lambda row: row.name == "apic_mem_wait_icr_idle",
    ),
    Difference(
        "the serial line never interrupts here",
        left_out=lambda row: row.name.startswith("ttyS0"),
    ),
    Difference(
        "local APICs are not switched off before a restart, which resets them anyway",
        left_out=lambda row: row.device == "LAPIC" and row.phase == "end",
    ),
    Difference(
        "what the card is to receive was set twice: two changes that came while the first one "
        "waited for its worker are one, which is a matter of time",
        left_out=lambda row: row.name == "again",
    ),
)
"""In what the model differs from the real guest, and why."""


# The real guest


def real(transport: Transport) -> list[Row]:
    """Its rows; those of the serial line's interrupt have the device "ttyS0"."""
    rows: list[Row] = []
    phase, vectors, serial, selected = "boot", {}, (-1, -1), 0
    for step in load(transport):
        if step.kind == "phase":
            phase = step.name or ""
        elif step.kind == "deliver":
            vectors[step.vcpu] = step.value
            if step.value in DEVICE_VECTORS:
                name = "ttyS0" if (step.vcpu, step.value) == serial else "device"
                rows.append(Row(phase, step.vcpu, "deliver", name, None, step.value))
        elif step.kind == "function":
            name = step.name or ""
            its_own = ("apic_ack_edge", "mask_ioapic_irq", "unmask_ioapic_irq")
            if (step.vcpu, vectors.get(step.vcpu)) == serial and name in its_own:
                name = "ttyS0." + name
            rows.append(Row(phase, step.vcpu, "function", name, None, None))
        elif step.kind in ("read", "write"):
            name = step.name or ""
            if name == "IOAPIC.IOREGSEL":
                selected = step.value or 0
            low, high = 0x10 + 2 * SERIAL_PIN, 0x11 + 2 * SERIAL_PIN
            if name == "IOAPIC.IOWIN" and step.kind == "write" and selected == high:
                serial = ((step.value or 0) >> 24, serial[1])
            if name == "IOAPIC.IOWIN" and step.kind == "write" and selected == low:
                serial = (serial[0], (step.value or 0) & 0xFF)
            rows.append(Row(phase, step.vcpu, step.kind, name, step.size, step.value))
    return _without_the_serial_test(_without_the_second_time(rows))


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


# The model


def model(transport: Transport) -> list[Row]:
    """The rows of the guest model, which does the same."""
    names = {step.address: step.name for step in load(transport) if step.address is not None}
    shape = provenance(transport)["machine"]
    config = Config(
        transport=transport,
        smp=shape["smp"],
        memory=shape["memory"],
        platform=Platform(apic=Apic.XAPIC),
        devices=(DeviceSpec("blk", "blk0", shape["queues"]), DeviceSpec("net", "nic0")),
        at_once=True,
    )
    machine = Machine(config)
    disk = machine.devices["blk0"].device
    assert isinstance(disk, Block)
    disk.sectors = 0  # as it is where instructions are counted
    rows: list[Row] = []
    script = Script(machine)
    with pytest.MonkeyPatch.context() as patch:
        _watch(patch, script, rows, lambda address: str(names.get(address, hex(address))))
        script.kernel.boot(script.start)
        machine.events.run(1_000_000)
    assert script.phase == "end"
    return rows


class Script:
    """recordings/phases.sh, as it is for this guest."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.kernel = machine.guest = Kernel(machine)
        self.phase = "boot"

    def start(self) -> None:
        """What init does."""
        self.kernel.spawn(self.run(), 0)

    def _load(self, cpu: int, count: int) -> Task:
        def work() -> Generator[Any, Any, int]:
            task = self.kernel.current
            assert task is not None
            for _ in range(count):
                yield from self.kernel.disks["vda"].serial(task)
            return 0

        return self.kernel.spawn(work(), cpu)

    def _done(self, task: Task) -> Iterator[Any]:
        if task.status is None:
            yield task.ended
        assert task.status == 0

    def _irq(self, disk: VirtioDevice) -> IrqDesc:
        names = ([f"{disk.name}-req.1"], [disk.name])
        return next(desc for desc in self.kernel.irqs.descs.values() if desc.actions in names)

    def run(self) -> Generator[Any, Any, int]:
        kernel, vcpu = self.kernel, self.machine.vcpus[0]
        disk = kernel.disks["vda"].device
        irq = self._irq(disk)
        self.phase = "interrupts"
        irq.set_affinity(vcpu, {1})
        yield from self._done(self._load(1, 1000))
        self.phase = "mask"
        for _ in range(20):
            irq.mask(vcpu)
            irq.unmask(vcpu)
        self.phase = "pending"
        for _ in range(5):
            irq.mask(vcpu)
            load = self._load(1, 1)
            yield kernel.sleep(20 * MS)
            irq.unmask(vcpu)
            yield from self._done(load)
        self.phase = "move"
        for n in range(20):
            irq.set_affinity(vcpu, {n % 4})
            yield from self._done(self._load(1, 1))
            yield kernel.sleep(30 * MS)
        self.phase = "move pending"
        for n in range(5):
            irq.mask(vcpu)
            load = self._load(1, 1)
            yield kernel.sleep(20 * MS)
            irq.set_affinity(vcpu, {n % 4})
            irq.unmask(vcpu)
            yield from self._done(load)
            yield kernel.sleep(30 * MS)
        self.phase = "unbind"
        disk.unbind(vcpu)
        self.phase = "bind"
        disk.bind(vcpu)
        yield from self._done(self._load(1, 10))
        self.phase = "remove"
        parent = disk.transport
        parent.unbind(vcpu)
        self.phase = "add"
        parent.bind(vcpu)
        yield from self._done(self._load(1, 10))
        yield from self._done(self._load(3, 10))
        self.phase = "control"
        kernel.network[0].set_promiscuous(vcpu, True)
        kernel.network[0].set_promiscuous(vcpu, False)
        self.phase = "end"
        kernel.shut_down(vcpu)
        return 0


def _watch(
    patch: pytest.MonkeyPatch, script: Script, rows: list[Row], name: Callable[[int], str]
) -> None:
    read, write, enter = Vcpu.read, Vcpu.write, Vcpu.enter
    interrupt = script.kernel.interrupt
    ram = script.machine.memory.size

    def watched_read(vcpu: Vcpu, address: int, size: int) -> int:
        value = read(vcpu, address, size)
        if address >= ram:
            rows.append(Row(script.phase, vcpu.index, "read", name(address), size, value))
        return value

    def watched_write(vcpu: Vcpu, address: int, size: int, value: int) -> None:
        if address >= ram:
            rows.append(Row(script.phase, vcpu.index, "write", name(address), size, value))
        write(vcpu, address, size, value)

    def watched_enter(vcpu: Vcpu, function: str, argument: int = 0) -> None:
        rows.append(Row(script.phase, vcpu.index, "function", function, None, None))
        enter(vcpu, function, argument)

    def watched_interrupt(vcpu: Vcpu, vector: int) -> None:
        if vector in DEVICE_VECTORS:
            rows.append(Row(script.phase, vcpu.index, "deliver", "device", None, vector))
        interrupt(vcpu, vector)

    patch.setattr(Vcpu, "read", watched_read)
    patch.setattr(Vcpu, "write", watched_write)
    patch.setattr(Vcpu, "enter", watched_enter)
    patch.setattr(script.kernel, "interrupt", watched_interrupt)


# Comparison


class Guests:
    """Both, without what DIFFERENCES leaves out."""

    def __init__(self, transport: Transport) -> None:
        self.used: set[Difference] = set()
        self.real = self.compared(real(transport))
        self.model = self.compared(model(transport))

    def compared(self, rows: list[Row]) -> list[Row]:
        """``rows`` as far as they have to be the same."""
        found = []
        for row in rows:
            value = row.value
            for entry in DIFFERENCES:
                if entry.left_out(row):
                    self.used.add(entry)
                    break
                if entry.any_value(row):
                    self.used.add(entry)
                    value = "any"
            else:
                found.append(Row(row.phase, row.vcpu, row.kind, row.name, row.size, value))
        return found


_guests: dict[Transport, Guests] = {}


@pytest.fixture(params=list(Transport))
def guests(request: pytest.FixtureRequest) -> Guests:
    transport: Transport = request.param
    if transport not in _guests:
        _guests[transport] = Guests(transport)
    return _guests[transport]


def _accesses(rows: list[Row], device: str, phase: str) -> list[tuple[Any, ...]]:
    found = [r for r in rows if r.device == device and r.phase == phase and r.size is not None]
    if device == "LAPIC":  # each has its own; but which CPU the shell runs on is no matter
        own = [(0 if r.register == "ICR_Low" else r.vcpu or 0, r) for r in found]
        own.sort(key=lambda pair: pair[0])
        return [(vcpu, row.kind, row.name, row.size, row.value) for vcpu, row in own]
    return [(row.kind, row.name, row.size, row.value) for row in found]


@pytest.mark.parametrize("device", DEVICES)
def test_the_model_touches_each_register_as_the_real_driver_does(
    guests: Guests, device: str
) -> None:
    for phase in PHASES:
        expected = _accesses(guests.real, device, phase)
        assert _accesses(guests.model, device, phase) == expected, phase


def test_the_model_touches_nothing_that_the_real_guest_leaves_alone(guests: Guests) -> None:
    known = {row.name for row in guests.real}
    assert {row.name for row in guests.model if row.size is not None} <= known


def test_each_cpu_takes_the_same_interrupts_in_the_same_order(guests: Guests) -> None:
    for phase in PHASES:

        def taken(rows: list[Row], phase: str = phase) -> list[tuple[Any, ...]]:
            return [(r.vcpu, r.value) for r in rows if r.kind == "deliver" and r.phase == phase]

        assert taken(guests.model) == taken(guests.real), phase


def test_the_kernel_goes_through_the_same_functions_in_the_same_order(guests: Guests) -> None:
    for phase in PHASES:

        def entered(rows: list[Row], phase: str = phase) -> list[str]:
            return [r.name for r in rows if r.kind == "function" and r.phase == phase]

        assert entered(guests.model) == entered(guests.real), phase


def test_the_recordings_are_long_enough_to_mean_something(guests: Guests) -> None:
    taken = [row for row in guests.real if row.kind == "deliver" and row.phase == "interrupts"]
    assert len(taken) >= 1000
    assert len(guests.real) > 4000


def _stage_all(self: MsiVectors, *what: Any) -> None:
    self.forget()
    self._command(*what)


MUTANTS: dict[str, tuple[Transport, type, str, Callable[..., Any]]] = {
    "a move of a line does not look whether it is in service": (
        Transport.INTX, IoApicChip, "in_service", lambda *_: False,
    ),
    "a level is ended without a look at its TMR bit": (
        Transport.INTX, XApic, "level", lambda *_: True,
    ),
    "an old vector is freed without a look at IRR": (
        Transport.MSI, XApic, "pending", lambda *_: False,
    ),
    "a message is staged whole each time": (
        Transport.MSI,
        MsiVectors,
        "set_message",
        _stage_all,
    ),
    "a storage's vector that was pending is not sent again": (
        Transport.VIS,
        Storage,
        "unmask",
        lambda self, vcpu, vector: self._memory.write(self.mask_at + vector, b"\0"),
    ),
    "a move rings no doorbell": (
        Transport.VIS_DOORBELL, Storage, "_update", lambda *_: None,
    ),
    "a masked table entry is not read back": (
        Transport.PCI, MsixChip, "mask_entry",
        lambda self, vcpu: vcpu.write(self._entry + 12, 4, 1),
    ),
    "functions are not asked whether they are still there": (
        Transport.PCI, PciParent, "unbind", Parent.unbind,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_model_that_does_otherwise_is_found_out(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    transport, owner, attribute, instead = MUTANTS[name]
    guests = _of(transport)
    monkeypatch.setattr(owner, attribute, instead)
    try:
        rows = guests.compared(model(transport))
    except AssertionError:
        return  # it does not even get to its end
    assert any(
        _accesses(rows, device, phase) != _accesses(guests.real, device, phase)
        for device in DEVICES
        for phase in PHASES
    )


def test_every_listed_difference_is_one() -> None:
    used = {entry for transport in Transport for entry in _of(transport).used}
    assert [entry.reason for entry in DIFFERENCES if entry not in used] == []


def _of(transport: Transport) -> Guests:
    return _guests.setdefault(transport, Guests(transport))
