# SPDX-License-Identifier: GPL-2.0-or-later
"""Recording ``kvm:*`` tracepoints of one QEMU on this host, by tracefs.

Each recording has an instance of tracefs of its own (``instances/qvis-*``):
own buffers, clock and filter, so that it disturbs nobody's tracing and
nobody's disturbs it. What the kernel hands out is written as it is, to be read
by :mod:`qvis.trace.kvm`, here or elsewhere, then or later.

Events are kept to the QEMU's by ``set_event_pid`` with ``event-fork``, since
kvm's events do not say which machine they are of. It decides before an event
is written, and follows new threads; a filter on ``common_pid`` would have to
name each thread, evaluates every event of every machine, and misses threads
that start later. Either way an event belongs to the thread that runs, so that
interrupts which the kernel itself passes on for the machine are not seen: from
a hard interrupt (VFIO), or from a kworker (an irqfd of an IOAPIC's line).
Workers of vhost are taken along. Thread numbers are those that the kernel's
first PID namespace has, so that a QEMU in a container with its own is not
found.

The buffers overwrite their oldest events when they are full, and mark the
place: with the other way, dropping new ones, there would be no mark, and exits
would be paired with entries of others.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from ..errors import InfraError, LostMachineError
from .kvm import CLOCKS, ESSENTIAL, EVENTS, Recording, lost
from .ringbuffer import COMMIT, Layout

__all__ = ["TRACEFS", "Recorder", "offered_clock", "probe"]

TRACEFS = Path("/sys/kernel/tracing")
INTERVAL = 0.05  # seconds between two looks at the buffers
BUFFERS = 256 << 10  # KiB for all CPUs
BUFFER_MIN, BUFFER_MAX = 1 << 10, 8 << 10  # KiB for one; 8 MiB are 100,000 events
RESERVE = 256 << 10  # bytes kept on the disk for what is written last
TRIES = 5  # to read two clocks at the same moment
GONE = 2.0  # seconds that the kernel may take to let go of an instance

_NOW = re.compile(r"^now ts: (\d+)$", re.MULTILINE)
_INSTANCE = re.compile(r"qvis-(\d+)-\d+")
_numbers = itertools.count()


def probe(root: Path = TRACEFS) -> str | None:
    """Why tracepoints of KVM cannot be recorded on this host and what would help, or None.

    ``root`` is where tracefs is mounted.
    """
    try:
        return _missing(root)
    except PermissionError:
        if os.geteuid() == 0:
            return (
                f"not even root may use tracefs at {root}: kernel lockdown or a container forbids"
            )
        return (
            f"this user may not use tracefs at {root}: run as root, or give it to this user by "
            f"`mount -o remount,uid={os.geteuid()} {root}` as root"
        )


def _missing(root: Path) -> str | None:
    """What there is not on this host, or None; PermissionError when that is for others to see."""
    try:
        present = {path.name for path in root.iterdir()}
    except FileNotFoundError:
        present = set()
    if "events" not in present:
        if "\ttracefs\n" not in Path("/proc/filesystems").read_text():
            return "this kernel has no tracefs: it needs CONFIG_FTRACE"
        return f"tracefs is not mounted at {root}: `mount -t tracefs tracefs {root}` as root"
    if "instances" not in present:
        return "this kernel's tracefs has no instances"
    if not os.access(root / "instances", os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError
    (root / "trace_clock").read_text()  # under lockdown one may look at names only
    try:
        events = {path.name for path in (root / "events" / "kvm").iterdir()}
    except FileNotFoundError:
        return "tracefs has no events of kvm: load KVM (`modprobe kvm_intel` or `kvm_amd` as root)"
    if missing := [event for event in ESSENTIAL if event not in events]:
        return f"this kernel's kvm has no event {missing[0]}"
    return None


def offered_clock(root: Path = TRACEFS) -> str:
    """The first of :data:`~qvis.trace.kvm.CLOCKS` that this kernel's tracing can be set to."""
    offered = re.findall(r"[\w-]+", (root / "trace_clock").read_text())
    return next(clock for clock in CLOCKS if clock in offered)


class Recorder:
    """Records the QEMU with process number ``pid`` into the folder ``raw`` while entered.

    ``vcpus`` says which vCPU each thread is, of QMP's ``query-cpus-fast``;
    ``root`` is where tracefs is mounted.

    Entering raises :class:`InfraError` when :func:`probe` has a reason, when
    the kernel refuses, or when ``raw`` cannot be written, and
    :class:`LostMachineError` when there is no such process. Leaving ends the
    recording and removes the instance, whatever happened; a full disk does not
    raise but is in ``partial``, and what was recorded until then is kept.
    """

    def __init__(
        self, pid: int, vcpus: Mapping[int, int], raw: Path, *, root: Path = TRACEFS
    ) -> None:
        self.lost = 0
        """Events that the kernel had no room for; known after leaving."""
        self.partial: tuple[str, ...] = ()
        """Why this is not all, each a sentence; known after leaving."""
        self._pid = pid
        self._vcpus = dict(vcpus)
        self._raw = raw
        self._root = root
        self._instance = root / "instances" / f"qvis-{os.getpid()}-{next(_numbers)}"
        self._cleanup = contextlib.ExitStack()
        self._clock = ""
        self._pairs: list[tuple[int, int]] = []

    def __enter__(self) -> Recorder:
        if reason := probe(self._root):
            raise InfraError(reason, stage="trace")
        try:
            with contextlib.ExitStack() as stack:
                self._start(stack)
                self._cleanup = stack.pop_all()
        except OSError as problem:
            raise InfraError(f"cannot record: {problem}", stage="trace") from problem
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._cleanup.close()
        except OSError as fault:
            raise InfraError(f"cannot end the recording: {fault}", stage="trace") from fault

    def _start(self, stack: contextlib.ExitStack) -> None:
        _sweep(self._root)
        (self._raw / "events" / "kvm").mkdir(parents=True, exist_ok=True)
        self._instance.mkdir()
        stack.callback(_remove, self._instance)
        self._set("tracing_on", "0")
        self._clock = offered_clock(self._instance)
        self._set("trace_clock", self._clock)
        cpus = sorted(int(path.name[3:]) for path in (self._instance / "per_cpu").glob("cpu*"))
        size = min(max(BUFFERS // len(cpus), BUFFER_MIN), BUFFER_MAX)
        self._set("buffer_size_kb", str(size))
        self._set("options/overwrite", "1")
        self._follow()
        for event in EVENTS:
            switch = self._instance / "events" / "kvm" / event / "enable"
            if switch.exists():
                _put(switch, "1")
                self._save(f"events/kvm/{event}/format")
        self._save("events/header_page")
        self._save("events/header_event")
        reserve = self._raw / "reserve"
        reserve.write_bytes(bytes(RESERVE))
        stack.callback(reserve.unlink)

        layout = Layout.read(self._raw / "events")
        drain = _Drain(self._instance, self._raw, cpus, layout)
        stack.callback(drain.close)
        self._note_time(cpus[0])
        drain.start()
        stack.callback(self._finish, drain, cpus)
        self._set("tracing_on", "1")

    def _finish(self, drain: _Drain, cpus: list[int]) -> None:
        """End the recording and write what the reader needs beside the events."""
        self._set("tracing_on", "0")
        drain.end()
        self._note_time(cpus[0])
        (self._raw / "reserve").write_bytes(b"")
        stats = {cpu: (self._instance / f"per_cpu/cpu{cpu}/stats").read_text() for cpu in cpus}
        self.lost = sum(lost(text) for text in stats.values())
        self.partial = tuple(drain.problems)
        Recording(self._clock, self._vcpus, tuple(self._pairs), partial=self.partial).save(
            self._raw
        )
        for cpu, text in stats.items():
            file = self._raw / f"per_cpu/cpu{cpu}/stats"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def _set(self, name: str, value: str) -> None:
        _put(self._instance / name, value)

    def _save(self, name: str) -> None:
        """Copy a file of tracefs to the same place in the recording."""
        target = self._raw / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((self._root / name).read_text())

    def _follow(self) -> None:
        """Record the threads that QEMU has, those it will have, and those that vhost has for it."""
        self._set("options/event-fork", "1")
        known: set[str] = set()
        # A thread may have started others between two looks; event-fork has those whose
        # parent was known when they started.
        while fresh := self._threads() - known:
            for thread in fresh:
                _put(self._instance / "set_event_pid", thread, os.O_APPEND)
            known |= fresh

    def _threads(self) -> set[str]:
        try:
            found = {path.name for path in Path(f"/proc/{self._pid}/task").iterdir()}
        except OSError:
            raise LostMachineError(
                f"no process {self._pid} to trace: the machine is gone", stage="trace"
            ) from None
        for comm in Path("/proc").glob("[0-9]*/comm"):
            with contextlib.suppress(OSError):
                if comm.read_text().strip() == f"vhost-{self._pid}":
                    found.add(comm.parent.name)
        return found

    def _note_time(self, cpu: int) -> None:
        """Note the monotonic clock and the TSC of the same moment, to tell one from the other.

        The kernel tells its trace clock in a CPU's statistics; of a few tries the
        one counts that took the shortest.
        """
        if self._clock != "x86-tsc":
            return
        tries = []
        for _ in range(TRIES):
            before = time.monotonic_ns()
            text = (self._instance / f"per_cpu/cpu{cpu}/stats").read_text()
            after = time.monotonic_ns()
            if now := _NOW.search(text):
                tries.append((after - before, (before + after) // 2, int(now[1])))
        if tries:
            self._pairs.append(min(tries)[1:])


class _Drain:
    """A thread that moves pages from the kernel's buffers to files, one for each CPU.

    It looks at all buffers in turn and then waits: a read takes what there is
    and never blocks. Pages that are not full yet can be read too, but each makes
    a page in the file, so that a look ends with the first of them.
    """

    def __init__(self, instance: Path, raw: Path, cpus: list[int], layout: Layout) -> None:
        self.problems: list[str] = []  # sentences
        self._layout = layout
        self._instance = instance
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qvis-trace", daemon=True)
        self._pipes: dict[int, int] = {}
        self._files: dict[int, int] = {}
        try:
            for cpu in cpus:
                pipe = instance / f"per_cpu/cpu{cpu}/trace_pipe_raw"
                self._pipes[cpu] = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
                file = raw / f"cpu{cpu}.raw"
                self._files[cpu] = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError:
            self.close()
            raise

    def start(self) -> None:
        """Start to record."""
        self._thread.start()

    def end(self) -> None:
        """Record what is left. Nothing may be added any more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def close(self) -> None:
        """Close everything, if need be after the end: the thread has these files by number."""
        self.end()
        for number in (*self._pipes.values(), *self._files.values()):
            os.close(number)

    def _run(self) -> None:
        try:
            while not self._ended.wait(INTERVAL):
                for cpu in self._pipes:
                    self._look(cpu, all_=False)
            for cpu in self._pipes:
                self._look(cpu, all_=True)
        except OSError as problem:
            self.problems.append(
                f"recording stopped {'at its end' if self._ended.is_set() else 'before its end'}: "
                f"{problem.strerror}; what was recorded until then is kept"
            )
            with contextlib.suppress(OSError):
                _put(self._instance / "tracing_on", "0")

    def _look(self, cpu: int, *, all_: bool) -> None:
        """Move the pages of a CPU: the full ones, and the one being filled, or ``all_``."""
        commit = self._layout.commit
        half = (self._layout.size - self._layout.data) // 2
        while True:
            try:
                page = os.read(self._pipes[cpu], self._layout.size)
            except BlockingIOError:
                return
            if not page:
                return
            self._write(self._files[cpu], page)
            used = int.from_bytes(page[commit.offset : commit.end], "little") & COMMIT
            if used < half and not all_:
                return

    def _write(self, file: int, page: bytes) -> None:
        """Append the page to the file, or none of it."""
        end = os.lseek(file, 0, os.SEEK_CUR)
        try:
            done = 0
            while done < len(page):
                done += os.write(file, page[done:])
        except OSError:
            os.ftruncate(file, end)
            raise


def _put(file: Path, value: str, how: int = os.O_TRUNC) -> None:
    """Write ``value`` into a file of tracefs, which must be there."""
    number = os.open(file, os.O_WRONLY | how)
    try:
        os.write(number, value.encode())
    finally:
        os.close(number)


def _sweep(root: Path) -> None:
    """Remove the instances of recorders that were killed."""
    for instance in (root / "instances").glob("qvis-*"):
        match = _INSTANCE.fullmatch(instance.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            with contextlib.suppress(OSError):
                instance.rmdir()


def _remove(instance: Path) -> None:
    """Remove the instance, which the kernel may still be letting go of."""
    deadline = time.monotonic() + GONE
    while True:
        try:
            instance.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
