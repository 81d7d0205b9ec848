# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes: what runs, with which files and where, and how it is ended.

A process is a generator. A command in the foreground runs as a step of its parent's task, since
the parent only waits; one in the background, in a pipeline or on a CPU of its own has a task
of its own. A signal is an exception in the task; one that waits for a disk gets it afterwards.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

from .files import Directory, Node, OpenFile, Steps, Wakeup, fail
from .tasks import Wait

if TYPE_CHECKING:
    from ..vcpu import Vcpu
    from .tasks import Task
    from .userland import Userland

__all__ = [
    "OPERATION_CYCLES",
    "Interrupted",
    "Job",
    "Killed",
    "Outlet",
    "Process",
    "Signal",
    "fork",
    "run",
]

EXEC_CYCLES = 600_000
"""What fork, exec, exit and wait of a small program take: about 0.3 ms at 2 GHz."""
OPERATION_CYCLES = 1_000
"""What a system call that does little takes, with what its program does around it."""
PATIENCE = 64  # operations after which others get their turn
BLOCK = 65536
OUTLET_SIZE = 1 << 18  # bytes that may wait for a client
MEMORY_MAX = 32 << 20  # bytes that the shells of one login may hold together


class Signal(IntEnum):
    """The signals that somebody here sends or names (signal(7))."""

    HUP = 1
    INT = 2
    QUIT = 3
    KILL = 9
    USR1 = 10
    SEGV = 11
    USR2 = 12
    PIPE = 13
    ALRM = 14
    TERM = 15
    CHLD = 17
    CONT = 18
    STOP = 19


class Killed(Exception):  # noqa: N818  # it is none
    """``process`` ends by ``signal``: raised where it runs, caught where it was started."""

    def __init__(self, process: Process, signal: int) -> None:
        super().__init__(process, signal)
        self.process = process
        self.signal = signal


class Interrupted(Exception):  # noqa: N818  # it is none
    """Ctrl-C: whatever an interactive shell runs is over, the shell is not."""


class Job:
    """What runs as one task of the kernel."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.pending: Exception | None = None
        self.waiting: Wait | None = None
        """What a signal may wake it from; None while it runs or waits for a disk."""

    def drive(self, work: Steps[int]) -> Steps[int]:
        """``work``, with what is thrown at it."""
        send = work.send
        value = None
        started = False  # nothing can be thrown at a generator that cannot catch it yet
        while True:
            try:
                if self.pending is None or not started:
                    started = True
                    wait = send(value)
                else:
                    problem, self.pending = self.pending, None
                    wait = work.throw(problem)
            except StopIteration as end:
                return int(end.value)
            value = yield wait
            self.waiting = None

    def throw(self, problem: Exception) -> None:
        """Have it raised where the job is, as soon as it can be."""
        self.pending = problem
        if self.waiting is not None:
            self.waiting.wake()


class Memory:
    """What the processes of one login hold together."""

    def __init__(self) -> None:
        self.size = 0


class Outlet(OpenFile):
    """To the world outside of the guest, which takes what it likes when it likes.

    ``send`` is given bytes; whoever passed them on says so with :meth:`sent`.
    """

    def __init__(self, send: Callable[[bytes], None], *, terminal: bool = False) -> None:
        super().__init__()
        self._send = send
        self._pending = 0
        self._drained = Wakeup()
        self._terminal = terminal
        self._hung_up = False

    def write(self, process: Process, data: bytes) -> Steps[None]:
        """Waits while too much is under way; raises EPIPE when nobody is there."""
        while self._pending >= OUTLET_SIZE and not self._hung_up:
            yield from process.wait(self._drained.wait())
        if self._hung_up:
            raise fail(errno.EIO if self._terminal else errno.EPIPE)
        self.put(data)

    def put(self, data: bytes) -> None:
        """The same for those who cannot wait, such as an echo: it is lost if too much waits."""
        if not self._hung_up and self._pending < OUTLET_SIZE:
            self._pending += len(data)
            self._send(data)

    def sent(self, count: int) -> None:
        """So many bytes have left."""
        self._pending -= count
        self._drained.wake()

    def hang_up(self) -> None:
        """Nobody is there any more."""
        self._hung_up = True
        self._drained.wake()

    @property
    def terminal(self) -> bool:
        """As it was made."""
        return self._terminal


class Process:
    """A program that runs. ``files`` are its descriptors, ``cpus`` where it may run."""

    def __init__(
        self,
        userland: Userland,
        parent: Process | None,
        name: str,
        files: dict[int, OpenFile],
        job: Job,
    ) -> None:
        self.userland = userland
        self.kernel = userland.kernel
        self.parent = parent
        self.name = name
        self.pid = userland.number(self)
        self.files = {number: file.hold() for number, file in files.items()}
        self.job = job
        self.folder: str = parent.folder if parent else "/"
        self.environment: Callable[[], dict[str, str]] = parent.environment if parent else dict
        self.cpus: frozenset[int] | None = parent.cpus if parent else None
        self.status: int | None = None
        self.signal = 0
        self.ended = Wakeup()
        self.on_end: Callable[[Process], None] | None = None
        self.children: list[Process] = []
        alone = parent is None or parent is userland.init
        self._memory: Memory = Memory() if alone or parent is None else parent._memory
        self._charged = 0
        self._operations = 0

    @property
    def vcpu(self) -> Vcpu:
        """The processor that it runs on now."""
        assert self.job.task is not None
        return self.kernel.vcpu_of(self.job.task)

    def end(self, status: int) -> None:
        """It is over: close what it has open and tell who waits."""
        self.status = status
        for file in self.files.values():
            file.drop()
        self.files = {}
        self._memory.size -= self._charged
        self.userland.forget(self)
        self.ended.wake()
        if self.on_end is not None:
            self.on_end(self)

    def kill(self, signal: int) -> None:
        """Send it ``signal``, which ends it (0 and those that programs ignore do nothing)."""
        if signal not in (0, Signal.CHLD, Signal.CONT) and self.status is None:
            self.job.throw(Killed(self, signal))

    def charge(self, count: int) -> bool:
        """Count ``count`` bytes (less than 0: back) as its own; False if it is too much now."""
        self._charged += count
        self._memory.size += count
        return count <= 0 or self._memory.size <= MEMORY_MAX

    # Waiting

    def wait(self, wait: Wait) -> Steps[None]:
        """Until it is woken, or a signal comes."""
        if self.job.pending is not None:
            yield None  # it has come already
            return
        self.job.waiting = wait
        yield wait

    def sleep(self, nanoseconds: int) -> Steps[None]:
        """For so long."""
        yield from self.wait(self.kernel.sleep(nanoseconds))

    def breathe(self) -> Steps[None]:
        """Count an operation; after some of them let others have the processor."""
        self._operations += 1
        if self._operations >= PATIENCE:
            self._operations = 0
            self.vcpu.spend(PATIENCE * OPERATION_CYCLES)
            yield None

    def wait_for(self, child: Process) -> Steps[int]:
        """The status that ``child`` ended with."""
        while child.status is None:
            yield from self.wait(child.ended.wait())
        return child.status

    # Files

    def find(self, path: str, *, follow: bool = True) -> Node:
        """The node at ``path``, from its current folder; raises OSError."""
        return self.userland.tree.find(path, self.folder, follow=follow)

    def open(self, path: str, flags: int = os.O_RDONLY) -> OpenFile:
        """Open it; with O_CREAT make it where there is none. Raises OSError."""
        node = self.userland.tree.walk(path, self.folder)[1]
        if node is None:
            if not flags & os.O_CREAT:
                raise fail(errno.ENOENT, path)
            node = self.userland.create(path, self.folder)
        elif isinstance(node, Directory) and flags & (os.O_WRONLY | os.O_RDWR):
            raise fail(errno.EISDIR, path)
        return node.open(self, flags)

    def read(self, file: OpenFile, size: int = BLOCK) -> Steps[bytes]:
        """Up to ``size`` bytes."""
        self._operations += 1
        if self._operations >= PATIENCE:
            yield from self.breathe()
        return (yield from file.read(self, size))

    def write(self, file: OpenFile, data: bytes) -> Steps[None]:
        """All of ``data``; a pipe without readers ends the process."""
        self._operations += 1
        if self._operations >= PATIENCE:
            yield from self.breathe()
        try:
            yield from file.write(self, data)
        except BrokenPipeError:
            raise Killed(self, Signal.PIPE) from None

    def all_of(self, file: OpenFile) -> Steps[bytes]:
        """Everything; raises ENOMEM for what never ends."""
        found = bytearray()
        while data := (yield from self.read(file)):
            found += data
            if len(found) > self.userland.largest:
                raise fail(errno.ENOMEM, "read error")
        return bytes(found)

    def descriptor(self, number: int) -> OpenFile:
        """The open file of that number; raises EBADF."""
        try:
            return self.files[number]
        except KeyError:
            raise fail(errno.EBADF) from None

    def out(self, text: str | bytes) -> Steps[None]:
        """To standard output."""
        data = text.encode(errors="surrogateescape") if isinstance(text, str) else text
        if data:
            yield from self.write(self.descriptor(1), data)

    def error(self, text: str) -> Steps[None]:
        """A line to standard error, as far as there is one."""
        if file := self.files.get(2):
            try:
                yield from self.write(file, (text + "\n").encode(errors="surrogateescape"))
            except OSError:
                return


def run(process: Process, steps: Steps[int]) -> Steps[int]:
    """``steps`` as ``process``, to its end; its status, which is 128 and more for a signal."""
    status = 1
    try:
        process.vcpu.spend(EXEC_CYCLES)
        yield from process.breathe()
        status = yield from steps
    except Killed as killed:
        if killed.process is not process:
            raise
        process.signal = killed.signal
        status = 128 + killed.signal
    except OSError as problem:
        what = problem.filename or "write error"
        yield from process.error(f"{process.name}: {what}: {problem.strerror}")
    except Interrupted:
        status = 128 + Signal.INT
        raise
    except MemoryError:
        yield from process.error(f"{process.name}: out of memory")
    except Exception as fault:  # the program's, whatever it is: the machine goes on
        process.userland.faults.append(fault)
        process.signal = Signal.SEGV
        status = 128 + Signal.SEGV
    finally:
        process.end(status)
    return status


def fork(process: Process, steps: Steps[int], cpu: int | None = None) -> None:
    """Have ``steps`` run as ``process`` in a task of its own."""
    job = process.job = Job()

    def work() -> Steps[int]:
        try:
            return (yield from run(process, steps))
        except (Killed, Interrupted):  # of a process that it was a part of
            return 128 + Signal.KILL

    if process.parent is not None:
        process.parent.children.append(process)
    job.task = process.kernel.spawn(job.drive(work()), cpu)
