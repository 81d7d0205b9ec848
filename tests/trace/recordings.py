# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings of KVM's tracepoints: real ones, and pages that no kernel wrote."""

from __future__ import annotations

import re
import shutil
import struct
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvis.trace.kvm import Recording
from qvis.trace.ringbuffer import Format

DATA = Path(__file__).parent / "data" / "kvm"
NAMES = ("msi", "line", "lost")
PAGE, HEAD = 4096, 16


def unpack(name: str, folder: Path) -> Path:
    """The real recording of that name, in a folder in ``folder``."""
    target = folder / name
    with tarfile.open(DATA / f"{name}.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return target


@dataclass(frozen=True)
class Line:
    """A line of the kernel's own text."""

    time: int
    thread: int
    cpu: int
    event: str
    words: str


_LINE = re.compile(r"\s*\S.*?-(\d+)\s+\[(\d+)\]\s+\S+\s+(\d+): (\w+): (.*)")


def text(raw: Path) -> list[Line]:
    """What the kernel printed of the recording in ``raw``, in its order."""
    found = map(_LINE.fullmatch, (raw / "trace.txt").read_text().splitlines())
    return [Line(int(m[3]), int(m[1]), int(m[2]), m[4], m[5]) for m in found if m]


# Parts of a page, as include/linux/ring_buffer.h says they are.


def data(delta: int, payload: bytes, *, counted: bool = False) -> bytes:
    """An event; its length in a word of its own if it is long, or ``counted``."""
    payload += bytes(-len(payload) % 4)
    if counted or len(payload) > 28 * 4:
        return struct.pack("<II", delta << 5, len(payload) + 4) + payload
    return struct.pack("<I", delta << 5 | len(payload) // 4) + payload


def discarded(delta: int, size: int) -> bytes:
    """An event that was taken back."""
    return struct.pack("<II", delta << 5 | 29, size) + bytes(size - 4)


def extend(delta: int) -> bytes:
    """A time since the event before that is too long for a header."""
    return struct.pack("<II", (delta & (1 << 27) - 1) << 5 | 30, delta >> 27)


def stamp(time: int) -> bytes:
    """An absolute time, of which there are 59 bits."""
    return struct.pack("<II", (time & (1 << 27) - 1) << 5 | 31, time >> 27 & 0xFFFFFFFF)


def page(time: int, events: bytes, *, missed: int | None = None, counted: bool = True) -> bytes:
    """A page; ``missed`` events were lost before it, which it says if ``counted``."""
    commit, tail = len(events), b""
    if missed is not None:
        commit |= 1 << 31
        if counted:
            commit |= 1 << 30
            tail = struct.pack("<Q", missed)
    body = struct.pack("<QQ", time, commit) + events + tail
    assert len(body) <= PAGE
    return body.ljust(PAGE, b"\0")


def payload(form: Format, thread: int, fields: Mapping[str, int]) -> bytes:
    """An event with these fields, the others 0."""
    body = bytearray(max(field.end for field in form.fields.values()))
    for name, value in {"common_type": form.number, "common_pid": thread, **fields}.items():
        field = form.fields[name]
        mask = (1 << 8 * field.size) - 1
        body[field.offset : field.end] = (value & mask).to_bytes(field.size, "little")
    return bytes(body)


Happening = tuple[int, int, str, Mapping[str, int]]
"""Time, thread, event and its fields."""


def record(
    raw: Path,
    cpus: Mapping[int, Iterable[Happening]],
    *,
    vcpus: Mapping[int, int] | None = None,
    clock: str = "mono",
    pairs: Sequence[tuple[int, int]] = (),
    khz: float | None = None,
) -> Path:
    """A recording of these events, in the formats of the real ones."""
    unpack("lost", raw.parent).rename(raw)
    (raw / "events/kvm/kvm_userspace_exit").mkdir()  # which was not recorded then
    shutil.copy(DATA / "kvm_userspace_exit.format", raw / "events/kvm/kvm_userspace_exit/format")
    for file in [*raw.glob("cpu*.raw"), *raw.glob("per_cpu/cpu*/stats")]:
        file.unlink()
    forms = {path.parent.name: Format.read(path) for path in raw.glob("events/kvm/*/format")}
    for cpu, happenings in cpus.items():
        pages, events, first, last = b"", b"", 0, 0
        for time, thread, event, fields in happenings:
            one = payload(forms[event], thread, fields)
            if len(events) + len(one) + 8 > PAGE - HEAD:
                pages += page(first, events)
                events = b""
            if not events:
                first = last = time
            events += data(time - last, one) if time - last < 1 << 27 else (
                extend(time - last) + data(0, one)
            )  # fmt: skip
            last = time
        (raw / f"cpu{cpu}.raw").write_bytes(pages + page(first, events))
    Recording(clock, dict(vcpus or {}), tuple(pairs), khz).save(raw)
    return raw
