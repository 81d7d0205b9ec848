# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine: what is where, and what one does to it from outside."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvis.emulated.config import Config, DeviceSpec
from qvis.emulated.costs import Reason
from qvis.emulated.machine import Attached, Machine
from qvis.emulated.places import ECAM
from qvis.emulated.vcpu import Vcpu
from qvis.errors import UsageError
from qvis.transport import Transport
from qvis.x86 import Apic, Irqchip, Platform

from .small import X2APIC, XAPIC, Driver, disks, exits, finish, make, message, with_disk


def events_of(machine: Machine) -> list[tuple[str, dict[str, Any]]]:
    """What the machine tells from now on."""
    told: list[tuple[str, dict[str, Any]]] = []
    machine.on_event.append(lambda name, data: told.append((name, data)))
    return told


def test_the_first_device_is_in_qemus_last_slot_and_the_next_below() -> None:
    machine, _ = make(devices=disks(3))
    found = [(a.slot, a.start, a.line) for a in machine.devices.values()]
    assert found == [
        (23, 0xFEB02E00, 47), (22, 0xFEB02C00, 46), (21, 0xFEB02A00, 45),
    ]  # fmt: skip


def test_devices_beyond_qemus_slots_go_on_behind_them_and_share_lines() -> None:
    machine, _ = make(devices=disks(50))
    last = machine.devices["blk49"]
    assert (last.slot, last.start, last.line) == (49, 0xFEB00000 + 49 * 512, 24 + 1)
    assert machine.vcpus[0].read(last.start, 4) == 0x74726976


def test_an_empty_slot_says_that_it_is_one() -> None:
    machine, _ = make()
    assert machine.vcpus[0].read(0xFEB00000, 4) == 0x74726976
    assert machine.vcpus[0].read(0xFEB00008, 4) == 0


def test_an_access_of_eight_bytes_reaches_a_device_as_two_of_four() -> None:
    machine, _, driver = with_disk()
    vcpu = machine.vcpus[0]
    assert vcpu.read(driver.start, 8) == 2 << 32 | 0x74726976
    assert vcpu.read(driver.start + 0x101, 8) == vcpu.read(driver.start + 0x101, 4) | (
        vcpu.read(driver.start + 0x105, 4) << 32
    )
    assert exits(machine) == {"EPT_MISCONFIG/user": 4}


def test_a_line_is_held_as_long_as_one_of_its_devices_holds_it() -> None:
    machine, guest = make(XAPIC, transport=Transport.INTX, devices=disks(26))
    first, shared = machine.devices["blk23"], machine.devices["blk24"]
    assert first.line == shared.line
    ioapic = machine.ioapics[1]
    pin = first.line - 24
    ioapic.write(0, 4, 0x10 + 2 * pin)
    ioapic.write(0x10, 4, 0x31 | 1 << 15)
    drivers = [Driver(machine, a.id) for a in (first, shared)]

    def end_one(vcpu: Vcpu, vector: int) -> None:
        driver = drivers[len(guest.taken) - 1]
        vcpu.write(driver.start + 0x64, 4, vcpu.read(driver.start + 0x60, 4))

    guest.then = end_one
    for driver in drivers:
        machine.vcpus[0].call(driver.submit, machine.vcpus[0])
    finish(machine)
    assert len(guest.taken) == 2


def pci_disk(platform: Platform = X2APIC, **more: object) -> tuple[Machine, Attached, int, int]:
    """A machine with a PCI disk whose BARs are mapped; table and registers of it."""
    machine, _ = make(platform, transport=Transport.PCI, devices=disks(1), **more)
    attached = machine.devices["blk0"]
    vcpu, table, registers = machine.vcpus[0], 0xC0000000, 0xC000000000
    vcpu.write(attached.start + 0x14, 4, table)
    vcpu.write(attached.start + 0x20, 4, registers & 0xFFFFFFFF)
    vcpu.write(attached.start + 0x24, 4, registers >> 32)
    vcpu.write(attached.start + 0x04, 2, 6)
    return machine, attached, table, registers


def test_a_pci_function_is_found_and_its_registers_are_where_they_were_put() -> None:
    machine, attached, table, registers = pci_disk()
    vcpu = machine.vcpus[0]
    assert attached.start == ECAM + 0x8000
    assert vcpu.read(attached.start, 4) == 0x10011AF4
    assert vcpu.read(ECAM + 0x10000, 4) == 0xFFFFFFFF  # no function
    assert vcpu.read(registers + 0x12, 2) == 1  # num_queues
    assert vcpu.read(table + 12, 4) == 1  # masked
    assert vcpu.read(0xC0100000, 4) == 0xFFFFFFFF  # the window, with nothing in it
    assert set(exits(machine)) == {"EPT_MISCONFIG/user"}


def test_a_pci_function_that_moves_is_not_found_where_it_was() -> None:
    machine, attached, _, registers = pci_disk()
    vcpu = machine.vcpus[0]
    assert vcpu.read(registers + 0x12, 2) == 1
    vcpu.write(attached.start + 0x24, 4, 0xC1)
    assert vcpu.read(registers + 0x12, 2) == 0xFFFF
    assert vcpu.read(0xC100000000 + 0x12, 2) == 1
    vcpu.write(attached.start + 0x04, 2, 0)
    assert vcpu.read(0xC100000000 + 0x12, 2) == 0xFFFF


@pytest.mark.parametrize(
    ("at_once", "reason"), [(False, "EPT_MISCONFIG/fast"), (True, "EPT_MISCONFIG/user")]
)
def test_a_pci_notification_is_told_by_its_address(at_once: bool, reason: str) -> None:
    machine, _, _, registers = pci_disk(at_once=at_once)
    before = exits(machine).get(reason, 0)
    machine.vcpus[0].write(registers + 0x3000, 2, 0)
    assert exits(machine)[reason] == before + 1


def test_pci_functions_on_top_of_each_other_can_be_taken_apart_again() -> None:
    machine, _, _, registers = pci_disk()
    vcpu = machine.vcpus[0]
    other = machine.plug(DeviceSpec("rng", "random7"))
    vcpu.write(other.start + 0x20, 4, 0x4000)
    vcpu.write(other.start + 0x24, 4, 0xC0)
    vcpu.write(other.start + 0x04, 2, 6)
    for offset in range(0, 0x4000, 0x800):
        vcpu.read(registers + offset, 1)
        vcpu.read(registers + 0x4000 + offset, 1)
    vcpu.write(other.start + 0x20, 4, 0)  # where the disk's are
    for offset in range(0, 0x4000, 0x200):
        vcpu.read(registers + offset, 1)
    machine.unplug("blk0")
    assert vcpu.read(registers + 0x14, 1) == 0  # the other's status
    machine.unplug("random7")
    assert vcpu.read(registers + 0x14, 1) == 0xFF
    assert vcpu.read(registers + 0x3000, 1) == 0xFF


def test_without_pci_its_addresses_are_nobodys() -> None:
    machine, _ = make()
    assert machine.vcpus[0].read(ECAM, 4) == 0


def test_regions_are_qemus() -> None:
    machine, _, _, _ = pci_disk(replace(X2APIC, irqchip=Irqchip.ON))
    regions = {(name, owner): (space, start, end) for name, owner, space, start, end in
               machine.regions()}  # fmt: skip
    assert regions["kvm-apic-msi", "path=/machine/unattached/device[0]/lapic"] == (
        "memory", 0xFEE00000, 0xFEF00000,
    )  # fmt: skip
    assert regions["kvm-ioapic", "path=/machine/ioapic"] == ("memory", 0xFEC00000, 0xFEC01000)
    assert regions["virtio-pci-notify-virtio-blk", "id=blk0"] == (
        "memory", 0xC000003000, 0xC000004000,
    )  # fmt: skip
    assert regions["msix-table", "id=blk0"][1] == 0xC0000000
    starts = [(space, start) for _, _, space, start, _ in machine.regions()]
    assert starts == sorted(starts)
    ends = [(space, start, end) for _, _, space, start, end in machine.regions()]
    for (space, _, end), (other, start, _) in pairwise(ends):
        assert space != other or end <= start


def test_nothing_happens_while_it_is_paused() -> None:
    machine, guest = make()
    told = events_of(machine)
    machine.stop()
    machine.stop()
    machine.bus.msi(*message(0, 0x31))
    assert not machine.run_slice(0.01)
    assert not guest.taken
    assert machine.status == "paused"
    machine.cont()
    machine.cont()
    machine.run_slice(1)
    assert guest.taken == [(0, 0x31)]
    assert [name for name, _ in told] == ["STOP", "RESUME"]


def test_a_slice_ends_in_time_and_says_whether_there_is_more() -> None:
    machine, _ = make()

    def forever() -> None:
        machine.events.after(1, forever)

    forever()
    assert machine.run_slice(0.0)
    machine, _ = make()
    assert not machine.run_slice(1)


def test_a_slice_with_a_leap_waits_for_what_is_far_away() -> None:
    machine, _ = make()
    done: list[int] = []
    machine.events.after(10, done.append, 1)
    machine.events.after(10_000, done.append, 2)
    assert not machine.run_slice(1, leap=1000)
    assert done == [1]


def test_a_reset_clears_memory_processors_and_devices_and_tells_the_guest() -> None:
    machine, guest, driver = with_disk()
    told = events_of(machine)
    vcpu = machine.vcpus[0]
    vcpu.call(driver.submit, vcpu)
    machine.events.run(1)
    machine.bus.msi(*message(0, 0x61))
    machine.reset()
    assert told == [("RESET", {"guest": False, "reason": "host-qmp-system-reset"})]
    assert guest.resets == 1
    assert machine.memory.u8[driver.ring + 0x1002] == 0
    assert not vcpu.apic.irr
    assert not vcpu.apic.enabled
    assert vcpu.read(driver.start + 0x70, 4) == 0
    finish(machine)  # what was under way comes to nothing
    assert not guest.taken


def test_a_machine_works_after_a_reset() -> None:
    machine, guest, driver = with_disk(platform=XAPIC)
    machine.vcpus[0].call(driver.submit, machine.vcpus[0])
    machine.events.run(1)
    machine.reset()
    machine.vcpus[0].write(0xFEE000F0, 4, 0x1FF)
    driver = Driver(machine)
    machine.vcpus[0].call(driver.submit, machine.vcpus[0])
    finish(machine)
    assert guest.taken == [(0, 0x31)]


def test_a_reset_that_the_guest_asks_for_happens_after_what_it_was_doing() -> None:
    machine, guest = make()
    told = events_of(machine)

    def code(vcpu: Vcpu) -> None:
        machine.reset(guest=True)
        assert guest.resets == 0
        vcpu.write(0x1000, 4, 5)

    machine.vcpus[0].call(code, machine.vcpus[0])
    finish(machine)
    assert guest.resets == 1
    assert machine.memory.u32[0x400] == 0
    assert told[0] == ("RESET", {"guest": True, "reason": "guest-reset"})


def test_powerdown_and_shutdown_are_told() -> None:
    machine, _ = make()
    told = events_of(machine)
    machine.powerdown()
    machine.shutdown()
    machine.shutdown()
    assert [name for name, _ in told] == ["POWERDOWN", "SHUTDOWN"]
    assert told[1][1] == {"guest": True, "reason": "guest-shutdown"}
    assert machine.status == "shutdown"
    assert not machine.run_slice(0.01)


def test_a_device_can_be_plugged_in_and_taken_out() -> None:
    machine, guest = make(devices=disks(1))
    told = events_of(machine)
    seen: list[str] = []
    guest.plugged = lambda attached: seen.append(f"+{attached.id}")  # type: ignore[attr-defined]
    guest.unplugged = lambda attached: seen.append(f"-{attached.id}")  # type: ignore[attr-defined]
    plugged = machine.plug(DeviceSpec("rng", "random7"))
    assert plugged.slot == 22
    assert machine.vcpus[0].read(plugged.start + 8, 4) == 4
    machine.unplug("random7")
    assert machine.vcpus[0].read(plugged.start + 8, 4) == 0
    assert told == [
        ("DEVICE_DELETED", {"device": "random7", "path": "/machine/peripheral/random7"})
    ]
    assert seen == ["+random7", "-random7"]
    assert machine.plug(DeviceSpec("net", "nic1")).slot == 22


def test_a_pci_function_can_be_plugged_in_and_taken_out() -> None:
    machine, _, _, registers = pci_disk()
    vcpu = machine.vcpus[0]
    plugged = machine.plug(DeviceSpec("rng", "random7"))
    assert plugged.slot == 2 << 3
    assert vcpu.read(plugged.start, 4) == 0x10051AF4
    assert vcpu.read(registers + 0x12, 2) == 1
    machine.unplug("blk0")
    assert vcpu.read(registers + 0x12, 2) == 0xFFFF
    assert machine.plug(DeviceSpec("blk", "blk9")).slot == 1 << 3


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (DeviceSpec("gpu", "gpu0"), "unknown kind"),
        (DeviceSpec("blk", "blk0"), "already"),
        (DeviceSpec("blk", "blk1", queues=0), "queues"),
        (DeviceSpec("blk", "blk1", queues=5000), "queues"),
    ],
)
def test_a_device_that_cannot_be_is_refused(spec: DeviceSpec, says: str) -> None:
    machine, _ = make(devices=disks(1))
    with pytest.raises(UsageError, match=says):
        machine.plug(spec)
    assert list(machine.devices) == ["blk0"]


def test_there_is_an_end_to_slots() -> None:
    machine = Machine(Config(smp=1, memory=16, devices=disks(1100)))
    with pytest.raises(UsageError, match="no room"):
        machine.plug(DeviceSpec("rng", "random0"))
    with pytest.raises(UsageError, match="no device"):
        machine.unplug("random0")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Config(smp=0), "vCPUs"),
        (Config(smp=5000), "vCPUs"),
        (Config(smp=256, platform=Platform(apic=Apic.XAPIC)), "8 bits"),
        (Config(memory=1), "MiB"),
        (Config(memory=4096), "MiB"),
        (Config(platform=Platform(Irqchip.OFF)), "local APIC in KVM"),
        (Config(devices=(DeviceSpec("blk", "a"), DeviceSpec("blk", "a"))), "already"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(config: Config, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Machine(config)


def test_signals_reach_the_guest_that_has_a_use_for_them() -> None:
    machine, guest = make(XAPIC, smp=2)
    seen: list[tuple[str, int]] = []
    guest.init = lambda vcpu: seen.append(("init", vcpu.index))  # type: ignore[attr-defined]
    guest.startup = lambda vcpu, vector: seen.append(("startup", vector))  # type: ignore[attr-defined]
    vcpu = machine.vcpus[0]
    vcpu.write(0xFEE00310, 4, 1 << 24)
    vcpu.write(0xFEE00300, 4, 0x4500)
    vcpu.write(0xFEE00300, 4, 0x4600 | 0x99)
    vcpu.write(0xFEE00300, 4, 0x4400)  # an NMI, which it has no use for
    assert seen == [("init", 1), ("startup", 0x99)]


ACCESSES = st.lists(
    st.tuples(
        st.integers(0, 10**6),  # which region
        st.integers(0, 0x400),  # where in it
        st.sampled_from([1, 2, 4, 8]),
        st.booleans(),
        st.integers(0, 2**64 - 1),
    ),
    max_size=60,
)


@pytest.mark.parametrize("transport", [Transport.PCI, Transport.INTX, Transport.VIS])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(accesses=ACCESSES)
def test_whatever_a_guest_touches_is_answered(
    transport: Transport, accesses: list[tuple[int, int, int, bool, int]]
) -> None:
    specs = tuple(DeviceSpec(kind, kind) for kind in ("blk", "net", "rng", "console"))
    machine, _ = make(XAPIC, smp=2, transport=transport, devices=specs)
    vcpu = machine.vcpus[1]
    regions = machine.regions()
    spread = [start for name, _, _, start, _ in regions if name in ("ioapic", "virtio-mmio")]
    for which, offset, size, write, value in accesses:
        _, _, space, start, _ = regions[which % len(regions)]
        if which % 3 == 0:
            start, space = spread[which % len(spread)], "memory"
        value &= (1 << 8 * size) - 1
        if space == "memory":
            if write:
                vcpu.write(start + offset, size, value)
            else:
                assert 0 <= vcpu.read(start + offset, size) < 1 << 8 * size
        elif write:
            vcpu.outp(start + offset % 8, size, value)
        else:
            assert 0 <= vcpu.inp(start + offset % 8, size) < 1 << 8 * size
    machine.events.run(10_000)
    machine.reset()


def test_lines_and_kvms_ioapic_do_not_go_together() -> None:
    platform = Platform(Irqchip.ON)
    with pytest.raises(UsageError, match="which KVM tells of no EOI"):
        Machine(Config(transport=Transport.INTX, platform=platform))
    machine = Machine(Config(transport=Transport.MSI, platform=platform))
    versions = []
    for ioapic in machine.ioapics:
        ioapic.write(0x00, 4, 1)
        versions.append(ioapic.read(0x10, 4) & 0xFF)
    assert versions == [0x11, 0x20]  # KVM's, and QEMU's second


def test_who_arrives_while_a_guest_computes_kicks_each_time() -> None:
    machine = Machine(Config(smp=1))
    vcpu, taken = machine.vcpus[0], []

    class Busy:
        def interrupt(self, vcpu: Vcpu, vector: int) -> None:
            taken.append(vector)
            vcpu.eoi()

        def reset(self) -> None: ...

    machine.guest = Busy()
    vcpu.wrmsr(0x1B, 0xFEE00000 | 1 << 11 | 1 << 10)
    vcpu.wrmsr(0x80F, 0x1FF)
    vcpu.call(vcpu.spend, 1_000_000)
    for number in range(5):
        machine.events.at(
            vcpu.clock + 100_000 * (number + 1), vcpu.apic.accept, 0x41 + 16 * number, False
        )
    machine.events.run()
    assert len(taken) == 5
    kicks = [e.count for e in machine.rules.exits if e.reason is Reason.EXTERNAL_INTERRUPT]
    assert sum(kicks) == 5
