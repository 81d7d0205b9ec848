# SPDX-License-Identifier: GPL-2.0-or-later
"""Following a boot stage by stage, each with its own deadline.

The stages up to ``ssh`` are read off the serial console, which works without
any of the interrupts under test; those of an inner host, if there is one, off its
own. Whatever goes wrong, the error names the stage, and the level where there are
several, and shows the last lines that it or the machine's process printed.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import levels
from ..errors import BootError, InfraError, QvisError
from ..folder import EXIT, LAUNCH, PROCESS_LOG, Folder
from ..levels import GUEST, INNER_HOST, Level
from ..process import tail
from ..spec import MachineSpec

__all__ = ["Boot", "Stage", "time_scale"]

POLL = 0.01  # seconds between looks at the console
# A guest whose host had no time for it while it calibrated its APIC timer goes on
# without one, and then waits for ever (arch/x86/kernel/apic/apic.c).
NO_TIMER = "disabling apic timer"
# How long the rest of what was said may take to arrive before it is shown.
SETTLE = 0.5


@dataclass(frozen=True)
class Stage:
    """A part of a boot: it ends when ``marker`` is on the console of its level.

    ``deadline`` is in seconds on an idle host with hardware virtualization.
    """

    name: str
    marker: str
    deadline: float
    level: Level = GUEST


CONSOLE_STAGES = (
    Stage("firmware", "Linux version ", 5),
    Stage("kernel", "qvis-stage: init", 15),
    Stage("init", "qvis-stage: network", 10),
    Stage("network", "qvis-stage: ssh", 5),
)
# Before those of the guest, where it is in an inner host.
HOST_STAGES = (
    Stage("host firmware", "Linux version ", 5, INNER_HOST),
    Stage("host kernel", "qvis-stage: host init", 15, INNER_HOST),
    Stage("host init", "qvis-stage: host qemu", 10, INNER_HOST),
)
# Without SSH: the guest runs a script by itself.
SCRIPT_STAGES = CONSOLE_STAGES[:-1]
SCRIPT_ENDED = "qvis-stage: done"
HOST_SHUTDOWN = "qvis-stage: host shutdown"  # on an inner host's console: the guest's
LAUNCH_DEADLINE = 20.0  # seconds of the host, which no accelerator slows down
HOST_QEMU_DEADLINE = 10.0  # until the inner QEMU answers on QMP
SSH_DEADLINE = 15.0


def time_scale(spec: MachineSpec, slowdown: float) -> float:
    """By how much deadlines grow: the backend's slowdown, times the vCPUs a host CPU carries."""
    return slowdown * max(1.0, spec.smp / len(os.sched_getaffinity(0)))


class Boot:
    """One boot being followed; ``times`` holds each finished stage's seconds."""

    def __init__(self, folder: Folder, scale: float, entered: Callable[[str], None]) -> None:
        """``entered`` is told the name of each stage as it begins."""
        self._folder = folder
        self._scale = scale
        self._entered = entered
        self.times: dict[str, float] = {}

    def follow_console(self, stages: Sequence[Stage] | None = None) -> None:
        """Wait for every one of the stages, or of those up to SSH, in turn.

        Raises :class:`BootError` for a panic, for a guest or an inner host that ended, and for
        a stage over its deadline; :class:`InfraError` when the machine never started.
        """
        for stage in CONSOLE_STAGES if stages is None else stages:
            wait = functools.partial(self._wait, stage)
            self.stage(stage.name, stage.deadline * self._scale, wait)

    def stage(self, name: str, deadline: float, work: Callable[[float], None]) -> None:
        """Do ``work``, which is given its ``deadline`` in seconds, as the stage ``name``."""
        self._entered(name)
        start = time.monotonic()
        try:
            work(deadline)
        except QvisError as problem:
            problem.stage = name
            raise
        self.times[name] = time.monotonic() - start

    def failure(
        self, message: str, kind: type[QvisError] = BootError, level: Level = GUEST
    ) -> QvisError:
        """An error with what was printed last: by the level, else by the machine's process."""
        lines = tail(self._folder / level.log) or tail(self._folder / PROCESS_LOG)
        return kind(message, tail=lines)

    def ended(self) -> QvisError | None:
        """Why the machine ended, or is about to, if it did."""
        if levels.failure(self._folder.path):
            # What it printed last may come after we looked.
            self._folder.wait_dead(SETTLE)
            words = levels.failure(self._folder.path)
            assert words is not None
            return BootError(words.message, tail=words.tail)
        if self._folder.alive and not (self._folder / EXIT).exists():
            return None
        self._folder.wait_dead(5)
        said = tail(self._folder / PROCESS_LOG)
        program = (self._folder.read(LAUNCH) or {}).get("program", "the machine")
        status = (self._folder.read(EXIT) or {}).get("status")
        first = INNER_HOST if (self._folder / INNER_HOST.log).exists() else GUEST
        if not self._text(first):
            return InfraError(
                f"{program} ended with status {status} before {first.name} printed anything: "
                f"{said[-1] if said else 'it gave no reason'}",
                tail=said,
            )
        level = levels.died(self._folder.path)
        if status:
            reason = said[-1] if said else "?"
            return self.failure(f"{program} ended with status {status}: {reason}", level=level)
        return self.failure(f"{level.name} shut down or was reset", level=level)

    def _wait(self, stage: Stage, deadline: float) -> None:
        end = time.monotonic() + deadline
        while True:
            problem = self.ended()
            # After that, since what it printed last may have come meanwhile.
            text = self._text(stage.level)
            if stage.marker in text and (problem is None or not levels.failure(self._folder.path)):
                return
            if NO_TIMER in text:
                raise self.failure(
                    f"this host was too busy for {stage.level.name} to calibrate its timer: try "
                    "again when it has less to do",
                    InfraError,
                    stage.level,
                )
            if problem:
                raise problem
            if time.monotonic() > end:
                raise self.failure(
                    f"no sign of {stage.marker.strip()!r} on {stage.level.name}'s console within "
                    f"{deadline:.0f} s",
                    level=stage.level,
                )
            time.sleep(POLL)

    def _text(self, level: Level) -> str:
        return levels.text(self._folder.path, level)
