# SPDX-License-Identifier: GPL-2.0-or-later
"""Telling a person what is going on while they wait.

A :class:`Step` is one piece of long work with a name. On a terminal it is a
progress bar with the elapsed time and the log's path; elsewhere it is a plain
line when it starts, one every ten seconds or so, and one when it ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Step", "note", "step"]

PLAIN_INTERVAL = 10.0  # seconds between lines of a step that is not on a terminal


class Step:
    """A running piece of work; :meth:`update` says how far it is."""

    def __init__(self, name: str, log: Path | None, bar: tuple[Progress, TaskID] | None) -> None:
        self._name = name
        self._log = log
        self._bar = bar
        self._start = self._said = time.monotonic()

    def update(self, done: float, total: float) -> None:
        """``done`` of ``total``, in whatever unit the work counts."""
        if self._bar:
            progress, task = self._bar
            progress.update(task, completed=done, total=total)
        elif time.monotonic() - self._said >= PLAIN_INTERVAL:
            self._said = time.monotonic()
            self.say(f"{100 * done / total:3.0f}%" if total else f"{done:.0f}")

    def say(self, text: str) -> None:
        """What it is at: beside the bar, or a plain line of its own."""
        if self._bar:
            progress, task = self._bar
            progress.update(task, description=f"{self._name}: {text}")
        else:
            print(f"qvis: {self._name}: {text} [{self.elapsed:.0f} s]", file=sys.stderr, flush=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._start


@contextmanager
def step(name: str, log: Path | None = None) -> Iterator[Step]:
    """Show ``name`` as work in progress for the length of the block."""
    where = f" (log: {log})" if log else ""
    if not sys.stderr.isatty():
        current = Step(name, log, None)
        current.say(f"started{where}")
        yield current
        current.say("done")
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[where]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=None, where=str(log or ""))
        current = Step(name, log, (progress, task))
        yield current
    console.print(f"[green]done[/] {name} [dim]{current.elapsed:.1f} s[/]", highlight=False)


def note(text: str) -> None:
    """One line that the user should see whatever else goes on."""
    print(f"qvis: {text}", file=sys.stderr, flush=True)
