# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest behind its sockets, with a thread that runs it as the real server does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from qvis.emulated.serve.console import ConsoleServer
from qvis.emulated.serve.ssh import SshServer
from qvis.folder import CONSOLE_SOCKET, Folder
from qvis.machine.ssh import Ssh, host_alias
from qvis.openssh import CLIENT_KEY, KNOWN_HOSTS

from .userland import Guest

__all__ = ["Served", "make_key"]

LEAP = 2_000_000  # cycles that are not waited for
CYCLES = 2_000_000_000  # a second


def make_key() -> tuple[bytes, bytes]:
    """A private key in OpenSSH's form, and its public line."""
    key = Ed25519PrivateKey.generate()
    return (
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
    )


class Served:
    """``folder`` gets what a client of the guest needs."""

    def __init__(self, folder: Path, transport: str = "msi") -> None:
        self.folder = Folder(folder)
        self.guest = Guest(transport, smp=2, queues=2)
        private, public = make_key()
        host, host_public = make_key()
        (folder / CLIENT_KEY).touch(0o600)
        (folder / CLIENT_KEY).write_bytes(private)
        (folder / KNOWN_HOSTS).write_bytes(host_alias(folder).encode() + b" " + host_public + b"\n")
        self._loop = asyncio.new_event_loop()
        self._over = False
        self._ready = threading.Event()
        self.ssh_server = SshServer(host, public + b"\n", self.guest.userland, self.call)
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()
        self.port = self.ssh_server.port
        self._ready.wait(10)

    def call(self, what: Callable[[], None]) -> None:
        """In the machine's thread."""
        self._loop.call_soon_threadsafe(what)

    def ask(self, what: Coroutine[Any, Any, Any]) -> Any:
        """The same for a coroutine, whose value comes back."""
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(10)

    def ssh(self) -> Ssh:
        """A client."""
        return Ssh(self.folder.path, self.port)

    async def _run(self) -> None:
        machine = self.guest.machine
        console = ConsoleServer(
            self.guest.userland, self.folder / CONSOLE_SOCKET, self.folder / "console.log"
        )
        await console.start()
        self._ready.set()
        before = time.monotonic()
        while not self._over:
            machine.run_slice(0.005, LEAP)
            due = machine.events.next
            if due is not None and due - machine.events.now > LEAP:
                passed = int((time.monotonic() - before) * CYCLES)
                if due <= machine.events.now + passed:
                    machine.events.run(1)
                    before = time.monotonic()
            else:
                before = time.monotonic()
            await asyncio.sleep(0 if due is not None else 0.002)
        await console.close()

    def close(self) -> None:
        """End it all."""
        self.ssh_server.close()
        self._over = True
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._loop.close()
