# SPDX-License-Identifier: GPL-2.0-or-later
"""The I/O APIC: lines in, messages out, and its registers."""

from __future__ import annotations

import random

import pytest

from qvis.emulated.events import Events
from qvis.emulated.ioapic import IoApic
from qvis.emulated.lapic import LocalApic
from qvis.emulated.messages import ApicBus, Delivery
from qvis.emulated.pic import PicPair

VECTOR, PIN = 0x41, 5
MASKED, LEVEL, REMOTE_IRR, LOGICAL = 1 << 16, 1 << 15, 1 << 14, 1 << 11
EOI = 0x40


@pytest.fixture
def apic() -> LocalApic:
    apic = LocalApic(0, ApicBus(), Events())
    apic.write(0xF0, 0x1FF)
    return apic


@pytest.fixture
def ioapic(apic: LocalApic) -> IoApic:
    return IoApic(apic.bus)


def read(ioapic: IoApic, register: int) -> int:
    ioapic.write(0x00, 4, register)
    return ioapic.read(0x10, 4)


def write(ioapic: IoApic, register: int, value: int) -> None:
    ioapic.write(0x00, 4, register)
    ioapic.write(0x10, 4, value)


def route(ioapic: IoApic, pin: int, entry: int) -> None:
    write(ioapic, 0x11 + 2 * pin, entry >> 32)
    write(ioapic, 0x10 + 2 * pin, entry & 0xFFFFFFFF)


def pulse(ioapic: IoApic, pin: int = PIN) -> None:
    ioapic.set_line(pin, True)
    ioapic.set_line(pin, False)


def take(apic: LocalApic) -> list[int]:
    """Serve what may be served, up to a few."""
    taken: list[int] = []
    while apic.pending() >= 0 and len(taken) < 8:
        taken.append(apic.acknowledge())
        apic.eoi()
    return taken


def test_an_edge_is_one_interrupt(apic: LocalApic, ioapic: IoApic) -> None:
    route(ioapic, PIN, VECTOR)
    ioapic.set_line(PIN, True)
    assert take(apic) == [VECTOR]
    ioapic.set_line(PIN, True)
    assert take(apic) == []
    ioapic.set_line(PIN, False)
    ioapic.set_line(PIN, True)
    assert take(apic) == [VECTOR]
    assert not read(ioapic, 0x10 + 2 * PIN) & REMOTE_IRR


def test_a_masked_edge_is_lost(apic: LocalApic, ioapic: IoApic) -> None:
    route(ioapic, PIN, MASKED | VECTOR)
    pulse(ioapic)
    ioapic.set_line(PIN, True)
    route(ioapic, PIN, VECTOR)
    assert take(apic) == []


def test_a_level_comes_again_until_the_line_falls(apic: LocalApic, ioapic: IoApic) -> None:
    route(ioapic, PIN, LEVEL | VECTOR)
    ioapic.set_line(PIN, True)
    for _ in range(3):
        assert apic.acknowledge() == VECTOR
        assert read(ioapic, 0x10 + 2 * PIN) & REMOTE_IRR
        assert apic.pending() == -1
        apic.eoi()
        assert apic.pending() == VECTOR
    apic.acknowledge()
    ioapic.set_line(PIN, False)
    apic.eoi()
    assert apic.pending() == -1
    assert not read(ioapic, 0x10 + 2 * PIN) & REMOTE_IRR


def test_a_level_that_falls_before_it_is_served_was_sent(apic: LocalApic, ioapic: IoApic) -> None:
    route(ioapic, PIN, LEVEL | VECTOR)
    pulse(ioapic)
    pulse(ioapic)
    assert take(apic) == [VECTOR]


def test_a_level_waits_for_its_mask(apic: LocalApic, ioapic: IoApic) -> None:
    route(ioapic, PIN, MASKED | LEVEL | VECTOR)
    ioapic.set_line(PIN, True)
    assert take(apic) == []
    write(ioapic, 0x10 + 2 * PIN, LEVEL | VECTOR)
    assert apic.pending() == VECTOR


def test_a_pin_masked_while_served_does_not_come_again(apic: LocalApic, ioapic: IoApic) -> None:
    route(ioapic, PIN, LEVEL | VECTOR)
    ioapic.set_line(PIN, True)
    apic.acknowledge()
    write(ioapic, 0x10 + 2 * PIN, MASKED | LEVEL | VECTOR)
    assert read(ioapic, 0x10 + 2 * PIN) & REMOTE_IRR
    apic.eoi()
    assert not read(ioapic, 0x10 + 2 * PIN) & REMOTE_IRR
    assert apic.pending() == -1
    write(ioapic, 0x10 + 2 * PIN, LEVEL | VECTOR)
    assert apic.pending() == VECTOR


def test_remote_irr_and_status_cannot_be_written(ioapic: IoApic) -> None:
    write(ioapic, 0x10 + 2 * PIN, 0xFFFFFFFF)
    assert read(ioapic, 0x10 + 2 * PIN) == 0xFFFFFFFF & ~(REMOTE_IRR | 1 << 12)
    write(ioapic, 0x11 + 2 * PIN, 0xFFFFFFFF)
    assert read(ioapic, 0x11 + 2 * PIN) == 0xFFFFFFFF


def test_edge_trigger_clears_remote_irr(apic: LocalApic, ioapic: IoApic) -> None:
    route(ioapic, PIN, LEVEL | VECTOR)
    ioapic.set_line(PIN, True)
    apic.acknowledge()
    write(ioapic, 0x10 + 2 * PIN, MASKED | VECTOR)
    assert not read(ioapic, 0x10 + 2 * PIN) & REMOTE_IRR
    write(ioapic, 0x10 + 2 * PIN, LEVEL | VECTOR)
    apic.eoi()
    assert apic.pending() == VECTOR


def test_a_line_that_is_up_already_is_a_level_and_no_edge(apic: LocalApic, ioapic: IoApic) -> None:
    ioapic.set_line(PIN, True)
    route(ioapic, PIN, VECTOR)
    assert take(apic) == []
    route(ioapic, PIN, LEVEL | VECTOR)
    assert apic.pending() == VECTOR


def test_the_eoi_register_ends_a_vector(apic: LocalApic, ioapic: IoApic) -> None:
    other = IoApic(apic.bus)
    route(other, PIN, LEVEL | VECTOR)
    other.set_line(PIN, True)
    apic.acknowledge()
    ioapic.write(EOI, 1, VECTOR)
    ioapic.write(EOI, 4, VECTOR | 0x100)
    ioapic.write(EOI, 4, VECTOR + 1)
    assert (other.remote_irr, apic.irr) == (1 << PIN, 0)
    ioapic.write(EOI, 4, VECTOR)
    assert apic.irr == 1 << VECTOR


def test_an_eoi_is_for_all_pins_of_its_vector(apic: LocalApic, ioapic: IoApic) -> None:
    other = IoApic(apic.bus)
    for chip, pin in ((ioapic, 1), (ioapic, 2), (other, 1)):
        route(chip, pin, LEVEL | VECTOR)
        chip.set_line(pin, True)
    assert apic.acknowledge() == VECTOR
    ioapic.set_line(1, False)
    other.set_line(1, False)
    apic.eoi()
    assert (ioapic.remote_irr, other.remote_irr) == (1 << 2, 0)
    assert apic.acknowledge() == VECTOR
    ioapic.set_line(2, False)
    apic.eoi()
    assert take(apic) == []
    assert ioapic.remote_irr == 0


def test_the_entry_says_who_gets_it(apic: LocalApic, ioapic: IoApic) -> None:
    bus = apic.bus
    for index in range(1, 300):
        LocalApic(index, bus, apic.events).write(0xF0, 0x1FF)
    bus.apics[3].write(0xD0, 0x40 << 24)

    def gets(entry: int) -> list[int]:
        route(ioapic, PIN, entry)
        pulse(ioapic)
        found = [apic.index for apic in bus.apics if apic.irr]
        for apic in bus.apics:
            apic.irr = 0
        return found

    assert gets(2 << 56 | VECTOR) == [2]
    assert gets(0x40 << 56 | LOGICAL | VECTOR) == [3]
    assert gets(0x25 << 56 | 0x02 << 48 | VECTOR) == [0x125]
    assert gets(0xFF << 56 | VECTOR) == list(range(300))
    assert gets(0x09 << 56 | 0x100 | VECTOR) == [9]


@pytest.mark.parametrize("delivery", [Delivery.SMI, Delivery.NMI, Delivery.INIT])
def test_what_is_not_by_vector_is_by_edge(
    apic: LocalApic, ioapic: IoApic, delivery: Delivery
) -> None:
    seen: list[Delivery] = []
    apic.signal = lambda what, vector: seen.append(what)
    route(ioapic, PIN, LEVEL | delivery << 8)
    pulse(ioapic)
    pulse(ioapic)
    assert seen == [delivery] * 2
    assert ioapic.remote_irr == 0


def test_an_extint_pin_has_its_vector_from_the_pic(apic: LocalApic, ioapic: IoApic) -> None:
    pic = PicPair()
    for value in (0x11, 0x30, 0x04, 0x01):
        pic.outp(0x20 if value == 0x11 else 0x21, value)
    apic.bus.pic = pic
    pic.set_line(1, True)
    route(ioapic, 0, Delivery.EXTINT << 8)
    pulse(ioapic, 0)
    assert take(apic) == [0x31]


def test_identification_registers(apic: LocalApic) -> None:
    ioapic = IoApic(apic.bus, 24, 3)
    assert [read(ioapic, n) for n in range(4)] == [3 << 24, 0x00170020, 3 << 24, 0]
    write(ioapic, 0, 0xFFFFFFFF)
    assert [read(ioapic, n) for n in range(3)] == [0xF << 24, 0x00170020, 0xF << 24]
    write(ioapic, 1, 0)
    write(ioapic, 2, 0)
    assert [read(ioapic, n) for n in range(3)] == [0xF << 24, 0x00170020, 0xF << 24]


def test_registers_beyond_the_pins_are_nothing(ioapic: IoApic) -> None:
    for register in (3, 0xF, 0x40, 0xFF):
        write(ioapic, register, 0xFFFFFFFF)
        assert read(ioapic, register) == 0
    ioapic.write(0, 4, 0x12345610)
    assert ioapic.read(0, 4) == 0x10
    assert all(ioapic.entry(pin) == MASKED for pin in range(24))


@pytest.mark.parametrize("size", [1, 2])
def test_the_window_is_32_bits_wide(ioapic: IoApic, size: int) -> None:
    ioapic.write(0, size, 0x10)
    assert ioapic.read(0, size) == 0x10
    ioapic.write(0x10, size, VECTOR)
    assert ioapic.read(0x10, size) == 0
    assert ioapic.read(0x10, 4) == MASKED


def test_reset_forgets_entries_and_leaves_lines(apic: LocalApic, ioapic: IoApic) -> None:
    route(ioapic, PIN, LEVEL | VECTOR)
    ioapic.set_line(PIN, True)
    write(ioapic, 0, 5 << 24)
    ioapic.reset()
    assert (ioapic.remote_irr, ioapic.entry(PIN), ioapic.id) == (0, MASKED, 0)
    apic.irr = 0
    route(ioapic, PIN, LEVEL | VECTOR)
    assert apic.pending() == VECTOR


def test_any_access_is_survived(apic: LocalApic, ioapic: IoApic) -> None:
    source = random.Random(3)
    for _ in range(20_000):
        offset, size = (
            source.choice((0, 0x10, 0x40, source.randrange(0x1000))),
            1 << (source.randrange(4)),
        )
        ioapic.write(offset, size, source.getrandbits(64))
        assert 0 <= ioapic.read(offset, size) < 1 << 32
        ioapic.set_line(source.randrange(24), bool(source.getrandbits(1)))
        if apic.pending() >= 0:
            apic.acknowledge()
            apic.eoi()
    assert 0 <= ioapic.remote_irr < 1 << 24
