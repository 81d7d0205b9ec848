# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP without asyncio in sight: one connection, commands and events."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError

from ..errors import InfraError, LostMachineError, UsageError
from ..folder import Folder, qmp_sockets

__all__ = ["Qmp"]

T = TypeVar("T")

CONNECT_DEADLINE = 10.0  # seconds
COMMAND_DEADLINE = 60.0
CLOSE_DEADLINE = 5.0
POLL = 0.01
EVENT_POLL = 0.5
OBITUARY_DEADLINE = 3.0  # in which a machine ends whose QEMU did

# It logs as errors what is raised to us anyway.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class Qmp:
    """A QMP session on one of the machine's own sockets.

    A monitor serves one client at a time, so a session holds a lock beside the
    socket and takes the first that is free. The socket ``qmp.sock`` is not
    among them: it is the user's.
    """

    def __init__(
        self, folder: Folder, deadline: float = CONNECT_DEADLINE, name: str | None = None
    ) -> None:
        """Connect, to the socket ``name`` where it is another than the guest's QEMU's.

        Raises :class:`InfraError` when all monitors are taken, and
        :class:`LostMachineError` when none answers within ``deadline`` seconds.
        """
        self._folder = folder
        self._lock, socket = _free_socket(folder, name)
        end = time.monotonic() + deadline
        self._loop = asyncio.new_event_loop()
        while True:
            # Where QEMU is just starting, it is not there yet, or nobody listens to it yet.
            while not socket.exists() and folder.alive and time.monotonic() < end:
                time.sleep(POLL)
            self._client = QMPClient(folder.name)
            try:
                self._sync(self._client.connect(str(socket)), max(0.1, end - time.monotonic()))
            except (QMPError, OSError) as problem:  # which TimeoutError is
                if time.monotonic() < end and folder.alive:
                    time.sleep(POLL)
                    continue
                self.close()
                raise LostMachineError(
                    f"machine {folder.name!r} does not answer on QMP "
                    f"({problem or 'no greeting in time'}){folder.obituary()}",
                    stage="qmp",
                ) from problem
            return

    def __call__(self, command: str, /, **arguments: Any) -> Any:
        """Run ``command`` and return what it returned.

        Raises :class:`UsageError` with QEMU's words when it refuses, and
        :class:`LostMachineError` when the connection breaks.
        """
        try:
            return self._sync(self._client.execute(command, arguments or None), COMMAND_DEADLINE)
        except ExecuteError as problem:
            raise UsageError(f"QMP {command}: {problem}") from problem
        except (ExecInterruptedError, QMPError, OSError) as problem:
            raise LostMachineError(
                f"machine {self._folder.name!r} went away during QMP {command} ({problem!r})"
                f"{self._folder.obituary(OBITUARY_DEADLINE)}",
                stage="qmp",
            ) from problem

    def monitor(self, line: str) -> str:
        """The human monitor's answer to ``line`` (QMP human-monitor-command)."""
        return str(self("human-monitor-command", **{"command-line": line}))

    def events(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Events as they come, until none came for ``timeout`` seconds or the machine ended."""
        last = time.monotonic()
        while timeout is None or time.monotonic() < last + timeout:
            try:
                # A connection that ends does not wake this up, hence the short waits.
                event = self._sync(self._client.events.get(), EVENT_POLL)
            except TimeoutError:
                if not self._folder.alive:
                    return
                continue
            except (QMPError, OSError):
                return
            last = time.monotonic()
            yield dict(event)

    def close(self) -> None:
        """End the session; the monitor is free for the next one."""
        if self._lock >= 0:
            with contextlib.suppress(QMPError, OSError, EOFError):
                self._sync(self._client.disconnect(), CLOSE_DEADLINE)
            self._loop.close()
            os.close(self._lock)
            self._lock = -1

    def _sync(self, work: Awaitable[T], deadline: float) -> T:
        """Wait for ``work`` on this session's own event loop, for ``deadline`` seconds."""
        return self._loop.run_until_complete(asyncio.wait_for(work, deadline))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _free_socket(folder: Folder, name: str | None) -> tuple[int, Path]:
    """The first of our sockets that nobody uses, and the lock that now holds it."""
    sockets = [folder / name] if name else list(qmp_sockets(folder.path).values())[1:]
    for socket in sockets:
        lock = os.open(socket.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        return lock, socket
    raise InfraError(
        f"all {len(sockets)} QMP sessions of machine {folder.name!r} are in use", stage="qmp"
    )
