# SPDX-License-Identifier: GPL-2.0-or-later
"""What of x86's interrupt hardware a machine has, and who plays it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Apic", "Irqchip", "Platform"]


class Irqchip(StrEnum):
    """Where interrupt controllers are, as in QEMU's ``kernel-irqchip``."""

    ON = "on"
    """Local APICs, IOAPIC and PIC in KVM."""
    SPLIT = "split"
    """Local APICs in KVM, IOAPIC and PIC in user space."""
    OFF = "off"
    """All of them in user space."""


class Apic(StrEnum):
    """How a guest reaches its local APIC."""

    XAPIC = "xapic"
    """By memory, at 0xfee00000."""
    X2APIC = "x2apic"
    """By MSRs."""


@dataclass(frozen=True)
class Platform:
    """Switches that decide which interrupts, EOIs and accesses exit.

    ``apicv``: APIC-register virtualization, virtual-interrupt delivery and posted interrupts
    (SDM volume 3, chapter 31; AMD calls it AVIC). ``pv_eoi``: KVM's paravirtual EOI
    (Documentation/virt/kvm/x86/msr.rst, MSR_KVM_PV_EOI_EN), None what the backend does unasked:
    QEMU offers it under KVM, the emulated machine does not.
    """

    irqchip: Irqchip = Irqchip.SPLIT
    apic: Apic = Apic.X2APIC
    apicv: bool = False
    pv_eoi: bool | None = None

    @property
    def description(self) -> str:
        """All of it in a few words, such as "split irqchip, x2apic, APICv"."""
        words = [f"{self.irqchip} irqchip", str(self.apic)]
        words += ["APICv"] * self.apicv + ["PV EOI"] * bool(self.pv_eoi)
        return ", ".join(words)
