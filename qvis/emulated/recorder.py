# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes down what happens to a machine, for :mod:`qvis.trace.emulated` to read.

A row is six words: what (:func:`what`), vCPU, time in modelled cycles, and three more that
depend on what it is:

==========  =============  ==========  ==========================
kind        address        value       duration
==========  =============  ==========  ==========================
EXIT        of a register  of it       modelled cycles
ACCESS      likewise       likewise    0
RAISE       0              vector      0
DELIVER     0              vector      0
FUNCTION    place in NAMES argument    0
EOI         0              vector      0
==========  =============  ==========  ==========================

The vCPU of an EOI that an IOAPIC saw is :data:`NOBODY`. Since a vCPU may be ahead of the
machine's time while it runs, rows are not in order of time; but each block of a file says
which time everything in later blocks is not before. A block is :data:`BLOCK_WORDS` words
(:data:`MAGIC`, how many rows, that time), and the rows. Words have the byte order of the host.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import IntEnum
from io import FileIO
from itertools import chain
from pathlib import Path

from .costs import EXITS

__all__ = [
    "BLOCK_WORDS",
    "COUNTS",
    "FILE",
    "LAYOUT",
    "MAGIC",
    "NAMES",
    "NOBODY",
    "ROW_WORDS",
    "Counts",
    "Recorder",
    "Row",
    "RowKind",
    "Space",
    "what",
]

FILE = "emulated.bin"
LAYOUT = "layout.json"
COUNTS = "counts.json"
MAGIC = 0x314D455349565100
ROW_WORDS = 6
BLOCK_WORDS = 3
LIMIT = 1 << 15  # rows that are written together
NOBODY = 0xFFFF
WORD = (1 << 64) - 1

NAMES: list[str] = []
"""Functions of the guest's kernel, by number. :data:`LAYOUT` has them and the exits' reasons."""

Row = tuple[int, int, int, int, int, int]


class RowKind(IntEnum):
    """What a row is about."""

    ACCESS = 1
    EXIT = 2
    RAISE = 3
    DELIVER = 4
    FUNCTION = 5
    EOI = 6


class Space(IntEnum):
    """What an address is one in."""

    NONE = 0
    MEMORY = 1
    PORT = 2
    MSR = 3


def what(
    kind: RowKind, *, space: Space = Space.NONE, size: int = 0, write: bool = False, reason: int = 0
) -> int:
    """The first word: kind, space, size in bytes and direction, and place in EXITS of an exit."""
    return kind | space << 8 | size << 16 | write << 24 | reason << 32


@dataclass(frozen=True)
class Counts:
    """How much was recorded: rows kept, rows that there was no room for, and why (errno)."""

    recorded: int
    dropped: int
    error: int


class Recorder:
    """Rows into a file in the folder ``folder``, from the beginning on until :meth:`stop`.

    Nothing that goes wrong with files is an exception to the machine: rows are counted as
    dropped, and :meth:`stop` tells.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[Row] = []
        self.add: Callable[[Row], None] = self._rows.append
        """Take a row. All its numbers are from 0 to 2^64 - 1."""
        self._recorded = self._dropped = self._error = 0
        self._size = 0  # of the file, up to the last whole block
        self._named = -1  # how many functions LAYOUT has
        self._file: FileIO | None = None
        try:
            self._file = FileIO(folder / FILE, "wb")
        except OSError as problem:
            self._error = problem.errno or 0
        self._name()

    def due(self) -> bool:
        """Whether it is time to :meth:`flush`."""
        return len(self._rows) >= LIMIT

    def flush(self, floor: int) -> None:
        """Write what there is. Nothing that is told later is before ``floor`` (modelled cycles)."""
        rows = self._rows
        if not rows:
            return
        try:
            words = array("Q", chain.from_iterable(rows))
        except OverflowError:
            words = array("Q", [word & WORD for word in chain.from_iterable(rows)])
        count = len(rows)
        rows.clear()
        self._name()
        self._write(memoryview(array("Q", (MAGIC, count, floor)) + words).cast("B"), count)

    def _write(self, data: memoryview, count: int) -> None:
        if self._file is None or self._error:
            self._dropped += count
            return
        written = 0
        try:
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as problem:
            self._error = problem.errno or 0
            self._dropped += count
            # The reader finds where it ends, should this fail too.
            with suppress(OSError):
                self._file.truncate(self._size)
            return
        self._size += written
        self._recorded += count

    def _name(self) -> None:
        """Write down what numbers stand for, if there are more than before."""
        if self._named == len(NAMES):
            return
        self._named = len(NAMES)
        self._save(LAYOUT, {"functions": NAMES, "reasons": [reason for reason, _ in EXITS]})

    def _save(self, name: str, what_: object) -> None:
        temporary = self._folder / f"{name}.new"
        try:
            temporary.write_text(json.dumps(what_))
            temporary.rename(self._folder / name)
        except OSError as problem:
            self._error = self._error or problem.errno or 0

    def stop(self, floor: int) -> Counts:
        """Write the rest; what was recorded. ``floor`` as for :meth:`flush`."""
        self.flush(floor)
        if self._file is not None:
            try:
                self._file.close()
            except OSError as problem:
                self._error = self._error or problem.errno or 0
        counts = Counts(self._recorded, self._dropped, self._error)
        self._save(COUNTS, asdict(counts))
        return counts
