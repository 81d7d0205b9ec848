# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's interrupts: vectors, affinity, masking, and that none is lost or invented."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvis.emulated.config import DeviceSpec
from qvis.emulated.guest.apic import Vector, message
from qvis.emulated.guest.irq import Vectors
from qvis.emulated.guest.kernel import Kernel
from qvis.emulated.guest.tasks import Task
from qvis.transport import Transport
from qvis.x86 import Apic, Platform

from .guest_machine import EVENTS, Steps, booted, irq_of, run

MS = 1_000_000
STEERABLE = [transport for transport in Transport if transport.vector_per_queue]


def _load(kernel: Kernel, count: int = 1) -> Any:
    def work(task: Task) -> Steps:
        for _ in range(count):
            yield from kernel.disks["vda"].serial(task)
        yield kernel.sleep(30 * MS)  # until an old vector has been given back

    return work


def test_the_lowest_vector_of_the_cpu_with_the_fewest_is_taken() -> None:
    vectors = Vectors(3)
    taken = [vectors.allocate(range(3)) for _ in range(4)]
    assert taken == [(0, 0x20), (1, 0x20), (2, 0x20), (0, 0x21)]
    vectors.free(1, 0x20)
    assert vectors.allocate([0, 1]) == (1, 0x20)


def test_vectors_of_the_system_are_never_given_away_and_an_end_is_told() -> None:
    vectors = Vectors(1)
    taken = set()
    with pytest.raises(OSError, match="no vector left") as failed:
        while True:
            taken.add(vectors.allocate([0])[1])
    assert failed.value.errno == errno.ENOSPC
    assert taken == set(range(0x20, Vector.FIRST_SYSTEM)) - {Vector.SYSCALL}


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=300))
@settings(max_examples=30, deadline=None)
def test_a_vector_is_somebody_elses_only_after_it_was_freed(steps: list[tuple[bool, int]]) -> None:
    vectors, held = Vectors(3), set()
    for take, cpu in steps:
        if take:
            got = vectors.allocate([cpu])
            assert got not in held
            held.add(got)
        elif mine := [pair for pair in held if pair[0] == cpu]:
            vectors.free(*mine[0])
            held.remove(mine[0])


def test_a_message_names_the_apic_and_the_vector() -> None:
    assert message(3, 0x21) == (0xFEE03000, 0x21)
    assert message(0x1FF, 0x30) == (0xFEEFF020, 0x30)  # bits 14:8 of the ID in bits 11:5


@pytest.mark.parametrize("apic", list(Apic))
@pytest.mark.parametrize("transport", STEERABLE)
def test_each_queues_interrupt_goes_to_each_cpu_and_nowhere_else(
    transport: Transport, apic: Apic
) -> None:
    kernel = booted(transport, platform=Platform(apic=apic))
    vcpu = kernel.machine.vcpus[0]
    for queue in range(4):
        desc = irq_of(kernel, f"virtio0-req.{queue}")
        for target in (2, 0, 3, 1):

            def move(task: Task, desc: Any = desc, target: int = target) -> Steps:
                desc.set_affinity(vcpu, {target})
                yield kernel.sleep(MS)

            run(kernel, move)
            run(kernel, _load(kernel, 3), cpus=(queue,))  # the first of these may move it
            before = list(desc.counts)
            run(kernel, _load(kernel, 10), cpus=(queue,))
            gained = [now - then for now, then in zip(desc.counts, before, strict=True)]
            assert gained == [10 * (cpu == target) for cpu in range(4)]
            assert desc.effective == {target}
    assert kernel.irqs.spurious == 0


@pytest.mark.parametrize("transport", list(Transport))
def test_a_vector_of_a_place_that_was_left_is_given_back(transport: Transport) -> None:
    kernel = booted(transport)
    desc = irq_of(kernel, "virtio0-req.1")
    vcpu = kernel.machine.vcpus[0]

    def move(task: Task) -> Steps:
        for number in range(40):
            desc.set_affinity(vcpu, {number % 4})
            yield from kernel.disks["vda"].serial(task)
            yield kernel.sleep(30 * MS)

    run(kernel, move, cpus=(1,))
    nobodys = kernel.irqs._unexpected
    held = sum(entry != nobodys for entries in kernel.irqs.entries for entry in entries)
    others = sum(bool(d.vector) for d in kernel.irqs.descs.values())
    assert held == others + 4 * 6  # and six of the system's on each CPU
    assert not desc.move_in_progress
    assert not desc.cleanup_pending


@pytest.mark.parametrize("transport", list(Transport))
def test_an_interrupt_that_comes_while_masked_is_delivered_once_after_unmask(
    transport: Transport,
) -> None:
    kernel = booted(transport)
    desc = irq_of(kernel, "virtio0-req.1")
    vcpu = kernel.machine.vcpus[0]

    def masks(task: Task) -> Steps:
        for moved in (False, True, True):
            before = sum(desc.counts)
            desc.mask(vcpu)
            load = kernel.spawn(loads(), 1)
            yield kernel.sleep(20 * MS)
            assert sum(desc.counts) == before
            assert load.status is None
            if moved:
                desc.set_affinity(vcpu, {(desc.cpu + 1) % 4})
            desc.unmask(vcpu)
            yield load.ended
            assert sum(desc.counts) == before + 1
            yield kernel.sleep(30 * MS)

    def loads() -> Any:
        assert kernel.current is not None
        yield from kernel.disks["vda"].serial(kernel.current)
        return 0

    run(kernel, masks)


def test_mask_and_unmask_refuse_what_linux_refuses() -> None:
    kernel = booted()
    vcpu = kernel.machine.vcpus[0]
    desc = irq_of(kernel, "virtio0-req.0")
    with pytest.raises(OSError, match="busy"):
        desc.unmask(vcpu)
    desc.mask(vcpu)
    with pytest.raises(OSError, match="busy"):
        desc.mask(vcpu)
    desc.unmask(vcpu)
    idle = kernel.gsi(30)
    with pytest.raises(OSError, match="Not supported"):
        idle.mask(vcpu)


def test_set_affinity_refuses_what_linux_refuses() -> None:
    kernel = booted()
    vcpu = kernel.machine.vcpus[0]
    desc = irq_of(kernel, "virtio0-req.0")
    for cpus in ({4}, set(), {-1}, {1000}):
        with pytest.raises(OSError, match="Invalid argument") as failed:
            desc.set_affinity(vcpu, cpus)
        assert failed.value.errno == errno.EINVAL
    desc.managed = True
    with pytest.raises(OSError, match="Input/output error") as failed:
        desc.set_affinity(vcpu, {1})
    assert failed.value.errno == errno.EIO


def test_an_affinity_that_still_has_its_cpu_moves_nothing() -> None:
    kernel = booted()
    desc = irq_of(kernel, "virtio0-req.2")
    vector = desc.vector
    desc.set_affinity(kernel.machine.vcpus[0], {1, 2, 3, 9})
    assert (desc.cpu, desc.vector) == (2, vector)
    assert desc.affinity == {1, 2, 3, 9}


@pytest.mark.parametrize("transport", STEERABLE)
def test_a_move_before_the_last_one_is_over_takes_effect_later(transport: Transport) -> None:
    kernel = booted(transport)
    desc = irq_of(kernel, "virtio0-req.0")
    vcpu = kernel.machine.vcpus[0]

    def move(task: Task) -> Steps:
        for target in (1, 2, 3):
            desc.set_affinity(vcpu, {target})
        yield kernel.sleep(MS)

    run(kernel, move)
    for _ in range(4):
        run(kernel, _load(kernel))
    assert desc.effective == {3}
    assert desc.affinity == {3}
    assert sum(desc.counts) == 4
    assert kernel.irqs.spurious == 0


def test_an_interrupt_that_nobody_asked_for_is_counted_and_ended() -> None:
    kernel = booted()
    kernel.machine.bus.msi(*message(2, 0x77))
    kernel.machine.events.run(EVENTS)
    assert kernel.irqs.spurious == 1
    assert kernel.machine.vcpus[2].apic.isr == 0


def test_devices_that_share_a_line_all_get_their_interrupts() -> None:
    disks = tuple(DeviceSpec("blk", f"blk{n}") for n in range(50))
    kernel = booted(Transport.INTX, devices=disks)
    lines = [d for d in kernel.irqs.descs.values() if len(d.actions) > 1]
    assert len(lines) == 24

    def work(name: str) -> Any:
        def steps(task: Task) -> Steps:
            for _ in range(3):
                yield from kernel.disks[name].serial(task)

        return steps

    run(kernel, *(work(name) for name in kernel.disks), cpus=(0, 1, 2, 3))
    assert kernel.irqs.spurious == 0


def test_without_vectors_left_a_probe_fails_and_the_rest_works() -> None:
    cards = tuple(DeviceSpec("net", f"nic{n}") for n in range(80))
    kernel = booted(smp=1, memory=64, devices=(DeviceSpec("blk", "blk0"), *cards))
    assert any("failed with error" in line for line in kernel.log)

    def work(task: Task) -> Steps:
        return (yield from kernel.disks["vda"].serial(task))

    assert run(kernel, work) == [""]


STEPS = st.one_of(
    st.tuples(st.just("mask"), st.just(0)),
    st.tuples(st.just("unmask"), st.just(0)),
    st.tuples(st.just("move"), st.integers(0, 3)),
    st.tuples(st.just("load"), st.integers(0, 3)),
    st.tuples(st.just("wait"), st.integers(0, 40)),
)


@pytest.mark.parametrize("transport", list(Transport))
@given(steps=st.lists(STEPS, max_size=25))
@settings(max_examples=40, deadline=None)
def test_whatever_is_masked_and_moved_no_request_is_forgotten(
    transport: Transport, steps: list[tuple[str, int]]
) -> None:
    kernel = booted(transport, devices=(DeviceSpec("blk", "blk0", 4),))
    loads: list[Task] = []

    def serial() -> Any:
        assert kernel.current is not None
        yield from kernel.disks["vda"].serial(kernel.current)
        return 0

    def work(task: Task) -> Steps:
        desc = irq_of(kernel, "virtio0-req.1")
        for what, number in (*steps, ("unmask", 0), ("wait", 60)):
            if what == "mask" and not desc.masked:
                desc.mask(task.vcpu)
            elif what == "unmask" and desc.masked:
                desc.unmask(task.vcpu)
            elif what == "move":
                desc.set_affinity(task.vcpu, {number})
            elif what == "load":
                loads.extend(kernel.spawn(serial(), 1) for _ in range(number))
            elif what == "wait":
                yield kernel.sleep(number * MS)

    run(kernel, work)
    assert [task.status for task in loads] == [0] * len(loads)
    assert kernel.irqs.spurious == 0
    assert all(not vcpu.apic.isr for vcpu in kernel.machine.vcpus)
