# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's /proc, /sys and debugfs: what qvis reads there, and what writing does."""

from __future__ import annotations

import pytest

from qvis.errors import GuestError, UsageError
from qvis.experiments.operations import _BIND, _UNBIND
from qvis.guest import load
from qvis.guest.interrupts import Interrupts
from qvis.trace.guest import DEVICE, INTERRUPTS
from qvis.transport import Transport

from .userland import Guest


@pytest.fixture(scope="module", params=list(Transport))
def guest(request: pytest.FixtureRequest) -> Guest:
    return Guest(request.param)


def _transport(guest: Guest) -> Transport:
    return guest.machine.config.transport


def test_interrupts_as_qvis_reads_them(guest: Guest) -> None:
    vectors = [v for v in Interrupts(guest).vectors() if v.driver == "virtio_blk"]
    if not _transport(guest).vector_per_queue:
        (line,) = vectors
        assert (line.source, line.chip.split()[0]) == ("", "IO-APIC")
        return
    assert [v.source for v in vectors] == ["config", "req.0", "req.1", "req.2", "req.3"]
    chips = {"pci": "PCI-MSIX-", "msi": "MMIO-MSI-LNRO0005:"}
    assert all(v.chip.startswith(chips.get(_transport(guest), "MMIO-VIS-LNRO")) for v in vectors)
    assert [v.effective for v in vectors[1:]] == [frozenset({n}) for n in range(4)]


def test_moving_and_spreading(guest: Guest) -> None:
    irqs = Interrupts(guest)
    vector = next(v for v in irqs.vectors() if v.driver == "virtio_blk" and v.source != "config")
    moved = irqs.set_affinity(vector.irq, "2")
    assert moved.affinity == {2}
    load.run(guest, vector.queue or 0, 2)
    assert next(v for v in irqs.vectors() if v.irq == vector.irq).effective == {2}
    with pytest.raises(UsageError, match="no such CPU in the guest: 4"):
        irqs.set_affinity(vector.irq, "4")
    if _transport(guest).vector_per_queue:
        guest.run("usleep 30000")
        spread = {v.source: v.affinity for v in irqs.spread() if v.driver == "virtio_blk"}
        assert spread["req.3"] == {3}
    else:
        with pytest.raises(UsageError, match="one interrupt line"):
            irqs.spread()


def test_load_through_each_queue(guest: Guest) -> None:
    assert load.queue_cpus(guest) == {n: frozenset({n}) for n in range(4)}
    for queue in range(4):
        assert load.run(guest, queue, 20).completed == 20


def test_what_a_trace_asks(guest: Guest) -> None:
    said = guest.run(INTERRUPTS).stdout
    found = {virtio: parent for virtio, parent, _ in DEVICE.findall(said)}
    pci = _transport(guest) is Transport.PCI
    assert found == {
        f"virtio{n}": f"0000:00:{n + 1:02x}.0" if pci else f"LNRO0005:{n:02x}" for n in range(3)
    }
    for attached in guest.machine.devices.values():
        if not pci:
            assert f"{attached.start:08x}-{attached.end - 1:08x} : LNRO0005:" in said


def test_debugfs_says_which_vector(guest: Guest) -> None:
    for vector in Interrupts(guest).vectors():
        said = guest.run(f"cat /sys/kernel/debug/irq/irqs/{vector.irq}").stdout
        desc = guest.kernel.irqs.descs[vector.irq]
        assert f"     Vector: {desc.vector:5}\n     Target: {desc.cpu:5}\n" in said


def test_mask_and_unmask_are_refused_twice(guest: Guest) -> None:
    vector = next(v for v in Interrupts(guest).vectors() if v.queue in (1, None))
    file = f"/sys/kernel/debug/irq/irqs/{vector.irq}"
    guest.run(f"echo mask > {file} && echo unmask > {file}")
    done = guest.run(f"echo unmask > {file}", check=False)
    assert (done.status, done.stderr) == (1, "sh: write error: Device or resource busy\n")


def test_a_masked_interrupt_waits(guest: Guest) -> None:
    if not _transport(guest).vector_per_queue:
        pytest.skip("a mask of the line is the kernel's only")
    vector = next(v for v in Interrupts(guest).vectors() if v.queue == 1)
    file = f"/sys/kernel/debug/irq/irqs/{vector.irq}"
    guest.run(f"echo mask > {file}")
    process, _, _ = guest.start("qvis-load /dev/vda 1 1")
    guest.run("sleep 1")
    assert process.status is None
    guest.run(f"echo unmask > {file}")
    guest.until(lambda: process.status is not None)
    assert process.status == 0


def test_rebinding_drivers_leaks_nothing(guest: Guest) -> None:
    count = "ls /sys/kernel/debug/irq/irqs /sys/kernel/debug/irq/domains | wc -l"
    before = guest.run(count).stdout
    device = next(v.device for v in Interrupts(guest).vectors() if v.driver == "virtio_blk")
    place = "/sys/bus/virtio/drivers/virtio_blk"
    for _ in range(3):
        guest.run(_UNBIND.format(device=device))
        assert guest.run(f"ls /sys/block; ls {place}").stdout == "bind\nuevent\nunbind\n"
        guest.run(_BIND)
        guest.run(f"echo {device} > {place}/unbind && echo {device} > {place}/bind")
    assert guest.run(count).stdout == before
    assert load.run(guest, 3, 10).completed == 10


REFUSED = [
    ("echo x > /proc/irq/{irq}/smp_affinity_list", "Invalid argument"),
    ("echo 99 > /proc/irq/{irq}/smp_affinity_list", "Numerical result out of range"),
    ("echo zz > /proc/irq/{irq}/smp_affinity", "Invalid argument"),
    ("echo 3 > /proc/interrupts", "Input/output error"),
    ("echo virtio9 > /sys/bus/virtio/drivers/virtio_blk/unbind", "No such device"),
    ("echo virtio9 > /sys/bus/virtio/drivers/virtio_blk/bind", "No such device"),
    ("echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/bind", "Device or resource busy"),
    ("echo nope > /sys/bus/platform/drivers/virtio-mmio/bind", "No such device"),
]


@pytest.mark.parametrize(("command", "said"), REFUSED)
def test_what_the_kernel_refuses(guest: Guest, command: str, said: str) -> None:
    irq = next(v.irq for v in Interrupts(guest).vectors() if v.driver == "virtio_blk")
    done = guest.run(command.format(irq=irq), check=False)
    assert (done.status, done.stderr) == (1, f"sh: write error: {said}\n")


def test_masks_are_shown_and_taken_in_words(guest: Guest) -> None:
    irq = next(v.irq for v in Interrupts(guest).vectors() if v.driver == "virtio_net")
    folder = f"/proc/irq/{irq}"
    guest.run(f"echo 5 > {folder}/smp_affinity")
    assert guest.run(f"cat {folder}/smp_affinity {folder}/smp_affinity_list").stdout == "5\n0,2\n"


def test_unknown_interrupts_are_not_there(guest: Guest) -> None:
    done = guest.run("echo 1 > /proc/irq/999/smp_affinity_list", check=False)
    assert done.stderr.endswith("nonexistent directory\n")
    with pytest.raises((GuestError, UsageError)):
        Interrupts(guest).set_affinity(999, "0")


def test_storage_is_shown_as_it_is(guest: Guest) -> None:
    device = next(v.device for v in Interrupts(guest).vectors() if v.driver == "virtio_blk")
    done = guest.run(f"cat /sys/kernel/debug/virtio/{device}/vis", check=False)
    assert (done.status == 0) == _transport(guest).storage
    if _transport(guest).storage:
        head, *rows = done.stdout.splitlines()
        assert head.startswith("storage 0x")
        assert head.endswith(" vectors 5")
        assert [row.split(":")[0] for row in rows] == ["0", "1", "2", "3", "4"]


def test_the_machine_as_programs_see_it(guest: Guest) -> None:
    run = guest.run
    assert run("cat /sys/devices/system/cpu/online /sys/block/vda/size").stdout == "0-3\n2097152\n"
    assert run("grep -c ^processor /proc/cpuinfo").stdout == "4\n"
    assert run("cat /sys/class/net/eth0/carrier /sys/class/net/eth0/operstate").stdout == "1\nup\n"
    meminfo = run("cat /proc/meminfo").stdout
    assert all(f"{name}:" in meminfo for name in ("MemTotal", "MemAvailable", "Slab"))
    assert float(run("cat /proc/uptime").stdout.split()[0]) > 0
    run("ifconfig eth0 down; sleep 0.1; ifconfig eth0 up")


def test_every_file_can_be_read(guest: Guest) -> None:
    """None that takes the program or the kernel down; those that are only written say EIO."""
    found = "find /proc -maxdepth 1 -type f; find /proc/irq /proc/sys /sys /etc -type f"
    done = guest.run(f"({found}) | xargs cat > /dev/null", check=False)
    said = {line.rpartition(": ")[2] for line in done.stderr.splitlines()}
    assert said <= {"Input/output error", "Operation not permitted"}
