# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine: processors, interrupt controllers, memory and devices, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from ..errors import UsageError
from ..transport import VECTORS, Transport
from ..x86 import Apic, Irqchip
from .config import Config, DeviceSpec
from .costs import Costs
from .devices import Block, Console, Device, Net, Rng
from .events import Events
from .ioapic import KVMS_VERSION, VERSION_WITH_EOI, IoApic
from .irqchip import Exit, Rules, check_platform
from .lapic import LocalApic
from .memory import Memory
from .messages import ApicBus, Delivery
from .mmio import EmptySlot, MmioTransport
from .pci import PciBus
from .pic import PicPair
from .places import (
    ECAM,
    ECAM_SIZE,
    IOAPICS,
    LAPIC,
    LAPIC_END,
    LAPIC_PAGE,
    LINES,
    MIB,
    MMIO_SLOTS,
    MOST_SLOTS,
    NOTHING,
    ONES,
    PCI_NOTIFY,
    PCI_NOTIFY_BAR,
    SLOT_SIZE,
    WINDOWS,
    Messages,
    Place,
    regions,
    slot_address,
)
from .ports import Port, Ports
from .recorder import Counts, Recorder, RowKind, what
from .vcpu import Vcpu
from .virtio_pci import VirtioPci

__all__ = ["Attached", "Guest", "Machine", "check"]

LEAST_MEMORY, MOST_MEMORY = 16, 3072  # MiB; above that is PCI's window
MOST_VCPUS = 4096
PAGE = 9  # bits of an address that :attr:`Machine.places` leaves out
NOTIFY = range(0x50, 0x54)  # QueueNotify: virtio 1.3, 4.2.2
STEPS = 64  # events that are done before a look at the host's clock
RAISE = what(RowKind.RAISE)
QUEUES = range(1, 1024)


class Guest(Protocol):
    """What runs on a machine.

    It may have more: ``startup(vcpu, vector)``, ``init(vcpu)``, ``nmi(vcpu)`` for what another
    processor or a device does to a vCPU; ``powerdown()``; ``plugged(attached)`` and
    ``unplugged(attached)``.
    """

    def interrupt(self, vcpu: Vcpu, vector: int) -> None:
        """``vcpu`` takes ``vector``, as if entered through the IDT; EOI is the guest's to do."""

    def reset(self) -> None:
        """The machine was reset: memory is clear, start over."""


@dataclass(eq=False)
class Attached:
    """A virtio device in its place."""

    id: str
    spec: DeviceSpec
    device: Device
    transport: Any
    """:class:`~qvis.emulated.mmio.MmioTransport` or :class:`~qvis.emulated.pci.PciFunction`."""
    slot: int
    """Of virtio-mmio; with PCI bus << 8 | device << 3 | function."""
    start: int
    """The first address of its registers; with PCI of its configuration space."""
    end: int
    """The first address behind them."""
    line: int
    """Its GSI; with PCI -1."""


class Machine:
    """The machine of ``config``, switched on; it does nothing until it is given a guest.

    Raises :class:`UsageError` for a configuration that cannot be.
    """

    def __init__(self, config: Config, costs: Costs | None = None) -> None:
        check(config)
        self.config = config
        self.costs = costs or Costs.load()
        self.events = Events()
        self.memory = Memory(config.memory * MIB)
        self.rules = Rules(config.platform, self.costs)
        self.bus = ApicBus()
        # KVM has one of its own, if any; microvm's second is always QEMU's.
        first = KVMS_VERSION if config.platform.irqchip is Irqchip.ON else VERSION_WITH_EOI
        self.ioapics = [IoApic(self.bus, LINES, version=v) for v in (first, VERSION_WITH_EOI)]
        self.pic = PicPair()
        self.bus.pic = self.pic
        self.ports = Ports(self.rules, self.pic)
        self.port: Callable[[int], tuple[Exit, Port]] = self.ports.find
        """Which exit an access to a port is, and who is there."""
        self.guest: Guest | None = None
        self.recorder: Recorder | None = None
        self.status = "running"
        """running, paused or shutdown, as QMP's query-status has it."""
        self.on_event: list[Callable[[str, dict[str, Any]], None]] = []
        """Told of what QMP has events for: name and data."""
        self.devices: dict[str, Attached] = {}
        self.places: dict[int, Place] = {}
        """What is where, by address >> 9; :meth:`find` knows the rest."""
        self.pci: PciBus | None = None
        off = config.platform.irqchip is Irqchip.OFF
        self.signal = self.costs.step("signal" if off else "notify")
        """Modelled cycles from a local APIC to its vCPU."""
        self.latency = 0 if config.at_once else self._latency()
        """Modelled cycles from the kick of a queue to what a device does, interrupt included."""
        self.vcpus = [self._vcpu(index) for index in range(config.smp)]
        self.pic.intr = self._pic_line
        self._slots: dict[int, Attached] = {}
        self._mapped: list[int] = []  # pages of PCI functions' registers in places
        self._held: dict[int, int] = {}  # by line: how many devices hold it
        self._map()
        for spec in config.devices:
            self._attach(spec)

    def _vcpu(self, index: int) -> Vcpu:
        platform = self.config.platform
        apic = LocalApic(index, self.bus, self.events)
        # arch/x86/kvm/lapic.c, kvm_apic_set_version()
        apic.directed_eoi = platform.irqchip is Irqchip.SPLIT and platform.apic is Apic.X2APIC
        vcpu = Vcpu(index, apic, self)

        def signal(delivery: Delivery, vector: int) -> None:
            if delivery is Delivery.STARTUP:
                self.ask("startup", vcpu, vector)
            elif delivery is Delivery.INIT:
                self.ask("init", vcpu)
            elif delivery is Delivery.NMI:
                self.ask("nmi", vcpu)

        apic.signal = signal
        return vcpu

    def _latency(self) -> int:
        """Of the kick, the device, and its interrupt, up to the local APIC.

        Devices are in QEMU's main loop: virtio_notify() uses irqfds in IOThreads only.
        """
        return sum(map(self.costs.step, ("ioeventfd", "service", "line")))

    # What is where.

    def _map(self) -> None:
        rules = self.rules
        exits = (rules.ioapic, rules.device)
        for start, ioapic, exit_ in zip(IOAPICS, self.ioapics, exits, strict=True):
            self._place(Place(start, ioapic, exit_), 4096)
        for slot in range(MMIO_SLOTS):
            self._place(Place(slot_address(slot), EmptySlot(), rules.device), SLOT_SIZE)
        self._nothing = Place(0, NOTHING, rules.device)
        self._messages = Place(LAPIC, Messages(self.bus.msi), rules.device)
        self._ones = Place(0, ONES, rules.device)
        if self.config.transport is Transport.PCI:
            self.pci = PciBus()
            self._ecam = Place(ECAM, self, rules.device)

    def _place(self, place: Place, size: int) -> None:
        for at in range(place.start, place.start + size, 1 << PAGE):
            self.places[at >> PAGE] = place

    def find(self, address: int) -> Place:
        """What is at an address that is neither RAM nor in :attr:`places`."""
        if LAPIC_PAGE <= address < LAPIC_END:
            return self._messages
        if self.pci is None:
            return self._nothing
        if ECAM <= address < ECAM + ECAM_SIZE:
            return self._ecam
        bar = self.pci.find(address)
        if bar is not None and bar.start is not None:
            notify = None if self.config.at_once else self.rules.notify_by_address
            at = PCI_NOTIFY if bar.number == PCI_NOTIFY_BAR else range(0)
            place = Place(bar.start, bar, self.rules.device, notify, at)
            # Only this page: BARs may be put on top of each other.
            self.places[address >> PAGE] = place
            self._mapped.append(address >> PAGE)
            return place
        if any(address in window for window in WINDOWS):
            return self._ones
        return self._nothing

    def read(self, offset: int, size: int) -> int:
        """PCI's configuration space, by its offset in the ECAM."""
        assert self.pci is not None
        return self.pci.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """The same, written."""
        assert self.pci is not None
        self.pci.write(offset, size, value)
        self._unmap()

    def _unmap(self) -> None:
        """Forget where functions' registers are: they may have moved."""
        for page in self._mapped:
            del self.places[page]
        self._mapped.clear()

    def regions(self) -> list[tuple[str, str, str, int, int]]:
        """What is no RAM: (name, owner, "memory" or "port", first address, the one behind).

        Name and owner are those of QEMU's ``info mtree -o``, the latter "id=..." or "path=...".
        """
        return sorted(regions(self), key=lambda region: region[2:])

    # Running.

    def run_slice(self, seconds: float, leap: int | None = None) -> bool:
        """Do what is due for about ``seconds`` of the host's time; whether more is due.

        With ``leap`` nothing that is more than so many modelled cycles away.
        """
        if self.status != "running":
            return False
        events, until = self.events, perf_counter() + seconds
        while events.run(STEPS, leap=leap) == STEPS and self.status == "running":
            if perf_counter() >= until:
                break
        if self.status != "running" or events.next is None:
            return False
        return leap is None or events.next - events.now <= leap

    def stop(self) -> None:
        """Pause: time stands still."""
        if self.status == "running":
            self.status = "paused"
            self._tell("STOP")

    def cont(self) -> None:
        """Go on after :meth:`stop`."""
        if self.status == "paused":
            self.status = "running"
            self._tell("RESUME")

    def reset(self, *, guest: bool = False) -> None:
        """As if switched off and on; ``guest``: because the guest wants it."""
        if any(vcpu.running for vcpu in self.vcpus):
            self.events.at(self.events.now, self._reset, guest)
        else:
            self._reset(guest)

    def _reset(self, guest: bool) -> None:
        self.memory.clear()
        for vcpu in self.vcpus:
            vcpu.reset()
            vcpu.apic.reset()
        for ioapic in self.ioapics:
            ioapic.reset()
        self.pic.reset()
        self.ports.serial.reset()
        for attached in self.devices.values():
            attached.transport.reset()
        self._unmap()
        reason = "guest-reset" if guest else "host-qmp-system-reset"
        self._tell("RESET", guest=guest, reason=reason)
        if self.guest is not None:
            self.guest.reset()

    def powerdown(self) -> None:
        """Press the power button: the guest may shut down, or not."""
        self._tell("POWERDOWN")
        self.ask("powerdown")

    def shutdown(self, reason: str = "guest-shutdown") -> None:
        """Switch off, for QEMU's ``reason`` (ShutdownCause in qapi/run-state.json)."""
        if self.status != "shutdown":
            self.status = "shutdown"
            self._tell("SHUTDOWN", guest=reason.startswith("guest"), reason=reason)

    def _tell(self, event: str, **data: Any) -> None:
        for told in list(self.on_event):
            told(event, data)

    def ask(self, what_: str, *arguments: Any) -> None:
        """Call that of the guest, if there is one and it has it (see :class:`Guest`)."""
        if (found := getattr(self.guest, what_, None)) is not None:
            found(*arguments)

    def _pic_line(self, level: bool) -> None:
        vcpu = self.vcpus[0]
        vcpu.asked = level
        vcpu.apic.lint(0, level)
        if level:
            vcpu.wake()

    # Devices.

    def plug(self, spec: DeviceSpec) -> Attached:
        """Put a device in; :class:`UsageError` when its ID is taken or there is no room."""
        attached = self._attach(spec)
        self.ask("plugged", attached)
        return attached

    def unplug(self, id: str) -> None:
        """Take it out, as by surprise; :class:`UsageError` when there is none of that ID."""
        attached = self.devices.get(id)
        if attached is None:
            raise UsageError(f"there is no device {id!r}")
        self.ask("unplugged", attached)
        attached.transport.reset()
        del self.devices[id], self._slots[attached.slot]
        if self.pci is not None:
            self.pci.remove(attached.slot)
            self._unmap()
        else:
            empty = Place(attached.start, EmptySlot(), self.rules.device)
            if attached.slot < MMIO_SLOTS:
                self._place(empty, SLOT_SIZE)
            else:
                del self.places[attached.start >> PAGE]
        self._tell("DEVICE_DELETED", device=id, path=f"/machine/peripheral/{id}")

    def _attach(self, spec: DeviceSpec) -> Attached:
        if spec.id in self.devices:
            raise UsageError(f"there is a device {spec.id!r} already")
        device = self._device(spec)
        attached = self._on_mmio(spec, device) if self.pci is None else self._on_pci(spec, device)
        self.devices[spec.id] = self._slots[attached.slot] = attached
        return attached

    def _device(self, spec: DeviceSpec) -> Device:
        if spec.queues not in QUEUES:
            raise UsageError(f"a device has 1 to {QUEUES.stop - 1} queues, not {spec.queues}")
        events, memory = self.events, self.memory
        device: Device
        if spec.kind == "blk":
            device = Block(events, memory, num_queues=spec.queues)
        elif spec.kind == "net":
            device = Net(events, memory, pairs=spec.queues)
        elif spec.kind == "rng":
            device = Rng(events, memory)
        elif spec.kind == "console":
            device = Console(events, memory)
        else:
            raise UsageError(f"unknown kind of device {spec.kind!r}: blk, net, rng or console")
        latency = self.latency
        device.latency = lambda: latency
        return device

    def _on_mmio(self, spec: DeviceSpec, device: Device) -> Attached:
        # Linux looks for devices from the last slot that QEMU has down, so that is the first.
        free = (slot for slot in (*range(MMIO_SLOTS - 1, -1, -1), *range(MMIO_SLOTS, MOST_SLOTS))
                if slot not in self._slots)  # fmt: skip
        slot = next(free, None)
        if slot is None:
            raise UsageError(f"no room for {spec.id!r}: there are {MOST_SLOTS} slots")
        transport = self.config.transport
        queues = len(device.queues)
        start, pin = slot_address(slot), slot % LINES
        at = MmioTransport(
            device,
            self.memory,
            self._line(pin),
            self.bus.msi,
            vectors=max(VECTORS, queues + 1) if transport.vector_per_queue else 0,
            msi_feature=transport.vector_per_queue,
            vis=transport.storage,
            cache_entries=transport is Transport.VIS_DOORBELL,
        )
        notify = None if self.config.at_once else self.rules.notify
        self._place(Place(start, at, self.rules.device, notify, NOTIFY), SLOT_SIZE)
        return Attached(spec.id, spec, device, at, slot, start, start + SLOT_SIZE, LINES + pin)

    def _on_pci(self, spec: DeviceSpec, device: Device) -> Attached:
        assert self.pci is not None
        where = next(
            where for number in count() if (where := PciBus.place(number)) not in self._slots
        )
        start = ECAM + (where << 12)
        if start >= ECAM + ECAM_SIZE:
            raise UsageError(f"no room for {spec.id!r}: the PCI bus is full")
        function = VirtioPci(device, self.bus.msi)
        self.pci.add(function, where)
        return Attached(spec.id, spec, device, function, where, start, start + 4096, -1)

    def _line(self, pin: int) -> Callable[[bool], None]:
        """What drives a line of the second IOAPIC for one device of those that share it."""
        ioapic, held = self.ioapics[1], self._held
        mine = False

        def drive(level: bool) -> None:
            nonlocal mine
            if level != mine:
                mine = level
                held[pin] = held.get(pin, 0) + (1 if level else -1)
                ioapic.set_line(pin, held[pin] > 0)

        return drive

    # Recording.

    def record(self, folder: Path) -> None:
        """Write down what happens from now on, into ``folder``; :meth:`stop_recording` ends it."""
        self.recorder = recorder = Recorder(folder)
        add, events = recorder.add, self.events
        for vcpu in self.vcpus:
            vcpu.record(add)

        def accepted(apic: LocalApic, vector: int, level: bool) -> None:
            add((RAISE, apic.index, events.now, 0, vector, 0))

        self.bus.on_accept = accepted

    def flush(self, floor: int) -> None:
        """Have the recorder write, if it is time. Nothing happens before ``floor`` any more."""
        if self.recorder is not None and self.recorder.due():
            for vcpu in self.vcpus:
                vcpu.settle(floor)
            self.recorder.flush(floor)

    def stop_recording(self) -> Counts:
        """End it; how much was recorded."""
        recorder = self.recorder
        if recorder is None:
            return Counts(0, 0, 0)
        self.recorder = self.bus.on_accept = None
        for vcpu in self.vcpus:
            vcpu.settle(vcpu.clock)
            vcpu.record(None)
        return recorder.stop(self.events.now)


def check(config: Config) -> None:
    """Raise :class:`UsageError` for a machine that cannot be."""
    check_platform(config.platform)
    if not 1 <= config.smp <= MOST_VCPUS:
        raise UsageError(f"a machine has 1 to {MOST_VCPUS} vCPUs, not {config.smp}")
    if not LEAST_MEMORY <= config.memory <= MOST_MEMORY:
        raise UsageError(f"a machine has {LEAST_MEMORY} to {MOST_MEMORY} MiB, not {config.memory}")
    if config.platform.irqchip is Irqchip.ON and config.transport is Transport.INTX:
        raise UsageError(
            "over intx the interrupt controllers cannot all be in KVM: devices' lines are those of "
            "QEMU's second IOAPIC, which KVM tells of no EOI"
        )
    if config.smp > 255 and config.platform.apic is Apic.XAPIC:
        raise UsageError(f"an xAPIC has 8 bits for an ID: not enough for {config.smp} vCPUs")
