# SPDX-License-Identifier: GPL-2.0-or-later
"""Exact counts kept in a file, the runs that are held against it, and the patch to blame."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from qvis.backends.nested import Nested
from qvis.backends.qemu import Accelerator
from qvis.backends.tcg import Tcg
from qvis.build.series import Patch
from qvis.errors import GuestError, UsageError
from qvis.experiments import bisect as bisecting
from qvis.experiments.bisect import bisect, search
from qvis.experiments.gate import (
    Cell,
    Change,
    Counts,
    Golden,
    Shape,
    check,
    counts_of,
    differences,
    measure,
    record,
    with_kernels,
)
from qvis.experiments.scripted import COUNTS, chosen, cut, phases, script
from qvis.spec import MachineSpec
from qvis.trace.model import SCHEMA, Cause, Kind, Space
from qvis.trace.store import Provenance, Trace
from qvis.transport import Transport
from tests.trace.synthetic import provenance, store

SHAPE = Shape("tcg", 3, 256, 3)
OPERATIONS = {"interrupt": 100, "mask": 5}
NOTIFY = Cell("blk0", "QueueNotify", "write", "notify", "access", "", "")
STATUS = Cell("blk0", "InterruptStatus", "read", "interrupt status", "access", "", "")
MASK = Cell("blk0", "MsiVector", "write", "mask", "access", "", "")
SERIAL = 0x3F8


def counts(*cells: tuple[Cell, int], background: int = 7) -> Counts:
    return Counts(dict(cells), background, {"delivery to EOI": 120.0})


def usual() -> dict[str, Counts]:
    return {"interrupt": counts((NOTIFY, 100)), "mask": counts((MASK, 5))}


def runs(*results: dict[str, Counts], **source: Any) -> Callable[..., Any]:
    """Runs that never were: the first result first, and the last one ever after."""
    left = list(results)

    def run(
        shape: Shape, transport: Transport, operations: Mapping[str, int]
    ) -> tuple[dict[str, Counts], Provenance]:
        found = left.pop(0) if len(left) > 1 else left[0]
        return found, provenance(str(transport), **source)

    return run


def golden(**changes: Any) -> Golden:
    made, _ = record(SHAPE, [Transport.MSI], OPERATIONS, runs(usual()))
    return dataclasses.replace(made, **changes)


# --- the file ---


def test_a_file_has_what_was_recorded(tmp_path: Path) -> None:
    golden().save(tmp_path / "g")
    assert Golden.load(tmp_path / "g") == golden()


def test_a_changed_count_changes_its_line_and_the_total(tmp_path: Path) -> None:
    more = {**usual(), "interrupt": counts((NOTIFY, 101))}
    golden().save(tmp_path / "a")
    golden(counts={Transport.MSI: more}).save(tmp_path / "b")
    lines = [(tmp_path / name).read_text().splitlines() for name in "ab"]
    differ = [(a, b) for a, b in zip(*lines, strict=True) if a != b]
    assert len(differ) == 2
    assert "QueueNotify" in differ[0][0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: d.update(format=99), "format 99"),
        (lambda d: d.pop("operations"), "damaged, or no file"),
        (lambda d: d["operations"].update(dance=1), "no operation 'dance'"),
        (lambda d: d["operations"].update(interrupt=0), "cannot be done 0 times"),
        (lambda d: d["operations"].update(unmask=5), "other operations"),
        (lambda d: d.update(transports={}), "no transport"),
        (lambda d: d["transports"].update(smoke={}), "unknown transport"),
        (lambda d: d["shape"].update(smp=0), "--smp"),
        (lambda d: d["shape"].update(colour="red"), "colour"),
        (lambda d: d["transports"]["msi"]["mask"].update(total=6), "do not add up"),
        (lambda d: d["transports"]["msi"]["mask"]["cells"][0].update(count="5"), "no cell"),
        (lambda d: d["transports"]["msi"]["mask"]["cells"][0].update(size=4), "no cell"),
        (lambda d: d["transports"]["msi"]["mask"].pop("cells"), "cells"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], said: str
) -> None:
    file = tmp_path / "g"
    golden().save(file)
    data = json.loads(file.read_text())
    damage(data)
    file.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=said) as problem:
        Golden.load(file)
    assert "\n" not in problem.value.message
    assert str(file) in problem.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "{}"])
def test_another_file_is_neither_read_nor_replaced(tmp_path: Path, text: str) -> None:
    file = tmp_path / "notes"
    file.write_text(text)
    with pytest.raises(UsageError, match="no file of `qvis gate record`"):
        Golden.load(file)
    with pytest.raises(UsageError, match="no file of `qvis gate record`"):
        golden().save(file)
    assert file.read_text() == text


def test_a_file_of_another_version_can_be_recorded_anew(tmp_path: Path) -> None:
    file = tmp_path / "g"
    file.write_text('{"format": 0, "operations": {}, "transports": {}}')
    golden().save(file)
    assert Golden.load(file) == golden()


# --- recording and checking ---


def test_what_differs_between_two_runs_is_told() -> None:
    other = {**usual(), "mask": counts((MASK, 5), background=8)}
    _, changes = record(SHAPE, [Transport.MSI], OPERATIONS, runs(usual(), other))
    assert [(c.operation, c.cell, c.before, c.after) for c in changes] == [("mask", None, 7, 8)]
    assert record(SHAPE, [Transport.MSI], OPERATIONS, runs(usual()))[1] == []


def test_a_check_finds_what_is_more_and_less_and_new() -> None:
    now = {
        "interrupt": counts((NOTIFY, 90), (STATUS, 200)),
        "mask": counts((MASK, 10), background=9999),
    }
    _, changes = check(golden(), run=runs(now))
    # By how many more each time that the operation is done; what is less comes last.
    assert [(c.cell, c.before, c.after, c.each) for c in changes] == [
        (STATUS, 0, 200, 2.0),
        (MASK, 5, 10, 1.0),
        (NOTIFY, 100, 90, -0.1),
    ]


def test_a_check_is_not_decided_by_what_follows_the_time() -> None:
    now = {
        name: dataclasses.replace(each, background=99, medians={}) for name, each in usual().items()
    }
    assert check(golden(), run=runs(now))[1] == []


def test_counts_of_another_accelerator_or_reader_are_not_compared() -> None:
    with pytest.raises(UsageError, match="recorded with the accelerator"):
        check(golden(), run=runs(usual(), accelerator="tcg,thread=single,icount"))
    with pytest.raises(UsageError, match="recorded with the reader"):
        check(golden(), run=runs(usual(), reader="kvm-nested"))
    # That these are others is what a check is for.
    check(golden(), run=runs(usual(), qemu_series="1", linux_series="2", linux="7.0"))


def test_a_check_of_a_transport_that_the_file_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="no vis: msi"):
        check(golden(), [Transport.VIS], run=runs(usual()))


def test_changes_survive_json() -> None:
    now = {"interrupt": counts((NOTIFY, 90), (STATUS, 200)), "mask": counts()}
    _, changes = check(golden(), run=runs(now))
    assert [Change.from_json(json.loads(json.dumps(c.to_json()))) for c in changes] == changes


def test_kernels_that_were_built_elsewhere_take_the_places_of_ours(tmp_path: Path) -> None:
    for name in ("arch/x86/boot/bzImage", "vmlinux", ".config", "include/config/kernel.release"):
        with pytest.raises(UsageError, match=f"{name} is not there"):
            with_kernels("nested", tmp_path, None)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("6.13.0-rc1+\n")
    made = with_kernels("nested", None, tmp_path)
    assert isinstance(made, Nested)
    theirs = made.artifacts().host_linux
    assert theirs is not None
    assert (theirs.version, theirs.vmlinux) == ("6.13.0-rc1+", tmp_path / "vmlinux")
    made = with_kernels("nested", tmp_path, None)
    assert isinstance(made, Nested)
    assert made.artifacts().linux == theirs
    for name in ("tcg", "emulated"):
        with pytest.raises(UsageError, match=f"nested, not {name}"):
            with_kernels(name, tmp_path, None)


# --- the script and its phases ---


@pytest.mark.parametrize(
    ("operations", "said"),
    [
        ({}, "at least one"),
        ({"dance": 1}, "no operation 'dance'"),
        ({"mask": 0}, "cannot be done 0 times"),
        ({"boot": 2}, "cannot be done 2 times"),
        ({"mask": 1, "unmask": 2}, "equally often"),
    ],
)
def test_operations_that_cannot_be_are_refused(operations: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        chosen(operations)


def test_the_script_does_what_was_chosen_only() -> None:
    text = script(MachineSpec("m", smp=2, queues=2), {"interrupt": 12})
    assert "load 12\n" in text
    assert "unbind" not in text
    assert "phase mask" not in text
    assert "unbind" in script(MachineSpec("m"), COUNTS)


class Rows:
    """Events to be, in the order in which they are added."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, kind: Kind = Kind.ACCESS, **columns: Any) -> None:
        self.rows.append({"time": len(self.rows), "vcpu": 0, "kind": kind, **columns})

    def say(self, text: str, port: int = SERIAL) -> None:
        for byte in text.encode():
            self.add(space=Space.PORT, address=port, write=True, value=byte, device="serial",
                     register="serial", cause=Cause.CONSOLE)  # fmt: skip

    def phase(self, name: str) -> None:
        self.say(f"[    1.234567] qvis-phase: {name}\r\n")

    def touch(self, cell: Cell, times: int = 1, **columns: Any) -> None:
        for _ in range(times):
            self.add(Kind(cell.kind), space=Space.MEMORY, address=4096, device=cell.device,
                     register=cell.register, cause=Cause(cell.cause),
                     write=cell.direction == "write", **columns)  # fmt: skip

    def trace(self, folder: Path, **source: Any) -> Trace:
        frame = pl.DataFrame(self.rows, schema=SCHEMA)
        return store(folder, frame, provenance(**source))


def test_phases_are_cut_where_they_are_announced(tmp_path: Path) -> None:
    rows = Rows()
    rows.touch(STATUS)
    rows.add(space=Space.PORT, address=SERIAL + 3, write=True, value=0x83)
    rows.say("\x01\n")  # a divisor, and no text
    rows.add(space=Space.PORT, address=SERIAL + 3, write=True, value=0x03)
    rows.say("Linux version 6.12\r\n")
    for _ in range(2):
        rows.phase("mask")
        rows.touch(MASK, 2)
        rows.phase("unmask")
        rows.touch(NOTIFY)
    rows.phase("preparation")
    rows.touch(NOTIFY, 50)
    trace = rows.trace(tmp_path / "t")
    assert [p.operation for p in phases(trace)] == ["boot", "mask", "unmask", "mask", "unmask"]
    frames = cut(trace, {"boot": 1, "mask": 2, "unmask": 2})
    seen = {
        name: frame.filter(pl.col("device").cast(pl.String) == "blk0")
        .collect()["register"]
        .to_list()
        for name, frame in frames.items()
    }
    assert seen == {
        "boot": ["InterruptStatus"], "mask": ["MsiVector"] * 4, "unmask": ["QueueNotify"] * 2
    }  # fmt: skip


def test_a_guest_that_did_not_get_to_its_operations_has_no_counts(tmp_path: Path) -> None:
    rows = Rows()
    rows.touch(STATUS)
    with pytest.raises(GuestError, match="no phase"):
        phases(rows.trace(tmp_path / "none"))
    rows.phase("mask")
    with pytest.raises(GuestError, match="'mask' 1 times instead of 5"):
        cut(rows.trace(tmp_path / "few"), {"mask": 5})


def counted(tmp_path: Path, fill: Callable[[Rows], None], **source: Any) -> Counts:
    rows = Rows()
    rows.phase("interrupt")
    fill(rows)
    return counts_of(rows.trace(tmp_path / "t", **source), {"interrupt": 1})["interrupt"]


def test_timers_ipis_console_and_their_eois_are_background(tmp_path: Path) -> None:
    eoi = Cell("LAPIC", "EOI", "write", "EOI", "access", "", "")

    def fill(rows: Rows) -> None:
        rows.touch(Cell("LAPIC", "TimerInitial", "write", "timer", "access", "", ""))
        rows.touch(Cell("LAPIC", "ICR_Low", "write", "IPI", "access", "", ""))
        rows.say("x")
        rows.add(Kind.DELIVER, vector=0xEC, interrupt=1, clock=10)
        rows.touch(eoi, interrupt=1, clock=1000)
        rows.add(Kind.DELIVER, vector=0x22, interrupt=2, device="blk0", source="req.1", irq=57,
                 clock=2000)  # fmt: skip
        rows.touch(eoi, interrupt=2, clock=2120)

    found = counted(tmp_path, fill)
    taken = Cell("blk0", "req.1", "", "", "deliver", "", "")
    assert found.cells == {eoi: 1, taken: 1}
    assert found.total == 1
    assert found.background == 4
    assert found.medians == {"delivery to EOI": 120.0}


def test_exits_have_their_reason_and_tell_who_handled_them(tmp_path: Path) -> None:
    notify = dataclasses.replace(NOTIFY, kind="exit", reason="npf", user="user space")

    def fill(rows: Rows) -> None:
        rows.touch(notify, 2, reason="npf", user=True, duration=700)
        rows.touch(notify, 3, reason="npf", user=False, duration=700)  # an ioeventfd
        rows.add(Kind.EXIT, reason="hlt", user=False, duration=5)
        rows.add(Kind.EXIT, reason="npf", user=False, duration=5)
        rows.add(Kind.EXIT, reason="cpuid", user=False, duration=700)
        rows.add(Kind.DELIVER, vector=0x22, interrupt=1)  # whose, tracepoints do not know
        rows.touch(Cell("LAPIC", "EOI", "write", "EOI", "exit", "", ""), interrupt=1, reason="msr")
        rows.add(Kind.DELIVER, vector=0xEC, interrupt=2)
        rows.touch(Cell("LAPIC", "EOI", "write", "EOI", "exit", "", ""), interrupt=2, reason="msr")

    found = counted(tmp_path, fill, kvm=True)
    assert found.cells == {
        notify: 2,
        Cell("", "", "", "", "exit", "cpuid", "kernel"): 1,
        Cell("LAPIC", "EOI", "write", "EOI", "exit", "msr", ""): 1,
    }
    assert found.background == 6
    assert found.medians == {"exit": 700}


# --- bisecting ---

PATCHES = tuple(Patch(f"{n:04}.patch", f"Subject: [PATCH] no {n}\n".encode()) for n in range(1, 17))


class Series:
    """What each prefix's check says: by number of patches, cells and their counts, or None."""

    def __init__(self, says: Callable[[int], Mapping[Cell, int] | None]) -> None:
        self.says = says
        self.probed: list[int] = []

    def __call__(self, count: int, transports: Sequence[Transport]) -> Sequence[Change] | None:
        self.probed.append(count)
        now = self.says(count)
        if now is None:
            return None
        found = golden(counts={Transport.MSI: {**usual(), "interrupt": counts(*now.items())}})
        return differences(golden(), found)


def adds(at: int, cell: Cell = STATUS) -> Callable[[int], Mapping[Cell, int]]:
    """Patch ``at`` of them adds touches."""
    return lambda count: {NOTIFY: 100, cell: 100} if count >= at else {NOTIFY: 100}


@pytest.mark.parametrize("at", range(1, 17))
def test_the_patch_that_adds_an_access_is_named(at: int) -> None:
    series = Series(adds(at))
    found = search(PATCHES, series)
    assert (found.good, found.bad, found.suspects) == (at - 1, at, (PATCHES[at - 1],))
    assert [(c.cell, c.after) for c in found.changes] == [(STATUS, 100)]
    assert f"{at:04}.patch: no {at}" in found.lines()[1]
    assert len(series.probed) == len(set(series.probed)) <= 9


def test_prefixes_that_cannot_be_tested_are_stepped_over() -> None:
    broken = {15, 11, 9}
    series = Series(lambda count: None if count in broken else adds(10)(count))
    found = search(PATCHES, series)
    assert found.suspects == PATCHES[8:10]  # the ninth cannot be told from the tenth
    assert "cannot be tested" in found.lines()[0]


def test_prefixes_without_the_transport_do_not_mislead() -> None:
    """They have other counts, in the other direction, or elsewhere."""
    without = {Cell("IOAPIC", "IOWIN", "write", "mask", "access", "", ""): 300}
    series = Series(lambda count: without if count < 7 else adds(12)(count))
    assert search(PATCHES, series).suspects == (PATCHES[11],)


def test_a_later_patch_that_changes_the_count_further_is_not_the_first() -> None:
    def says(count: int) -> Mapping[Cell, int]:
        return {NOTIFY: 100 + 50 * (count >= 5) + 50 * (count >= 14)}

    assert search(PATCHES, Series(says)).suspects == (PATCHES[4],)


def test_what_only_went_away_is_found_too() -> None:
    found = search(PATCHES, Series(lambda count: {} if count >= 6 else {NOTIFY: 100}))
    assert found.suspects == (PATCHES[5],)


def test_nothing_is_looked_for_where_nothing_differs() -> None:
    series = Series(lambda count: {NOTIFY: 100})
    assert "nothing to find" in search(PATCHES, series).lines()[0]
    assert series.probed == [16]


@pytest.mark.parametrize(
    ("says", "good", "said"),
    [
        (lambda count: None, None, "with all patches"),
        (adds(0), None, "another series"),
        (adds(5), 7, "has the change already"),
        (lambda count: None if count == 3 else adds(5)(count), 3, "cannot be tested"),
    ],
)
def test_a_search_that_cannot_succeed_says_why(
    says: Callable[[int], Mapping[Cell, int] | None], good: int | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        search(PATCHES, Series(says), good)


def test_a_good_prefix_can_be_named() -> None:
    series = Series(adds(5))
    assert search(PATCHES, series, 3).suspects == (PATCHES[4],)
    assert min(series.probed) == 3


def test_each_probe_sees_its_prefix_of_the_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "patches"
    (root / "linux").mkdir(parents=True)
    (root / "qemu").mkdir()
    for patch in PATCHES:
        (root / "linux" / patch.name).write_bytes(patch.content)
    whole = "".join(f"{patch.name}\n" for patch in PATCHES)
    (root / "linux" / "series").write_text(whole)
    (root / "qemu" / "series").write_text("")
    monkeypatch.setenv("QVIS_PATCHES", str(root))
    golden().save(tmp_path / "g")
    seen = []

    def fake(file: Path, patches: Path, transports: Iterable[Transport]) -> Sequence[Change]:
        count = len((patches / "linux" / "series").read_text().split())
        seen.append((count, list(transports)))
        return Series(adds(4))(count, ()) or ()

    monkeypatch.setattr(bisecting, "_check", fake)
    assert bisect(tmp_path / "g", "linux").suspects == (PATCHES[3],)
    assert seen[0] == (16, [])
    assert all(transports == [Transport.MSI] for _, transports in seen[1:])
    assert (root / "linux" / "series").read_text() == whole

    with pytest.raises(UsageError, match="no patch of KVM"):
        bisect(tmp_path / "g", "kvm")
    with pytest.raises(UsageError, match="has no patches"):
        bisect(tmp_path / "g", "qemu")
    with pytest.raises(UsageError, match="--good must be between 0 and 15"):
        bisect(tmp_path / "g", "linux", good=16)


# --- a real guest ---


class FewerQueues(Tcg):
    """A guest whose driver uses two queues of its disk, however many there are."""

    def accelerator(self, spec: MachineSpec) -> Accelerator:
        usual = super().accelerator(spec)
        more = f"{usual.kernel_options} virtio_blk.num_request_queues=2"
        return dataclasses.replace(usual, kernel_options=more)


def test_a_real_guest_has_the_same_counts_again_and_others_when_it_is_changed() -> None:
    """The recording is two runs already."""
    operations = {"interrupt": 20, "mask": 3, "unmask": 3, "set-up": 1}
    recorded, changes = record(SHAPE, [Transport.MSI], operations)
    assert [change for change in changes if change.cell] == []
    counts = recorded.counts[Transport.MSI]
    assert counts["interrupt"].cells[NOTIFY] == 20
    assert counts["interrupt"].cells[Cell("blk0", "req.1", "", "", "deliver", "", "")] == 20
    assert counts["mask"].cells == {MASK: 3}
    assert sum(counts["unmask"].cells.values()) == 3
    _, changes = check(recorded, run=partial(measure, backend=FewerQueues()))
    enable = Cell("blk0", "QueueReady", "write", "set-up", "access", "", "")
    assert ("set-up", 3, 2) in {
        (c.operation, c.before, c.after) for c in changes if c.cell == enable
    }
