# SPDX-License-Identifier: GPL-2.0-or-later
"""`qvis gate`: its exit statuses, which others decide by, and what it prints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qvis.errors import BootError, BuildError, InfraError, LostMachineError, QvisError
from qvis.experiments import bisect as bisecting
from qvis.experiments import gate
from qvis.experiments.gate import Cell
from qvis.trace.store import Trace
from tests.cli.conftest import Cli
from tests.experiments.test_gate import MASK, NOTIFY, Rows

STATUS = Cell("blk0", "InterruptStatus", "read", "interrupt status", "access", "", "")
TIMER = Cell("LAPIC", "TimerInitial", "write", "timer", "access", "", "")
SMALL = ("--backend", "tcg", "--op", "interrupt", "--op", "mask", "--transports", "intx")


@pytest.fixture
def cli(in_process: Cli) -> Cli:
    return in_process


class Guests:
    """Recordings of guests that never were, each of which touches as often as it is told."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.reads = 0  # of the interrupt status for each interrupt
        self.drifts = False  # whether each guest notifies once more than the last one
        self.ticks = False  # whether each has a timer's interrupt more than the last one
        self.fails: QvisError | None = None
        self.status = 0
        self.partial: tuple[str, ...] = ()

    def record_boot(self, output: Path, text: str, **machine: Any) -> tuple[Trace, int]:
        self.asked.append(machine)
        if self.fails:
            raise self.fails
        rows = Rows()
        for number in range(10):
            rows.phase("mask")
            rows.touch(MASK)
            rows.phase("preparation" if number < 9 else "interrupt")
        rows.touch(NOTIFY, 200 + self.drifts * len(self.asked))
        rows.touch(STATUS, 200 * self.reads)
        rows.touch(TIMER, self.ticks * len(self.asked))
        trace = rows.trace(output)
        manifest = dataclasses.replace(trace.manifest, partial=self.partial)
        return Trace(output, manifest), self.status


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> Guests:
    made = Guests()
    monkeypatch.setattr(gate, "record_boot", made.record_boot)
    return made


@pytest.fixture
def recorded(tmp_path: Path, cli: Cli, guests: Guests) -> str:
    file = tmp_path / "golden.json"
    done = cli("gate", "record", str(file), *SMALL, "--smp", "3", "--memory", "256M")
    assert done.returncode == 0
    assert "200" in done.stdout
    assert len(guests.asked) == 2
    asked = guests.asked[0]
    assert (asked["smp"], asked["memory"], asked["backend"], asked["icount"]) == (
        3, 256, "tcg", True,
    )  # fmt: skip
    return str(file)


def test_the_same_counts_are_status_0(cli: Cli, guests: Guests, recorded: str) -> None:
    done = cli("gate", "check", recorded)
    assert (done.returncode, done.stdout.splitlines()[0]) == (
        0, f"all 2 counts are those of {recorded}",
    )  # fmt: skip
    assert guests.asked[-1]["smp"] == 3  # the file's


def test_an_access_that_was_added_is_status_1_and_named(
    cli: Cli, guests: Guests, recorded: str
) -> None:
    guests.reads = 2
    done = cli("gate", "check", recorded)
    assert done.returncode == 1
    row = next(line for line in done.stdout.splitlines() if "InterruptStatus" in line)
    assert " ".join(row.split()) == (
        "interrupt intx blk0 InterruptStatus read interrupt status 0 -> 400 +2"
    )
    done = cli("gate", "check", recorded, "--json")
    assert done.returncode == 1
    change = json.loads(done.stdout)["changes"][0]
    assert (change["register"], change["before"], change["after"]) == ("InterruptStatus", 0, 400)


def test_what_is_not_the_same_twice_is_not_recorded(
    cli: Cli, guests: Guests, tmp_path: Path
) -> None:
    guests.drifts = True
    done = cli("gate", "record", str(tmp_path / "g"), *SMALL)
    assert done.returncode == 1
    assert "two runs differ" in done.stdout
    assert "QueueNotify" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_timers_that_differ_are_noted_and_the_rest_is_recorded(
    cli: Cli, guests: Guests, tmp_path: Path
) -> None:
    guests.ticks = True
    done = cli("gate", "record", str(tmp_path / "g"), *SMALL)
    assert done.returncode == 0
    assert "timers, IPIs, console, halts were not the same twice" in done.stderr
    done = cli("gate", "check", str(tmp_path / "g"))
    assert done.returncode == 0
    assert "not decisive" in done.stdout


@pytest.mark.parametrize(
    ("problem", "status"),
    [
        (BuildError("no", stage="build linux"), 125),
        (BootError("a panic", stage="kernel"), 125),
        (LostMachineError("gone"), 125),
        (InfraError("QEMU knows no such property", stage="launch"), 125),
        (InfraError("the disk is full", stage="build linux"), 122),
    ],
)
def test_what_cannot_be_tested_is_told_from_a_host_that_cannot_test(
    cli: Cli, guests: Guests, recorded: str, problem: QvisError, status: int
) -> None:
    guests.fails = problem
    done = cli("gate", "check", recorded)
    assert done.returncode == status
    assert problem.message in done.stderr


def test_a_script_that_fails_cannot_be_tested_and_its_trace_stays(
    cli: Cli, guests: Guests, recorded: str
) -> None:
    guests.status = 1
    done = cli("gate", "check", recorded)
    assert done.returncode == 125
    assert "ended with status 1" in done.stderr
    kept = Path(done.stderr.partition("logs: ")[2].strip())
    assert kept.is_dir()
    assert kept.parent.name.startswith("qvis-gate-")
    shutil.rmtree(kept.parent)


def test_a_partial_trace_is_no_verdict(cli: Cli, guests: Guests, recorded: str) -> None:
    guests.partial = ("7 events were lost",)
    done = cli("gate", "check", recorded)
    assert done.returncode == 122
    assert "7 events were lost" in done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gate", "required"),
        ("gate record", "required"),
        ("gate guess FILE", "invalid choice"),
        ("gate record FILE --op dance", "no operation 'dance'"),
        ("gate record FILE --transports smoke", "unknown transport 'smoke'"),
        ("gate record FILE --transports msi,msi", "each transport once"),
        ("gate record FILE --smp 0", "--smp"),
        ("gate record NOTES", "no file of `qvis gate record`"),
        ("gate check NOTES", "no file of `qvis gate record`"),
        ("gate check ABSENT", "cannot read"),
        ("gate check FILE --transports vis", "the file has no vis: intx"),
        ("gate check FILE --linux NOTES", "nested, not tcg"),
        ("gate check FILE --host-linux NOTES", "nested, not tcg"),
        ("gate bisect FILE", "--series"),
        ("gate bisect FILE --series linux --good 999", "--good must be between"),
        ("gate bisect FILE --series kvm", "no patch of KVM"),
    ],
)
def test_bad_usage_is_one_line_and_boots_nothing(
    cli: Cli, guests: Guests, recorded: str, tmp_path: Path, line: str, said: str
) -> None:
    (tmp_path / "notes").write_text("dear diary")
    before = len(guests.asked)
    places = {"FILE": recorded, "NOTES": str(tmp_path / "notes"), "ABSENT": str(tmp_path / "no")}
    done = cli(*(places.get(word, word) for word in line.split()))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert len(guests.asked) == before


def test_a_patch_that_does_not_apply_cannot_be_tested(
    tmp_path: Path, recorded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a bisection's probe does with a prefix that is broken: by a process of its own."""
    for component in ("linux", "qemu"):
        (tmp_path / "p" / component).mkdir(parents=True)
        (tmp_path / "p" / component / "series").write_text("0001-absent.patch\n")
    assert bisecting._check(Path(recorded), tmp_path / "p", ()) is None


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("check", "FILE", "--smp", "3"), "--smp"),
        (("check", "FILE", "--backend", "tcg"), "--backend"),
        (("record", "FILE", "--json"), "--json"),
        (("bisect", "FILE", "--series", "qemu", "--op", "boot"), "--op"),
    ],
)
def test_an_option_of_another_action_is_refused(
    cli: Cli, tmp_path: Path, words: tuple[str, ...], option: str
) -> None:
    file = str(tmp_path / "counts.json")
    done = cli("gate", *(file if word == "FILE" else word for word in words))
    assert done.returncode == 2
    assert f"{option} is not for `qvis gate {words[0]}`" in done.stderr


def test_a_place_that_cannot_be_written_is_refused_before_anything_boots(
    cli: Cli, tmp_path: Path
) -> None:
    done = cli("gate", "record", str(tmp_path / "nowhere" / "counts.json"))
    assert done.returncode == 2
    assert "its folder is not there" in done.stderr
