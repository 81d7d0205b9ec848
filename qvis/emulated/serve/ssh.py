# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's SSH server, as dropbear is in the real one: keys only, root only, no forwarding.

Threads here only move bytes: what is run in the guest is run by the machine's thread, to which
``call`` hands it over.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..guest.userland import Userland
    from .ssh_connection import Connection

__all__ = ["Call", "SshServer"]

Call = Callable[[Callable[[], None]], None]
"""Have something done by the machine's thread, soon; may be used from any thread."""

MOST_UNKNOWN = 5
"""Connections of one address that have not logged in yet; more are closed at once, as dropbear
does (MAX_UNAUTH_PER_IP). Everybody comes from one address here, so its limit for all never
matters."""
MOST = 128
"""Connections altogether: each is a thread and a file."""
LOOK_AGAIN = 0.05  # seconds, while the guest's network is down


class SshServer:
    """Serves at ``port`` of the loopback address from when it is made until :meth:`close`.

    ``host_key`` is a private key in OpenSSH's form, ``authorized`` lines of public keys that may
    log in.
    """

    def __init__(self, host_key: bytes, authorized: bytes, userland: Userland, call: Call) -> None:
        self._host_key = host_key
        self._authorized = authorized
        self._userland = userland
        self._call = call
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._closed = False
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN)
        self.port: int = self._socket.getsockname()[1]
        userland.on_lost.append(self._lost)
        threading.Thread(target=self._serve, name="ssh", daemon=True).start()

    def close(self) -> None:
        """Stop, and end every connection."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._lost()

    def _lost(self) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.drop()

    def _serve(self) -> None:
        # Takes a while, in which the guest can boot.
        from .ssh_connection import Connection, Identity

        identity = Identity(self._host_key, self._authorized)
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError as problem:
                if self._closed or problem.errno in (errno.EBADF, errno.EINVAL):
                    return
                threading.Event().wait(LOOK_AGAIN)  # no file left: those that end give some back
                continue
            while not self._closed and not self._reachable():
                threading.Event().wait(LOOK_AGAIN)  # packets do not arrive
            with self._lock:
                unknown = sum(not other.known for other in self._connections)
                full = unknown >= MOST_UNKNOWN or len(self._connections) >= MOST
            if full or self._closed:
                connection.close()
                continue
            try:
                made = Connection(connection, identity, self._userland, self._call, self._ended)
                with self._lock:
                    self._connections.add(made)
                made.begin()
            except (OSError, RuntimeError):  # no thread, or nobody there any more
                connection.close()
                self._ended(made)

    def _reachable(self) -> bool:
        answered = threading.Event()
        found = False

        def ask() -> None:
            nonlocal found
            found = self._userland.reachable
            answered.set()

        try:
            self._call(ask)
        except RuntimeError:  # the machine's loop is over
            self._closed = True
            return False
        answered.wait(1.0)
        return found

    def _ended(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)
