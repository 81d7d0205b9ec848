# SPDX-License-Identifier: GPL-2.0-or-later
"""PCI: configuration spaces, BARs, MSI-X, and virtio's registers behind them."""

from __future__ import annotations

import random
import struct
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvis.emulated.devices import Block, Console, Device, Net, Rng
from qvis.emulated.pci import Msix, PciBus
from qvis.emulated.virtio import NO_VECTOR, Feature, Status
from qvis.emulated.virtio_pci import VirtioPci

from .virtio_driver import Bench, Ring

AT = 1 << 3  # device 1, function 0
TABLE, MODERN = 0xC0000000, 0xC000000000
COMMON, ISR, DEVICE, NOTIFY = 0, 0x1000, 0x2000, 0x3000
ALL = (1 << 64) - 1


class Machine:
    """A bus with one virtio function, mapped and master of the bus."""

    def __init__(self, device: Device | None = None, bench: Bench | None = None) -> None:
        self.bench = bench or Bench()
        events, memory = self.bench.events, self.bench.memory
        self.device = device or Block(events, memory, size=0, num_queues=4)
        send = self.bench.messages
        self.function = VirtioPci(self.device, lambda address, data: send.append((address, data)))
        self.bus = PciBus()
        self.bus.add(self.function, AT)

    def config(self, offset: int, size: int) -> int:
        return self.bus.read(AT << 12 | offset, size)

    def configure(self, offset: int, size: int, value: int) -> None:
        self.bus.write(AT << 12 | offset, size, value)

    def map(self) -> None:
        self.configure(0x14, 4, TABLE)
        self.configure(0x20, 4, MODERN & 0xFFFFFFFF)
        self.configure(0x24, 4, MODERN >> 32)
        self.configure(0x04, 2, 6)

    def read(self, address: int, size: int) -> int:
        bar = self.bus.find(address)
        assert bar is not None
        assert bar.start is not None
        return bar.read(address - bar.start, size)

    def write(self, address: int, size: int, value: int) -> None:
        bar = self.bus.find(address)
        assert bar is not None
        assert bar.start is not None
        bar.write(address - bar.start, size, value)

    def common(self, offset: int, size: int) -> int:
        return self.read(MODERN + offset, size)

    def entry(self, vector: int, data: int, *, masked: bool = False) -> None:
        for word, value in enumerate((0xFEE00000, 0, data, int(masked))):
            self.write(TABLE + 16 * vector + 4 * word, 4, value)

    def enable_msix(self, value: int = 0x8000) -> None:
        self.configure(0x9A, 2, value)

    def start(self, features: int = ALL, size: int = 16) -> list[Ring]:
        """Each queue has a ring and the vector after its number; all vectors are unmasked."""
        self.map()
        self.enable_msix()
        for status in (0, 1, 3):
            self.write(MODERN + 0x14, 1, status)
        for select in (0, 1):
            self.write(MODERN + 0x08, 4, select)
            self.write(MODERN + 0x0C, 4, features >> 32 * select & 0xFFFFFFFF)
        self.write(MODERN + 0x14, 1, 0xB)
        self.write(MODERN + 0x10, 2, 0)
        self.entry(0, 0x30)
        rings = []
        for queue in range(len(self.device.queues)):
            ring = Ring(self.bench.memory, 0x100000 + 0x4000 * queue, size)
            self.write(MODERN + 0x16, 2, queue)
            self.write(MODERN + 0x18, 2, size)
            for at, address in ((0x20, ring.desc), (0x28, ring.avail), (0x30, ring.used)):
                self.write(MODERN + at, 4, address)
                self.write(MODERN + at + 4, 4, 0)
            self.write(MODERN + 0x1A, 2, queue + 1)
            self.entry(queue + 1, 0x31 + queue)
            self.write(MODERN + 0x1C, 2, 1)
            rings.append(ring)
        self.write(MODERN + 0x14, 1, 0xF)
        return rings


def test_where_there_is_no_function_everything_is_ones() -> None:
    bus = PciBus()
    for where in (1 << 3, 0x1F << 3, 1, 5 << 8):
        assert bus.read(where << 12, 4) == 0xFFFFFFFF
        assert bus.read(where << 12 | 0xE, 1) == 0xFF
        bus.write(where << 12, 4, 0)


def test_the_host_bridge_is_the_real_one() -> None:
    bus = PciBus()
    assert [bus.read(at, 4) for at in (0, 4, 8, 0xC, 0x2C, 0x34, 0x3C)] == [
        0x00081B36, 0, 0x06000000, 0, 0x11001AF4, 0, 0,
    ]  # fmt: skip
    for at in range(0x10, 0x28, 4):
        bus.write(at, 4, 0xFFFFFFFF)
        assert bus.read(at, 4) == 0
    assert bus.read(0x100, 4) == 0xFFFFFFFF


@pytest.mark.parametrize(
    ("kind", "identity", "code", "ports", "vectors"),
    [
        (Block, 0x10011AF4, 0x0100, 0xFFFFFF81, 2),
        (Net, 0x10001AF4, 0x0200, 0xFFFFFFE1, 4),
        (Rng, 0x10051AF4, 0x00FF, 0xFFFFFFE1, 2),
        (Console, 0x10031AF4, 0x0780, 0xFFFFFFC1, 2),
    ],
)
def test_a_function_says_what_it_is(
    kind: type[Device], identity: int, code: int, ports: int, vectors: int
) -> None:
    bench = Bench()
    machine = Machine(kind(bench.events, bench.memory), bench)  # type: ignore[call-arg]
    assert machine.config(0, 4) == identity
    assert machine.config(8, 4) == code << 16
    assert machine.config(0x2C, 4) == kind.ID << 16 | 0x1AF4
    assert machine.config(0x3C, 2) == 0x100
    machine.configure(0x10, 4, 0xFFFFFFFF)
    assert machine.config(0x10, 4) == ports  # 24 bytes and the configuration, rounded up
    assert machine.config(0x9A, 2) == vectors - 1


def test_capabilities_are_where_the_real_ones_are() -> None:
    machine = Machine()
    assert machine.config(0x06, 2) == 0x10
    seen, at = [], machine.config(0x34, 1)
    while at:
        seen.append((at, machine.config(at, 1)))
        at = machine.config(at + 1, 1)
    assert seen == [(0x98, 0x11), (0x84, 9), (0x70, 9), (0x60, 9), (0x50, 9), (0x40, 9)]
    kinds = {at: (machine.config(at + 3, 1), machine.config(at + 8, 4)) for at, _ in seen[1:]}
    assert kinds == {
        0x40: (1, 0x0000),
        0x50: (3, 0x1000),
        0x60: (4, 0x2000),
        0x70: (2, 0x3000),
        0x84: (5, 0),
    }
    assert machine.config(0x80, 4) == 4
    assert machine.config(0x9C, 4) == 1
    assert machine.config(0xA0, 4) == 0x801


def test_bars_are_sized_by_writing_ones() -> None:
    machine = Machine()
    expected = {0x10: 0xFFFFFF81, 0x14: 0xFFFFF000, 0x18: 0, 0x1C: 0, 0x20: 0xFFFFC00C}
    for at, size in expected.items():
        machine.configure(at, 4, 0xFFFFFFFF)
        assert machine.config(at, 4) == size, hex(at)
    machine.configure(0x24, 4, 0xFFFFFFFF)
    assert machine.config(0x24, 4) == 0xFFFFFFFF
    machine.configure(0x30, 4, 0xFFFFF800)
    assert machine.config(0x30, 4) == 0


def test_what_identifies_a_function_cannot_be_written() -> None:
    machine = Machine()
    before = [machine.config(at, 1) for at in range(0x100)]
    for at in range(0x100):
        machine.configure(at, 1, 0xFF)
    after = [machine.config(at, 1) for at in range(0x100)]
    changed = [at for at in range(0x40) if before[at] != after[at]]
    bars = [*range(0x10, 0x14), 0x15, 0x16, 0x17, *range(0x21, 0x28)]
    assert changed == [4, 5, 0xC, *bars, 0x3C]
    assert after[0x40:0x84] == before[0x40:0x84]
    assert (after[4], after[5]) == (7, 5)


def test_registers_are_there_when_memory_is_decoded() -> None:
    machine = Machine()
    machine.map()
    assert machine.read(MODERN + 0x12, 2) == 4
    assert machine.bus.find(TABLE) is not None
    machine.configure(0x04, 2, 4)
    assert machine.bus.find(TABLE) is None
    assert machine.bus.find(MODERN) is None
    machine.configure(0x04, 2, 2)
    machine.configure(0x14, 4, 0xC0123000)
    assert machine.bus.find(TABLE) is None
    assert machine.read(0xC012300C, 4) == 1


def test_of_registers_that_overlap_those_that_were_there_first_answer() -> None:
    machine = Machine()
    machine.map()
    other = VirtioPci(Rng(machine.bench.events, machine.bench.memory), lambda address, data: None)
    machine.bus.add(other, 2 << 3)
    for at, size, value in ((0x14, 4, TABLE), (0x04, 2, 2)):
        machine.bus.write(2 << 15 | at, size, value)
    assert machine.bus.find(TABLE) is machine.function.bars[0]
    machine.configure(0x04, 2, 0)
    assert machine.bus.find(TABLE) is other.bars[0]
    machine.bus.write(2 << 15 | 0x04, 2, 0)
    assert machine.bus.find(TABLE) is None


@pytest.mark.parametrize("address", [0, 0x1000, 0xBFFFF000, 0xE0000000, 0xFEE00000])
def test_registers_cannot_be_put_outside_the_windows(address: int) -> None:
    machine = Machine()
    machine.map()
    machine.configure(0x14, 4, address)
    assert machine.bus.find(address) is None


def test_regions_are_listed_where_they_are_mapped() -> None:
    machine = Machine()
    assert not list(machine.bus.regions())
    machine.map()
    names = [(name, start, end) for _, name, start, end in machine.bus.regions()]
    assert names == [
        ("msix-table", TABLE, TABLE + 80),
        ("msix-pba", TABLE + 0x800, TABLE + 0x808),
        ("virtio-pci-common-virtio-blk", MODERN, MODERN + 0x1000),
        ("virtio-pci-isr-virtio-blk", MODERN + 0x1000, MODERN + 0x2000),
        ("virtio-pci-device-virtio-blk", MODERN + 0x2000, MODERN + 0x3000),
        ("virtio-pci-notify-virtio-blk", MODERN + 0x3000, MODERN + 0x4000),
    ]


def test_between_table_and_pending_bits_there_is_nothing() -> None:
    machine = Machine()
    machine.map()
    assert machine.read(TABLE + 80, 4) == 0xFFFFFFFF
    machine.write(TABLE + 80, 4, 0)
    assert machine.read(TABLE + 0x808, 1) == 0xFF


def test_there_is_room_for_1024_devices() -> None:
    places = list(islice((PciBus.place(n) for n in range(1100)), 1100))
    assert len(set(places)) == 1100
    assert places[:2] == [1 << 3, 2 << 3]
    assert places[30:32] == [31 << 3, 1 << 3 | 1]
    assert places[248] == 1 << 8 | 1 << 3
    assert 0 not in places
    # A function is only looked for where there is a function 0.
    assert all(place & ~7 in places for place in places)


def test_a_function_can_be_taken_out() -> None:
    machine = Machine()
    machine.map()
    with pytest.raises(ValueError, match="taken"):
        machine.bus.add(machine.function, AT)
    machine.bus.remove(AT)
    assert machine.config(0, 4) == 0xFFFFFFFF
    assert machine.bus.find(MODERN) is None


def test_a_power_cycle_unmaps_it() -> None:
    machine = Machine()
    machine.start()
    machine.configure(0x3C, 1, 11)
    machine.bus.reset()
    assert machine.bus.find(MODERN) is None
    assert [machine.config(at, 4) for at in (4, 0x10, 0x14, 0x20, 0x24)] == [
        0x100000, 1, 0, 0xC, 0,
    ]  # fmt: skip
    assert machine.config(0x9A, 2) == 4
    assert machine.config(0x3C, 1) == 0
    machine.map()
    assert machine.common(0x14, 1) == 0
    assert machine.read(TABLE, 4) == 0
    assert machine.read(TABLE + 12, 4) == 1


# MSI-X.


def test_an_interrupt_is_the_message_of_its_vector() -> None:
    machine = Machine()
    machine.start()
    machine.function.interrupt(0)
    machine.function.interrupt(3)
    machine.device.notify_config()
    assert [data for _, data in machine.bench.messages] == [0x31, 0x34, 0x30]


def test_a_masked_vector_pends_and_is_sent_once() -> None:
    machine = Machine()
    machine.start()
    machine.write(TABLE + 0x1C, 4, 1)
    for _ in range(3):
        machine.function.interrupt(0)
    assert not machine.bench.messages
    assert machine.read(TABLE + 0x800, 4) == 2
    machine.write(TABLE + 0x800, 4, 0)
    machine.write(TABLE + 0x18, 4, 0x77)
    machine.write(TABLE + 0x1C, 4, 0)
    assert machine.bench.messages == [(0xFEE00000, 0x77)]
    assert machine.read(TABLE + 0x800, 4) == 0
    machine.write(TABLE + 0x1C, 4, 0)
    assert len(machine.bench.messages) == 1


def test_the_whole_function_can_be_masked() -> None:
    machine = Machine()
    machine.start()
    machine.enable_msix(0xC000)
    assert machine.config(0x9A, 2) == 0xC004
    machine.function.interrupt(0)
    machine.function.interrupt(1)
    machine.write(TABLE + 0x2C, 4, 1)
    assert machine.read(TABLE + 0x800, 4) == 6
    machine.enable_msix(0x8000)
    assert [data for _, data in machine.bench.messages] == [0x31]
    assert machine.read(TABLE + 0x800, 4) == 4


def test_a_changed_message_counts_at_once() -> None:
    machine = Machine()
    machine.start()
    machine.write(TABLE + 0x10, 4, 0xFEE03000)
    machine.function.interrupt(0)
    assert machine.bench.messages == [(0xFEE03000, 0x31)]


def test_without_msix_the_line_is_only_seen_in_the_status() -> None:
    machine = Machine()
    machine.start()
    machine.enable_msix(0)
    machine.function.interrupt(0)
    assert not machine.bench.messages
    assert machine.config(0x06, 2) == 0x18
    assert machine.read(MODERN + ISR, 1) == 1
    assert machine.config(0x06, 2) == 0x10
    assert machine.read(MODERN + ISR, 1) == 0
    machine.function.interrupt(0)
    machine.enable_msix()
    assert machine.config(0x06, 2) == 0x10


def test_the_table_is_read_and_written_in_words_only() -> None:
    machine = Machine()
    machine.start()
    assert machine.read(TABLE, 4) == 0xFEE00000
    for size in (1, 2):
        assert machine.read(TABLE, size) == 0
        machine.write(TABLE, size, 1)
    assert machine.read(TABLE, 4) == 0xFEE00000


def test_what_pends_is_forgotten_with_the_mapping() -> None:
    machine = Machine()
    machine.start()
    machine.write(TABLE + 0x1C, 4, 1)
    machine.function.interrupt(0)
    machine.write(MODERN + 0x16, 2, 0)
    machine.write(MODERN + 0x1A, 2, NO_VECTOR)
    assert machine.read(TABLE + 0x800, 4) == 0
    machine.write(TABLE + 0x1C, 4, 0)
    assert not machine.bench.messages


def test_a_reset_of_the_device_forgets_what_pends() -> None:
    machine = Machine()
    machine.start()
    machine.enable_msix(0xC000)
    machine.function.interrupt(0)
    machine.write(MODERN + 0x14, 1, 0)
    assert machine.read(TABLE + 0x800, 4) == 0
    machine.enable_msix()
    assert not machine.bench.messages


def test_a_function_that_is_no_master_sends_nothing() -> None:
    machine = Machine()
    machine.start()
    machine.write(TABLE + 0x1C, 4, 1)
    machine.function.interrupt(0)
    machine.configure(0x04, 2, 2)
    assert machine.common(0x14, 1) == 0xB
    machine.write(TABLE + 0x1C, 4, 0)
    assert not machine.bench.messages


@pytest.mark.parametrize(
    ("vectors", "size", "pba"), [(5, 4096, 2048), (128, 4096, 2048), (129, 4096, 2064),
                                 (1025, 32768, 16400)],
)  # fmt: skip
def test_the_table_has_room(vectors: int, size: int, pba: int) -> None:
    msix = Msix(vectors, lambda address, data: None)
    assert (msix.bar_size, msix.pba_offset) == (size, pba)


# virtio's registers.


def test_features_are_agreed_upon() -> None:
    machine = Machine()
    machine.map()
    halves = []
    for select in (0, 1, 2):
        machine.write(MODERN, 4, select)
        assert machine.common(0, 4) == select
        halves.append(machine.common(4, 4))
    assert halves == [0x30007E54, 0x101, 0]
    machine.start(Feature.VERSION_1)
    assert machine.device.accepted == Feature.VERSION_1
    assert machine.common(8, 4) == 1
    assert machine.common(0xC, 4) == 1


def test_queues_are_set_up_and_read_back() -> None:
    machine = Machine()
    rings = machine.start()
    for queue, ring in enumerate(rings):
        machine.write(MODERN + 0x16, 2, queue)
        assert machine.common(0x16, 2) == queue
        assert machine.common(0x18, 2) == 16
        assert machine.common(0x1A, 2) == queue + 1
        assert machine.common(0x1C, 2) == 1
        assert machine.common(0x1E, 2) == queue
        assert machine.common(0x20, 4) == ring.desc
        assert machine.common(0x28, 4) == ring.avail
        assert machine.common(0x30, 4) == ring.used
    machine.write(MODERN + 0x16, 2, 4)
    assert [machine.common(at, 2) for at in (0x18, 0x1A, 0x1C)] == [0, NO_VECTOR, 0]
    machine.write(MODERN + 0x14, 1, 0)
    machine.write(MODERN + 0x16, 2, 1)
    assert [machine.common(at, 2) for at in (0x18, 0x1A, 0x1C, 0x20)] == [256, NO_VECTOR, 0, 0]


@pytest.mark.parametrize("value", [5, NO_VECTOR, 0x8000])
def test_a_vector_that_there_is_not_is_none(value: int) -> None:
    machine = Machine()
    machine.start()
    for at in (0x10, 0x1A):
        machine.write(MODERN + at, 2, value)
        assert machine.common(at, 2) == NO_VECTOR


def test_a_request_is_notified_by_the_address_and_answered() -> None:
    machine = Machine()
    rings = machine.start(Feature.VERSION_1)
    machine.bench.memory.write(0x200000, struct.pack("<IIQ", Block.FLUSH, 0, 0))
    rings[2].add((0x200000, 16, False), (0x201000, 1, True))
    machine.write(MODERN + NOTIFY + 4 * 2, 2, 2)
    assert rings[2].take() == [(0, 1)]
    assert machine.bench.messages == [(0xFEE00000, 0x33)]


def test_a_function_that_is_no_master_takes_nothing() -> None:
    machine = Machine()
    rings = machine.start(Feature.VERSION_1)
    machine.configure(0x04, 2, 2)
    rings[0].add((0x200000, 16, False), (0x201000, 1, True))
    machine.write(MODERN + NOTIFY, 2, 0)
    assert not rings[0].take()
    machine.configure(0x04, 2, 6)
    machine.bench.memory.write(0x200000, struct.pack("<IIQ", Block.FLUSH, 0, 0))
    machine.write(MODERN + NOTIFY, 2, 0)
    assert rings[0].take() == [(0, 1)]


def test_a_queue_can_be_reset_alone() -> None:
    machine = Machine()
    machine.start()
    machine.write(MODERN + 0x16, 2, 1)
    machine.write(MODERN + 0x3A, 2, 1)
    assert machine.common(0x1C, 2) == 0
    assert machine.common(0x1A, 2) == NO_VECTOR
    assert machine.common(0x3A, 2) == 0
    machine.write(MODERN + 0x16, 2, 2)
    assert machine.common(0x1C, 2) == 1


@pytest.mark.parametrize("value", [0, 2])
def test_a_queue_cannot_be_disabled(value: int) -> None:
    machine = Machine()
    machine.start()
    machine.write(MODERN + 0x1C, 2, value)
    assert machine.common(0x14, 1) == 0xF | Status.NEEDS_RESET
    assert machine.bench.messages == [(0xFEE00000, 0x30)]
    assert machine.common(0x15, 1) == 1


def test_registers_can_be_reached_through_the_configuration_space() -> None:
    machine = Machine()
    machine.map()
    machine.configure(0x8C, 4, 0x12)
    machine.configure(0x90, 4, 2)
    assert machine.config(0x94, 2) == 4
    machine.configure(0x8C, 4, 0x13)
    machine.configure(0x94, 4, 0)
    assert machine.config(0x94, 2) == 4
    machine.configure(0x8C, 4, 0x1B)  # aligned, as QEMU does: the queue's vector
    machine.configure(0x94, 2, 2)
    assert machine.common(0x1A, 2) == 2
    machine.configure(0x8C, 4, 0x14)
    machine.configure(0x90, 4, 1)
    machine.configure(0x94, 1, 3)
    assert machine.common(0x14, 1) == 3
    for offset, length in ((0xFFFFFFFF, 4), (0x12, 3), (0, 0), (0x4000, 1)):
        machine.configure(0x8C, 4, offset)
        machine.configure(0x90, 4, length)
        machine.configure(0x94, 4, 0)
        machine.config(0x94, 4)
    assert machine.common(0x14, 1) == 3


def test_the_device_configuration_has_its_place() -> None:
    machine = Machine()
    machine.map()
    assert machine.read(MODERN + DEVICE + 0x22, 2) == 4
    assert machine.read(MODERN + DEVICE + 0x100, 4) == 0xFFFFFFFF
    machine.write(MODERN + DEVICE + 0x20, 1, 0)
    assert machine.read(MODERN + DEVICE + 0x20, 1) == 0


def test_registers_have_the_width_of_their_access() -> None:
    machine = Machine()
    machine.start()
    machine.device.generation = 0x1FF
    assert machine.common(0x15, 1) == 0xFF
    assert machine.common(0x04, 1) == 0x54
    assert machine.common(0x05, 1) == 0
    assert machine.common(0x3FC, 4) == 0
    assert machine.read(MODERN + NOTIFY, 4) == 0


@given(
    st.integers(0, 3),
    st.lists(
        st.tuples(
            st.sampled_from(["config", "table", "common", "modern"]),
            st.integers(0, 0x3FFF),
            st.sampled_from([1, 2, 4]),
            st.one_of(st.integers(0, 8), st.integers(0, 1 << 21), st.integers(0, (1 << 32) - 1)),
            st.booleans(),
        ),
        max_size=60,
    ),
    st.integers(0, 1 << 32),
)
@settings(max_examples=150, deadline=None)
def test_no_sequence_of_accesses_does_harm(
    which: int, accesses: list[tuple[str, int, int, int, bool]], seed: int
) -> None:
    events, memory = BENCH.events, BENCH.memory
    BENCH.messages.clear()
    device: Device = [
        Block(events, memory, num_queues=3, size=1 << 20),
        Net(events, memory, pairs=2),
        Rng(events, memory),
        Console(events, memory),
    ][which]
    machine = Machine(device, BENCH)
    memory.write(0x100000, random.Random(seed).randbytes(0x8000))
    machine.start()
    for where, offset, size, value, write in accesses:
        offset &= -size
        if where == "config":
            at = AT << 12 | offset & 0xFFF
            if write:
                machine.bus.write(at, size, value)
            else:
                assert 0 <= machine.bus.read(at, size) < 1 << 8 * size
            continue
        address = {"table": TABLE + (offset & 0xFFF), "common": MODERN + (offset & 0x3F)}.get(
            where, MODERN + offset
        )
        bar = machine.bus.find(address)
        if bar is None or bar.start is None:
            continue
        if write:
            bar.write(address - bar.start, size, value)
        else:
            assert 0 <= bar.read(address - bar.start, size) < 1 << 8 * size
    events.run(limit=50)
    machine.bus.reset()
    machine.map()
    assert machine.common(0x14, 1) == 0


BENCH = Bench()
