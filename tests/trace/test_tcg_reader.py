# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading what the TCG plugin wrote, whole or not: files made here, in its layout."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from qvis.errors import UsageError
from qvis.trace import tcg
from qvis.trace.model import SCHEMA
from qvis.trace.sources import TcgReading

# qvis/tcgplugin/control.h
RECORD = struct.Struct("<QQQQBBB5x")
MAGIC, VERSION = 0x4352545349565100, 1
HEADER, ACCESS, INTERRUPT, FUNCTION = range(4)
STORE, PORT = 1, 2

STUBS, SYSTEM, EXCEPTION = 0xFFFFFFFF81000200, 0xFFFFFFFF81001000, 0xFFFFFFFF81002000
LAYOUT: dict[str, Any] = {
    "version": 1,
    "functions": ["vring_interrupt", "apic_ack_edge"],
    "first_stub": STUBS,
    "stub_size": 16,
    "stubs": 204,
    "system_entries": {str(SYSTEM): "sysvec_apic_timer_interrupt"},
}
Event = tuple[int, ...]  # time, clock, a, b, kind, size, flags


def access(time: int, address: int, value: int, *, flags: int = 0, size: int = 4) -> Event:
    return (time, time // 2, address, value, ACCESS, size, flags)


def write(
    raw: Path,
    vcpus: Mapping[int, Sequence[Event]],
    *,
    counts: dict[str, Any] | str | None = "right",
    layout: dict[str, Any] | str = LAYOUT,
    room: int = 0,
    magic: int = MAGIC,
    version: int = VERSION,
) -> Path:
    """A recording; ``room`` is for so many more events at the end of each file."""
    raw.mkdir(parents=True)
    for vcpu, events in vcpus.items():
        header = RECORD.pack(0, 0, magic, vcpu << 32 | version, HEADER, 0, 0)
        body = b"".join(RECORD.pack(*event) for event in events)
        (raw / f"vcpu-{vcpu:04}.bin").write_bytes(header + body + bytes(RECORD.size * room))
    text = layout if isinstance(layout, str) else json.dumps(layout)
    (raw / "layout.json").write_text(text)
    if counts == "right":
        top = max(vcpus, default=-1) + 1
        recorded = [len(vcpus.get(vcpu, ())) for vcpu in range(top)]
        counts = {"recorded": recorded, "dropped": [0] * top}
    if counts is not None:
        (raw / "counts.json").write_text(counts if isinstance(counts, str) else json.dumps(counts))
    return raw


def read(raw: Path) -> tuple[pl.DataFrame, TcgReading]:
    reading = TcgReading(raw)
    frames = [SCHEMA.to_frame(), *reading.frames()]
    assert all(dict(frame.schema) == dict(SCHEMA) for frame in frames)
    return pl.concat(frames), reading


def test_layout_is_the_plugins() -> None:
    """The numbers above, those of the reader, and the header that the plugin is made of."""
    header = (Path(tcg.__file__).parent.parent / "tcgplugin" / "control.h").read_text()

    def defined(name: str) -> int:
        found = re.search(rf"#define QVIS_{name} \(?(0x[0-9a-f]+|\d+)", header)
        assert found, name
        return int(found[1], 0)

    assert defined("MAGIC") == MAGIC == tcg.MAGIC
    assert defined("VERSION") == VERSION == tcg.VERSION
    assert defined("MAX_FUNCTIONS") == tcg.MAX_FUNCTIONS
    assert defined("MAX_VCPUS") == tcg.MAX_VCPUS
    assert defined("MAX_PATH") == tcg.MAX_PATH
    assert tcg.RECORD_TYPE.itemsize == RECORD.size == 40
    # As a C compiler lays it out: nothing is padded.
    assert tcg.CONTROL_TYPE.itemsize == 8 + 6 * 4 + 8 + 128 * 8 + 1024 + 4 * 4 + 1024 * 16
    fields = tcg.CONTROL_TYPE.fields
    assert fields
    assert all(fields[name][1] % 8 == 0 for name in ("lease", "functions", "vcpus"))


def test_every_column_of_every_kind(tmp_path: Path) -> None:
    raw = write(
        tmp_path / "raw",
        {
            3: [
                access(100, 0xFEB00050, 2, flags=STORE),
                access(200, 0x3F8, 0xFF, flags=PORT, size=1),
                (300, 151, 0x1234, STUBS + 16 * 2, INTERRUPT, 0, 0),
                (400, 160, 57, 0, FUNCTION, 0, 0),
                (500, 170, 0x55, SYSTEM, INTERRUPT, 0, 0),
                access(600, 2**63 + 5, 2**64 - 1, size=8),
            ]
        },
    )
    found, reading = read(raw)
    assert reading.partial == []
    assert reading.lost == 0
    names = ["time", "clock", "vcpu", "kind", "space", "address", "size", "write", "value",
             "vector", "function", "pc"]  # fmt: skip
    no = None
    assert found.with_columns(pl.col("function").cast(pl.String)).select(names).rows() == [
        (100, 50, 3, "access", "memory", 0xFEB00050, 4, True, 2, no, no, no),
        (200, 100, 3, "access", "port", 0x3F8, 1, False, 0xFF, no, no, no),
        (300, 151, 3, "deliver", no, no, no, no, no, 0x22, no, 0x1234),
        (400, 160, 3, "function", no, no, no, no, 57, no, "vring_interrupt", no),
        (500, 170, 3, "deliver", no, no, no, no, no, no, "sysvec_apic_timer_interrupt", 0x55),
        (600, 300, 3, "access", "memory", 2**63 + 5, 8, False, 2**64 - 1, no, no, no),
    ]
    rest = [name for name in SCHEMA.names() if name not in names]
    assert all(found[name].null_count() == 6 for name in rest)


def test_exceptions_are_no_interrupts(tmp_path: Path) -> None:
    """QEMU tells of both alike; only where they lead tells them apart."""
    to = [EXCEPTION, STUBS - 16, STUBS + 16 * 204, STUBS, STUBS + 16 * 203, SYSTEM, 0]
    raw = write(tmp_path / "raw", {0: [(n + 1, n, 0, at, INTERRUPT, 0, 0)
                                       for n, at in enumerate(to)]})  # fmt: skip
    found, reading = read(raw)
    assert found["time"].to_list() == [4, 5, 6]
    assert found["vector"].to_list() == [0x20, 0x20 + 203, None]
    assert reading.partial == []
    assert reading.lost == 0


def test_without_symbols_all_are_kept(tmp_path: Path) -> None:
    layout = {**LAYOUT, "first_stub": 0, "stub_size": 0, "stubs": 0, "system_entries": {}}
    raw = write(tmp_path / "raw", {0: [(1, 1, 0, EXCEPTION, INTERRUPT, 0, 0)]}, layout=layout)
    found, _ = read(raw)
    assert found.select("kind", "vector", "function").rows() == [("deliver", None, None)]


@pytest.mark.parametrize("vcpus", [1, 4, 80])
def test_merged_by_time(tmp_path: Path, vcpus: int) -> None:
    """Each vCPU has a time of its own to be busy; ties go by vCPU, and each keeps its order."""
    chance = np.random.default_rng(vcpus)
    events = {}
    for vcpu in range(vcpus):
        count = 200 + 3000 * (vcpu % 7 == 3)
        times = np.sort(chance.integers(vcpu * 50, vcpu * 50 + 3000, count))
        events[vcpu] = [access(int(time), vcpu, n) for n, time in enumerate(times)]
    found, reading = read(write(tmp_path / "raw", events))
    expected = sorted(
        (event[0], vcpu, event[3]) for vcpu, own in events.items() for event in own
    )  # fmt: skip
    assert found["time"].is_sorted()
    assert sorted(found.select("time", "vcpu", "value").rows()) == expected
    for vcpu in range(vcpus):
        own = found.filter(pl.col("vcpu") == vcpu)
        assert own["value"].to_list() == list(range(len(events[vcpu])))
        assert own["address"].unique().to_list() == [vcpu]
    assert reading.partial == []


def test_more_than_is_looked_at_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One busy vCPU and two that have little: frames stay small, and nothing is lost."""
    monkeypatch.setattr(tcg, "CHUNK", 3 * 1024)
    busy = [access(10 * n, 0, n) for n in range(20_000)]
    seldom = [access(7 + 5000 * n, 1, n) for n in range(40)]
    late = [access(199_000 + n, 2, n) for n in range(3000)]
    raw = write(tmp_path / "raw", {0: busy, 1: seldom, 2: late})
    frames = list(TcgReading(raw).frames())
    assert sum(map(len, frames)) == 23_040
    assert max(map(len, frames)) <= 3 * 1024
    assert pl.concat(frames)["time"].is_sorted()


def test_empty(tmp_path: Path) -> None:
    cases: dict[str, dict[int, list[Event]]] = {"none": {}, "headers": {0: [], 5: []}}
    for name, vcpus in cases.items():
        found, reading = read(write(tmp_path / name, vcpus))
        assert len(found) == 0
        assert reading.partial == []


# Not whole


def test_room_at_the_end_is_not_read(tmp_path: Path) -> None:
    """QEMU died: its files end with the room that they were given."""
    raw = write(tmp_path / "raw", {0: [access(5, 1, 1)], 1: [access(3, 1, 1)]}, room=100)
    found, reading = read(raw)
    assert found["time"].to_list() == [3, 5]
    assert reading.partial == []


def test_killed_before_it_could_count(tmp_path: Path) -> None:
    """Without the counts, what was never written ends a file all the same."""
    events = {0: [access(5, 1, 1), access(6, 1, 1)], 1: [access(3, 1, 1)], 2: []}
    found, reading = read(write(tmp_path / "raw", events, counts=None, room=300))
    assert found["time"].to_list() == [3, 5, 6]
    assert found["kind"].to_list() == ["access"] * 3
    assert len(reading.partial) == 1
    assert "how much it recorded is not known" in reading.partial[0]


def test_killed_with_more_than_is_looked_at_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcg, "CHUNK", 1024)
    events = {0: [access(n + 1, 1, 1) for n in range(5000)]}
    found, _ = read(write(tmp_path / "raw", events, counts=None, room=5000))
    assert (len(found), found["time"].is_sorted()) == (5000, True)


def test_fewer_than_were_counted(tmp_path: Path) -> None:
    raw = write(
        tmp_path / "raw",
        {0: [access(5, 1, 1)], 1: [access(3, 1, 1)]},
        counts={"recorded": [4, 1], "dropped": [0, 2]},
    )
    found, reading = read(raw)
    assert found["time"].to_list() == [3, 5]
    assert reading.partial == ["vcpu-0000.bin is cut short: 3 events are missing"]
    assert reading.lost == 2


def test_cut_in_the_middle_of_an_event(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", {0: [access(5, 1, 1), access(6, 1, 1)]}, counts=None)
    file = raw / "vcpu-0000.bin"
    file.write_bytes(file.read_bytes()[:-7])
    found, reading = read(raw)
    assert found["time"].to_list() == [5]
    assert "vcpu-0000.bin ends in the middle of an event" in reading.partial
    (raw / "counts.json").write_text('{"recorded": [2], "dropped": [0]}')
    found, reading = read(raw)
    assert found["time"].to_list() == [5]
    assert reading.partial == ["vcpu-0000.bin is cut short: 1 events are missing"]


def test_file_that_could_not_grow(tmp_path: Path) -> None:
    """On a full disk there is a file for the vCPU and nothing in it."""
    raw = write(
        tmp_path / "raw", {0: [access(5, 1, 1)]}, counts={"recorded": [1, 0], "dropped": [0, 7]}
    )
    (raw / "vcpu-0001.bin").touch()
    (raw / "vcpu-0002.bin").write_bytes(bytes(4096))  # some of its room was found
    found, reading = read(raw)
    assert found["time"].to_list() == [5]
    assert reading.lost == 7


@pytest.mark.parametrize("counted", [True, False])
def test_file_of_a_vcpu_is_missing(tmp_path: Path, counted: bool) -> None:
    raw = write(tmp_path / "raw", {0: [access(5, 1, 1)], 1: [access(3, 1, 1)]},
                counts="right" if counted else None)  # fmt: skip
    (raw / "vcpu-0001.bin").unlink()
    found, reading = read(raw)
    assert found["time"].to_list() == [5]
    if counted:
        assert reading.partial == ["vcpu-0001.bin is missing, with 1 events"]


# Not ours


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"magic": MAGIC + 1}, "vcpu-0000.bin is no recording of the tracer"),
        ({"version": 2}, "recorded by another version of the tracer"),
        ({"layout": {**LAYOUT, "version": 2}}, "recorded by another version of the tracer"),
        ({"layout": "{"}, "layout.json is damaged"),
        ({"layout": "[]"}, "layout.json is damaged"),
        ({"layout": {"version": 1}}, "layout.json is damaged"),
        ({"layout": {**LAYOUT, "system_entries": []}}, "layout.json is damaged"),
        ({"layout": {**LAYOUT, "system_entries": {"x": "y"}}}, "layout.json is damaged"),
        ({"layout": {**LAYOUT, "functions": 7}}, "layout.json is damaged"),
        ({"layout": {**LAYOUT, "stub_size": "16"}}, "layout.json is damaged"),
        ({"counts": "{"}, "counts.json is damaged"),
        ({"counts": "[]"}, "counts.json is damaged"),
        ({"counts": {"recorded": [1]}}, "counts.json is damaged"),
        ({"counts": {"recorded": 1, "dropped": [0]}}, "counts.json is damaged"),
        ({"counts": {"recorded": ["1"], "dropped": [0]}}, "counts.json is damaged"),
    ],
)
def test_refused_with_the_files_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    raw = write(tmp_path / "raw", {0: [access(5, 1, 1)]}, **changes)
    with pytest.raises(UsageError, match=re.escape(says)):
        read(raw)


def test_missing_layout(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", {0: [access(5, 1, 1)]})
    (raw / "layout.json").unlink()
    with pytest.raises(UsageError, match=r"layout\.json is damaged"):
        read(raw)


def test_text_in_place_of_a_recording(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", {0: [access(5, 1, 1)]})
    (raw / "vcpu-0000.bin").write_text("no recording\n" * 20)
    with pytest.raises(UsageError, match="no recording of the tracer"):
        read(raw)


def test_function_that_the_layout_does_not_name(tmp_path: Path) -> None:
    found, _ = read(write(tmp_path / "raw", {0: [(1, 1, 57, 99, FUNCTION, 0, 0)]}))
    assert found.select("kind", "function", "value").rows() == [("function", None, 57)]


def open_files() -> Iterable[str]:
    for link in Path("/proc/self/fd").iterdir():
        try:
            yield str(link.readlink())
        except OSError:
            continue


def test_files_are_closed(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", {n: [access(5, 1, 1)] for n in range(3)})
    frames = TcgReading(raw).frames()
    next(frames)
    frames.close()  # type: ignore[attr-defined]
    (raw / "vcpu-0001.bin").write_bytes(b"x" * 80)
    with pytest.raises(UsageError):
        read(raw)
    assert not [path for path in open_files() if path.startswith(str(tmp_path))]


@pytest.mark.parametrize(
    "wrong",
    [
        access(2**63 + 5, 0xFEB00050, 0),  # no clock shows that
        access(150, 0xFEB00050, 0),  # time went back
        (450, 0, 0, 0, 9, 0, 0),  # no kind has that number
    ],
    ids=["far", "back", "kind"],
)
@pytest.mark.parametrize("chunk", [1 << 18, 1])
def test_what_cannot_be_an_event_ends_its_file(
    tmp_path: Path, wrong: Event, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcg, "CHUNK", chunk)
    good = [access(100 * n, 0xFEB00050, n) for n in range(1, 5)]
    raw = write(
        tmp_path / "raw",
        {0: [*good, wrong, access(900, 0xFEB00050, 9)], 1: [access(950, 0xFEB00060, 1)]},
    )
    found, reading = read(raw)
    assert found["time"].to_list() == [100, 200, 300, 400, 950]
    assert reading.partial == ["vcpu-0000.bin is damaged after 4 events: what follows is left out"]
