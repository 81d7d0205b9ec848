# SPDX-License-Identifier: GPL-2.0-or-later
"""Time: what happens next, in modelled cycles."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

__all__ = ["Events"]


class Events:
    """A queue of things to do at a time; those of one time in the order in which they came.

    Time leaps from one to the next, so a machine in which nothing happens costs nothing;
    where somebody waits outside, ``leap`` bounds how far, and :meth:`wait` has the rest pass.
    """

    def __init__(self) -> None:
        self.now = 0
        """Modelled cycles since the machine was made. Never goes back."""
        self.on_new: Callable[[], None] | None = None
        """Called before something is added: whoever lets time pass hears that it is time."""
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, time: int, what: Callable[..., None], *arguments: Any) -> None:
        """Do ``what(*arguments)`` at ``time``, or now if that has passed."""
        if self.on_new is not None:
            self.on_new()
        self._count += 1
        now = self.now
        heappush(self._heap, (time if time > now else now, self._count, what, arguments))

    def after(self, cycles: int, what: Callable[..., None], *arguments: Any) -> None:
        """The same, so many cycles from now."""
        if self.on_new is not None:
            self.on_new()
        self._count += 1
        heappush(self._heap, (self.now + cycles, self._count, what, arguments))

    def run(
        self,
        limit: int | None = None,
        until: Callable[[], bool] | None = None,
        leap: int | None = None,
    ) -> int:
        """Do what there is to do, in order; how many events that were.

        Ends when nothing is left, after ``limit`` events, when ``until`` holds, or when the
        next one is more than ``leap`` cycles away.
        """
        heap, done = self._heap, 0
        while heap and done != limit:
            if leap is not None and heap[0][0] - self.now > leap:
                break
            self.now, _, what, arguments = heappop(heap)
            what(*arguments)
            done += 1
            if until is not None and until():
                break
        return done

    def wait(self, cycles: int) -> None:
        """Let so much time pass, but not past the next thing to do."""
        self.now += cycles
        if self._heap:
            self.now = min(self.now, self._heap[0][0])

    @property
    def next(self) -> int | None:
        """When the next one is; None: never."""
        return self._heap[0][0] if self._heap else None
