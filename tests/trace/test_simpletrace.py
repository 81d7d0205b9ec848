# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own trace events: files in the format of trace/simple.c, whole and not."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import polars as pl
import pytest

import qvis
from qvis.build import built
from qvis.errors import UsageError
from qvis.trace import simpletrace
from qvis.trace.model import SCHEMA
from qvis.trace.sources import DEVICE_VECTORS

HEADER_EVENT, MAGIC, VERSION = 2**64 - 1, 0xF2B177CB0AA429B4, 4
MAPPING, EVENT = 0, 1
DROPPED = 2**64 - 2
RAISE, END, OTHER = 7, 8, 9
NAMES = {RAISE: "apic_deliver_irq", END: "ioapic_eoi_broadcast", OTHER: "virtio_mmio_read"}
HEADER = struct.pack("<QQQ", HEADER_EVENT, MAGIC, VERSION)
FIXED, LOWEST, NMI, INIT, STARTUP = 0, 1, 4, 5, 6


def mapping(event: int, name: str) -> bytes:
    return struct.pack("<QQL", MAPPING, event, len(name)) + name.encode()


def event(number: int, time: int, *arguments: int) -> bytes:
    length = 24 + 8 * len(arguments)
    head = struct.pack("<QQQLL", EVENT, number, time, length, 4711)
    return head + struct.pack(f"<{len(arguments)}Q", *arguments)


def raised(time: int, vector: int, *, to: int = 0, logical: int = 0, mode: int = FIXED) -> bytes:
    """apic_deliver_irq(dest, dest_mode, delivery_mode, vector_num, trigger_mode)."""
    return event(RAISE, time, to, logical, mode, vector, 0)


def file(path: Path, *parts: bytes, names: bool = True) -> Path:
    mappings = b"".join(mapping(*each) for each in NAMES.items()) if names else b""
    path.write_bytes(HEADER + mappings + b"".join(parts))
    return path


def rows(path: Path) -> tuple[pl.DataFrame, list[str]]:
    partial: list[str] = []
    found = [SCHEMA.to_frame(), *simpletrace.frames(path, DEVICE_VECTORS, partial)]
    assert all(dict(frame.schema) == dict(SCHEMA) for frame in found)
    return pl.concat(found), partial


def test_raises_and_ends(tmp_path: Path) -> None:
    path = file(tmp_path / "t", raised(100, 0x22, to=3), event(OTHER, 150, 1, 2, 3),
                event(END, 200, 0x22), raised(300, 0x30, to=1, mode=LOWEST))  # fmt: skip
    found, partial = rows(path)
    assert partial == []
    names = ["time", "vcpu", "kind", "vector", "device", "cause"]
    text = pl.col("device").cast(pl.String)
    assert found.with_columns(text).select(names).rows() == [
        (100, 3, "raise", 0x22, None, None),
        (200, None, "eoi", 0x22, "IOAPIC", "EOI"),
        (300, 1, "raise", 0x30, None, None),
    ]
    rest = [name for name in SCHEMA.names() if name not in names]
    assert all(found[name].null_count() == 3 for name in rest)


@pytest.mark.parametrize(
    ("logical", "to", "vcpu"),
    [
        (0, 0, 0), (0, 79, 79), (0, 254, 254),
        (1, 1, 0), (1, 4, 2), (1, 128, 7), (1, 3, None), (1, 0xFF, None), (1, 0, None),
        (0, 0xFF, None),
    ],
)  # fmt: skip
def test_target_of_a_raise(tmp_path: Path, logical: int, to: int, vcpu: int | None) -> None:
    """One bit a vCPU in logical mode; none where there may be several, 0xff being all."""
    found, _ = rows(file(tmp_path / "t", raised(1, 0x22, to=to, logical=logical)))
    assert found["vcpu"].to_list() == [vcpu]


def test_only_device_vectors_that_are_delivered_as_such(tmp_path: Path) -> None:
    others = [raised(1, 0x22, mode=mode) for mode in (NMI, INIT, STARTUP)]
    others += [raised(1, vector) for vector in (0x00, 0x1F, 0xEC, 0xFD)]
    found, _ = rows(file(tmp_path / "t", *others, raised(2, 0x20), raised(3, 0xEB)))
    assert found["vector"].to_list() == [0x20, 0xEB]


def test_threads_write_out_of_order(tmp_path: Path) -> None:
    """A thread takes the time before it takes its place in the buffer."""
    path = file(tmp_path / "t", raised(300, 0x22), event(END, 200, 0x22), raised(250, 0x23))
    assert rows(path)[0]["time"].to_list() == [200, 250, 300]


def test_out_of_order_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the file is read, what comes out is in order of time."""
    times = [n * 1000 + (7000 if n % 10 == 0 else 0) for n in range(200)]
    path = file(tmp_path / "t", *(raised(time, 0x22) for time in times))
    monkeypatch.setattr(simpletrace, "PIECE", 640)
    found, partial = rows(path)
    assert found["time"].to_list() == sorted(times)
    assert partial == []


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
def test_read_in_pieces(tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path / "t", *(raised(n, 0x22, to=n % 4) for n in range(50)))
    whole, _ = rows(path)
    monkeypatch.setattr(simpletrace, "PIECE", piece)
    found, partial = rows(path)
    assert found.equals(whole)
    assert len(found) == 50
    assert partial == []


def test_arguments_above_2_to_63(tmp_path: Path) -> None:
    path = file(tmp_path / "t", event(OTHER, 1, 2**64 - 1, 2**63, 0))
    events = [each for several in simpletrace.read(path, []) for each in several]
    assert [each.name for each in events] == ["virtio_mmio_read"]
    assert events[0].arguments.tolist() == [[2**64 - 1, 2**63, 0]]


def test_same_event_with_other_arguments(tmp_path: Path) -> None:
    path = file(tmp_path / "t", event(OTHER, 1), event(OTHER, 2, 5), event(OTHER, 3, 6))
    events = [each for several in simpletrace.read(path, []) for each in several]
    assert [each.arguments.shape for each in events] == [(1, 0), (2, 1)]


def test_dropped_events_are_counted(tmp_path: Path) -> None:
    path = file(tmp_path / "t", raised(1, 0x22), event(DROPPED, 2, 40), raised(3, 0x22),
                event(DROPPED, 4, 2))  # fmt: skip
    found, partial = rows(path)
    assert found["time"].to_list() == [1, 3]
    assert partial == ["QEMU dropped 42 of its trace events: its buffer was full"]


@pytest.mark.parametrize("missing", [1, 8, 40, 41, 63])
def test_cut_short(tmp_path: Path, missing: int) -> None:
    path = file(tmp_path / "t", raised(1, 0x22), raised(2, 0x22))
    path.write_bytes(path.read_bytes()[:-missing])
    found, partial = rows(path)
    assert found["time"].to_list() == [1]
    assert partial == ["t ends in the middle of an event"]


def test_ends_with_a_short_name(tmp_path: Path) -> None:
    """A mapping can be shorter than the head of an event."""
    path = tmp_path / "t"
    path.write_bytes(HEADER + mapping(1, "ab"))
    assert rows(path)[1] == []
    path.write_bytes(HEADER + mapping(1, "ab")[:-1])
    assert rows(path)[1] == ["t ends in the middle of an event"]


def test_empty(tmp_path: Path) -> None:
    path = tmp_path / "t"
    for content in (b"", HEADER[:-1]):
        path.write_bytes(content)
        found, partial = rows(path)
        assert len(found) == 0
        assert partial == ["t is empty"]
    found, partial = rows(file(path))
    assert len(found) == 0
    assert partial == []


@pytest.mark.parametrize(
    "content",
    [
        b"no trace at all, but long enough to be one",
        struct.pack("<QQQ", HEADER_EVENT, MAGIC, 3),
        struct.pack("<QQQ", HEADER_EVENT, MAGIC + 1, 4),
        bytes(100),
    ],
)
def test_other_file_or_version(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is no trace of QEMU's simple backend, version 4"):
        rows(path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (struct.pack("<QQQLL", 5, 1, 1, 24, 1), "a record of type 5"),
        (struct.pack("<QQQLL", EVENT, 1, 1, 23, 1), "a record of 23 bytes"),
        (struct.pack("<QQQLL", EVENT, 1, 1, 2**31, 1), "a record of 2147483648 bytes"),
        (struct.pack("<QQL", MAPPING, 1, 2**31) + bytes(20), "a name of 2147483648 bytes"),
        (event(RAISE, 1, 5), "apic_deliver_irq with 1 arguments"),
    ],
)
def test_damaged(tmp_path: Path, damage: bytes, says: str) -> None:
    path = file(tmp_path / "t", damage, raised(1, 0x22))
    with pytest.raises(UsageError, match=re.escape(says)):
        rows(path)


def test_file_of_qemu_itself(tmp_path: Path) -> None:
    """A machine without a kernel: its firmware's first reads of the configuration."""
    artifacts = built()
    if artifacts is None:
        pytest.skip("QEMU is not built")
    path = tmp_path / "t"
    command = [
        *(artifacts.qemu.binary, "-L", artifacts.qemu.firmware, "-M", "microvm", "-m", "64M"),
        *("-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-S"),
        *("-trace", "enable=ioapic_mem_read", "-trace", "enable=apic_*"),
        *("-trace", f"file={path}", "-monitor", "stdio"),
    ]
    done = subprocess.run(
        list(map(str, command)), input="xp/1wx 0xfec00010\nxp/1wx 0xfee00030\nquit\n",
        text=True, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    partial: list[str] = []
    events = {each.name: each for several in simpletrace.read(path, partial) for each in several}
    assert partial == []
    assert "QEMU 10.2" in done.stdout, qvis
    shown = re.search(r"fec00010: (0x[0-9a-f]+)", done.stdout)
    read = events["ioapic_mem_read"].arguments
    assert shown
    assert read.shape[0] == 1
    assert int(shown[1], 16) == int(read[0][-1])
    assert (events["ioapic_mem_read"].time > 0).all()
