# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU: memory, what exits, when it takes interrupts, and when it sleeps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qvis.emulated.lapic import MsrFault
from qvis.emulated.machine import Machine
from qvis.emulated.vcpu import Vcpu
from qvis.transport import Transport
from qvis.x86 import Apic, Irqchip, Platform

from .small import LAPIC, X2APIC, XAPIC, exits, finish, make, message, send, with_disk

ON = Platform(Irqchip.ON, Apic.X2APIC)
APICV = replace(X2APIC, apicv=True)
PV_EOI = replace(X2APIC, pv_eoi=True)
PV_EOI_AT, PV_EOI_MSR = 0x5000, 0x4B564D04


def nothing(vcpu: Vcpu) -> None:
    """What a guest does that does nothing."""


def run(machine: Machine, code: object, *arguments: object) -> None:
    """Run guest code on vCPU 0, and what comes of it."""
    machine.vcpus[0].call(code, machine.vcpus[0], *arguments)  # type: ignore[arg-type]
    finish(machine)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("address", [0x1000, 0x1001, 0x1FFD])
def test_ram_holds_what_is_written_and_nothing_exits(address: int, size: int) -> None:
    machine, _ = make()
    vcpu = machine.vcpus[0]
    value = 0x8877665544332211 & (1 << 8 * size) - 1
    vcpu.write(address, size, value)
    assert vcpu.read(address, size) == value
    assert vcpu.read(address + size, 1) == 0
    assert not exits(machine)
    assert vcpu.clock == machine.vcpus[0].clock


def test_an_access_across_the_end_of_ram_is_no_error() -> None:
    machine, _ = make()
    vcpu, end = machine.vcpus[0], machine.memory.size
    vcpu.write(end - 2, 4, 0x44332211)
    assert vcpu.read(end - 2, 2) == 0x2211
    assert vcpu.read(end - 2, 4) & 0xFFFF == 0x2211
    vcpu.write(end - 3, 8, (1 << 64) - 1)


def test_where_nothing_is_reads_are_zero_and_ports_all_ones() -> None:
    machine, _ = make()
    vcpu = machine.vcpus[0]
    assert vcpu.read(0xD0000000, 4) == 0
    vcpu.write(0xD0000000, 8, 5)
    assert vcpu.inp(0x1234, 2) == 0xFFFF
    vcpu.outp(0x1234, 4, 5)
    assert exits(machine) == {"EPT_MISCONFIG/user": 2, "IO_INSTRUCTION/user": 2}


def test_the_clock_runs_by_what_exits_cost_and_by_what_is_spent() -> None:
    machine, _ = make()
    vcpu = machine.vcpus[0]
    before = vcpu.clock
    vcpu.spend(123)
    vcpu.inp(0x80, 1)
    assert vcpu.clock == before + 123 + machine.rules.port.cycles


def test_the_serial_port_says_that_it_has_sent_what_it_gave_to_its_listener() -> None:
    machine, _ = make()
    sent: list[int] = []
    machine.ports.serial.output = sent.append
    vcpu = machine.vcpus[0]
    vcpu.outp(0x3F8, 1, ord("a"))
    vcpu.outp(0x3FB, 1, 0x80)  # DLAB: the divisor is no output
    vcpu.outp(0x3F8, 1, 1)
    vcpu.outp(0x3FB, 1, 3)
    assert bytes(sent) == b"a"
    assert vcpu.inp(0x3FD, 1) == 0x60
    assert vcpu.inp(0x3FA, 1) == 1


def test_pieces_of_code_run_in_their_order_and_the_vcpu_halts_behind_them() -> None:
    machine, _ = make()
    vcpu = machine.vcpus[0]
    order: list[int] = []
    for n in range(40):
        vcpu.call(order.append, n)
    finish(machine)
    assert order == list(range(40))
    assert vcpu.halted
    assert exits(machine) == {"HLT/kernel": 1}


def test_code_that_was_asked_for_at_a_time_does_not_run_before_it() -> None:
    machine, _ = make(smp=2)
    ran: list[int] = []

    def sender(vcpu: Vcpu) -> None:
        vcpu.spend(10_000)
        vcpu.inp(0x80, 1)
        machine.vcpus[1].call(lambda: ran.append(machine.vcpus[1].clock))

    machine.vcpus[1].call(lambda: machine.vcpus[1].spend(5))
    run(machine, sender)
    assert ran[0] >= 10_000


def test_an_interrupt_wakes_a_halted_vcpu_without_an_exit_of_its_own() -> None:
    machine, guest = make()
    run(machine, nothing)
    machine.bus.msi(*message(0, 0x31))
    finish(machine)
    assert guest.taken == [(0, 0x31)]
    assert exits(machine) == {"HLT/kernel": 2, "MSR_WRITE/kernel": 1}


def interrupted(platform: Platform) -> dict[str, int]:
    """The exits of an interrupt that arrives while the guest computes."""
    machine, guest = make(platform)
    run(machine, nothing)
    before = exits(machine)
    machine.events.after(50_000, send, machine, *message(0, 0x31))
    machine.events.after(20_000, machine.vcpus[0].call, machine.vcpus[0].spend, 50_000)
    finish(machine)
    assert guest.taken == [(0, 0x31)]
    after = exits(machine)
    changed = {name: count - before.get(name, 0) for name, count in after.items()}
    del changed["HLT/kernel" if platform.irqchip is not Irqchip.OFF else "HLT/user"]
    return {name: count for name, count in changed.items() if count}


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        (X2APIC, {"EXTERNAL_INTERRUPT/kernel": 1, "MSR_WRITE/kernel": 1}),
        (XAPIC, {"EXTERNAL_INTERRUPT/kernel": 1, "APIC_ACCESS/fast": 1}),
        (APICV, {}),
        (replace(XAPIC, apicv=True), {}),
        (
            Platform(Irqchip.OFF, Apic.XAPIC),
            {"EXTERNAL_INTERRUPT/user": 1, "EPT_MISCONFIG/user": 1},
        ),
    ],
)
def test_an_interrupt_of_a_running_vcpu_costs_the_exits_of_its_platform(
    platform: Platform, expected: dict[str, int]
) -> None:
    assert interrupted(platform) == expected


def test_a_vcpu_that_was_about_to_halt_when_an_interrupt_came_did_not() -> None:
    machine, _ = make()
    vcpu = machine.vcpus[0]
    vcpu.call(vcpu.spend, 50_000)
    machine.events.run(1)
    assert vcpu.halted  # it is ahead of the machine's time
    machine.events.at(10_000, send, machine, *message(0, 0x31))
    finish(machine)
    assert exits(machine) == {
        "EXTERNAL_INTERRUPT/kernel": 1,
        "MSR_WRITE/kernel": 1,
        "HLT/kernel": 1,
    }


def test_an_interrupt_that_a_vcpu_caused_itself_is_injected_when_it_enters_again() -> None:
    machine, guest = make()
    run(machine, lambda vcpu: vcpu.wrmsr(0x83F, 0x41))
    assert guest.taken == [(0, 0x41)]
    assert exits(machine) == {"MSR_WRITE/kernel": 2, "HLT/kernel": 1}


def test_interrupts_come_by_priority_with_a_window_between_them() -> None:
    machine, guest = make()
    run(machine, nothing)
    for vector in (0x31, 0x61, 0x41):
        machine.bus.msi(*message(0, vector))
    finish(machine)
    assert [vector for _, vector in guest.taken] == [0x61, 0x41, 0x31]
    assert exits(machine)["INTERRUPT_WINDOW/kernel"] == 2


def test_with_apicv_there_is_no_window() -> None:
    machine, guest = make(APICV)
    for vector in (0x31, 0x61):
        machine.bus.msi(*message(0, vector))
    finish(machine)
    assert len(guest.taken) == 2
    assert exits(machine) == {"HLT/kernel": 1}


def test_no_interrupt_is_taken_before_it_was_raised() -> None:
    machine, guest = make(smp=2)
    raised: list[int] = []

    def sender(vcpu: Vcpu) -> None:
        vcpu.spend(100_000)
        vcpu.wrmsr(0x830, 1 << 32 | 0x41)
        raised.append(vcpu.clock)

    machine.events.after(5, send, machine, *message(1, 0x31))
    run(machine, sender)
    took = dict(zip([vector for _, vector in guest.taken], guest.times, strict=True))
    assert took[0x41] >= raised[0]


def test_an_ipi_exits_at_its_sender_and_reaches_the_other() -> None:
    machine, guest = make(smp=2)
    run(machine, lambda vcpu: vcpu.wrmsr(0x830, 1 << 32 | 0x41))
    assert guest.taken == [(1, 0x41)]
    assert exits(machine)["MSR_WRITE/fast"] == 1


def test_a_handler_that_raises_its_own_interrupt_does_not_stop_the_machine() -> None:
    machine, guest = make()
    guest.then = lambda vcpu, vector: vcpu.wrmsr(0x83F, 0x41)
    machine.bus.msi(*message(0, 0x41))
    machine.events.run(1000)
    assert len(guest.taken) >= 1000
    assert machine.events.next is not None


def test_the_local_timer_of_a_running_vcpu_is_vmxs() -> None:
    machine, guest = make()

    def code(vcpu: Vcpu) -> None:
        vcpu.wrmsr(0x832, 0xEC | 2 << 17)
        vcpu.wrmsr(0x6E0, vcpu.rdmsr(0x10) + 5000)

    run(machine, code)
    assert guest.taken == [(0, 0xEC)]
    assert "PREEMPTION_TIMER/fast" not in exits(machine)  # it was asleep
    machine.vcpus[0].call(code, machine.vcpus[0])
    machine.vcpus[0].call(machine.vcpus[0].spend, 50_000)
    finish(machine)
    assert len(guest.taken) == 2
    assert exits(machine)["PREEMPTION_TIMER/fast"] == 1
    assert exits(machine)["MSR_WRITE/fast"] == 2


def test_pv_eoi_saves_the_exit_of_one_interrupt_and_not_of_two() -> None:
    machine, guest = make(PV_EOI)
    run(machine, lambda vcpu: vcpu.wrmsr(PV_EOI_MSR, PV_EOI_AT | 1))
    before = exits(machine)["MSR_WRITE/kernel"]
    machine.bus.msi(*message(0, 0x31))
    finish(machine)
    assert exits(machine)["MSR_WRITE/kernel"] == before
    assert machine.memory.u8[PV_EOI_AT] == 0
    machine.bus.msi(*message(0, 0x31))
    machine.bus.msi(*message(0, 0x41))
    finish(machine)
    assert len(guest.taken) == 3
    assert exits(machine)["MSR_WRITE/kernel"] == before + 1
    assert not machine.vcpus[0].apic.isr


def test_pv_eoi_is_taken_back_when_another_interrupt_comes() -> None:
    machine, guest = make(PV_EOI)
    run(machine, lambda vcpu: vcpu.wrmsr(PV_EOI_MSR, PV_EOI_AT | 1))
    before = exits(machine)["MSR_WRITE/kernel"]
    guest.then = lambda vcpu, vector: send(machine, *message(0, 0x31)) if vector == 0x41 else None
    machine.bus.msi(*message(0, 0x41))
    finish(machine)
    assert [vector for _, vector in guest.taken] == [0x41, 0x31]
    assert exits(machine)["MSR_WRITE/kernel"] == before + 1


def test_pv_eoi_outside_ram_or_switched_off_is_not_used() -> None:
    machine, _ = make(PV_EOI)
    before = exits(machine).get("MSR_WRITE/kernel", 0)
    for value in (machine.memory.size | 1, PV_EOI_AT):
        run(machine, lambda vcpu, value=value: vcpu.wrmsr(PV_EOI_MSR, value))
        machine.bus.msi(*message(0, 0x31))
        finish(machine)
    assert exits(machine)["MSR_WRITE/kernel"] == before + 4


@pytest.mark.parametrize(
    ("platform", "reason"),
    [
        (XAPIC, "APIC_ACCESS/user"),
        (replace(XAPIC, irqchip=Irqchip.ON), "APIC_ACCESS/fast"),
        (APICV, "EOI_INDUCED/user"),
        (replace(APICV, irqchip=Irqchip.ON), "EOI_INDUCED/kernel"),
    ],
)
def test_the_end_of_a_level_triggered_interrupt_reaches_the_ioapic(
    platform: Platform, reason: str
) -> None:
    machine, guest = make(platform)
    ioapic = machine.ioapics[0]
    ioapic.write(0, 4, 0x10 + 2 * 5)
    ioapic.write(0x10, 4, 0x31 | 1 << 15)
    guest.then = lambda vcpu, vector: ioapic.set_line(5, False)
    ioapic.set_line(5, True)
    finish(machine)
    assert guest.taken == [(0, 0x31)]
    assert exits(machine)[reason] == 1
    assert not ioapic.remote_irr


def test_a_level_that_stays_is_taken_again() -> None:
    machine, guest = make(XAPIC)
    ioapic = machine.ioapics[0]
    ioapic.write(0, 4, 0x10 + 2 * 5)
    ioapic.write(0x10, 4, 0x31 | 1 << 15)
    guest.then = lambda vcpu, vector: ioapic.set_line(5, len(guest.taken) < 3)
    ioapic.set_line(5, True)
    finish(machine)
    assert guest.taken == [(0, 0x31)] * 3


def test_ioapics_are_where_linux_looks_for_them() -> None:
    machine, _ = make(ON)
    vcpu = machine.vcpus[0]
    for start, version in ((0xFEC00000, 0x170011), (0xFEC10000, 0x170020)):
        vcpu.write(start, 4, 1)
        assert vcpu.read(start + 0x10, 4) == version
    assert exits(machine) == {"EPT_MISCONFIG/kernel": 2, "EPT_MISCONFIG/user": 2}


def test_xapic_registers_answer_by_memory_and_x2apic_by_msr() -> None:
    machine, _ = make(XAPIC, smp=3)
    assert machine.vcpus[2].read(LAPIC + 0x20, 4) == 2 << 24
    machine.vcpus[2].write(LAPIC + 0x80, 4, 0x20)
    assert machine.vcpus[2].read(LAPIC + 0x80, 4) == 0x20
    machine, _ = make(X2APIC, smp=3)
    assert machine.vcpus[2].rdmsr(0x802) == 2


@pytest.mark.parametrize("msr", [0x2, 0x810, 0x83F, 0x900, 0x4B564DFF])
def test_an_msr_that_is_none_faults(msr: int) -> None:
    machine, _ = make(XAPIC)
    with pytest.raises(MsrFault):
        machine.vcpus[0].rdmsr(msr)
    with pytest.raises(MsrFault):
        machine.vcpus[0].wrmsr(msr, 1)


def test_an_x2apic_eoi_other_than_zero_faults() -> None:
    machine, _ = make()
    with pytest.raises(MsrFault):
        machine.vcpus[0].wrmsr(0x80B, 1)


def test_a_pending_interrupt_waits_for_the_task_priority() -> None:
    machine, guest = make()
    run(machine, lambda vcpu: vcpu.wrmsr(0x808, 0x40))
    machine.bus.msi(*message(0, 0x31))
    finish(machine)
    assert not guest.taken
    run(machine, lambda vcpu: vcpu.wrmsr(0x808, 0))
    assert guest.taken == [(0, 0x31)]


@pytest.mark.parametrize(
    ("at_once", "reason"), [(False, "EPT_MISCONFIG/kernel"), (True, "EPT_MISCONFIG/user")]
)
def test_a_request_is_notified_completed_and_interrupts(at_once: bool, reason: str) -> None:
    machine, guest, driver = with_disk(at_once=at_once)
    run(machine, driver.submit)
    assert driver.done() == 1
    assert guest.taken == [(0, 0x31)]
    assert exits(machine)[reason] == 1
    assert exits(machine) == {reason: 1, "MSR_WRITE/kernel": 1, "HLT/kernel": 2 - at_once}


@pytest.mark.parametrize(
    "transport", [Transport.INTX, Transport.MSI, Transport.VIS, Transport.VIS_DOORBELL]
)
def test_every_mmio_transport_interrupts(transport: Transport) -> None:
    machine, guest, driver = with_disk(transport)
    pin = machine.devices["blk0"].line - 24
    machine.ioapics[1].write(0, 4, 0x10 + 2 * pin)
    machine.ioapics[1].write(0x10, 4, 0x31 | 1 << 15)
    guest.then = lambda vcpu, vector: (
        vcpu.write(driver.start + 0x64, 4, vcpu.read(driver.start + 0x60, 4))
        if transport is Transport.INTX
        else None
    )
    for _ in range(3):
        run(machine, driver.submit)
    assert guest.taken == [(0, 0x31)] * 3
    assert driver.done() == 3
    assert exits(machine).get("EPT_MISCONFIG/user", 0) == (6 if transport is Transport.INTX else 0)


def test_a_device_answers_after_what_the_table_says_that_it_takes() -> None:
    machine, guest, driver = with_disk()
    run(machine, driver.submit)
    least = machine.latency + machine.costs.step("notify") + machine.costs.step("wake")
    assert guest.times[0] >= least


def test_a_machine_without_a_guest_leaves_interrupts_pending() -> None:
    machine, guest = make()
    machine.guest = None
    machine.bus.msi(*message(0, 0x31))
    finish(machine)
    assert machine.vcpus[0].apic.irr == 1 << 0x31
    machine.guest = guest
    run(machine, nothing)
    assert guest.taken == [(0, 0x31)]


def test_the_pic_interrupts_past_the_local_apic() -> None:
    machine, guest = make(XAPIC)
    vcpu = machine.vcpus[0]
    vcpu.write(LAPIC + 0x350, 4, 0x700)  # LINT0: ExtINT
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 3), (0x21, 0xFE)):
        vcpu.outp(port, 1, value)
    guest.then = lambda vcpu, vector: vcpu.outp(0x20, 1, 0x20) if vector == 0x20 else None
    machine.pic.set_line(0, True)
    machine.bus.msi(*message(0, 0x31))
    finish(machine)
    assert sorted(vector for _, vector in guest.taken) == [0x20, 0x31]
    assert not vcpu.apic.isr


def test_a_vcpu_can_write_a_message_as_a_device_does() -> None:
    machine, guest = make(XAPIC, smp=3)
    run(machine, lambda vcpu: vcpu.write(message(2, 0)[0], 4, 0x31))
    assert guest.taken == [(2, 0x31)]
    assert machine.vcpus[0].read(message(2, 0)[0], 4) == 0xFFFFFFFF
