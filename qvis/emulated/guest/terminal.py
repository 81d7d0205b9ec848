# SPDX-License-Identifier: GPL-2.0-or-later
"""Terminals: lines are edited before a program gets them (termios(3), canonical mode)."""

from __future__ import annotations

import re
from collections.abc import Callable

from .files import OpenFile, Steps, Wakeup
from .processes import Outlet, Process

__all__ = ["Terminal"]

INTERRUPT, END, KILL, RETURN, NEWLINE, ESCAPE = 3, 4, 0x15, 13, 10, 0x1B
ERASE = (8, 0x7F)
LINE_MAX = 4095  # bytes of a line; more are lost (N_TTY_BUF_SIZE, with its newline)
WAITING_MAX = 65536  # bytes typed ahead; more are lost (TTYB_DEFAULT_MEM_LIMIT)
# What keys send that mean nothing here: arrows, a cursor's position.
SEQUENCE = re.compile(rb"\x1b(?:\[[0-9;?]*[@-~]|O.|[^\[O])")


class Terminal(OpenFile):
    """``name`` as /dev has it. ``outlet`` gets what it shows."""

    def __init__(self, name: str, outlet: Outlet) -> None:
        super().__init__()
        self.name = name
        self.outlet = outlet
        self.interrupt: Callable[[], None] | None = None
        """What Ctrl-C does."""
        self._line = bytearray()
        self._ready: list[bytes] = []  # lines; an empty one is an end of file
        self._count = 0
        self._partial = b""
        self._changed = Wakeup()
        self._gone = False

    def type(self, data: bytes) -> None:
        """Keys from outside of the guest."""
        data = SEQUENCE.sub(b"", self._partial + data)
        self._partial = b""
        at = data.rfind(b"\x1b")
        if at >= 0 and len(data) - at < 16:  # the rest of it is on its way
            data, self._partial = data[:at], data[at:]
        echo = bytearray()
        for char in data:
            self._key(char, echo)
        self._show(echo)

    def _show(self, echo: bytearray) -> None:
        """Before a program says anything to it."""
        if echo:
            self.outlet.put(bytes(echo))
            echo.clear()

    def _key(self, char: int, echo: bytearray) -> None:
        line = self._line
        if char in (RETURN, NEWLINE):
            if self._count + len(line) >= WAITING_MAX:
                line.clear()
                return
            echo += b"\r\n"
            self._show(echo)
            self._enter(bytes(line) + b"\n")
        elif char in ERASE:
            if line:
                while len(line) > 1 and line[-1] & 0xC0 == 0x80:  # of one UTF-8 character
                    line.pop()
                line.pop()
                echo += b"\b \b"
        elif char == KILL:
            echo += b"\b \b" * len(line)
            line.clear()
        elif char == INTERRUPT:
            echo += b"^C\r\n"
            self._show(echo)
            line.clear()
            if self.interrupt is not None:
                self.interrupt()
        elif char == END:
            self._enter(bytes(line))
        elif len(line) < LINE_MAX and (char >= 32 or char == 9):
            line.append(char)
            echo.append(char)

    def _enter(self, line: bytes) -> None:
        self._line.clear()
        if self._count + len(line) <= WAITING_MAX and len(self._ready) < LINE_MAX:
            self._ready.append(line)
            self._count += len(line)
            self._changed.wake()

    def hang_up(self) -> None:
        """The other side is gone: all reading ends."""
        self._gone = True
        self.outlet.hang_up()
        self._changed.wake()

    def read(self, process: Process, size: int) -> Steps[bytes]:
        """A line, or what was typed before Ctrl-D."""
        while not self._ready:
            if self._gone:
                return b""
            yield from process.wait(self._changed.wait())
        line = self._ready.pop(0)
        self._count -= len(line)
        if len(line) > size:
            self._ready.insert(0, line[size:])
            self._count += len(line) - size
        return line[:size]

    def write(self, process: Process, data: bytes) -> Steps[None]:
        """With a return before each newline."""
        yield from self.outlet.write(process, data.replace(b"\n", b"\r\n"))

    @property
    def terminal(self) -> bool:
        """It is one."""
        return True
