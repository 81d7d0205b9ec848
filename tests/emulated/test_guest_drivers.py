# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's drivers: requests, frames, entropy, a console; removal and return; bad devices."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from qvis.emulated.config import DeviceSpec
from qvis.emulated.devices import Console
from qvis.emulated.guest.drivers import ConsoleDriver, RngDriver
from qvis.emulated.guest.kernel import Kernel
from qvis.emulated.guest.ring import Ring, ring_size
from qvis.emulated.guest.tasks import Task
from qvis.emulated.guest.virtio import spread
from qvis.emulated.vcpu import Vcpu
from qvis.transport import Transport

from .guest_machine import EVENTS, Steps, booted, irq_of, run

MS = 1_000_000
MSI_VECTOR_NUM, VIS_CONTROL, MSIX_CONTROL = 0x0D0, 0x0F8, 0x9A


def _driver(kernel: Kernel, name: str) -> Any:
    return next(d.driving for d in kernel.devices.values() if d.driver == name)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("transport", list(Transport))
def test_a_disk_reads_writes_flushes_and_tells_its_serial_number(
    transport: Transport, at_once: bool
) -> None:
    kernel = booted(transport, at_once=at_once)
    disk = kernel.disks["vda"]

    def work(task: Task) -> Steps:
        yield from disk.write(task, 8192, b"x" * 4096)
        yield from disk.flush(task)
        data = yield from disk.read(task, disk.size - 512, 512)
        return data, (yield from disk.serial(task))

    assert run(kernel, work, work, cpus=(1, 3)) == [(bytes(512), "")] * 2


@pytest.mark.parametrize("transport", list(Transport))
def test_requests_of_a_cpu_go_by_its_queue_and_each_interrupts_once(transport: Transport) -> None:
    kernel = booted(transport)

    def work(task: Task) -> Steps:
        for _ in range(25):
            yield from kernel.disks["vda"].read(task)

    run(kernel, work, work, work, work, cpus=(0, 1, 2, 3))
    if transport.vector_per_queue:
        for cpu in range(4):
            counts = irq_of(kernel, f"virtio0-req.{cpu}").counts
            assert counts == [25 * (cpu == other) for other in range(4)]
    else:
        assert sum(irq_of(kernel, "virtio0").counts) >= 25


def test_many_requests_at_a_time_are_all_done() -> None:
    kernel = booted(devices=(DeviceSpec("blk", "blk0", 2),))
    done: list[int] = []

    def work(number: int) -> Any:
        def steps(task: Task) -> Steps:
            for _ in range(3):
                yield from kernel.disks["vda"].read(task, 4096 * number)
            done.append(number)

        return steps

    run(kernel, *(work(n) for n in range(600)), cpus=(0, 1, 2, 3))
    assert sorted(done) == list(range(600))


@pytest.mark.parametrize(
    ("offset", "length", "number"),
    [
        (1, 512, errno.EINVAL),
        (0, 100, errno.EINVAL),
        (0, 8192, errno.EINVAL),
        (0, 0, errno.EINVAL),
        (-512, 512, errno.EIO),
        (1 << 30, 512, errno.EIO),
        ((1 << 30) - 512, 1024, errno.EIO),
    ],
)
def test_what_is_not_on_the_disk_is_refused(offset: int, length: int, number: int) -> None:
    kernel = booted()

    def work(task: Task) -> Steps:
        with pytest.raises(OSError) as failed:
            yield from kernel.disks["vda"].read(task, offset, length)
        return failed.value.errno

    assert run(kernel, work) == [number]


@pytest.mark.parametrize("transport", list(Transport))
def test_a_driver_goes_and_comes_back_and_leaves_nothing_behind(transport: Transport) -> None:
    kernel = booted(transport)
    vcpu = kernel.machine.vcpus[0]
    numbers, used = set(kernel.irqs.descs), 0
    counts: list[int] = []

    def cycle(task: Task) -> Steps:
        for name in list(kernel.devices):
            kernel.devices[name].unbind(vcpu)
            assert kernel.devices[name].driver is None
            kernel.devices[name].bind(vcpu)
        for parent in list(kernel.parents.values()):
            parent.unbind(vcpu)
            assert not parent.bound
            parent.bind(vcpu)
        yield from kernel.disks["vda"].serial(task)
        yield kernel.sleep(50 * MS)

    for _ in range(12):
        run(kernel, cycle)
        used = kernel.pages._next
        counts.append(used)
    assert set(kernel.irqs.descs) == numbers
    assert len(set(counts[1:])) == 1, "pages leak"
    assert sorted(kernel.devices) == ["virtio0", "virtio1", "virtio2", "virtio3"]
    assert sorted(kernel.irqs.vectors._count) == sorted(booted(transport).irqs.vectors._count)


def test_what_is_unbound_cannot_be_unbound_and_what_is_bound_not_bound() -> None:
    kernel = booted()
    vcpu, device = kernel.machine.vcpus[0], kernel.devices["virtio0"]
    with pytest.raises(OSError, match="No such device"):
        device.bind(vcpu)
    device.unbind(vcpu)
    with pytest.raises(OSError, match="No such device"):
        device.unbind(vcpu)


@pytest.mark.parametrize("transport", list(Transport))
def test_requests_under_way_fail_when_the_driver_goes(transport: Transport) -> None:
    kernel = booted(transport)
    disk, vcpu = kernel.disks["vda"], kernel.machine.vcpus[0]

    def reads(task: Task) -> Steps:
        irq_of(kernel, "virtio0-req.1").mask(vcpu)
        try:
            yield from disk.read(task)
        except OSError as problem:
            return problem.errno
        return 0

    def unbinds(task: Task) -> Steps:
        yield kernel.sleep(5 * MS)
        kernel.devices["virtio0"].unbind(vcpu)

    assert run(kernel, reads, unbinds, cpus=(1, 0))[0] == errno.EIO

    def again(task: Task) -> Steps:
        with pytest.raises(OSError, match="No such device"):
            yield from disk.read(task)
        kernel.devices["virtio0"].bind(vcpu)
        return (yield from kernel.disks["vda"].read(task))

    assert run(kernel, again) == [bytes(4096)]


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("transport", list(Transport))
def test_frames_that_are_sent_come_back(transport: Transport, pairs: int) -> None:
    kernel = booted(transport, devices=(DeviceSpec("net", "nic0", pairs),))
    card = kernel.network[0]
    got: list[bytes] = []
    card.received = lambda vcpu, frame: got.append(frame)
    sent = [bytes([n]) * (60 + n) for n in range(100)]

    def work(task: Task) -> Steps:
        for number, frame in enumerate(sent):
            while not card.send(task.vcpu, frame):
                yield kernel.sleep(MS)
            if number % 40 == 39:  # more than the card has buffers for would be lost
                yield kernel.sleep(MS)
        yield kernel.sleep(10 * MS)

    run(kernel, work, cpus=(2,))
    assert got == sent
    assert (card.frames_in, card.frames_out) == (100, 100)
    assert card.pairs == pairs


def test_a_frame_that_is_too_long_or_from_a_card_that_is_down_is_refused() -> None:
    kernel = booted()
    card, vcpu = kernel.network[0], kernel.machine.vcpus[0]
    assert not card.send(vcpu, bytes(5000))
    card.up = False
    assert not card.send(vcpu, bytes(60))


@pytest.mark.parametrize("transport", list(Transport))
def test_there_is_entropy(transport: Transport) -> None:
    kernel = booted(transport)
    driver = _driver(kernel, "virtio_rng")
    assert isinstance(driver, RngDriver)

    def work(task: Task) -> Steps:
        return (yield from driver.read(lambda: task.vcpu, 1000))

    first, second = run(kernel, work), run(kernel, work)
    assert len(first[0]) == len(second[0]) == 1000
    assert first != second


def test_who_waits_for_entropy_does_not_wait_for_a_driver_that_is_gone() -> None:
    kernel = booted()
    driver, vcpu = _driver(kernel, "virtio_rng"), kernel.machine.vcpus[0]

    def reads(task: Task) -> Steps:
        desc = irq_of(kernel, "virtio2-input")
        if not desc.masked:
            desc.mask(task.vcpu)
        return (yield from driver.read(lambda: task.vcpu, 1000))

    def unbinds(task: Task) -> Steps:
        yield kernel.sleep(MS)
        kernel.devices["virtio2"].unbind(vcpu)

    assert len(run(kernel, reads, reads, unbinds)[0]) < 1000


@pytest.mark.parametrize("transport", list(Transport))
def test_the_console_sends_and_receives(transport: Transport) -> None:
    kernel = booted(transport)
    driver = _driver(kernel, "virtio_console")
    device = kernel.machine.devices["con0"].device
    assert isinstance(driver, ConsoleDriver)
    assert isinstance(device, Console)
    out, heard = bytearray(), bytearray()
    device.output = out.extend
    driver.input = heard.extend

    def work(task: Task) -> Steps:
        for number in range(50):
            while not driver.write(task.vcpu, b"line %d\n" % number):
                yield kernel.sleep(MS)

    run(kernel, work)
    for number in range(50):
        device.input(b"key %d\n" % number)
        kernel.machine.events.run(EVENTS)
    assert out == b"".join(b"line %d\n" % n for n in range(50))
    assert heard == b"".join(b"key %d\n" % n for n in range(50))


@pytest.mark.parametrize(
    ("queues", "cpus", "sizes"),
    [(4, 4, [1] * 4), (3, 4, [2, 1, 1]), (1, 5, [5]), (5, 3, [1, 1, 1, 0, 0]), (2, 7, [4, 3])],
)
def test_queues_share_cpus_in_neighbourhoods(queues: int, cpus: int, sizes: list[int]) -> None:
    found = spread(queues, range(cpus))
    assert [len(part) for part in found] == sizes
    assert sorted(cpu for part in found for cpu in part) == list(range(cpus))


def test_a_used_ring_with_nonsense_in_it_stops_nothing_else() -> None:
    kernel = booted()
    ring = kernel.disks["vda"].hardware[1].ring
    _, _, used = ring.addresses
    memory = kernel.memory
    for index, head in enumerate((0xFFFFFFFF, 5, 1 << 20)):
        memory.u32[(used + 4 + 8 * index) >> 2] = head
    memory.u16[(used + 2) >> 1] = 3
    kernel.machine.devices["blk0"].transport.interrupt(1)
    kernel.machine.events.run(EVENTS)

    def work(task: Task) -> Steps:
        return (yield from kernel.disks["vda"].serial(task))

    assert run(kernel, work) == [""]


def test_without_memory_a_probe_fails_and_the_rest_works() -> None:
    disks = tuple(DeviceSpec("blk", f"blk{n}", 4) for n in range(120))
    kernel = booted(memory=16, devices=disks)
    assert any("failed with error -12" in line for line in kernel.log)
    assert 1 <= len(kernel.disks) < 120


def test_a_ring_is_laid_out_as_the_specification_says() -> None:
    assert ring_size(256, 4) == (4096, 4614 + 2, 4616 + 6 + 2048)
    assert ring_size(1024, 4096) == (0x4000, 0x5000, 0x5000 + 6 + 8192)


def test_without_indirect_descriptors_a_request_takes_its_own() -> None:
    kernel = booted()
    notified: list[int] = []
    ring = Ring(
        kernel.pages, kernel.memory, 0, "q", 8, 4096, 0, None,
        lambda vcpu: notified.append(1),
    )  # fmt: skip
    table = kernel.pages.take(4096)
    kernel.memory.u64[(table >> 3) + 1] = 16 | 1 << 32 | 1 << 48
    kernel.memory.u64[(table >> 3) + 3] = 1 | 2 << 32
    ring.add_table(table, 2, "token")
    assert ring.room == 6
    ring.kick(kernel.machine.vcpus[0])
    assert notified == [1]
    _, _, used = ring.addresses
    kernel.memory.u16[(used + 2) >> 1] = 1
    assert ring.get() == "token"
    assert ring.room == 8
    assert ring.get() is None


def _bound_again(
    monkeypatch: pytest.MonkeyPatch, transport: Transport, answers: dict[int, int]
) -> Kernel:
    """A guest whose disk was bound anew, while registers at some offsets of it had other values.

    Of MSI-X's control it is the size only, one less than there are.
    """
    kernel = booted(transport)
    start, vcpu = kernel.machine.devices["blk0"].start, kernel.machine.vcpus[0]
    real = Vcpu.read

    def read(vcpu: Vcpu, address: int, size: int) -> int:
        value = real(vcpu, address, size)
        offset = address - start
        if offset == MSIX_CONTROL and offset in answers:
            return value & ~0x7FF | answers[offset]
        return answers.get(offset, value)

    monkeypatch.setattr(Vcpu, "read", read)
    kernel.devices["virtio0"].unbind(vcpu)
    kernel.devices["virtio0"].bind(vcpu)
    monkeypatch.undo()
    return kernel


@pytest.mark.parametrize(
    ("transport", "answers", "actions", "chip"),
    [
        (Transport.MSI, {MSI_VECTOR_NUM: 2}, {"config", "virtqueues"}, "MMIO-MSI-LNRO0005:00"),
        (Transport.VIS, {MSI_VECTOR_NUM: 4}, {"config", "virtqueues"}, "MMIO-VIS-LNRO0005:00"),
        (Transport.VIS, {VIS_CONTROL: 0}, {"config", "req.3"}, "MMIO-MSI-LNRO0005:00"),
        (Transport.MSI, {MSI_VECTOR_NUM: 1}, {""}, "IO-APIC"),
        (Transport.VIS, {MSI_VECTOR_NUM: 0}, {""}, "IO-APIC"),
        (Transport.VIS, {MSI_VECTOR_NUM: 2049}, {""}, "IO-APIC"),
        (Transport.PCI, {MSIX_CONTROL: 2}, {"config", "virtqueues"}, "PCI-MSIX-0000:00:01.0"),
    ],
)
def test_with_fewer_vectors_they_are_shared_and_with_too_few_it_is_the_line(
    monkeypatch: pytest.MonkeyPatch,
    transport: Transport,
    answers: dict[int, int],
    actions: set[str],
    chip: str,
) -> None:
    kernel = _bound_again(monkeypatch, transport, answers)
    mine = {
        action.removeprefix("virtio0").removeprefix("-"): desc
        for desc in kernel.irqs.descs.values()
        for action in desc.actions
        if action.split("-")[0] == "virtio0"
    }
    assert actions <= set(mine)
    assert {desc.hardware.name for desc in mine.values()} == {chip}

    def work(task: Task) -> Steps:
        for _ in range(3):
            yield from kernel.disks["vda"].serial(task)

    run(kernel, work, work, work, work, cpus=(0, 1, 2, 3))
    kernel.devices["virtio0"].unbind(kernel.machine.vcpus[0])
    kernel.devices["virtio0"].bind(kernel.machine.vcpus[0])
    if transport.vector_per_queue:
        assert irq_of(kernel, "virtio0-req.3").actions == ["virtio0-req.3"]
    run(kernel, work)


@pytest.mark.parametrize(
    "answers",
    [{0x070: 3}, {0x034: 0}, {0x034: 3}, {0x044: 1}],
    ids=["features refused", "no queues", "a size that is none", "a queue in use"],
)
def test_a_device_that_does_not_behave_is_not_driven(
    monkeypatch: pytest.MonkeyPatch, answers: dict[int, int]
) -> None:
    with pytest.raises(OSError, match=r"refuses|No such"):
        _bound_again(monkeypatch, Transport.VIS, answers)
