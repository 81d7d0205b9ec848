# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's kernel: boot, tasks, timers, restart, devices that come and go."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from qvis.emulated.config import Config, DeviceSpec
from qvis.emulated.guest.kernel import Kernel
from qvis.emulated.guest.tasks import Pin, Task, Wait
from qvis.emulated.machine import Machine
from qvis.transport import Transport
from qvis.x86 import Apic, Irqchip, Platform

from .guest_machine import EVENTS, Steps, booted, run

MS = 1_000_000


@pytest.mark.parametrize("apic", list(Apic))
@pytest.mark.parametrize("transport", list(Transport))
def test_it_boots_and_finds_its_devices(transport: Transport, apic: Apic) -> None:
    kernel = booted(transport, platform=Platform(apic=apic))
    drivers = {name: device.driver for name, device in kernel.devices.items()}
    assert drivers == {
        "virtio0": "virtio_blk",
        "virtio1": "virtio_net",
        "virtio2": "virtio_rng",
        "virtio3": "virtio_console",
    }
    assert list(kernel.disks) == ["vda"]
    assert [sorted(cpus) for cpus in kernel.disks["vda"].queues] == [[0], [1], [2], [3]]
    names = {parent.name for parent in kernel.parents.values()}
    first = "0000:00:01.0" if transport is Transport.PCI else "LNRO0005:00"
    assert first in names
    assert any("[vda] 2097152 512-byte logical blocks (1.07 GB/1.00 GiB)" in x for x in kernel.log)


@pytest.mark.parametrize(
    "platform",
    [
        Platform(irqchip=Irqchip.OFF, apic=Apic.XAPIC),
        *(
            Platform(irqchip=irqchip, apicv=apicv, pv_eoi=pv_eoi)
            for irqchip in (Irqchip.ON, Irqchip.SPLIT)
            for apicv in (False, True)
            for pv_eoi in (False, True)
        ),
    ],
    ids=lambda platform: platform.description,
)
@pytest.mark.parametrize("transport", [Transport.MSI, Transport.INTX])
def test_it_boots_and_works_on_every_platform(transport: Transport, platform: Platform) -> None:
    if transport is Transport.INTX and platform.irqchip is Irqchip.ON:
        pytest.skip("there is no such machine")
    kernel = booted(transport, platform=platform)

    def work(task: Task) -> Steps:
        return (yield from kernel.disks["vda"].read(task))

    assert run(kernel, work) == [bytes(4096)]


@pytest.mark.parametrize("smp", [1, 2, 3, 7])
def test_every_cpu_comes_up(smp: int) -> None:
    kernel = booted(smp=smp)
    assert kernel.online == frozenset(range(smp))
    assert f"{smp} CPUs" in "".join(kernel.log)
    assert all(vcpu.apic.enabled for vcpu in kernel.machine.vcpus)


def test_a_cpu_above_255_takes_interrupts_too() -> None:
    kernel = booted(Transport.MSI, smp=300, devices=(DeviceSpec("blk", "blk0", 300),))

    def work(task: Task) -> Steps:
        yield from kernel.disks["vda"].serial(task)

    run(kernel, work, cpus=(299,))
    desc = next(d for d in kernel.irqs.descs.values() if d.actions == ["virtio0-req.299"])
    assert desc.counts[299] == 1
    assert sum(desc.counts) == 1


def test_tasks_run_on_their_cpus_and_end_with_their_status() -> None:
    kernel = booted()

    def work(task: Task) -> Steps:
        first = task.cpu
        yield Pin(3)
        assert kernel.running is kernel.machine.vcpus[3]
        return first, task.cpu

    assert run(kernel, work, work, cpus=(1, 2)) == [(1, 3), (2, 3)]


def test_what_a_task_waits_for_comes_with_its_value_whoever_is_first() -> None:
    kernel = booted()
    early, late = Wait(), Wait()
    early.wake("before")

    def waits(task: Task) -> Steps:
        return (yield early), (yield late)

    def wakes(task: Task) -> Steps:
        yield kernel.sleep(MS)
        late.wake("after")

    assert run(kernel, waits, wakes, cpus=(0, 1))[0] == ("before", "after")
    assert kernel.statistics["RES"][0] >= 1  # CPU 1 told CPU 0 to go on


def test_a_wake_up_lets_all_go_on_who_wait() -> None:
    kernel = booted()
    gate = Wait()

    def waits(task: Task) -> Steps:
        return (yield gate)

    def wakes(task: Task) -> Steps:
        yield kernel.sleep(MS)
        gate.wake(7)

    assert run(kernel, waits, waits, waits, wakes, cpus=(0, 1, 2, 3))[:3] == [7, 7, 7]


@pytest.mark.parametrize("apic", list(Apic))
def test_a_task_sleeps_as_long_as_it_wants_to(apic: Apic) -> None:
    kernel = booted(platform=Platform(apic=apic))
    lengths = (100, 5_000, 3 * MS, 2_000 * MS, 0)

    def work(task: Task) -> Steps:
        slept = []
        for ns in lengths:
            before = kernel.now(task.vcpu)
            yield kernel.sleep(ns)
            slept.append(kernel.now(task.vcpu) - before)
        return slept

    for slept in run(kernel, work, work, cpus=(0, 2)):
        for length, took in zip(lengths, slept, strict=True):
            assert length <= took < length + 50_000


def test_sleepers_wake_in_the_order_of_their_times() -> None:
    kernel = booted()
    order: list[int] = []

    def sleeper(number: int) -> Any:
        def work(task: Task) -> Steps:
            yield kernel.sleep(number * MS)
            order.append(number)

        return work

    run(kernel, *(sleeper(n) for n in (3, 1, 4, 2, 5)))
    assert order == [1, 2, 3, 4, 5]


def test_a_task_that_never_waits_lets_others_run() -> None:
    kernel = booted(smp=1, devices=())
    stop: list[bool] = []

    def spins(task: Task) -> Steps:
        count = 0
        while not stop:
            count += 1
            yield None
        return count

    def stops(task: Task) -> Steps:
        yield kernel.sleep(MS)
        stop.append(True)

    assert run(kernel, spins, stops)[0] > 100


def test_a_killed_task_is_over_and_who_waits_for_it_knows() -> None:
    kernel = booted()
    never = Wait()
    cleaned: list[bool] = []

    def victim() -> Any:
        try:
            yield never
        finally:
            cleaned.append(True)
        return 0

    task = kernel.spawn(victim(), 1)

    def killer(mine: Task) -> Steps:
        yield kernel.sleep(MS)
        task.kill()
        task.kill()  # once more is nothing
        return (yield task.ended)

    assert run(kernel, killer) == [137]
    assert cleaned == [True]
    assert task.number not in kernel.scheduler.tasks
    never.wake()  # nobody is there
    kernel.machine.events.run(EVENTS)


def test_a_task_that_fails_ends_and_the_machine_goes_on() -> None:
    kernel = booted()

    def broken() -> Any:
        yield kernel.sleep(MS)
        raise ZeroDivisionError("oops")

    task = kernel.spawn(broken(), 1)
    kernel.machine.events.run(EVENTS)
    assert task.status == 139
    assert [str(problem) for problem in kernel.failures] == ["oops"]
    kernel.failures.clear()

    def work(task: Task) -> Steps:
        return (yield from kernel.disks["vda"].serial(task))

    assert run(kernel, work) == [""]


def test_an_idle_guest_has_nothing_to_do() -> None:
    kernel = booted()
    assert kernel.machine.events.next is None
    assert all(vcpu.halted for vcpu in kernel.machine.vcpus)


@pytest.mark.parametrize("transport", list(Transport))
def test_it_starts_over_when_the_machine_is_reset(transport: Transport) -> None:
    machine = Machine(Config(transport=transport, smp=2, devices=(DeviceSpec("blk", "blk0", 2),)))
    kernel = machine.guest = Kernel(machine)
    ready: list[bool] = []
    kernel.boot(lambda: ready.append(True))
    machine.events.run(EVENTS)
    before = len(kernel.log)
    machine.reset()
    machine.events.run(EVENTS)
    assert ready == [True, True]
    assert len(kernel.log) == before

    def work(task: Task) -> Steps:
        return (yield from kernel.disks["vda"].read(task))

    assert run(kernel, work) == [bytes(4096)]


@pytest.mark.parametrize("transport", list(Transport))
def test_it_starts_over_when_it_was_reset_in_the_middle_of_its_boot(transport: Transport) -> None:
    for events in range(0, 40, 3):
        machine = Machine(
            Config(transport=transport, smp=2, devices=(DeviceSpec("blk", "blk0", 2),))
        )
        kernel = machine.guest = Kernel(machine)
        ready: list[None] = []
        kernel.boot(partial(ready.append, None))
        machine.events.run(events)
        machine.reset()
        machine.events.run(EVENTS)
        assert ready
        assert list(kernel.disks) == ["vda"]
        assert kernel.failures == []


@pytest.mark.parametrize("transport", [Transport.PCI, Transport.VIS, Transport.INTX])
def test_a_device_that_is_plugged_in_works_until_it_is_taken_out(transport: Transport) -> None:
    kernel = booted(transport)
    machine = kernel.machine
    for _ in range(3):
        machine.plug(DeviceSpec("blk", "more", 2))
        machine.events.run(EVENTS)
        assert sorted(kernel.disks) == ["vda", "vdb"]

        def work(task: Task) -> Steps:
            return (yield from kernel.disks["vdb"].read(task))

        assert run(kernel, work) == [bytes(4096)]
        machine.unplug("more")
        machine.events.run(EVENTS)
        assert sorted(kernel.disks) == ["vda"]
        assert len(kernel.devices) == 4


@pytest.mark.parametrize("transport", [Transport.PCI, Transport.VIS, Transport.INTX])
def test_devices_may_come_and_go_while_it_boots(transport: Transport) -> None:
    for events in range(0, 45, 4):
        for goes in (False, True):
            devices = (DeviceSpec("blk", "blk0", 2), DeviceSpec("net", "nic0"))
            machine = Machine(Config(transport=transport, smp=2, devices=devices))
            kernel = machine.guest = Kernel(machine)
            ready: list[None] = []
            kernel.boot(partial(ready.append, None))
            machine.events.run(events)
            machine.plug(DeviceSpec("blk", "more"))
            if goes:
                machine.unplug("blk0")
            machine.events.run(EVENTS)
            assert kernel.failures == []
            assert ready
            assert len(kernel.disks) == (1 if goes else 2)


def test_nothing_is_left_of_a_task_that_has_ended() -> None:
    kernel = booted()

    def work(task: Task) -> Steps:
        yield kernel.sleep(1)

    for _ in range(3):
        run(kernel, work, work, cpus=(0, 1))
        assert kernel.scheduler.tasks == {}
