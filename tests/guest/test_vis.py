# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupt storage: where it is, what is in it, and what the driver shows of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

import qvis
from qvis.guest import load
from qvis.guest.interrupts import Vector
from qvis.machine.machine import Machine
from qvis.trace.record import recording
from qvis.trace.store import Trace

from .storage import Row, in_memory, shown
from .test_masking import becomes, bits_of, read_ended, start_read

QUEUES = 2
VECTORS = QUEUES + 1
MESSAGES = 0xFEE00000  # SDM volume 3, 12.11.1: where messages to local APICs go


@pytest.fixture(
    scope="module", params=[qvis.Transport.VIS, qvis.Transport.VIS_DOORBELL], ids=str
)  # fmt: skip
def vis(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A guest whose devices have interrupt storage."""
    with qvis.up(backend="tcg", transport=request.param, smp=4, queues=QUEUES) as machine:
        yield machine


def disk(vm: Machine) -> list[Vector]:
    """The disk's vectors in order of their numbers: configuration, queue 0..."""
    found = [v for v in vm.irqs.vectors() if v.driver == "virtio_blk"]
    return sorted(found, key=lambda v: -1 if v.queue is None else v.queue)


def both(vm: Machine, device: str) -> tuple[Row, ...]:
    """The storage as it is, once the driver shows the same."""
    said = shown(vm, device)
    found = in_memory(vm, said.address, len(said.rows))
    assert found == said
    return found.rows


def test_the_driver_shows_what_is_there(vis: Machine) -> None:
    """Vectors of every queue are unmasked, idle, and go to the CPU that the kernel says."""
    for queue in range(QUEUES):
        load.run(vis.ssh, queue, 10)
    vectors = disk(vis)
    rows = both(vis, vectors[0].device)
    assert len(rows) == VECTORS
    for vector, row in zip(vectors, rows, strict=True):
        assert not row.masked
        assert not row.pending
        assert row.address & 0xFFF00000 == MESSAGES
        assert {row.address >> 12 & 0xFF} == vector.effective
    assert len({(row.address, row.data) for row in rows}) == len(rows)


def test_mask_and_pending_bytes(vis: Machine) -> None:
    """A request that completes while its vector is masked leaves its byte, and unmask clears it."""
    vector = disk(vis)[2]
    bits = bits_of(vis, vector)
    vis.ssh.run(bits.mask)
    try:
        before = both(vis, vector.device)
        assert [row.masked for row in before] == [False, False, True]
        assert not any(row.pending for row in before)
        start_read(vis)
        assert becomes(bits.pending)
        after = both(vis, vector.device)
        assert [row.masked for row in after] == [False, False, True]
        assert [row.pending for row in after] == [False, False, True]
        assert not read_ended(vis, 0.5)
    finally:
        vis.ssh.run(bits.unmask)
    assert read_ended(vis, 20.0)
    assert not any(row.masked or row.pending for row in both(vis, vector.device))


def test_copies_are_told_of(vis: Machine) -> None:
    """Only a device that keeps copies says so, and of vectors that have fired; never of masks."""
    for queue in range(QUEUES):
        load.run(vis.ssh, queue, 1)
    rows = both(vis, disk(vis)[0].device)
    copies = vis.spec.transport is qvis.Transport.VIS_DOORBELL
    assert [row.entry_cached for row in rows[1:]] == [copies] * QUEUES
    assert not any(row.mask_cached for row in rows)


def test_a_move_changes_one_entry(vis: Machine) -> None:
    vectors = disk(vis)
    before = both(vis, vectors[0].device)
    for cpu in (3, 0, 2):
        vis.irqs.set_affinity(vectors[1].irq, [cpu])
        rows = both(vis, vectors[1].device)
        assert rows[1].address >> 12 & 0xFF == cpu
        assert (rows[0], rows[2]) == (before[0], before[2])


def test_storage_is_where_the_trace_says(vis: Machine, tmp_path: Path) -> None:
    """A driver that takes its device again hands over new storage: five accesses, with values."""
    vector = disk(vis)[0]
    folder, name = "/sys/bus/virtio/devices", vector.device
    place = vis.ssh.run(f"readlink -f {folder}/{name}/..").stdout.strip()
    bus, parent = vis.ssh.run(f"readlink -f {place}/driver").stdout.strip(), Path(place).name
    with recording(vis, tmp_path / "t") as session:
        vis.ssh.run(f"echo {parent} > {bus}/unbind && echo {parent} > {bus}/bind")
    assert session.trace
    device = next(v for v in vis.irqs.vectors() if v.driver == "virtio_blk").device
    now = shown(vis, device)
    told = handed_over(session.trace)
    assert told == [
        ("VisStorageLow", True, now.address & 0xFFFFFFFF),
        ("VisStorageHigh", True, now.address >> 32),
        ("VisControl", True, 1 << 16 | VECTORS),
        ("VisControl", False, 1 << 16 | VECTORS),
    ]
    for queue in range(QUEUES):
        assert load.run(vis.ssh, queue, 20).completed == 20
    assert not any(row.masked or row.pending for row in both(vis, device))


def handed_over(trace: Trace) -> list[tuple[str, bool, int]]:
    """What was written to and read from VIS's registers after the device's last reset."""
    register = pl.col("register").cast(pl.String)
    rows = (
        trace.events()
        .filter(pl.col("device").cast(pl.String) == "blk0", register.str.starts_with("Vis"))
        .select(register, "write", "value")
        .collect()
        .rows()
    )
    last = max(i for i, (name, _, _) in enumerate(rows) if name == "VisStorageLow")
    return rows[last:]


def test_the_chip_is_seen_at_work_although_no_register_is(vis: Machine, tmp_path: Path) -> None:
    """The kernel's functions tell of masks and moves; the interrupt is whole (see test_record)."""
    vector = disk(vis)[1]
    file = f"/sys/kernel/debug/irq/irqs/{vector.irq}"
    with recording(vis, tmp_path / "t") as session:
        vis.ssh.run(f"for i in 1 2 3 4 5; do echo mask > {file} && echo unmask > {file}; done")
        for cpu in (1, 3):
            vis.irqs.set_affinity(vector.irq, [cpu])
    assert session.trace
    events = session.trace.events().collect().with_columns(pl.col(pl.Categorical).cast(pl.String))
    called = dict(events.filter(kind="function").group_by("function").len().iter_rows())
    assert called["vm_vis_irq_mask"] == called["vm_vis_irq_unmask"] == 5
    assert called["vm_vis_irq_write_msg"] == 2
    touched = events.filter(pl.col("device") == "blk0", pl.col("kind") == "access")
    copies = vis.spec.transport is qvis.Transport.VIS_DOORBELL
    assert touched["register"].to_list() == ["VisUpdate"] * (2 * copies)
    assert set(touched["cause"]) <= {"route change"}
