# SPDX-License-Identifier: GPL-2.0-or-later
"""The TCG plugin's side of a trace: telling it what to record, and reading what it wrote.

The layouts are those of ``qvis/tcgplugin/control.h``.
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ..errors import InfraError, UsageError
from ..folder import TRACE_CONTROL
from .model import SCHEMA, Kind, Space
from .symbols import FIRST_VECTOR, Symbols

__all__ = ["Counts", "CountsReader", "Recorder", "frames", "write_layout", "write_request"]

LAYOUT = "layout.json"  # in a trace's raw folder: what the records do not say themselves
MAGIC = 0x4352545349565100
VERSION = 1
MAX_FUNCTIONS = 128
MAX_VCPUS = 1024
MAX_PATH = 1024
IDLE, RECORDING = 0, 1
SEES_ACCESSES, SEES_PORTS, SEES_INTERRUPTS = 1, 2, 4
STORE, PORT = 1, 2
HEADER, ACCESS, INTERRUPT, FUNCTION = range(4)
LAST_TIME = 2**63 - 1

ANSWER_DEADLINE = 20.0  # seconds; on an idle guest it takes one interrupt
NUDGE = 0.2  # seconds after which a vCPU that does nothing is given something to do
LEASE = 10.0  # seconds that the tracer goes on without a sign of life from us
CHUNK = 1 << 18  # records of all vCPUs that are looked at together

CONTROL_TYPE = np.dtype(
    [
        ("magic", "<u8"),
        ("version", "<u4"),
        ("sees", "<u4"),
        ("request", "<u4"),
        ("want", "<u4"),
        ("nr_functions", "<u4"),
        ("reserved", "<u4"),
        ("lease", "<u8"),
        ("functions", "<u8", (MAX_FUNCTIONS,)),
        ("folder", f"S{MAX_PATH}"),
        ("answered", "<u4"),
        ("state", "<u4"),
        ("error", "<i4"),
        ("nr_vcpus", "<u4"),
        ("vcpus", [("recorded", "<u8"), ("dropped", "<u8")], (MAX_VCPUS,)),
    ]
)
RECORD_TYPE = np.dtype(
    [
        ("time", "<u8"),
        ("clock", "<u8"),
        ("a", "<u8"),
        ("b", "<u8"),
        ("kind", "u1"),
        ("size", "u1"),
        ("flags", "u1"),
        ("pad", "u1", (5,)),
    ]
)
Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class Counts:
    """What the plugin counted: events kept by vCPU, and those there was no room for."""

    recorded: list[int]
    dropped: list[int]
    error: int  # errno of the first file that could not be made or grown; 0: none


def _map(machine: Path, *, new: bool = False) -> np.memmap[Any, Any]:
    path = machine / TRACE_CONTROL
    if new:
        path.write_bytes(bytes(CONTROL_TYPE.itemsize))
    return np.memmap(path, dtype=CONTROL_TYPE, mode="r+", shape=(1,))


def _fill(control: Any, raw: Path, functions: Sequence[int]) -> None:
    if len(str(raw).encode()) >= MAX_PATH:
        raise UsageError(f"the path of {raw} is too long for the tracer")
    control["folder"] = str(raw).encode()
    control["nr_functions"] = min(len(functions), MAX_FUNCTIONS)
    control["functions"][: len(functions)] = functions[:MAX_FUNCTIONS]


def write_request(machine: Path, raw: Path, functions: Sequence[int]) -> None:
    """Have the plugin of a machine that is not started yet record from the beginning."""
    control = _map(machine, new=True)[0]
    _fill(control, raw, functions)
    control["want"] = RECORDING


class CountsReader:
    """Calls give what a machine's plugin has recorded so far; also when its folder is gone."""

    def __init__(self, machine: Path) -> None:
        self._control = _map(machine)[0]

    def __call__(self) -> Counts:
        return _counts(self._control)


def _counts(control: Any) -> Counts:
    vcpus = control["vcpus"]
    used = np.flatnonzero(vcpus["recorded"] + vcpus["dropped"])
    count = int(used[-1]) + 1 if len(used) else 0
    return Counts(
        vcpus["recorded"][:count].tolist(),
        vcpus["dropped"][:count].tolist(),
        int(control["error"]),
    )


class Recorder:
    """The plugin of one running machine, by way of the file that it shares with us."""

    def __init__(self, machine: Path, functions: Sequence[int], raw: Path) -> None:
        """Record into the folder ``raw``; ``functions`` are addresses to be told of.

        Raises :class:`InfraError` when the machine was started without the
        plugin, or has one of another version.
        """
        self._machine = machine
        self._raw = raw
        self._functions = functions
        try:
            self._control = _map(machine)[0]
        except (OSError, ValueError) as problem:
            raise InfraError(
                "this machine was started without the tracer: end it and start it again",
                stage="trace",
            ) from problem
        if self._control["magic"] != MAGIC or self._control["version"] != VERSION:
            raise InfraError(
                "this machine was started with a tracer of another version: end it and start it "
                "again",
                stage="trace",
            )
        self._stopped = threading.Event()
        self._renewer = threading.Thread(target=self._keep_renewing, daemon=True)

    @property
    def blind(self) -> list[str]:
        """What this QEMU does not let its plugins see, in words."""
        lacks = {
            SEES_PORTS: "accesses to I/O ports",
            SEES_INTERRUPTS: "interrupts being taken",
        }
        return [what for bit, what in lacks.items() if not int(self._control["sees"]) & bit]

    def start(self, nudge: Callable[[], None]) -> None:
        """Begin, after :meth:`claim`; ``nudge`` makes the guest do something.

        Raises :class:`InfraError` without an answer.
        """
        self._renew()
        self._renewer.start()
        try:
            self._ask(RECORDING, nudge)
        except BaseException:
            self._end()
            raise

    def claim(self) -> None:
        """Have the tracer for us alone; :class:`UsageError` when somebody else has it."""
        self._lock = (self._machine / TRACE_CONTROL).open("rb")
        try:
            # Dropped by the kernel, however we end.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            self._lock.close()
            raise UsageError(
                f"machine {self._machine.name!r} is being recorded already: end that first, since "
                "it has one tracer"
            ) from problem
        try:
            _fill(self._control, self._raw, self._functions)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give it back without having started."""
        self._lock.close()

    def stop(self, nudge: Callable[[], None]) -> bool:
        """End the recording; the files are whole then.

        Whether it was still going on is told: a recorder that was suspended for
        longer than its lease finds that it was not.
        """
        went_on = self._control["state"] == RECORDING
        try:
            self._ask(IDLE, nudge)
        finally:
            self._end()
        return bool(went_on)

    def _end(self) -> None:
        """Leave the tracer to others; should it still record, it is to end on its own."""
        self._stopped.set()
        self._renewer.join()
        self._control["want"] = IDLE
        self._control["lease"] = 1
        self._lock.close()

    def counts(self) -> Counts:
        """How much was recorded so far; also by a machine that is gone, with its folder."""
        return _counts(self._control)

    def _renew(self) -> None:
        self._control["lease"] = time.monotonic_ns() + int(LEASE * 1e9)

    def _keep_renewing(self) -> None:
        while not self._stopped.wait(LEASE / 10):
            self._renew()

    def _ask(self, want: int, nudge: Callable[[], None]) -> None:
        self._control["want"] = want
        self._control["request"] += 1
        end = time.monotonic() + ANSWER_DEADLINE
        nudged = time.monotonic() + NUDGE
        while self._control["answered"] != self._control["request"]:
            if time.monotonic() > end:
                raise InfraError(
                    f"the tracer did not answer within {ANSWER_DEADLINE:.0f} s: does the guest "
                    "run?",
                    stage="trace",
                )
            if time.monotonic() > nudged:
                nudge()
                nudged = time.monotonic() + NUDGE
            time.sleep(0.002)


def write_layout(raw: Path, symbols: Symbols | None, functions: Sequence[int], moved: int) -> None:
    """Note in ``raw`` what makes sense of its records.

    ``moved`` is how far the kernel is from where it was linked to, in bytes.
    """
    names = symbols.functions() if symbols else {}
    stubs = symbols.entry_stubs() if symbols else (0, 0)
    entries = symbols.system_entries() if symbols else {}
    layout = {
        "version": VERSION,
        "functions": [names[address - moved] for address in functions],
        "first_stub": stubs[0] + moved if symbols else 0,
        "stub_size": stubs[1],
        "stubs": symbols.stubs() if symbols else 0,
        "system_entries": {str(address + moved): name for address, name in entries.items()},
    }
    (raw / LAYOUT).write_text(json.dumps(layout, indent=1) + "\n")


@dataclass(frozen=True)
class _Layout:
    functions: list[str]
    first_stub: int
    stub_size: int
    stubs: int
    system_entries: dict[int, str]

    @classmethod
    def read(cls, raw: Path) -> _Layout:
        file = raw / LAYOUT
        try:
            data = json.loads(file.read_text())
            if data["version"] != VERSION:
                raise UsageError(f"{raw} was recorded by another version of the tracer")
            return cls(
                list(data["functions"]),
                index(data["first_stub"]),
                index(data["stub_size"]),
                index(data["stubs"]),
                {int(address): name for address, name in data["system_entries"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise UsageError(f"{file} is damaged: {problem!r}") from problem


class _File:
    """One vCPU's records, read in pieces."""

    def __init__(self, path: Path, limit: int | None, partial: list[str]) -> None:
        """``limit`` is how many there are, where that is known."""
        self._name = path.name
        self._partial = partial
        self._good = 0
        self._last = 0
        size = path.stat().st_size
        self.torn = size % RECORD_TYPE.itemsize
        self._left = size // RECORD_TYPE.itemsize
        self._counted = True
        self._file = path.open("rb")
        try:
            self.vcpu = self._header(path)
        except BaseException:
            self._file.close()
            raise
        self.missing = max(0, limit - self._left) if limit is not None else 0
        if limit is not None:  # a recording that was cut short ends with room for more
            self._left = min(self._left, limit)
        self._counted = limit is not None
        self.pending: Records = np.empty(0, dtype=RECORD_TYPE)

    def _header(self, path: Path) -> int:
        """Whose file it is."""
        header = self._take(1)
        if not header.tobytes().strip(b"\0"):
            # On a full disk there is a file, and then no room for anything in it.
            self._left = self.torn = 0
            return 0
        if header["a"][0] != MAGIC:
            raise UsageError(f"{path} is no recording of the tracer")
        if header["b"][0] & 0xFFFFFFFF != VERSION:
            raise UsageError(f"{path} was recorded by another version of the tracer")
        return int(header["b"][0] >> np.uint64(32))

    def _take(self, count: int) -> Records:
        count = min(count, self._left)
        self._left -= count
        records = np.fromfile(self._file, dtype=RECORD_TYPE, count=count)
        if not self._counted:  # then what was never written tells where the end is
            unwritten = np.flatnonzero(records["kind"] == HEADER)
            if len(unwritten):
                records, self._left = records[: unwritten[0]], 0
        return records

    def _take_events(self, count: int) -> Records:
        """The next records, up to the first that can be none: time never goes back."""
        events = self._take(count)
        time = events["time"]
        before = np.concatenate([np.array([self._last], dtype=np.uint64), time[:-1]])
        wrong = (time < before) | (time > LAST_TIME)
        wrong |= (events["kind"] < ACCESS) | (events["kind"] > FUNCTION)
        if wrong.any():
            good = int(np.argmax(wrong))
            self._partial.append(
                f"{self._name} is damaged after {self._good + good} events: what follows is left "
                "out"
            )
            events, self._left = events[:good], 0
        if len(events):
            self._good += len(events)
            self._last = int(events["time"][-1])
        return events

    def fill(self, count: int) -> None:
        """Have ``count`` records at hand, if there are as many."""
        if len(self.pending) < count and self._left:
            self.pending = np.concatenate(
                [self.pending, self._take_events(count - len(self.pending))]
            )

    @property
    def ended(self) -> bool:
        """Whether all that is left is at hand."""
        return not self._left

    def until(self, horizon: int) -> Records:
        """Take those at hand up to and with the time ``horizon``."""
        split = int(np.searchsorted(self.pending["time"], horizon, side="right"))
        taken, self.pending = self.pending[:split], self.pending[split:]
        return taken

    def close(self) -> None:
        self._file.close()


def frames(raw: Path, recorded: Sequence[int] | None, partial: list[str]) -> Iterator[pl.DataFrame]:
    """What the plugin wrote to the folder ``raw``, merged by time.

    ``recorded`` is the plugin's own count by vCPU, where it is known. Why this is
    not all is added to ``partial``. Memory is bounded, whatever the size. Raises
    :class:`UsageError` for files that are not the plugin's.
    """
    layout = _Layout.read(raw)
    files = []
    try:
        expected = dict(enumerate(recorded or ()))
        for path in sorted(raw.glob("vcpu-[0-9]*.bin")):
            count = expected.pop(int(path.stem.split("-")[1]), 0)
            file = _File(path, None if recorded is None else count, partial)
            files.append(file)
            if file.missing:
                partial.append(f"{path.name} is cut short: {file.missing} events are missing")
            elif file.torn:
                partial.append(f"{path.name} ends in the middle of an event")
        partial += [
            f"vcpu-{vcpu:04}.bin is missing, with {count} events"
            for vcpu, count in expected.items()
            if count
        ]
        yield from _merge(files, layout)
    finally:
        for file in files:
            file.close()


def _merge(files: list[_File], layout: _Layout) -> Iterator[pl.DataFrame]:
    while files:
        share = max(1024, CHUNK // len(files))
        for file in files:
            file.fill(share)
        # What comes later in a file is later; so up to here nothing is still to come.
        horizon = min(
            (int(file.pending["time"][-1]) for file in files if not file.ended), default=2**63 - 1
        )
        parts = [(file.vcpu, file.until(horizon)) for file in files]
        records = np.concatenate([part for _, part in parts])
        vcpu = np.repeat([vcpu for vcpu, _ in parts], [len(part) for _, part in parts])
        order = np.argsort(records["time"], kind="stable")
        yield _frame(records[order], vcpu[order], layout)
        for file in [file for file in files if file.ended and not len(file.pending)]:
            files.remove(file)
            file.close()


def _frame(records: Records, vcpu: npt.NDArray[np.int64], layout: _Layout) -> pl.DataFrame:
    kind, b = records["kind"], records["b"]
    interrupt, function = kind == INTERRUPT, kind == FUNCTION
    # Which vector it is tells the stub that the vCPU went to.
    stub = (b - np.uint64(layout.first_stub)).view(np.int64) // max(1, layout.stub_size)
    vector = np.where(interrupt & (stub >= 0) & (stub < layout.stubs), stub + FIRST_VECTOR, -1)
    names = [*layout.functions, *layout.system_entries.values()]
    name = np.where(function & (b < len(layout.functions)), b.view(np.int64), -1)
    for number, address in enumerate(layout.system_entries, start=len(layout.functions)):
        name[interrupt & (b == address)] = number
    if layout.stubs:
        # QEMU 10.2 tells plugins of x86 exceptions as if they were interrupts: do_interrupt_all()
        # in target/i386/tcg/seg_helper.c serves both. Where they lead to tells them apart.
        kept = ~interrupt | (vector >= 0) | (name >= 0)
        return _frame_of(records[kept], vcpu[kept], vector[kept], name[kept], names)
    return _frame_of(records, vcpu, vector, name, names)


def _frame_of(
    records: Records,
    vcpu: npt.NDArray[np.int64],
    vector: npt.NDArray[np.int64],
    name: npt.NDArray[np.int64],
    names: list[str],
) -> pl.DataFrame:
    kind, a, b = records["kind"], records["a"], records["b"]
    access, interrupt, function = (kind == code for code in (ACCESS, INTERRUPT, FUNCTION))
    port = access & (records["flags"] & PORT != 0)
    kinds = [str(Kind.ACCESS), str(Kind.DELIVER), str(Kind.FUNCTION)]
    columns = {
        "time": pl.Series(records["time"].astype(np.int64)),
        "clock": pl.Series(records["clock"]),
        "vcpu": pl.Series(vcpu.astype(np.uint16)),
        "kind": pl.Series(kinds, dtype=SCHEMA["kind"]).gather(np.clip(kind, 1, 3) - 1),
        "space": _pick([Space.MEMORY, Space.PORT], np.where(access, port, -1), SCHEMA["space"]),
        "address": _only(a, access),
        "size": _only(records["size"], access),
        "write": _only(records["flags"] & STORE != 0, access),
        "value": _only(np.where(access, b, a), access | function),
        "vector": _only(vector.astype(np.uint8), vector >= 0),
        "function": _pick(names, name, SCHEMA["function"]),
        "pc": _only(a, interrupt),
    }
    rest = [
        pl.lit(None, dtype).alias(name) for name, dtype in SCHEMA.items() if name not in columns
    ]
    return pl.DataFrame(columns).with_columns(rest).select(SCHEMA.names()).cast(SCHEMA)


def _only(values: npt.NDArray[np.generic], where: npt.NDArray[np.bool_]) -> pl.Series:
    """The values where they mean something, and null elsewhere."""
    column = pl.Series(values)
    return pl.select(pl.when(pl.Series(where)).then(column)).to_series()


def _pick(names: Sequence[str], code: npt.NDArray[np.int64], dtype: pl.DataType) -> pl.Series:
    """The names by number; null for -1."""
    return pl.Series(names, dtype=dtype).gather(pl.Series(code, dtype=pl.Int64).replace(-1, None))
