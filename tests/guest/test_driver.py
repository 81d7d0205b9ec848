# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's driver under the administrator's hands: unbind, rebind, CPUs that go."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import qvis
from qvis.guest import load
from qvis.machine.machine import Machine

REBINDS = 20


@pytest.fixture
def own(boot: Callable[..., Machine], transport: qvis.Transport) -> Machine:
    """A guest of the test's own, with four CPUs and queues."""
    return boot(transport=transport, smp=4, queues=4)


def census(vm: Machine) -> dict[str, int]:
    """How many interrupts and interrupt domains the kernel has (GENERIC_IRQ_DEBUGFS)."""
    text = vm.ssh.run(
        "ls /sys/kernel/debug/irq/irqs | wc -l; ls /sys/kernel/debug/irq/domains | wc -l"
    ).stdout
    irqs, domains = map(int, text.split())
    return {"irqs": irqs, "domains": domains}


def parent(vm: Machine, driver: str) -> tuple[str, str]:
    """The transport's driver folder and the device in it that carries ``driver``'s device."""
    vector = next(v for v in vm.irqs.vectors() if v.driver == driver)
    path = vm.ssh.run(f"readlink -f /sys/bus/virtio/devices/{vector.device}/..").stdout.strip()
    folder = vm.ssh.run(f"readlink -f {path}/driver").stdout.strip()
    return folder, path.rsplit("/", 1)[1]


def test_rebinding_leaks_nothing(own: Machine) -> None:
    before = census(own)
    sources = sorted(v.source for v in own.irqs.vectors() if v.driver == "virtio_blk")
    folder, device = parent(own, "virtio_blk")
    own.ssh.run(
        f"for i in $(seq {REBINDS}); do echo {device} > {folder}/unbind && "
        f"echo {device} > {folder}/bind || exit 1; done",
        deadline=300,
    )
    assert census(own) == before
    assert sorted(v.source for v in own.irqs.vectors() if v.driver == "virtio_blk") == sources
    for queue in load.queue_cpus(own.ssh):
        assert load.run(own.ssh, queue, 100).completed == 100
    log = own.ssh.run("dmesg").stdout
    assert not [line for line in log.splitlines() if "WARNING" in line or "BUG" in line]


def test_unbinding_frees_every_vector(own: Machine) -> None:
    folder, device = parent(own, "virtio_blk")
    with_disk = census(own)
    own.ssh.run(f"echo {device} > {folder}/unbind")
    without = census(own)
    assert not [v for v in own.irqs.vectors() if v.driver == "virtio_blk"]
    if own.spec.transport.vector_per_queue:
        # Over MMIO each device has a domain of its own; PCI keeps its with the function.
        assert with_disk["irqs"] - without["irqs"] >= 5


def test_a_cpu_that_goes_offline_hands_its_interrupts_on(own: Machine) -> None:
    if own.info["provenance"]["backend"] == "emulated":
        pytest.skip("the CPUs of the emulated guest stay online")
    if own.spec.transport.vector_per_queue:
        own.irqs.spread()
    own.ssh.run("echo 0 > /sys/devices/system/cpu/cpu3/online")
    vectors = own.irqs.vectors()
    assert all(3 not in v.effective for v in vectors)
    for queue in range(3):
        assert load.run(own.ssh, queue, 100).completed == 100
    own.ssh.run("echo 1 > /sys/devices/system/cpu/cpu3/online")
    for queue in load.queue_cpus(own.ssh):
        assert load.run(own.ssh, queue, 100).completed == 100
    log = own.ssh.run("dmesg").stdout
    assert "No irq handler for vector" not in log


def test_moving_under_load_loses_no_interrupt(own: Machine) -> None:
    """A vector that is moved all the time while its queue works completes every request."""
    (vector,) = (v for v in own.irqs.vectors() if v.driver == "virtio_blk" and v.queue in (0, None)
                 and v.source in ("", "req.0"))  # fmt: skip
    own.ssh.run(
        f"(qvis-load /dev/vda 0 5000 > /tmp/moved 2>&1; echo $? >> /tmp/moved) & "
        f"i=0; while ! [ -s /tmp/moved ]; do "
        f"echo $((i % 4)) > /proc/irq/{vector.irq}/smp_affinity_list; i=$((i + 1)); done; "
        f"wait; echo $i > /tmp/moves",
        deadline=120,
    )
    result = own.ssh.run("cat /tmp/moved; cat /tmp/moves").stdout.split("\n")
    assert '"completed": 5000' in result[0]
    assert result[1] == "0"
    assert int(result[2]) > 10


@pytest.mark.parametrize("kind", ["msi", "vis"])
def test_many_queues(boot: Callable[..., Machine], kind: str) -> None:
    """More vectors than fit a 32-bit mask."""
    vm = boot(transport=kind, smp=40, queues=40)
    vectors = [v for v in vm.irqs.vectors() if v.driver == "virtio_blk"]
    assert len(vectors) == 41
    vm.irqs.spread()
    last = next(v for v in vectors if v.queue == 39)
    assert load.run(vm.ssh, 39, 50).completed == 50
    after = next(v for v in vm.irqs.vectors() if v.irq == last.irq)
    assert sum(after.counts.values()) == 50
