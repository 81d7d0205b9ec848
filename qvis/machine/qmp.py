# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP without asyncio in sight: one connection, commands and events."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol

from ..errors import InfraError, LostMachineError, UsageError
from ..folder import Folder, qmp_sockets

__all__ = ["Qmp"]

CONNECT_DEADLINE = 10.0  # seconds
COMMAND_DEADLINE = 60.0
POLL = 0.01

# It logs as errors what is raised to us anyway.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class Qmp:
    """A QMP session on one of the machine's own sockets.

    A monitor serves one client at a time, so a session holds a lock beside the
    socket and takes the first that is free. The socket ``qmp.sock`` is not
    among them: it is the user's.
    """

    def __init__(self, folder: Folder, deadline: float = CONNECT_DEADLINE) -> None:
        """Connect; :class:`InfraError` when all monitors are taken, and
        :class:`LostMachineError` when none answers within ``deadline`` seconds."""
        self._machine = folder.name
        self._lock, socket = _free_socket(folder)
        end = time.monotonic() + deadline
        while True:
            # Where QEMU is just starting, it is not there yet, or nobody listens to it yet.
            while not socket.exists() and folder.alive and time.monotonic() < end:
                time.sleep(POLL)
            self._protocol = QEMUMonitorProtocol(str(socket))
            self._protocol.settimeout(max(0.1, end - time.monotonic()))
            try:
                self._protocol.connect()
            except (QMPError, OSError) as problem:  # which TimeoutError is
                if time.monotonic() < end and folder.alive:
                    time.sleep(POLL)
                    continue
                os.close(self._lock)
                raise LostMachineError(
                    f"machine {folder.name!r} does not answer on QMP ({problem})", stage="qmp"
                ) from problem
            return

    def __call__(self, command: str, /, **arguments: Any) -> Any:
        """Run ``command`` and return what it returned.

        Raises :class:`UsageError` with QEMU's words when it refuses, and
        :class:`LostMachineError` when the connection breaks.
        """
        self._protocol.settimeout(COMMAND_DEADLINE)
        try:
            return self._protocol.cmd(command, **arguments)
        except ExecuteError as problem:
            raise UsageError(f"QMP {command}: {problem}") from problem
        except (ExecInterruptedError, QMPError, OSError) as problem:
            raise LostMachineError(
                f"machine {self._machine!r} went away during QMP {command} ({problem!r})",
                stage="qmp",
            ) from problem

    def monitor(self, line: str) -> str:
        """The human monitor's answer to ``line`` (QMP human-monitor-command)."""
        return str(self("human-monitor-command", **{"command-line": line}))

    def events(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Events as they come, until none came for ``timeout`` seconds or the machine ended."""
        while True:
            try:
                event = self._protocol.pull_event(wait=timeout or True)
            except (QMPError, OSError):
                return
            if event is None:
                return
            yield dict(event)

    def close(self) -> None:
        """End the session; the monitor is free for the next one."""
        if self._lock >= 0:
            try:
                self._protocol.close()
            except (QMPError, OSError, EOFError):
                pass
            finally:
                os.close(self._lock)
                self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _free_socket(folder: Folder) -> tuple[int, Path]:
    """The first of our sockets that nobody uses, and the lock that now holds it."""
    sockets = list(qmp_sockets(folder.path).values())[1:]
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
