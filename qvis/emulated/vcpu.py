# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU: what its guest does, what of that exits, and how interrupts reach it.

A guest's code is Python that is given a vCPU and calls its methods. It runs whole, at one
time of the machine's, while the vCPU's own clock runs ahead by what that code costs; whatever
the code touches happens at that clock, which the machine's ``events.now`` shows meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .irqchip import XAPIC_EOI, Exit
from .lapic import BASE_ENABLE, MsrFault
from .recorder import NAMES, NOBODY, RowKind, Space

if TYPE_CHECKING:
    from .lapic import LocalApic
    from .machine import Machine
    from .recorder import Row

__all__ = ["Vcpu"]

APIC_PAGE = 0xFEE00
EOI_ADDRESS = 0xFEE000B0
EOI_MSR = 0x80B
LVT_TIMER, LVT_TIMER_MSR = 0x320, 0x832
TSC = 0x10
APIC_MSRS = frozenset({0x1B, 0x6E0, *range(0x800, 0x840)})
# Documentation/virt/kvm/x86/msr.rst
KVM_MSRS = frozenset({0x11, 0x12, *range(0x4B564D00, 0x4B564D08)})
PV_EOI_MSR, PV_EOI_ENABLED = 0x4B564D04, 1
MOST = 16  # interrupts, or pieces of the guest's code, one after the other

ACCESS, EXIT, DELIVER, FUNCTION, EOI = map(
    int, (RowKind.ACCESS, RowKind.EXIT, RowKind.DELIVER, RowKind.FUNCTION, RowKind.EOI)
)
NOWHERE, MEMORY, PORT, MSR = map(int, Space)
NUMBERS: dict[str, int] = {}


class Vcpu:
    """The vCPU number ``index`` of ``machine``."""

    __slots__ = (
        "_at", "_due", "_entry", "_eois", "_events", "_handler", "_hlt", "_kicked", "_machine",
        "_memory", "_more", "_msrs", "_places", "_posted", "_pv_address", "_pv_eoi", "_ram",
        "_ready", "_record", "_rules", "_signal", "_slept", "_turning", "_u8", "_u16", "_u32",
        "_u64", "_untold", "_virtual", "_wake_up", "_work", "apic", "asked", "clock", "halted",
        "index", "running",
    )  # fmt: skip

    def __init__(self, index: int, apic: LocalApic, machine: Machine) -> None:
        self.index = index
        self.apic = apic
        self.clock = 0
        """Modelled cycles that this vCPU has come to; while it runs not before ``events.now``."""
        self.halted = True
        """Whether it waits for an interrupt."""
        self._machine = machine
        self._events = machine.events
        self._at = machine.events.at
        self._turning = self._turn
        self._memory = memory = machine.memory
        self._ram = memory.size
        self._u8, self._u16, self._u32, self._u64 = memory.u8, memory.u16, memory.u32, memory.u64
        self._places = machine.places
        self._rules = machine.rules
        self._eois = machine.rules.eois
        self._hlt = machine.rules.hlt
        self._record: Callable[[Row], None] | None = None
        costs = machine.costs
        self._entry = costs.step("entry")
        self._handler = costs.step("handler")
        self._virtual = costs.step("virtual")
        self._pv_eoi = costs.step("pv_eoi")
        self._posted = costs.step("posted")
        self._wake_up = costs.step("wake")
        self._signal = machine.signal
        self._work: deque[tuple[int, Callable[..., None], tuple[Any, ...]]] = deque()
        self._due = False  # a turn is among the events
        self.running = False
        """Whether the guest's code runs here at this moment."""
        self._kicked = 0  # arrivals that found it running
        self._more = False  # interrupts are left for the next turn
        self.asked = False
        """Whether the PIC has an interrupt for it."""
        self._ready = 0  # when the last interrupt arrived
        self._slept = 0  # when it halted last
        self._untold = False  # the recorder has not been told of that
        self._msrs: dict[int, int] = {}
        self._pv_address = 0  # of the byte of paravirtual EOI; 0: not in use
        apic.wake = self.wake

    # What a guest's code does.

    def read(self, address: int, size: int) -> int:
        """``size`` (1, 2, 4 or 8) bytes at a guest-physical address."""
        if address < self._ram:
            if not address & (size - 1):
                if size == 4:
                    return self._u32[address >> 2]
                if size == 2:
                    return self._u16[address >> 1]
                if size == 1:
                    return self._u8[address]
                return self._u64[address >> 3]
            return int.from_bytes(self._memory.read(address, size), "little")
        place = self._places.get(address >> 9)
        if place is None:
            if address >> 12 == APIC_PAGE:
                return self._apic_read(address, size)
            place = self._machine.find(address)
        start = self.clock
        self._leave(place.exit)
        value = place.read(address - place.start, size)
        if self._record is not None:
            self._note(place.exit, start, MEMORY, address, size, False, value)
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """Put ``size`` (1, 2, 4 or 8) bytes there."""
        if address < self._ram:
            if not address & (size - 1):
                if size == 4:
                    self._u32[address >> 2] = value
                elif size == 2:
                    self._u16[address >> 1] = value
                elif size == 1:
                    self._u8[address] = value
                else:
                    self._u64[address >> 3] = value
                return
            data = value.to_bytes(size, "little")[: self._ram - address]
            self._memory.write(address, data)
            return
        place = self._places.get(address >> 9)
        if place is None:
            if address >> 12 == APIC_PAGE:
                self._apic_write(address, size, value)
                return
            place = self._machine.find(address)
        offset = address - place.start
        exit_ = place.notify if place.first <= offset < place.last else place.exit
        if self._record is not None:
            start = self.clock
            self._leave(exit_)
            self._note(exit_, start, MEMORY, address, size, True, value)
        else:
            self._leave(exit_)
        place.write(offset, size, value)

    def inp(self, port: int, size: int) -> int:
        """IN: ``size`` bytes of a port."""
        exit_, device = self._machine.port(port)
        start = self.clock
        self._leave(exit_)
        value = device.inp(port, size)
        if self._record is not None:
            self._note(exit_, start, PORT, port, size, False, value)
        return value

    def outp(self, port: int, size: int, value: int) -> None:
        """OUT."""
        exit_, device = self._machine.port(port)
        start = self.clock
        self._leave(exit_)
        if self._record is not None:
            self._note(exit_, start, PORT, port, size, True, value)
        device.outp(port, size, value)

    def rdmsr(self, msr: int) -> int:
        """RDMSR. Raises :class:`~qvis.emulated.lapic.MsrFault` where it is a #GP."""
        if msr == TSC:  # KVM does not intercept it: vmx_possible_passthrough_msrs
            return self.clock
        exit_ = self._rules.msr_read(msr)
        start = self.clock
        self._leave(exit_)
        if msr in APIC_MSRS:
            value = self.apic.rdmsr(msr)
        elif msr in KVM_MSRS:
            value = self._msrs.get(msr, 0)
        else:
            raise MsrFault(msr)
        if self._record is not None:
            self._note(exit_, start, MSR, msr, 8, False, value)
        return value

    def wrmsr(self, msr: int, value: int) -> None:
        """WRMSR. Raises :class:`~qvis.emulated.lapic.MsrFault` where it is a #GP."""
        if msr == EOI_MSR and not value and self.apic.x2apic:
            self._end()
            return
        exit_ = self._rules.msr_write(msr, value)
        start = self.clock
        self._leave(exit_)
        if self._record is not None:
            self._note(exit_, start, MSR, msr, 8, True, value)
        if msr in APIC_MSRS:
            self.apic.wrmsr(msr, value)
        elif msr in KVM_MSRS:
            self._msrs[msr] = value
            if msr == PV_EOI_MSR and self._rules.pv_eoi:
                self._use_pv_eoi(value)
        else:
            raise MsrFault(msr)

    def eoi(self) -> None:
        """The end of the interrupt that is in service, as this guest says it."""
        if not (self._pv_address and self._end_by_memory()):
            self._end()

    def spend(self, cycles: int) -> None:
        """So long the guest touches nothing that is not its own."""
        self.clock += cycles

    def enter(self, function: str, argument: int = 0) -> None:
        """The guest's kernel enters ``function``, whose first argument is ``argument``."""
        if self._record is not None:
            number = NUMBERS.get(function)
            if number is None:
                number = NUMBERS[function] = len(NAMES)
                NAMES.append(function)
            record = self._record
            record((FUNCTION, self.index, self.clock, number, argument, 0))

    def call(self, code: Callable[..., None], *arguments: Any) -> None:
        """Run the guest's ``code(*arguments)`` here, as soon as this vCPU is free for it.

        Interrupts that are pending come first, and when nothing is left it halts.
        """
        now = self._events.now
        if self.halted and (now < self._slept or self._untold):
            self._stir(now)
        self._work.append((now, code, arguments))
        if not self._due and not self.running:
            self._due = True
            self._at(self.clock, self._turning)

    # What a machine does with it.

    def wake(self) -> None:
        """An interrupt has come to the local APIC, or may be taken since something changed."""
        if self.running:
            return  # it looks itself before it goes on
        now = self._events.now
        if self.halted and (now < self._slept or self._untold):
            self._stir(now)
        if not self.halted and now < self.clock:
            self._kicked += 1
        ready = now + self._signal
        if self._ready < ready:
            self._ready = ready
        if not self._due:
            self._due = True
            at = self._at
            at(ready if self.clock < ready else self.clock, self._turning)

    def record(self, add: Callable[[Row], None] | None) -> None:
        """Tell ``add`` what happens from now on; None: nobody."""
        self._record = add
        self._untold = False

    def reset(self) -> None:
        """As after switching on; what was to be run is forgotten, and time goes on."""
        self._work.clear()
        self._kicked = 0
        self._untold = self._more = self.asked = False
        self.halted = True
        self._msrs.clear()
        self._pv_address = 0

    def _turn(self) -> None:
        """Take what is pending, run what is to be run."""
        events, apic = self._events, self.apic
        base = events.now
        if self.clock < base:
            self.clock = base
        self._due = self._more = False
        self.running = True
        try:
            if apic.irr or self.asked:
                self._take()
            if self._work:
                self._run()
        finally:
            self.running = False
            events.now = base
        if self._work or self._more:
            self._due = True
            self._at(self.clock, self._turning)
        elif not self.halted:
            # It may yet turn out that it does not come to that: see _stir().
            self.halted = True
            self._slept = clock = self.clock
            hlt = self._hlt
            hlt.count += 1
            self.clock = clock + hlt.cycles
            self._untold = self._record is not None
        if self._record is not None:
            self._machine.flush(base)

    def _run(self) -> None:
        """Run the guest's code, as long as nothing else in the machine comes before it."""
        events, apic, work = self._events, self.apic, self._work
        for _ in range(MOST):
            at, code, arguments = work.popleft()
            if self.clock < at:
                self.clock = at
            self.halted = False
            events.now = self.clock
            code(*arguments)
            if apic.irr or self.asked:
                self._take()
            if not work:
                return
            after = events.next
            if after is not None and after <= self.clock:
                return

    def _take(self) -> None:
        """Take interrupts that are pending, the highest first."""
        apic, guest, record = self.apic, self._machine.guest, self._record
        vector = apic.pending()
        if guest is None or not (vector >= 0 or (self.asked and apic.extint())):
            return
        if self.clock < self._ready:
            self.clock = self._ready
        if self.halted:
            self.halted = False
            self.clock += self._wake_up
        elif self._kicked:
            self._interrupted(self._kicked)
        self._kicked = 0
        left = MOST
        while True:
            if self.asked and apic.extint():
                vector = self._machine.pic.acknowledge()
            else:
                apic.take(vector)
                if self._pv_address:
                    self._offer_pv_eoi(vector)
            if record is not None:
                record((DELIVER, self.index, self.clock, 0, vector, 0))
            self._events.now = self.clock = self.clock + self._entry
            guest.interrupt(self, vector)
            self.clock += self._handler
            vector = apic.pending() if apic.irr else -1
            if vector < 0 and not (self.asked and apic.extint()):
                return
            left -= 1
            if not left:
                self._more = True
                return
            # It came while the guest had interrupts off.
            self._leave_for(self._rules.window)

    def _interrupted(self, times: int) -> None:
        """They came while the guest ran: each is an exit, or what a processor does instead."""
        apic, rules = self.apic, self._rules
        timer = apic.rdmsr(LVT_TIMER_MSR) if apic.x2apic else apic.read(LVT_TIMER)
        if apic.pending() == timer & 0xFF:
            self._leave_for(rules.timer)
            times -= 1
        for _ in range(times):
            if rules.kick is not None:
                self._leave_for(rules.kick)
            else:
                self.clock += self._posted

    def _stir(self, now: int) -> None:
        """Something happens to a vCPU that halted, or is about to: its clock is ahead."""
        if now < self._slept:
            self.halted = self._untold = False
            self._hlt.count -= 1
            self.clock = self._slept
        else:
            self.settle(now + 1)

    def settle(self, floor: int) -> None:
        """Tell the recorder of a HLT before ``floor``: nothing prevents it any more."""
        if self._untold and self._slept < floor:
            self._untold = False
            self._note(self._hlt, self._slept, NOWHERE, 0, 0, False, 0)

    # Exits.

    def _leave(self, exit_: Exit | None) -> None:
        """Pay for an exit, or for an access that is none."""
        if exit_ is None:
            self.clock += self._virtual
        else:
            self.clock += exit_.cycles
            exit_.count += 1
        self._events.now = self.clock

    def _leave_for(self, exit_: Exit | None) -> None:
        """An exit that no access is the reason of."""
        if exit_ is None:
            return
        if self._record is not None:
            self._note(exit_, self.clock, NOWHERE, 0, 0, False, 0)
        exit_.count += 1
        self.clock += exit_.cycles

    def _note(
        self, exit_: Exit | None, start: int, space: int, address: int, size: int, write: bool,
        value: int,
    ) -> None:  # fmt: skip
        """Tell the recorder of an exit, or of an access that is none; there is a recorder."""
        record = self._record
        assert record is not None
        row = space << 8 | size << 16 | write << 24
        if exit_ is None:
            record((row | ACCESS, self.index, start, address, value, 0))
        else:
            row |= exit_.code << 32 | EXIT
            record((row, self.index, start, address, value, exit_.cycles))

    # The local APIC.

    def _apic_read(self, address: int, size: int) -> int:
        offset = address & 0xFFF
        exit_ = self._rules.xapic_read(offset)
        start = self.clock
        self._leave(exit_)
        value = self.apic.read(offset, size)
        if self._record is not None:
            self._note(exit_, start, MEMORY, address, size, False, value)
        return value

    def _apic_write(self, address: int, size: int, value: int) -> None:
        offset = address & 0xFFF
        apic = self.apic
        if offset == XAPIC_EOI and size >= 4 and apic.base & BASE_ENABLE and not apic.x2apic:
            self._end()
            return
        exit_ = self._rules.xapic_write(offset, value)
        start = self.clock
        self._leave(exit_)
        if self._record is not None:
            self._note(exit_, start, MEMORY, address, size, True, value)
        self.apic.write(offset, value, size)

    def _end(self) -> None:
        """EOI by its register."""
        apic = self.apic
        isr, tmr = apic.isr, apic.tmr
        level = tmr >> (isr.bit_length() - 1) & 1 if tmr and isr else 0
        exit_ = self._eois[apic.x2apic][level]
        start = self.clock
        if exit_ is None:
            self._events.now = self.clock = start + self._virtual
        else:
            exit_.count += 1
            self._events.now = self.clock = start + exit_.cycles
        if self._record is None:
            apic.eoi()
            return
        if apic.x2apic:
            self._note(exit_, start, MSR, EOI_MSR, 8, True, 0)
        else:
            self._note(exit_, start, MEMORY, EOI_ADDRESS, 4, True, 0)
        self._ended(apic.eoi(), bool(level))

    def _ended(self, vector: int, level: bool) -> None:
        """Tell the recorder of an end, and that an IOAPIC was told of it."""
        if self._record is not None and vector >= 0:
            self._record((EOI, self.index, self.clock, 0, vector, 0))
            if level and self.apic.broadcasts:
                self._record((EOI, NOBODY, self.clock, 0, vector, 0))

    def _use_pv_eoi(self, value: int) -> None:
        address = value & ~3
        on = value & PV_EOI_ENABLED and self._memory.contains(address, 1)
        self._pv_address = address if on else 0

    def _offer_pv_eoi(self, vector: int) -> None:
        """As KVM before it enters the guest: apic_sync_pv_eoi_to_guest."""
        edge = not self.apic.tmr >> vector & 1
        self._u8[self._pv_address] = 1 if edge and not self.apic.irr else 0

    def _end_by_memory(self) -> bool:
        """EOI by the bit in memory, if it is set and KVM would not have taken it back."""
        address = self._pv_address
        if not self._u8[address] & 1:
            return False
        self._u8[address] = 0
        if self.apic.irr:
            return False
        self.clock += self._pv_eoi
        self._events.now = self.clock
        self._ended(self.apic.eoi(), False)
        return True
