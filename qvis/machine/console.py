# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's serial console: for a program through pexpect, for a person raw."""

from __future__ import annotations

import os
import re
import select
import socket
import sys
import termios
import tty
import uuid
from types import TracebackType
from typing import Self

import pexpect
from pexpect.socket_pexpect import SocketSpawn

from ..errors import GuestError, LostMachineError
from ..folder import CONSOLE_SOCKET, Folder

__all__ = ["DETACH_KEY", "Console", "interact"]

DETACH_KEY = b"\x1d"  # Ctrl-]
DEADLINE = 30.0  # seconds


class Console:
    """A session on the console's shell."""

    def __init__(self, folder: Folder) -> None:
        self._socket = _connect(folder)
        # In bytes: SocketSpawn of pexpect 4.9 does not decode, whatever encoding it is given.
        self._spawn = SocketSpawn(self._socket)

    def run(self, command: str, deadline: float = DEADLINE) -> str:
        """Run ``command`` in the console's shell and return what it printed.

        Raises :class:`GuestError` when the shell has not come back within
        ``deadline`` seconds, with what the console said meanwhile.
        """
        # The line that is echoed holds neither mark in one piece; what it prints does. (The
        # echo itself cannot be matched: the shell breaks it where its terminal ends.)
        first, last = (uuid.uuid4().hex[:12] for _ in range(2))
        begin, end = (f"echo {mark[:6]}''{mark[6:]}" for mark in (first, last))
        try:
            self._spawn.sendline(f"{begin}; {command}; echo; {end}")
            self._spawn.expect(re.compile(first.encode() + rb"\r*\n"), timeout=deadline)
            self._spawn.expect(re.compile(rb"\r*\n" + last.encode() + rb"\r*\n"), timeout=deadline)
        except (pexpect.TIMEOUT, pexpect.EOF) as problem:
            said = _text(self._spawn.before)
            raise GuestError(
                f"{command!r} did not come back on the console within {deadline:.0f} s",
                stage="console",
                tail=said.splitlines()[-15:],
            ) from problem
        return _text(self._spawn.before)

    def close(self) -> None:
        """Leave the console to others."""
        self._spawn.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def interact(folder: Folder) -> None:
    """Connect this terminal to the console until Ctrl-] or the machine's end."""
    terminal = sys.stdin.fileno()
    with _connect(folder) as console:
        old = termios.tcgetattr(terminal) if os.isatty(terminal) else None
        try:
            if old:
                tty.setraw(terminal)
            sources = [console, terminal]
            while True:
                ready, _, _ = select.select(sources, [], [])
                if console in ready:
                    data = console.recv(65536)
                    if not data:
                        return
                    os.write(sys.stdout.fileno(), data)
                if terminal in ready:
                    keys = os.read(terminal, 4096)
                    if DETACH_KEY in keys:
                        return
                    if not keys:
                        sources.remove(terminal)
                    console.sendall(keys)
        finally:
            if old:
                termios.tcsetattr(terminal, termios.TCSADRAIN, old)


def _text(said: object) -> str:
    """What pexpect collected, as lines; it may be a class where nothing was said."""
    return (
        said.decode(errors="replace").replace("\r", "").strip("\n")
        if isinstance(said, bytes)
        else ""
    )


def _connect(folder: Folder) -> socket.socket:
    console = socket.socket(socket.AF_UNIX)
    try:
        console.connect(str(folder / CONSOLE_SOCKET))
    except OSError as problem:
        console.close()
        raise LostMachineError(
            f"no console of machine {folder.name!r}: {problem}", stage="console"
        ) from problem
    return console
