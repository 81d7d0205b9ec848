# SPDX-License-Identifier: GPL-2.0-or-later
"""One SSH connection to the guest, and the sessions in it (RFC 4252, 4254)."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import logging
import queue
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import paramiko
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_REQUEST,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_RESOURCE_SHORTAGE,
    OPEN_SUCCEEDED,
    cMSG_CHANNEL_REQUEST,
)

from ..guest.files import OpenFile, Pipe
from ..guest.processes import Outlet, Process, Signal
from ..guest.terminal import Terminal

if TYPE_CHECKING:
    from ..guest.userland import Userland
    from .ssh import Call

__all__ = ["Connection", "Identity"]

USER = "root"
VERSION = "SSH-2.0-qvis"
MOST_SESSIONS = 64  # in one connection; each has two threads
TIMEOUT = 300  # seconds that a client has to log in, dropbear's AUTH_TIMEOUT
CHUNK = 32768
STDOUT, STDERR, END = range(3)

# Its threads print tracebacks for whatever a client does wrong.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


class Identity:
    """Who the server is, and who may log in."""

    def __init__(self, host_key: bytes, authorized: bytes) -> None:
        self.host_key = paramiko.Ed25519Key.from_private_key(io.StringIO(host_key.decode()))
        self.authorized: set[bytes] = set()
        for line in authorized.split(b"\n"):
            words = line.split()
            if len(words) > 1 and not words[0].startswith(b"#"):
                with contextlib.suppress(binascii.Error):
                    self.authorized.add(base64.b64decode(words[1], validate=True))


def _answered(channel: Any, message: paramiko.Message) -> None:
    channel._handle_request(message)
    session = channel.transport.sessions.get(channel.chanid)
    if session is not None:
        session.begin()


def _was_closed(channel: Any, message: paramiko.Message) -> None:
    session = channel.transport.sessions.pop(channel.chanid, None)
    channel._handle_close(message)
    if session is not None:
        session.hang_up()


class _Transport(paramiko.Transport):
    """paramiko's, which says when a request has been answered and when something is over."""

    sessions: dict[int, _Session]
    ended: Callable[[], None]

    _channel_handler_table: ClassVar[dict[int, Any]] = {
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_REQUEST: _answered,
        MSG_CHANNEL_CLOSE: _was_closed,
    }

    def run(self) -> None:
        """Everything that comes, until the connection is over."""
        try:
            super().run()
        finally:
            self.ended()


class Connection(paramiko.ServerInterface):
    """A client; ``known`` when it has logged in. ``ended`` is told when it is gone."""

    def __init__(
        self,
        connection: socket.socket,
        identity: Identity,
        userland: Userland,
        call: Call,
        ended: Callable[[Connection], None],
    ) -> None:
        self.known = False
        self.userland = userland
        self.call = call
        self._identity = identity
        self._ended = ended
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport = _Transport(connection)
        self._transport.sessions = {}
        self._transport.ended = self._over
        self._transport.local_version = VERSION
        self._transport.auth_timeout = TIMEOUT
        self._transport.add_server_key(identity.host_key)

    def begin(self) -> None:
        """Talk to it, in a thread."""
        self._transport.start_server(event=threading.Event(), server=self)

    def drop(self) -> None:
        """End it."""
        self._transport.close()

    def forget(self, channel: paramiko.Channel) -> None:
        """Its session is over."""
        self._transport.sessions.pop(channel.chanid, None)

    def _over(self) -> None:
        for session in list(self._transport.sessions.values()):
            session.hang_up()
        self._transport.sessions.clear()
        self._ended(self)

    # What paramiko asks, in the connection's thread.

    def get_allowed_auths(self, username: str) -> str:
        """Keys, and nothing else."""
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        """That it has the private key as well, paramiko has seen to."""
        if username != USER or key.asbytes() not in self._identity.authorized:
            return AUTH_FAILED
        self.known = True
        return AUTH_SUCCESSFUL

    def check_auth_none(self, username: str) -> int:
        """No."""
        return AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        """Sessions only."""
        if kind != "session":
            return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        if len(self._transport.sessions) >= MOST_SESSIONS:
            return OPEN_FAILED_RESOURCE_SHORTAGE
        self._transport.sessions[chanid] = _Session(self)
        return OPEN_SUCCEEDED

    def _session(self, channel: paramiko.Channel) -> _Session:
        return self._transport.sessions[channel.chanid]

    def check_channel_pty_request(
        self, channel: paramiko.Channel, term: bytes, width: int, height: int, pixelwidth: int,
        pixelheight: int, modes: bytes,
    ) -> bool:  # fmt: skip
        """A terminal, of whatever size."""
        self._session(channel).term = term.decode(errors="replace")[:32]
        return True

    def check_channel_window_change_request(
        self, channel: paramiko.Channel, width: int, height: int, pixelwidth: int,
        pixelheight: int,
    ) -> bool:  # fmt: skip
        """Nobody asks how large it is."""
        return True

    def check_channel_shell_request(self, channel: paramiko.Channel) -> bool:
        """A login shell."""
        return self._session(channel).want(channel, None)

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        """One command, by the shell."""
        return self._session(channel).want(channel, command.decode(errors="surrogateescape"))


class _Session:
    """A channel and the process at its other end.

    Fields below the line belong to the machine's thread.
    """

    def __init__(self, connection: Connection) -> None:
        self.term = ""
        self._connection = connection
        self._call = connection.call
        self._channel: paramiko.Channel | None = None
        self._command: str | None = None
        self._wanted = self._begun = False
        self._out: queue.SimpleQueue[tuple[int, bytes, int]] = queue.SimpleQueue()
        self._room = threading.Event()
        self._room.set()
        # ---
        self._process: Process | None = None
        self._terminal: Terminal | None = None
        self._outlets: list[Outlet] = []
        self._input = Pipe()
        self._over = False

    def want(self, channel: paramiko.Channel, command: str | None) -> bool:
        """Run ``command`` or a shell; one a session (RFC 4254, 6.5)."""
        if self._wanted:
            return False
        self._channel = channel
        self._command = command
        self._wanted = True
        return True

    def begin(self) -> None:
        """The client has been told that it can."""
        if not self._wanted or self._begun:
            return
        self._begun = True
        threading.Thread(target=self._send, name="ssh out", daemon=True).start()
        threading.Thread(target=self._receive, name="ssh in", daemon=True).start()
        self._do(self._start)

    def hang_up(self) -> None:
        """The client is gone: what ran ends."""
        self._room.set()
        self._out.put((END, b"", 0))
        self._do(self._hung_up)

    def _do(self, what: Callable[[], None]) -> None:
        try:
            self._call(what)
        except RuntimeError:  # the machine's loop is over
            self._room.set()

    # Threads of the session's own

    def _send(self) -> None:
        channel = self._channel
        assert channel is not None
        try:
            while True:
                kind, data, status = self._out.get()
                if kind == END:
                    break
                if kind == STDOUT:
                    channel.sendall(data)
                else:
                    channel.sendall_stderr(data)
                self._do(partial(self._sent, kind, len(data)))
            if data:
                _send_signal(channel, data.decode())
            elif not channel.closed:
                channel.send_exit_status(status)
            channel.shutdown_write()
        except (OSError, EOFError, paramiko.SSHException):
            pass
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            channel.close()
        self._connection.forget(channel)
        self._do(self._hung_up)

    def _receive(self) -> None:
        channel = self._channel
        assert channel is not None
        try:
            while data := channel.recv(CHUNK):
                self._room.clear()  # one at a time: the machine says when it has it
                self._do(partial(self._typed, data))
                self._room.wait()
        except (OSError, EOFError, paramiko.SSHException):
            pass
        self._do(self._no_more)

    # In the machine's thread

    def _start(self) -> None:
        if self._over:
            return
        userland = self._connection.userland
        files: dict[int, OpenFile]
        environment = {}
        if self.term:
            environment["TERM"] = self.term
            outlet = Outlet(partial(self._said, STDOUT), terminal=True)
            self._terminal = terminal = Terminal("/dev/pts/0", outlet)
            self._outlets = [outlet, outlet]
            files = dict.fromkeys(range(3), terminal)
        else:
            reader, self._writer = self._input.ends()
            self._input.drained = self._room.set
            self._outlets = [Outlet(partial(self._said, kind)) for kind in (STDOUT, STDERR)]
            files = {0: reader, 1: self._outlets[0], 2: self._outlets[1]}
        self._process = userland.login(
            self._command, files, self._ended, self._terminal, environment
        )
        if not self.term:
            reader.drop()  # the process holds it now

    def _ended(self, process: Process) -> None:
        if self._over:
            return
        self._over = True
        self._room.set()
        for outlet in self._outlets:
            outlet.hang_up()
        signal = ""
        if process.signal:
            names = Signal.__members__.items()
            signal = next((name for name, value in names if value == process.signal), "TERM")
        self._out.put((END, signal.encode(), process.status or 0))

    def _hung_up(self) -> None:
        if self._over:
            return
        self._over = True
        for outlet in self._outlets:
            outlet.hang_up()
        if self._terminal is not None:
            self._terminal.hang_up()
        if self._process is not None:
            self._process.kill(Signal.HUP)

    def _said(self, kind: int, data: bytes) -> None:
        self._out.put((kind, data, 0))

    def _sent(self, kind: int, count: int) -> None:
        if self._outlets:
            self._outlets[kind].sent(count)

    def _typed(self, data: bytes) -> None:
        if self._terminal is not None:
            self._terminal.type(data)
        elif not self._over:
            self._input.put(data)
            if len(self._input.data) > self._input.size:
                return  # the pipe says when there is room
        self._room.set()

    def _no_more(self) -> None:
        if self._terminal is not None:
            self._terminal.hang_up()
        elif self._process is not None:
            self._writer.drop()


def _send_signal(channel: Any, name: str) -> None:
    """exit-signal, for which paramiko has no function (RFC 4254, 6.10)."""
    message = paramiko.Message()
    message.add_byte(cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string("exit-signal")
    message.add_boolean(False)
    message.add_string(name)
    message.add_boolean(False)
    message.add_string("")
    message.add_string("")
    channel.transport._send_user_message(message)
