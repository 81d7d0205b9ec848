# SPDX-License-Identifier: GPL-2.0-or-later
"""The local APIC: what is pending on a processor, what it may take, and its end.

SDM volume 3, chapter 11, in xAPIC and x2APIC mode. Registers read as those of QEMU's
``hw/intc/apic.c`` (a P4's APIC with six LVT entries); where that is looser than the SDM,
in what it lets a guest write, this follows the SDM, as KVM does. IRR, ISR and TMR are
sets of vectors in one integer each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .apictimer import ApicTimer, Mode
from .events import Events
from .messages import BY_VECTOR, DELIVERIES, ApicBus, Delivery

__all__ = ["LocalApic", "MsrFault"]

BIT = tuple([1 << vector for vector in range(256)])
VERSION = 0x50014
DIRECTED_EOI = 1 << 24  # of VERSION: SVR may stop the broadcast of EOIs
RESET_BASE = 0xFEE00800
BASE_BSP, BASE_X2APIC, BASE_ENABLE = 1 << 8, 1 << 10, 1 << 11
BASE_WRITABLE = 0xFFFFF000 | BASE_BSP | BASE_X2APIC | BASE_ENABLE
SVR_ENABLE, SVR_NO_BROADCAST = 1 << 8, 1 << 12
MASKED, LEVEL = 1 << 16, 1 << 15
FLAT, CLUSTER = 0xF, 0x0

# Register numbers: offset in the page by 16, or MSR less 0x800.
ID, VERSION_REGISTER, TPR, APR, PPR, EOI = 0x02, 0x03, 0x08, 0x09, 0x0A, 0x0B
LDR, DFR, SVR, ISR, TMR, IRR, ESR = 0x0D, 0x0E, 0x0F, 0x10, 0x18, 0x20, 0x28
ICR, ICR_HIGH, LVT, LVT_END = 0x30, 0x31, 0x32, 0x38
INITIAL, CURRENT, DIVIDE, SELF_IPI = 0x38, 0x39, 0x3E, 0x3F

# LVT entries by their place from LVT on, and which bits of each a guest may write.
TIMER, LINT0, LINT1, ERROR = 0, 3, 4, 5
LVT_WRITABLE = (0x700FF, 0x107FF, 0x107FF, 0x1A7FF, 0x1A7FF, 0x100FF)
LVT_READ_ONLY = 0x5000

SEND_ILLEGAL_VECTOR, RECEIVE_ILLEGAL_VECTOR, ILLEGAL_REGISTER = 1 << 5, 1 << 6, 1 << 7

MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC, MSR_X2APIC_END = 0x1B, 0x6E0, 0x800, 0x840
X2APIC_READABLE = {ID, VERSION_REGISTER, TPR, PPR, LDR, SVR, ESR, ICR, INITIAL, CURRENT, DIVIDE}
X2APIC_READABLE |= {*range(ISR, ESR), *range(LVT, LVT_END)}
# What a WRMSR may set; other bits fault.
X2APIC_WRITABLE = {
    TPR: 0xFF,
    EOI: 0,
    SVR: 0x3FF,
    ESR: 0,
    ICR: 0xFFFFFFFF_000CDFFF,
    INITIAL: 0xFFFFFFFF,
    DIVIDE: 0xB,
    SELF_IPI: 0xFF,
} | {LVT + n: bits | LVT_READ_ONLY for n, bits in enumerate(LVT_WRITABLE)}


class MsrFault(Exception):  # noqa: N818 - faults are not errors
    """#GP(0): there is no such MSR now, or not with that value."""


def _nothing() -> None:
    """Nobody listens."""


def _no_signal(delivery: Delivery, vector: int) -> None:
    """Nobody listens."""


class LocalApic:
    """The local APIC of processor ``index``, which joins ``bus``.

    It has its processor's *index* as x2APIC ID, and as xAPIC ID too until a guest writes
    another one there; :attr:`id` is the one that counts in the mode that it is in.
    """

    __slots__ = (
        "_destination", "_dfr", "_errors", "_esr", "_icr", "_lines", "_lvt", "_svr", "base", "bus",
        "directed_eoi", "enabled", "events", "id", "index", "irr", "isr", "logical_id", "signal",
        "timer", "tmr", "tpr", "wake", "x2apic",
    )  # fmt: skip

    def __init__(self, index: int, bus: ApicBus, events: Events) -> None:
        self.index = index
        self.bus = bus
        self.events = events
        self.wake: Callable[[], None] = _nothing
        """Called when something may be deliverable that was not."""
        self.signal: Callable[[Delivery, int], None] = _no_signal
        """Called for an SMI, NMI, INIT or start-up (with its vector) to the processor."""
        self.directed_eoi = False
        """Whether SVR can stop EOI broadcasts, as KVM offers with a split irqchip."""
        self.timer = ApicTimer(events, lambda: self._deliver(TIMER))
        self._lines = 0
        bus.apics.append(self)
        self.reset()

    def reset(self, *, init: bool = False) -> None:
        """As after power-on; with ``init`` as after an INIT, which leaves IDs and mode alone."""
        if not init:
            self.base = RESET_BASE | (BASE_BSP if self.index == 0 else 0)
            self.x2apic = False
            self.id = self.index
            self.bus.switched()
            self.bus.renamed()
        self.irr = self.isr = self.tmr = self.tpr = 0
        self.enabled = False
        self.logical_id = 0
        """LDR of xAPIC mode, 8 bits; in x2APIC mode the ID says it."""
        self._dfr = FLAT
        self._svr = 0xFF
        self._lvt = [MASKED] * len(LVT_WRITABLE)
        self._errors = self._esr = 0
        self._icr = self._destination = 0
        self.timer.reset()
        self.bus.changed()

    # What an interrupt goes through.

    def accept(self, vector: int, level: bool) -> bool:
        """Set ``vector`` in IRR; False if it was there already, or is not taken at all.

        Not taken is a vector below 16, which is an error, and any while the APIC is disabled.
        """
        if vector < 16 or not self.enabled:
            if self.enabled:
                self._error(RECEIVE_ILLEGAL_VECTOR)
            return False
        bit = BIT[vector]
        if level:
            self.tmr |= bit
        elif self.tmr:
            self.tmr &= ~bit
        irr = self.irr
        new = not irr & bit
        if new:
            self.irr = irr | bit
        told = self.bus.on_accept
        if told is not None:
            told(self, vector, level)
        if new:
            wake = self.wake  # CPython 3.11 is slow to call a slot as if it were a method
            wake()
        return new

    def pending(self) -> int:
        """The vector that the processor may take now, -1 if none.

        It is the highest in IRR if its class, the upper four bits, is above that of all in
        service and above TPR's.
        """
        irr = self.irr
        if irr and self.enabled:
            vector = irr.bit_length() - 1
            if vector >> 4 > self.tpr >> 4:
                isr = self.isr
                if not isr or vector >> 4 > isr.bit_length() - 1 >> 4:
                    return vector
        return -1

    def take(self, vector: int) -> None:
        """The processor takes ``vector``, which :meth:`pending` has just said: IRR to ISR."""
        bit = BIT[vector]
        self.irr ^= bit
        self.isr |= bit

    def acknowledge(self) -> int:
        """The processor takes an interrupt: :meth:`pending`'s goes from IRR to ISR.

        If none may be taken (any more) that is the spurious vector, and nothing is in service.
        """
        vector = self.pending()
        if vector < 0:
            return self._svr & 0xFF
        bit = BIT[vector]
        self.irr ^= bit
        self.isr |= bit
        return vector

    @property
    def broadcasts(self) -> bool:
        """Whether IOAPICs hear of ends; the SVR can suppress it, where that is offered."""
        return not self._svr & SVR_NO_BROADCAST

    def eoi(self) -> int:
        """End the highest vector in service, and say which; -1: there was none.

        IOAPICs are told if it was level-triggered, and the processor if more is pending.
        """
        isr = self.isr
        if not isr:
            return -1
        vector = isr.bit_length() - 1
        bit = BIT[vector]
        self.isr = isr ^ bit
        if self.tmr & bit:
            if not self._svr & SVR_NO_BROADCAST:
                self.bus.eoi(vector)
            if self._lines:
                self._sample()
        if self.irr:
            self.wake()
        return vector

    def signalled(self, delivery: Delivery, vector: int, level: bool) -> bool:
        """Pass on what is not by vector; an INIT resets this APIC too. False if it is off."""
        if not self.base & BASE_ENABLE:
            return False
        if delivery is Delivery.INIT:
            self.reset(init=True)
        self.signal(delivery, vector)
        return True

    def named(self, destination: int) -> bool:
        """Whether an 8-bit logical destination includes this one, which is in xAPIC mode."""
        logical = self.logical_id
        if self._dfr == FLAT:
            return bool(destination & logical)
        if self._dfr != CLUSTER:
            return False
        ours = destination & 0xF0 in (0xF0, logical & 0xF0)
        return ours and bool(destination & logical & 0x0F)

    def lint(self, pin: int, level: bool) -> None:
        """The line at LINT0 or LINT1 is high from now on, or low; PICs are at LINT0."""
        bit, entry = 1 << pin, self._lvt[LINT0 + pin]
        if not level:
            self._lines &= ~bit
            if entry & LEVEL and not entry & MASKED and not entry & 0x700:
                self.irr &= ~BIT[entry & 0xFF]
        elif not self._lines & bit:
            self._lines |= bit
            self._deliver(LINT0 + pin)

    def extint(self) -> bool:
        """Whether the processor may take the PIC's interrupt now, for which it asks the PIC.

        It goes past this APIC: no priority, no IRR, no EOI here.
        """
        if not self._lines & 1:
            return False
        entry = self._lvt[LINT0]
        return not self.base & BASE_ENABLE or entry & (MASKED | 0x700) == Delivery.EXTINT << 8

    # xAPIC registers, in the page at IA32_APIC_BASE.

    def read(self, offset: int, size: int = 4) -> int:
        """The register at ``offset`` in the page; those narrower than 4 bytes get 0."""
        number = offset >> 4 & 0xFF
        if size < 4 or self.x2apic or not self.base & BASE_ENABLE:
            return 0
        return self._read(number)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write the register at ``offset``; without effect if narrower than 4 bytes."""
        if size < 4 or self.x2apic or not self.base & BASE_ENABLE:
            return
        self._write(offset >> 4 & 0xFF, value & 0xFFFFFFFF)

    # MSRs.

    def rdmsr(self, msr: int) -> int:
        """IA32_APIC_BASE, IA32_TSC_DEADLINE and x2APIC's; :class:`MsrFault` where RDMSR faults."""
        if msr == MSR_APIC_BASE:
            return self.base
        if msr == MSR_TSC_DEADLINE:
            return self.timer.deadline
        number = msr - MSR_X2APIC
        if not self.x2apic or number not in X2APIC_READABLE:
            raise MsrFault(f"RDMSR of {msr:#x}")
        if number == ICR:
            return self._icr | self._destination << 32
        return self._read(number)

    def wrmsr(self, msr: int, value: int) -> None:
        """The same for WRMSR, of 64 bits."""
        if msr == MSR_APIC_BASE:
            self._set_base(value)
        elif msr == MSR_TSC_DEADLINE:
            self.timer.set_deadline(value)
        else:
            number = msr - MSR_X2APIC
            writable = X2APIC_WRITABLE.get(number) if self.x2apic else None
            if number == SVR and self.directed_eoi and writable is not None:
                writable |= SVR_NO_BROADCAST
            if writable is None or value & ~writable:
                raise MsrFault(f"WRMSR of {value:#x} to {msr:#x}")
            if number == ICR:
                self._icr, self._destination = value & 0xCCFFF, value >> 32
                self._send(self._icr, self._destination)
            elif number == SELF_IPI:
                self._send(1 << 18 | value, 0)
            else:
                self._write(number, value)

    def _set_base(self, value: int) -> None:
        old, both = self.base, BASE_X2APIC | BASE_ENABLE
        mode = value & both
        # Not all four modes lead to each other (SDM volume 3, figure 11-28).
        leads = mode != BASE_X2APIC
        if not old & BASE_ENABLE:
            leads = leads and mode != both
        elif old & BASE_X2APIC:
            leads = leads and mode != BASE_ENABLE
        if not leads or value & ~BASE_WRITABLE:
            raise MsrFault(f"WRMSR of {value:#x} to IA32_APIC_BASE")
        self.base = value & ~BASE_BSP | old & BASE_BSP
        if old & both == mode:
            return
        self.x2apic = bool(mode & BASE_X2APIC)
        self.bus.switched()
        if self.id != self.index:
            self.id = self.index
            self.bus.renamed()
        if not mode:
            self.reset(init=True)

    def _read(self, number: int) -> int:
        if ISR <= number < ESR:
            bits = (self.isr, self.tmr, self.irr)[(number - ISR) >> 3]
            return bits >> ((number & 7) << 5) & 0xFFFFFFFF
        if LVT <= number < LVT_END:
            return self._lvt[number - LVT]
        reader = READERS.get(number)
        if reader is None:
            self._error(ILLEGAL_REGISTER)
            return 0
        return reader(self)

    def _write(self, number: int, value: int) -> None:
        writer = WRITERS.get(number)
        if writer is not None:
            writer(self, value)
        elif LVT <= number < LVT_END:
            self._write_lvt(number - LVT, value)
        elif number not in READERS and not ISR <= number < ESR:
            self._error(ILLEGAL_REGISTER)

    def _read_id(self) -> int:
        return self.id if self.x2apic else (self.id & 0xFF) << 24

    def _write_id(self, value: int) -> None:
        self.id = value >> 24
        self.bus.renamed()

    def _read_version(self) -> int:
        return VERSION | (DIRECTED_EOI if self.directed_eoi else 0)

    def _write_tpr(self, value: int) -> None:
        self.tpr = value & 0xFF
        if self.irr:
            self.wake()

    def _write_eoi(self, value: int) -> None:
        self.eoi()

    def _read_ppr(self) -> int:
        served = self.isr.bit_length() - 1 & 0xF0 if self.isr else 0
        return self.tpr if self.tpr & 0xF0 >= served else served

    def _read_ldr(self) -> int:
        if self.x2apic:
            return self.index >> 4 << 16 | 1 << (self.index & 15)
        return self.logical_id << 24

    def _write_ldr(self, value: int) -> None:
        self.logical_id = value >> 24
        self.bus.changed()

    def _write_dfr(self, value: int) -> None:
        self._dfr = value >> 28
        self.bus.changed()

    def _write_svr(self, value: int) -> None:
        self._svr = value & (0x1FF | (SVR_NO_BROADCAST if self.directed_eoi else 0))
        enabled = bool(value & SVR_ENABLE)
        if enabled != self.enabled:
            self.enabled = enabled
            self.bus.changed()
        if not enabled:
            for n in range(len(self._lvt)):
                self._write_lvt(n, self._lvt[n])
        elif self.irr:
            self.wake()

    def _write_esr(self, value: int) -> None:
        self._esr, self._errors = self._errors, 0

    def _error(self, error: int) -> None:
        """Note it for ESR, and interrupt for it if this is the first since ESR was written."""
        first = not self._errors
        self._errors |= error
        if first:
            self._deliver(ERROR)

    # IPIs.

    def _write_icr(self, value: int) -> None:
        self._icr = value & 0xCCFFF
        self._send(self._icr, self._destination)

    def _write_icr_high(self, value: int) -> None:
        self._destination = value >> 24

    def _send(self, command: int, destination: int) -> None:
        """Send the IPI of ICR's lower half (SDM volume 3, 11.6.1)."""
        vector, level = command & 0xFF, bool(command & LEVEL)
        if not command & 0xC0700 and vector >= 16:  # the usual one: fixed, no shorthand
            for target in self.bus.targets(destination, bool(command & 0x800)):
                target.accept(vector, level)
            return
        delivery = DELIVERIES.get(command >> 8 & 7)
        if delivery is None or delivery is Delivery.EXTINT:
            return
        if delivery is Delivery.INIT and level and not command & 0x4000:
            return  # the de-assertion that old processors wanted
        if vector < 16 and delivery in BY_VECTOR:
            self._error(SEND_ILLEGAL_VECTOR)
            return
        shorthand, bus = command >> 18 & 3, self.bus
        targets: Sequence[LocalApic]
        if shorthand == 0:
            targets = bus.targets(destination, bool(command & 0x800))
        elif shorthand == 1:
            targets = (self,)
        elif shorthand == 2:
            targets = bus.apics
        else:
            targets = [apic for apic in bus.apics if apic is not self]
        if delivery not in BY_VECTOR:
            bus.signal(targets, delivery, vector)
            return
        if delivery is Delivery.LOWEST:
            targets = [target for target in targets if target.enabled][:1]
        for target in targets:
            target.accept(vector, level)

    # The local vector table.

    def _write_lvt(self, n: int, value: int) -> None:
        value &= LVT_WRITABLE[n]
        if not self.enabled:
            value |= MASKED
        was, self._lvt[n] = self._lvt[n], value
        if n == TIMER:
            self.timer.configure(Mode(value >> 17 & 3), bool(value & MASKED))
        elif was != value and n in (LINT0, LINT1):
            self._sample()

    def _deliver(self, n: int) -> None:
        entry = self._lvt[n]
        if entry & MASKED:
            return
        delivery = DELIVERIES.get(entry >> 8 & 7)
        if delivery is Delivery.FIXED:
            self.accept(entry & 0xFF, n in (LINT0, LINT1) and bool(entry & LEVEL))
        elif delivery is Delivery.EXTINT:
            self.wake()
        elif delivery in (Delivery.SMI, Delivery.NMI, Delivery.INIT):
            self.signalled(delivery, 0, False)

    def _sample(self) -> None:
        """Deliver for a line that is high where its LVT entry asks for its level, or the PIC's."""
        lines = self._lines
        for pin in (0, 1):
            entry = self._lvt[LINT0 + pin]
            by_level = not entry & 0x700 and entry & LEVEL
            if lines >> pin & 1 and (by_level or entry & 0x700 == Delivery.EXTINT << 8):
                in_service = by_level and self.isr & BIT[entry & 0xFF]
                if not in_service:
                    self._deliver(LINT0 + pin)


READERS: dict[int, Callable[[LocalApic], int]] = {
    ID: LocalApic._read_id,
    VERSION_REGISTER: LocalApic._read_version,
    TPR: lambda apic: apic.tpr,
    APR: lambda apic: 0,
    PPR: LocalApic._read_ppr,
    EOI: lambda apic: 0,
    LDR: LocalApic._read_ldr,
    DFR: lambda apic: apic._dfr << 28 | 0xFFFFFFF,
    SVR: lambda apic: apic._svr,
    ESR: lambda apic: apic._esr,
    ICR: lambda apic: apic._icr,
    ICR_HIGH: lambda apic: apic._destination << 24,
    INITIAL: lambda apic: apic.timer.initial,
    CURRENT: lambda apic: apic.timer.count,
    DIVIDE: lambda apic: apic.timer.divide,
}
WRITERS: dict[int, Callable[[LocalApic, int], None]] = {
    ID: LocalApic._write_id,
    TPR: LocalApic._write_tpr,
    EOI: LocalApic._write_eoi,
    LDR: LocalApic._write_ldr,
    DFR: LocalApic._write_dfr,
    SVR: LocalApic._write_svr,
    ESR: LocalApic._write_esr,
    ICR: LocalApic._write_icr,
    ICR_HIGH: LocalApic._write_icr_high,
    INITIAL: lambda apic, value: apic.timer.load(value),
    DIVIDE: lambda apic, value: apic.timer.set_divide(value),
}
