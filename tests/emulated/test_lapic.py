# SPDX-License-Identifier: GPL-2.0-or-later
"""The local APIC: priorities, registers, what a guest may not do, and the timer."""

from __future__ import annotations

import random

import pytest

from qvis.emulated.apictimer import CYCLES_PER_COUNT, SHORTEST_PERIOD
from qvis.emulated.events import Events
from qvis.emulated.ioapic import IoApic
from qvis.emulated.lapic import LocalApic, MsrFault
from qvis.emulated.messages import ApicBus, Delivery

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
TIMER, THERMAL, PERF, LINT0, LINT1, ERROR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
INITIAL, CURRENT, DIVIDE = 0x380, 0x390, 0x3E0
BASE, DEADLINE = 0x1B, 0x6E0
VECTOR = 0x41
ONE_SHOT, PERIODIC, TSC_DEADLINE, MASKED = 0, 1 << 17, 2 << 17, 1 << 16


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def apic(events: Events) -> LocalApic:
    apic = LocalApic(0, ApicBus(), events)
    apic.write(SVR, 0x1FF)
    return apic


@pytest.fixture
def x2apic(apic: LocalApic) -> LocalApic:
    apic.wrmsr(BASE, apic.base | 0x400)
    return apic


def take(apic: LocalApic) -> list[int]:
    """Serve all that may be served, one after the other."""
    taken = []
    while (vector := apic.pending()) >= 0:
        assert apic.acknowledge() == vector
        taken.append(vector)
        assert apic.eoi() == vector
    return taken


def test_an_interrupt_goes_from_irr_to_isr_to_its_end(apic: LocalApic) -> None:
    assert apic.pending() == -1
    assert apic.accept(VECTOR, False)
    assert (apic.irr, apic.isr) == (1 << VECTOR, 0)
    assert apic.pending() == VECTOR
    assert apic.acknowledge() == VECTOR
    assert (apic.irr, apic.isr) == (0, 1 << VECTOR)
    assert apic.pending() == -1
    assert apic.eoi() == VECTOR
    assert (apic.irr, apic.isr) == (0, 0)
    assert apic.eoi() == -1


def test_a_second_one_merges_while_pending_and_not_while_in_service(apic: LocalApic) -> None:
    assert apic.accept(VECTOR, False)
    assert not apic.accept(VECTOR, False)
    apic.acknowledge()
    assert apic.accept(VECTOR, False)
    assert apic.pending() == -1
    apic.eoi()
    assert take(apic) == [VECTOR]


def test_the_highest_vector_is_first(apic: LocalApic) -> None:
    vectors = random.Random(0).sample(range(16, 256), 50)
    for vector in vectors:
        apic.accept(vector, False)
    assert take(apic) == sorted(vectors, reverse=True)


def test_only_a_higher_class_interrupts_one_in_service(apic: LocalApic) -> None:
    apic.accept(0x41, False)
    apic.acknowledge()
    apic.accept(0x4F, False)
    assert apic.pending() == -1
    apic.accept(0x50, False)
    assert apic.pending() == 0x50
    apic.acknowledge()
    assert apic.eoi() == 0x50
    assert apic.pending() == -1
    assert apic.eoi() == 0x41
    assert apic.pending() == 0x4F


def test_tpr_holds_back_its_class_and_below(apic: LocalApic) -> None:
    apic.accept(0x41, False)
    apic.write(TPR, 0x40)
    assert apic.pending() == -1
    apic.write(TPR, 0x3F)
    assert apic.pending() == 0x41
    apic.tpr = 0xFF
    assert apic.pending() == -1


@pytest.mark.parametrize(
    ("tpr", "served", "ppr"),
    [(0, None, 0), (0x35, None, 0x35), (0x35, 0x41, 0x40), (0x45, 0x41, 0x45), (0x50, 0x41, 0x50)],
)
def test_ppr_is_the_higher_of_tpr_and_what_is_served(
    apic: LocalApic, tpr: int, served: int | None, ppr: int
) -> None:
    if served is not None:
        apic.accept(served, False)
        apic.acknowledge()
    apic.write(TPR, tpr)
    assert apic.read(PPR) == ppr


def test_an_interrupt_that_may_not_be_taken_any_more_is_spurious(apic: LocalApic) -> None:
    apic.write(SVR, 0x1EF)
    apic.accept(0x41, False)
    apic.write(TPR, 0x40)
    assert apic.acknowledge() == 0xEF
    assert (apic.irr, apic.isr) == (1 << 0x41, 0)


def test_a_processor_is_woken_by_what_it_may_take_now(apic: LocalApic) -> None:
    woken: list[int] = []
    apic.wake = lambda: woken.append(apic.pending())
    apic.accept(0x41, False)
    apic.accept(0x41, False)
    assert woken == [0x41]
    apic.write(TPR, 0xF0)
    apic.accept(0x51, False)
    woken.clear()
    apic.write(TPR, 0)
    assert woken == [0x51]
    apic.acknowledge()
    woken.clear()
    apic.eoi()
    assert woken == [0x41]


def test_a_disabled_apic_takes_nothing_and_keeps_what_it_has(apic: LocalApic) -> None:
    apic.accept(0x41, False)
    apic.write(SVR, 0xFF)
    assert not apic.accept(0x51, False)
    assert apic.pending() == -1
    apic.write(SVR, 0x1FF)
    assert apic.pending() == 0x41
    assert apic.irr == 1 << 0x41


def test_disabling_masks_the_local_vector_table(apic: LocalApic) -> None:
    entries = (TIMER, THERMAL, PERF, LINT0, LINT1, ERROR)
    for entry in entries:
        apic.write(entry, 0x50)
    apic.write(SVR, 0xFF)
    assert [apic.read(entry) for entry in entries] == [0x10050] * 6
    apic.write(ERROR, 0x50)
    assert apic.read(ERROR) == 0x10050
    apic.write(SVR, 0x1FF)
    apic.write(ERROR, 0x50)
    assert apic.read(ERROR) == 0x50


@pytest.mark.parametrize("directed", [False, True])
def test_ends_of_level_triggered_interrupts_are_broadcast(apic: LocalApic, directed: bool) -> None:
    ioapic = IoApic(apic.bus)
    apic.directed_eoi = directed
    assert apic.read(VERSION) == 0x50014 | directed << 24
    apic.write(SVR, 0x11FF)
    assert apic.read(SVR) == (0x11FF if directed else 0x1FF)
    ioapic.write(0, 4, 0x10)
    ioapic.write(0x10, 4, 0x8000 | VECTOR)
    ioapic.set_line(0, True)
    assert apic.read(TMR + 0x20) == 1 << (VECTOR - 64)
    apic.acknowledge()
    assert apic.eoi() == VECTOR
    assert apic.pending() == (-1 if directed else VECTOR)
    ioapic.set_line(0, False)
    take(apic)
    assert ioapic.remote_irr == directed
    ioapic.write(0x40, 4, VECTOR)
    assert ioapic.remote_irr == 0


def test_an_edge_clears_the_trigger_mode_that_a_level_set(apic: LocalApic) -> None:
    apic.accept(VECTOR, True)
    assert apic.tmr == 1 << VECTOR
    apic.accept(VECTOR, False)
    assert apic.tmr == 0


def test_registers_after_reset(events: Events) -> None:
    bus = ApicBus()
    LocalApic(0, bus, events)
    apic = LocalApic(1, bus, events)
    expected = {
        ID: 1 << 24, VERSION: 0x50014, TPR: 0, PPR: 0, LDR: 0, DFR: 0xFFFFFFFF, SVR: 0xFF, ESR: 0,
        ICR: 0, ICR_HIGH: 0, INITIAL: 0, CURRENT: 0, DIVIDE: 0,
        **dict.fromkeys((TIMER, THERMAL, PERF, LINT0, LINT1, ERROR), MASKED),
    }  # fmt: skip
    assert {offset: apic.read(offset) for offset in expected} == expected
    assert bus.apics[0].base == 0xFEE00900
    assert apic.base == 0xFEE00800


def test_sets_of_vectors_read_in_eight_parts(apic: LocalApic) -> None:
    for vector in (16, 31, 32, 100, 255):
        apic.accept(vector, vector == 100)
    words = [apic.read(IRR + n * 16) for n in range(8)]
    assert words == [1 << 16 | 1 << 31, 1, 0, 1 << 4, 0, 0, 0, 1 << 31]
    assert [apic.read(TMR + n * 16) for n in range(8)] == [0, 0, 0, 1 << 4, 0, 0, 0, 0]
    apic.acknowledge()
    assert apic.read(ISR + 0x70) == 1 << 31


def test_bits_that_are_not_there_are_not_kept(apic: LocalApic) -> None:
    everything = 0xFFFFFFFF
    expected = {
        TPR: 0xFF, LDR: 0xFF000000, DFR: everything, SVR: 0x1FF, ICR_HIGH: 0xFF000000,
        TIMER: 0x700FF, THERMAL: 0x107FF, PERF: 0x107FF, LINT0: 0x1A7FF, LINT1: 0x1A7FF,
        ERROR: 0x100FF, DIVIDE: 0xB, ID: 0xFF000000,
    }  # fmt: skip
    for offset in expected:
        apic.write(offset, everything)
    assert {offset: apic.read(offset) for offset in expected} == expected
    apic.write(ICR, 0xFFFFFFFF & ~0xC0000)
    assert apic.read(ICR) == 0xCFFF


def test_what_is_read_only_stays(apic: LocalApic) -> None:
    before = [apic.read(offset) for offset in (VERSION, PPR, ISR, TMR, IRR, CURRENT)]
    for offset in (VERSION, PPR, ISR, TMR, IRR, CURRENT, 0x90):
        apic.write(offset, 0xFFFFFFFF)
    assert [apic.read(offset) for offset in (VERSION, PPR, ISR, TMR, IRR, CURRENT)] == before
    apic.write(ESR, 0)
    assert apic.read(ESR) == 0


@pytest.mark.parametrize("size", [1, 2])
def test_narrow_accesses_read_nothing_and_write_nothing(apic: LocalApic, size: int) -> None:
    apic.write(TPR, 0xFF, size)
    assert apic.read(TPR) == 0
    assert apic.read(VERSION, size) == 0


def test_any_access_anywhere_is_survived(apic: LocalApic, events: Events) -> None:
    IoApic(apic.bus)
    source = random.Random(1)
    for _ in range(20_000):
        offset, size = source.randrange(0x1000), source.choice((1, 2, 4, 8))
        assert 0 <= apic.read(offset, size) < 1 << 32
        apic.write(offset, source.getrandbits(64), size)
        events.run(3)
        if apic.pending() >= 0:
            apic.acknowledge()
    for vectors in (apic.irr, apic.isr, apic.tmr):
        assert 0 <= vectors < 1 << 256
        assert not vectors & 0xFFFF


def test_an_illegal_register_is_an_error_in_esr_once_it_is_written(apic: LocalApic) -> None:
    assert apic.read(0x40) == 0
    assert apic.read(ESR) == 0
    apic.write(ESR, 0)
    assert apic.read(ESR) == 0x80
    apic.write(ESR, 0)
    assert apic.read(ESR) == 0


def test_vectors_below_16_are_errors_and_never_pending(apic: LocalApic) -> None:
    apic.write(ERROR, 0xFE)
    assert not apic.accept(15, False)
    assert apic.irr == 1 << 0xFE
    apic.write(ESR, 0)
    assert apic.read(ESR) == 0x40
    apic.write(ICR, 0x4000F)
    apic.write(ESR, 0)
    assert apic.read(ESR) == 0x20
    assert apic.irr == 1 << 0xFE


def test_the_error_interrupt_comes_once_until_esr_is_written(apic: LocalApic) -> None:
    apic.write(ERROR, 0xFE)
    apic.read(0x40)
    assert take(apic) == [0xFE]
    apic.read(0x40)
    assert take(apic) == []
    apic.write(ESR, 0)
    apic.read(0x40)
    assert take(apic) == [0xFE]


def test_an_error_vector_that_is_an_error_is_the_last(apic: LocalApic) -> None:
    apic.write(ERROR, 0x05)
    apic.read(0x40)
    apic.write(ESR, 0)
    assert apic.read(ESR) == 0xC0
    assert apic.irr == 0


# x2APIC.


def test_x2apic_has_the_same_registers_as_msrs(x2apic: LocalApic) -> None:
    for msr, value in {
        0x802: 0,
        0x803: 0x50014,
        0x808: 0,
        0x80A: 0,
        0x80D: 1,
        0x80F: 0x1FF,
    }.items():
        assert x2apic.rdmsr(msr) == value
    x2apic.accept(VECTOR, False)
    assert x2apic.rdmsr(0x822) == 1 << (VECTOR - 64)
    x2apic.acknowledge()
    x2apic.wrmsr(0x80B, 0)
    assert x2apic.isr == 0


@pytest.mark.parametrize("index", [0, 17, 255, 256, 1023])
def test_the_logical_x2apic_id_follows_from_the_id(events: Events, index: int) -> None:
    bus = ApicBus()
    apics = [LocalApic(n, bus, events) for n in range(index + 1)]
    apics[index].wrmsr(BASE, apics[index].base | 0x400)
    assert apics[index].rdmsr(0x802) == index
    assert apics[index].rdmsr(0x80D) == index >> 4 << 16 | 1 << (index & 15)


def test_self_ipi(x2apic: LocalApic) -> None:
    x2apic.wrmsr(0x83F, VECTOR)
    assert x2apic.pending() == VECTOR


def test_x2apic_msrs_fault_in_xapic_mode(apic: LocalApic) -> None:
    for msr in range(0x800, 0x840):
        with pytest.raises(MsrFault):
            apic.rdmsr(msr)
        with pytest.raises(MsrFault):
            apic.wrmsr(msr, 0)


def test_the_page_answers_nothing_in_x2apic_mode(x2apic: LocalApic) -> None:
    x2apic.write(TPR, 0x20)
    assert x2apic.read(VERSION) == 0
    assert x2apic.tpr == 0


READABLE = {
    0x802, 0x803, 0x808, 0x80A, 0x80D, 0x80F, *range(0x810, 0x829), 0x830, *range(0x832, 0x83A),
    0x83E,
}  # fmt: skip
WRITABLE = {0x808, 0x80B, 0x80F, 0x828, 0x830, *range(0x832, 0x839), 0x83E, 0x83F}


def test_msrs_that_are_not_there_fault(x2apic: LocalApic) -> None:
    for msr in range(0x800, 0x900):
        if msr not in READABLE:
            with pytest.raises(MsrFault):
                x2apic.rdmsr(msr)
        else:
            x2apic.rdmsr(msr)
        if msr not in WRITABLE:
            with pytest.raises(MsrFault):
                x2apic.wrmsr(msr, 0)
        elif msr not in (0x830, 0x83F):
            x2apic.wrmsr(msr, 0)


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        (0x808, 0x100), (0x80B, 1), (0x80F, 1 << 12), (0x80F, 1 << 32), (0x828, 1),
        (0x830, 1 << 20), (0x830, 1 << 13), (0x832, 1 << 19), (0x833, 1 << 15), (0x835, 1 << 17),
        (0x837, 1 << 8), (0x838, 1 << 32), (0x83E, 4), (0x83F, 0x100),
    ],
)  # fmt: skip
def test_reserved_bits_fault_and_change_nothing(x2apic: LocalApic, msr: int, value: int) -> None:
    before = x2apic.rdmsr(msr) if msr in READABLE else 0
    with pytest.raises(MsrFault):
        x2apic.wrmsr(msr, value)
    assert (x2apic.rdmsr(msr) if msr in READABLE else 0) == before
    assert x2apic.irr == 0


def test_suppressing_eoi_broadcasts_needs_what_offers_it(x2apic: LocalApic) -> None:
    x2apic.directed_eoi = True
    x2apic.wrmsr(0x80F, 0x11FF)
    assert x2apic.rdmsr(0x80F) == 0x11FF


OFF, XAPIC, INVALID, X2APIC = 0x000, 0x800, 0x400, 0xC00


@pytest.mark.parametrize(
    ("start", "end", "allowed"),
    [
        (XAPIC, X2APIC, True), (XAPIC, OFF, True), (XAPIC, XAPIC, True), (XAPIC, INVALID, False),
        (X2APIC, OFF, True), (X2APIC, XAPIC, False), (X2APIC, INVALID, False),
        (X2APIC, X2APIC, True), (OFF, XAPIC, True), (OFF, X2APIC, False), (OFF, INVALID, False),
        (OFF, OFF, True),
    ],
)  # fmt: skip
def test_modes_lead_to_each_other_as_the_manual_draws_it(
    apic: LocalApic, start: int, end: int, allowed: bool
) -> None:
    apic.wrmsr(BASE, 0xFEE00000 | start)
    if allowed:
        apic.wrmsr(BASE, 0xFEE00000 | end)
        assert apic.rdmsr(BASE) == 0xFEE00100 | end
        assert apic.x2apic == (end == X2APIC)
    else:
        with pytest.raises(MsrFault):
            apic.wrmsr(BASE, 0xFEE00000 | end)
        assert apic.rdmsr(BASE) == 0xFEE00100 | start


def test_reserved_bits_of_the_base_fault(apic: LocalApic) -> None:
    for bit in (0, 7, 9, 40, 63):
        with pytest.raises(MsrFault):
            apic.wrmsr(BASE, apic.base | 1 << bit)


def test_what_is_pending_survives_the_switch_to_x2apic(apic: LocalApic) -> None:
    apic.accept(VECTOR, False)
    apic.wrmsr(BASE, apic.base | 0x400)
    assert take(apic) == [VECTOR]


# LINT0, LINT1.


def test_an_extint_of_the_pic_goes_past_the_apic(apic: LocalApic) -> None:
    woken: list[bool] = []
    apic.wake = lambda: woken.append(apic.extint())
    apic.lint(0, True)
    assert not apic.extint()
    apic.write(LINT0, 0x700)
    assert woken == [True]
    assert apic.pending() == -1
    apic.lint(0, False)
    assert not apic.extint()


def test_without_an_apic_the_pics_line_is_the_processors(apic: LocalApic) -> None:
    apic.wrmsr(BASE, apic.base & ~0x800)
    apic.lint(0, True)
    assert apic.extint()


def test_lint1_is_the_nmi(apic: LocalApic) -> None:
    seen: list[Delivery] = []
    apic.signal = lambda delivery, vector: seen.append(delivery)
    apic.lint(1, True)
    apic.lint(1, False)
    assert seen == []
    apic.write(LINT1, 0x400)
    apic.lint(1, True)
    apic.lint(1, True)
    assert seen == [Delivery.NMI]


def test_a_level_at_lint0_comes_again_until_it_falls(apic: LocalApic) -> None:
    apic.write(LINT0, 0x8000 | VECTOR)
    apic.lint(0, True)
    for _ in range(3):
        assert apic.acknowledge() == VECTOR
        assert apic.pending() == -1
        apic.eoi()
        assert apic.pending() == VECTOR
    apic.lint(0, False)
    assert apic.pending() == -1


def test_an_edge_at_lint0_comes_once(apic: LocalApic) -> None:
    apic.write(LINT0, VECTOR)
    apic.lint(0, True)
    apic.lint(0, True)
    assert take(apic) == [VECTOR]


# The timer.


def start(apic: LocalApic, mode: int, count: int, divide: int = 0xB) -> None:
    apic.write(DIVIDE, divide)
    apic.write(TIMER, mode | VECTOR)
    apic.write(INITIAL, count)


def test_one_shot_expires_once_after_its_count(apic: LocalApic, events: Events) -> None:
    start(apic, ONE_SHOT, 1000)
    events.run()
    assert events.now == 1001 * CYCLES_PER_COUNT
    assert take(apic) == [VECTOR]
    assert apic.read(CURRENT) == 0
    apic.write(TIMER, ONE_SHOT | VECTOR)
    events.run()
    assert take(apic) == []


@pytest.mark.parametrize(
    ("divide", "by"),
    [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xA, 128), (0xB, 1)],
)
def test_the_divide_register_slows_the_count(
    apic: LocalApic, events: Events, divide: int, by: int
) -> None:
    start(apic, ONE_SHOT, 1000, divide)
    events.now = 100 * CYCLES_PER_COUNT * by
    assert apic.read(CURRENT) == 900
    events.run()
    assert events.now == 1001 * CYCLES_PER_COUNT * by


def test_a_change_of_the_divide_register_keeps_what_was_counted(
    apic: LocalApic, events: Events
) -> None:
    start(apic, ONE_SHOT, 1000)
    events.now = 500 * CYCLES_PER_COUNT
    apic.write(DIVIDE, 0)
    assert apic.read(CURRENT) == 500
    events.run()
    assert events.now == (500 + 2 * 501) * CYCLES_PER_COUNT


def test_periodic_goes_on_until_it_is_stopped(apic: LocalApic, events: Events) -> None:
    start(apic, PERIODIC, 999_999)
    taken = []
    for _ in range(5):
        events.run(1)
        taken += [(events.now // CYCLES_PER_COUNT, vector) for vector in take(apic)]
    assert taken == [(n * 1_000_000, VECTOR) for n in range(1, 6)]
    apic.write(INITIAL, 0)
    events.run()
    assert take(apic) == []


def test_periods_are_not_shorter_than_kvms_least(apic: LocalApic, events: Events) -> None:
    start(apic, PERIODIC, 1)
    events.run(10)
    assert events.now == 10 * SHORTEST_PERIOD


def test_a_masked_periodic_timer_is_no_event(apic: LocalApic, events: Events) -> None:
    start(apic, PERIODIC, 999_999)
    apic.write(TIMER, PERIODIC | MASKED | VECTOR)
    events.run(10)
    assert events.next is None
    events.now = 5_500_000 * CYCLES_PER_COUNT
    apic.write(TIMER, PERIODIC | VECTOR)
    events.run(1)
    assert events.now == 6_000_000 * CYCLES_PER_COUNT
    assert take(apic) == [VECTOR]


def test_a_one_shot_that_expires_masked_is_gone(apic: LocalApic, events: Events) -> None:
    start(apic, ONE_SHOT | MASKED, 1000)
    events.run()
    apic.write(TIMER, ONE_SHOT | VECTOR)
    events.run()
    assert take(apic) == []


def test_a_new_count_replaces_the_old_one(apic: LocalApic, events: Events) -> None:
    start(apic, ONE_SHOT, 1000)
    apic.write(INITIAL, 3000)
    events.run(1)
    assert take(apic) == []
    events.run()
    assert events.now == 3001 * CYCLES_PER_COUNT
    assert take(apic) == [VECTOR]
    apic.write(INITIAL, 3000)
    apic.write(INITIAL, 1000)
    events.run()
    assert take(apic) == [VECTOR]


def test_the_tsc_deadline_is_a_time(apic: LocalApic, events: Events) -> None:
    apic.write(TIMER, TSC_DEADLINE | VECTOR)
    apic.wrmsr(DEADLINE, 12_345)
    assert apic.rdmsr(DEADLINE) == 12_345
    apic.write(INITIAL, 5)
    assert (apic.read(INITIAL), apic.read(CURRENT)) == (0, 0)
    events.run()
    assert events.now == 12_345
    assert take(apic) == [VECTOR]
    assert apic.rdmsr(DEADLINE) == 0


def test_a_deadline_that_has_passed_is_now_and_zero_is_never(
    apic: LocalApic, events: Events
) -> None:
    events.now = 1_000_000
    apic.write(TIMER, TSC_DEADLINE | VECTOR)
    apic.wrmsr(DEADLINE, 5)
    events.run()
    assert events.now == 1_000_000
    assert take(apic) == [VECTOR]
    apic.wrmsr(DEADLINE, 2_000_000)
    apic.wrmsr(DEADLINE, 0)
    events.run()
    assert take(apic) == []


def test_the_deadline_is_nothing_in_other_modes(apic: LocalApic, events: Events) -> None:
    apic.write(TIMER, ONE_SHOT | VECTOR)
    apic.wrmsr(DEADLINE, 100)
    assert apic.rdmsr(DEADLINE) == 0
    assert events.run() == 0


@pytest.mark.parametrize("other", [ONE_SHOT, PERIODIC])
def test_to_change_from_or_to_deadline_mode_stops_the_timer(
    apic: LocalApic, events: Events, other: int
) -> None:
    start(apic, other, 1_000_000)
    apic.write(TIMER, TSC_DEADLINE | VECTOR)
    apic.wrmsr(DEADLINE, 5_000_000)
    apic.write(TIMER, other | VECTOR)
    events.run()
    assert take(apic) == []
    assert apic.read(CURRENT) == 0


def test_the_reserved_timer_mode_never_expires(apic: LocalApic, events: Events) -> None:
    start(apic, 3 << 17, 1000)
    events.run()
    assert take(apic) == []


@pytest.mark.parametrize("init", [False, True])
def test_a_reset_stops_the_timer(apic: LocalApic, events: Events, init: bool) -> None:
    start(apic, ONE_SHOT, 1000)
    apic.reset(init=init)
    apic.write(SVR, 0x1FF)
    events.run()
    assert apic.pending() == -1


@pytest.mark.parametrize("order", ["rising", "falling", "random"])
def test_a_deadline_that_moves_a_hundred_thousand_times_leaves_few_events(
    apic: LocalApic, events: Events, order: str
) -> None:
    apic.write(TIMER, TSC_DEADLINE | VECTOR)
    times = [(1 << 50) - n * 1_000_003 for n in range(100_000)]
    if order == "rising":
        times.reverse()
    elif order == "random":
        random.Random(2).shuffle(times)
    for n, time in enumerate(times):
        events.now = n
        apic.wrmsr(DEADLINE, time)
    assert len(events._heap) < 200
    last = times[-1]
    events.run(until=lambda: apic.pending() >= 0)
    assert events.now == last
    assert take(apic) == [VECTOR]
    events.run()
    assert take(apic) == []
