# SPDX-License-Identifier: GPL-2.0-or-later
"""A vector masked while its queue completes I/O is delivered once it is unmasked.

The mask is set behind the driver's back, through /dev/mem, so that what is
seen is the device's mask and pending bit and nothing that the kernel keeps. Over
VIS it is the driver that makes a pending interrupt happen when it unmasks, so there
it is the driver's chip that is told to, and its memory that is looked at.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

import qvis
from qvis.guest import load
from qvis.guest.interrupts import Vector
from qvis.machine.machine import Machine
from tests.conftest import EVERY_TRANSPORT
from tests.guest.storage import shown

pytestmark = EVERY_TRANSPORT

# docs/virtio-interrupts.md
MSI_VECTOR = 0x0EC
MASK, UNMASK = 1 << 17, 1 << 18
MASKED, PENDING = 1 << 17, 1 << 19

# PCI 3.0, 6.8.2: entries of 16 bytes, the last word's bit 0 masks
ENTRY_SIZE, VECTOR_CONTROL = 16, 12


@dataclass(frozen=True)
class Bits:
    """Commands that work on one vector's mask and pending bit in the guest."""

    mask: str
    unmask: str
    masked: Callable[[], bool]
    pending: Callable[[], bool]


def devmem(vm: Machine, address: int) -> int:
    return int(vm.ssh.run(f"devmem {address:#x} 32").stdout, 16)


def msi_bits(vm: Machine, vector: Vector, index: int) -> Bits:
    """The vector's command and state register of a virtio-mmio device."""
    path = vm.ssh.run(f"readlink -f /sys/bus/virtio/devices/{vector.device}/..").stdout.strip()
    listing = vm.ssh.run(f"cat {path}/resource /proc/iomem 2>/dev/null; echo {path}").stdout
    name = path.rsplit("/", 1)[1]
    region = re.search(rf"([0-9a-f]+)-[0-9a-f]+ : {re.escape(name)}", listing)
    assert region, f"no region of {name} in:\n{listing}"
    register = int(region[1], 16) + MSI_VECTOR

    def state() -> int:
        vm.ssh.run(f"devmem {register:#x} 32 {index:#x}")  # selects, and no more
        return devmem(vm, register)

    return Bits(
        mask=f"devmem {register:#x} 32 {MASK | index:#x}",
        unmask=f"devmem {register:#x} 32 {UNMASK | index:#x}",
        masked=lambda: bool(state() & MASKED),
        pending=lambda: bool(state() & PENDING),
    )


def pci_bits(vm: Machine, vector: Vector, index: int) -> Bits:
    """The entry and pending bit of a PCI function's MSI-X table."""
    path = vm.ssh.run(f"readlink -f /sys/bus/virtio/devices/{vector.device}/..").stdout.strip()
    space = bytes.fromhex(vm.ssh.run(f"hexdump -v -e '1/1 \"%02x\"' {path}/config").stdout.strip())
    at = space[0x34]
    while at and space[at] != 0x11:  # the MSI-X capability
        at = space[at + 1]
    assert at, "no MSI-X capability"
    regions = vm.ssh.run(f"cat {path}/resource").stdout.splitlines()
    bars = [int(line.split()[0], 16) for line in regions]
    table, pba = (int.from_bytes(space[at + n : at + n + 4], "little") for n in (4, 8))
    control = bars[table & 7] + (table & ~7) + ENTRY_SIZE * index + VECTOR_CONTROL
    pending = bars[pba & 7] + (pba & ~7) + 4 * (index // 32)
    return Bits(
        mask=f"devmem {control:#x} 32 1",
        unmask=f"devmem {control:#x} 32 0",
        masked=lambda: bool(devmem(vm, control) & 1),
        pending=lambda: bool(devmem(vm, pending) >> (index % 32) & 1),
    )


def vis_bits(vm: Machine, vector: Vector, index: int) -> Bits:
    """The chip's mask by way of the kernel's debugfs, and the driver's view of its storage."""
    file = f"/sys/kernel/debug/irq/irqs/{vector.irq}"
    return Bits(
        mask=f"echo mask > {file}",
        unmask=f"echo unmask > {file}",
        masked=lambda: shown(vm, vector.device).rows[index].masked,
        pending=lambda: shown(vm, vector.device).rows[index].pending,
    )


def bits_of(vm: Machine, vector: Vector) -> Bits:
    """The bits of a queue's vector, whatever the transport."""
    make = msi_bits
    if vm.spec.transport is qvis.Transport.PCI:
        make = pci_bits
    elif vm.spec.transport.storage:
        make = vis_bits
    # Each driver gives configuration vector 0 and queue n vector n + 1.
    assert vector.queue is not None
    return make(vm, vector, vector.queue + 1)


@pytest.fixture
def queue1(vm: Machine) -> Iterator[tuple[Vector, Bits]]:
    """The vector of queue 1 on CPU 2, and its bits; unmasked afterwards."""
    if not vm.spec.transport.vector_per_queue:
        pytest.skip("a line has no mask of its own in the device")
    vector = next(v for v in vm.irqs.vectors() if v.queue == 1)
    vm.irqs.set_affinity(vector.irq, "2")
    load.run(vm.ssh, 1, 1)  # MSI-X moves with the next interrupt only
    bits = bits_of(vm, vector)
    yield vector, bits
    vm.ssh.run(bits.unmask, check=False)  # the kernel refuses if it is unmasked already


def count(vm: Machine, irq: int) -> dict[int, int]:
    return next(v for v in vm.irqs.vectors() if v.irq == irq).counts


def start_read(vm: Machine) -> None:
    """One read through queue 1, which cannot end before its interrupt came."""
    cpu = min(load.queue_cpus(vm.ssh)[1])
    vm.ssh.run(
        f"rm -f /tmp/read; (qvis-load /dev/vda {cpu} 1; echo status $? > /tmp/read) "
        "> /dev/null 2>&1 &"
    )


def becomes(state: Callable[[], bool], wait: float = 20.0) -> bool:
    end = time.monotonic() + wait
    while not state():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def read_ended(vm: Machine, wait: float) -> bool:
    end = time.monotonic() + wait
    while time.monotonic() < end:
        if "status 0" in vm.ssh.run("cat /tmp/read", check=False).stdout:
            return True
        time.sleep(0.05)
    return False


def test_masked_interrupt_is_pending_and_delivered_after_unmask(
    vm: Machine, queue1: tuple[Vector, Bits]
) -> None:
    vector, bits = queue1
    before = count(vm, vector.irq)
    vm.ssh.run(bits.mask)
    assert bits.masked()
    assert not bits.pending()

    start_read(vm)
    assert becomes(bits.pending), "the read has not got as far as its interrupt"
    assert not read_ended(vm, 0.5), "an interrupt came through the mask"
    assert count(vm, vector.irq) == before

    vm.ssh.run(bits.unmask)
    assert read_ended(vm, 20.0), "the pending interrupt was lost"
    assert not bits.pending()
    assert not bits.masked()
    after = count(vm, vector.irq)
    assert {cpu: after[cpu] - before[cpu] for cpu in after} == {0: 0, 1: 0, 2: 1, 3: 0}


def test_unmask_without_an_interrupt_delivers_none(
    vm: Machine, queue1: tuple[Vector, Bits]
) -> None:
    vector, bits = queue1
    before = count(vm, vector.irq)
    for _ in range(10):
        vm.ssh.run(f"{bits.mask}; {bits.unmask}")
    assert count(vm, vector.irq) == before


def test_moved_while_masked_and_pending(vm: Machine, queue1: tuple[Vector, Bits]) -> None:
    """A pending interrupt takes the message that the vector has when it is unmasked."""
    vector, bits = queue1
    before = count(vm, vector.irq)
    vm.ssh.run(bits.mask)
    start_read(vm)
    assert becomes(bits.pending)
    vm.irqs.set_affinity(vector.irq, "3")
    vm.ssh.run(bits.unmask)
    assert read_ended(vm, 20.0)
    after = count(vm, vector.irq)
    arrived = {cpu: after[cpu] - before[cpu] for cpu in after if after[cpu] != before[cpu]}
    # MSI-X takes the old message once more: that interrupt is what moves it.
    assert arrived == {2 if vm.spec.transport is qvis.Transport.PCI else 3: 1}
    vm.irqs.set_affinity(vector.irq, "2")
