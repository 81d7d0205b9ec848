# SPDX-License-Identifier: GPL-2.0-or-later
"""Split rings: what a device takes, gives back, and objects to."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvis.emulated.memory import Memory
from qvis.emulated.virtqueue import Virtqueue, gather, scatter, total

from .virtio_driver import INDIRECT, NEXT, WRITE, Ring

SIZE = 8


class Owner:
    """A device as far as a queue is concerned."""

    def __init__(self, *, event_idx: bool = False, memory: int = 1 << 16) -> None:
        self.memory = Memory(memory)
        self.event_idx = event_idx
        self.stopped = False
        self.errors: list[str] = []

    def error(self, why: str) -> None:
        self.errors.append(why)
        self.stopped = True


def make(*, event_idx: bool = False) -> tuple[Owner, Virtqueue, Ring]:
    owner = Owner(event_idx=event_idx)
    ring = Ring(owner.memory, 0x1000, SIZE)
    queue = Virtqueue(owner, 0, 256)
    queue.resize(SIZE)
    queue.place(ring.desc, ring.avail, ring.used)
    return owner, queue, ring


def test_a_chain_is_taken_and_given_back() -> None:
    _, queue, ring = make()
    head = ring.add((0x8000, 16, False), (0x9000, 100, True), (0xA000, 1, True))
    chain = queue.pop()
    assert chain is not None
    assert chain.readable == [(0x8000, 16)]
    assert chain.writable == [(0x9000, 100), (0xA000, 1)]
    assert queue.pop() is None
    queue.push(chain, 101)
    assert ring.take() == [(head, 101)]
    assert queue.in_use == 0


def test_chains_come_in_the_order_in_which_they_were_offered_and_go_back_in_any() -> None:
    _, queue, ring = make()
    heads = [ring.add((0x8000 + n, 1, False)) for n in range(3)]
    chains = [queue.pop() for _ in range(3)]
    assert [chain.head for chain in chains if chain] == heads
    for chain in reversed(chains):
        assert chain is not None
        queue.push(chain, 0)
    assert ring.take() == [(head, 0) for head in reversed(heads)]


def test_indices_wrap_round() -> None:
    _, queue, ring = make()
    for n in range(70_000):
        head = ring.add((0x8000, 1 + n % 7, False))
        chain = queue.pop()
        assert chain is not None
        assert queue.pop() is None
        queue.push(chain, n % 5)
        assert ring.take() == [(head, n % 5)]


def test_a_size_that_is_no_power_of_two_works() -> None:
    owner = Owner()
    ring = Ring(owner.memory, 0x1000, 5)
    queue = Virtqueue(owner, 0, 256)
    queue.resize(5)
    queue.place(ring.desc, ring.avail, ring.used)
    for _ in range(13):
        head = ring.add((0x8000, 1, False))
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 0)
        assert ring.take() == [(head, 0)]


def test_rings_that_are_not_aligned_work() -> None:
    owner = Owner()
    queue = Virtqueue(owner, 0, 256)
    queue.resize(2)
    queue.place(0x1001, 0x2003, 0x3005)
    owner.memory.write(0x1001, (0x8000).to_bytes(8, "little") + b"\7\0\0\0\0\0\0\0")
    owner.memory.write(0x2003, b"\0\0\1\0\0\0")
    chain = queue.pop()
    assert chain is not None
    assert chain.readable == [(0x8000, 7)]
    queue.push(chain, 9)
    assert owner.memory.read(0x3005, 12) == b"\0\0\1\0" + bytes(4) + b"\11\0\0\0"


def test_an_indirect_table_is_followed() -> None:
    owner, queue, ring = make()
    table = Ring(owner.memory, 0x4000, 3)
    table.describe(0, 0x8000, 16, NEXT, 2)
    table.describe(2, 0x9000, 32, WRITE)
    ring.describe(0, 0x4000, 48, INDIRECT)
    ring.offer(0)
    chain = queue.pop()
    assert chain is not None
    assert (chain.readable, chain.writable) == ([(0x8000, 16)], [(0x9000, 32)])


def test_indirect_inside_indirect_is_an_ordinary_buffer_as_in_qemu() -> None:
    owner, queue, ring = make()
    Ring(owner.memory, 0x4000, 1).describe(0, 0x8000, 16, INDIRECT)
    ring.describe(0, 0x4000, 16, INDIRECT)
    ring.offer(0)
    chain = queue.pop()
    assert chain is not None
    assert chain.readable == [(0x8000, 16)]


@pytest.mark.parametrize(
    ("descriptors", "why"),
    [
        ({0: (0x8000, 0, 0, 0)}, "no length"),
        ({0: (1 << 40, 8, 0, 0)}, "outside memory"),
        ({0: ((1 << 64) - 4, 8, 0, 0)}, "outside memory"),
        ({0: (0xFFFF, 2, WRITE, 0)}, "outside memory"),
        ({0: (0x8000, 1, WRITE | NEXT, 1), 1: (0x8000, 1, 0, 0)}, "behind a writable"),
        ({0: (0x8000, 1, NEXT, 1), 1: (0x8000, 1, NEXT, 0)}, "loop"),
        ({0: (0x8000, 1, NEXT, SIZE)}, "leads to"),
        ({0: (0x8000, 0, INDIRECT, 0)}, "indirect table of 0"),
        ({0: (0x8000, 17, INDIRECT, 0)}, "indirect table of 17"),
        ({0: (0xFFF8, 16, INDIRECT, 0)}, "indirect table outside"),
    ],
)
def test_a_broken_chain_breaks_the_device(
    descriptors: dict[int, tuple[int, int, int, int]], why: str
) -> None:
    owner, queue, ring = make()
    for index, descriptor in descriptors.items():
        ring.describe(index, *descriptor)
    ring.offer(0)
    assert queue.pop() is None
    assert len(owner.errors) == 1
    assert why in owner.errors[0]
    assert queue.pop() is None
    assert len(owner.errors) == 1


def test_a_loop_in_an_indirect_table_ends_after_1024_buffers() -> None:
    owner = Owner(memory=1 << 20)
    ring = Ring(owner.memory, 0x1000, SIZE)
    queue = Virtqueue(owner, 0, SIZE)
    queue.place(ring.desc, ring.avail, ring.used)
    table = Ring(owner.memory, 0x10000, 2000)
    for n in range(2000):
        table.describe(n, 0x8000, 1, NEXT, (n + 1) % 2000)
    ring.describe(0, 0x10000, 32000, INDIRECT)
    ring.offer(0)
    assert queue.pop() is None
    assert "loop" in owner.errors[0]


@pytest.mark.parametrize(("buffers", "whole"), [(1024, True), (1025, False)])
def test_a_chain_has_up_to_1024_buffers(buffers: int, whole: bool) -> None:
    owner = Owner(memory=1 << 20)
    ring = Ring(owner.memory, 0x1000, SIZE)
    queue = Virtqueue(owner, 0, SIZE)
    queue.place(ring.desc, ring.avail, ring.used)
    table = Ring(owner.memory, 0x10000, buffers)
    for n in range(buffers):
        table.describe(n, 0x8000, 1, NEXT if n + 1 < buffers else 0, n + 1)
    ring.describe(0, 0x10000, 16 * buffers, INDIRECT)
    ring.offer(0)
    chain = queue.pop()
    assert (chain is not None and len(chain.readable) == buffers) == whole
    assert bool(owner.errors) == (not whole)


def test_a_head_outside_the_ring_breaks_the_device() -> None:
    owner, queue, ring = make()
    ring.offer(SIZE)
    assert queue.pop() is None
    assert "descriptor 8" in owner.errors[0]


def test_an_available_index_that_jumps_breaks_the_device() -> None:
    owner, queue, ring = make()
    owner.memory.u16[ring.avail + 2 >> 1] = SIZE + 1
    assert queue.pop() is None
    assert "moved" in owner.errors[0]


def test_more_chains_than_entries_break_the_device() -> None:
    owner, queue, ring = make()
    for _ in range(SIZE):
        ring.add((0x8000, 1, False))
        assert queue.pop() is not None
    ring.add((0x8000, 1, False))
    assert queue.pop() is None
    assert "entries" in owner.errors[0]


@pytest.mark.parametrize("part", range(3))
def test_a_ring_that_is_not_all_memory_breaks_the_device(part: int) -> None:
    owner = Owner()
    queue = Virtqueue(owner, 0, SIZE)
    parts = [0x1000, 0x2000, 0x3000]
    parts[part] = 0x10000 - 8
    queue.place(*parts)
    assert len(owner.errors) == 1
    assert queue.pop() is None


@pytest.mark.parametrize(("event_idx", "fits"), [(False, True), (True, False)])
def test_an_event_index_takes_two_bytes_more(event_idx: bool, fits: bool) -> None:
    owner = Owner(event_idx=event_idx)
    queue = Virtqueue(owner, 0, SIZE)
    queue.place(0x1000, 0x2000, 0x10000 - 4 - 8 * SIZE)
    assert bool(owner.errors) == (not fits)


def test_a_ring_that_moves_is_only_looked_for_at_its_new_place() -> None:
    owner = Owner()
    queue = Virtqueue(owner, 0, 256)
    queue.place(0x10000 - 32, 0x2000, 0x3000, 2)
    queue.place(0x1000, 0x2000, 0x3000, 8)
    assert not owner.errors
    assert queue.size == 8
    queue.place(0x1000, 0x2000, 0x3000, 1025)
    assert queue.size == 8


def test_without_a_descriptor_ring_there_is_no_queue() -> None:
    owner = Owner()
    queue = Virtqueue(owner, 0, SIZE)
    queue.place(0, 0x2000, 0x3000)
    assert queue.pop() is None
    assert not owner.errors


def test_a_flag_suppresses_interrupts() -> None:
    owner, queue, ring = make()
    assert queue.should_interrupt()
    owner.memory.u16[ring.avail >> 1] = 1
    assert not queue.should_interrupt()


def test_an_event_index_says_which_buffer_interrupts() -> None:
    owner, queue, ring = make(event_idx=True)
    event = (ring.avail + 4 >> 1) + SIZE
    interrupts = []
    for n in range(6):
        owner.memory.u16[event] = 3
        ring.add((0x8000, 1, False))
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 0)
        interrupts.append((n, queue.should_interrupt()))
    # The first one always, as there is nothing to compare with.
    assert [n for n, asked in interrupts if asked] == [0, 3]


def test_several_buffers_at_once_interrupt_if_one_of_them_was_asked_for() -> None:
    owner, queue, ring = make(event_idx=True)
    queue.should_interrupt()
    owner.memory.u16[(ring.avail + 4 >> 1) + SIZE] = 1
    for _ in range(3):
        ring.add((0x8000, 1, False))
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 0)
    assert queue.should_interrupt()
    assert not queue.should_interrupt()


def test_after_very_many_buffers_nobody_asked_about_there_is_an_interrupt() -> None:
    owner, queue, ring = make(event_idx=True)
    queue.should_interrupt()
    owner.memory.u16[(ring.avail + 4 >> 1) + SIZE] = 0xFFFF
    for _ in range(0x8001):
        ring.add((0x8000, 1, False))
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 0)
    assert queue.should_interrupt()


def test_an_empty_ring_asks_to_be_told_of_the_next_buffer() -> None:
    owner, queue, ring = make(event_idx=True)
    event = (ring.used + 4 >> 1) + 4 * SIZE
    for n in range(3):
        ring.add((0x8000, 1, False))
        assert queue.pop() is not None
        assert queue.pop() is None
        assert owner.memory.u16[event] == n + 1


def test_what_is_taken_back_comes_again() -> None:
    _, queue, ring = make()
    heads = [ring.add((0x8000, 1, False)) for _ in range(2)]
    for _ in heads:
        assert queue.pop() is not None
    queue.rewind(2)
    again = [queue.pop(), queue.pop()]
    assert [chain.head for chain in again if chain] == heads
    assert queue.in_use == 2


def test_nothing_is_taken_from_a_queue_of_a_device_that_is_stopped() -> None:
    owner, queue, ring = make()
    ring.add((0x8000, 1, False))
    owner.stopped = True
    assert queue.pop() is None
    owner.stopped = False
    assert queue.pop() is not None


def test_a_reset_starts_over() -> None:
    _, queue, ring = make()
    ring.add((0x8000, 1, False))
    assert queue.pop() is not None
    queue.reset()
    assert (queue.size, queue.in_use, queue.desc, queue.ready) == (256, 0, 0, False)
    assert queue.indices == (0, 0, 0)
    assert queue.pop() is None


@given(
    st.binary(min_size=20, max_size=60),
    st.integers(0, 25),
    st.lists(st.integers(1, 7), min_size=1, max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_scattered_and_gathered_again_is_the_same(
    data: bytes, offset: int, lengths: list[int]
) -> None:
    memory = Memory(4096)
    segments = [(100 * n, length) for n, length in enumerate(lengths)]
    room = max(0, total(segments) - offset)
    assert scatter(memory, segments, data, offset) == min(room, len(data))
    assert gather(memory, segments, len(data), offset) == data[:room]


@given(
    st.binary(min_size=16 * 4, max_size=16 * 4),
    st.binary(min_size=14, max_size=14),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_whatever_is_in_a_ring_there_is_an_end(desc: bytes, avail: bytes, event: bool) -> None:
    owner = Owner(event_idx=event)
    queue = Virtqueue(owner, 0, 4)
    owner.memory.write(0x100, desc)
    owner.memory.write(0x200, avail)
    queue.place(0x100, 0x200, 0x204)
    for _ in range(100):
        chain = queue.pop()
        if chain is None:
            break
        for address, length in chain.readable + chain.writable:
            assert owner.memory.contains(address, length)
        queue.push(chain, 1 << 40)
        queue.should_interrupt()
