# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP on Unix sockets: monitors as QEMU's are, for any client of QEMU's.

Sources: QEMU's docs/interop/qmp-spec.rst, monitor/qmp.c, qapi/qmp-dispatch.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import UNNEGOTIATED, query_version
from .dispatch import COMMANDS, Answers, Call, Recording, run
from .qapi import ErrorClass, QmpError, load
from .qjson import JsonError, JsonStream, dumps
from .qom import Tree

if TYPE_CHECKING:
    from ..machine import Machine

__all__ = ["QmpServer"]

log = logging.getLogger(__name__)

CHUNK = 1 << 16  # bytes that are read at a time, and so all that waits to be parsed
TURN = 0.002  # seconds of commands, then the machine and other monitors have theirs
BACKLOG = 1  # as QEMU's sockets have it: who comes next waits in connect(2)
MOST_UNREAD = 16 << 20  # bytes of events for a client that does not read them
OOB = "oob"


class QmpServer:
    """The monitors of a machine: one on each socket, and one client at a time on each monitor.

    Everything happens on the event loop on which :meth:`start` was called, and the machine
    must run on that one too.
    """

    def __init__(
        self,
        machine: Machine,
        sockets: Sequence[Path] | Mapping[str, Path],
        *,
        name: str = "qvis",
        ssh_port: Callable[[], int | None] = lambda: None,
        console: Path | None = None,
    ) -> None:
        """``sockets`` by QEMU's name of each, or qmp0, qmp1, ...; ``name`` is the machine's,
        ``ssh_port`` says what port of the host leads to the guest's SSH."""
        if not isinstance(sockets, Mapping):
            sockets = {f"qmp{number}": path for number, path in enumerate(sockets)}
        self._monitors = {label: Monitor(self, path) for label, path in sockets.items()}
        self._console = console
        labels = {**sockets, **({"console": console} if console else {})}
        self.machine = machine
        tree = Tree(machine, {label: path.name for label, path in labels.items()})
        recording = Recording(machine)
        self.answers = Answers(machine, tree, recording, name, ssh_port, self._chardevs)
        machine.on_event.append(self._event)

    async def start(self) -> None:
        """Listen. OSError if that is not possible."""
        for monitor in self._monitors.values():
            monitor.listen()

    async def close(self) -> None:
        """End all connections and remove the sockets."""
        if self._event in self.machine.on_event:
            self.machine.on_event.remove(self._event)
        for monitor in self._monitors.values():
            await monitor.close()

    def _event(self, name: str, data: dict[str, Any]) -> None:
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        event: dict[str, Any] = {
            "timestamp": {"seconds": seconds, "microseconds": microseconds},
            "event": name,
        }
        if data:
            event["data"] = data
        for monitor in self._monitors.values():
            if monitor.connection is not None:
                monitor.connection.event(event)

    def _chardevs(self) -> dict[str, str]:
        found = {}
        for label, monitor in self._monitors.items():
            state = "" if monitor.connection else "disconnected:"
            found[label] = f"{state}unix:{monitor.path.name},server=on"
        if self._console:
            found["console"] = f"disconnected:unix:{self._console.name},server=on"
        return found


class Monitor:
    """One socket, which serves whoever connects, one after the other."""

    def __init__(self, server: QmpServer, path: Path) -> None:
        self.path = path
        self.connection: Connection | None = None
        self._server = server
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(self.path))
        self._socket.listen(BACKLOG)
        self._task = asyncio.get_running_loop().create_task(self._serve(self._socket))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._socket is not None:
            self._socket.close()
            self.path.unlink(missing_ok=True)

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError:
                # Out of files, say. QEMU tries again, too.
                await asyncio.sleep(0.1)
                continue
            reader, writer = await asyncio.open_connection(sock=client, limit=CHUNK)
            self.connection = Connection(self._server, reader, writer)
            try:
                await self.connection.serve()
            except OSError:
                pass  # the client has gone
            except Exception:
                log.exception("a QMP connection failed")
            finally:
                self.connection.end()
                self.connection = None


class Connection:
    """A client's session: greeting, negotiation, commands one by one."""

    def __init__(
        self, server: QmpServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._answers = server.answers
        self._reader = reader
        self._writer = writer
        self._negotiated = False
        self._oob = False
        self._later: list[Callable[[], None]] = []

    async def serve(self) -> None:
        """Answer until the client goes. Messages come in chunks, and wait while one is done."""
        self._send({"QMP": {"version": query_version(), "capabilities": [OOB]}})
        stream = JsonStream()
        while data := await self._reader.read(CHUNK):
            turn = time.monotonic()
            for message in stream.feed(data):
                self._send(self._answer(message))
                self._do_later()
                # A client that does not read gets no more done.
                await self._writer.drain()
                if time.monotonic() > turn + TURN:
                    await asyncio.sleep(0)
                    turn = time.monotonic()

    def _do_later(self) -> None:
        actions, self._later = self._later, []
        for action in actions:
            try:
                action()
            except Exception:
                log.exception("what a QMP command asked for failed")

    def event(self, event: dict[str, Any]) -> None:
        """Tell the client of an event, if it can be told."""
        if not self._negotiated or self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() < MOST_UNREAD:
            self._send(event)

    def end(self) -> None:
        """The client is gone: so is what it had going."""
        if self._answers.recording.owner is self:
            self._answers.recording.stop(self)
        self._writer.close()

    def _send(self, message: dict[str, Any]) -> None:
        self._writer.write(dumps(message).encode() + b"\r\n")

    def _answer(self, message: Any) -> dict[str, Any]:
        if isinstance(message, JsonError):
            return _error(QmpError(str(message)))
        answer: dict[str, Any]
        try:
            command, arguments = self._request(message)
            answer = {"return": self._dispatch(command, arguments)}
        except QmpError as problem:
            answer = _error(problem)
        except Exception as problem:
            log.exception("QMP command failed")
            answer = _error(QmpError(f"Internal error: {problem!r}"))
        if isinstance(message, dict) and "id" in message:
            answer["id"] = message["id"]
        return answer

    def _request(self, message: Any) -> tuple[str, dict[str, Any]]:
        """Command and arguments (qmp_dispatch_check_obj())."""
        if not isinstance(message, dict):
            raise QmpError("QMP input must be a JSON object")
        key = None
        for name in sorted(message, key=_bucket):
            value = message[name]
            if name == "execute" or (name == "exec-oob" and self._oob):
                if not isinstance(value, str):
                    raise QmpError(f"QMP input member '{name}' must be a string")
                if key is not None:
                    raise QmpError(f"QMP input member '{name}' clashes with '{key}'")
                key = name
            elif name == "arguments":
                if not isinstance(value, dict):
                    raise QmpError("QMP input member 'arguments' must be an object")
            elif name != "id":
                raise QmpError(f"QMP input member '{name}' is unexpected")
        if key is None:
            raise QmpError("QMP input lacks member 'execute'")
        command = message[key]
        if self._negotiated and key == "exec-oob":
            self._check_oob(command)
        return command, message.get("arguments", {})

    def _check_oob(self, command: str) -> None:
        """An out-of-band command runs at once, which here all do, but not every one may."""
        if command in COMMANDS and not load().allows_oob(command):
            raise QmpError(f"The command {command} does not support OOB")

    def _dispatch(self, command: str, arguments: dict[str, Any]) -> Any:
        if not self._negotiated:
            return self._negotiate(command, arguments)
        if command not in COMMANDS:
            if command in load().qemu_commands:
                raise QmpError(f"The emulated machine does not have the command {command}")
            raise QmpError(
                f"The command {command} has not been found", ErrorClass.COMMAND_NOT_FOUND
            )
        return run(Call(self._answers, self, self._later.append), command, arguments)

    def _negotiate(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if command != UNNEGOTIATED:
            raise QmpError(
                f"Expecting capabilities negotiation with '{UNNEGOTIATED}'",
                ErrorClass.COMMAND_NOT_FOUND,
            )
        load().check(command, arguments)
        self._negotiated = True
        self._oob = OOB in arguments.get("enable", ())
        return {}


def _bucket(key: str) -> int:
    """Where QEMU has a key in an object, which is the order in which it looks at them.

    The hash is that of gdbm (qobject/qdict.c).
    """
    name = key.encode(errors="surrogatepass")
    value = 0x238F13AF * len(name)
    for at, byte in enumerate(name):
        value += byte << at * 5 % 24
    return (1103515243 * value + 12345) & 0x1FF


def _error(problem: QmpError) -> dict[str, Any]:
    return {"error": {"class": str(problem.kind), "desc": str(problem)}}
