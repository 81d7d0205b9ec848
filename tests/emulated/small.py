# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines with as little as a test needs: a guest of a few lines, a driver of one queue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qvis.emulated.config import Config, DeviceSpec
from qvis.emulated.machine import Machine
from qvis.emulated.vcpu import Vcpu
from qvis.transport import Transport
from qvis.x86 import Apic, Irqchip, Platform

X2APIC = Platform(Irqchip.SPLIT, Apic.X2APIC)
XAPIC = Platform(Irqchip.SPLIT, Apic.XAPIC)
LAPIC = 0xFEE00000
RINGS = 0x100000
GET_ID = 8


class Taker:
    """A guest that writes down what it takes, ends it, and does what ``then`` says before."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, int]] = []  # vCPU, vector
        self.times: list[int] = []
        self.resets = 0
        self.then: Callable[[Vcpu, int], None] = lambda vcpu, vector: None

    def interrupt(self, vcpu: Vcpu, vector: int) -> None:
        self.taken.append((vcpu.index, vector))
        self.times.append(vcpu.clock)
        self.then(vcpu, vector)
        vcpu.eoi()

    def reset(self) -> None:
        self.resets += 1


def make(platform: Platform = X2APIC, **more: object) -> tuple[Machine, Taker]:
    """A machine whose local APICs are on, in the platform's mode, and its guest."""
    config = replace(Config(memory=16, platform=platform), **more)  # type: ignore[arg-type]
    machine = Machine(config)
    guest = machine.guest = Taker()
    for vcpu in machine.vcpus:
        switch_on(vcpu, platform)
    for exit_ in machine.rules.exits:
        exit_.count = 0
    return machine, guest


def switch_on(vcpu: Vcpu, platform: Platform) -> None:
    """Enable the local APIC."""
    if platform.apic is Apic.X2APIC:
        vcpu.wrmsr(0x1B, vcpu.rdmsr(0x1B) | 1 << 10)
        vcpu.wrmsr(0x80F, 0x1FF)
    else:
        vcpu.write(LAPIC + 0xF0, 4, 0x1FF)


def message(vcpu: int, vector: int) -> tuple[int, int]:
    """Address and data of the MSI that is ``vector`` for a vCPU."""
    return LAPIC | (vcpu & 0xFF) << 12 | (vcpu >> 8) << 5, vector


def send(machine: Machine, address: int, data: int) -> None:
    """Have a device write a message."""
    machine.bus.msi(address, data)


def exits(machine: Machine) -> dict[str, int]:
    """How often which exit happened."""
    return {exit_.name: exit_.count for exit_ in machine.rules.exits if exit_.count}


def finish(machine: Machine) -> None:
    """Run until nothing is left to do."""
    while machine.events.run(10_000):
        pass


class Driver:
    """Queue 0 of a virtio-mmio disk, with a message to vCPU ``vcpu``, driven from vCPU 0.

    Set up without a vCPU, so that nothing of it is counted.
    """

    def __init__(self, machine: Machine, id: str = "blk0", vcpu: int = 0, vector: int = 0x31):
        self.machine = machine
        attached = machine.devices[id]
        self.start = attached.start
        self.used = 0
        self.write = write = attached.transport.write
        write(0x70, 4, 0)
        write(0x70, 4, 3)
        transport = machine.config.transport
        bits = 1 << 32
        if transport.storage:
            bits |= 1 << 48
        elif transport.vector_per_queue:
            bits |= 1 << 49
        for half in range(2):
            write(0x24, 4, half)
            write(0x20, 4, bits >> 32 * half & 0xFFFFFFFF)
        write(0x70, 4, 11)
        self.ring = RINGS + 0x4000 * list(machine.devices).index(id)
        write(0x30, 4, 0)
        write(0x38, 4, 64)
        for register, address in ((0x80, 0), (0x90, 0x1000), (0xA0, 0x2000)):
            write(register, 4, self.ring + address)
            write(register + 4, 4, 0)
        address, data = message(vcpu, vector)
        if transport.storage:
            self.storage(address, data)
        elif transport.vector_per_queue:
            write(0xD4, 4, 1)
            for register, value in ((0xE0, address), (0xE4, 0), (0xE8, data)):
                write(register, 4, value)
            write(0xEC, 4, 0 | 1 << 16 | 1 << 18)
            write(0xDC, 4, 0)
        write(0x44, 4, 1)
        write(0x70, 4, 15)
        memory = machine.memory
        header, buffer, status = self.ring + 0x3000, self.ring + 0x3100, self.ring + 0x3200
        memory.u32[header >> 2] = GET_ID
        for n, (at, size, flags) in enumerate(((header, 16, 1), (buffer, 20, 3), (status, 1, 2))):
            memory.u64[(self.ring + 16 * n) >> 3] = at
            memory.u32[(self.ring + 16 * n + 8) >> 2] = size
            memory.u16[(self.ring + 16 * n + 12) >> 1] = flags
            memory.u16[(self.ring + 16 * n + 14) >> 1] = n + 1

    def storage(self, address: int, data: int) -> None:
        """Enable interrupt storage of two vectors, the second unmasked and for this message."""
        place = self.ring + 0x3800
        memory = self.machine.memory
        memory.u8[place] = 1
        memory.u64[(place + 3 * 128 >> 3) + 1] = data << 32 | address
        self.write(0xF0, 4, place)
        self.write(0xF8, 4, 2 | 1 << 16)

    def submit(self, vcpu: Vcpu) -> None:
        """Put a request into the ring, and notify."""
        available = self.ring + 0x1000 >> 1
        index = vcpu.read(available + 1 << 1, 2)
        vcpu.write(available + 2 + index % 64 << 1, 2, 0)
        vcpu.write(available + 1 << 1, 2, index + 1 & 0xFFFF)
        vcpu.write(self.start + 0x50, 4, 0)

    def done(self) -> int:
        """How many requests the device has given back."""
        return self.machine.memory.u16[(self.ring + 0x2002) >> 1]


def disks(count: int) -> tuple[DeviceSpec, ...]:
    """So many disks."""
    return tuple(DeviceSpec("blk", f"blk{n}") for n in range(count))


def with_disk(
    transport: Transport = Transport.MSI, platform: Platform = X2APIC, **more: object
) -> tuple[Machine, Taker, Driver]:
    """A machine with a disk that is driven."""
    machine, guest = make(platform, transport=transport, devices=disks(1), **more)
    return machine, guest, Driver(machine)
