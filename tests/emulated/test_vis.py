# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupt storage: the device clauses of docs/virtio-interrupts.md, section 5."""

from __future__ import annotations

import pytest

from qvis.emulated.devices import Block
from qvis.emulated.mmio import MmioTransport
from qvis.emulated.virtio import NO_VECTOR, Feature

from .virtio_driver import Bench, negotiate

QUEUE_SEL, STATUS, INTERRUPT_STATUS = 0x30, 0x70, 0x60
UPDATE, MSI_CONTROL, CONFIG_VECTOR, QUEUE_VECTOR = 0xC4, 0xD4, 0xD8, 0xDC
ADDR_LOW, ADDR_HIGH, DATA, VECTOR = 0xE0, 0xE4, 0xE8, 0xEC
LOW, HIGH, CONTROL = 0xF0, 0xF4, 0xF8
ENABLE = 1 << 16
AT = 0x10000
VECTORS = 200
BOTH = Feature.VERSION_1 | Feature.VIS | Feature.MMIO_MSI
END = 4 << 20  # of memory


class Storage:
    """The driver's view of the storage, for n vectors at an address."""

    def __init__(self, bench: Bench, n: int, at: int = AT) -> None:
        area = (n + 127) // 128 * 128
        self.bytes = bench.memory.u8
        self.words = bench.memory.u64
        self.mask, self.pending, self.cached = at, at + area, at + 2 * area
        self.entries = at + 3 * area
        self.end = self.entries + 8 * n

    def entry(self, vector: int, address: int, data: int) -> None:
        self.words[(self.entries >> 3) + vector] = data << 32 | address


def make(
    n: int = 5, *, features: int = BOTH, high: int = 0, cache: bool = False, at: int = AT
) -> tuple[Bench, Block, MmioTransport, Storage]:
    """Enabled, all vectors unmasked, with data 0x30 + vector."""
    bench = Bench()
    device = Block(bench.events, bench.memory, size=0, num_queues=4)
    transport = bench.mmio(device, vectors=VECTORS, msi_feature=True, vis=True, cache_entries=cache)
    negotiate(transport, features)
    transport.write(STATUS, 4, 0xF)
    storage = Storage(bench, n, at)
    for vector in range(n):
        storage.entry(vector, 0xFEE00000, 0x30 + vector)
    enable(transport, n, at, high)
    bench.levels.clear()
    return bench, device, transport, storage


def enable(transport: MmioTransport, n: int, at: int = AT, high: int = 0) -> bool:
    transport.write(LOW, 4, at & 0xFFFFFFFF)
    transport.write(HIGH, 4, at >> 32)
    if high:
        transport.write(ADDR_HIGH, 4, high)
    transport.write(CONTROL, 4, n | ENABLE)
    return transport.read(CONTROL, 4) == n | ENABLE


def queue_vector(transport: MmioTransport, queue: int) -> int:
    transport.write(QUEUE_SEL, 4, queue)
    return transport.read(QUEUE_VECTOR, 4)


def test_an_interrupt_sends_what_the_entry_says() -> None:
    bench, device, transport, storage = make()
    storage.entry(2, 0xFEE01000, 0x41)
    transport.interrupt(0)
    transport.interrupt(1)
    device.notify_config()
    assert bench.messages == [(0xFEE00000, 0x31), (0xFEE01000, 0x41), (0xFEE00000, 0x30)]
    assert True not in bench.levels
    assert transport.read(INTERRUPT_STATUS, 4) == 0


def test_a_masked_vector_pends() -> None:
    bench, _, transport, storage = make()
    storage.bytes[storage.mask + 1] = 1
    transport.interrupt(0)
    assert not bench.messages
    assert storage.bytes[storage.pending + 1] == 1
    # The driver takes it over: the device never sends it later.
    storage.bytes[storage.mask + 1] = 0
    storage.bytes[storage.pending + 1] = 0
    transport.interrupt(0)
    assert bench.messages == [(0xFEE00000, 0x31)]
    assert storage.bytes[storage.pending + 1] == 0


def test_vis_dev_1_what_is_staged_later_does_not_count() -> None:
    bench, _, transport, _ = make()
    transport.write(LOW, 4, 0x40000)
    transport.write(ADDR_HIGH, 4, 7)
    transport.interrupt(0)
    assert bench.messages == [(0xFEE00000, 0x31)]


@pytest.mark.parametrize(
    ("n", "at"),
    [
        (0, AT),
        (VECTORS + 1, AT),
        (5, AT + 8),
        (5, AT + 64),
        (5, END),
        (5, END - 384),
        (5, 1 << 40),
        (5, (1 << 64) - 128),
        (5, 0xFEE00000),
    ],
)
def test_vis_dev_2_storage_has_to_be_memory(n: int, at: int) -> None:
    _, _, transport, _ = make()
    transport.write(CONTROL, 4, 0)
    assert not enable(transport, n, at)
    assert transport.read(CONTROL, 4) == 0
    assert enable(transport, 5)


def test_vis_dev_2_storage_may_reach_the_end_of_memory() -> None:
    _, _, transport, _ = make()
    transport.write(CONTROL, 4, 0)
    assert enable(transport, 16, END - 512)


@pytest.mark.parametrize("bit", range(17, 32))
def test_vis_dev_2_and_3_unknown_bits_make_a_write_void(bit: int) -> None:
    bench, _, transport, _ = make()
    transport.write(CONTROL, 4, 1 << bit)
    assert transport.read(CONTROL, 4) == 5 | ENABLE
    transport.write(CONTROL, 4, 0)
    transport.write(CONTROL, 4, 5 | ENABLE | 1 << bit)
    assert transport.read(CONTROL, 4) == 0
    assert not bench.messages


def test_vis_dev_2_it_is_enabled_once() -> None:
    _, _, transport, _ = make()
    transport.write(CONTROL, 4, 3 | ENABLE)
    assert transport.read(CONTROL, 4) == 5 | ENABLE


@pytest.mark.parametrize("rest", [0, 3, 0xFFFF])
def test_vis_dev_3_disabling_takes_no_number(rest: int) -> None:
    bench, _, transport, _ = make()
    transport.write(CONTROL, 4, rest)
    assert transport.read(CONTROL, 4) == 0
    transport.interrupt(0)
    assert bench.levels[-1] is True


def test_vis_dev_5_mappings_become_the_usual_ones() -> None:
    _, _, transport, _ = make(3)
    assert transport.read(CONFIG_VECTOR, 4) == 0
    assert [queue_vector(transport, n) for n in range(4)] == [1, 2, NO_VECTOR, NO_VECTOR]
    transport.write(CONTROL, 4, 0)
    assert [queue_vector(transport, n) for n in range(4)] == [1, 2, NO_VECTOR, NO_VECTOR]


def test_reg_dev_3_with_vis_mappings_are_below_n() -> None:
    bench, _, transport, _ = make(3)
    transport.write(QUEUE_SEL, 4, 3)
    transport.write(QUEUE_VECTOR, 4, 3)
    assert transport.read(QUEUE_VECTOR, 4) == NO_VECTOR
    transport.interrupt(3)
    assert not bench.messages
    transport.write(QUEUE_VECTOR, 4, 2)
    transport.interrupt(3)
    assert bench.messages == [(0xFEE00000, 0x32)]


@pytest.mark.parametrize("reset", [False, True])
def test_vis_dev_6_storage_is_left_alone_from_then_on(reset: bool) -> None:
    bench, device, transport, storage = make()
    storage.bytes[storage.mask + 1] = 1
    transport.write(*((STATUS, 4, 0) if reset else (CONTROL, 4, 0)))
    before = bench.memory.read(AT, storage.end - AT)
    transport.interrupt(0)
    device.notify_config()
    transport.write(UPDATE, 4, 1)
    assert bench.memory.read(AT, storage.end - AT) == before
    assert not bench.messages


def test_vis_dev_8_a_change_of_enable_forgets_vectors_in_registers() -> None:
    bench, _, transport, _ = make()
    transport.write(CONTROL, 4, 0)
    for register, value in ((ADDR_LOW, 0xFEE00000), (DATA, 0x50)):
        transport.write(register, 4, value)
    transport.write(VECTOR, 4, 1 | 1 << 16 | 1 << 18)
    assert transport.read(VECTOR, 4) == 1
    assert enable(transport, 5)
    assert transport.read(VECTOR, 4) == 0
    transport.write(VECTOR, 4, 2)
    transport.write(CONTROL, 4, 0)
    assert transport.read(VECTOR, 4) == 1 | 1 << 17
    # Staging registers stay.
    transport.write(VECTOR, 4, 1 | 1 << 16 | 1 << 18)
    transport.write(MSI_CONTROL, 4, 1)
    transport.interrupt(0)
    assert bench.messages == [(0xFEE00000, 0x50)]


def test_reg_dev_9_one_mechanism_at_a_time() -> None:
    _, _, transport, _ = make()
    transport.write(MSI_CONTROL, 4, 1)
    assert transport.read(MSI_CONTROL, 4) == 0
    transport.write(CONTROL, 4, 0)
    transport.write(MSI_CONTROL, 4, 1)
    assert transport.read(MSI_CONTROL, 4) == 1
    assert not enable(transport, 5)


def test_vis_dev_11_other_bits_do_not_matter() -> None:
    bench, _, transport, storage = make()
    storage.bytes[storage.mask + 1] = 0xFE
    transport.interrupt(0)
    assert bench.messages == [(0xFEE00000, 0x31)]
    storage.bytes[storage.mask + 1] = 0xFF
    storage.bytes[storage.pending + 1] = 0xFE
    transport.interrupt(0)
    assert storage.bytes[storage.pending + 1] == 1
    assert len(bench.messages) == 1


@pytest.mark.parametrize("n", [1, 128, 129, VECTORS])
def test_the_layout_follows_the_number_of_vectors(n: int) -> None:
    bench, _, transport, storage = make(n)
    last = n - 1
    transport.write(QUEUE_SEL, 4, 0)
    transport.write(QUEUE_VECTOR, 4, last)
    transport.interrupt(0)
    assert bench.messages == [(0xFEE00000, 0x30 + last)]
    storage.bytes[storage.mask + last] = 1
    transport.interrupt(0)
    touched = [at for at in range(storage.pending, storage.entries) if storage.bytes[at]]
    assert touched == [storage.pending + last]
    assert bench.memory.u8[storage.end] == 0


def test_vis_dev_13_the_upper_half_of_addresses_is_common() -> None:
    bench, _, transport, storage = make(high=1)
    transport.interrupt(0)
    # There is no interrupt controller above 4 GiB, and no memory either.
    assert not bench.messages
    bench, _, transport, storage = make()
    storage.entry(1, 0x2000, 0x12345678)
    transport.interrupt(0)
    assert bench.memory.u32[0x2000 >> 2] == 0x12345678


@pytest.mark.parametrize("value", [5, 0xFFFF, 1 << 16 | 1, 1 << 31])
def test_vis_dev_22_a_doorbell_for_a_vector_that_there_is_not(value: int) -> None:
    bench, _, transport, storage = make(cache=True)
    transport.interrupt(0)
    storage.entry(1, 0xFEE00000, 0x77)
    transport.write(UPDATE, 4, value)
    transport.interrupt(0)
    assert [data for _, data in bench.messages] == [0x31, 0x31]


def test_vis_dev_24_a_needless_doorbell_is_harmless() -> None:
    bench, _, transport, storage = make()
    before = bench.memory.read(AT, storage.end - AT)
    for vector in range(5):
        transport.write(UPDATE, 4, vector)
    assert bench.memory.read(AT, storage.end - AT) == before
    transport.interrupt(0)
    assert bench.messages == [(0xFEE00000, 0x31)]


def test_entries_that_are_read_live_take_no_doorbell() -> None:
    bench, _, transport, storage = make()
    transport.interrupt(0)
    storage.entry(1, 0xFEE00000, 0x77)
    transport.interrupt(0)
    assert [data for _, data in bench.messages] == [0x31, 0x77]
    assert not any(storage.bytes[storage.cached : storage.entries])


def test_copies_are_announced_and_follow_the_doorbell() -> None:
    bench, _, transport, storage = make(cache=True)
    assert not any(storage.bytes[storage.cached : storage.entries])
    transport.interrupt(0)
    assert storage.bytes[storage.cached + 1] == 1
    storage.entry(1, 0xFEE00000, 0x77)
    transport.interrupt(0)
    transport.write(UPDATE, 4, 1)
    transport.interrupt(0)
    assert [data for _, data in bench.messages] == [0x31, 0x31, 0x77]
    assert storage.bytes[storage.cached + 1] == 1
    assert storage.bytes[storage.cached + 2] == 0


def test_masks_are_read_live_where_entries_are_copied() -> None:
    bench, _, transport, storage = make(cache=True)
    storage.bytes[storage.mask + 1] = 1
    transport.interrupt(0)
    assert storage.bytes[storage.pending + 1] == 1
    assert storage.bytes[storage.cached + 1] == 1
    storage.bytes[storage.mask + 1] = 0
    transport.interrupt(0)
    assert bench.messages == [(0xFEE00000, 0x31)]


def test_vis_dev_25_what_is_copied_is_not_what_the_cached_area_says() -> None:
    bench, _, transport, storage = make(cache=True)
    transport.interrupt(0)
    storage.bytes[storage.cached + 1] = 0
    storage.entry(1, 0xFEE00000, 0x77)
    transport.write(UPDATE, 4, 1)
    transport.interrupt(0)
    assert [data for _, data in bench.messages] == [0x31, 0x77]
    # And where there is none, the doorbell takes back what another host had.
    storage.bytes[storage.cached + 3] = 1
    transport.write(UPDATE, 4, 3)
    assert storage.bytes[storage.cached + 3] == 0


def test_copies_end_with_vis() -> None:
    bench, _, transport, storage = make(cache=True)
    transport.interrupt(0)
    transport.write(CONTROL, 4, 0)
    storage.bytes[storage.cached + 1] = 0
    storage.entry(1, 0xFEE00000, 0x66)
    assert enable(transport, 5)
    transport.interrupt(0)
    assert [data for _, data in bench.messages] == [0x31, 0x66]


def test_a_message_may_be_for_the_storage_itself() -> None:
    bench, _, transport, storage = make()
    storage.entry(1, storage.mask + 4, 1)
    transport.interrupt(0)
    transport.interrupt(3)
    assert storage.bytes[storage.pending + 4] == 1
    assert not bench.messages
    # An entry that is overwritten by its own message.
    storage.entry(2, storage.entries + 16, 0xFEE00000)
    transport.interrupt(1)
    assert storage.words[(storage.entries >> 3) + 2] == 0xFEE00000 << 32 | 0xFEE00000


def test_without_the_feature_only_msi_is_there() -> None:
    _, _, transport, _ = make(features=Feature.VERSION_1 | Feature.MMIO_MSI)
    assert transport.read(CONTROL, 4) == 0
    assert transport.storage is None
    transport.write(MSI_CONTROL, 4, 1)
    assert transport.read(MSI_CONTROL, 4) == 1


def test_vis_alone_has_no_registers_of_msi() -> None:
    bench, _, transport, _ = make(features=Feature.VERSION_1 | Feature.VIS)
    transport.interrupt(0)
    assert bench.messages == [(0xFEE00000, 0x31)]
    transport.write(CONTROL, 4, 0)
    transport.write(MSI_CONTROL, 4, 1)
    transport.write(VECTOR, 4, 1 << 18)
    assert transport.read(MSI_CONTROL, 4) == transport.read(VECTOR, 4) == 0
