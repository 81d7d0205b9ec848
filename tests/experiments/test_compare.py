# SPDX-License-Identifier: GPL-2.0-or-later
"""What operations cost, measured in real guests: the numbers that the project argues with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qvis import Transport, UsageError
from qvis.experiments.compare import OPERATIONS, RESULT, compare
from qvis.experiments.result import Result
from qvis.trace.stats import Stats
from qvis.trace.store import Trace

Cli = Callable[..., subprocess.CompletedProcess[str]]

# What Linux 6.12's drivers do. MSI-X: Linux reads back to flush what it wrote (2 for a
# mask), and masks an entry while it changes it. A line is masked at the IOAPIC, by an
# index, a word and a read back.
EXPECTED = {
    "device accesses per interrupt": {"pci": 0, "intx": 2, "msi": 0},
    "local APIC accesses per interrupt": {"pci": 1, "intx": 2, "msi": 1},  # level: TMR and EOI
    "IOAPIC EOIs per interrupt": {"pci": 0, "intx": 1, "msi": 0},
    "accesses per mask": {"pci": 2, "intx": 3, "msi": 1},
    "accesses per unmask": {"pci": 1, "intx": 2, "msi": 1},
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
    assert found == EXPECTED[metric]


def test_moves_and_set_up_cost_less_than_over_pci(measured: tuple[Path, Result]) -> None:
    _, result = measured
    moves = {t: result.series["accesses per change of CPU", t][0] for t in result.transports}
    # Three registers at most, fewer when the new message has a part of the old one; MSI-X:
    # mask, read back, three words, read back, unmask.
    assert 2 <= moves["msi"] <= 3
    assert moves["pci"] == 7
    set_ups = {t: result.series["accesses per set-up", t][0] for t in result.transports}
    # docs/virtio-mmio-msi.md: at most 4 a vector and 3 once, for two queues and configuration.
    assert set_ups["intx"] < set_ups["msi"] <= set_ups["intx"] + 3 * 4 + 3
    assert set_ups["pci"] > set_ups["msi"]


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
