# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings of KVM's tracepoints that come out of a nested machine's inner host.

There ``qvis-record`` (``guest-kernel/host/record.c``, which says what goes over
the wire) moves pages from the kernel's buffers to a virtio-serial port; here
they become the same files as those of :mod:`qvis.trace.tracefs`, to be read by
:mod:`qvis.trace.kvm`. Nothing is parsed in the inner host, where all is emulated.

The inner host's TSC is the emulator's: under ``icount`` it advances by one with each
instruction that the emulated machine executes, be it the inner host's or the guest's, and by what
there was to wait for when all of it sleeps. Without, it is the real host's time, which says
nothing of what an exit costs, and so is not told.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import BinaryIO

from ..errors import InfraError, LostMachineError, UsageError
from ..folder import TRACE_SOCKET
from .kvm import EVENTS, Recording
from .model import Clock

__all__ = ["BEFORE", "SERVE", "Recorder", "clock"]

SERVE = "qvis-record qvis.trace"
"""What an inner host runs to record when it is told to; the port is backends/nested.py's."""
BEFORE = f"{SERVE} {' '.join(EVENTS)}\n"
"""Likewise, to record from there on."""

START_DEADLINE = 60.0  # seconds
SILENCE = 60.0  # seconds without a byte after which nobody waits for more
LONGEST = 1 << 20  # bytes of a frame
HEAD = 200  # bytes of its first line
CLOCK = "x86-tsc"
LOCK = "trace.lock"  # in the machine's folder
NOMINAL_KHZ = 1e6  # of an emulated TSC; exact under icount
_FILES = re.compile(
    r"cpu\d{1,4}\.raw|events/header_(page|event)|events/kvm/\w{1,64}/format|per_cpu/cpu\d{1,4}/stats"
)


def clock(icount: bool) -> Clock:
    """What the TSC of a nested machine's inner host counts."""
    return Clock.INSTRUCTIONS if icount else Clock.NONE


class Recorder:
    """What records the machine in ``folder`` into ``raw``.

    ``clock`` is what :func:`clock` says of it. :meth:`start` and :meth:`stop` record what is
    between them; :meth:`stop` alone ends what the machine has recorded since its start, and
    fetches that.
    """

    def __init__(self, folder: Path, raw: Path, clock: Clock) -> None:
        self._address = folder / TRACE_SOCKET
        self._raw = raw
        self._clock = clock
        self._pairs: list[tuple[int, int]] = []
        self._files: dict[str, BinaryIO] = {}
        self._lock: int | None = None  # nobody else records while it is held
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._answered = threading.Event()  # "started", or that it will never come
        self._ended = threading.Event()  # in order
        self._begun = False
        self._heard = 0.0  # when the last frame came
        self._refusal = ""
        self._full = False  # the disk; from then on nothing is kept
        self._problems: list[str] = []

    def start(self) -> None:
        """Begin.

        Raises :class:`UsageError` while somebody else records, :class:`InfraError` when the inner
        host refuses or does not answer, and
        :class:`LostMachineError` when the machine is gone.
        """
        try:
            self._open()
            self._say("start", *EVENTS)
            self._await_answer()
        except BaseException:
            self._close()
            raise

    def _await_answer(self) -> None:
        if not self._answered.wait(START_DEADLINE):
            self._refusal = f"it did not answer within {START_DEADLINE:.0f} s"
        if self._refusal:
            raise InfraError(f"the inner host cannot record: {self._refusal}", stage="trace")
        if not self._begun:
            raise LostMachineError(
                f"the inner host did not begin to record: {self._problems[0]}", stage="trace"
            )

    def stop(self) -> list[str]:
        """End; why what was recorded is not all, in sentences. Works on a dead machine too."""
        try:
            if self._socket is None:
                self._open()
            self._say("stop")
        except LostMachineError as problem:
            self._problems.append(problem.message)
        while not self._ended.wait(0.1) and self._thread and self._thread.is_alive():
            if time.monotonic() - self._heard > SILENCE:
                self._problems.append(
                    f"the inner host did not say anything for {SILENCE:.0f} s: the end is missing"
                )
                break
        self._close()
        if self._refusal:
            self._problems.append(f"the inner host did not end the recording: {self._refusal}")
        partial = tuple(dict.fromkeys(self._problems))
        try:
            if not list(self._raw.glob("cpu*.raw")):
                (self._raw / "cpu0.raw").touch()  # a recording of nothing, but one
            counted = self._clock is not Clock.NONE
            # When a recording ends is up to who asks for it: time must not depend on that where
            # all else is the same each time, and there it needs no second pair either.
            pairs = self._pairs[:1] if self._clock is Clock.INSTRUCTIONS else self._pairs
            Recording(CLOCK, {}, tuple(pairs), NOMINAL_KHZ, partial, counted).save(self._raw)
        except OSError as problem:
            partial = (*partial, f"the recording could not be completed: {problem.strerror}")
        return list(partial)

    def _open(self) -> None:
        """Connect, and begin to listen."""
        # Whoever comes second would wait until QEMU takes the connection, and be told nothing.
        lock = self._address.with_name(LOCK)
        try:
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except FileNotFoundError as problem:
            raise LostMachineError("the machine is gone", stage="trace") from problem
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"machine {self._address.parent.name!r} is being recorded already: end that first"
            ) from None
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(str(self._address))
        except OSError as problem:
            line.close()
            raise LostMachineError(
                f"the inner host's recorder cannot be reached: {problem.strerror}", stage="trace"
            ) from problem
        self._socket = line
        self._heard = time.monotonic()

    def _say(self, verb: str, *words: str) -> None:
        """Send a command; with the first one, listen for its answer."""
        assert self._socket is not None
        token = secrets.token_hex(8)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._listen, args=(self._socket, token), name="qvis-trace", daemon=True
            )
            self._thread.start()
        self._heard = time.monotonic()
        try:
            self._socket.sendall(f"{' '.join((verb, token, *words))}\n".encode())
        except OSError as problem:
            raise LostMachineError(
                f"the inner host's recorder is gone: {problem.strerror}", stage="trace"
            ) from problem

    def _close(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it may be closed at the other end
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        if self._thread is not None:
            self._thread.join()
        if self._socket is not None:
            self._socket.close()
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _listen(self, line: socket.socket, token: str) -> None:
        """Take frames until the last one."""
        try:
            with line.makefile("rb") as stream:
                # Up to here it may be the rest of what was said to somebody before.
                before = b""
                while not before.endswith(f"@{token} 0\n".encode()):
                    before = before[-HEAD:] + _exactly(stream, 1)
                while not self._ended.is_set():
                    self._take(*_frame(stream))
        except (EOFError, OSError):
            self._problems.append("the machine was gone before the recording had ended")
        except ValueError as problem:
            self._problems.append(f"the inner host's recorder does not make sense: {problem}")
        finally:
            self._answered.set()

    def _take(self, name: str, content: bytes) -> None:
        self._heard = time.monotonic()
        if name == "started":
            self._begun = True
            self._answered.set()
        elif name == "ended":
            self._ended.set()
        elif name == "error":
            self._refusal = content.decode(errors="replace")
            self._answered.set()
            self._ended.set()
        elif name == "pair":
            ns, tsc = map(int, content.split())
            self._pairs[1:] = [(ns, tsc)]  # the first and the last
        elif _FILES.fullmatch(name):
            self._keep(name, content)
        elif not name.startswith("@"):
            raise ValueError(f"a frame called {name!r}")

    def _keep(self, name: str, content: bytes) -> None:
        """Append to a file of the recording, all of it or nothing; after a failure nothing."""
        if self._full:
            return
        try:
            if name not in self._files:
                path = self._raw / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self._files[name] = path.open("wb", buffering=0)
            file = self._files[name]
            end = file.tell()
            if file.write(content) < len(content):
                os.ftruncate(file.fileno(), end)
                self._full = True
        except OSError:
            self._full = True
        if self._full:
            self._problems.append("no room for more on the disk: what came until then was kept")


def _frame(stream: BinaryIO) -> tuple[str, bytes]:
    """The next frame's name and content."""
    head = stream.readline(HEAD)
    if not head:
        raise EOFError
    name, _, size = head.decode("ascii", errors="replace").rstrip("\n").partition(" ")
    if not head.endswith(b"\n") or not size.isdecimal() or int(size) > LONGEST:
        raise ValueError(f"a frame that begins with {head[:40]!r}")
    return name, _exactly(stream, int(size))


def _exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content
