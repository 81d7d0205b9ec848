# SPDX-License-Identifier: GPL-2.0-or-later
"""What exits on which platform, with the exits that Linux's KVM on Intel has."""

from __future__ import annotations

import pytest

from qvis.emulated.costs import Costs
from qvis.emulated.irqchip import Exit, Rules
from qvis.errors import UsageError
from qvis.x86 import Apic, Irqchip, Platform

EOI, SELF_IPI, ICR, TPR, CURRENT, DEADLINE = 0x80B, 0x83F, 0x830, 0x808, 0x839, 0x6E0


def rules(
    irqchip: Irqchip = Irqchip.SPLIT, apic: Apic = Apic.X2APIC, *, apicv: bool = False
) -> Rules:
    return Rules(Platform(irqchip, apic, apicv), Costs.load())


def name(exit_: Exit | None) -> str | None:
    return None if exit_ is None else exit_.name


@pytest.mark.parametrize("apicv", [False, True])
@pytest.mark.parametrize("irqchip", [Irqchip.ON, Irqchip.SPLIT])
def test_devices_exit_to_user_space_and_notifications_stay_in_the_kernel(
    irqchip: Irqchip, apicv: bool
) -> None:
    found = rules(irqchip, apicv=apicv)
    assert name(found.device) == "EPT_MISCONFIG/user"
    assert name(found.notify) == "EPT_MISCONFIG/kernel"
    assert name(found.notify_by_address) == "EPT_MISCONFIG/fast"
    assert name(found.port) == "IO_INSTRUCTION/user"


@pytest.mark.parametrize(
    ("irqchip", "where"), [(Irqchip.ON, "kernel"), (Irqchip.SPLIT, "user"), (Irqchip.OFF, "user")]
)
def test_ioapic_and_pic_are_where_the_irqchip_is(irqchip: Irqchip, where: str) -> None:
    found = rules(irqchip, Apic.XAPIC)
    assert name(found.ioapic) == f"EPT_MISCONFIG/{where}"
    assert name(found.pic) == f"IO_INSTRUCTION/{where}"


def test_an_xapic_in_kvm_is_emulated_but_for_tpr_which_is_shadowed() -> None:
    found = rules(apic=Apic.XAPIC)
    assert name(found.xapic_read(0x020)) == "APIC_ACCESS/kernel"
    assert name(found.xapic_write(0x300, 0xFD)) == "APIC_ACCESS/kernel"
    assert found.xapic_read(0x080) is None
    assert found.xapic_write(0x080, 0) is None


def test_an_xapic_in_user_space_is_a_device() -> None:
    found = rules(Irqchip.OFF, Apic.XAPIC)
    assert name(found.xapic_read(0x080)) == "EPT_MISCONFIG/user"
    assert name(found.xapic_write(0x080, 0)) == "EPT_MISCONFIG/user"
    assert [name(exit_) for exit_ in found.eois[0]] == ["EPT_MISCONFIG/user"] * 2


def test_apicv_reads_do_not_exit_but_of_the_count_that_runs() -> None:
    found = rules(apic=Apic.XAPIC, apicv=True)
    assert found.xapic_read(0x020) is None
    assert found.xapic_read(0x200) is None
    assert name(found.xapic_read(0x390)) == "APIC_ACCESS/kernel"


def test_apicv_writes_are_apic_write_but_for_those_that_the_processor_does() -> None:
    found = rules(apic=Apic.XAPIC, apicv=True)
    assert found.xapic_write(0x080, 0x20) is None
    assert found.xapic_write(0x310, 1 << 24) is None
    assert name(found.xapic_write(0x300, 0xFD)) == "APIC_WRITE/kernel"
    assert name(found.xapic_write(0x380, 1000)) == "APIC_WRITE/kernel"
    to_oneself = 1 << 18 | 0x31
    assert found.xapic_write(0x300, to_oneself) is None
    assert name(found.xapic_write(0x300, to_oneself | 4 << 8)) == "APIC_WRITE/kernel"  # NMI
    assert name(found.xapic_write(0x300, to_oneself | 1 << 15)) == "APIC_WRITE/kernel"
    assert name(found.xapic_write(0x300, 1 << 18 | 3)) == "APIC_WRITE/kernel"  # no such vector


def test_x2apic_registers_exit_as_msrs_but_for_tpr() -> None:
    found = rules()
    assert name(found.msr_read(0x802)) == "MSR_READ/kernel"
    assert name(found.msr_write(0x80F, 0x1FF)) == "MSR_WRITE/kernel"
    assert name(found.msr_write(SELF_IPI, 0x31)) == "MSR_WRITE/kernel"
    assert found.msr_read(TPR) is None
    assert found.msr_write(TPR, 0) is None


def test_x2apic_with_apicv() -> None:
    found = rules(apicv=True)
    assert found.msr_read(0x802) is None
    assert name(found.msr_read(CURRENT)) == "MSR_READ/kernel"
    assert name(found.msr_read(0x1B)) == "MSR_READ/kernel"
    assert found.msr_write(SELF_IPI, 0x31) is None
    assert name(found.msr_write(0x838, 5)) == "MSR_WRITE/kernel"


@pytest.mark.parametrize("apicv", [False, True])
def test_an_ipi_to_one_vcpu_takes_the_fast_path(apicv: bool) -> None:
    found = rules(apicv=apicv)
    assert name(found.msr_write(ICR, 3 << 32 | 0xFD)) == "MSR_WRITE/fast"
    for slow in (1 << 11, 1 << 18, 3 << 18, 4 << 8, 0xFFFFFFFF << 32):
        assert name(found.msr_write(ICR, slow | 0xFD)) == "MSR_WRITE/kernel"
    assert name(found.msr_write(DEADLINE, 10**9)) == "MSR_WRITE/fast"


@pytest.mark.parametrize(
    ("platform", "edge", "level"),
    [
        (Platform(Irqchip.ON, Apic.XAPIC), "APIC_ACCESS/fast", "APIC_ACCESS/fast"),
        (Platform(Irqchip.SPLIT, Apic.XAPIC), "APIC_ACCESS/fast", "APIC_ACCESS/user"),
        (Platform(Irqchip.ON, Apic.X2APIC), "MSR_WRITE/kernel", "MSR_WRITE/kernel"),
        (Platform(Irqchip.SPLIT, Apic.X2APIC), "MSR_WRITE/kernel", "MSR_WRITE/user"),
        (Platform(Irqchip.ON, Apic.X2APIC, apicv=True), None, "EOI_INDUCED/kernel"),
        (Platform(Irqchip.SPLIT, Apic.X2APIC, apicv=True), None, "EOI_INDUCED/user"),
        (Platform(Irqchip.SPLIT, Apic.XAPIC, apicv=True), None, "EOI_INDUCED/user"),
    ],
)
def test_ends_of_interrupts(platform: Platform, edge: str | None, level: str) -> None:
    found = Rules(platform, Costs.load()).eois[platform.apic is Apic.X2APIC]
    assert [name(exit_) for exit_ in found] == [edge, level]


def test_with_posted_interrupts_nothing_exits_for_an_arrival() -> None:
    without, with_apicv = rules(), rules(apicv=True)
    assert name(without.kick) == "EXTERNAL_INTERRUPT/kernel"
    assert name(without.window) == "INTERRUPT_WINDOW/kernel"
    assert with_apicv.kick is None
    assert with_apicv.window is None


def test_pv_eoi_is_not_used_with_apicv() -> None:
    on = Platform(pv_eoi=True, apicv=False)
    assert Rules(on, Costs.load()).pv_eoi
    assert not Rules(Platform(pv_eoi=True, apicv=True), Costs.load()).pv_eoi


@pytest.mark.parametrize(
    "platform",
    [
        Platform(Irqchip.OFF, Apic.X2APIC),
        Platform(Irqchip.OFF, Apic.XAPIC, apicv=True),
        Platform(Irqchip.OFF, Apic.XAPIC, pv_eoi=True),
    ],
)
def test_what_takes_a_local_apic_in_kvm_is_refused_without_one(platform: Platform) -> None:
    with pytest.raises(UsageError, match="local APIC in KVM"):
        Rules(platform, Costs.load())
