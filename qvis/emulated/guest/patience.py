# SPDX-License-Identifier: GPL-2.0-or-later
"""A limit for what a guest's patterns may take of the one thread that the whole machine has.

Python's regular expressions backtrack, so some patterns take longer than anybody waits. Their
engine looks for signals meanwhile: a timer ends what takes too long.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["Pattern", "patience"]

LIMIT = 0.2  # seconds

_armed = False


def _late(number: int, frame: FrameType | None) -> None:
    if _armed:  # and not just over
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Raise OSError, as for a matcher out of memory, if the block takes longer than it may."""
    global _armed
    if _armed or threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread, which is the machine's in its own process
        return
    before = signal.signal(signal.SIGALRM, _late)
    _armed = True
    others = signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        _armed = False
        # First: what nobody handles would end the machine.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *others)


class Pattern:
    """A compiled regular expression of a guest's, each use of which has its limit."""

    def __init__(self, expression: str, flags: int = 0) -> None:
        self._compiled = re.compile(expression, flags)
        self.groups = self._compiled.groups

    def search(self, text: str, start: int = 0) -> re.Match[str] | None:
        with patience():
            return self._compiled.search(text, start)

    def match(self, text: str) -> re.Match[str] | None:
        with patience():
            return self._compiled.match(text)

    def fullmatch(self, text: str) -> re.Match[str] | None:
        with patience():
            return self._compiled.fullmatch(text)

    def finditer(self, text: str) -> list[re.Match[str]]:
        with patience():
            return list(self._compiled.finditer(text))

    def sub(self, new: Callable[[re.Match[str]], str], text: str, count: int = 0) -> str:
        with patience():
            return self._compiled.sub(new, text, count=count)
