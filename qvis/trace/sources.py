# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be recorded of a machine: one class for each source of events.

A source writes to a trace's ``raw`` folder while it records, all that it takes
to read it included, so that it can be read again later and elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import Protocol

import polars as pl

from ..build import build_all
from ..errors import GuestError, InfraError, LostMachineError, QvisError, UsageError
from ..machine.machine import Machine
from . import emulated, kvm, nested, qemu_events, simpletrace, tcg, tracefs
from .guest import kernel_moved
from .model import Clock
from .symbols import FIRST_VECTOR, Symbols
from .tcg import CountsReader

__all__ = [
    "BOOTS",
    "READERS",
    "SOURCES",
    "TELLING",
    "BootSource",
    "CountsReader",
    "Reading",
    "Source",
    "TcgSource",
    "merge",
    "open_source",
    "prepare",
]

QEMU_TRACE = "qemu.trace"
COUNTS = "counts.json"
NUDGE_DEADLINE = 2.0  # seconds
DEVICE_VECTORS = range(FIRST_VECTOR, 0xEC)  # what is above is timers and IPIs


class Source(Protocol):
    """Something that records a machine."""

    reader: str  # its name, by which READERS finds how to read it
    clock: Clock

    def start(self) -> None:
        """Begin to record."""

    def stop(self) -> list[str]:
        """End; why what was recorded is not all, in sentences. Works on a dead machine too."""


class BootSource(Protocol):
    """Something that records a machine from its first instruction on, until its script ends."""

    reader: str
    clock: Clock
    before: str
    """What an inner host does before it starts QEMU: shell text."""
    options: tuple[str, ...]
    """For the QEMU that runs the guest."""
    asks: bool
    """Whether to ask the machine while it runs leaves what it does as it is."""

    def prepare(self, folder: Path) -> None:
        """Given the folder of the machine, which is not started yet."""

    def started(self, machine: Machine) -> None:
        """Given the machine, which has begun to boot."""

    def fetch(self) -> None:
        """Get what only a living machine has; the guest has shut down."""

    def stop(self) -> list[str]:
        """As a :class:`Source`'s; the machine is gone."""


class Reading(Protocol):
    """What was recorded, being read."""

    @property
    def lost(self) -> int:
        """How many events were seen and not kept; complete when :meth:`frames` is exhausted."""

    @property
    def partial(self) -> Sequence[str]:
        """Why this is not all, in sentences; complete at the same time."""

    def frames(self) -> Iterator[pl.DataFrame]:
        """The events in order of time, once."""


def open_source(machine: Machine, raw: Path, vmlinux: Path | None) -> Source:
    """What records ``machine``, as its backend said; ``vmlinux`` if it was not qvis that built it.

    Raises :class:`UsageError` for a ``vmlinux`` that will not do, and
    :class:`~qvis.errors.InfraError` when the machine cannot be recorded, with what it would
    take.
    """
    reader = machine.info.get("reader", "an earlier qvis")
    if reader == TcgSource.reader:
        return TcgSource(machine, raw, vmlinux)
    if reader not in SOURCES:
        raise InfraError(
            f"nothing here records machines by {reader!r}, as their backend would have it",
            stage="trace",
        )
    if vmlinux:
        raise UsageError(f"--vmlinux is for TCG: {reader} needs no symbols")
    return SOURCES[reader](machine, raw)


class TcgSource:
    """The TCG plugin, and QEMU's own trace events for what no vCPU does."""

    reader = "tcg-plugin"
    clock = Clock.INSTRUCTIONS

    def __init__(self, machine: Machine, raw: Path, vmlinux: Path | None = None) -> None:
        symbols = Symbols.read(vmlinux or Path(machine.info["vmlinux"]))
        moved = kernel_moved(machine.ssh, symbols)
        functions = [address + moved for address in symbols.functions()]
        self._machine = machine
        self._raw = raw
        self._recorder = tcg.Recorder(machine.folder.path, functions, raw)
        tcg.write_layout(raw, symbols, functions, moved)

    def start(self) -> None:
        self._recorder.claim()
        self._watch = qemu_events.Watch(self._machine.name)
        try:
            qemu_events.start(self._machine.qmp, self._raw / QEMU_TRACE)
            self._recorder.start(self._nudge)
        except BaseException:
            with contextlib.suppress(QvisError):
                qemu_events.quiet(self._machine.qmp)
            self._watch.end()
            self._recorder.release()
            raise

    def stop(self) -> list[str]:
        partial = [f"this QEMU does not tell plugins of {what}" for what in self._recorder.blind]
        try:
            if not self._recorder.stop(self._nudge):
                partial.append("the tracer had no sign of life from qvis for too long, and stopped")
            qemu_events.quiet(self._machine.qmp)
        except LostMachineError as problem:
            partial.append(f"the machine died: {problem.message}")
        except QvisError as problem:
            partial.append(f"the tracer could not be stopped in order: {problem.message}")
        self._watch.end()
        return partial + save_counts(self._raw, self._recorder.counts())

    def _nudge(self) -> None:
        """An SSH packet is an interrupt, whether or not it is answered."""
        if not self._machine.folder.alive:
            raise LostMachineError(f"machine {self._machine.name!r} is gone")
        with contextlib.suppress(GuestError, LostMachineError):
            self._machine.ssh.run("true", deadline=NUDGE_DEADLINE)


def prepare(folder: Path, raw: Path, symbols: Symbols) -> None:
    """Have the tracer of a machine that is not started yet record from the beginning."""
    tcg.write_layout(raw, symbols, list(symbols.functions()), 0)
    tcg.write_request(folder, raw, list(symbols.functions()))


class TcgBoot:
    """What :class:`TcgSource` is, for a boot."""

    reader = TcgSource.reader
    clock = TcgSource.clock
    before = ""
    asks = True

    def __init__(self, raw: Path, *, icount: bool) -> None:
        self._raw = raw
        self._symbols = Symbols.read(build_all().linux.vmlinux)
        events = [word for name in qemu_events.EVENTS for word in ("-trace", f"enable={name}")]
        path = str(raw / QEMU_TRACE).replace(",", ",,")  # a comma would end it
        self.options = (*events, "-trace", f"file={path}")

    def prepare(self, folder: Path) -> None:
        prepare(folder, self._raw, self._symbols)

    def started(self, machine: Machine) -> None:
        self._counts = CountsReader(machine.folder.path)

    def fetch(self) -> None:
        pass  # the tracer writes its files itself, the last of them at its end

    def stop(self) -> list[str]:
        return save_counts(self._raw, self._counts())


def save_counts(raw: Path, counts: tcg.Counts) -> list[str]:
    """Keep the tracer's counts with what it recorded; what they say of its being partial."""
    partial = []
    if counts.error:
        partial.append(f"the tracer could not write: {os.strerror(counts.error)}")
    if dropped := sum(counts.dropped):
        partial.append(f"{dropped} events were dropped, since there was no room for them")
    said = json.dumps({"recorded": counts.recorded, "dropped": counts.dropped})
    try:
        temporary = raw / f"{COUNTS}.new"
        temporary.write_text(said)
        temporary.rename(raw / COUNTS)
    except OSError as problem:
        partial.append(f"the tracer's own counts could not be kept: {problem.strerror}")
    return partial


class TcgReading:
    """Both of what a :class:`TcgSource` recorded, as one."""

    def __init__(self, raw: Path) -> None:
        self._raw = raw
        self.lost = 0
        self.partial: list[str] = []

    def frames(self) -> Iterator[pl.DataFrame]:
        recorded: list[int] | None = None
        try:
            counts = json.loads((self._raw / COUNTS).read_text())
            recorded, self.lost = list(map(index, counts["recorded"])), sum(counts["dropped"])
        except FileNotFoundError:
            self.partial.append("the recorder was killed: how much it recorded is not known")
        except (ValueError, KeyError, TypeError) as problem:
            raise UsageError(f"{self._raw / COUNTS} is damaged: {problem!r}") from problem
        streams = [tcg.frames(self._raw, recorded, self.partial)]
        if (self._raw / QEMU_TRACE).exists():
            events = simpletrace.frames(self._raw / QEMU_TRACE, DEVICE_VECTORS, self.partial)
            streams.append(events)
        yield from merge(streams)


class KvmSource:
    """KVM's tracepoints of the machine's QEMU."""

    reader = "kvm-tracepoints"

    def __init__(self, machine: Machine, raw: Path) -> None:
        if reason := tracefs.probe():
            raise InfraError(reason, stage="trace")
        self.clock = kvm.CLOCKS[tracefs.offered_clock()]
        threads = {cpu["thread-id"]: cpu["cpu-index"] for cpu in machine.qmp("query-cpus-fast")}
        self._recorder = tracefs.Recorder(machine.process, threads, raw)

    def start(self) -> None:
        self._recorder.__enter__()

    def stop(self) -> list[str]:
        try:
            self._recorder.__exit__(None, None, None)
        except InfraError as problem:
            return [problem.message, *self._recorder.partial]
        return list(self._recorder.partial)


class NestedSource:
    """KVM's tracepoints in the inner host of a nested machine."""

    reader = "kvm-nested"

    def __init__(self, machine: Machine, raw: Path) -> None:
        if machine.host is None:
            raise InfraError("this machine has no inner host to record in", stage="trace")
        # It goes on after its first recording, and waits for the next.
        machine.host.run(f"pidof qvis-record || {nested.SERVE}")
        self.clock = nested.clock(machine.spec.icount)
        self._recorder = nested.Recorder(machine.folder.path, raw, self.clock)

    def start(self) -> None:
        self._recorder.start()

    def stop(self) -> list[str]:
        return self._recorder.stop()


class NestedBoot:
    """The same for a boot: the inner host records, and nobody outside talks to it meanwhile."""

    reader = NestedSource.reader
    before = nested.BEFORE
    options: tuple[str, ...] = ()
    asks = False

    def __init__(self, raw: Path, *, icount: bool) -> None:
        self.clock = nested.clock(icount)
        self._raw = raw
        self._partial: list[str] | None = None

    def prepare(self, folder: Path) -> None:
        self._recorder = nested.Recorder(folder, self._raw, self.clock)

    def started(self, machine: Machine) -> None:
        pass

    def fetch(self) -> None:
        self._partial = self._recorder.stop()

    def stop(self) -> list[str]:
        return self._recorder.stop() if self._partial is None else self._partial


class EmulatedSource:
    """The emulated machine's own account, which ends with the connection that asked for it."""

    reader = "emulated"
    clock = Clock.MODELLED

    def __init__(self, machine: Machine, raw: Path) -> None:
        self._machine = machine
        self._raw = raw

    def start(self) -> None:
        self._machine.qmp("x-qvis-trace-start", folder=str(self._raw))

    def stop(self) -> list[str]:
        try:
            self._machine.qmp("x-qvis-trace-stop")  # it keeps its own counts
        except LostMachineError as problem:
            return [f"the machine died: {problem.message}"]
        except QvisError as problem:
            return [f"the recording could not be ended in order: {problem.message}"]
        return []


SOURCES: dict[str, Callable[[Machine, Path], Source]] = {
    TcgSource.reader: TcgSource,
    KvmSource.reader: KvmSource,
    NestedSource.reader: NestedSource,
    EmulatedSource.reader: EmulatedSource,
}
"""What records a machine into a raw folder, by the name that its backend gives."""

BOOTS: dict[str, Callable[..., BootSource]] = {
    TcgBoot.reader: TcgBoot,
    NestedBoot.reader: NestedBoot,
}
"""What records a boot into a raw folder, likewise; the folder, and by keyword ``icount``."""

READERS: dict[str, Callable[[Path], Reading]] = {
    TcgSource.reader: TcgReading,
    KvmSource.reader: kvm.Reader,
    NestedSource.reader: kvm.Reader,
    EmulatedSource.reader: emulated.Reading,
}
"""How a trace's raw folder is read, by the source that wrote it."""

TELLING = frozenset({TcgSource.reader, EmulatedSource.reader})
"""Those that tell of the guest's functions and of what IOAPICs see, as KVM's tracepoints do not."""


def merge(streams: list[Iterator[pl.DataFrame]]) -> Iterator[pl.DataFrame]:
    """Streams of frames, each in order of time, as one."""
    pending: list[pl.DataFrame | None] = [None] * len(streams)
    live = set(range(len(streams)))
    while live:
        for number in list(live):
            while pending[number] is None or not len(pending[number]):  # type: ignore[arg-type]
                frame = next(streams[number], None)
                if frame is None:
                    live.discard(number)
                    break
                pending[number] = frame
        waiting = [frame for frame in pending if frame is not None and len(frame)]
        if not waiting:
            return
        # Whatever a stream has yet to bring is later than the last that it brought.
        horizon = min(
            (frame["time"][-1] for number, frame in enumerate(pending)
             if number in live and frame is not None),
            default=None,
        )  # fmt: skip
        taken = []
        for number, frame in enumerate(pending):
            if frame is None or not len(frame):
                continue
            split = len(frame) if horizon is None else frame["time"].search_sorted(horizon, "right")
            taken.append(frame[:split])
            pending[number] = frame[split:]
        yield pl.concat(taken).sort("time", maintain_order=True)
