# SPDX-License-Identifier: GPL-2.0-or-later
"""Sweeps: what is measured, where, and what is left when they are killed."""

from __future__ import annotations

import csv
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qvis.emulated.costs import EXITS, STEPS, Cost, Costs, Handler, Reason
from qvis.emulated.lapic import LocalApic
from qvis.emulated.recorder import NAMES, NOBODY, RowKind, what
from qvis.errors import InfraError, UsageError
from qvis.experiments.grid import LARGEST, Grid, Point
from qvis.experiments.offered import Interrupts, measure
from qvis.experiments.sweep import CSV, RESULTS, Outcome, attempt, sweep

Cli = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).parents[2]
COSTS = Costs(
    {kind: Cost(1000, "made up") for kind in EXITS}, {s: Cost(10, "made up") for s in STEPS}
)
NUMBERS = ",".join(map(str, range(1, 102)))
TWELVE = {"smp": "1,2,3", "rate": "1000,2000,3000,4000", "transport": "msi"}
MANY = {**TWELVE, "queues": "1,2,3,4"}


def fake(point: Point, costs: Costs) -> dict[str, Any]:
    """A point that takes no time."""
    return {"interrupts": point.requests, "pid": os.getpid(), "delivered": [1] * point.smp}


def slow(point: Point, costs: Costs) -> dict[str, Any]:
    time.sleep(0.1)
    return fake(point, costs)


def failing(point: Point, costs: Costs) -> dict[str, Any]:
    if point.smp == 2:
        raise ZeroDivisionError("two\nlines")
    return fake(point, costs)


def dying(point: Point, costs: Costs) -> dict[str, Any]:
    if point.smp == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return fake(point, costs)


def drive(folder: str, room: int | None = None) -> None:
    """A sweep in a process of its own, whose files have no more ``room`` than that."""
    if room:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        sweep(Path(folder), Grid.parse(MANY, 10), costs=COSTS, jobs=2, measure=slow)
    except KeyboardInterrupt:
        sys.exit(130)
    except InfraError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.exit_code)


@pytest.fixture
def cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A Dask scheduler's address, and the processes: the scheduler, a worker, another."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("qvis.experiments.engine.DEADLINE", 60.0)
    file = tmp_path / "scheduler.json"
    common = ["--no-dashboard", "--scheduler-file", str(file)]
    dask = [sys.executable, "-m", "distributed.cli.dask_{}"]
    scheduler = ["--port", "0", "--host", "127.0.0.1"]
    worker = ["--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path / "dask")]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for role, options in (("scheduler", scheduler), ("worker", worker), ("worker", worker)):
            command = [word.format(role) for word in dask] + common + options
            started.append(
                subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ)
            )
            while not file.exists() or not file.read_text():
                assert started[0].poll() is None
                time.sleep(0.02)
        address = json.loads(file.read_text())["address"]
        with distributed.Client(address, set_as_default=False, timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
        yield address, started
    finally:
        for process in started:
            process.kill()
            process.wait()


def run(folder: Path, lists: dict[str, str] = TWELVE, **more: Any) -> Outcome:
    return sweep(
        folder, Grid.parse(lists, 10), **{"costs": COSTS, "jobs": 2, "measure": fake, **more}
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines that are there."""
    try:
        text = (folder / RESULTS).read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A sweep in ``tmp_path`` that has begun to give results."""
    code = f"from tests.experiments.test_sweep import drive; drive({str(tmp_path)!r})"
    driver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE
    )
    while len(lines(tmp_path)) < 2:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.01)
    yield driver
    driver.wait(10)
    assert ended(driver.pid), "processes of the sweep are left"
    driver.communicate()


def ended(group: int) -> bool:
    """Whether no process of that group runs any more, within some seconds."""
    end = time.monotonic() + 10
    while left := running(group):
        if time.monotonic() > end:
            for process in left:
                os.kill(process, signal.SIGKILL)
            return False
        time.sleep(0.02)
    return True


def running(group: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(its_group) == group and state != "Z":  # who reaps orphans may take its time
            found.append(int(stat.parent.name))
    return found


def test_a_grid_is_all_combinations_without_those_that_cannot_be() -> None:
    lists = {"irqchip": "on,off", "apic": "xapic,x2apic", "apicv": "on,off", "smp": "1,256"}
    points = list(Grid.parse({**lists, "transport": "msi,msi"}, 10).points())
    assert len(points) == len(set(points))
    on = [p for p in points if p.irqchip == "on"]
    assert {(p.apic, p.smp) for p in on} == {("xapic", 1), ("x2apic", 1), ("x2apic", 256)}
    assert len(on) == 6
    assert [(p.apic, p.apicv, p.smp) for p in points if p.irqchip == "off"] == [("xapic", False, 1)]


@pytest.mark.parametrize(
    ("lists", "says"),
    [
        ({"transport": "isa"}, "unknown transport 'isa': choose one of pci"),
        ({"apic": "sapic"}, "unknown apic 'sapic': choose one of xapic, x2apic"),
        ({"smp": "1,many"}, "--smp: 'many' is no whole number"),
        ({"smp": "0"}, "--smp must be between 1 and 1024, not 0"),
        ({"rate": "1e3"}, "--rate: '1e3' is no whole number"),
        ({"queues": ""}, "--queues: a value is missing"),
        ({"queues": "1,,2"}, "--queues: a value is missing"),
        ({"pv-eoi": "yes"}, "--pv-eoi: 'yes' is neither on nor off"),
        ({"irqchip": "off", "apicv": "on"}, "no such machine"),
        (dict.fromkeys(("smp", "queues", "rate"), NUMBERS), "1030301 points: 100000 is the most"),
    ],
)  # fmt: skip
def test_a_bad_list_is_one_line(lists: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError) as problem:
        Grid.parse({"transport": "msi", **lists}, 10)
    assert says in str(problem.value)
    assert "\n" not in str(problem.value)


def test_requests_are_bounded() -> None:
    for requests in (0, -1, 10**9):
        with pytest.raises(UsageError, match="--requests must be between"):
            Grid.parse({}, requests)
    assert LARGEST == 100_000


def test_points_are_measured_by_other_processes_once(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert [line["smp"] for line in first.lines] == [1] * 4 + [2] * 4 + [3] * 4
    assert first.measured == 12
    assert os.getpid() not in {line["pid"] for line in first.lines}
    again = run(tmp_path)
    assert (again.measured, again.lines) == (0, first.lines)
    larger = run(tmp_path, {**TWELVE, "smp": "3,4"})
    assert larger.measured == 4
    assert larger.lines[:4] == first.lines[8:]
    assert len(lines(tmp_path)) == 16


def test_other_costs_are_other_points(tmp_path: Path) -> None:
    run(tmp_path)
    said_by_others = Costs({kind: Cost(1000, "x") for kind in EXITS}, COSTS.steps)
    assert run(tmp_path, costs=said_by_others).measured == 0
    dearer = Costs({kind: Cost(1001, "x") for kind in EXITS}, COSTS.steps)
    assert run(tmp_path, costs=dearer).measured == 12


def test_another_model_has_other_points_and_refuses_to_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = next(Grid.parse({}, 10).points())
    with pytest.raises(InfraError, match="has another qvis: its model is"):
        attempt(fake, point, COSTS, "0123456789abcdef")
    monkeypatch.setattr("qvis.experiments.offered.identity", lambda: "0123456789abcdef")
    with pytest.raises(InfraError, match="has another qvis"):  # the workers have the real one
        run(tmp_path)


def test_a_table_is_left_for_other_programs(tmp_path: Path) -> None:
    run(tmp_path)
    with (tmp_path / CSV).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert (rows[-1]["smp"], rows[-1]["rate"], rows[-1]["delivered"]) == ("3", "4000", "1 1 1")


def test_a_point_that_fails_is_recorded_and_tried_again(tmp_path: Path) -> None:
    outcome = run(tmp_path, measure=failing)
    assert outcome.failed == 4
    errors = {line["error"] for line in outcome.lines if line["smp"] == 2}
    assert errors == {"ZeroDivisionError('two\\nlines')"}
    assert all(line["interrupts"] == 10 for line in outcome.lines if line["smp"] != 2)
    again = run(tmp_path)
    assert (again.measured, again.failed) == (4, 0)


def test_a_worker_that_is_killed_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(InfraError, match="a worker was killed"):
        run(tmp_path, measure=dying, jobs=1)
    kept = len(lines(tmp_path))
    assert run(tmp_path).measured == 12 - kept


def test_after_a_kill_only_what_is_missing_is_done(
    tmp_path: Path, driven: subprocess.Popen[bytes]
) -> None:
    driven.kill()
    assert ended(driven.pid), "the workers outlived the sweep"
    kept = lines(tmp_path)
    assert 2 <= len(kept) < 48
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"key": "0123')
    outcome = run(tmp_path, MANY)
    assert outcome.measured == 48 - len(kept)
    assert len(lines(tmp_path)) == 48
    assert lines(tmp_path)[: len(kept)] == kept


@pytest.mark.parametrize("whole_group", [True, False])
def test_an_interrupt_ends_the_workers_and_keeps_what_is_done(
    tmp_path: Path, driven: subprocess.Popen[bytes], whole_group: bool
) -> None:
    (os.killpg if whole_group else os.kill)(driven.pid, signal.SIGINT)
    assert driven.wait(10) == 130
    assert driven.stderr is not None
    assert b"Traceback" not in driven.stderr.read()
    kept = lines(tmp_path)
    assert 2 <= len(kept) < 48
    assert run(tmp_path, MANY).measured == 48 - len(kept)


def test_two_sweeps_of_one_folder_are_refused(
    tmp_path: Path, driven: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(UsageError, match="another sweep works in"):
        run(tmp_path)
    driven.kill()


def test_damaged_results_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(UsageError, match=r"results.jsonl is damaged in line 2"):
        run(tmp_path)
    assert "nonsense" in (tmp_path / RESULTS).read_text()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(InfraError, match="cannot write in"):
            run(folder)


def test_a_disk_that_fills_up_is_one_line(tmp_path: Path) -> None:
    code = f"from tests.experiments.test_sweep import drive; drive({str(tmp_path)!r}, 1000)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 122
    assert "cannot write" in done.stderr
    kept = lines(tmp_path)
    assert 0 < len(kept) < 48
    assert run(tmp_path, MANY).measured == 48 - len(kept)


def test_a_cluster_gives_what_this_host_gives(
    tmp_path: Path, cluster: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    address, started = cluster
    lists = {"transport": "intx,vis", "smp": "1,2"}
    far = run(tmp_path / "far", lists, scheduler=address, jobs=None, measure=measure)
    near = run(tmp_path / "near", lists, measure=measure)
    for line in (*far.lines, *near.lines):
        assert line.pop("host seconds") > 0
        assert "error" not in line
    assert far.lines == near.lines
    pids = run(tmp_path / "pids", scheduler=address, jobs=None, measure=slow).lines
    assert {line["pid"] for line in pids} == {worker.pid for worker in started[1:]}


def test_a_cluster_that_loses_workers_and_its_scheduler(
    tmp_path: Path,
    cluster: tuple[str, list[subprocess.Popen[bytes]]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    address, (scheduler, worker, _) = cluster
    threading.Timer(0.3, worker.kill).start()
    outcome = run(tmp_path / "one", scheduler=address, jobs=None, measure=slow)
    assert (outcome.measured, outcome.failed) == (12, 0)

    def kill_later() -> None:
        while len(lines(tmp_path / "two")) < 2:
            time.sleep(0.01)
        scheduler.kill()

    threading.Thread(target=kill_later).start()
    with pytest.raises(InfraError, match=f"the scheduler at {address} is gone"):
        run(tmp_path / "two", MANY, scheduler=address, jobs=None, measure=slow)
    kept = len(lines(tmp_path / "two"))
    assert 2 <= kept < 48
    assert run(tmp_path / "two", MANY).measured == 48 - kept
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("address", "error", "says"),
    [
        ("nonsense", UsageError, "bad scheduler 'nonsense'"),
        ("smoke://signal:1", UsageError, "bad scheduler 'smoke://signal:1'"),
        ("tcp://127.0.0.1:1", InfraError, "the scheduler at tcp://127.0.0.1:1 does not answer"),
    ],
)
def test_no_scheduler_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    error: type[Exception],
    says: str,
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("qvis.experiments.engine.DEADLINE", 0.5)
    with pytest.raises(error) as problem:
        run(tmp_path, scheduler=address, jobs=None)
    assert says in str(problem.value)
    assert "\n" not in str(problem.value)


def point(**changes: Any) -> dict[str, Any]:
    """The numbers of a machine with one vCPU and one queue, but for ``changes``."""
    lists = {"transport": "msi", "smp": "1", "queues": "1", "rate": "1000", **changes}
    return measure(next(Grid.parse(lists, 300).points()), Costs.load())


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, {"MSR_WRITE/kernel": 1}),
        ({"transport": "vis"}, {"MSR_WRITE/kernel": 1}),
        ({"apic": "xapic"}, {"APIC_ACCESS/fast": 1}),
        ({"apicv": "on"}, {}),
        ({"pv-eoi": "on"}, {}),
        ({"irqchip": "off", "apic": "xapic"}, {"EPT_MISCONFIG/user": 1}),
        # InterruptStatus, InterruptACK; TMR, then the EOI that goes on to the IOAPIC.
        (
            {"transport": "intx"},
            {"EPT_MISCONFIG/user": 2, "MSR_READ/kernel": 1, "MSR_WRITE/user": 1},
        ),
        ({"transport": "intx", "apicv": "on"}, {"EPT_MISCONFIG/user": 2, "EOI_INDUCED/user": 1}),
    ],
)
def test_what_exits_for_an_interrupt(changes: dict[str, str], reasons: dict[str, int]) -> None:
    found = point(**changes)
    assert (found["completed"], found["lost"]) == (300, 0)
    assert found["interrupts"] > 280
    exits = found["exits per interrupt by reason"]
    # Of the request, not the interrupt: its notification, and before and behind it a HLT.
    notify = exits.pop("EPT_MISCONFIG/kernel")
    assert notify == 1
    halts = sum(exits.pop(halt, 0) for halt in ("HLT/kernel", "HLT/user"))
    assert 1.9 < halts < 2.1
    assert exits == reasons
    every = found["exits per interrupt"]
    assert every["all"] == pytest.approx(sum(reasons.values()) + notify + halts)
    assert every["all"] == every["to user space"] + every["in KVM"]


def test_times_are_those_of_the_table() -> None:
    costs = Costs.load()
    since = point()["modelled cycles from raise"]
    delivery = costs.step("notify") + costs.step("wake")
    assert since["to delivery"]["median"] == delivery
    eoi = costs.step("entry") + costs.exit(Reason.MSR_WRITE, Handler.KERNEL)
    assert since["to EOI"]["median"] == delivery + eoi
    faster = point(apicv="on")["modelled cycles from raise"]
    assert faster["to EOI"]["median"] < since["to EOI"]["median"]


def test_interrupts_are_where_their_queues_are_and_the_same_each_time() -> None:
    shape = {"smp": "4", "queues": "4", "disks": "2", "rate": "100000"}
    found = point(**shape)
    assert len(found["delivered"]) == 4
    assert sum(found["delivered"]) == found["interrupts"]
    assert min(found["delivered"]) > 0
    assert point(**shape) == found


def test_more_than_a_machine_can_do_is_done_late_and_none_is_lost() -> None:
    found = point(rate="1000000000")
    assert (found["completed"], found["lost"]) == (300, 0)
    assert found["interrupts"] < 100  # one tells of many


def test_a_lost_interrupt_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    accept, calls = LocalApic.accept, itertools.count()

    def forgetful(apic: LocalApic, vector: int, level: bool) -> bool:
        return next(calls) != 150 and accept(apic, vector, level)

    monkeypatch.setattr(LocalApic, "accept", forgetful)
    found = point()
    assert found["lost"] > 0
    assert found["error"] == f"{found['lost']} requests were never completed"


def test_interrupts_are_followed_from_raise_to_end() -> None:
    NAMES.extend({"vring_interrupt", "apic_ack_edge"} - set(NAMES))
    handler, other = NAMES.index("vring_interrupt"), NAMES.index("apic_ack_edge")
    seen = Interrupts(2)
    rows = [
        (RowKind.RAISE, 1, 100, 0, 33),
        (RowKind.RAISE, 1, 150, 0, 33),  # merges with it
        (RowKind.RAISE, 0, 160, 0, 33),  # another CPU's
        (RowKind.DELIVER, 1, 200, 0, 33),
        (RowKind.RAISE, 1, 205, 0, 33),  # the next one
        (RowKind.FUNCTION, 1, 210, other, 70),
        (RowKind.EOI, 1, 220, 0, 33),
        (RowKind.FUNCTION, 1, 230, handler, 70),
        (RowKind.FUNCTION, 1, 240, handler, 71),
        (RowKind.DELIVER, 0, 250, 0, 236),  # a timer's
        (RowKind.EOI, 0, 260, 0, 236),
        (RowKind.DELIVER, 1, 300, 0, 33),
        (RowKind.FUNCTION, 1, 310, handler, 70),
        (RowKind.EOI, 1, 320, 0, 33),
        (RowKind.EOI, NOBODY, 320, 0, 33),
    ]
    for kind, *rest in rows:
        seen.add((what(kind), *rest, 0))
    seen.finish()
    assert (seen.delivered, seen.others) == ([0, 2], 1)
    assert seen.to_delivery == [100, 95]
    assert seen.to_handler == [130, 105]
    assert seen.to_eoi == [120, 115]


def test_the_verb(cli: Cli, tmp_path: Path) -> None:
    words = ["sweep", "-o", str(tmp_path), "--transport", "msi", "--smp", "1", "--requests", "20"]
    done = cli(*words, "--disks", "1,2", "--jobs", "1")
    assert done.returncode == 0
    assert "modelled cycles" in done.stdout
    assert "2 points: " in done.stdout
    done = cli(*words, "--disks", "2", "--json")
    (line,) = json.loads(done.stdout)
    assert (line["disks"], line["lost"], line["unit"]) == (2, 0, "modelled cycles")
    # As many vectors one CPU does not have.
    done = cli(*words, "--disks", "1024", "--jobs", "1")
    assert done.returncode == 122
    assert "1 of 1 points failed" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("sweep", "required: -o"),
        ("sweep -o x --smp", "expected one argument"),
        ("sweep -o x --transport isa", "unknown transport 'isa'"),
        ("sweep -o x --requests 0", "--requests must be between"),
        ("sweep -o x --jobs 0", "--jobs must be at least 1"),
        ("sweep -o x --jobs 1 --scheduler tcp://x:1", "not allowed with argument"),
        ("sweep -o x --costs /nonexistent", "cannot read /nonexistent"),
    ],
)
def test_bad_words_are_one_line(cli: Cli, words: str, says: str) -> None:
    done = cli(*words.split())
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path("x").exists()
