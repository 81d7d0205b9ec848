# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages in which the kernel hands out traced events (``trace_pipe_raw``).

The binary pages are read rather than the kernel's text: formatting text costs
the traced machine more than the events themselves, and it is slow to parse.
Nothing here needs tracefs, so a recording can come from another machine.

A file is a row of pages of equal size. A page has a time stamp, how much of it
is used with two flags for events that were lost before it, and then events one
behind the other; where the next one starts is known only from the one before.
So that Python need not walk them one by one, :meth:`PerCpu.chunks` walks many
pages in step, the n-th event of all of them at once.

Sources: ``events/header_page`` and ``events/header_event`` of tracefs, which
say where things are, and ``kernel/trace/ring_buffer.c`` and
``include/linux/ring_buffer.h`` of Linux, which say what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

__all__ = ["COMMIT", "Events", "Field", "Format", "Layout", "PerCpu"]

Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[np.bool_]

MISSED = 1 << 31  # events were lost before this page
MISSED_STORED = 1 << 30  # how many is written behind its last event
COMMIT = MISSED_STORED - 1  # the bits that are the page's length
DELTA_BITS = 27  # of an event's time since the one before
STAMP_BITS = 59  # of an absolute time stamp; the rest is that of the time before
END = (1 << 64) - 1  # of time
PAGES = 512  # walked in step: 2 MiB, some 35,000 events

_FIELD = re.compile(
    r"field:\s*(?P<what>[^;]+);\s*offset:(?P<offset>\d+);\s*size:(?P<size>\d+);"
    r"(?:\s*signed:(?P<signed>\d);)?"
)
_NAME = re.compile(r"(\w+)\s*(?:\[[^]]*\])?\s*$")
_NUMBERS = {
    "padding": re.compile(r"padding\s*:\s*type == +(\d+)"),
    "extend": re.compile(r"time_extend\s*:\s*type == +(\d+)"),
    "stamp": re.compile(r"time_stamp\s*:\s*type == +(\d+)"),
    "data": re.compile(r"data max type_len\s*== +(\d+)"),
}


@dataclass(frozen=True)
class Field:
    """Where a number lies in an event, in bytes from its start."""

    name: str
    offset: int
    size: int
    signed: bool

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.size


def _fields(text: str) -> dict[str, Field]:
    found = {}
    for match in _FIELD.finditer(text):
        name = _NAME.search(match["what"])
        if name:
            found[name[1]] = Field(
                name[1], int(match["offset"]), int(match["size"]), match["signed"] == "1"
            )
    return found


@dataclass(frozen=True)
class Format:
    """An event's ``format`` file."""

    name: str
    number: int  # what common_type is in such events
    fields: dict[str, Field]
    text: str  # the whole file; its last line says how the kernel prints the event

    @classmethod
    def read(cls, path: Path) -> Format:
        """The format in the file ``path``; :class:`UsageError` when it is none."""
        text = _text(path)
        name = re.search(r"^name:\s*(\S+)", text, re.MULTILINE)
        number = re.search(r"^ID:\s*(\d+)", text, re.MULTILINE)
        fields = _fields(text)
        if not name or not number or not {"common_type", "common_pid"} <= fields.keys():
            raise UsageError(f"{path} is not the format of an event")
        return cls(name[1], int(number[1]), fields, text)


@dataclass(frozen=True)
class Layout:
    """What the pages of one recording look like: sizes in bytes, and numbers of types."""

    size: int
    data: int  # where the events start
    timestamp: Field
    commit: Field
    padding: int
    extend: int
    stamp: int
    largest: int  # type of an event that is its own length in words

    @classmethod
    def read(cls, events: Path) -> Layout:
        """The layout in ``header_page`` and ``header_event`` of the folder ``events``.

        Raises :class:`UsageError` when they are missing or say what this does not read.
        """
        page, event = events / "header_page", events / "header_event"
        fields, text = _fields(_text(page)), _text(event)
        try:
            data = fields["data"]
            numbers = {
                name: int(found[1])
                for name, line in _NUMBERS.items()
                if (found := line.search(text))
            }
            layout = cls(
                size=data.end,
                data=data.offset,
                timestamp=fields["timestamp"],
                commit=fields["commit"],
                padding=numbers["padding"],
                extend=numbers["extend"],
                stamp=numbers["stamp"],
                largest=numbers["data"],
            )
        except KeyError as problem:
            raise UsageError(f"{page} or {event} does not tell {problem}") from problem
        if layout.timestamp.size != 8 or layout.data % 4 or layout.size % 4:
            raise UsageError(f"{page} is of a kernel that this does not read")
        return layout


@dataclass(frozen=True)
class Events:
    """Some events of one CPU in the order in which it recorded them."""

    time: npt.NDArray[np.uint64]  # in the unit of the recording's clock
    at: Ints  # where each starts in bytes
    length: Ints  # bytes of each, without its header
    bytes: npt.NDArray[np.uint8]

    def column(self, field: Field, which: Ints | slice = slice(None)) -> npt.NDArray[Any]:
        """That field of these events, all of which must be long enough to have it."""
        kind = np.dtype(f"<{'i' if field.signed else 'u'}{field.size}")
        # A number that starts at each byte, whether aligned or not: a view, no copy.
        numbers: npt.NDArray[Any] = np.ndarray(
            len(self.bytes) - field.size + 1, kind, self.bytes.data, strides=(1,)
        )
        return numbers[self.at[which] + field.offset]


class PerCpu:
    """The file with what one CPU recorded. What is known of its faults grows as it is read.

    ``lost`` is the least number of events that the kernel says it overwrote
    before they were read; ``gaps`` are pairs of times between which some are
    missing, for that or another reason; ``faults`` says in words what of the
    file could not be read.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.lost = 0
        self.gaps: list[tuple[int, int]] = []
        self._layout = layout
        self._damaged = 0
        self._first_damage = 0
        self._cut = False
        self._last = 0  # time of the last event that was read
        self._open = False  # whether events are missing behind it

    @property
    def faults(self) -> list[str]:
        """Sentences; none when the file is whole."""
        found = []
        if self._damaged:
            found.append(
                f"{self.path.name} is damaged in {self._damaged} pages, the first at byte "
                f"{self._first_damage}; of those only what precedes the damage was read"
            )
        if self._cut:
            found.append(f"{self.path.name} ends in the middle of a page: it was cut off")
        return found

    def chunks(self) -> Iterator[Events]:
        """All events, in pieces that fit in memory.

        Raises :class:`UsageError` when the file cannot be read at all.
        """
        size = self._layout.size
        try:
            with self.path.open("rb") as file:
                offset = 0
                while piece := file.read(size * PAGES):
                    whole, rest = divmod(len(piece), size)
                    if rest:
                        self._cut = True
                        piece += bytes(size - rest)
                    yield self._chunk(piece, offset, [size] * whole + [rest] * bool(rest))
                    offset += len(piece)
            if self._open:
                self.gaps.append((self._last, END))
        except OSError as problem:
            raise UsageError(f"cannot read {self.path}: {problem.strerror}") from problem

    def _chunk(self, piece: bytes, offset: int, sizes: list[int]) -> Events:
        layout = self._layout
        raw = np.frombuffer(piece, np.uint8)
        pages = raw.reshape(-1, layout.size)
        stamps = _head(pages, layout.timestamp)
        commits = _head(pages, layout.commit).astype(np.int64) & 0xFFFFFFFF
        used = commits & COMMIT
        available = np.array(sizes, np.int64) - layout.data
        damaged = used > layout.size - layout.data
        limits = np.where(damaged, 0, np.minimum(used, np.maximum(available, 0)))

        page, at, length, time, broken = self._walk(raw, stamps, limits)
        # Pages that were cut off are told by _cut alone.
        faulty = damaged | broken & (available >= used)
        if faulty.any():
            if not self._damaged:
                self._first_damage = offset + int(np.flatnonzero(faulty)[0]) * layout.size
            self._damaged += int(faulty.sum())

        missed = (commits & MISSED) != 0
        self._count(raw, missed & ~damaged, commits, used)
        self._note_gaps(page, time, missed, damaged | broken)
        return Events(time, at, length, raw)

    def _walk(
        self, raw: npt.NDArray[np.uint8], stamps: npt.NDArray[np.uint64], limits: Ints
    ) -> tuple[Ints, Ints, Ints, npt.NDArray[np.uint64], Bits]:
        """The data events: their page, place, length and time; and which pages are broken."""
        layout = self._layout
        words = raw.view("<u4")
        per_page = layout.size // 4
        page: Ints = np.flatnonzero(limits >= 4)
        place: Ints = page * per_page + layout.data // 4  # of the event, in words
        end: Ints = place + limits[page] // 4
        now = stamps[page]
        broken = np.zeros(len(limits), np.bool_)
        found: list[tuple[Ints, Ints, Ints, npt.NDArray[np.uint64]]] = []
        while len(page):
            header = words[place]
            kind = header & 31
            delta = (header >> 5).astype(np.uint64)
            # Behind a header that is a page's last word there is none; what is
            # taken in its place is not looked at, since the page ends there.
            second = words[np.minimum(place + 1, len(words) - 1)].astype(np.int64)
            data = kind <= layout.largest
            extend, stamp = kind == layout.extend, kind == layout.stamp
            counted = (kind == 0) | (kind == layout.padding)  # length in the second word
            length = np.where(
                extend | stamp, 1, np.where(counted, (second + 3) // 4, kind.astype(np.int64))
            )
            finished = (kind == layout.padding) & (delta == 0)
            beyond = (place + 1 + length > end) | (length < 1)
            broken[page[beyond & ~finished]] = True
            go = ~(beyond | finished)

            full = (second.astype(np.uint64) << np.uint64(DELTA_BITS)) + delta
            # The next event's delta counts from a discarded one (padding) as well.
            now = np.where(stamp, _absolute(full, now), now + np.where(extend, full, delta))
            take = data & go
            long = (kind[take] == 0).astype(np.int64)  # whose second word is their length
            found.append(
                (page[take], (place[take] + 1 + long) * 4, (length[take] - long) * 4, now[take])
            )
            place = place + 1 + length
            go &= place < end
            page, place, end, now = page[go], place[go], end[go], now[go]
        if not found:
            return limits[:0], limits[:0], limits[:0], stamps[:0], broken
        pages, places, lengths, times = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.argsort(pages.astype(np.uint16), kind="stable")
        return pages[order], places[order], lengths[order], times[order], broken

    def _count(self, raw: npt.NDArray[np.uint8], missed: Bits, commits: Ints, used: Ints) -> None:
        """Add what the pages say of lost events; a page that has no room for it says 1."""
        size = self._layout.commit.size  # both are the kernel's long
        for page in np.flatnonzero(missed):
            start = int(page) * self._layout.size + self._layout.data + int(used[page])
            stored = bool(commits[page] & MISSED_STORED)
            self.lost += (
                int.from_bytes(raw[start : start + size].tobytes(), "little") if stored else 1
            )

    def _note_gaps(
        self, page: Ints, time: npt.NDArray[np.uint64], before: Bits, within: Bits
    ) -> None:
        """Remember between which times events are missing: ``before`` or ``within`` a page."""
        starts = np.searchsorted(page, np.arange(len(before) + 1))
        points = {int(p) for p in starts[np.flatnonzero(before)]}
        points |= {int(p) for p in starts[np.flatnonzero(within) + 1]}
        if self._open:
            points.add(0)
        self._open = len(time) in points
        for point in sorted(points - {len(time)}):
            self.gaps.append((int(time[point - 1]) if point else self._last, int(time[point])))
        if len(time):
            self._last = int(time[-1])


def _absolute(
    stamp: npt.NDArray[np.uint64], before: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """The time of an absolute stamp, whose highest bits are those of the time before it."""
    high = before >> STAMP_BITS << STAMP_BITS
    full = stamp | high
    return np.where((high != 0) & (full < before), full + (1 << STAMP_BITS), full)


def _head(pages: npt.NDArray[np.uint8], field: Field) -> npt.NDArray[np.uint64]:
    """That field of each page's head."""
    part = np.ascontiguousarray(pages[:, field.offset : field.end])
    return part.view(f"<u{field.size}").ravel().astype(np.uint64)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as problem:
        raise UsageError(f"cannot read {path}: {problem}") from problem
