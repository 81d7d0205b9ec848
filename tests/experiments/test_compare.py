# SPDX-License-Identifier: GPL-2.0-or-later
"""What operations cost, measured in real guests: the numbers that the project argues with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from qvis import Apic, InfraError, Platform, Transport, UsageError
from qvis.experiments.compare import OPERATIONS, RESULT, Target, compare
from qvis.experiments.result import Result, merge
from qvis.trace.attribution import attribute
from qvis.trace.kvm import Reader
from qvis.trace.model import SCHEMA, Cause, Clock, Kind
from qvis.trace.stats import Stats
from qvis.trace.store import Manifest, Trace
from qvis.transport import COMPARED
from tests.trace.recordings import unpack
from tests.trace.synthetic import START, provenance, step, store
from tests.trace.test_kvm_attribution import regions

Cli = Callable[..., subprocess.CompletedProcess[str]]

# What Linux 6.12's drivers do. MSI-X: Linux reads back to flush what it wrote (2 for a
# mask), and masks an entry while it changes it. A line is masked at the IOAPIC, by an
# index, a word and a read back.
EXPECTED = {
    "device accesses per interrupt": (0, 2, 0, 0, 0),
    "local APIC accesses per interrupt": (1, 2, 1, 1, 1),  # level: TMR and EOI
    "IOAPIC EOIs per interrupt": (0, 1, 0, 0, 0),
    "accesses per mask": (2, 3, 1, 0, 0),
    "accesses per unmask": (1, 2, 1, 0, 0),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One run of everything but the boot's times, which are nobody's business here."""
    folder = tmp_path_factory.mktemp("compare") / "result"
    result = compare(folder, list(Transport), list(OPERATIONS), 1, backend="tcg", smp=2, queues=2)
    return folder, result


@pytest.mark.parametrize("metric", EXPECTED)
def test_each_operation_costs_what_it_should(measured: tuple[Path, Result], metric: str) -> None:
    _, result = measured
    found = {t: result.series[metric, t][0] for t in result.transports}
    assert found == dict(zip(Transport, EXPECTED[metric], strict=True))


def test_moves_and_set_up_cost_less_than_over_pci(measured: tuple[Path, Result]) -> None:
    _, result = measured
    moves = {t: result.series["accesses per change of CPU", t][0] for t in result.transports}
    # Three registers at most, fewer when the new message has a part of the old one; MSI-X:
    # mask, read back, three words, read back, unmask.
    assert 2 <= moves["msi"] <= 3
    assert moves["pci"] == 7
    # All of it is memory, but for the doorbell where the device keeps a copy.
    assert (moves["vis"], moves["vis-doorbell"]) == (0, 1)
    set_ups = {t: result.series["accesses per set-up", t][0] for t in result.transports}
    # docs/virtio-interrupts.md: at most 4 a vector and 3 once, for two queues and configuration.
    assert set_ups["intx"] < set_ups["msi"] <= set_ups["intx"] + 3 * 4 + 3
    assert set_ups["pci"] > set_ups["msi"]
    # VIS: five, for any number of queues (test_set_up_of_many_queues); the line has its IOAPIC.
    assert set_ups["vis"] == set_ups["vis-doorbell"] <= set_ups["intx"] + 5
    assert set_ups["vis"] < set_ups["msi"]


def test_the_emulated_machine_costs_what_the_real_guest_does(
    measured: tuple[Path, Result], tmp_path: Path
) -> None:
    """To the access: what there is an access is an exit here."""
    _, real = measured
    operations = [name for name in OPERATIONS if name != "boot"]
    model = compare(
        tmp_path / "emulated", list(Transport), operations, 1,
        backend="emulated", smp=2, queues=2, platform=Platform(apic=Apic.XAPIC),
    )  # fmt: skip
    counts = [m.name for m in real.metrics if m.unit in ("accesses", "EOIs")]
    assert len(counts) == 7
    for name in counts:
        for transport in map(str, Transport):
            found = model.series[name.replace("accesses", "exits"), transport]
            assert found == real.series[name, transport], (name, transport)
    assert all(p.clock is Clock.MODELLED for p in model.provenance.values())
    with pytest.raises(UsageError, match="modelled cycles"):
        merge([real, model])


def test_set_up_of_many_queues(tmp_path: Path) -> None:
    """16 queues: over VIS five accesses more than over the line, and none for what comes after."""
    queues = 16
    operations = ["interrupt", "mask", "unmask", "change of CPU", "set-up"]
    result = compare(
        tmp_path / "many", COMPARED, operations, 1, backend="tcg", smp=queues, queues=queues
    )
    of = {str(t): result.series["accesses per set-up", t][0] for t in COMPARED}
    device = {
        e.transport: sum(
            row.count for row in e.rows if (row.device, row.cause) == ("blk0", Cause.SETUP)
        )
        for e in result.evidence
        if e.op == "set-up"
    }
    assert device["vis"] - device["intx"] == 5
    assert device["msi"] - device["intx"] > 3 * queues  # what storage saves
    assert device["pci"] > device["msi"]
    assert of["vis"] <= of["intx"] + 8
    per = ("device accesses per interrupt", "accesses per mask", "accesses per unmask",
           "accesses per change of CPU")  # fmt: skip
    assert {result.series[name, "vis"][0] for name in per} == {0}


def test_the_evidence_is_the_numbers(measured: tuple[Path, Result]) -> None:
    folder, result = measured
    assert Result.load(folder / RESULT) == result
    for evidence in result.evidence:
        trace = Trace.open(folder / evidence.trace)
        assert not trace.manifest.partial
        assert Stats.of(trace).other <= 0.01
        touched = sum(row.count for row in evidence.rows)
        assert touched <= trace.manifest.events
        if evidence.op == "interrupt":
            ends = [row.count for row in evidence.rows if not row.touched]
            assert ends == ([evidence.operations] if evidence.transport == "intx" else [])
            acks = [row.count for row in evidence.rows if row.register == "InterruptACK"]
            assert acks == ([evidence.operations] if evidence.transport == "intx" else [])


def test_results_of_other_machines_are_refused(
    measured: tuple[Path, Result], cli: Cli, tmp_path: Path
) -> None:
    folder, _ = measured
    data = json.loads((folder / RESULT).read_text())
    data["provenance"]["msi"]["clock"] = "TSC cycles"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(data))
    done = cli("compare", str(folder), str(other))
    assert done.returncode == 2
    assert "instructions" in done.stderr
    assert "TSC cycles" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_verb_prints_and_writes_a_page(
    measured: tuple[Path, Result], cli: Cli, tmp_path: Path
) -> None:
    folder, _ = measured
    done = cli("compare", str(folder), "-o", str(tmp_path), "--html")
    assert done.returncode == 0, done.stderr
    assert "device accesses" in done.stdout
    page = (tmp_path / "report.html").read_text()
    assert "Side by side" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_nonsense_is_refused_before_anything_boots(tmp_path: Path) -> None:
    machine = {"backend": "tcg"}
    with pytest.raises(UsageError, match="no operation 'reboot'"):
        compare(tmp_path / "a", [Transport.MSI], ["reboot"], 1, **machine)
    with pytest.raises(UsageError, match="at least 1"):
        compare(tmp_path / "a", [Transport.MSI], ["mask"], 0, **machine)
    with pytest.raises(UsageError, match="once"):
        compare(tmp_path / "a", [Transport.MSI, Transport.MSI], ["mask"], 1, **machine)
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="there already"):
        compare(tmp_path, [Transport.MSI], ["mask"], 1, **machine)


@pytest.mark.parametrize(("name", "status"), [("line", 2.0), ("msi", 0.0)])
def test_on_kvm_interrupts_are_found_by_their_vector(
    tmp_path: Path, name: str, status: float
) -> None:
    """A real KVM's tracepoints do not know Linux's numbers, and IOAPICs are not in them."""
    requests = {"line": 60, "msi": 200}[name]
    raw = unpack(name, tmp_path)
    where = provenance("intx" if name == "line" else "msi", kvm=True)
    frames = list(
        attribute(Reader(raw).frames(), Manifest(where, "vm", "", 0, 0.0, 0.0, regions=regions()))
    )
    events = pl.concat(frames)
    disk = events.filter(pl.col("cause") == Cause.NOTIFY)["device"].drop_nulls().mode()[0]
    rename = pl.when(pl.col("device").cast(pl.String) == disk).then(pl.lit("blk0"))
    events = events.with_columns(
        rename.otherwise(pl.col("device").cast(pl.String)).cast(SCHEMA["device"]).alias("device")
    )
    manifest = Manifest(where, "vm", "", 0, 0.0, 0.0, events=len(events), regions=regions())
    trace = Trace(tmp_path / "t", manifest)
    (trace.path / "events").mkdir(parents=True)
    events.write_parquet(trace.path / "events" / "part-000000.parquet")
    vector, vcpu = (
        events.filter(pl.col("kind") == Kind.DELIVER, pl.col("vector") < 0xEC)  # no timer's
        .group_by("vector", "vcpu").len().sort("len", descending=True)
        .select("vector", "vcpu").row(0)
    )  # fmt: skip
    target = Target(irq=57, vector=vector, device="virtio0", cpu=vcpu, cpus=2)
    measure = OPERATIONS["interrupt"].measure
    assert measure is not None
    found = measure(trace, target, requests)
    assert found["device accesses per interrupt"] == pytest.approx(status, abs=0.1)
    # TMR and EOI for a level; for edges the guest has KVM's paravirtual EOI.
    assert found["local APIC accesses per interrupt"] == pytest.approx(status, abs=0.1)
    assert "IOAPIC EOIs per interrupt" not in found
    other = Target(irq=57, vector=255, device="virtio0", cpu=vcpu, cpus=2)
    with pytest.raises(InfraError, match="interrupts the trace has 0"):
        measure(trace, other, requests)


def masks(tmp_path: Path, *, kvm: bool, doorbells: int, calls: int) -> Trace:
    """A trace of a device with VIS whose doorbell rang so often, and calls of its chip."""
    rows = [
        step(START + np.arange(doorbells) * 1000, 0, Kind.EXIT if kvm else Kind.ACCESS,
             device="blk0", register="VisUpdate", cause=Cause.ROUTE, write=True),
        *(step(START + np.arange(calls) * 1000, 0, Kind.FUNCTION, function=f"vm_vis_irq_{name}")
          for name in ("mask", "unmask")),
    ]  # fmt: skip
    return store(tmp_path / "t", pl.concat(rows).sort("time"), provenance("vis", kvm=kvm))


TARGET = Target(irq=57, vector=34, device="virtio0", cpu=0, cpus=2)


def measured_masks(trace: Trace, count: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ("mask", "unmask"):
        measure = OPERATIONS[name].measure
        assert measure
        found |= measure(trace, TARGET, count)
    return found


def test_a_doorbell_of_masks_is_counted(tmp_path: Path) -> None:
    """On KVM a device may keep copies of masks too; nothing tells of which kind a doorbell was."""
    found = measured_masks(masks(tmp_path, kvm=True, doorbells=50, calls=0), 50)
    assert found == {"accesses per mask": 0.5, "accesses per unmask": 0.5}


def test_nothing_touched_means_nothing_unless_it_was_done(tmp_path: Path) -> None:
    done = masks(tmp_path / "done", kvm=False, doorbells=0, calls=50)
    assert measured_masks(done, 50) == {"accesses per mask": 0, "accesses per unmask": 0}
    with pytest.raises(InfraError, match="of 51 times mask the trace has 50"):
        measured_masks(done, 51)
    move = OPERATIONS["change of CPU"].measure
    assert move
    with pytest.raises(InfraError, match="of 20 times set_affinity or write_msg the trace has 0"):
        move(done, TARGET, 20)
