# SPDX-License-Identifier: GPL-2.0-or-later
"""A thousand vCPUs and a thousand devices in one machine, all of them at work."""

from __future__ import annotations

from collections import Counter

import pytest

from qvis.emulated.config import Config, DeviceSpec
from qvis.emulated.guest.disk import Disk
from qvis.emulated.guest.kernel import Kernel
from qvis.emulated.guest.tasks import Task, Work
from qvis.emulated.machine import Machine
from qvis.transport import Transport
from qvis.x86 import Platform

from .small import Driver, disks, finish, make, message, send

MANY = 1024


@pytest.mark.parametrize("transport", [Transport.MSI, Transport.VIS])
def test_each_of_a_thousand_devices_interrupts_its_own_of_a_thousand_vcpus(
    transport: Transport,
) -> None:
    machine, guest = make(smp=MANY, transport=transport, devices=disks(MANY), memory=32)
    drivers = [Driver(machine, f"blk{n}", n) for n in range(MANY)]
    for _ in range(2):
        for driver, vcpu in zip(drivers, machine.vcpus, strict=True):
            vcpu.call(driver.submit, vcpu)
        finish(machine)
    assert Counter(vcpu for vcpu, _ in guest.taken) == dict.fromkeys(range(MANY), 2)
    assert [driver.done() for driver in drivers] == [2] * MANY


def test_a_thousand_pci_functions_fit() -> None:
    machine, _ = make(transport=Transport.PCI, devices=disks(MANY), memory=32)
    slots = {attached.slot for attached in machine.devices.values()}
    assert len(slots) == MANY
    assert 0 not in slots  # the host bridge
    for attached in list(machine.devices.values())[::100]:
        assert machine.vcpus[0].read(attached.start, 2) == 0x1AF4


def test_events_of_one_time_are_done_in_their_order_whatever_their_number() -> None:
    machine, guest = make(smp=MANY)
    for n in range(MANY):
        machine.events.at(5000, send, machine, *message(n, 0x31))
    finish(machine)
    assert [vcpu for vcpu, _ in guest.taken] == list(range(MANY))


def test_the_guest_boots_with_a_hundred_of_each_and_reads_from_all() -> None:
    specs = tuple(DeviceSpec("blk", f"blk{n}") for n in range(100))
    machine = Machine(Config(transport=Transport.VIS, smp=100, memory=256, devices=specs))
    kernel = Kernel(machine)
    machine.guest = kernel
    booted: list[bool] = []
    kernel.boot(lambda: booted.append(True))
    finish(machine)
    assert booted
    tasks: list[Task] = []

    answers: list[str] = []

    def work(disk: Disk, number: int) -> Work:
        for _ in range(3):
            answers.append((yield from disk.serial(tasks[number])))
        return 0

    for number, disk in enumerate(kernel.disks.values()):
        tasks.append(kernel.spawn(work(disk, number), cpu=number))
    finish(machine)
    assert not kernel.failures
    assert answers == [""] * 300
    kicks = machine.rules.notify.count
    assert kicks >= 300


@pytest.mark.parametrize("platform", [Platform(), Platform(apicv=True)])
def test_the_same_machine_does_the_same_twice(platform: Platform) -> None:
    ends = []
    for _ in range(2):
        machine, guest = make(platform, smp=8, devices=disks(8))
        drivers = [Driver(machine, f"blk{n}", n) for n in range(8)]
        for driver, vcpu in zip(drivers, machine.vcpus, strict=True):
            for _ in range(5):
                vcpu.call(driver.submit, vcpu)
        finish(machine)
        counts = [exit_.count for exit_ in machine.rules.exits]
        ends.append((machine.events.now, guest.taken, guest.times, counts))
    assert ends[0] == ends[1]
