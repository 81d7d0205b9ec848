# SPDX-License-Identifier: GPL-2.0-or-later
"""What the project is for: each queue's interrupts on the CPU that was asked for."""

from __future__ import annotations

import pytest

import qvis
from qvis.guest import load
from qvis.guest.interrupts import Vector
from qvis.machine.machine import Machine
from tests.conftest import EVERY_TRANSPORT

pytestmark = EVERY_TRANSPORT

REQUESTS = 1100
ENOUGH = 1000
SMP = QUEUES = 4
# Returns when the link is as it shall be, and the console's deadline ends it if never.
CARRIER = "until grep -q {} /sys/class/net/eth0/carrier; do sleep 0.1; done"


def blk_vectors(vm: Machine) -> list[Vector]:
    return [vector for vector in vm.irqs.vectors() if vector.driver == "virtio_blk"]


def arrivals(vm: Machine, irq: int, queue: int, requests: int = REQUESTS) -> dict[int, int]:
    """Interrupts of ``irq`` by CPU while ``queue`` completes ``requests``."""
    before = next(v for v in vm.irqs.vectors() if v.irq == irq).counts
    assert load.run(vm.ssh, queue, requests).completed == requests
    after = next(v for v in vm.irqs.vectors() if v.irq == irq).counts
    return {cpu: after[cpu] - before[cpu] for cpu in after}


def move(vm: Machine, vector: Vector, cpu: int) -> Vector:
    """Send ``vector`` to ``cpu``, from its next interrupt on.

    x86 Linux moves an MSI-X vector, whose message takes several writes, and an
    IO-APIC line only when the next interrupt arrives, which still goes to the
    old CPU: so one is made. MMIO's messages change in one step and need none.
    """
    moved = vm.irqs.set_affinity(vector.irq, [cpu])
    if vm.spec.transport in (qvis.Transport.PCI, qvis.Transport.INTX):
        load.run(vm.ssh, vector.queue or 0, 1)
    return moved


def test_one_vector_a_queue_and_one_for_configuration(vm: Machine) -> None:
    sources = sorted(vector.source for vector in blk_vectors(vm))
    if vm.spec.transport.vector_per_queue:
        assert sources == ["config", *(f"req.{n}" for n in range(QUEUES))]
    else:
        assert sources == [""]


def test_transport_is_the_one_asked_for(vm: Machine) -> None:
    chips = {
        qvis.Transport.PCI: "PCI-MSIX",
        qvis.Transport.INTX: "IO-APIC",
        qvis.Transport.MSI: "MMIO-MSI-LNRO0005:",
        qvis.Transport.VIS: "MMIO-VIS-LNRO0005:",
        qvis.Transport.VIS_DOORBELL: "MMIO-VIS-LNRO0005:",
    }
    for vector in vm.irqs.vectors():
        assert chips[vm.spec.transport] in vector.chip.upper()


def test_queues_map_to_cpus_one_to_one(vm: Machine) -> None:
    """The spread that the driver asks for is honoured: blk-mq sees it as its queue map."""
    cpus = load.queue_cpus(vm.ssh)
    assert sorted(cpus) == list(range(QUEUES))
    assert sorted(cpu for queue in cpus.values() for cpu in queue) == list(range(SMP))
    assert all(len(queue) == SMP // QUEUES for queue in cpus.values())


def test_each_queue_interrupts_the_cpu_it_serves_unless_moved(vm: Machine) -> None:
    if not vm.spec.transport.vector_per_queue:
        pytest.skip("one line for all queues serves no CPU in particular")
    cpus = load.queue_cpus(vm.ssh)
    vm.irqs.spread()
    for vector in blk_vectors(vm):
        if vector.queue is not None:
            assert vector.effective <= cpus[vector.queue]


def test_every_vector_reaches_every_cpu_and_no_other(vm: Machine) -> None:
    if not vm.spec.transport.vector_per_queue:
        pytest.skip("shown to be impossible by test_a_line_moves_all_queues_at_once")
    for vector in blk_vectors(vm):
        if vector.queue is None:
            continue
        for cpu in range(SMP):
            moved = move(vm, vector, cpu)
            assert moved.affinity == {cpu}
            landed = arrivals(vm, vector.irq, vector.queue)
            assert landed.pop(cpu) >= ENOUGH
            assert not any(landed.values()), f"{vector.source} asked for CPU {cpu}, got {landed}"


def test_moving_one_vector_leaves_the_others(vm: Machine) -> None:
    if not vm.spec.transport.vector_per_queue:
        pytest.skip("there is only one")
    vm.irqs.spread()
    for queue in range(2):
        load.run(vm.ssh, queue, 1)  # see move()
    first, second = (v for v in blk_vectors(vm) if v.queue in (0, 1))
    move(vm, first, 3)
    landed = arrivals(vm, second.irq, 1, requests=100)
    assert landed.pop(min(second.effective)) == 100
    assert not any(landed.values())


def test_a_line_moves_all_queues_at_once(vm: Machine) -> None:
    """INTx: the one line can be moved, so any two queues are always on the same CPU."""
    if vm.spec.transport.vector_per_queue:
        pytest.skip("each queue has its own vector")
    (line,) = blk_vectors(vm)
    assert line.source == ""
    with pytest.raises(qvis.UsageError, match="one interrupt line"):
        vm.irqs.spread()
    for cpu in (1, 2):
        move(vm, line, cpu)
        for queue in range(QUEUES):
            landed = arrivals(vm, line.irq, queue)
            assert landed.pop(cpu) >= ENOUGH
            assert not any(landed.values()), "queues on different CPUs over one line"


def test_configuration_change_interrupts_its_own_vector(vm: Machine) -> None:
    """A link that goes down and up is two configuration changes of the NIC."""
    nic = [v for v in vm.irqs.vectors() if v.driver == "virtio_net"]
    if vm.spec.transport.vector_per_queue:
        (config,) = (v for v in nic if v.source == "config")
    else:
        (config,) = nic
    before = sum(config.counts.values())
    vm.qmp("set_link", name="nic0", up=False)
    with vm.console() as console:  # SSH comes over that link
        console.run(CARRIER.format(0))
        vm.qmp("set_link", name="nic0", up=True)
        console.run(CARRIER.format(1))
    after = next(v for v in vm.irqs.vectors() if v.irq == config.irq)
    taken = sum(after.counts.values()) - before
    if vm.spec.transport.vector_per_queue:
        assert taken == 2
    else:
        assert taken >= 2  # the line carries packets as well


def test_unknown_irqs_and_cpus_are_refused_by_name(vm: Machine) -> None:
    irq = blk_vectors(vm)[0].irq
    with pytest.raises(qvis.UsageError, match=r"no such CPU in the guest: 4; it has 0-3 online"):
        vm.irqs.set_affinity(irq, "4")
    with pytest.raises(qvis.UsageError, match="bad CPU list 'x'"):
        vm.irqs.set_affinity(irq, "x")
    with pytest.raises(qvis.UsageError, match="uses IRQ 9999; there are"):
        vm.irqs.set_affinity(9999, "0")
    with pytest.raises(qvis.UsageError, match="has no queue 4; it has 0-3"):
        load.run(vm.ssh, QUEUES, 1)
