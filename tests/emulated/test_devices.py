# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices themselves: requests, what they object to, configuration spaces."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from qvis.emulated.devices import Block, Console, Device, Net, Rng
from qvis.emulated.mmio import MmioTransport
from qvis.emulated.virtio import Feature, Status
from qvis.emulated.virtqueue import Chain, Virtqueue
from qvis.errors import UsageError

from .virtio_driver import Bench, Ring

HEADER, DATA, STATUS = 0x200000, 0x210000, 0x220000
ALL = (1 << 64) - 1
NET_HEADER = 12


def start(device: Device, bench: Bench, rings: int = 1, **options: Any) -> list[Ring]:
    transport = bench.mmio(device)
    return bench.start(transport, ALL, rings, **options)


def block(**options: Any) -> tuple[Bench, Block, Ring]:
    bench = Bench()
    device = Block(bench.events, bench.memory, size=1 << 20, **options)
    (ring,) = start(device, bench)
    return bench, device, ring


def request(
    bench: Bench, device: Block, ring: Ring, kind: int, sector: int, *data: tuple[int, int, bool]
) -> int:
    """Do a request; the status that comes back."""
    bench.memory.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
    bench.memory.write(STATUS, b"\xff")
    head = ring.add((HEADER, 16, False), *data, (STATUS, 1, True))
    device.notified(0)
    assert [used for used, _ in ring.take()] == [head]
    return bench.memory.u8[STATUS]


def test_a_disk_reads_as_zeros() -> None:
    bench, device, ring = block()
    bench.memory.write(DATA, b"\xaa" * 8192)
    assert request(bench, device, ring, Block.IN, 0, (DATA, 4096, True)) == Block.OK
    assert bench.memory.read(DATA, 4097) == bytes(4096) + b"\xaa"


def test_a_read_of_several_buffers_spares_the_status_byte_behind_them() -> None:
    bench, device, ring = block()
    bench.memory.write(DATA, b"\xaa" * 2048)
    bench.memory.write(HEADER, struct.pack("<IIQ", Block.IN, 0, 2))
    # The status is the last byte of the last buffer, wherever that begins.
    ring.add((HEADER, 16, False), (DATA, 512, True), (DATA + 1024, 513, True))
    device.notified(0)
    assert ring.take() == [(0, 1025)]
    assert bench.memory.read(DATA, 1024) == bytes(512) + b"\xaa" * 512
    assert bench.memory.read(DATA + 1024, 514) == bytes(513) + b"\xaa"


@pytest.mark.parametrize(
    ("kind", "sector", "length", "status"),
    [
        (Block.IN, 2047, 512, Block.OK),
        (Block.IN, 2047, 1024, Block.IOERR),
        (Block.IN, 2048, 512, Block.IOERR),
        (Block.IN, 1 << 63, 512, Block.IOERR),
        (Block.IN, 0, 511, Block.IOERR),
        (Block.IN | Block.BARRIER, 0, 512, Block.OK),
        (9, 0, 512, Block.OK),  # an identity with the bit of a write, which QEMU ignores
        (16, 0, 512, Block.UNSUPP),  # ZONE_REPORT
        (0xABCDE, 0, 512, Block.UNSUPP),
        (Block.SCSI, 0, 512, Block.IOERR),
    ],
)
def test_a_request_is_answered(kind: int, sector: int, length: int, status: int) -> None:
    bench, device, ring = block()
    assert request(bench, device, ring, kind, sector, (DATA, length, True)) == status


@pytest.mark.parametrize(("sector", "status"), [(2047, Block.OK), (2048, Block.IOERR)])
def test_a_write_vanishes_if_there_is_room_for_it(sector: int, status: int) -> None:
    bench, device, ring = block()
    assert request(bench, device, ring, Block.OUT, sector, (DATA, 512, False)) == status


def test_a_flush_is_done_at_once() -> None:
    bench, device, ring = block()
    assert request(bench, device, ring, Block.FLUSH, 0) == Block.OK


@pytest.mark.parametrize(
    ("serial", "length", "expected"),
    [
        ("", 20, b"\0" + b"\xaa" * 19),
        ("abc", 20, b"abc\0" + b"\xaa" * 16),
        ("x" * 30, 20, b"x" * 20),
        ("abc", 2, b"ab"),
    ],
)
def test_a_disk_says_its_serial_number(serial: str, length: int, expected: bytes) -> None:
    bench, device, ring = block(serial=serial)
    bench.memory.write(DATA, b"\xaa" * 20)
    assert request(bench, device, ring, Block.GET_ID, 0, (DATA, length, True)) == Block.OK
    assert bench.memory.read(DATA, length) == expected


@pytest.mark.parametrize(
    ("kind", "segment", "status"),
    [
        (Block.DISCARD, (0, 8, 0), Block.OK),
        (Block.DISCARD, (0, 8, 1), Block.UNSUPP),
        (Block.WRITE_ZEROES, (0, 8, 1), Block.OK),
        (Block.WRITE_ZEROES, (0, 8, 2), Block.UNSUPP),
        (Block.WRITE_ZEROES, (2047, 2, 0), Block.IOERR),
        (Block.DISCARD, (0, 0x400000, 0), Block.IOERR),
        (Block.DISCARD & ~1, (0, 8, 0), Block.UNSUPP),
    ],
)
def test_a_discard_is_checked(kind: int, segment: tuple[int, int, int], status: int) -> None:
    bench, device, ring = block()
    bench.memory.write(DATA, struct.pack("<QII", *segment))
    assert request(bench, device, ring, kind, 0, (DATA, 16, False)) == status


@pytest.mark.parametrize(
    "buffers",
    [
        [(HEADER, 16, False)],
        [(STATUS, 1, True)],
        [(HEADER, 15, False), (STATUS, 1, True)],
        [(HEADER, 16, False), (DATA, 15, False), (STATUS, 1, True)],  # a discard
    ],
)
def test_a_malformed_request_breaks_the_disk(buffers: list[tuple[int, int, bool]]) -> None:
    bench, device, ring = block()
    bench.memory.write(HEADER, struct.pack("<IIQ", Block.DISCARD, 0, 0))
    ring.add(*buffers)
    device.notified(0)
    assert device.broken
    assert device.status & Status.NEEDS_RESET
    assert not ring.take()


def test_a_header_may_come_in_pieces() -> None:
    bench, device, ring = block()
    bench.memory.write(HEADER, struct.pack("<IIQ", Block.FLUSH, 0, 0))
    ring.add((HEADER, 3, False), (HEADER + 3, 13, False), (STATUS, 1, True))
    device.notified(0)
    assert ring.take() == [(0, 1)]
    assert bench.memory.u8[STATUS] == Block.OK


def test_the_configuration_of_a_disk_is_that_of_the_real_one() -> None:
    bench = Bench()
    device = Block(bench.events, bench.memory, size=0, num_queues=4)
    bench.mmio(device)
    read = device.read_config
    assert len(device.config()) == 57
    assert read(0x0C, 4) == 0xFE
    assert read(0x14, 4) == 0x200
    assert read(0x20, 1) == 1
    assert read(0x22, 2) == 4
    assert read(0x24, 4) == read(0x30, 4) == 0x3FFFFF
    assert device.offered == 0x101_3000_7E54


def test_the_write_cache_is_the_only_thing_that_can_be_configured() -> None:
    _, device, _ = block()
    before = device.config()
    for offset in range(60):
        device.write_config(offset, 1, 0)
    after = device.config()
    assert [n for n in range(57) if before[n] != after[n]] == [32]
    device.reset()
    assert device.config() == before


@pytest.mark.parametrize(
    ("features", "cached"),
    [
        (Feature.VERSION_1, 0),
        (Feature.VERSION_1 | Block.F_FLUSH, 1),
        (Feature.VERSION_1 | Block.CONFIG_WCE, 1),
    ],
)
def test_a_driver_that_cannot_flush_gets_no_write_cache(features: int, cached: int) -> None:
    bench = Bench()
    device = Block(bench.events, bench.memory)
    bench.start(bench.mmio(device), features)
    assert device.read_config(32, 1) == cached


def test_a_disk_of_a_single_queue_offers_no_more() -> None:
    bench = Bench()
    assert not Block(bench.events, bench.memory).offered & Block.MQ
    with pytest.raises(UsageError):
        Block(bench.events, bench.memory, num_queues=1025)


# What all devices have in common.


def test_a_device_with_latency_answers_later() -> None:
    bench, device, ring = block()
    device.latency = lambda: 1000
    bench.memory.write(HEADER, struct.pack("<IIQ", Block.FLUSH, 0, 0))
    for _ in range(3):
        ring.add((HEADER, 16, False), (STATUS, 1, True))
        device.notified(0)
    assert not ring.take()
    assert bench.events.run() == 1  # notifications merge, as those of an eventfd
    assert bench.events.now == 1000
    assert len(ring.take()) == 3
    ring.add((HEADER, 16, False), (STATUS, 1, True))
    device.notified(0)
    bench.events.run()
    assert len(ring.take()) == 1


def test_a_reset_in_the_meantime_ends_what_has_not_begun() -> None:
    bench, device, ring = block()
    device.latency = lambda: 1000
    ring.add((HEADER, 16, False), (STATUS, 1, True))
    device.notified(0)
    device.reset()
    bench.events.run()
    assert not ring.take()


def test_a_ring_that_fills_itself_does_not_hold_the_machine_up() -> None:
    bench, device, ring = block()
    bench.memory.write(HEADER, struct.pack("<IIQ", Block.FLUSH, 0, 0))
    add = device.complete

    def complete(queue: Virtqueue, chain: Chain, written: int) -> None:
        add(queue, chain, written)
        ring.add((HEADER, 16, False), (STATUS, 1, True))

    device.complete = complete  # type: ignore[method-assign]
    ring.add((HEADER, 16, False), (STATUS, 1, True))
    device.notified(0)
    assert len(ring.take()) == ring.size
    assert bench.events.run(limit=3) == 3
    assert len(ring.take()) == 3 * ring.size


def test_large_requests_leave_time_for_others() -> None:
    bench, device, ring = block()
    device.TURN = 1 << 20
    bench.memory.write(HEADER, struct.pack("<IIQ", Block.IN, 0, 0))
    for _ in range(4):
        ring.add((HEADER, 16, False), (0x300000, 0x80000, True), (STATUS, 1, True))
    device.notified(0)
    assert len(ring.take()) == 2
    bench.events.run()
    assert len(ring.take()) == 2


def test_an_error_is_told_by_a_change_of_the_configuration() -> None:
    bench, device, ring = block()
    generation = device.generation
    ring.offer(9999)
    device.notified(0)
    assert device.isr == 3
    assert device.generation == generation + 1
    assert bench.levels[-1] is True
    assert len(device.complaints) == 1
    before = list(bench.levels)
    device.notify_config()
    device.notified(0)
    assert bench.levels == before
    device.reset()
    assert not device.broken


def test_notifications_of_queues_that_there_are_not_are_ignored() -> None:
    _, device, _ = block()
    for index in (1, 500, 65535):
        device.notified(index)


# Network.


def network(pairs: int = 1, features: int = ALL, **options: Any) -> tuple[Bench, Net, list[Ring]]:
    bench = Bench()
    device = Net(bench.events, bench.memory, pairs=pairs)
    transport = bench.mmio(device)
    rings = 2 * pairs + 1 if features & Net.MQ else 3
    return bench, device, bench.start(transport, features, rings, **options)


def send(bench: Bench, device: Net, ring: Ring, frame: bytes, queue: int = 1) -> None:
    bench.memory.write(DATA, bytes(NET_HEADER) + frame)
    ring.add((DATA, NET_HEADER, False), (DATA + NET_HEADER, len(frame), False))
    device.notified(queue)


def test_a_frame_comes_back() -> None:
    bench, device, (receive, transmit, _) = network()
    receive.add((0x300000, 2048, True))
    device.notified(0)
    send(bench, device, transmit, b"hello" * 20)
    assert transmit.take() == [(0, 0)]
    assert receive.take() == [(0, 112)]
    header = bytes(10) + b"\1\0"
    assert bench.memory.read(0x300000, 112) == header + b"hello" * 20


def test_a_long_frame_is_spread_over_buffers() -> None:
    bench, device, (receive, transmit, _) = network()
    for n in range(4):
        receive.add((0x300000 + 0x1000 * n, 100, True))
    frame = bytes(range(256))
    send(bench, device, transmit, frame)
    assert receive.take() == [(0, 100), (1, 100), (2, 68)]
    assert bench.memory.u16[0x300000 + 10 >> 1] == 3
    whole = b"".join(bench.memory.read(0x300000 + 0x1000 * n, 100) for n in range(3))
    assert whole[12:268] == frame


def test_a_frame_without_enough_buffers_is_dropped_and_takes_none() -> None:
    bench, device, (receive, transmit, _) = network()
    receive.add((0x300000, 100, True))
    send(bench, device, transmit, bytes(200))
    assert transmit.take() == [(0, 0)]
    assert not receive.take()
    send(bench, device, transmit, bytes(80))
    assert receive.take() == [(0, 92)]


def test_without_merging_a_frame_takes_one_chain() -> None:
    bench, device, (receive, transmit, _) = network(features=ALL & ~Net.MRG_RXBUF)
    for _ in range(2):
        receive.add((0x300000, 100, True))
    send(bench, device, transmit, bytes(150))
    assert not receive.take()
    send(bench, device, transmit, bytes(50))
    assert receive.take() == [(0, 62)]


def test_a_frame_longer_than_any_is_dropped() -> None:
    _, device, (receive, transmit, _) = network()
    receive.add((0x300000, 0x40000, True))
    transmit.add((0, 0x30000, False))
    device.notified(1)
    assert len(transmit.take()) == 1
    assert not receive.take()


def test_each_pair_has_its_own_cable() -> None:
    bench, device, rings = network(pairs=3)
    control = rings[-1]
    for pair in range(3):
        rings[2 * pair].add((0x300000, 2048, True))
    assert command(bench, device, control, b"\4\0\2\0", queue=6) == 0
    for pair in range(3):
        send(bench, device, rings[2 * pair + 1], b"x" * 60, 2 * pair + 1)
    # The driver has asked for two pairs; the third sends into the void.
    assert [len(rings[2 * pair].take()) for pair in range(3)] == [1, 1, 0]


def test_without_mq_the_control_queue_is_the_third() -> None:
    bench, device, rings = network(pairs=3, features=ALL & ~Net.MQ)
    assert len(device.queues) == 3
    assert command(bench, device, rings[2], b"\0\0\1") == 0
    device.accept_features(0)
    device.reset()
    assert len(device.queues) == 3


def test_queues_that_are_negotiated_away_are_served_no_more() -> None:
    bench, device, rings = network(pairs=4)
    rings[6].add((0x300000, 2048, True))
    device.latency = lambda: 5
    send(bench, device, rings[7], bytes(60), 7)
    device.status = 3
    device.accept_features(Feature.VERSION_1)
    bench.events.run()
    assert not rings[6].take()
    assert not rings[7].take()
    device.notified(7)


def test_a_receive_chain_that_cannot_be_written_breaks_the_card() -> None:
    bench, device, (receive, transmit, _) = network()
    receive.add((0x300000, 2048, False))
    send(bench, device, transmit, bytes(60))
    assert device.broken
    assert bench.levels.count(True) == 1  # that the device needs a reset, and nothing since
    assert not transmit.take()


@pytest.mark.parametrize("length", [0, NET_HEADER])
def test_a_frame_without_a_body_breaks_the_card(length: int) -> None:
    bench, device, (_, transmit, _) = network()
    buffers = [(DATA, length, False)] if length else [(DATA, 1, True)]
    transmit.add(*buffers)
    device.notified(1)
    assert device.broken
    assert not bench.memory.u8[DATA]


def command(bench: Bench, device: Net, ring: Ring, what: bytes, queue: int = 2) -> int:
    bench.memory.write(DATA, what)
    bench.memory.write(STATUS, b"\xff")
    ring.add((DATA, len(what), False), (STATUS, 1, True))
    device.notified(queue)
    assert [length for _, length in ring.take()] == [1]
    return bench.memory.u8[STATUS]


@pytest.mark.parametrize(
    ("what", "answer"),
    [
        (b"\0\0\1", 0),
        (b"\0\5\1", 0),
        (b"\0\6\1", 1),
        (b"\0\0", 1),
        (b"\1\1" + b"\2\0\0\0\0\1", 0),
        (b"\1\1" + b"\2\0\0\0\0", 1),
        (b"\1\0" + bytes(8), 0),
        (b"\1\0" + b"\1\0\0\0" + bytes(6) + b"\0\0\0\0", 0),
        (b"\1\0" + b"\1\0\0\0" + b"\0\0\0\0", 1),
        (b"\1\0" + bytes(9), 1),
        (b"\1\0" + b"\xff\xff\xff\xff" + bytes(4), 1),
        (b"\1\0\0", 1),
        (b"\1\0" + b"\xe8\3\0\0" + bytes(6000) + bytes(4), 0),
        (b"\2\0\1\0", 0),
        (b"\2\1\xff\x0f", 0),
        (b"\2\0\0\x10", 1),
        (b"\2\2\1\0", 1),
        (b"\3\0", 1),
        (b"\4\0\1\0", 1),  # MQ is not there
        (b"\5\0" + bytes(8), 1),
        (b"\xff\xff\xff", 1),
    ],
)
def test_a_command_is_answered_as_qemu_does(what: bytes, answer: int) -> None:
    bench, device, rings = network()
    assert command(bench, device, rings[2], what) == answer


def test_an_address_stays_until_reset() -> None:
    bench, device, rings = network()
    assert device.config() == bytes.fromhex("525400123456") + b"\1\0"
    assert command(bench, device, rings[2], b"\1\1\2\3\4\5\6\7") == 0
    assert device.config()[:6] == b"\2\3\4\5\6\7"
    device.write_config(0, 1, 0xFF)
    assert device.config()[:6] == b"\2\3\4\5\6\7"
    device.reset()
    assert device.config()[:6] == bytes.fromhex("525400123456")


def test_pairs_are_counted_in_the_configuration_if_there_are_more_than_one() -> None:
    bench = Bench()
    device = Net(bench.events, bench.memory, pairs=4)
    assert device.read_config(8, 2) == 4
    assert Net(bench.events, bench.memory).read_config(8, 2) == 0xFFFF
    with pytest.raises(UsageError):
        Net(bench.events, bench.memory, pairs=512)


def test_the_features_of_a_card_are_those_of_the_real_one() -> None:
    bench = Bench()
    device = Net(bench.events, bench.memory)
    bench.mmio(device)
    assert device.offered == 0x101_30BF_8024


# Entropy and console.


def test_entropy_is_the_same_each_time() -> None:
    seen = []
    for _ in range(2):
        bench = Bench()
        device = Rng(bench.events, bench.memory, seed=7)
        (ring,) = start(device, bench)
        ring.add((DATA, 64, True))
        device.notified(0)
        assert ring.take() == [(0, 64)]
        seen.append(bench.memory.read(DATA, 64))
    assert seen[0] == seen[1] != bytes(64)


def test_entropy_waits_for_the_driver() -> None:
    bench = Bench()
    device = Rng(bench.events, bench.memory)
    transport = bench.mmio(device)
    (ring,) = bench.start(transport, ALL)
    device.status = Status.FEATURES_OK
    ring.add((DATA, 8, True))
    device.notified(0)
    assert not ring.take()
    transport.write(0x70, 4, 0xF)
    assert ring.take() == [(0, 8)]


def test_a_request_for_a_lot_of_entropy_gets_some() -> None:
    bench = Bench()
    device = Rng(bench.events, bench.memory)
    (ring,) = start(device, bench)
    ring.add((DATA, 0x100000, True))
    device.notified(0)
    assert ring.take() == [(0, Rng.CHUNK)]


def console() -> tuple[Bench, Console, list[Ring], list[bytes]]:
    bench = Bench()
    said: list[bytes] = []
    device = Console(bench.events, bench.memory, output=said.append)
    return bench, device, start(device, bench, 2), said


def test_what_a_guest_writes_comes_out() -> None:
    bench, device, (_, transmit), said = console()
    bench.memory.write(DATA, b"hello, world")
    transmit.add((DATA, 7, False), (DATA + 7, 5, False))
    device.notified(1)
    assert b"".join(said) == b"hello, world"
    assert transmit.take() == [(0, 0)]


def test_what_is_typed_waits_for_the_guest() -> None:
    bench, device, (receive, _), _ = console()
    assert device.input(b"hello") == 5
    assert not receive.take()
    receive.add((DATA, 3, True))
    receive.add((DATA + 16, 3, True))
    device.notified(0)
    assert receive.take() == [(0, 3), (1, 2)]
    assert bench.memory.read(DATA, 3) + bench.memory.read(DATA + 16, 2) == b"hello"


def test_more_is_not_taken_than_there_is_room_for() -> None:
    _, device, _, _ = console()
    assert device.input(bytes(Console.PENDING + 1)) == Console.PENDING
    assert device.input(b"x") == 0


def test_an_emergency_write_needs_no_queue() -> None:
    bench = Bench()
    said: list[bytes] = []
    device = Console(bench.events, bench.memory, output=said.append)
    transport: MmioTransport = bench.mmio(device)
    transport.write(0x108, 4, ord("!"))
    transport.write(0x100, 2, 80)
    assert said == [b"!"]
    assert device.offered & Console.EMERG_WRITE
    assert device.read_config(4, 4) == 1
    assert device.offered & Feature.VERSION_1


def test_a_cable_that_is_pulled_changes_the_configuration_and_loses_frames() -> None:
    bench, device, (receive, transmit, _) = network()
    receive.add((0x300000, 2048, True))
    device.notified(0)
    generation = device.generation
    device.set_link(False)
    device.set_link(False)
    assert device.read_config(6, 2) == 0
    assert (device.generation, device.isr & 2) == (generation + 1, 2)
    send(bench, device, transmit, b"hello" * 20)
    assert transmit.take() == [(0, 0)]
    assert receive.take() == []
    device.set_link(True)
    assert device.read_config(6, 2) == 1
