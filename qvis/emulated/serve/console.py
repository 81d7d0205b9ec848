# SPDX-License-Identifier: GPL-2.0-or-later
"""The serial console: its log, and a Unix socket for one client at a time."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..guest.userland import Userland

__all__ = ["ConsoleServer"]

CHUNK = 65536
BEHIND = 1 << 20  # bytes that a client may be behind before it misses some


class ConsoleServer:
    """What the guest's serial port says goes to ``log`` and to whoever is connected.

    As with QEMU's sockets the second client waits until the first one has gone. Everything
    happens in the loop that :meth:`start` is called in.
    """

    def __init__(self, userland: Userland, path: Path, log: Path) -> None:
        self._userland = userland
        self._path = path
        self._log = log.open("ab", buffering=0)
        self._said = bytearray()
        self._turn = asyncio.Lock()
        self._client: asyncio.StreamWriter | None = None
        self._loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        userland.kernel.machine.ports.serial.output = self._output

    async def start(self) -> None:
        """Listen. Raises OSError."""
        self._server = await asyncio.start_unix_server(self._serve, self._path, backlog=16)

    async def close(self) -> None:
        """Stop, and let clients go."""
        self._flush()
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._log.close()

    def _output(self, byte: int) -> None:
        if not self._said:
            self._loop.call_soon(self._flush)
        self._said.append(byte)

    def _flush(self) -> None:
        if not self._said:
            return
        data = bytes(self._said)
        self._said.clear()
        with contextlib.suppress(OSError, ValueError):  # a full disk; or it is closed
            self._log.write(data)
        client = self._client
        if client is None or client.is_closing():
            return
        if client.transport.get_write_buffer_size() < BEHIND:
            client.write(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            async with self._turn:
                self._client = writer
                while data := await reader.read(CHUNK):
                    self._userland.console.type(data)
        except OSError:
            pass
        finally:
            if self._client is writer:
                self._client = None
            self._tasks.discard(task)
            writer.close()
