# SPDX-License-Identifier: GPL-2.0-or-later
"""How processors and IOAPICs are brought up, access by access.

Linux: arch/x86/boot/pm.c, arch/x86/kernel/apic/{apic,io_apic}.c, arch/x86/kernel/smpboot.c, kvm.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .apic import Register, XApic

if TYPE_CHECKING:
    from ..vcpu import Vcpu
    from .apic import Apic

__all__ = [
    "COMMAND_LINE",
    "INIT_DELAY",
    "clear_ioapics",
    "first_processor",
    "one_shot",
    "other_processor",
]

COMMAND_LINE = (
    "console=ttyS0 reboot=t panic=-1 loglevel=6 random.trust_cpu=on virtio_blk.managed_irqs=0"
)
INIT_DELAY = 20_000  # cycles; processors of the last twenty years need no 10 ms
PINS = 24
MASKED = 1 << 16
PIC_MASKS = ((0xA1, 0xFF), (0x21, 0xFB))  # all but the input that the second 8259 is on
MSR_PV_EOI = 0x4B564D04


def first_processor(vcpu: Vcpu, apic: Apic, ioapics: Sequence[int], pv_eoi: int) -> None:
    """``apic_intr_mode_init()`` and what comes before it."""
    for port, mask in PIC_MASKS:  # mask_all_interrupts(), before it is in protected mode
        vcpu.outp(port, 1, mask)
    apic.enable(vcpu)
    apic.read(vcpu, Register.ID)
    apic.read(vcpu, Register.VERSION)
    for base in ioapics:  # mp_register_ioapic()
        for register in (0, 1, 2, 1, 1):
            vcpu.write(base, 4, register)
            vcpu.read(base + 0x10, 4)
    for base in ioapics:  # enable_IO_APIC() looks for a pin that the PIC is connected to
        for register in range(0x10, 0x10 + 2 * PINS):
            vcpu.write(base, 4, register)
            vcpu.read(base + 0x10, 4)
    for base in ioapics:  # clear_IO_APIC()
        for low in range(0x10, 0x10 + 2 * PINS, 2):
            vcpu.write(base, 4, low + 1)
            vcpu.write(base + 0x10, 4, 0)
            vcpu.write(base, 4, low)
            vcpu.write(base + 0x10, 4, MASKED)
    _paravirtual(vcpu, pv_eoi)
    apic.setup(vcpu)
    apic.identify(vcpu)
    apic.calibrate(vcpu)
    apic.start_timer(vcpu)


def other_processor(vcpu: Vcpu, apic: Apic, pv_eoi: int) -> None:
    """``start_secondary()``."""
    apic.enable(vcpu)
    apic.read(vcpu, Register.ID)
    _paravirtual(vcpu, pv_eoi)
    apic.setup(vcpu)
    apic.read(vcpu, Register.ID)
    apic.start_timer(vcpu)
    one_shot(vcpu, apic)


def one_shot(vcpu: Vcpu, apic: Apic) -> None:
    """``tick_switch_to_oneshot()``."""
    if isinstance(apic, XApic):
        apic.one_shot(vcpu)


def clear_ioapics(vcpu: Vcpu, ioapics: Sequence[int]) -> None:
    """``clear_IO_APIC()`` when the machine is shut down."""
    for base in ioapics:
        for low in range(0x10, 0x10 + 2 * PINS, 2):
            words = _read_entry(vcpu, base, low)
            if not words[0] & MASKED:
                for register, value in ((low + 1, words[1]), (low, words[0] | MASKED)):
                    vcpu.write(base, 4, register)
                    vcpu.write(base + 0x10, 4, value)
                _read_entry(vcpu, base, low)
            for register, value in ((low, MASKED), (low + 1, 0)):
                vcpu.write(base, 4, register)
                vcpu.write(base + 0x10, 4, value)
            _read_entry(vcpu, base, low)


def _read_entry(vcpu: Vcpu, base: int, low: int) -> tuple[int, int]:
    vcpu.write(base, 4, low)
    word = vcpu.read(base + 0x10, 4)
    vcpu.write(base, 4, low + 1)
    return word, vcpu.read(base + 0x10, 4)


def _paravirtual(vcpu: Vcpu, pv_eoi: int) -> None:
    """``kvm_guest_cpu_init()``."""
    if pv_eoi:
        vcpu.wrmsr(MSR_PV_EOI, pv_eoi | 1)
