# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM's tracepoints become, against the kernel's own text read by other means."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from qvis.errors import UsageError
from qvis.trace import kvm, ringbuffer
from qvis.trace.kvm import Reader, Recording
from qvis.trace.model import SCHEMA, Clock, Kind, Space
from qvis.trace.ringbuffer import Format

from .recordings import NAMES, Line, data, page, payload, record, text, unpack

REQUESTS = {"msi": 200, "line": 60}
MARK = 0xFEB000F0
BEGIN, END = 0x1001, 0x2001
BASE = 0xFEB02E00  # of the virtio-mmio transport
VMX, SVM = 1, 2
FILLED_ELSEWHERE = ("device", "register", "cause", "source", "irq", "interrupt", "function")


def frame(raw: Path) -> pl.DataFrame:
    return pl.concat(Reader(raw).frames())


def rows(raw: Path, *columns: str) -> list[tuple[Any, ...]]:
    return frame(raw).select(columns).rows()


# The text, event by event, by a plain reading of what kvm.py promises.


@dataclass
class Thread:
    """What a thread of the text is in the middle of."""

    exit: dict[str, Any] | None = None
    injected: list[dict[str, Any]] = field(default_factory=list)
    apic: int | None = None  # register of a kvm_apic that something has to go with
    unsatisfied: dict[str, Any] | None = None


def expected(lines: list[Line], whole: int) -> list[dict[str, Any]]:
    """The rows that the text asks for, with the columns that are filled.

    Before the time ``whole`` events are missing.
    """
    threads: dict[int, Thread] = {}
    found: list[dict[str, Any]] = []
    cpus = {line.thread: int(m[1]) for line in lines if (m := re.match(r"vcpu (\d+)", line.words))}
    ids = [re.findall(r"0x[0-9a-f]+|\d+|[a-z_-]+", line.words) for line in lines]
    for line, words in zip(lines, ids, strict=True):
        thread = threads.setdefault(line.thread, Thread())
        row: dict[str, Any] = {"clock": line.time}
        if line.thread in cpus:
            row["vcpu"] = cpus[line.thread]
        if line.event == "kvm_exit":
            m = re.search(r"reason (\S+) rip (\S+)", line.words)
            assert m
            row |= {"kind": "exit", "reason": m[1], "pc": int(m[2], 16)}
            thread.exit = row
            found.append(row)
        elif line.event == "kvm_entry":
            m = re.search(r"rip (0x[0-9a-f]+)", line.words)
            assert m
            if thread.exit and thread.exit["clock"] >= whole:
                thread.exit["duration"] = line.time - thread.exit["clock"]
            for delivered in thread.injected:
                delivered["pc"] = int(m[1], 16)
            thread.exit, thread.injected = None, []
        elif line.event in ("kvm_mmio", "kvm_pio", "kvm_msr"):
            access = touched(line)
            if thread.unsatisfied and words[1] == "read":
                thread.unsatisfied["value"] = access["value"]
                thread.unsatisfied = None
                continue
            if thread.exit and "address" not in thread.exit:
                thread.exit |= access
                row = thread.exit
            else:
                row |= {"kind": "access", **access}
                found.append(row)
            if words[1] == "unsatisfied-read":
                thread.unsatisfied = row
                del row["value"]
        elif line.event == "kvm_apic_accept_irq":
            row |= {"kind": "raise", "vector": int(words[3]), "vcpu": int(words[1], 16)}
            found.append(row)
        elif line.event == "kvm_inj_virq":
            if "reinjected" in line.words or "Soft" in line.words:
                continue
            row |= {"kind": "deliver", "vector": int(words[-1], 16)}
            thread.injected.append(row)
            found.append(row)
        elif line.event == "kvm_eoi":
            row |= {"kind": "eoi", "vector": int(words[-1])}
            found.append(row)
    return found


def touched(line: Line) -> dict[str, Any]:
    """The access of a line of kvm_mmio, kvm_pio or kvm_msr."""
    if m := re.match(r"mmio (\S+) len (\d+) gpa (\S+) val (\S+)", line.words):
        space, size, address, value = "memory", int(m[2]), int(m[3], 16), int(m[4], 16)
        write = m[1] == "write"
    elif m := re.match(r"pio_(\w+) at (\S+) size (\d+) count \d+ val (\S+)", line.words):
        space, size, address, value = "port", int(m[3]), int(m[2], 16), int(m[4], 16)
        write = m[1] == "write"
    else:
        m = re.match(r"msr_(\w+) (\S+) = (\S+)", line.words)
        assert m
        space, size, address, value = "msr", 8, int(m[2], 16), int(m[3], 16)
        write = m[1] == "write"
    return {"space": space, "size": size, "address": address, "value": value, "write": write}


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_what_the_text_tells(name: str, tmp_path: Path) -> None:
    raw = unpack(name, tmp_path)
    got = frame(raw)
    assert got.schema == SCHEMA
    assert got["time"].is_sorted() and got["clock"].is_sorted()
    mine = [{k: v for k, v in row.items() if v is not None} for row in got.rows(named=True)]
    for row in mine:
        del row["time"]
    lines = sorted(text(raw), key=lambda line: (line.time, line.cpu))
    first = [next(line.time for line in lines if line.cpu == cpu) for cpu in (0, 1)]
    theirs = expected(lines, max(first) if name == "lost" else 0)
    assert mine == theirs
    assert all(got[column].null_count() == got.height for column in FILLED_ELSEWHERE)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_make_no_difference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = unpack(name, tmp_path)
    whole = frame(raw)
    monkeypatch.setattr(ringbuffer, "PAGES", 1)
    parts = list(Reader(raw).frames())
    assert len(parts) > 5 or name == "lost"
    assert pl.concat(parts).equals(whole)


def between_marks(raw: Path) -> pl.DataFrame:
    """What happened between the guest's two marks."""
    got = frame(raw)
    marks = got.filter(address=MARK)
    assert marks["value"].to_list() == [BEGIN, END] and marks["kind"].to_list() == ["exit"] * 2
    begin, end = marks["clock"]
    return got.filter((pl.col("clock") > begin) & (pl.col("clock") < end))


@pytest.mark.parametrize("name", REQUESTS)
def test_each_request_is_notified_raised_delivered_and_ended(name: str, tmp_path: Path) -> None:
    got = between_marks(unpack(name, tmp_path))
    number = REQUESTS[name]
    notify = got.filter(kind=Kind.EXIT, address=BASE + 0x50)
    assert len(notify) == number
    assert set(notify["reason"]) == {"npf"} and set(notify["write"]) == {True}
    # Vectors from 0xec on are Linux's own: timers and IPIs.
    device = got.filter(pl.col("vector") < 0xEC, kind=Kind.RAISE)
    raised = Counter(device.select("vcpu", "vector").rows())
    ((vcpu, vector),) = [key for key, count in raised.items() if count >= number]
    assert raised[vcpu, vector] == number
    assert vcpu == 0  # to which the guest had moved the interrupt
    delivered = got.filter(kind=Kind.DELIVER, vector=vector)
    assert len(delivered) == len(got.filter(kind=Kind.EOI, vector=vector))
    # Those raised while the previous one is pending are one with it.
    assert number * 0.9 <= len(delivered) <= number
    status = got.filter(pl.col("address") == BASE + 0x60)
    acknowledge = got.filter(pl.col("address") == BASE + 0x64)
    line = number if name == "line" else 0
    assert len(status) == len(acknowledge) == line
    assert set(status["value"]) <= {1} and set(status["write"]) <= {False}
    assert set(acknowledge["write"]) <= {True}


def test_what_is_told_twice_is_counted_once(tmp_path: Path) -> None:
    """What the module's docstring says of the events that are not used, in real recordings."""
    for name in NAMES:
        lines = sorted(text(unpack(name, tmp_path)), key=lambda line: (line.thread, line.time))
        for before, after in itertools.pairwise(lines):
            if after.event == "kvm_pv_eoi":
                assert (before.event, before.words) == ("kvm_eoi", after.words)
            if before.event == "kvm_msi_set_irq" and after.event == "kvm_apic_accept_irq":
                assert re.findall(r"vec (\d+)", before.words) == re.findall(
                    r"vec (\d+)", after.words
                )
        if name == "line":
            counts = Counter(line.event for line in lines)
            falling = [
                line for line in lines if line.event == "kvm_set_irq" and "level 0" in line.words
            ]
            assert counts["kvm_set_irq"] > counts["kvm_msi_set_irq"] and falling


def test_time_is_that_of_the_monotonic_clock(tmp_path: Path) -> None:
    raw = unpack("msi", tmp_path)
    reader = Reader(raw)
    assert reader.clock is Clock.TSC
    (ns, tsc), (last_ns, last_tsc) = reader.recording.pairs
    assert (last_tsc - tsc) / (last_ns - ns) == pytest.approx(2.596079, rel=1e-3)
    got = pl.concat(reader.frames())
    assert ns < got["time"][0] and got["time"][-1] < last_ns
    gone = (got["time"][-1] - got["time"][0]) / (got["clock"][-1] - got["clock"][0])
    assert gone == pytest.approx((last_ns - ns) / (last_tsc - tsc), rel=1e-6)


def test_nothing_is_lost_silently(tmp_path: Path) -> None:
    raw = unpack("lost", tmp_path)
    reader = Reader(raw)
    assert reader.lost == 3893 + 1273  # of stats
    for file in raw.glob("per_cpu/cpu*/stats"):
        file.unlink()
    reader = Reader(raw)
    list(reader.frames())
    assert reader.lost == 1 + 1273  # of the pages, one of which had no room for the number
    assert Reader(unpack("msi", tmp_path)).lost == 0


def exit_(time: int, reason: int, *, isa: int = VMX, thread: int = 11, cpu: int = 0) -> Any:
    fields = {"exit_reason": reason, "isa": isa, "guest_rip": 0x1000 + reason, "vcpu_id": cpu}
    return time, thread, "kvm_exit", fields


def entry(time: int, *, thread: int = 11, cpu: int = 0) -> Any:
    return time, thread, "kvm_entry", {"vcpu_id": cpu, "rip": 0x2000}


def other(time: int, event: str, thread: int = 11, **fields: int) -> Any:
    return time, thread, event, fields


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        (0, "EXCEPTION_NMI"),
        (1, "EXTERNAL_INTERRUPT"),
        (7, "INTERRUPT_WINDOW"),
        (10, "CPUID"),
        (12, "HLT"),
        (30, "IO_INSTRUCTION"),
        (31, "MSR_READ"),
        (32, "MSR_WRITE"),
        (44, "APIC_ACCESS"),
        (45, "EOI_INDUCED"),
        (48, "EPT_VIOLATION"),
        (49, "EPT_MISCONFIG"),
        (52, "PREEMPTION_TIMER"),
        (56, "APIC_WRITE"),
        (75, "NOTIFY"),
        (0x80000000 | 33, "INVALID_STATE FAILED_VMENTRY"),
        (0x77, "0x77"),
    ],
)
def test_names_of_intel(reason: int, name: str, tmp_path: Path) -> None:
    raw = record(tmp_path / "r", {0: [exit_(5, reason), entry(9)]})
    assert rows(raw, "reason", "duration", "clock", "time") == [(name, 4, 5, 5)]


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        (0x400, "npf"),
        (0x07B, "io"),
        (0x07C, "msr"),
        (0x078, "hlt"),
        (0x060, "interrupt"),
        (0x040 + 14, "PF excp"),
        (0x401, "avic_incomplete_ipi"),
        (0x402, "avic_unaccelerated_access"),
        (0x80000001, "vmgexit_mmio_read"),
        (0xFFFFFFFF, "invalid_guest_state"),
        (0x0A7, "0xa7"),
    ],
)
def test_names_of_amd(reason: int, name: str, tmp_path: Path) -> None:
    raw = record(tmp_path / "r", {0: [exit_(5, reason, isa=SVM)]})
    assert rows(raw, "reason", "duration") == [(name, None)]


def returned(time: int, *, errno: int = 0, thread: int = 11) -> Any:
    return other(time, "kvm_userspace_exit", thread, reason=6, errno=errno)


@pytest.mark.parametrize(
    ("events", "want"),
    [
        ([exit_(5, 49), entry(9)], [False]),
        ([exit_(5, 49), returned(7), entry(9)], [True]),
        ([exit_(5, 49), returned(7)], [True]),
        ([exit_(5, 49)], [None]),  # it has not ended: who knows where it goes yet
        # A signal interrupts the vCPU before it enters: that is none of an exit's.
        ([entry(4), returned(5, errno=-4), entry(6), exit_(7, 12), entry(9)], [False]),
        ([exit_(5, 49), returned(6), entry(9), exit_(12, 49), entry(13)], [True, False]),
        # Another vCPU's.
        ([exit_(5, 49), returned(6, thread=12), entry(9)], [False]),
    ],
)
def test_exits_to_user_space(events: list[Any], want: list[bool | None], tmp_path: Path) -> None:
    got = frame(record(tmp_path / "r", {0: events}))
    assert got.filter(kind="exit")["user"].to_list() == want
    assert got.filter(pl.col("kind") != "exit")["user"].null_count() == len(got) - len(want)


def test_a_recording_without_that_tracepoint_does_not_tell(tmp_path: Path) -> None:
    got = frame(unpack("msi", tmp_path))
    assert got["user"].null_count() == len(got)


def test_an_emulators_ticks_are_no_durations(tmp_path: Path) -> None:
    raw = record(tmp_path / "r", {0: [exit_(5, 49), returned(6), entry(9)]})
    Recording("mono", {}, counted=False).save(raw)
    assert rows(raw, "time", "clock", "duration", "user") == [(5, None, None, True)]


PLACE = ("kind", "space", "address", "size", "write", "value")
MEMORY, PORT, MSR = Space.MEMORY, Space.PORT, Space.MSR


@pytest.mark.parametrize(
    ("reason", "events", "want"),
    [
        # A doorbell that KVM answers by itself: neither size nor value is told.
        (49, [("kvm_fast_mmio", {"gpa": 0xFEB00050})], (MEMORY, 0xFEB00050, None, True, None)),
        # An APIC-access or APIC-write exit tells the register only.
        (56, [("kvm_apic", {"rw": 1, "reg": 0x300, "val": 251})],
         (MEMORY, 0xFEE00300, 4, True, 251)),
        (32, [("kvm_apic", {"rw": 1, "reg": 0x380, "val": 7})], (MSR, 0x838, 8, True, 7)),
        # Registers of the local APIC reached by what is told as well, before or after.
        (32, [("kvm_apic", {"rw": 1, "reg": 0xB0}), ("kvm_msr", {"write": 1, "ecx": 0x80B})],
         (MSR, 0x80B, 8, True, 0)),
        (48, [("kvm_mmio", {"type": 2, "len": 4, "gpa": 0xFEE000B0, "val": 0}),
              ("kvm_apic", {"rw": 1, "reg": 0xB0})], (MEMORY, 0xFEE000B0, 4, True, 0)),
        (48, [("kvm_apic", {"rw": 0, "reg": 0x20, "val": 3}),
              ("kvm_mmio", {"type": 1, "len": 4, "gpa": 0xFEE00020, "val": 3})],
         (MEMORY, 0xFEE00020, 4, False, 3)),
        # QEMU answers a read, or does not.
        (49, [("kvm_mmio", {"type": 0, "len": 4, "gpa": 0xFEB00060}),
              ("kvm_mmio", {"type": 1, "len": 4, "gpa": 0xFEB00060, "val": 9})],
         (MEMORY, 0xFEB00060, 4, False, 9)),
        (49, [("kvm_mmio", {"type": 0, "len": 2, "gpa": 0xFEB00060})],
         (MEMORY, 0xFEB00060, 2, False, None)),
        (30, [("kvm_pio", {"rw": 1, "port": 0x3F8, "size": 1, "count": 5, "val": 65})],
         (PORT, 0x3F8, 1, True, 65)),
        (30, [("kvm_pio", {"rw": 0, "port": 0xCFC, "size": 4, "count": 1, "val": 1 << 31})],
         (PORT, 0xCFC, 4, False, 1 << 31)),
        (31, [("kvm_msr", {"write": 0, "ecx": 0xC0000080, "data": 1 << 63})],
         (MSR, 0xC0000080, 8, False, 1 << 63)),
    ],
)  # fmt: skip
def test_one_access_of_an_exit(
    reason: int, events: list[tuple[str, dict[str, int]]], want: tuple[Any, ...], tmp_path: Path
) -> None:
    between = [other(110 + i, event, **fields) for i, (event, fields) in enumerate(events)]
    raw = record(tmp_path / "r", {0: [exit_(100, reason), *between, entry(150)]})
    assert rows(raw, *PLACE) == [(Kind.EXIT, *want)]


def test_further_accesses_of_an_exit_have_rows_of_their_own(tmp_path: Path) -> None:
    """Also when one of the two local APIC registers is told twice."""
    raw = record(
        tmp_path / "r",
        {0: [
            other(50, "kvm_msr", write=0, ecx=0x10, data=1),  # its exit was not recorded
            exit_(100, 48),
            other(110, "kvm_apic", rw=0, reg=0x20, val=1),
            other(111, "kvm_mmio", type=1, len=4, gpa=0xFEE00020, val=1),
            other(120, "kvm_mmio", type=0, len=4, gpa=0xFEB00000),
            other(121, "kvm_mmio", type=1, len=4, gpa=0xFEB00000, val=2),
            other(130, "kvm_mmio", type=2, len=4, gpa=0xFEB00004, val=3),
            other(131, "kvm_fast_mmio", gpa=0xFEB00050),
            entry(150),
        ]},
    )  # fmt: skip
    assert rows(raw, "clock", *PLACE, "duration") == [
        (50, Kind.ACCESS, MSR, 0x10, 8, False, 1, None),
        (100, Kind.EXIT, MEMORY, 0xFEE00020, 4, False, 1, 50),
        (120, Kind.ACCESS, MEMORY, 0xFEB00000, 4, False, 2, None),
        (130, Kind.ACCESS, MEMORY, 0xFEB00004, 4, True, 3, None),
        (131, Kind.ACCESS, MEMORY, 0xFEB00050, None, True, None, None),
    ]


def test_interrupts(tmp_path: Path) -> None:
    accept = [
        (0x000, 34, 34), (0x100, 35, 35), (0x200, 0, -1), (0x400, 2, None),
        (0x500, 0, -1), (0x600, 9, -1), (0x700, 1, None),
    ]  # fmt: skip
    raw = record(
        tmp_path / "r",
        {
            0: [
                other(10 + i, "kvm_apic_accept_irq", 99, apicid=4, dm=mode, vec=vector)
                for i, (mode, vector, _) in enumerate(accept)
            ],
            1: [
                exit_(1, 1, cpu=4),
                other(20, "kvm_inj_virq", vector=34),
                other(21, "kvm_inj_virq", vector=35, reinjected=1),
                other(22, "kvm_inj_virq", vector=0x80, soft=1),
                entry(25, cpu=4),
                other(30, "kvm_eoi", apicid=4, vector=34),
                other(31, "kvm_eoi", apicid=4, vector=-1),
                other(32, "kvm_inj_virq", vector=36),
            ],
        },
        vcpus={11: 2},
    )
    # KVM's 4 is QEMU's vCPU 2, by the thread.
    kept = [(i, vector) for i, (_, _, vector) in enumerate(accept) if vector != -1]
    assert rows(raw, "clock", "kind", "vcpu", "vector", "pc")[1:] == [
        *((10 + i, Kind.RAISE, 2, vector, None) for i, vector in kept),
        (20, Kind.DELIVER, 2, 34, 0x2000),
        (30, Kind.EOI, 2, 34, None),
        (31, Kind.EOI, 2, None, None),
        (32, Kind.DELIVER, 2, 36, None),
    ]


def test_vcpus_move_between_cpus(tmp_path: Path) -> None:
    """An exit on one CPU ends on another; time orders what is of equal time by CPU."""
    raw = record(
        tmp_path / "r",
        {
            0: [exit_(100, 12), exit_(300, 30, thread=12, cpu=1), entry(400)],
            1: [entry(200), exit_(350, 10), entry(400, thread=12, cpu=1)],
        },
    )
    assert rows(raw, "clock", "vcpu", "reason", "duration") == [
        (100, 0, "HLT", 100), (300, 1, "IO_INSTRUCTION", 100), (350, 0, "CPUID", 50),
    ]  # fmt: skip


def test_no_duration_where_events_are_missing(tmp_path: Path) -> None:
    """An exit is not paired with the entry of another: CPU 0 lost events from 120 to 500."""
    raw = record(
        tmp_path / "r",
        {
            0: [entry(120)],
            1: [
                exit_(10, 10), entry(20),
                exit_(100, 12), entry(300),
                exit_(600, 12), exit_(700, 12), entry(750),
            ],
        },
    )  # fmt: skip
    form = Format.read(raw / "events/kvm/kvm_eoi/format")
    late = page(500, data(0, payload(form, 99, {"vector": 7})), missed=3)
    (raw / "cpu0.raw").write_bytes((raw / "cpu0.raw").read_bytes() + late)
    got = frame(raw).filter(kind=Kind.EXIT)
    assert got.select("clock", "duration").rows() == [
        (10, 10), (100, 20), (600, None), (700, 50),
    ]  # fmt: skip
    # The same, had the entry at 120 been on the CPU that lost nothing.
    (raw / "cpu0.raw").write_bytes(page(90, data(0, payload(form, 99, {"vector": 7}))) + late)
    got = frame(raw).filter(kind=Kind.EXIT)
    assert got.select("clock", "duration").rows() == [
        (10, 10), (100, None), (600, None), (700, 50),
    ]  # fmt: skip
    assert Reader(raw).lost == 0  # before it is read: there are no statistics


def test_a_vcpu_that_never_returns_costs_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvm, "HELD", 300)
    monkeypatch.setattr(ringbuffer, "PAGES", 1)
    busy = [
        happening for i in range(2000) for happening in (exit_(10 * i + 1, 10), entry(10 * i + 5))
    ]
    idle = [exit_(3, 12, thread=12, cpu=1), other(19_000, "kvm_msr", 12, write=1, ecx=1, data=2)]
    raw = record(tmp_path / "r", {0: busy, 1: [*idle, entry(19_500, thread=12, cpu=1)]})
    reader = Reader(raw)
    parts = list(reader.frames())
    assert len(parts) > 3
    got = pl.concat(parts)
    assert got["clock"].is_sorted()
    assert got.filter(vcpu=0, kind=Kind.EXIT)["duration"].to_list() == [4] * 2000
    assert got.filter(vcpu=1).select("kind", "clock", "duration", "address").rows() == [
        (Kind.EXIT, 3, None, None), (Kind.ACCESS, 19_000, None, 1),
    ]  # fmt: skip
    assert reader.partial == ("1 exits had no end within 300 further events: without duration",)


def without(raw: Path, event: str, *names: str) -> None:
    """Take fields out of an event's format."""
    file = raw / f"events/kvm/{event}/format"
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not any(f" {name};" in line for name in names)]
    assert len(kept) == len(lines) - len(names)
    file.write_text("".join(kept))


def test_kernels_that_tell_less(tmp_path: Path) -> None:
    raw = unpack("msi", tmp_path)
    whole = frame(raw)
    without(raw, "kvm_exit", "guest_rip", "vcpu_id", "intr_info")
    without(raw, "kvm_entry", "rip", "vcpu_id")
    without(raw, "kvm_pio", "val")
    without(raw, "kvm_inj_virq", "soft")
    without(raw, "kvm_apic_accept_irq", "apicid", "dm")
    file = raw / "events/kvm/kvm_inj_virq/format"  # as it was called before Linux 6.0
    file.write_text(file.read_text().replace("int vector;", "int irq;"))
    for event in ("kvm_fast_mmio", "kvm_apic"):
        (raw / f"events/kvm/{event}/format").unlink()
    got = frame(raw)
    ports, raises = pl.col("space") == Space.PORT, pl.col("kind") == Kind.RAISE
    assert got.equals(
        whole.with_columns(
            pl.lit(None, pl.UInt64).alias("pc"),
            pl.when(ports).then(None).otherwise("value").alias("value"),
            pl.when(raises).then(None).otherwise("vcpu").alias("vcpu"),
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("event", "name"),
    [
        ("kvm_exit", "exit_reason"),
        ("kvm_exit", "isa"),
        ("kvm_mmio", "gpa"),
        ("kvm_msr", "ecx"),
        ("kvm_apic_accept_irq", "vec"),
    ],
)
def test_kernels_that_tell_too_little(event: str, name: str, tmp_path: Path) -> None:
    raw = unpack("msi", tmp_path)
    without(raw, event, name)
    with pytest.raises(UsageError, match=f"this kernel's {event} has no field {name}"):
        Reader(raw)


def test_what_is_no_recording(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is no recording: it has no recording\.json"):
        Reader(tmp_path)
    raw = unpack("lost", tmp_path)
    for file in raw.glob("cpu*.raw"):
        file.rename(file.with_suffix(".away"))
    with pytest.raises(UsageError, match=r"is no recording: it has no cpu<N>\.raw"):
        Reader(raw)
    for text_, message in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"clock": "x86-tsc"}', "is damaged"),
        ('{"clock":"local","vcpus":{},"pairs":[],"khz":null,"partial":[]}', "clock local is none"),
    ):
        (raw / "recording.json").write_text(text_)
        with pytest.raises(UsageError, match=message):
            Reader(raw)
    Recording("mono", {}).save(raw)
    (raw / "events/kvm/kvm_entry/format").unlink()
    with pytest.raises(UsageError, match="no format of kvm_entry"):
        Reader(raw)


def test_recordings_with_one_pair_of_times_or_none(tmp_path: Path) -> None:
    events = {0: [exit_(2_000_000, 12), entry(4_000_000)]}
    raw = record(tmp_path / "a", events, clock="x86-tsc", pairs=[(500, 1_000_000)], khz=2e6)
    assert rows(raw, "time", "clock", "duration") == [(500_500, 2_000_000, 2_000_000)]
    raw = record(tmp_path / "b", events, clock="x86-tsc", khz=2e6)
    assert rows(raw, "time") == [(1_000_000,)]
    raw = record(tmp_path / "c", events, clock="x86-tsc")
    with pytest.raises(UsageError, match="does not tell how fast the TSC ran"):
        rows(raw)
    saved = Recording("x86-tsc", {7: 1}, ((1, 2), (3, 4)), None, ("the disk was full",))
    saved.save(raw)
    assert Recording.load(raw) == saved
    assert Reader(raw).partial == ("the disk was full",)


def test_damage_is_told_and_the_rest_is_read(tmp_path: Path) -> None:
    raw = unpack("msi", tmp_path)
    whole = frame(raw)
    file = raw / "cpu1.raw"
    file.write_bytes(file.read_bytes()[:-5000])
    # Events of which one is too short for its format, and one has none.
    forms = {path.parent.name: Format.read(path) for path in raw.glob("events/kvm/*/format")}
    short = payload(forms["kvm_mmio"], 1, {})[:16]
    alien = payload(forms["kvm_eoi"], 1, {"common_type": 9999})
    last = whole["clock"][-1] + 1
    with (raw / "cpu0.raw").open("ab") as out:
        out.write(page(last, data(0, short) + data(1, alien)))
    reader = Reader(raw)
    got = pl.concat(reader.frames())
    assert reader.partial == (
        "cpu1.raw ends in the middle of a page: it was cut off",
        "1 events were shorter than their format says: left out",
        "1 events have no format in the recording: left out",
    )
    assert 0.8 < got.height / whole.height < 1


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_noise_in_the_middle_is_survived(tmp_path: Path) -> None:
    raw = unpack("msi", tmp_path)
    whole = frame(raw).height
    noise = np.random.default_rng(5)
    for file in raw.glob("cpu*.raw"):
        content = np.frombuffer(file.read_bytes(), np.uint8).copy()
        where = noise.integers(0, len(content), 400)
        content[where] = noise.integers(0, 256, 400, np.uint8)
        file.write_bytes(content.tobytes())
    reader = Reader(raw)
    got = pl.concat(reader.frames())
    assert reader.partial and got.schema == SCHEMA and whole / 10 < got.height


def test_an_empty_recording(tmp_path: Path) -> None:
    raw = record(tmp_path / "r", {0: []})
    (raw / "cpu0.raw").write_bytes(b"")
    reader = Reader(raw)
    assert list(reader.frames()) == [] and reader.partial == () and reader.lost == 0
