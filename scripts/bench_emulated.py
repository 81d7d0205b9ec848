#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast the emulated machine is, on one core; prints JSON.

An interrupt is counted from end to end: a device gives back a buffer that it had taken, asks
whether the driver wants to know; its transport finds vector and message; the message is routed
to a local APIC; a vCPU takes it; the guest's handler looks at the used ring, takes what is
there, and ends the interrupt. With "buffers taken too" the device also takes the buffer that
the handler has made available before.

    scripts/bench_emulated.py                  all of it, in about a minute
    scripts/bench_emulated.py interrupts requests scale
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from qvis.emulated.config import Config, DeviceSpec
from qvis.emulated.devices import Device
from qvis.emulated.guest.kernel import Kernel
from qvis.emulated.guest.tasks import Task, Work
from qvis.emulated.machine import Machine
from qvis.emulated.vcpu import Vcpu
from qvis.emulated.virtqueue import Chain, Virtqueue
from qvis.transport import Transport
from qvis.x86 import Apic, Irqchip, Platform

COUNT = 100_000  # interrupts that are measured at once
ROUNDS = 3  # the best of which counts: others share this host
VECTOR = 0x31
RINGS, RING = 1 << 20, 1 << 14
SIZE = 64  # of a ring
APART = 40_000  # modelled cycles between interrupts of the machine: its vCPUs sleep in between
MSI = 0xFEE00000
TABLE, REGISTERS = 0xC0000000, 0xC000000000  # where the first PCI function's BARs are put


class Disk:
    """The driver of one device's queue 0, whose interrupt goes to ``vcpu``."""

    def __init__(self, machine: Machine, number: int, vcpu: int) -> None:
        attached = machine.devices[f"blk{number}"]
        self.device: Device = attached.device
        self.queue: Virtqueue = attached.device.queues[0]
        self.ring = RINGS + RING * number
        self.words = machine.memory.u16
        self.chain: Chain | None = None
        self.seen = 0
        self.used_at = self.ring + 0x2002 >> 1
        self.available_at = self.ring + 0x1002 >> 1
        self.acknowledge: Callable[[Vcpu], None] | None = None
        address = MSI | (vcpu & 0xFF) << 12 | (vcpu >> 8) << 5
        self._fill(machine)
        if machine.config.transport is Transport.PCI:
            self._start_pci(machine, attached, number, address)
        else:
            self._start_mmio(machine, attached, address)

    def _fill(self, machine: Machine) -> None:
        """All buffers are available, each of one byte."""
        for entry in range(SIZE):
            machine.memory.u64[(self.ring + 16 * entry) >> 3] = self.ring + 0x3000
            machine.memory.u32[(self.ring + 16 * entry + 8) >> 2] = 1
            machine.memory.u16[(self.ring + 16 * entry + 12) >> 1] = 2
            self.words[self.available_at + 1 + entry] = entry
        self.words[self.available_at] = SIZE

    def _start_mmio(self, machine: Machine, attached: Any, address: int) -> None:
        transport, write = machine.config.transport, attached.transport.write
        bits = 1 << 32 | (transport.storage << 48) | ((transport is Transport.MSI) << 49)
        write(0x70, 4, 0)
        write(0x70, 4, 3)
        for half in range(2):
            write(0x24, 4, half)
            write(0x20, 4, bits >> 32 * half & 0xFFFFFFFF)
        write(0x70, 4, 11)
        write(0x38, 4, SIZE)
        for register, part in ((0x80, 0), (0x90, 0x1000), (0xA0, 0x2000)):
            write(register, 4, self.ring + part)
        if transport.storage:
            place = self.ring + 0x3800
            machine.memory.u64[(place + 3 * 128 >> 3) + 1] = VECTOR << 32 | address
            write(0xF0, 4, place)
            write(0xF8, 4, 2 | 1 << 16)
        elif transport is Transport.MSI:
            write(0xD4, 4, 1)
            write(0xE0, 4, address)
            write(0xE8, 4, VECTOR)
            write(0xEC, 4, 1 << 16 | 1 << 18)
            write(0xDC, 4, 0)
        else:
            pin = attached.line - 24
            machine.ioapics[1].write(0, 4, 0x11 + 2 * pin)
            machine.ioapics[1].write(0x10, 4, address << 12 & 0xFF000000)
            machine.ioapics[1].write(0, 4, 0x10 + 2 * pin)
            machine.ioapics[1].write(0x10, 4, VECTOR | 1 << 15)
            start = attached.start

            def acknowledge(vcpu: Vcpu) -> None:
                vcpu.write(start + 0x64, 4, vcpu.read(start + 0x60, 4))

            self.acknowledge = acknowledge
        write(0x44, 4, 1)
        write(0x70, 4, 15)

    def _start_pci(self, machine: Machine, attached: Any, number: int, address: int) -> None:
        write = machine.vcpus[0].write
        table, common = TABLE + 0x1000 * number, REGISTERS + 0x4000 * number
        write(attached.start + 0x14, 4, table)
        write(attached.start + 0x20, 4, common & 0xFFFFFFFF)
        write(attached.start + 0x24, 4, common >> 32)
        write(attached.start + 0x04, 2, 6)
        at = machine.vcpus[0].read(attached.start + 0x34, 1)
        while machine.vcpus[0].read(attached.start + at, 1) != 0x11:
            at = machine.vcpus[0].read(attached.start + at + 1, 1)
        write(attached.start + at + 2, 2, 0x8000)
        for offset, value in enumerate((address, 0, VECTOR, 0)):
            write(table + 4 * offset, 4, value)
        for status in (0, 3):
            write(common + 0x14, 1, status)
        for half in range(2):
            write(common + 8, 4, half)
            write(common + 12, 4, half)  # VERSION_1 only
        write(common + 0x14, 1, 11)
        write(common + 0x16, 2, 0)
        write(common + 0x18, 2, SIZE)
        write(common + 0x1A, 2, 0)
        for register, part in ((0x20, 0), (0x28, 0x1000), (0x30, 0x2000)):
            write(common + register, 4, self.ring + part)
        write(common + 0x1C, 2, 1)
        write(common + 0x14, 1, 15)


class Driver:
    """A guest whose interrupts are all of disks, one for each vCPU."""

    def __init__(self, disks: list[Disk]) -> None:
        self.disks = disks
        self.done = 0

    def interrupt(self, vcpu: Vcpu, vector: int) -> None:
        disk = self.disks[vcpu.index]
        if disk.acknowledge is not None:
            disk.acknowledge(vcpu)
        words = disk.words
        vcpu.enter("vring_interrupt", 57)
        used = words[disk.used_at]
        new = used - disk.seen & 0xFFFF
        disk.seen = used
        words[disk.available_at] = words[disk.available_at] + new & 0xFFFF
        self.done += new
        vcpu.eoi()

    def reset(self) -> None:
        """Never."""


def started(
    smp: int, transport: Transport, platform: Platform, *, devices: int = 0
) -> tuple[Machine, Driver]:
    """A machine with a device and a driver for each vCPU."""
    devices = devices or smp
    specs = tuple(DeviceSpec("blk", f"blk{n}") for n in range(devices))
    machine = Machine(
        Config(transport=transport, smp=smp, memory=64, platform=platform, devices=specs)
    )
    x2apic = platform.apic is Apic.X2APIC
    for vcpu in machine.vcpus:
        if x2apic:
            vcpu.wrmsr(0x1B, vcpu.rdmsr(0x1B) | 1 << 10)
            vcpu.wrmsr(0x80F, 0x1FF)
        else:
            vcpu.write(0xFEE000F0, 4, 0x1FF)
    driver = Driver([Disk(machine, n, n % smp) for n in range(devices)])
    machine.guest = driver
    return machine, driver


def offer(machine: Machine, driver: Driver, count: int, *, take: bool) -> None:
    """Have the devices complete ``count`` buffers in turn."""
    disks, left, after = driver.disks, count, machine.events.after
    for disk in disks:
        disk.chain = disk.chain or disk.queue.pop()

    def complete(number: int) -> None:
        nonlocal left
        disk = disks[number]
        if take:
            disk.chain = disk.queue.pop()
        assert disk.chain is not None
        disk.device.complete(disk.queue, disk.chain, 1)
        left -= 1
        if left:
            after(APART, complete, (number + 1) % len(disks))

    after(APART, complete, 0)


def measure(machine: Machine, driver: Driver, count: int, *, take: bool = False) -> float:
    """Interrupts a second of one core's time."""
    best = 0.0
    for _ in range(ROUNDS):
        before = driver.done
        offer(machine, driver, count, take=take)
        begin = process_time()
        while machine.run_slice(10):
            pass
        spent = process_time() - begin
        if driver.done - before != count:
            raise SystemExit(f"{driver.done - before} of {count} interrupts came")
        best = max(best, count / spent)
    return best


def interrupts() -> dict[str, Any]:
    """By number of vCPUs, transport, platform; and with a recorder."""
    found: dict[str, Any] = {}
    usual = Platform()
    for smp in (1, 4, 16, 64, 256):
        machine, driver = started(smp, Transport.MSI, usual)
        found[f"{smp} vCPUs"] = measure(machine, driver, COUNT)
    machine, driver = started(4, Transport.MSI, usual)
    found["buffers taken too"] = measure(machine, driver, COUNT, take=True)
    for transport in Transport:
        machine, driver = started(4, transport, usual)
        found[str(transport)] = measure(machine, driver, COUNT)
    for name, platform in {
        "xapic": Platform(apic=Apic.XAPIC),
        "apicv": Platform(apicv=True),
        "irqchip off": Platform(irqchip=Irqchip.OFF, apic=Apic.XAPIC),
    }.items():
        machine, driver = started(4, Transport.VIS, platform)
        found[name] = measure(machine, driver, COUNT)
    with tempfile.TemporaryDirectory() as folder:
        machine, driver = started(4, Transport.VIS, usual)
        machine.record(Path(folder))
        found["recorded"] = measure(machine, driver, COUNT)
        counts = machine.stop_recording()
        found["rows an interrupt"] = counts.recorded / COUNT / ROUNDS
        if counts.dropped:
            raise SystemExit(f"{counts.dropped} rows were dropped")
    return {name: round(rate, 1) for name, rate in found.items()}


def requests() -> dict[str, Any]:
    """Requests a second through the guest's own kernel: its driver, its tasks, its interrupts."""
    found = {}
    for transport in Transport:
        specs = (DeviceSpec("blk", "blk0", 4),)
        machine = Machine(Config(transport=transport, smp=4, memory=64, devices=specs))
        kernel = Kernel(machine)
        machine.guest = kernel
        kernel.boot(lambda: None)
        while machine.run_slice(10):
            pass
        tasks: list[Task] = []

        def work(kernel: Kernel, tasks: list[Task]) -> Work:
            for _ in range(COUNT // 10):
                yield from kernel.disks["vda"].serial(tasks[0])
            return 0

        tasks.append(kernel.spawn(work(kernel, tasks), cpu=1))
        begin = process_time()
        while machine.run_slice(10):
            pass
        found[str(transport)] = round(COUNT / 10 / (process_time() - begin))
    return found


def scale() -> dict[str, Any]:
    """A thousand vCPUs and as many devices."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = perf_counter()
    machine, driver = started(1024, Transport.VIS, Platform())
    made = perf_counter() - begin
    rate = measure(machine, driver, COUNT)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"made in seconds": round(made, 2), "interrupts": round(rate), "MiB": used >> 10}


BENCHES = {"interrupts": interrupts, "requests": requests, "scale": scale}


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in BENCHES]:
        print(f"unknown bench {unknown[0]!r}: there is {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    print(json.dumps({name: BENCHES[name]() for name in names or BENCHES}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
