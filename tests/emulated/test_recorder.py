# SPDX-License-Identifier: GPL-2.0-or-later
"""What a machine writes down, and what comes out of it as a trace."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import polars as pl
import pytest

from qvis.emulated.config import Config, DeviceSpec
from qvis.emulated.guest.kernel import Kernel
from qvis.emulated.guest.tasks import Task, Work
from qvis.emulated.machine import Machine
from qvis.emulated.recorder import COUNTS, FILE, LAYOUT, LIMIT, Recorder, RowKind, Space, what
from qvis.emulated.vcpu import Vcpu
from qvis.errors import UsageError
from qvis.trace.attribution import attribute
from qvis.trace.emulated import Reading
from qvis.trace.model import SCHEMA, Clock, Kind
from qvis.trace.model import Space as Where
from qvis.trace.store import Irq, Manifest, Provenance, Region
from qvis.transport import Transport
from qvis.x86 import Apic, Irqchip, Platform

from .small import X2APIC, XAPIC, Driver, finish, make, message, send, with_disk

IRQ = 57


def read(folder: Path) -> tuple[pl.DataFrame, Reading]:
    """All that was recorded."""
    reading = Reading(folder)
    frames = list(reading.frames())
    return pl.concat([SCHEMA.to_frame(), *frames]), reading


def manifest(machine: Machine) -> Manifest:
    """As it would be written for this machine."""
    provenance = Provenance(
        "emulated", Clock.MODELLED, "emulated", "emulated", "-", "-", "-", "-", "-", "-",
        machine.config.transport, machine.config.smp, 1, machine.config.memory,
    )  # fmt: skip
    devices = {f"path={index}": name for index, name in enumerate(machine.devices)}
    regions = [
        Region(name, "virtio-mmio", Where.MEMORY, attached.start, attached.end)
        for name, attached in machine.devices.items()
    ]
    regions.append(Region("LAPIC", "apic-msi", Where.MEMORY, 0xFEE00000, 0xFEF00000))
    regions.append(Region("IOAPIC2", "ioapic", Where.MEMORY, 0xFEC10000, 0xFEC11000))
    assert devices
    irqs = (Irq(IRQ, "blk0", "req.0"),)
    return Manifest(provenance, "vm1", "x", 0, 0.0, 0.0, regions=tuple(regions), irqs=irqs)


def handler(vcpu: Vcpu, vector: int) -> None:
    """What Linux's kernel enters for a queue's interrupt."""
    vcpu.enter("apic_ack_edge")
    vcpu.enter("vring_interrupt", IRQ)
    vcpu.spend(700)


def recorded_requests(
    folder: Path, platform: Platform, transport: Transport, count: int = 3
) -> tuple[Machine, pl.DataFrame, Reading]:
    """A trace of so many requests, attributed."""
    machine, guest, driver = with_disk(transport, platform)
    pin = machine.devices["blk0"].line - 24
    machine.ioapics[1].write(0, 4, 0x10 + 2 * pin)
    machine.ioapics[1].write(0x10, 4, 0x31 | 1 << 15)

    def take(vcpu: Vcpu, vector: int) -> None:
        handler(vcpu, vector)
        if transport is Transport.INTX:
            vcpu.write(driver.start + 0x64, 4, vcpu.read(driver.start + 0x60, 4))

    guest.then = take
    machine.record(folder)
    for _ in range(count):
        machine.vcpus[0].call(driver.submit, machine.vcpus[0])
        finish(machine)
    counts = machine.stop_recording()
    assert counts.dropped == counts.error == 0
    reading = Reading(folder)
    frames = list(attribute(reading.frames(), manifest(machine)))
    table = pl.concat(frames)
    assert len(table) == counts.recorded
    assert reading.partial == []
    return machine, table, reading


@pytest.mark.parametrize(
    ("platform", "transport"),
    [
        (X2APIC, Transport.MSI),
        (X2APIC, Transport.VIS),
        (XAPIC, Transport.MSI),
        (XAPIC, Transport.INTX),
        (Platform(apic=Apic.XAPIC, apicv=True), Transport.INTX),
        (Platform(apicv=True), Transport.VIS),
        (Platform(Irqchip.OFF, Apic.XAPIC), Transport.MSI),
    ],
)
def test_interrupts_are_linked_from_raise_to_eoi(
    tmp_path: Path, platform: Platform, transport: Transport
) -> None:
    _, table, _ = recorded_requests(tmp_path, platform, transport)
    linked = table.filter(pl.col("interrupt").is_not_null())
    assert linked["interrupt"].n_unique() == 3
    for (_,), rows in linked.group_by("interrupt"):
        kinds = rows["kind"].to_list()
        for kind in (Kind.RAISE, Kind.DELIVER, Kind.FUNCTION, Kind.EOI):
            assert str(kind) in kinds
        assert kinds.index("raise") < kinds.index("deliver") < kinds.index("function")
        assert kinds.index("function") < kinds.index("eoi")
        assert set(rows["irq"].to_list()) == {IRQ}
        assert set(rows["source"].drop_nulls().cast(pl.String)) == {"req.0"}
        eoi = rows.filter((pl.col("cause") == "EOI") & pl.col("register").is_not_null())
        expected = "access" if platform.apicv and transport is not Transport.INTX else "exit"
        assert eoi["kind"].to_list() == [expected]
        levels = rows.filter(pl.col("device").cast(pl.String) == "IOAPIC")
        assert len(levels) == (transport is Transport.INTX)


def test_exits_have_kvms_reasons_registers_and_durations(tmp_path: Path) -> None:
    machine, table, reading = recorded_requests(tmp_path, X2APIC, Transport.MSI)
    exits = table.filter(pl.col("kind") == "exit")
    notify = exits.filter(pl.col("cause") == "notify").row(0, named=True)
    assert notify["reason"] == "EPT_MISCONFIG"
    assert notify["device"] == "blk0"
    assert notify["register"] == "QueueNotify"
    assert notify["duration"] == machine.rules.notify.cycles
    eoi = exits.filter(pl.col("cause") == "EOI").row(0, named=True)
    assert (eoi["space"], eoi["address"], eoi["size"], eoi["write"]) == ("msr", 0x80B, 8, True)
    halts = exits.filter(pl.col("reason").cast(pl.String) == "HLT")
    assert halts["address"].null_count() == len(halts) == 4
    assert reading.clock is Clock.MODELLED
    assert table["time"].is_sorted()
    assert (table["time"] == table["clock"].cast(pl.Int64) // 2).all()


def test_times_of_a_vcpu_that_is_ahead_come_out_in_order(tmp_path: Path) -> None:
    machine, guest = make(smp=2)
    machine.record(tmp_path)

    def ahead(vcpu: Vcpu) -> None:
        for _ in range(LIMIT):
            vcpu.spend(100)
            vcpu.enter("vring_interrupt", IRQ)
        vcpu.wrmsr(0x830, 1 << 32 | 0x41)

    machine.vcpus[0].call(ahead, machine.vcpus[0])
    for n in range(2000):
        machine.events.at(1000 * n, send, machine, *message(1, 0x31))
    finish(machine)
    counts = machine.stop_recording()
    table, reading = read(tmp_path)
    assert len(table) == counts.recorded > LIMIT
    assert table["time"].is_sorted()
    assert reading.partial == []
    taken = table.filter(pl.col("kind") == "deliver")
    assert len(taken) == len(guest.taken)
    for vcpu in range(2):
        assert table.filter(pl.col("vcpu") == vcpu)["clock"].is_sorted()


def test_recording_can_be_stopped_and_begun_again(tmp_path: Path) -> None:
    machine, guest = make()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        machine.record(tmp_path / name)
        machine.bus.msi(*message(0, 0x31))
        finish(machine)
        assert machine.stop_recording().recorded > 0
        machine.bus.msi(*message(0, 0x41))
        finish(machine)
    assert len(guest.taken) == 4
    for name in ("a", "b"):
        table, _ = read(tmp_path / name)
        assert table.filter(pl.col("kind") == "deliver")["vector"].to_list() == [0x31]
    assert machine.stop_recording().recorded == 0


def test_a_full_disk_is_counted_and_does_not_hurt_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, guest = make()
    machine.record(tmp_path)
    recorder = machine.recorder
    assert recorder is not None
    assert recorder._file is not None
    file = recorder._file

    class Full:
        room = 100

        def write(self, data: memoryview) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, self.room = min(self.room, len(data)), max(0, self.room - len(data))
            file.write(data[:taken])
            return taken

        def truncate(self, size: int) -> None:
            file.truncate(size)

        def close(self) -> None:
            file.close()

    monkeypatch.setattr(recorder, "_file", Full())
    machine.bus.msi(*message(0, 0x31))
    finish(machine)
    counts = machine.stop_recording()
    assert guest.taken == [(0, 0x31)]
    assert counts.error == errno.ENOSPC
    assert counts.recorded == 0
    assert counts.dropped > 3
    table, reading = read(tmp_path)
    assert len(table) == 0
    assert reading.lost == counts.dropped
    assert any("No space left" in why for why in reading.partial)


def test_a_folder_that_is_not_there_is_counted_and_does_not_hurt(tmp_path: Path) -> None:
    machine, guest = make()
    machine.record(tmp_path / "none")
    machine.bus.msi(*message(0, 0x31))
    finish(machine)
    counts = machine.stop_recording()
    assert counts.error == errno.ENOENT
    assert counts.dropped > 3
    assert guest.taken


def some(folder: Path, rows: int = 10) -> int:
    """A recording of so many rows in two blocks; the size of its file."""
    recorder = Recorder(folder)
    row = what(RowKind.EXIT, space=Space.PORT, size=1, write=True, reason=0)
    for n in range(rows):
        recorder.add((row, 0, 100 * n, 0x80, n, 5))
        if n == rows // 2:
            recorder.flush(100 * n)
    assert recorder.stop(0).recorded == rows
    return (folder / FILE).stat().st_size


def test_a_recorder_that_was_killed_leaves_what_it_wrote(tmp_path: Path) -> None:
    some(tmp_path)
    (tmp_path / COUNTS).unlink()
    table, reading = read(tmp_path)
    assert len(table) == 10
    assert reading.partial == ["the recorder was killed: how much it recorded is not known"]


@pytest.mark.parametrize("cut", [1, 8, 40, 47, 48, 200, 240, 250, 264])
def test_a_file_that_is_cut_short_says_so(tmp_path: Path, cut: int) -> None:
    size = some(tmp_path)
    with (tmp_path / FILE).open("r+b") as file:
        file.truncate(size - cut)
    table, reading = read(tmp_path)
    assert len(table) < 10
    assert any("cut short" in why for why in reading.partial)
    assert table["value"].to_list() == list(range(len(table)))


def test_numbers_that_do_not_fit_are_cut_and_nothing_else_is_lost(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    row = what(RowKind.EXIT, space=Space.MEMORY, size=8, write=True)
    recorder.add((row, 0, 1, 5, -1, 0))
    recorder.add((row, 0, 2, 5, 1 << 70 | 7, 0))
    assert recorder.stop(0).recorded == 2
    table, _ = read(tmp_path)
    assert table["value"].to_list() == [2**64 - 1, 7]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (LAYOUT, None, "no recording"),
        (LAYOUT, "{", "damaged"),
        (LAYOUT, "[]", "damaged"),
        (LAYOUT, '{"functions": [1], "reasons": []}', "damaged"),
        (LAYOUT, '{"functions": {}, "reasons": []}', "damaged"),
        (COUNTS, "{", "damaged"),
        (COUNTS, '{"recorded": "5"}', "damaged"),
        (FILE, "x" * 100, "no recording"),
    ],
)
def test_a_damaged_recording_is_refused_in_one_line(
    tmp_path: Path, name: str, text: str | None, says: str
) -> None:
    some(tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        read(tmp_path)
    assert "\n" not in caught.value.message


def test_unknown_reasons_and_functions_are_null(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.add((what(RowKind.EXIT, reason=99), 0, 1, 0, 0, 5))
    recorder.add((what(RowKind.FUNCTION), 0, 2, 10**6, 5, 0))
    recorder.stop(0)
    table, _ = read(tmp_path)
    assert table["reason"].null_count() == table["function"].null_count() == 2


def test_an_empty_recording_has_no_rows(tmp_path: Path) -> None:
    assert Recorder(tmp_path).stop(0).recorded == 0
    table, reading = read(tmp_path)
    assert len(table) == 0
    assert table.schema == SCHEMA
    assert reading.partial == []
    assert json.loads((tmp_path / COUNTS).read_text())["recorded"] == 0


def test_a_driver_of_a_machine_without_recorder_costs_the_same(tmp_path: Path) -> None:
    clocks = []
    for record in (False, True):
        machine, _ = make(transport=Transport.MSI, devices=with_disk()[0].config.devices)
        driver = Driver(machine)
        if record:
            machine.record(tmp_path)
        machine.vcpus[0].call(driver.submit, machine.vcpus[0])
        finish(machine)
        clocks.append(machine.vcpus[0].clock)
    assert clocks[0] == clocks[1]


@pytest.mark.parametrize("transport", [Transport.PCI, Transport.MSI, Transport.VIS])
def test_requests_of_the_guests_kernel_are_linked_too(tmp_path: Path, transport: Transport) -> None:
    config = Config(
        transport=transport, smp=2, memory=64, devices=(DeviceSpec("blk", "blk0", queues=2),)
    )
    machine = Machine(config)
    kernel = Kernel(machine)
    machine.guest = kernel
    kernel.boot(lambda: None)
    finish(machine)
    machine.record(tmp_path)
    tasks: list[Task] = []

    def work() -> Work:
        for _ in range(5):
            yield from kernel.disks["vda"].serial(tasks[0])
        return 0

    tasks.append(kernel.spawn(work(), cpu=1))
    finish(machine)
    assert machine.stop_recording().dropped == 0
    table = pl.concat(attribute(Reading(tmp_path).frames(), manifest(machine)))
    linked = table.filter(pl.col("irq").is_not_null() & pl.col("interrupt").is_not_null())
    assert linked["interrupt"].n_unique() == 5
    for (_,), rows in linked.group_by("interrupt"):
        kinds = rows["kind"].unique(maintain_order=True).to_list()
        assert kinds[:3] == ["raise", "deliver", "function"]
        assert set(kinds[3:]) == {"exit", "eoi"}
        assert rows["vcpu"].unique().to_list() == [1]
        assert "vring_interrupt" in rows["function"].to_list()
