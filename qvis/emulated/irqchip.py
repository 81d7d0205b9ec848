# SPDX-License-Identifier: GPL-2.0-or-later
"""What exits, and to whom: KVM on Intel with the switches of a platform.

========================================  ================================================
a vCPU touches                            and leaves guest mode for
========================================  ================================================
a device's memory, PCI's configuration    EPT_MISCONFIG, to QEMU
QueueNotify with an ioeventfd             the same, handled in KVM; ``fast`` where the address
                                          alone says which queue (``kvm_fast_mmio``)
a port                                    IO_INSTRUCTION, to QEMU; the PIC in KVM with ``on``
the local APIC's page                     APIC_ACCESS: it is emulated, but for EOI (``fast``:
                                          ``handle_apic_access``). TPR: none, it is shadowed
the same with APICv                       reads: none but of :data:`NOT_VIRTUAL`; writes
                                          APIC_WRITE (it is done already,
                                          SDM 31.4.3), and none for TPR, EOI, ICR's high word
                                          and an IPI to oneself
the same, irqchip ``off``                 EPT_MISCONFIG, to QEMU: there is no APIC-access page
an x2APIC register                        MSR_READ, MSR_WRITE; ``fast``: an IPI to one vCPU
                                          (``handle_fastpath_set_x2apic_icr_irqoff``). TPR: none
the same with APICv                       reads: none but of the timer's count; writes as
                                          without, and none for TPR, EOI and SELF IPI
                                          (``vmx_update_msr_bitmap_x2apic``)
IA32_TSC_DEADLINE                         MSR_WRITE, ``fast``
an IOAPIC                                 EPT_MISCONFIG; KVM has the first with ``on``, the
                                          second one is always QEMU's
========================================  ================================================

**Ends of interrupts.** Of a level-triggered one an IOAPIC has to know: with APICv its vector
is in the EOI-exit bitmap (EOI_INDUCED), and with ``split`` the exit goes on to QEMU
(KVM_EXIT_IOAPIC_EOI). Paravirtual EOI (``apic_sync_pv_eoi_to_guest``) needs no exit for an
edge-triggered one with nothing else pending, and is not used with APICv.

**Arrivals.** A halted vCPU is woken: no exit of its own. One that runs is interrupted by an
IPI of its host (EXTERNAL_INTERRUPT), and gets the interrupt when it enters again; with posted
interrupts the same IPI is a notification, and nothing exits. Two in a row without APICv take
INTERRUPT_WINDOW between them, since the second came while the guest had interrupts off. The
local timer of a vCPU that runs is VMX's (PREEMPTION_TIMER).

Not modelled: IPI virtualization (an ICR write exits with APICv too), halt polling, posted
timer interrupts (``pi_inject_timer``), TPR_BELOW_THRESHOLD, EPT violations, exits that have
nothing to do with interrupts or devices.

Sources: ``arch/x86/kvm/{lapic,ioapic,x86}.c`` and ``arch/x86/kvm/vmx/vmx.c`` of Linux 6.12;
SDM volume 3, 31.4 (virtualizing APIC accesses) and 31.2 (virtual interrupts).
"""

from __future__ import annotations

from ..errors import UsageError
from ..x86 import Apic, Irqchip, Platform
from .costs import EXITS, Costs, Handler, Reason

__all__ = ["ICR_HIGH", "XAPIC_EOI", "Exit", "Rules", "check_platform"]

XAPIC_EOI, XAPIC_TPR, XAPIC_ICR, ICR_HIGH = 0x0B0, 0x080, 0x300, 0x310
XAPIC_CURRENT_COUNT = 0x390
NOT_VIRTUAL = (0x090, 0x0A0, 0x2F0, XAPIC_CURRENT_COUNT)
"""Those that APIC-register virtualization does not read: APR, PPR, the CMCI's (SDM 31.4.2)."""
X2APIC_TPR, X2APIC_EOI, X2APIC_ICR, X2APIC_CURRENT_COUNT, X2APIC_SELF_IPI = (
    0x808, 0x80B, 0x830, 0x839, 0x83F,
)  # fmt: skip
X2APIC = range(0x800, 0x840)
IA32_TSC_DEADLINE = 0x6E0
# ICR: delivery mode, logical destination, shorthand; SDM volume 3, 11.6.1
ICR_MODE, ICR_LOGICAL, ICR_LEVEL_TRIGGERED, ICR_SHORTHAND = 7 << 8, 1 << 11, 1 << 15, 3 << 18
ICR_SELF = 1 << 18
EVERYBODY = 0xFFFFFFFF


class Exit:
    """One kind of exit of a machine: what it costs, and how often it happened."""

    __slots__ = ("code", "count", "cycles", "handler", "reason")

    def __init__(self, code: int, reason: Reason, handler: Handler, cycles: int) -> None:
        self.code = code
        """Its place in :data:`~qvis.emulated.costs.EXITS`."""
        self.reason = reason
        self.handler = handler
        self.cycles = cycles
        self.count = 0

    @property
    def name(self) -> str:
        """As in a table of costs: "EPT_MISCONFIG/user"."""
        return f"{self.reason}/{self.handler}"


class Rules:
    """The table above for one machine. Where an attribute or a method gives None nothing exits.

    Raises :class:`UsageError` for a platform that KVM does not have.
    """

    def __init__(self, platform: Platform, costs: Costs) -> None:
        check_platform(platform)
        self.exits = [
            Exit(code, reason, handler, costs.exit(reason, handler))
            for code, (reason, handler) in enumerate(EXITS)
        ]
        """All kinds of exits, to be counted."""
        self.apicv = platform.apicv
        self.pv_eoi = platform.pv_eoi and not platform.apicv
        self._off = off = platform.irqchip is Irqchip.OFF
        lapic = Handler.USER if off else Handler.KERNEL
        ioapic = Handler.KERNEL if platform.irqchip is Irqchip.ON else Handler.USER
        self.device = self._exit(Reason.EPT_MISCONFIG, Handler.USER)
        self.notify = self._exit(Reason.EPT_MISCONFIG, Handler.KERNEL)
        self.notify_by_address = self._exit(Reason.EPT_MISCONFIG, Handler.FAST)
        self.port = self._exit(Reason.IO_INSTRUCTION, Handler.USER)
        self.pic = self._exit(Reason.IO_INSTRUCTION, ioapic)
        self.ioapic = self._exit(Reason.EPT_MISCONFIG, ioapic)
        self.hlt = self._exit(Reason.HLT, lapic)
        self.window = None if self.apicv else self._exit(Reason.INTERRUPT_WINDOW, lapic)
        self.kick = None if self.apicv else self._exit(Reason.EXTERNAL_INTERRUPT, lapic)
        self.timer = self.kick if off else self._exit(Reason.PREEMPTION_TIMER, Handler.FAST)
        self.eois = (self._eois(platform, ioapic, False), self._eois(platform, ioapic, True))
        """For ends of edge- and of level-triggered interrupts, in xAPIC and in x2APIC mode."""
        self._apic_access = (
            self._exit(Reason.EPT_MISCONFIG, Handler.USER)
            if off
            else self._exit(Reason.APIC_ACCESS, Handler.KERNEL)
        )
        self._apic_write = self._exit(Reason.APIC_WRITE, Handler.KERNEL)
        self._msr_read = self._exit(Reason.MSR_READ, Handler.KERNEL)
        self._msr_write = self._exit(Reason.MSR_WRITE, Handler.KERNEL)
        self._msr_fast = self._exit(Reason.MSR_WRITE, Handler.FAST)

    def _exit(self, reason: Reason, handler: Handler) -> Exit:
        return self.exits[EXITS.index((reason, handler))]

    def _eois(self, platform: Platform, ioapic: Handler, x2apic: bool) -> tuple[Exit | None, Exit]:
        if self._off:
            both = self._exit(Reason.EPT_MISCONFIG, Handler.USER)
            return both, both
        if platform.apicv:
            return None, self._exit(Reason.EOI_INDUCED, ioapic)
        reason = Reason.MSR_WRITE if x2apic else Reason.APIC_ACCESS
        edge = self._exit(reason, Handler.KERNEL if x2apic else Handler.FAST)
        level = edge if ioapic is Handler.KERNEL else self._exit(reason, Handler.USER)
        return edge, level

    def xapic_read(self, offset: int) -> Exit | None:
        """For a read of the local APIC's page; EPT's own rules without one in KVM."""
        if self._off or (offset != XAPIC_TPR and not self.apicv):
            return self._apic_access
        return self._apic_access if offset in NOT_VIRTUAL else None

    def xapic_write(self, offset: int, value: int) -> Exit | None:
        """For a write to the local APIC's page, but for EOI."""
        if self._off:
            return self._apic_access
        if offset == XAPIC_TPR:
            return None
        if not self.apicv:
            return self._apic_access
        if offset == ICR_HIGH:
            return None
        if offset == XAPIC_ICR and _to_oneself(value):
            return None
        return self._apic_write

    def msr_read(self, msr: int) -> Exit | None:
        """For RDMSR."""
        free = self.apicv and msr in X2APIC and msr != X2APIC_CURRENT_COUNT
        return None if free or msr == X2APIC_TPR else self._msr_read

    def msr_write(self, msr: int, value: int) -> Exit | None:
        """For WRMSR, but for EOI."""
        if msr == X2APIC_ICR:
            slow = value & (ICR_MODE | ICR_LOGICAL | ICR_SHORTHAND)
            return self._msr_write if slow or value >> 32 == EVERYBODY else self._msr_fast
        if msr == IA32_TSC_DEADLINE:
            return self._msr_fast
        if msr == X2APIC_TPR or (self.apicv and msr == X2APIC_SELF_IPI):
            return None
        return self._msr_write


def _to_oneself(icr: int) -> bool:
    """Whether a processor sends that IPI by itself (SDM volume 3, 31.1.5)."""
    others = ICR_MODE | ICR_LEVEL_TRIGGERED
    return icr & ICR_SHORTHAND == ICR_SELF and not icr & others and icr & 0xF0 != 0


def check_platform(platform: Platform) -> None:
    """Raise :class:`UsageError` for what KVM does not have."""
    if platform.irqchip is not Irqchip.OFF:
        return
    has = {
        "x2APIC": platform.apic is Apic.X2APIC,
        "APICv": platform.apicv,
        "paravirtual EOI": platform.pv_eoi,
    }
    for name, asked in has.items():
        if asked:
            raise UsageError(f"{name} takes a local APIC in KVM: choose irqchip on or split")
