# SPDX-License-Identifier: GPL-2.0-or-later
"""Which message goes to whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest

from qvis.emulated.events import Events
from qvis.emulated.lapic import LocalApic
from qvis.emulated.messages import ROUTES, ApicBus, Delivery, Message, decode_msi

ID, LDR, DFR, SVR, ICR, ICR_HIGH = 0x20, 0xD0, 0xE0, 0xF0, 0x300, 0x310
BASE = 0x1B
FLAT, CLUSTER = 0xF << 28, 0


def machine(processors: int, *, x2apic: bool = False, enabled: bool = True) -> ApicBus:
    bus, events = ApicBus(), Events()
    for index in range(processors):
        apic = LocalApic(index, bus, events)
        if x2apic:
            to_x2apic(apic)
        if enabled:
            enable(apic)
    return bus


def to_x2apic(apic: LocalApic) -> None:
    apic.wrmsr(BASE, apic.base | 0xC00)


def enable(apic: LocalApic) -> None:
    if apic.x2apic:
        apic.wrmsr(0x80F, 0x1FF)
    else:
        apic.write(SVR, 0x1FF)


def logical_ids(bus: ApicBus, ids: Sequence[int], model: int = FLAT) -> None:
    for apic, logical in zip(bus.apics, ids, strict=True):
        apic.write(DFR, model)
        apic.write(LDR, logical << 24)


def who(bus: ApicBus, destination: int, *, logical: bool = False) -> list[int]:
    return [apic.index for apic in bus.targets(destination, logical)]


def having(bus: ApicBus, vector: int) -> list[int]:
    return [apic.index for apic in bus.apics if apic.irr >> vector & 1]


@pytest.mark.parametrize(
    ("address", "data", "message"),
    [
        (0xFEE00000, 0x41, Message(0x41, 0)),
        (0xFEE03000, 0x4041, Message(0x41, 3)),
        (0xFEE0F004, 0x0141, Message(0x41, 15, logical=True, delivery=Delivery.LOWEST)),
        (0xFEE01000, 0xC041, Message(0x41, 1, level=True)),
        (0xFEE01000, 0x0400, Message(0, 1, delivery=Delivery.NMI)),
        (0xFEE01000, 0xFFFF_0041, Message(0x41, 1)),
    ],
)
def test_a_write_says_vector_destination_and_how(address: int, data: int, message: Message) -> None:
    assert decode_msi(address, data) == message


def test_fifteen_bits_of_destination_fit_a_32_bit_address() -> None:
    message = decode_msi(0xFEE00000 | 0x34 << 12 | 0x12 << 5, 0x41)
    assert message is not None
    assert message.destination == 0x1234


def test_the_extended_bits_are_an_iommus_if_bit_4_says_so() -> None:
    message = decode_msi(0xFEE00000 | 0x34 << 12 | 0x12 << 5 | 0x10, 0x41)
    assert message is not None
    assert message.destination == 0x34


def test_the_upper_address_holds_24_bits_of_destination() -> None:
    message = decode_msi(0x00012300_FEE45FE0, 0x41)
    assert message is not None
    assert message.destination == 0x12345


@pytest.mark.parametrize(
    ("address", "data"),
    [
        (0xFED00000, 0x41),
        (0xFEF00000, 0x41),
        (0, 0),
        (0xFEE00000, 0x341),
        (0xFEE00000, 0x641),
        (0xFFFFFFFF_FFFFFFFF, 0xFFFFFFFF),
    ],
)
def test_what_is_no_message_goes_nowhere(address: int, data: int) -> None:
    bus = machine(2)
    assert decode_msi(address, data) is None
    assert bus.msi(address, data) == 0
    assert not any(apic.irr for apic in bus.apics)


def test_a_physical_destination_is_the_id() -> None:
    bus = machine(4)
    assert [who(bus, n) for n in range(5)] == [[0], [1], [2], [3], []]
    bus.apics[2].write(ID, 9 << 24)
    assert who(bus, 2) == []
    assert who(bus, 9) == [2]
    bus.apics[1].write(ID, 9 << 24)
    assert who(bus, 9) == [1, 2]


def test_255_is_everybody_in_xapic_mode_and_one_in_x2apic_mode() -> None:
    bus = machine(260)
    assert who(bus, 255) == list(range(260))
    for apic in bus.apics[:256]:
        to_x2apic(apic)
    assert who(bus, 255) == [255, 256, 257, 258, 259]
    for apic in bus.apics[256:]:
        to_x2apic(apic)
    assert who(bus, 255) == [255]
    assert who(bus, 0xFFFFFFFF) == list(range(260))
    assert who(bus, 0xFFFFFFFF, logical=True) == list(range(260))


def test_a_flat_logical_destination_is_a_set_of_bits() -> None:
    bus = machine(4)
    logical_ids(bus, [1, 2, 4, 8])
    assert who(bus, 0b1010, logical=True) == [1, 3]
    assert who(bus, 0xFF, logical=True) == [0, 1, 2, 3]
    assert who(bus, 0xF0, logical=True) == []


def test_a_cluster_destination_is_a_cluster_and_a_set_of_four_bits() -> None:
    bus = machine(4)
    logical_ids(bus, [0x01, 0x02, 0x11, 0x12], CLUSTER)
    assert who(bus, 0x03, logical=True) == [0, 1]
    assert who(bus, 0x12, logical=True) == [3]
    assert who(bus, 0xF1, logical=True) == [0, 2]
    assert who(bus, 0x23, logical=True) == []


def test_a_model_that_is_neither_flat_nor_cluster_matches_nothing() -> None:
    bus = machine(1)
    logical_ids(bus, [0xFF], 7 << 28)
    assert who(bus, 0xFF, logical=True) == []


def test_an_x2apic_cluster_is_sixteen_neighbours() -> None:
    bus = machine(40, x2apic=True)
    assert who(bus, 0x0000_0005, logical=True) == [0, 2]
    assert who(bus, 0x0001_8001, logical=True) == [16, 31]
    assert who(bus, 0x0002_FFFF, logical=True) == list(range(32, 40))
    assert who(bus, 0x0003_FFFF, logical=True) == []
    assert who(bus, 0xFFFF_FFFE, logical=True) == []


def test_modes_may_be_mixed() -> None:
    bus = machine(4)
    logical_ids(bus, [1, 2, 4, 8])
    to_x2apic(bus.apics[1])
    assert who(bus, 0b0011, logical=True) == [0, 1]
    assert who(bus, 0x0001_0001, logical=True) == [0]
    assert who(bus, 255) == [0, 2, 3]


def test_a_thousand_processors_have_ids_of_their_own_in_both_modes() -> None:
    for x2apic in (False, True):
        bus = machine(1024, x2apic=x2apic)
        assert who(bus, 0x3FF) == [0x3FF]
        assert who(bus, 0x101) == [0x101]
        assert bus.msi(0xFEE00000 | 0xFF << 12 | 0x3 << 5, 0x41) == 1
        assert having(bus, 0x41) == [0x3FF]


def test_lowest_priority_is_the_first_that_is_enabled() -> None:
    bus = machine(3)
    logical_ids(bus, [1, 2, 4])
    message = Message(0x41, 0b111, logical=True, delivery=Delivery.LOWEST)
    assert bus.send(message) == 1
    assert having(bus, 0x41) == [0]
    bus.apics[0].write(SVR, 0xFF)
    assert bus.send(message) == 1
    assert having(bus, 0x41) == [0, 1]


def test_a_message_tells_how_many_had_it_not_yet() -> None:
    bus = machine(3)
    assert bus.send(Message(0x41, 1)) == 1
    assert bus.send(Message(0x41, 1)) == 0
    assert bus.send(Message(0x41, 0xFF)) == 2
    assert bus.send(Message(0x41, 7)) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda apic: apic.write(ID, 7 << 24),
        lambda apic: apic.write(LDR, 0),
        lambda apic: apic.write(DFR, CLUSTER),
        lambda apic: apic.write(SVR, 0xFF),
        lambda apic: apic.wrmsr(BASE, apic.base & ~0x800),
        lambda apic: apic.reset(),
        lambda apic: apic.reset(init=True),
    ],
    ids=["ID", "LDR", "DFR", "SVR", "off", "reset", "INIT"],
)
def test_a_remembered_route_goes_when_its_receiver_changes(
    change: Callable[[LocalApic], None],
) -> None:
    bus = machine(2)
    logical_ids(bus, [0x01, 0x20])
    physical, logical = 0xFEE01000, 0xFEE20004
    assert bus.msi(physical, 0x41) == 1
    assert bus.msi(logical, 0x42) == 1
    bus.apics[1].irr = 0
    change(bus.apics[1])
    new = [bus.msi(physical, 0x41), bus.msi(logical, 0x42)]
    fresh = [len(bus.targets(1, False)), len(bus.targets(0x20, True))]
    expected = [n * bus.apics[1].enabled for n in fresh]
    assert new == expected
    assert new != [1, 1]


def test_a_route_to_nobody_is_found_when_somebody_takes_that_id() -> None:
    bus = machine(2)
    assert bus.msi(0xFEE09000, 0x41) == 0
    bus.apics[1].write(ID, 9 << 24)
    assert bus.msi(0xFEE09000, 0x41) == 1


def test_a_mode_switch_forgets_routes() -> None:
    bus = machine(2)
    bus.apics[1].write(ID, 9 << 24)
    assert bus.msi(0xFEE09000, 0x41) == 1
    to_x2apic(bus.apics[1])  # which has ID 1 again
    assert bus.msi(0xFEE09000, 0x42) == 0
    assert bus.msi(0xFEE01000, 0x43) == 1


def test_routes_of_a_guest_that_makes_them_up_do_not_pile_up() -> None:
    bus = machine(1)
    for upper in range(ROUTES + 10):
        bus.msi(0xFEE00000, upper << 16 | 0x41)
    assert len(bus._routes) <= ROUTES
    assert bus.msi(0xFEE00000, 0x42) == 1


def test_neither_do_receivers_of_messages_to_everybody() -> None:
    bus = machine(250)
    for upper in range(1000):
        bus.msi(0xFEEFF000, upper << 16 | 0x41)
    assert sum(len(receivers) for receivers, _, _ in bus._routes.values()) <= ROUTES
    assert bus.msi(0xFEEFF000, 0x42) == 250


def test_signals_go_to_the_hook_whether_or_not_the_apic_is_enabled() -> None:
    bus = machine(3, enabled=False)
    seen: list[tuple[int, Delivery, int]] = []

    def note(index: int, delivery: Delivery, vector: int) -> None:
        seen.append((index, delivery, vector))

    for apic in bus.apics:
        apic.signal = partial(note, apic.index)
    assert bus.send(Message(0x9A, 1, delivery=Delivery.STARTUP)) == 1
    assert bus.send(Message(0, 0xFF, delivery=Delivery.NMI)) == 3
    assert bus.msi(0xFEE02000, 0x200) == 1
    assert bus.msi(0xFEE02000, 0x500) == 1
    assert seen == [
        (1, Delivery.STARTUP, 0x9A),
        (0, Delivery.NMI, 0),
        (1, Delivery.NMI, 0),
        (2, Delivery.NMI, 0),
        (2, Delivery.SMI, 0),
        (2, Delivery.INIT, 0),
    ]
    assert not any(apic.irr for apic in bus.apics)


def test_nothing_reaches_an_apic_that_is_off() -> None:
    bus = machine(2)
    apic = bus.apics[1]
    apic.wrmsr(BASE, apic.base & ~0x800)
    assert bus.send(Message(0, 1, delivery=Delivery.NMI)) == 0
    assert bus.send(Message(0x41, 1)) == 0


def test_who_listens_hears_of_each_message_also_of_one_that_changes_nothing() -> None:
    bus = machine(3)
    heard: list[tuple[int, int, bool]] = []
    bus.on_accept = lambda apic, vector, level: heard.append((apic.index, vector, level))
    bus.msi(0xFEE01000, 0x41)
    bus.msi(0xFEE01000, 0x41)
    bus.msi(0xFEE02000, 0x8042)
    bus.msi(0xFEE02000, 0x05)
    assert heard == [(1, 0x41, False), (1, 0x41, False), (2, 0x42, True)]


@pytest.mark.parametrize(
    ("command", "receivers"),
    [
        (0x00041, [2]),
        (0x40041, [1]),
        (0x80041, [0, 1, 2, 3]),
        (0xC0041, [0, 2, 3]),
        (0x00341, []),
        (0x00741, []),
        (0x80141, [0]),
    ],
    ids=["destination", "self", "all", "others", "reserved", "ExtINT", "lowest of all"],
)
@pytest.mark.parametrize("x2apic", [False, True])
def test_an_ipi_goes_where_icr_says(command: int, receivers: list[int], x2apic: bool) -> None:
    bus = machine(4, x2apic=x2apic)
    sender = bus.apics[1]
    if x2apic:
        sender.wrmsr(0x830, 2 << 32 | command)
        assert sender.rdmsr(0x830) == 2 << 32 | command
    else:
        sender.write(ICR_HIGH, 2 << 24)
        sender.write(ICR, command)
        assert sender.read(ICR) == command
        assert sender.read(ICR_HIGH) == 2 << 24
    assert having(bus, 0x41) == receivers


def test_a_logical_ipi_goes_to_a_cluster() -> None:
    bus = machine(40, x2apic=True)
    bus.apics[0].wrmsr(0x830, 0x0002_0003 << 32 | 0x841)
    assert having(bus, 0x41) == [32, 33]


def test_an_init_resets_the_apic_and_its_deassertion_does_nothing() -> None:
    bus = machine(2)
    target = bus.apics[1]
    seen: list[Delivery] = []
    target.signal = lambda delivery, vector: seen.append(delivery)
    target.accept(0x41, False)
    bus.apics[0].write(ICR_HIGH, 1 << 24)
    bus.apics[0].write(ICR, 0x8500)
    assert seen == []
    assert target.pending() == 0x41
    bus.apics[0].write(ICR, 0xC500)
    assert seen == [Delivery.INIT]
    assert (target.irr, target.enabled) == (0, False)
    assert target.read(SVR) == 0xFF
