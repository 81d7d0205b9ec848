# SPDX-License-Identifier: GPL-2.0-or-later
"""The pair of 8259A: priorities, ends, rotation, cascade, and its registers."""

from __future__ import annotations

import random

import pytest

from qvis.emulated.pic import PicPair

COMMAND, DATA, COMMAND2, DATA2, ELCR, ELCR2 = 0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1
BASE, BASE2 = 0x20, 0x28
EOI, ROTATE = 0x20, 0xA0


@pytest.fixture
def pic() -> PicPair:
    pic = PicPair()
    start(pic)
    return pic


def start(pic: PicPair, *, icw1: int = 0x11, icw4: int = 1, icw4_2: int = 1) -> None:
    """What a BIOS and Linux do: vectors from 0x20 on, the second chip on input 2."""
    for command, data, values in (
        (COMMAND, DATA, (BASE, 0x04, icw4)),
        (COMMAND2, DATA2, (BASE2, 0x02, icw4_2)),
    ):
        pic.outp(command, icw1)
        for value in values[: 3 if icw1 & 1 else 2]:
            pic.outp(data, value)
        pic.outp(data, 0)


def pulse(pic: PicPair, *irqs: int) -> None:
    for irq in irqs:
        pic.set_line(irq, True)
        pic.set_line(irq, False)


def end(pic: PicPair, vector: int) -> None:
    if vector >= BASE2:
        pic.outp(COMMAND2, EOI)
    pic.outp(COMMAND, EOI)


def take(pic: PicPair) -> list[int]:
    """Serve all, one after the other; their lines."""
    taken: list[int] = []
    while pic.output and len(taken) < 20:
        vector = pic.acknowledge()
        taken.append(vector - BASE)
        end(pic, vector)
    return taken


def test_an_edge_asks_once_and_its_acknowledgement_gives_the_vector(pic: PicPair) -> None:
    levels: list[bool] = []
    pic.intr = levels.append
    pic.set_line(4, True)
    assert pic.output
    assert pic.inp(COMMAND) == 1 << 4
    assert pic.acknowledge() == BASE + 4
    assert (pic.output, pic.inp(COMMAND)) == (False, 0)
    pic.outp(COMMAND, 0x0B)
    assert pic.inp(COMMAND) == 1 << 4
    pic.outp(COMMAND, EOI)
    assert pic.inp(COMMAND) == 0
    pic.set_line(4, True)
    assert not pic.output
    assert levels == [True, False]


def test_the_lowest_number_has_the_highest_priority(pic: PicPair) -> None:
    pulse(pic, 7, 15, 4, 8, 0, 12, 1)
    assert take(pic) == [0, 1, 8, 12, 15, 4, 7]


def test_only_a_higher_priority_interrupts_one_in_service(pic: PicPair) -> None:
    pulse(pic, 4)
    pic.acknowledge()
    pulse(pic, 5)
    assert not pic.output
    pulse(pic, 4)
    assert not pic.output
    pulse(pic, 3)
    assert pic.acknowledge() == BASE + 3
    pic.outp(COMMAND, EOI)
    assert not pic.output
    pic.outp(COMMAND, EOI)
    assert take(pic) == [4, 5]


def test_the_second_chip_is_between_inputs_1_and_3(pic: PicPair) -> None:
    pulse(pic, 9)
    assert pic.acknowledge() == BASE2 + 1
    pulse(pic, 3)
    assert not pic.output
    pulse(pic, 1)
    assert pic.acknowledge() == BASE + 1
    pic.outp(COMMAND, EOI)
    end(pic, BASE2)
    assert take(pic) == [3]


def test_two_of_the_second_chip_come_one_after_the_other(pic: PicPair) -> None:
    pulse(pic, 12, 9)
    assert take(pic) == [9, 12]


def test_special_fully_nested_lets_the_second_chip_nest(pic: PicPair) -> None:
    pulse(pic, 12)
    pic.acknowledge()
    pulse(pic, 9)
    assert not pic.output
    pic.outp(COMMAND2, EOI)
    pic.outp(COMMAND, EOI)
    assert take(pic) == [9]
    start(pic, icw4=0x11)
    pulse(pic, 12)
    assert pic.acknowledge() == BASE2 + 4
    pulse(pic, 9)
    assert pic.output
    assert pic.acknowledge() == BASE2 + 1


def test_a_masked_input_waits(pic: PicPair) -> None:
    pic.outp(DATA, 1 << 4)
    pulse(pic, 4)
    assert not pic.output
    assert pic.inp(DATA) == 1 << 4
    pic.outp(DATA, 0)
    assert take(pic) == [4]


def test_a_request_that_is_gone_is_spurious_7(pic: PicPair) -> None:
    pic.set_line(4, True)
    pic.outp(DATA, 0xFF)
    assert pic.acknowledge() == BASE + 7
    pic.outp(COMMAND, 0x0B)
    assert pic.inp(COMMAND) == 0


def test_one_gone_behind_the_cascade_is_spurious_15_and_the_first_chips_to_end(
    pic: PicPair,
) -> None:
    pic.set_line(12, True)
    pic.outp(DATA2, 0xFF)
    assert pic.acknowledge() == BASE2 + 7
    pic.outp(COMMAND2, 0x0B)
    pic.outp(COMMAND, 0x0B)
    assert (pic.inp(COMMAND2), pic.inp(COMMAND)) == (0, 1 << 2)


def test_a_specific_eoi_ends_that_one(pic: PicPair) -> None:
    pulse(pic, 4)
    pic.acknowledge()
    pulse(pic, 3)
    pic.acknowledge()
    pic.outp(COMMAND, 0x60 | 4)
    pic.outp(COMMAND, 0x0B)
    assert pic.inp(COMMAND) == 1 << 3


def test_rotation_makes_the_one_that_ended_the_last(pic: PicPair) -> None:
    order = []
    pulse(pic, 0, 1, 3, 4)
    for _ in range(2):
        order.append(pic.acknowledge() - BASE)
        pic.outp(COMMAND, ROTATE)
        pulse(pic, *order)
    while pic.output:
        order.append(pic.acknowledge() - BASE)
        pic.outp(COMMAND, ROTATE)
    assert order == [0, 1, 3, 4, 0, 1]


def test_rotation_on_a_specific_eoi_and_by_command(pic: PicPair) -> None:
    pic.outp(COMMAND, 0xC0 | 3)
    pulse(pic, 0, 3, 4)
    assert [pic.acknowledge() - BASE] == [4]
    pic.outp(COMMAND, 0xE0 | 4)
    assert take(pic) == [0, 3]


def test_automatic_eoi_leaves_nothing_in_service(pic: PicPair) -> None:
    start(pic, icw4=0x03)
    pulse(pic, 3)
    pic.acknowledge()
    pulse(pic, 5)
    assert pic.output
    pic.outp(COMMAND, 0x80)
    assert pic.acknowledge() == BASE + 5
    pulse(pic, 5, 6)
    assert [pic.acknowledge() - BASE for _ in range(2)] == [6, 5]
    pic.outp(COMMAND, 0x00)
    pulse(pic, 7, 0)
    assert [pic.acknowledge() - BASE for _ in range(2)] == [7, 0]


def test_automatic_eoi_of_the_second_chip_loses_nothing(pic: PicPair) -> None:
    start(pic, icw4_2=0x03)
    pulse(pic, 9, 12)
    seen = []
    while pic.output:
        seen.append(pic.acknowledge())
        pic.outp(COMMAND, EOI)
    assert seen == [BASE2 + 1, BASE2 + 4]


def test_special_mask_mode_lets_lower_ones_in(pic: PicPair) -> None:
    pulse(pic, 3)
    pic.acknowledge()
    pulse(pic, 5)
    assert not pic.output
    pic.outp(COMMAND, 0x68)
    pic.outp(DATA, 1 << 3)
    assert pic.acknowledge() == BASE + 5
    pic.outp(COMMAND, 0x48)
    pic.outp(COMMAND, 0x60 | 5)
    pulse(pic, 6)
    assert not pic.output


def test_elcr_makes_an_input_a_level(pic: PicPair) -> None:
    pic.outp(ELCR, 0xFF)
    pic.outp(ELCR2, 0xFF)
    assert (pic.inp(ELCR), pic.inp(ELCR2)) == (0xF8, 0xDE)
    for irq in (5, 10):
        pic.set_line(irq, True)
        for _ in range(3):
            vector = pic.acknowledge()
            assert vector == BASE + irq
            assert not pic.output
            end(pic, vector)
            assert pic.output
        pic.set_line(irq, False)
        # The first chip has kept the edge of the second: see spurious 15.
        assert take(pic) == ([] if irq < 8 else [15])


def test_an_input_that_is_high_when_it_becomes_a_level_asks(pic: PicPair) -> None:
    pic.set_line(5, True)
    pic.acknowledge()
    pic.outp(COMMAND, EOI)
    assert not pic.output
    pic.outp(ELCR, 1 << 5)
    assert pic.output


def test_icw1_can_make_all_inputs_levels(pic: PicPair) -> None:
    start(pic, icw1=0x19)
    pic.set_line(1, True)
    pic.acknowledge()
    pic.outp(COMMAND, EOI)
    assert pic.output


def test_a_poll_acknowledges_without_the_processor(pic: PicPair) -> None:
    pulse(pic, 4)
    pic.outp(COMMAND, 0x0C)
    assert pic.inp(COMMAND) == 0x84
    assert not pic.output
    pic.outp(COMMAND, 0x0C)
    assert pic.inp(COMMAND) == 0
    assert pic.inp(COMMAND) == 0


def test_initialization_without_icw4_and_of_a_single_chip(pic: PicPair) -> None:
    start(pic, icw1=0x10)
    pulse(pic, 3)
    assert take(pic) == [3]
    pic.outp(COMMAND, 0x12)
    pic.outp(DATA, 0x40)
    pic.outp(DATA, 0xFE)
    assert pic.inp(DATA) == 0xFE
    pulse(pic, 0)
    assert pic.acknowledge() == 0x40


def test_initialization_forgets_requests_and_masks(pic: PicPair) -> None:
    pulse(pic, 3, 4)
    pic.acknowledge()
    pic.outp(DATA, 0x55)
    pic.outp(COMMAND, 0x11)
    assert (pic.inp(COMMAND), pic.inp(DATA), pic.output) == (0, 0, False)


def test_initialization_keeps_an_input_that_is_a_level_and_high(pic: PicPair) -> None:
    pic.outp(ELCR, 1 << 5)
    pic.set_line(5, True)
    pulse(pic, 3)
    start(pic)
    assert pic.inp(ELCR) == 1 << 5
    assert pic.acknowledge() == BASE + 5


def test_reset_is_as_power_on(pic: PicPair) -> None:
    pic.outp(ELCR, 0xF8)
    pic.set_line(5, True)
    pic.reset()
    assert not pic.output
    assert [pic.inp(port) for port in PicPair.PORTS] == [0] * 6


def test_input_2_is_the_cascades(pic: PicPair) -> None:
    pic.set_line(2, True)
    assert not pic.output


def test_ports_that_are_not_ours(pic: PicPair) -> None:
    pic.outp(0x22, 0x11)
    assert pic.inp(0x22) == 0xFF


def test_any_access_is_survived(pic: PicPair) -> None:
    source = random.Random(4)
    for _ in range(20_000):
        pic.outp(source.choice(PicPair.PORTS), source.getrandbits(16))
        assert 0 <= pic.inp(source.choice(PicPair.PORTS)) <= 0xFF
        pic.set_line(source.randrange(16), bool(source.getrandbits(1)))
        if source.getrandbits(2) == 0:
            assert 0 <= pic.acknowledge() <= 0xFF
