# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest model does what the real guest did, access by access.

The model does what recordings/phases.sh has the real one do, on a machine of the same shape.
Accesses to devices, to interrupt storage in memory and to the 8259s (CPU, width, direction,
value), the interrupts that CPUs take, their ends and the kernel's functions on the way are
compared, in order. Where they differ is listed in DIFFERENCES with the reason; an entry that
is not needed fails.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from qvis.emulated.config import Config, DeviceSpec
from qvis.emulated.devices import Block
from qvis.emulated.guest import bringup
from qvis.emulated.guest.apic import XApic
from qvis.emulated.guest.chips import IoApicChip, MmioChip, MsixChip
from qvis.emulated.guest.irq import IrqDesc
from qvis.emulated.guest.kernel import Kernel
from qvis.emulated.guest.msi import CACHED_ENTRY, CACHED_MASK, MsiVectors, Storage
from qvis.emulated.guest.tasks import Pin, Task
from qvis.emulated.guest.virtio import Parent, VirtioDevice
from qvis.emulated.guest.virtio_pci import PciParent
from qvis.emulated.machine import Machine
from qvis.emulated.pic import PicPair
from qvis.emulated.vcpu import EOI_ADDRESS, Vcpu
from qvis.transport import Transport
from qvis.x86 import Apic, Platform

from .guest_rows import OTHERS, Notes, Row, real
from .replay import DEVICE_VECTORS, load, provenance

PHASES = (
    "boot", "interrupts", "mask", "pending", "move", "move pending",
    "unbind", "bind", "remove", "add", "control", "end",
)  # fmt: skip
DEVICES = ("blk0", "nic0", "IOAPIC", "IOAPIC2", "LAPIC", "PCI host bridge", "PIC")
MOVING = ("boot", "unbind", "control", "end")
SHELL = {
    Transport.PCI: dict.fromkeys(PHASES, 3),
    Transport.INTX: dict.fromkeys(PHASES, 2) | {"bind": 1, "remove": 0, "add": 0},
    Transport.MSI: dict.fromkeys(PHASES, 2) | {"interrupts": 0},
    Transport.VIS: dict.fromkeys(PHASES, 2) | {"interrupts": 0},
    Transport.VIS_DOORBELL: dict.fromkeys(PHASES, 2) | {"interrupts": 0},
}
"""The CPU that the real guest's scheduler has its shell on."""
MS = 1_000_000


@dataclass(frozen=True)
class Difference:
    """Something that is not the same: rows of the guests that are left out, or a value."""

    reason: str
    left_out: Callable[[Row], bool] = lambda row: False
    any_value: Callable[[Row], bool] = lambda row: False
    any_cpu: Callable[[Row], bool] = lambda row: False


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
        "timers and IPIs differ in number, and so do their ends",
        left_out=lambda row: row.name.endswith(OTHERS),
    ),
    Difference(
        "a store that changes nothing is not in the recordings: of pending bytes, which the "
        "driver only clears, and of entries, which it writes when they are set up and when they "
        "are moved",
        left_out=lambda row: (
            row.kind == "store again" and not row.register.startswith("storage.mask")
        ),
    ),
    Difference(
        "while the guest boots and ends, and where its scheduler moves the shell in the middle "
        "of a phase, it is on another CPU; each local APIC is its CPU's own",
        any_cpu=lambda row: row.phase in MOVING and row.device != "LAPIC" and row.kind != "deliver",
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
    script = Script(machine, SHELL[transport])
    with pytest.MonkeyPatch.context() as patch:
        _watch(patch, script, rows, lambda address: str(names.get(address, hex(address))))
        script.kernel.boot(script.start)
        machine.events.run(1_000_000)
    assert script.phase == "end"
    return rows


class Script:
    """recordings/phases.sh, as it is for this guest."""

    def __init__(self, machine: Machine, cpus: dict[str, int]) -> None:
        self.cpus = cpus
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

    def _begin(self, phase: str) -> Generator[Any, Any, Vcpu]:
        """Go on on the CPU that the shell has then."""
        self.phase = phase
        yield Pin(self.cpus[phase])
        return self.machine.vcpus[self.cpus[phase]]

    def run(self) -> Generator[Any, Any, int]:
        kernel = self.kernel
        disk = kernel.disks["vda"].device
        irq = self._irq(disk)
        vcpu = yield from self._begin("interrupts")
        irq.set_affinity(vcpu, {1})
        yield from self._done(self._load(1, 1000))
        vcpu = yield from self._begin("mask")
        for _ in range(20):
            irq.mask(vcpu)
            irq.unmask(vcpu)
        vcpu = yield from self._begin("pending")
        for _ in range(5):
            irq.mask(vcpu)
            load = self._load(1, 1)
            yield kernel.sleep(20 * MS)
            irq.unmask(vcpu)
            yield from self._done(load)
        vcpu = yield from self._begin("move")
        for n in range(20):
            irq.set_affinity(vcpu, {n % 4})
            yield from self._done(self._load(1, 1))
            yield kernel.sleep(30 * MS)
        vcpu = yield from self._begin("move pending")
        for n in range(5):
            irq.mask(vcpu)
            load = self._load(1, 1)
            yield kernel.sleep(20 * MS)
            irq.set_affinity(vcpu, {n % 4})
            irq.unmask(vcpu)
            yield from self._done(load)
            yield kernel.sleep(30 * MS)
        vcpu = yield from self._begin("unbind")
        disk.unbind(vcpu)
        vcpu = yield from self._begin("bind")
        disk.bind(vcpu)
        yield from self._done(self._load(1, 10))
        vcpu = yield from self._begin("remove")
        parent = disk.transport
        parent.unbind(vcpu)
        vcpu = yield from self._begin("add")
        parent.bind(vcpu)
        yield from self._done(self._load(1, 10))
        yield from self._done(self._load(3, 10))
        vcpu = yield from self._begin("control")
        kernel.network[0].set_promiscuous(vcpu, True)
        kernel.network[0].set_promiscuous(vcpu, False)
        vcpu = yield from self._begin("end")
        kernel.shut_down(vcpu)
        return 0


def _watch(
    patch: pytest.MonkeyPatch, script: Script, rows: list[Row], name: Callable[[int], str]
) -> None:
    read, write, enter, end = Vcpu.read, Vcpu.write, Vcpu.enter, Vcpu._end
    inp, outp, interrupt = Vcpu.inp, Vcpu.outp, script.kernel.interrupt
    ram, notes = script.machine.memory.size, Notes()

    def note(vcpu: Vcpu, kind: str, name: str, size: int | None, value: Any) -> None:
        rows.append(Row(script.phase, vcpu.index, kind, name, size, value))

    def watched_read(vcpu: Vcpu, address: int, size: int) -> int:
        value = read(vcpu, address, size)
        if address >= ram:
            note(vcpu, "read", name(address), size, value)
        elif place := notes.place(address):
            note(vcpu, "load", place, size, value)
        return value

    def watched_write(vcpu: Vcpu, address: int, size: int, value: int) -> None:
        if address >= ram and address != EOI_ADDRESS:
            notes.wrote(name(address), value)
            note(vcpu, "write", name(address), size, value)
        elif place := notes.place(address):
            note(vcpu, notes.stored(address, size, value), place, size, value)
        write(vcpu, address, size, value)

    def watched_end(vcpu: Vcpu) -> None:
        note(vcpu, "write", notes.end(vcpu.index, "LAPIC.EOI"), 4, 0)
        end(vcpu)

    def watched_inp(vcpu: Vcpu, port: int, size: int) -> int:
        value = inp(vcpu, port, size)
        if port in PicPair.PORTS:
            note(vcpu, "read", f"PIC.{port:#x}", size, value)
        return value

    def watched_outp(vcpu: Vcpu, port: int, size: int, value: int) -> None:
        if port in PicPair.PORTS:
            note(vcpu, "write", f"PIC.{port:#x}", size, value)
        outp(vcpu, port, size, value)

    def watched_enter(vcpu: Vcpu, function: str, argument: int = 0) -> None:
        if function == "native_apic_mem_eoi":
            note(vcpu, "function", notes.end(vcpu.index, function), None, None)
        else:
            note(vcpu, "function", function, None, None)
        enter(vcpu, function, argument)

    def watched_interrupt(vcpu: Vcpu, vector: int) -> None:
        notes.taken[vcpu.index] = vector
        if vector in DEVICE_VECTORS:
            note(vcpu, "deliver", "device", None, vector)
        interrupt(vcpu, vector)

    watched: dict[str, Callable[..., Any]] = {
        "read": watched_read, "write": watched_write, "_end": watched_end,
        "inp": watched_inp, "outp": watched_outp, "enter": watched_enter,
    }  # fmt: skip
    for method, instead in watched.items():
        patch.setattr(Vcpu, method, instead)
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
            vcpu, value = row.vcpu, row.value
            for entry in DIFFERENCES:
                if entry.left_out(row):
                    self.used.add(entry)
                    break
                if entry.any_value(row):
                    self.used.add(entry)
                    value = "any"
                if entry.any_cpu(row):
                    self.used.add(entry)
                    vcpu = None
            else:
                found.append(Row(row.phase, vcpu, row.kind, row.name, row.size, value))
        return found


_guests: dict[Transport, Guests] = {}


@pytest.fixture(params=list(Transport))
def guests(request: pytest.FixtureRequest) -> Guests:
    return _of(request.param)


def _what(row: Row) -> tuple[Any, ...]:
    return (row.vcpu, row.kind, row.name, row.size, row.value)


def _accesses(rows: list[Row], device: str, phase: str) -> list[tuple[Any, ...]]:
    """Those to ``device``, in order; each CPU has a local APIC of its own."""
    found = [
        _what(row)
        for row in rows
        if row.device == device and row.phase == phase and row.size is not None
    ]
    return sorted(found, key=lambda what: what[0] or 0) if device == "LAPIC" else found


def _order(rows: list[Row], vcpu: int | None, phase: str) -> list[tuple[Any, ...]]:
    """All that ``vcpu`` does, in order."""
    return [_what(row) for row in rows if row.vcpu == vcpu and row.phase == phase]


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


def test_each_cpu_does_all_that_it_does_in_the_same_order(guests: Guests) -> None:
    for phase in PHASES:
        for vcpu in (None, *range(4)):
            expected = _order(guests.real, vcpu, phase)
            assert _order(guests.model, vcpu, phase) == expected, (phase, vcpu)


def test_the_kernel_goes_through_the_same_functions_in_the_same_order(guests: Guests) -> None:
    for phase in PHASES:

        def entered(rows: list[Row], phase: str = phase) -> list[tuple[Any, ...]]:
            return [(r.vcpu, r.name) for r in rows if r.kind == "function" and r.phase == phase]

        assert entered(guests.model) == entered(guests.real), phase


def test_the_recordings_are_long_enough_to_mean_something(guests: Guests) -> None:
    taken = [row for row in guests.real if row.kind == "deliver" and row.phase == "interrupts"]
    assert len(taken) >= 1000
    assert len(guests.real) > 4000


def _stage_all(self: MsiVectors, *what: Any) -> None:
    self.forget()
    self._command(*what)


def _end_twice(self: Vcpu) -> None:
    self._end()
    self._end()


def _entry_by_halves(self: Storage, vcpu: Vcpu, vector: int, address: int, data: int) -> None:
    at = self.entries_at + 8 * vector
    vcpu.write(at, 4, address)
    vcpu.write(at + 4, 4, data)
    self._update(vcpu, vector, CACHED_ENTRY)


def _pending_before_mask(self: Storage, vcpu: Vcpu, vector: int) -> bool:
    pending = vcpu.read(self.pending_at + vector, 1) & 1
    if pending:
        vcpu.write(self.pending_at + vector, 1, 0)
    vcpu.write(self.mask_at + vector, 1, 0)
    self._update(vcpu, vector, CACHED_MASK)
    return bool(pending)


def _mask_after_unmask(self: Storage, vcpu: Vcpu, vector: int) -> None:
    vcpu.write(self.mask_at + vector, 1, 0)
    vcpu.write(self.mask_at + vector, 1, 1)
    self._update(vcpu, vector, CACHED_MASK)


def _mask_by_the_first(self: MmioChip, vcpu: Vcpu) -> None:
    first = self.kernel.machine.vcpus[0]
    first.enter("vm_msi_irq_mask")
    self._mask(first)


STORAGE = (Transport.VIS, Transport.VIS_DOORBELL)
MUTANTS: dict[str, tuple[Transport | tuple[Transport, ...], Any, str, Any]] = {
    "an interrupt is ended twice": (tuple(Transport), Vcpu, "eoi", _end_twice),
    "the 8259s stay as they are": (tuple(Transport), bringup, "PIC_MASKS", ()),
    "a storage's entry is written by halves": (
        STORAGE, Storage, "set_entry", _entry_by_halves,
    ),
    "a pending byte is looked at, and cleared, before the mask is": (
        STORAGE, Storage, "unmask", _pending_before_mask,
    ),
    "a mask byte is cleared before it is set": (STORAGE, Storage, "mask", _mask_after_unmask),
    "a mask byte is not set": (
        STORAGE, Storage, "mask",
        lambda self, vcpu, vector: self._update(vcpu, vector, CACHED_MASK),
    ),
    "a vector is masked by another CPU": (Transport.MSI, MmioChip, "mask", _mask_by_the_first),
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
        lambda self, vcpu, vector: vcpu.write(self.mask_at + vector, 1, 0),
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


def _cases() -> Iterator[tuple[str, Transport]]:
    for name, (where, *_) in MUTANTS.items():
        for transport in where if isinstance(where, tuple) else (where,):
            yield name, transport


@pytest.mark.parametrize(("name", "transport"), list(_cases()))
def test_a_model_that_does_otherwise_is_found_out(
    monkeypatch: pytest.MonkeyPatch, name: str, transport: Transport
) -> None:
    _, owner, attribute, instead = MUTANTS[name]
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
    if transport not in _guests:
        _guests[transport] = Guests(transport)
    return _guests[transport]
