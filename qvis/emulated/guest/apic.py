# SPDX-License-Identifier: GPL-2.0-or-later
"""How the guest uses local APICs: set-up, processors started, IPIs, the timer.

Linux: arch/x86/kernel/apic/apic.c, ipi.c, x2apic_phys.c, arch/x86/kernel/smpboot.c. The
accesses and their order are those of a guest in xAPIC mode with physical destinations; in
x2APIC mode the same registers are MSRs (SDM volume 3, 11.12.1.2), interrupts to processors
are one write, and the timer is the TSC deadline.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..vcpu import Vcpu

__all__ = ["Apic", "Register", "Vector", "XApic", "message"]

BASE = 0xFEE00000
MSR_BASE = 0x800
MSR_APIC_BASE = 0x1B
MSR_TSC_DEADLINE = 0x6E0
X2APIC_ENABLED = 0xC00  # both bits of IA32_APIC_BASE
TIMER_MASKED = 1 << 16
ONE_SHOT = 0
PERIODIC = 1 << 17
DEADLINE = 1 << 18
DIVIDE_BY_16 = 3
CYCLES_PER_COUNT = 32  # the timer counts at 1 GHz divided by 16, a cycle is half a ns
TICK = 625_000  # counts in a jiffy of 10 ms
CALIBRATION = 0x0FFFFFFF
INIT_ASSERT = 0xC500
INIT_DEASSERT = 0x8500
STARTUP = 0x600
TRAMPOLINE = 0x9A  # page that a processor starts in
ALL_BUT_SELF = 0xC0000


class Vector(IntEnum):
    """Vectors that are not a device's (arch/x86/include/asm/irq_vectors.h)."""

    FIRST_EXTERNAL = 0x20
    SYSCALL = 0x80
    FIRST_SYSTEM = 0xEB
    TIMER = 0xEC
    SHUTDOWN = 0xEF
    """Where interrupts go that are set up and not requested yet."""
    CALL_FUNCTION_SINGLE = 0xFB
    CALL_FUNCTION = 0xFC
    RESCHEDULE = 0xFD
    ERROR = 0xFE
    SPURIOUS = 0xFF


class Register(IntEnum):
    """Offsets in the local APIC's page (SDM volume 3, table 11-1)."""

    ID = 0x20
    VERSION = 0x30
    TPR = 0x80
    EOI = 0xB0
    SVR = 0xF0
    ISR = 0x100
    TMR = 0x180
    IRR = 0x200
    ESR = 0x280
    ICR = 0x300
    ICR_HIGH = 0x310
    LVT_TIMER = 0x320
    LINT0 = 0x350
    LINT1 = 0x360
    LVT_ERROR = 0x370
    INITIAL = 0x380
    CURRENT = 0x390
    DIVIDE = 0x3E0


def message(apic: int, vector: int) -> tuple[int, int]:
    """Address and data of the MSI that sends ``vector`` to the APIC of that ID.

    IDs above 255 use the bits of virt_destid_8_14 (arch/x86/include/asm/msi.h).
    """
    return 0xFEE00000 | (apic & 0xFF) << 12 | (apic >> 8 & 0x7F) << 5, vector


class Apic:
    """Local APICs reached by MSRs."""

    deadline = True

    def read(self, vcpu: Vcpu, register: int) -> int:
        """A register of its own APIC."""
        return vcpu.rdmsr(MSR_BASE + (register >> 4))

    def write(self, vcpu: Vcpu, register: int, value: int) -> None:
        """Likewise."""
        vcpu.wrmsr(MSR_BASE + (register >> 4), value)

    def ipi(self, vcpu: Vcpu, apic: int, vector: int) -> None:
        """Interrupt the processor with that APIC ID."""
        vcpu.wrmsr(MSR_BASE + (Register.ICR >> 4), apic << 32 | vector)

    def others(self, vcpu: Vcpu, vector: int) -> None:
        """Interrupt all processors but its own."""
        vcpu.wrmsr(MSR_BASE + (Register.ICR >> 4), ALL_BUT_SELF | vector)

    def timer(self, vcpu: Vcpu, due: int) -> None:
        """Have :data:`Vector.TIMER` come at ``due`` cycles, or at once if that has passed."""
        vcpu.wrmsr(MSR_TSC_DEADLINE, max(due, vcpu.clock + 1))

    def pending(self, vcpu: Vcpu, vector: int) -> bool:
        """Whether ``vector`` is in its IRR."""
        return bool(self.read(vcpu, Register.IRR + (vector >> 5) * 16) >> (vector & 31) & 1)

    def level(self, vcpu: Vcpu, vector: int) -> bool:
        """Whether ``vector`` came as a level: its TMR bit."""
        return bool(self.read(vcpu, Register.TMR + (vector >> 5) * 16) >> (vector & 31) & 1)

    # Set-up

    def enable(self, vcpu: Vcpu) -> None:
        """What comes before all else on a processor."""
        vcpu.wrmsr(MSR_APIC_BASE, vcpu.rdmsr(MSR_APIC_BASE) | X2APIC_ENABLED)

    def setup(self, vcpu: Vcpu) -> None:
        """``setup_local_APIC()`` and ``end_local_APIC_setup()``."""
        read, write = self.read, self.write
        first = vcpu.index == 0
        write(vcpu, Register.SVR, read(vcpu, Register.SVR) & ~0x1FF | 0xFF)
        write(vcpu, Register.TPR, read(vcpu, Register.TPR) & ~0xFF | 0x10)
        for base in (Register.IRR, Register.ISR):
            for word in range(8):
                read(vcpu, base + word * 16)
        write(vcpu, Register.SVR, read(vcpu, Register.SVR) & ~0xFF | 0x1FF)
        read(vcpu, Register.LINT0)
        write(vcpu, Register.LINT0, 0x10700)
        write(vcpu, Register.LINT1, 0x400 if first else 0x10400)
        read(vcpu, Register.VERSION)
        self._errors(vcpu)
        write(vcpu, Register.LVT_ERROR, int(Vector.ERROR))
        self._errors(vcpu)

    def _errors(self, vcpu: Vcpu) -> None:
        self.write(vcpu, Register.ESR, 0)
        self.read(vcpu, Register.ESR)

    def identify(self, vcpu: Vcpu) -> None:
        """The boot processor makes sure that its ID is what the tables say."""
        self.read(vcpu, Register.VERSION)
        self.read(vcpu, Register.ID)

    def calibrate(self, vcpu: Vcpu) -> None:
        """Nothing to do: the TSC's rate is known."""

    def start_timer(self, vcpu: Vcpu) -> None:
        """The first use of a processor's timer (``setup_APIC_timer()``)."""
        self.write(vcpu, Register.LVT_TIMER, DEADLINE | Vector.TIMER)

    def wake(self, vcpu: Vcpu, apic: int) -> Iterator[None]:
        """``wakeup_secondary_cpu_via_init()``: INIT, and STARTUP twice; pauses at each yield."""
        self._errors(vcpu)
        self.read(vcpu, Register.VERSION)
        self.read(vcpu, Register.VERSION)
        self._errors(vcpu)
        self._command(vcpu, apic, INIT_ASSERT)
        yield
        self._command(vcpu, apic, INIT_DEASSERT)
        for _ in range(2):
            self._errors(vcpu)
            self._command(vcpu, apic, STARTUP | TRAMPOLINE)
            yield
            self._errors(vcpu)

    def _command(self, vcpu: Vcpu, apic: int, command: int) -> None:
        vcpu.wrmsr(MSR_BASE + (Register.ICR >> 4), apic << 32 | command)


class XApic(Apic):
    """Local APICs reached by memory."""

    deadline = False

    def read(self, vcpu: Vcpu, register: int) -> int:
        return vcpu.read(BASE + register, 4)

    def write(self, vcpu: Vcpu, register: int, value: int) -> None:
        vcpu.write(BASE + register, 4, value)

    def ipi(self, vcpu: Vcpu, apic: int, vector: int) -> None:
        vcpu.enter("apic_mem_wait_icr_idle")
        vcpu.read(BASE + Register.ICR, 4)
        vcpu.write(BASE + Register.ICR_HIGH, 4, apic << 24)
        vcpu.write(BASE + Register.ICR, 4, vector)

    def others(self, vcpu: Vcpu, vector: int) -> None:
        vcpu.enter("apic_mem_wait_icr_idle")
        vcpu.read(BASE + Register.ICR, 4)
        vcpu.write(BASE + Register.ICR, 4, ALL_BUT_SELF | vector)

    def timer(self, vcpu: Vcpu, due: int) -> None:
        counts = -((vcpu.clock - due) // CYCLES_PER_COUNT)
        vcpu.write(BASE + Register.INITIAL, 4, min(max(counts, 1), 0xFFFFFFFF))

    def enable(self, vcpu: Vcpu) -> None:
        """It is enabled from the beginning."""

    def calibrate(self, vcpu: Vcpu) -> None:
        """``calibrate_APIC_clock()``: how far it counts in ten jiffies."""
        self.write(vcpu, Register.LVT_TIMER, TIMER_MASKED | PERIODIC | Vector.TIMER)
        self.read(vcpu, Register.DIVIDE)
        self.write(vcpu, Register.DIVIDE, DIVIDE_BY_16)
        self.write(vcpu, Register.INITIAL, CALIBRATION)
        for _ in range(12):
            vcpu.spend(TICK * CYCLES_PER_COUNT)
            self.read(vcpu, Register.CURRENT)

    def start_timer(self, vcpu: Vcpu) -> None:
        mask = TIMER_MASKED | Vector.TIMER
        before = self.read(vcpu, Register.LVT_TIMER)
        self.write(vcpu, Register.LVT_TIMER, before if before & PERIODIC else mask)
        self.write(vcpu, Register.INITIAL, 0)
        self.write(vcpu, Register.LVT_TIMER, PERIODIC | Vector.TIMER)
        self.read(vcpu, Register.DIVIDE)
        self.write(vcpu, Register.DIVIDE, DIVIDE_BY_16)
        self.write(vcpu, Register.INITIAL, TICK)

    def one_shot(self, vcpu: Vcpu) -> None:
        """Ticks are programmed one by one from now on."""
        self.write(vcpu, Register.LVT_TIMER, ONE_SHOT | Vector.TIMER)
        self.read(vcpu, Register.DIVIDE)
        self.write(vcpu, Register.DIVIDE, DIVIDE_BY_16)

    def _command(self, vcpu: Vcpu, apic: int, command: int) -> None:
        vcpu.write(BASE + Register.ICR_HIGH, 4, apic << 24)
        vcpu.write(BASE + Register.ICR, 4, command)
        vcpu.read(BASE + Register.ICR, 4)
