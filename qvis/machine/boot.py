# SPDX-License-Identifier: GPL-2.0-or-later
"""Following a boot stage by stage, each with its own deadline.

The stages up to ``ssh`` are read off the serial console, which works without
any of the interrupts under test. Whatever goes wrong, the error names the
stage and shows the last lines that the guest or the machine's process printed.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import BootError, InfraError, QvisError
from ..folder import CONSOLE_LOG, EXIT, LAUNCH, PROCESS_LOG, Folder
from ..process import TAIL_LINES, tail
from ..spec import MachineSpec

__all__ = ["Boot", "Stage", "time_scale"]

POLL = 0.01  # seconds between looks at the console
# A guest whose host had no time for it while it calibrated its APIC timer goes on
# without one, and then waits for ever (arch/x86/kernel/apic/apic.c).
NO_TIMER = "disabling apic timer"
PANIC = "Kernel panic - not syncing"
# How long the rest of a panic's text may take to arrive before it is shown.
PANIC_SETTLE = 0.5


@dataclass(frozen=True)
class Stage:
    """A part of a boot: it ends when ``marker`` is on the console.

    ``deadline`` is in seconds on an idle host with hardware virtualization.
    """

    name: str
    marker: str
    deadline: float


CONSOLE_STAGES = (
    Stage("firmware", "Linux version ", 5),
    Stage("kernel", "qvis-stage: init", 15),
    Stage("init", "qvis-stage: network", 10),
    Stage("network", "qvis-stage: ssh", 5),
)
# Without SSH: the guest runs a script by itself.
SCRIPT_STAGES = CONSOLE_STAGES[:-1]
SCRIPT_ENDED = "qvis-stage: done"
LAUNCH_DEADLINE = 20.0  # seconds of the host, which no accelerator slows down
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
        self._console = folder / CONSOLE_LOG
        self.times: dict[str, float] = {}

    def follow_console(self, stages: Sequence[Stage] | None = None) -> None:
        """Wait for every one of the stages, or of those up to SSH, in turn.

        Raises :class:`BootError` for a panic, for a guest that ended, and for a
        stage over its deadline; :class:`InfraError` when the machine never started.
        """
        for stage in CONSOLE_STAGES if stages is None else stages:
            wait = functools.partial(self._wait, stage.marker)
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

    def failure(self, message: str, kind: type[QvisError] = BootError) -> QvisError:
        """An error with what was printed last: by the guest, else by its machine."""
        lines = tail(self._console) or tail(self._folder / PROCESS_LOG)
        return kind(message, tail=lines)

    def ended(self) -> QvisError | None:
        """Why the machine ended, if it did."""
        if self._folder.alive and not (self._folder / EXIT).exists():
            return None
        self._folder.wait_dead(5)
        said = tail(self._folder / PROCESS_LOG)
        program = (self._folder.read(LAUNCH) or {}).get("program", "the machine")
        status = (self._folder.read(EXIT) or {}).get("status")
        if not self._text():
            return InfraError(
                f"{program} ended with status {status} before the guest printed anything: "
                f"{said[-1] if said else 'it gave no reason'}",
                tail=said,
            )
        if status:
            reason = said[-1] if said else "?"
            return self.failure(f"{program} ended with status {status}: {reason}")
        return self.failure("the guest shut down or was reset")

    def _wait(self, marker: str, deadline: float) -> None:
        end = time.monotonic() + deadline
        while True:
            text = self._text()
            if marker in text:
                return
            if PANIC in text:
                self._folder.wait_dead(PANIC_SETTLE)
                raise self._panic()
            if NO_TIMER in text:
                raise self.failure(
                    "the host was too busy for the guest to calibrate its timer: try again when "
                    "it has less to do",
                    InfraError,
                )
            if problem := self.ended():
                # What it printed last may have come after we looked.
                if marker in self._text() and PANIC not in self._text():
                    return
                if PANIC in self._text():
                    continue
                raise problem
            if time.monotonic() > end:
                raise self.failure(
                    f"no sign of {marker.strip()!r} on the console within {deadline:.0f} s"
                )
            time.sleep(POLL)

    def _panic(self) -> QvisError:
        """What the guest panicked of, with the lines around it."""
        lines = self._text().splitlines()
        at = next(number for number, line in enumerate(lines) if PANIC in line)
        reason = lines[at].split(PANIC)[1].strip(" :-")
        return BootError(
            f"the guest panicked: {reason}", tail=lines[max(0, at - 3) : at - 3 + TAIL_LINES]
        )

    def _text(self) -> str:
        try:
            return Path(self._console).read_text(errors="replace")
        except OSError:
            return ""
