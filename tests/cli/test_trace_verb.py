# SPDX-License-Identifier: GPL-2.0-or-later
"""`qvis trace`: what it makes of a recording, and what it says to bad input."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import qvis
from qvis.trace.store import Trace
from tests.cli.conftest import Cli

REQUESTS = 40


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trace of a real guest, by the command line."""
    folder = tmp_path_factory.mktemp("traces") / "t"
    with qvis.up(backend="tcg", transport="intx", smp=1, queues=1, name="traced"):
        command = f"echo said; echo loudly >&2; qvis-load /dev/vda 0 {REQUESTS} >/dev/null; exit 5"
        done = subprocess.run(
            ["qvis", "trace", "traced", "-o", str(folder), "--", "sh", "-c", command],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 5  # the command's own
        assert done.stdout == "said\n"
        assert "loudly\n" in done.stderr
        assert f"{folder}: " in done.stderr
        assert "partial" not in done.stderr
    return folder


@pytest.fixture
def cli(in_process: Cli) -> Cli:
    return in_process


@pytest.fixture
def trace(recorded: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged at will."""
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def change(trace: Path, **what: Any) -> None:
    file = trace / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **what}))


def refused(done: subprocess.CompletedProcess[str], says: str, status: int = 2) -> None:
    assert says in done.stderr
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.startswith("qvis: ")
    assert len(done.stderr.splitlines()) == 1


# Bad input


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("trace", "name one machine, or an action and a trace"),
        ("trace one two", "name one machine, or an action and a trace"),
        ("trace ghost", "no machine named 'ghost'"),
        ("trace ghost -- true", "no machine named 'ghost'"),
        ("trace show", "which trace? qvis trace show TRACE"),
        ("trace stats", "which trace?"),
        ("trace export", "which trace?"),
        ("trace attribute", "which trace?"),
        ("trace show absent", "absent is no trace: it has no manifest.json"),
        ("trace stats absent", "absent is no trace"),
        ("trace export absent csv", "absent is no trace"),
        ("trace attribute absent", "absent is no trace"),
        ("trace --boot", "usage: qvis trace --boot"),
        ("trace --boot vm1 -- true", "usage: qvis trace --boot"),
        ("trace --boot --transport isa -- true", "unknown transport 'isa'"),
        ("trace --boot --backend kvm --icount -- true", "kvm"),
        ("trace --boot --smp 0 -- true", "--smp must be between 1 and 1024"),
        ("trace --boot --deadline soon -- true", "invalid float value: 'soon'"),
        ("trace ghost --deadline 0 -- true", "--deadline must be more than 0"),
        ("trace show absent --limit few", "invalid int value: 'few'"),
        ("trace show absent --limit -1", "--limit must be at least 0"),
        ("trace show absent what else", "absent is no trace"),
    ],
)
def test_usage_error(
    cli: Cli, tmp_path: Path, line: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(*line.split())
    if "--icount" in line and done.returncode == 122:
        pytest.skip("kvm does not work here, which is said first")
    refused(done, says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("action", ["show", "stats", "attribute", "export"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "manifest.json is damaged"),
        ("[]", "manifest.json is damaged"),
        ("{}", "manifest.json is damaged"),
        ('{"format": 1}', "manifest.json is damaged"),
        ('{"format": 2}', "has format 2; this qvis reads 1 only"),
        ("\0\0", "manifest.json is damaged"),
    ],
)
def test_damaged_manifest(cli: Cli, tmp_path: Path, action: str, content: str, says: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    refused(cli("trace", action, str(tmp_path), "csv"), says)


def test_manifest_with_a_word_that_is_none(cli: Cli, trace: Path) -> None:
    change(trace, regions=[{"device": "x", "map": "y", "space": "moon", "start": 0, "end": 1}])
    refused(cli("trace", "stats", str(trace)), "manifest.json is damaged")
    change(trace, regions=[], surprise=1)
    refused(cli("trace", "stats", str(trace)), "manifest.json is damaged")


def test_unknown_cause(cli: Cli, trace: Path) -> None:
    done = cli("trace", "show", str(trace), "--cause", "boredom")
    refused(done, "no cause 'boredom': there are interrupt status, acknowledge, EOI")


@pytest.mark.parametrize("words", [[], ["pdf"], ["csv", "jsonl"]])
def test_export_as_nothing(cli: Cli, trace: Path, words: list[str]) -> None:
    before = sorted(trace.parent.rglob("*"))
    refused(cli("trace", "export", str(trace), *words), "export as what? one of jsonl, csv")
    assert sorted(trace.parent.rglob("*")) == before


@pytest.mark.parametrize("action", [["show"], ["stats"], ["export", "csv"]])
def test_damaged_events(cli: Cli, trace: Path, action: list[str]) -> None:
    part = next((trace / "events").iterdir())
    part.write_bytes(part.read_bytes()[:1000])
    done = cli("trace", action[0], str(trace), *action[1:])
    refused(done, f"the events of {trace} are damaged")
    assert "qvis trace attribute" in done.stderr


def test_raw_files_that_are_damaged(cli: Cli, trace: Path) -> None:
    """Nothing is replaced by half of something."""
    events = {path.name: path.read_bytes() for path in (trace / "events").iterdir()}
    (trace / "raw" / "vcpu-0000.bin").write_bytes(b"damaged " * 100)
    done = cli("trace", "attribute", str(trace))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "vcpu-0000.bin is no recording of the tracer" in done.stderr
    assert {path.name: path.read_bytes() for path in (trace / "events").iterdir()} == events
    assert sorted(path.name for path in trace.iterdir()) == ["events", "manifest.json", "raw"]


def test_trace_of_an_unknown_recorder(cli: Cli, trace: Path) -> None:
    data = json.loads((trace / "manifest.json").read_text())
    change(trace, provenance={**data["provenance"], "reader": "stone tablets"})
    refused(cli("trace", "attribute", str(trace)), "nothing here reads what 'stone tablets'")


# What was recorded


def test_stats(cli: Cli, recorded: Path) -> None:
    done = cli("trace", "stats", str(recorded), "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["manifest"]["status"] == 5
    assert found["manifest"]["machine"] == "traced"
    touched = {(t["device"], t["register"], t["write"]): t for t in found["stats"]["touched"]}
    assert touched["blk0", "QueueNotify", True]["count"] == REQUESTS
    assert touched["blk0", "InterruptStatus", False]["count"] == REQUESTS
    assert touched["blk0", "InterruptACK", True]["cause"] == "acknowledge"
    assert found["stats"]["events"] == found["manifest"]["events"]
    text = cli("trace", "stats", str(recorded)).stdout
    assert f"{found['manifest']['events']:,} events in" in text
    assert "clock: instructions" in text
    assert "of cause other: 0.00%" in text


def test_show(cli: Cli, recorded: Path) -> None:
    done = cli("trace", "show", str(recorded), "--device", "blk0", "--cause", "acknowledge")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(lines) == 1 + REQUESTS
    assert all("InterruptACK" in line and "write" in line for line in lines[1:])
    few = cli("trace", "show", str(recorded), "--limit", "3")
    assert len(few.stdout.splitlines()) == 4
    assert "--limit 0 shows all" in few.stderr
    every = cli("trace", "show", str(recorded), "--limit", "0")
    assert len(every.stdout.splitlines()) == 1 + Trace.open(recorded).manifest.events
    assert every.stderr == ""
    none = cli("trace", "show", str(recorded), "--device", "toaster")
    assert none.returncode == 0


def test_export(cli: Cli, trace: Path) -> None:
    count = Trace.open(trace).manifest.events
    for kind, suffix in (("jsonl", ".jsonl"), ("csv", ".csv"), ("perfetto", ".pftrace"),
                         ("html", ".html")):  # fmt: skip
        done = cli("trace", "export", str(trace), kind)
        assert done.returncode == 0, done.stderr
        path = trace.with_name(f"copy{suffix}")
        assert done.stdout == f"{path}\n"
        assert path.stat().st_size > 1000
    assert len((trace.parent / "copy.jsonl").read_text().splitlines()) == count
    with (trace.parent / "copy.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == count + 1
    done = cli("trace", "export", str(trace), "csv", "-o", str(trace.parent / "absent" / "x"))
    refused(done, "absent")


def test_attribute_makes_the_same_again(cli: Cli, trace: Path) -> None:
    before = Trace.open(trace)
    rows = before.events().collect()
    shutil.rmtree(trace / "events")
    done = cli("trace", "attribute", str(trace))
    assert done.returncode == 0
    assert f"{before.manifest.events:,} events" in done.stderr
    after = Trace.open(trace)
    assert after.manifest == before.manifest
    assert after.events().collect().equals(rows)


def test_partial_is_said_every_time(cli: Cli, trace: Path) -> None:
    change(trace, partial=["the moon was in the way"])
    for action in (["show"], ["stats"], ["export", "csv"], ["attribute"]):
        done = cli("trace", action[0], str(trace), *action[1:])
        assert done.returncode == 0
        assert "qvis: partial: the moon was in the way" in done.stderr


def test_default_output(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first number that is free, in the folder one is in; options on both sides of NAME."""
    (tmp_path / "few-1.trace").mkdir()
    monkeypatch.chdir(tmp_path)
    with qvis.up(backend="tcg", transport="msi", smp=1, queues=1, name="few"):
        done = cli("trace", "--deadline", "30", "few", "--", "true")
        assert done.returncode == 0, done.stderr
        assert Trace.open(tmp_path / "few-2.trace").manifest.command == "true"
        late = cli("trace", "few", "--deadline", "0.5", "--", "sleep", "20")
    assert late.returncode == 125
    assert "did not end within" in late.stderr
    assert "few-3.trace" in late.stderr
    assert "Traceback" not in late.stderr
    assert len(Trace.open(tmp_path / "few-3.trace").manifest.partial) == 1
