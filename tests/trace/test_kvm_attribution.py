# SPDX-License-Identifier: GPL-2.0-or-later
"""A real KVM's tracepoints through the same attribution as the TCG plugin's events."""

from __future__ import annotations

import polars as pl
import pytest

from qvis.trace.attribution import attribute
from qvis.trace.kvm import Reader
from qvis.trace.model import Cause, Kind, Space
from qvis.trace.store import Manifest, Region

from .recordings import unpack
from .synthetic import provenance

# How QEMU lays out a microvm, and who was where on it (data/kvm/README.md): transports
# are taken from the last one on.
TRANSPORTS = 0xFEB00000
SIZE = 0x200
REQUESTS = {"msi": 200, "line": 60}


def regions() -> tuple[Region, ...]:
    mmio = [
        Region(f"virtio-mmio@{at:x}", "virtio-mmio", Space.MEMORY, at, at + SIZE)
        for at in range(TRANSPORTS, TRANSPORTS + 32 * SIZE, SIZE)
    ]
    return (
        *mmio,
        Region("IOAPIC", "ioapic", Space.MEMORY, 0xFEC00000, 0xFEC01000),
        Region("IOAPIC2", "ioapic", Space.MEMORY, 0xFEC10000, 0xFEC11000),
        Region("LAPIC", "apic-msi", Space.MEMORY, 0xFEE00000, 0xFEF00000),
        Region("serial", "serial", Space.PORT, 0x3F8, 0x400),
    )


@pytest.fixture(scope="module", params=REQUESTS)
def attributed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, pl.DataFrame]:
    name: str = request.param
    reader = Reader(unpack(name, tmp_path_factory.mktemp("kvm")))
    where = provenance("intx" if name == "line" else "msi", kvm=True)
    manifest = Manifest(where, "vm", "qvis-load", 0, 0.0, 0.0, regions=regions())
    return name, pl.concat(attribute(reader.frames(), manifest))


def test_exits_have_their_register_and_cause(attributed: tuple[str, pl.DataFrame]) -> None:
    name, events = attributed
    exits = events.filter(pl.col("kind") == Kind.EXIT)
    causes = dict(exits["cause"].value_counts().iter_rows())
    assert causes[Cause.NOTIFY] >= REQUESTS[name]
    line = name == "line"
    assert causes.get(Cause.STATUS, 0) == (REQUESTS[name] if line else 0)
    assert causes.get(Cause.ACKNOWLEDGE, 0) == (REQUESTS[name] if line else 0)
    reads = exits.filter(pl.col("cause") == Cause.STATUS)
    assert set(reads["register"]) <= {"InterruptStatus"}
    assert not reads["write"].any()


def test_what_nothing_claims_is_only_the_mark(attributed: tuple[str, pl.DataFrame]) -> None:
    _, events = attributed
    other = events.filter(pl.col("cause") == Cause.OTHER)
    # 0xfeb000f0, where the recording's script wrote its two marks, lies in a register gap.
    assert set(other["address"]) <= {0xFEB000F0}


def test_an_interrupt_is_linked_from_raise_to_eoi(attributed: tuple[str, pl.DataFrame]) -> None:
    name, events = attributed
    kinds = (
        events.filter(pl.col("interrupt").is_not_null())
        .group_by("interrupt", maintain_order=True)
        .agg(pl.col("kind").cast(pl.String), pl.col("vcpu").n_unique().alias("vcpus"))
    )
    whole = kinds.filter(
        pl.col("kind").list.contains("raise") & pl.col("kind").list.contains("deliver")
    )
    assert len(whole) >= REQUESTS[name]
    assert (whole["vcpus"] == 1).all()
