# SPDX-License-Identifier: GPL-2.0-or-later
"""What an emulated machine recorded, as events of the model.

Rows are those of :mod:`qvis.emulated.recorder`. Times are modelled: ``clock`` is in modelled
cycles, and ``time`` in ns of the same.

What exits is an EXIT under KVM's name of the reason, with the register behind it; an access
that an APICv would have done without one is an ACCESS. The duration of an exit is what a
table of costs says, and for HLT does not include how long the vCPU then sleeps. Whether KVM or
QEMU dealt with it is in no column, as in KVM's own traces.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ..emulated.costs import FREQUENCY
from ..emulated.recorder import (
    BLOCK_WORDS,
    COUNTS,
    FILE,
    LAYOUT,
    MAGIC,
    NOBODY,
    ROW_WORDS,
    RowKind,
)
from ..errors import UsageError
from .model import SCHEMA, Cause, Clock, Kind, Space

__all__ = ["Reading"]

Words = npt.NDArray[np.uint64]

MOST_ROWS = 1 << 24  # of a block: what claims more is damaged
KINDS = {
    RowKind.ACCESS: Kind.ACCESS,
    RowKind.EXIT: Kind.EXIT,
    RowKind.RAISE: Kind.RAISE,
    RowKind.DELIVER: Kind.DELIVER,
    RowKind.FUNCTION: Kind.FUNCTION,
    RowKind.EOI: Kind.EOI,
}
NOWHERE = np.uint64(2**64 - 1)
SPACES = (Space.MEMORY, Space.PORT, Space.MSR)


class Reading:
    """The recording in the folder ``raw``, as of :class:`~qvis.trace.sources.Reading`.

    Raises :class:`UsageError` when it is none.
    """

    clock = Clock.MODELLED

    def __init__(self, raw: Path) -> None:
        self._path = raw / FILE
        self.partial: list[str] = []
        """Why this is not all, in sentences; complete when :meth:`frames` is exhausted."""
        self.lost = 0
        """Events that there was no room for."""
        self._recorded: int | None = None
        try:
            layout = json.loads((raw / LAYOUT).read_text())
            self._functions = _strings(layout["functions"])
            self._reasons = _strings(layout["reasons"])
        except FileNotFoundError:
            raise UsageError(f"{raw} is no recording: it has no {LAYOUT}") from None
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise UsageError(f"{raw / LAYOUT} is damaged: {problem!r}") from problem
        try:
            counts = json.loads((raw / COUNTS).read_text())
            self._recorded, self.lost = index(counts["recorded"]), index(counts["dropped"])
            error = index(counts["error"])
        except FileNotFoundError:
            self.partial.append("the recorder was killed: how much it recorded is not known")
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise UsageError(f"{raw / COUNTS} is damaged: {problem!r}") from problem
        else:
            if error:
                self.partial.append(f"the recorder could not write: {os.strerror(error)}")
            if self.lost:
                self.partial.append(
                    f"{self.lost} events were dropped, since there was no room for them"
                )

    def frames(self) -> Iterator[pl.DataFrame]:
        """The events in order of time, once. Memory is bounded, whatever the size."""
        held = np.empty((0, ROW_WORDS), np.uint64)
        found = 0
        for rows, floor in self._blocks():
            found += len(rows)
            held = np.concatenate([held, rows])
            held = held[np.argsort(held[:, 2], kind="stable")]
            # What is yet to come is not before this.
            split = int(np.searchsorted(held[:, 2], np.uint64(floor), side="left"))
            if split:
                yield self._frame(held[:split])
                held = held[split:]
        if len(held):
            yield self._frame(held)
        if self._recorded is not None and found < self._recorded:
            missing = self._recorded - found
            self.partial.append(f"{FILE} is cut short: {missing} events are missing")

    def _blocks(self) -> Iterator[tuple[Words, int]]:
        """The rows of each block, and what time no later one is before."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            while True:
                header = file.read(8 * BLOCK_WORDS)
                if not header:
                    return
                if len(header) < 8 * BLOCK_WORDS:
                    self.partial.append(f"{FILE} ends in the middle of an event")
                    return
                magic, count, floor = map(int, np.frombuffer(header, "<u8"))
                if magic != MAGIC or count > MOST_ROWS:
                    raise UsageError(f"{self._path} is no recording of an emulated machine")
                data = file.read(8 * ROW_WORDS * count)
                whole = len(data) // (8 * ROW_WORDS)
                yield np.frombuffer(data, "<u8", whole * ROW_WORDS).reshape(-1, ROW_WORDS), floor
                if whole < count:
                    self.partial.append(f"{FILE} ends in the middle of an event")
                    return

    def _frame(self, rows: Words) -> pl.DataFrame:
        what, vcpu, clock, address, value, duration = rows.T.astype(np.uint64)
        kind = what & 0xFF
        space, size, write = what >> 8 & 0xFF, what >> 16 & 0xFF, what >> 24 & 1
        touch = space > 0
        exits, function = kind == RowKind.EXIT, kind == RowKind.FUNCTION
        vectored = np.isin(kind, [RowKind.RAISE, RowKind.DELIVER, RowKind.EOI])
        by_ioapic = vcpu == NOBODY
        name = np.where(function & (address < len(self._functions)), address, NOWHERE)
        reason = np.where(exits & (what >> 32 < len(self._reasons)), what >> 32, NOWHERE)
        columns = {
            "time": pl.Series((clock // np.uint64(FREQUENCY // 10**9)).astype(np.int64)),
            "clock": pl.Series(clock),
            "vcpu": _only(vcpu.astype(np.uint16), ~by_ioapic),
            "kind": _pick(list(KINDS.values()), kind - 1, SCHEMA["kind"]),
            "space": _pick(list(SPACES), np.where(touch, space - 1, NOWHERE), SCHEMA["space"]),
            "address": _only(address, touch),
            "size": _only(size.astype(np.uint8), touch),
            "write": _only(write > 0, touch),
            "value": _only(value, touch | function),
            "vector": _only(value.astype(np.uint8), vectored),
            "function": _pick(self._functions, name, SCHEMA["function"]),
            "reason": _pick(self._reasons, reason, SCHEMA["reason"]),
            "duration": _only(duration, exits),
            "device": _pick(["IOAPIC"], np.where(by_ioapic, 0, NOWHERE), SCHEMA["device"]),
            "cause": _pick([Cause.EOI], np.where(by_ioapic, 0, NOWHERE), SCHEMA["cause"]),
        }
        rest = [
            pl.lit(None, dtype).alias(name) for name, dtype in SCHEMA.items() if name not in columns
        ]
        return pl.DataFrame(columns).with_columns(rest).select(SCHEMA.names()).cast(SCHEMA)


def _strings(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("no list of names")
    return values


def _only(values: npt.NDArray[Any], where: npt.NDArray[np.bool_]) -> pl.Series:
    """The values where they mean something, and null elsewhere."""
    return pl.select(pl.when(pl.Series(where)).then(pl.Series(values))).to_series()


def _pick(names: Sequence[str], code: npt.NDArray[Any], dtype: pl.DataType) -> pl.Series:
    """The names by number; null where there is none of that number."""
    known = code < len(names)
    place = pl.Series(np.where(known, code, 0).astype(np.uint32))
    empty = pl.Series(names, dtype=dtype) if names else pl.Series([None], dtype=dtype)
    return pl.select(pl.when(pl.Series(known)).then(empty.gather(place))).to_series()
