# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's kernel: it boots, takes interrupts, and has tasks, disks and a network.

It is a model of what Linux 6.12 does to hardware and to memory that devices share, in
order; what it does besides is not there. tests/emulated/test_guest_accesses.py holds it
against recordings of the real one and lists where it differs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...transport import Transport
from ...x86 import Apic as ApicMode
from . import bringup
from .apic import Apic, Vector, XApic
from .chips import IoApicChip
from .drivers import DRIVERS, PROBE_ORDER, NetDriver
from .irq import IrqDesc, Irqs
from .probe_pci import Function, probe
from .ring import Pages
from .tasks import CYCLES_PER_NS, YIELDED, Scheduler, Task, Timers, Wait, Work
from .virtio import Driver, Parent, VirtioDevice
from .virtio_mmio import MmioParent
from .virtio_pci import PciParent

if TYPE_CHECKING:
    from ..machine import Attached, Machine
    from ..vcpu import Vcpu
    from .disk import Disk

__all__ = ["Kernel"]

IOAPICS = (0xFEC00000, 0xFEC10000)
PINS = 24
FIRST_IRQ = 48  # numbers below are those of the IOAPICs' pins, which ACPI does not use
GED, SERIAL, RTC, INTX = 9, 4, 8, 16  # global system interrupts
VERSION = "6.12.107-qvis"
STATISTICS = ("LOC", "SPU", "RES", "CAL", "ERR")


class Kernel:
    """Linux on ``machine``. :meth:`boot` starts it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.memory = machine.memory
        self.cpus = tuple(range(len(machine.vcpus)))
        self.on_log: list[Callable[[str], object]] = []
        """Told of each new line of :attr:`log`."""
        self._finished: Callable[[], None] | None = None
        self._start_over()

    def _start_over(self) -> None:
        machine = self.machine
        xapic = machine.config.platform.apic is ApicMode.XAPIC
        self.apic = XApic() if xapic else Apic()
        self.online: frozenset[int] = frozenset(self.cpus)
        self.running: Vcpu | None = None
        """The CPU whose code runs at this moment, as far as it is a task's."""
        self.current: Task | None = None
        self.log: list[str] = []
        """What dmesg prints."""
        self.failures: list[Exception] = []
        """What tasks failed with: faults of this model's own."""
        self.pages = Pages(self.memory)
        self.scheduler = Scheduler(self)
        self.timers = Timers(self)
        self.irqs = Irqs(self, FIRST_IRQ)
        self.statistics: dict[str, list[int]] = {name: [0] * len(self.cpus) for name in STATISTICS}
        """What /proc/interrupts shows below the interrupts of devices, by CPU."""
        self.devices: dict[str, VirtioDevice] = {}
        self.parents: dict[str, Parent] = {}
        """Platform devices and PCI functions, by name."""
        self.bridges: list[Function] = []
        """PCI functions that are no device."""
        self.disks: dict[str, Disk] = {}
        self.drivers: dict[int, Callable[[VirtioDevice], Driver]] = DRIVERS
        self.drivers_ready = False
        """Whether a new device is given its driver at once."""
        self.booted = False
        self._found = False  # devices were looked for
        self._late: list[Attached] = []
        self._gsis: dict[int, IrqDesc] = {}
        self._calls: list[deque[tuple[Callable[..., Any], tuple[Any, ...]]]] = [
            deque() for _ in self.cpus
        ]
        self._came_up = Wait()
        self._up = 1
        self._entries = self.irqs.entries
        for entries in self._entries:
            entries[Vector.TIMER] = self._timer
            entries[Vector.CALL_FUNCTION_SINGLE] = self._call_function
            entries[Vector.CALL_FUNCTION] = self._call_function
            entries[Vector.RESCHEDULE] = self._reschedule
            entries[Vector.ERROR] = self._error
            entries[Vector.SPURIOUS] = self._spurious

    # What the machine wants of a guest.

    def interrupt(self, vcpu: Vcpu, vector: int) -> None:
        """``vcpu`` takes ``vector``."""
        self._entries[vcpu.index][vector](vcpu)

    def reset(self) -> None:
        """Start over, if it had been started."""
        self._start_over()
        if self._finished is not None:
            self.boot(self._finished)

    def startup(self, vcpu: Vcpu, vector: int) -> None:
        """Another processor tells this one to start."""
        if vcpu.index and vcpu.index not in self._started:
            self._started.add(vcpu.index)
            vcpu.call(self._start_processor, vcpu)

    def plugged(self, attached: Attached) -> None:
        """A device was put in."""
        if self.booted:
            vcpu = self.machine.vcpus[0]
            vcpu.call(self._probe_new, vcpu, attached)
        elif self._found:  # too late to be found with the others
            self._late.append(attached)

    def unplugged(self, attached: Attached) -> None:
        """A device is taken out: its drivers are told, when it is gone."""
        if attached in self._late:
            self._late.remove(attached)
        for parent in list(self.parents.values()):
            if parent.attached is attached:
                vcpu = self.machine.vcpus[0]
                vcpu.call(self._remove, vcpu, parent)

    # What the rest of the guest wants.

    def now(self, vcpu: Vcpu | None = None) -> int:
        """ns since the machine was switched on."""
        vcpu = vcpu or self.running
        clock = self.machine.events.now if vcpu is None else vcpu.clock
        return clock // CYCLES_PER_NS

    def say(self, text: str) -> None:
        """A line for dmesg."""
        line = f"[{self.now() / 1e9:12.6f}] {text}"
        self.log.append(line)
        for told in self.on_log:
            told(line)

    def spawn(self, work: Work, cpu: int | None = None, name: str = "task") -> Task:
        """A task that does ``work``, on ``cpu`` if it has to be that one."""
        return self.scheduler.spawn(work, cpu, name)

    def vcpu_of(self, task: Task) -> Vcpu:
        """Where ``task`` runs."""
        return task.vcpu

    def sleep(self, ns: int) -> Wait:
        """Woken in ``ns``. A task that sleeps for none lets others run."""
        wait = Wait()
        vcpu = self.running or self.machine.vcpus[0]
        if ns <= 0:
            vcpu.spend(YIELDED if vcpu is self.running else 0)
            vcpu.call(wait.wake, None, vcpu)
        elif vcpu is self.running:
            self._wake_in(vcpu, ns, wait)
        else:
            vcpu.call(self._wake_in, vcpu, ns, wait)
        return wait

    def _wake_in(self, vcpu: Vcpu, ns: int, wait: Wait) -> None:
        self.timers.add(vcpu, self.now(vcpu) + ns, lambda vcpu: wait.wake(None, vcpu))

    def call_on(
        self, vcpu: Vcpu, other: Vcpu, function: Callable[..., Any], *arguments: Any
    ) -> None:
        """Have ``other`` call ``function(*arguments, other)``, by an IPI of ``vcpu``'s."""
        calls = self._calls[other.index]
        calls.append((function, arguments))
        if len(calls) == 1:
            self.apic.ipi(vcpu, other.apic.id, Vector.CALL_FUNCTION_SINGLE)

    def shut_down(self, vcpu: Vcpu) -> None:
        """What Linux does before it resets the machine or switches it off."""
        for parent in reversed(list(self.parents.values())):
            parent.shut_down(vcpu)
        ged = self._gsis.get(GED)
        if ged is not None and ged.actions:
            ged.free(vcpu, "ACPI:Ged")
        bringup.clear_ioapics(vcpu, IOAPICS)

    def gsi(self, number: int, *, level: bool = True) -> IrqDesc:
        """The interrupt of a global system interrupt, which several devices may share."""
        desc = self._gsis.get(number)
        if desc is None:
            base = IOAPICS[number // PINS]
            desc = self.irqs.create(IoApicChip(self, base, number % PINS, level=level))
            self._gsis[number] = desc
        return desc

    def intx(self, where: int) -> IrqDesc:
        """The line of a PCI function."""
        return self.gsi(INTX + (where >> 3) % 4)

    @property
    def gsis(self) -> dict[int, IrqDesc]:
        """Interrupts that are pins of IOAPICs, by global system interrupt."""
        return self._gsis

    @property
    def network(self) -> list[NetDriver]:
        """Drivers of network cards: eth0, eth1, ..."""
        return [d.driving for d in self.devices.values() if isinstance(d.driving, NetDriver)]

    # Interrupts that are no device's (arch/x86/kernel/apic/apic.c, smp.c).

    def _eoi(self, vcpu: Vcpu, statistic: str) -> None:
        self.statistics[statistic][vcpu.index] += 1
        if not self.apic.deadline:
            vcpu.enter("native_apic_mem_eoi")
        vcpu.eoi()

    def _timer(self, vcpu: Vcpu) -> None:
        self._eoi(vcpu, "LOC")
        self.timers.expired(vcpu)

    def _call_function(self, vcpu: Vcpu) -> None:
        self._eoi(vcpu, "CAL")
        calls = self._calls[vcpu.index]
        while calls:
            function, arguments = calls.popleft()
            function(*arguments, vcpu)

    def _reschedule(self, vcpu: Vcpu) -> None:
        self._eoi(vcpu, "RES")
        self.scheduler.rescheduled(vcpu)
        self.timers.look(vcpu)

    def _error(self, vcpu: Vcpu) -> None:
        self._eoi(vcpu, "ERR")

    def _spurious(self, vcpu: Vcpu) -> None:
        self.statistics["SPU"][vcpu.index] += 1  # it is not in service: no EOI

    # Boot

    def boot(self, finished: Callable[[], None]) -> None:
        """Start the kernel on the first CPU; ``finished()`` when it would start init."""
        self._finished = finished
        self._started: set[int] = set()
        self.spawn(self._boot(finished), 0, "swapper")

    def _boot(self, finished: Callable[[], None]) -> Work:
        vcpu, machine = self.machine.vcpus[0], self.machine
        self.say(f"Linux version {VERSION} (qvis@qvis) #1 SMP 1970-01-01")
        self.say(f"Kernel command line: {bringup.COMMAND_LINE}")
        bringup.first_processor(vcpu, self.apic, IOAPICS, self._pv_eoi(vcpu))
        for other in machine.vcpus[1:]:
            for _ in self.apic.wake(vcpu, other.apic.id):
                vcpu.spend(bringup.INIT_DELAY)
        while self._up < len(self.cpus):
            yield self._came_up
        self.say(f"smp: Brought up 1 node, {len(self.cpus)} CPUs")
        bringup.one_shot(vcpu, self.apic)
        self._find_devices(vcpu)
        for parent in list(self.parents.values()):
            self._bind(vcpu, parent)
        yield None
        for kind in PROBE_ORDER:
            for device in list(self.devices.values()):
                if device.kind == kind:
                    device.bind(vcpu, quiet=True)
                    yield None
        self.drivers_ready = True
        self._request(vcpu, RTC, "rtc0")
        self._request(vcpu, SERIAL, "ttyS0")
        self.booted = True
        for attached in self._late:
            self._probe_new(vcpu, attached)
        for card in self.network:
            card.open(vcpu)
        finished()
        return 0

    def _pv_eoi(self, vcpu: Vcpu) -> int:
        """Where a CPU's paravirtual EOI is; 0 if it has none."""
        if not self.machine.config.platform.pv_eoi:
            return 0
        return self.pages.take(4)

    def _start_processor(self, vcpu: Vcpu) -> None:
        bringup.other_processor(vcpu, self.apic, self._pv_eoi(vcpu))
        self.call_on(vcpu, self.machine.vcpus[0], self._is_up)

    def _is_up(self, vcpu: Vcpu) -> None:
        self._up += 1
        self._came_up.wake(None, vcpu)

    def _find_devices(self, vcpu: Vcpu) -> None:
        """What ACPI and the PCI bus tell of, and interrupts that have a number from then on."""
        machine = self.machine
        self._found = True
        self.gsi(GED, level=False)
        if machine.config.transport is not Transport.PCI:
            self._request(vcpu, GED, "ACPI:Ged")
            for number, attached in enumerate(machine.devices.values()):
                self._add(MmioParent(self, attached, f"LNRO0005:{number:02x}"))
            self.gsi(SERIAL, level=False)
            self.gsi(RTC, level=False)
            return
        at = {attached.start: attached for attached in machine.devices.values()}
        buses = sorted({0} | {attached.slot >> 8 for attached in at.values()})
        functions = probe(vcpu, buses)
        self._request(vcpu, GED, "ACPI:Ged")
        self.gsi(SERIAL, level=False)
        self.gsi(RTC, level=False)
        for function in functions:
            if function.config in at:
                self._add(PciParent(self, at[function.config], function))
            else:
                self.bridges.append(function)

    def _request(self, vcpu: Vcpu, gsi: int, name: str) -> None:
        """The interrupt of a device that is not modelled any further."""
        try:
            self.gsi(gsi, level=False).request(vcpu, name, _ignore)
        except OSError as problem:
            self.say(f"{name}: no interrupt: {problem.strerror}")

    def _add(self, parent: Parent) -> None:
        self.parents[parent.name] = parent

    def _bind(self, vcpu: Vcpu, parent: Parent) -> None:
        try:
            parent.bind(vcpu)
        except OSError as problem:
            self.say(f"{parent.transport_driver} {parent.name}: {problem.strerror}")

    def _probe_new(self, vcpu: Vcpu, attached: Attached) -> None:
        if self.machine.config.transport is Transport.PCI:
            used = [p.function for p in self.parents.values() if isinstance(p, PciParent)]
            function = Function.place(vcpu, attached.start, used)
            if function is None:
                return
            parent: Parent = PciParent(self, attached, function)
        else:
            number = 0
            while f"LNRO0005:{number:02x}" in self.parents:
                number += 1
            parent = MmioParent(self, attached, f"LNRO0005:{number:02x}")
        self._add(parent)
        self._bind(vcpu, parent)

    def _remove(self, vcpu: Vcpu, parent: Parent) -> None:
        if parent.bound:
            parent.unbind(vcpu)
        self.parents.pop(parent.name, None)


def _ignore(vcpu: Vcpu, irq: int) -> None:
    """The handler of a device that is not modelled."""
