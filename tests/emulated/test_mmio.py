# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-mmio's registers, those of vectors included; VIS is in test_vis."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvis.emulated.devices import Block, Console, Device, Net, Rng
from qvis.emulated.mmio import EmptySlot, MmioTransport
from qvis.emulated.virtio import NO_VECTOR, Feature, Status

from .virtio_driver import Bench, Ring, negotiate, place

FEATURES_SEL, FEATURES, DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x14, 0x10, 0x20, 0x24
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY = 0x30, 0x34, 0x38, 0x44
NOTIFY, INTERRUPT_STATUS, ACK, STATUS = 0x50, 0x60, 0x64, 0x70
VECTOR_NUM, MSI_CONTROL, CONFIG_VECTOR, QUEUE_VECTOR = 0xD0, 0xD4, 0xD8, 0xDC
ADDR_LOW, ADDR_HIGH, DATA, VECTOR = 0xE0, 0xE4, 0xE8, 0xEC
GENERATION, CONFIG = 0xFC, 0x100
SET_MSG, MASK, UNMASK, PENDING = 1 << 16, 1 << 17, 1 << 18, 1 << 19
VECTORS = 8
MSI = Feature.VERSION_1 | Feature.MMIO_MSI
NO_MSI = Feature.VERSION_1 | Feature.EVENT_IDX


def make(
    features: int | None = None, *, queues: int = 2, vis: bool = False
) -> tuple[Bench, Block, MmioTransport]:
    bench = Bench()
    device = Block(bench.events, bench.memory, size=0, num_queues=queues)
    transport = bench.mmio(device, vectors=VECTORS, msi_feature=True, vis=vis)
    if features is not None:
        negotiate(transport, features)
        transport.write(STATUS, 4, 0xF)
        bench.levels.clear()
    return bench, device, transport


def message(transport: MmioTransport, vector: int, data: int, command: int = UNMASK) -> None:
    for register, value in ((ADDR_LOW, 0xFEE00000), (ADDR_HIGH, 0), (DATA, data)):
        transport.write(register, 4, value)
    transport.write(VECTOR, 4, vector | SET_MSG | command)


def enabled() -> tuple[Bench, Block, MmioTransport]:
    """Configuration on vector 0, queue n on n + 1, all unmasked with data 0x30 + vector."""
    bench, device, transport = make(MSI)
    transport.write(MSI_CONTROL, 4, 1)
    transport.write(CONFIG_VECTOR, 4, 0)
    message(transport, 0, 0x30)
    for queue in range(2):
        transport.write(QUEUE_SEL, 4, queue)
        transport.write(QUEUE_VECTOR, 4, queue + 1)
        message(transport, queue + 1, 0x31 + queue)
    bench.levels.clear()
    return bench, device, transport


def test_it_says_what_it_is() -> None:
    _, _, transport = make()
    assert [transport.read(at, 4) for at in (0, 4, 8, 0xC)] == [0x74726976, 2, 2, 0x554D4551]


def test_an_empty_slot_says_that_there_is_nothing() -> None:
    slot = EmptySlot()
    assert [slot.read(at, 4) for at in (0, 4, 8, 0xC, 0x70, 0x100)] == [
        0x74726976, 2, 0, 0x554D4551, 0, 0,
    ]  # fmt: skip
    slot.write(0x70, 4, 1)
    assert slot.read(0x70, 4) == 0


def test_features_are_seen_through_a_window() -> None:
    _, device, transport = make(vis=True)
    halves = []
    for select in (0, 1, 77):
        transport.write(FEATURES_SEL, 4, select)
        halves.append(transport.read(FEATURES, 4))
    assert halves[0] | halves[1] << 32 == device.offered
    assert halves[2] == halves[1]
    assert halves[1] >> 16 & 3 == 3


def test_features_that_are_not_offered_are_not_accepted() -> None:
    _, device, _ = make((1 << 64) - 1)
    assert device.accepted == device.offered
    assert device.status == 0xF


def test_features_do_not_change_once_they_are_agreed() -> None:
    _, device, transport = make(NO_MSI)
    transport.write(DRIVER_FEATURES_SEL, 4, 0)
    transport.write(DRIVER_FEATURES, 4, 0)
    transport.write(STATUS, 4, 0xF)
    assert device.accepted & Feature.EVENT_IDX


@pytest.mark.parametrize(("vectors", "msi", "vis"), [(0, True, True), (4, False, False)])
def test_vectors_are_not_offered_without_any(vectors: int, msi: bool, vis: bool) -> None:
    bench = Bench()
    device = Rng(bench.events, bench.memory)
    bench.mmio(device, vectors=vectors, msi_feature=msi, vis=vis)
    assert not device.offered >> 48


def test_queues_that_are_there_have_a_size() -> None:
    _, _, transport = make()
    sizes = []
    for queue in (0, 1, 2, 1023):
        transport.write(QUEUE_SEL, 4, queue)
        sizes.append(transport.read(QUEUE_NUM_MAX, 4))
    assert sizes == [1024, 1024, 0, 0]
    transport.write(QUEUE_SEL, 4, 1)
    transport.write(QUEUE_SEL, 4, 1024)
    assert transport.read(QUEUE_NUM_MAX, 4) == 1024


def test_a_queue_is_ready_once_it_is_told_so_and_no_longer_after_reset() -> None:
    _, device, transport = make(NO_MSI)
    place(transport, 1, Ring(device.memory, 0x100000, 16))
    assert transport.read(QUEUE_READY, 4) == 1
    assert device.queues[1].size == 16
    transport.write(QUEUE_SEL, 4, 0)
    assert transport.read(QUEUE_READY, 4) == 0
    transport.write(STATUS, 4, 0)
    transport.write(QUEUE_SEL, 4, 1)
    assert transport.read(QUEUE_READY, 4) == 0
    assert device.queues[1].size == 256


@pytest.mark.parametrize("size", [0, 1025, 1 << 31])
def test_a_size_that_is_none_leaves_the_old_one(size: int) -> None:
    _, device, transport = make(NO_MSI)
    transport.write(QUEUE_SEL, 4, 0)
    transport.write(QUEUE_NUM, 4, size)
    assert device.queues[0].size == 256


def test_rings_that_are_there_before_features_get_their_event_index() -> None:
    bench = Bench()
    device = Rng(bench.events, bench.memory)
    transport = bench.mmio(device)
    ring = Ring(bench.memory, 0x100000, 16)
    place(transport, 0, ring)
    for select in (0, 1):
        transport.write(DRIVER_FEATURES_SEL, 4, select)
        transport.write(DRIVER_FEATURES, 4, NO_MSI >> 32 * select & 0xFFFFFFFF)
    transport.write(STATUS, 4, 0xF)
    ring.add((0x200000, 8, True))
    transport.write(NOTIFY, 4, 0)
    assert ring.take() == [(0, 8)]
    assert bench.levels[-1] is True


def test_rings_outside_memory_break_the_device() -> None:
    bench, device, transport = make(NO_MSI)
    place(transport, 0, Ring(bench.memory, 0x100000, 16))
    transport.write(0x84, 4, 1)
    transport.write(QUEUE_READY, 4, 1)
    assert transport.read(STATUS, 4) == 0xF | Status.NEEDS_RESET
    assert transport.read(INTERRUPT_STATUS, 4) == 3
    transport.write(STATUS, 4, 0)
    assert transport.read(STATUS, 4) == 0
    assert not device.broken


def test_a_request_interrupts_by_the_line() -> None:
    bench = Bench()
    device = Rng(bench.events, bench.memory)
    transport = bench.mmio(device)
    (ring,) = bench.start(transport, NO_MSI)
    ring.add((0x200000, 8, True))
    transport.write(NOTIFY, 4, 0)
    assert bench.levels[-1] is True
    assert transport.read(INTERRUPT_STATUS, 4) == 1
    transport.write(ACK, 4, 2)
    assert bench.levels[-1] is True
    transport.write(ACK, 4, 1)
    assert bench.levels[-1] is False
    assert transport.read(INTERRUPT_STATUS, 4) == 0


def test_a_change_of_the_configuration_interrupts_by_the_line() -> None:
    bench, device, transport = make(NO_MSI)
    before = transport.read(GENERATION, 4)
    device.notify_config()
    assert bench.levels == [True]
    assert transport.read(INTERRUPT_STATUS, 4) == 3
    assert transport.read(GENERATION, 4) == before + 1


def test_a_change_before_a_driver_is_there_interrupts_nobody() -> None:
    bench, device, transport = make()
    device.notify_config()
    assert not bench.levels
    assert transport.read(INTERRUPT_STATUS, 4) == 0


def test_reset_lowers_the_line() -> None:
    bench, _, transport = make(NO_MSI)
    transport.interrupt(0)
    transport.write(STATUS, 4, 0)
    assert bench.levels[-1] is False
    assert transport.read(INTERRUPT_STATUS, 4) == 0


def test_a_broken_device_keeps_its_line_until_reset_as_in_qemu() -> None:
    bench, device, transport = make(NO_MSI)
    device.error("test")
    assert bench.levels == [True]
    transport.write(ACK, 4, 3)
    assert bench.levels == [True]
    transport.write(STATUS, 4, 0)
    assert bench.levels[-1] is False


def test_the_configuration_is_read_in_any_size() -> None:
    _, device, transport = make()
    config = device.config()
    for size in (1, 2, 4):
        for at in range(0, 57 - size, size):
            expected = int.from_bytes(config[at : at + size], "little")
            assert transport.read(CONFIG + at, size) == expected
    assert transport.read(CONFIG + 56, 4) == 0xFFFFFFFF
    assert transport.read(CONFIG + 56, 1) == 1
    assert transport.read(CONFIG + 57, 1) == 0xFF
    assert transport.read(CONFIG + 0xFE, 2) == 0xFFFF


@pytest.mark.parametrize("size", [1, 2])
def test_registers_are_32_bits_wide(size: int) -> None:
    _, _, transport = enabled()
    for register in range(0, CONFIG, size):
        assert transport.read(register, size) == 0
    transport.write(MSI_CONTROL, size, 0)
    transport.write(STATUS, size, 0)
    assert transport.read(MSI_CONTROL, 4) == 1
    assert transport.read(STATUS, 4) == 0xF


def test_registers_that_are_written_only_read_as_zero() -> None:
    _, _, transport = enabled()
    known = {0, 4, 8, 0xC, FEATURES, QUEUE_NUM_MAX, STATUS, 0xB0, 0xB4}
    known |= {VECTOR_NUM, MSI_CONTROL, QUEUE_VECTOR, VECTOR}
    for register in set(range(0, CONFIG, 4)) - known:
        assert transport.read(register, 4) == 0, hex(register)


def test_there_is_no_shared_memory() -> None:
    _, _, transport = make()
    assert transport.read(0xB0, 4) == transport.read(0xB4, 4) == 0xFFFFFFFF


# MSI: the clauses of docs/virtio-interrupts.md.


@pytest.mark.parametrize("features", [None, NO_MSI])
def test_neg_dev_3_without_the_feature_there_are_no_such_registers(features: int | None) -> None:
    bench, _, transport = make(features, vis=True)
    for register in range(0xC4, GENERATION, 4):
        transport.write(register, 4, 0xFFFFFFFF)
        transport.write(register, 4, 1)
        assert transport.read(register, 4) == 0, hex(register)
    transport.interrupt(0)
    assert bench.levels[-1:] == [True]


def test_neg_dev_4_leaving_the_feature_out_resets_its_state() -> None:
    bench, _, transport = enabled()
    transport.write(STATUS, 4, 3)
    transport.write(DRIVER_FEATURES_SEL, 4, 1)
    transport.write(DRIVER_FEATURES, 4, 1)
    transport.write(STATUS, 4, 0xB)
    assert not transport.msi_enabled
    transport.interrupt(0)
    assert bench.levels[-1] is True
    assert not bench.messages


def test_reg_dev_2_what_is_read_only_cannot_be_written() -> None:
    _, _, transport = enabled()
    transport.write(VECTOR_NUM, 4, 3)
    assert transport.read(VECTOR_NUM, 4) == VECTORS


@pytest.mark.parametrize("value", [VECTORS, NO_VECTOR, 1 << 16, 1 << 31])
def test_reg_dev_3_a_vector_that_there_is_not_is_none(value: int) -> None:
    _, _, transport = enabled()
    for register in (CONFIG_VECTOR, QUEUE_VECTOR):
        transport.write(register, 4, VECTORS - 1)
        assert transport.read(register, 4) == VECTORS - 1
        transport.write(register, 4, value)
        assert transport.read(register, 4) == NO_VECTOR


def test_reg_dev_4_queues_and_configuration_can_share_a_vector() -> None:
    bench, device, transport = enabled()
    transport.write(CONFIG_VECTOR, 4, 2)
    transport.write(QUEUE_SEL, 4, 0)
    transport.write(QUEUE_VECTOR, 4, 2)
    transport.interrupt(0)
    transport.interrupt(1)
    device.notify_config()
    assert bench.messages == [(0xFEE00000, 0x32)] * 3


def test_reg_dev_5_what_pends_stays_with_its_vector() -> None:
    bench, _, transport = enabled()
    transport.write(VECTOR, 4, 1 | MASK)
    transport.interrupt(0)
    transport.write(QUEUE_SEL, 4, 0)
    transport.write(QUEUE_VECTOR, 4, 3)
    assert transport.read(VECTOR, 4) == 1 | MASK | PENDING
    transport.interrupt(0)
    assert not bench.messages
    transport.write(VECTOR, 4, 3)
    assert transport.read(VECTOR, 4) == 3 | MASK | PENDING
    transport.write(VECTOR, 4, 1 | UNMASK)
    assert bench.messages == [(0xFEE00000, 0x31)]


def test_reg_dev_7_with_vectors_the_line_stays_low() -> None:
    bench, device, transport = enabled()
    transport.interrupt(0)
    device.notify_config()
    assert transport.read(INTERRUPT_STATUS, 4) == 0
    transport.write(ACK, 4, 1)
    transport.write(QUEUE_SEL, 4, 1)
    transport.write(QUEUE_VECTOR, 4, NO_VECTOR)
    transport.interrupt(1)
    assert True not in bench.levels
    assert [data for _, data in bench.messages] == [0x31, 0x30]


def test_reg_dev_8_a_change_of_enable_clears_the_status() -> None:
    bench, _, transport = make(MSI)
    transport.interrupt(0)
    transport.write(MSI_CONTROL, 4, 0)
    assert transport.read(INTERRUPT_STATUS, 4) == 1
    transport.write(MSI_CONTROL, 4, 1)
    assert bench.levels[-1] is False
    transport.write(MSI_CONTROL, 4, 0)
    assert transport.read(INTERRUPT_STATUS, 4) == 0
    transport.interrupt(0)
    assert bench.levels[-1] is True


def test_msi_dev_1_staging_has_no_effect_and_stays() -> None:
    bench, _, transport = enabled()
    transport.write(ADDR_LOW, 4, 0xFEE01000)
    transport.write(DATA, 4, 0x77)
    transport.interrupt(0)
    assert bench.messages == [(0xFEE00000, 0x31)]
    transport.write(VECTOR, 4, 1 | SET_MSG)
    transport.write(VECTOR, 4, 2 | SET_MSG)
    transport.interrupt(0)
    transport.interrupt(1)
    assert bench.messages[1:] == [(0xFEE01000, 0x77)] * 2


def test_msi_dev_3_the_message_is_set_before_the_vector_is_unmasked() -> None:
    bench, _, transport = enabled()
    transport.write(VECTOR, 4, 1 | MASK)
    transport.interrupt(0)
    message(transport, 1, 0x55)
    assert bench.messages == [(0xFEE00000, 0x55)]


@pytest.mark.parametrize(
    "command", [1 | MASK | UNMASK, VECTORS | MASK, 1 | MASK | 1 << 19, 1 | MASK | 1 << 31]
)
def test_msi_dev_4_a_bad_command_has_no_effect(command: int) -> None:
    bench, _, transport = enabled()
    transport.write(VECTOR, 4, 2)
    transport.write(VECTOR, 4, command | SET_MSG)
    assert transport.read(VECTOR, 4) == 2
    transport.interrupt(0)
    assert bench.messages == [(0xFEE00000, 0x31)]


def test_msi_dev_5_and_6_a_masked_vector_pends_and_is_sent_once() -> None:
    bench, _, transport = enabled()
    transport.write(VECTOR, 4, 1 | MASK)
    for _ in range(3):
        transport.interrupt(0)
    assert transport.read(VECTOR, 4) == 1 | MASK | PENDING
    transport.write(VECTOR, 4, 1 | MASK)
    assert transport.read(VECTOR, 4) == 1 | MASK | PENDING
    transport.write(VECTOR, 4, 1 | UNMASK)
    transport.write(VECTOR, 4, 1 | UNMASK)
    assert bench.messages == [(0xFEE00000, 0x31)]
    assert transport.read(VECTOR, 4) == 1


def test_msi_dev_6_and_7_what_pends_is_sent_though_msi_is_not_enabled() -> None:
    bench, _, transport = enabled()
    transport.write(VECTOR, 4, 1 | MASK)
    transport.interrupt(0)
    transport.write(MSI_CONTROL, 4, 0)
    assert transport.read(VECTOR, 4) == 1 | MASK | PENDING
    assert transport.read(QUEUE_VECTOR, 4) == 2
    transport.write(VECTOR, 4, 1 | UNMASK)
    assert bench.messages == [(0xFEE00000, 0x31)]


def test_a_message_that_is_no_interrupt_is_four_bytes_of_memory() -> None:
    bench, _, transport = enabled()
    bench.memory.write(0x1000, b"\xff" * 12)
    for address in (0x1004, 0xFEB00070, 1 << 40):
        transport.write(ADDR_LOW, 4, address & 0xFFFFFFFF)
        transport.write(ADDR_HIGH, 4, address >> 32)
        transport.write(DATA, 4, 0)
        transport.write(VECTOR, 4, 1 | SET_MSG)
        transport.interrupt(0)
    assert bench.memory.read(0x1000, 12) == b"\xff" * 4 + bytes(4) + b"\xff" * 4
    assert not bench.messages
    assert transport.read(STATUS, 4) == 0xF


def test_rst_dev_1_reset_puts_everything_back() -> None:
    bench, _, transport = enabled()
    transport.write(VECTOR, 4, 3)
    transport.write(STATUS, 4, 0)
    negotiate(transport, MSI)
    assert transport.read(MSI_CONTROL, 4) == 0
    assert transport.read(CONFIG_VECTOR, 4) == NO_VECTOR
    assert transport.read(VECTOR, 4) == 0 | MASK
    transport.write(QUEUE_SEL, 4, 1)
    assert transport.read(QUEUE_VECTOR, 4) == NO_VECTOR
    transport.write(MSI_CONTROL, 4, 1)
    transport.write(QUEUE_VECTOR, 4, 1)
    transport.write(VECTOR, 4, 1 | SET_MSG | UNMASK)
    transport.interrupt(1)
    assert bench.memory.read(0, 4) == bytes(4)
    assert not bench.messages


def test_a_power_cycle_forgets_what_a_driver_had_staged() -> None:
    _, _, transport = make(MSI)
    transport.write(FEATURES_SEL, 4, 1)
    transport.reset()
    assert transport.read(FEATURES, 4) & Feature.INDIRECT_DESC
    transport.write(STATUS, 4, 0xB)
    assert transport.device.accepted == 0


# Hostile drivers.


def devices(bench: Bench) -> list[Device]:
    events, memory = bench.events, bench.memory
    return [
        Block(events, memory, num_queues=3, size=1 << 20),
        Net(events, memory, pairs=2),
        Rng(events, memory),
        Console(events, memory),
    ]


@given(
    st.integers(0, 3),
    st.integers(0, 1 << 32),
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 0x1FF), st.sampled_from(range(0, 0x100, 4))),
            st.sampled_from([1, 2, 4, 4, 4]),
            st.one_of(st.integers(0, 8), st.integers(0, 1 << 21), st.integers(0, (1 << 32) - 1)),
            st.booleans(),
        ),
        max_size=60,
    ),
    st.integers(0, 5),
    st.sampled_from([0, 0, 7]),
)
@settings(max_examples=150, deadline=None)
def test_no_sequence_of_accesses_does_harm(
    which: int,
    seed: int,
    accesses: list[tuple[int, int, int, bool]],
    ready: int,
    latency: int,
) -> None:
    bench = BENCH
    bench.memory.write(0x100000, random.Random(seed).randbytes(0x8000))
    device = devices(bench)[which]
    device.latency = lambda: latency
    transport = bench.mmio(device, vectors=VECTORS, msi_feature=True, vis=True)
    negotiate(transport, (1 << 64) - 1)
    for queue in range(ready):
        place(transport, queue, Ring(bench.memory, 0x100000 + 0x2000 * queue, 8))
    for offset, size, value, write in accesses:
        if write:
            transport.write(offset, size, value)
        else:
            assert 0 <= transport.read(offset, size) < 1 << 8 * size
    bench.events.run(limit=50)
    transport.write(STATUS, 4, 0)
    assert transport.read(STATUS, 4) == 0
    assert transport.read(0, 4) == 0x74726976


BENCH = Bench()
