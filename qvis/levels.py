# SPDX-License-Identifier: GPL-2.0-or-later
"""The systems that run in a machine, one inside the other, and which of them failed.

Every machine has a guest. On the nested backend an inner host is around it, with
a QEMU and a console of its own. What each of them last said is in its console's log,
which needs no device interrupt and outlives it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .process import TAIL_LINES, tail

__all__ = ["GUEST", "INNER_HOST", "Level", "Words", "died", "failure", "text"]

PANIC = "Kernel panic - not syncing"
# What the inner host's init says, and what its kernel does when it runs out of memory.
# Whole lines only: more of one may be on its way.
QEMU_ENDED = re.compile(r"^qvis-host: QEMU ended with status (\d+)\r?\n", re.MULTILINE)
REFUSED = re.compile(r"^qvis-host: refused: (.*)\n", re.MULTILINE)
OUT_OF_MEMORY = re.compile(r"Out of memory: Killed process \d+ \((.*?)\).*\n")
KILLED = 128  # and the signal's number: a shell's status of a program that one ended
STAMP = re.compile(r"^\[ *\d+\.\d+\]")  # of a kernel's message
BEFORE_PANIC = 3  # lines that are shown of what led to it


@dataclass(frozen=True)
class Level:
    """One of these systems."""

    name: str  # in messages
    log: str  # the file of its console in the machine's folder


GUEST = Level("the guest", "console.log")
INNER_HOST = Level("the inner host", "host-console.log")


@dataclass(frozen=True)
class Words:
    """What is known of a failure: one line, and what was printed last."""

    message: str
    tail: Sequence[str]


def text(folder: Path, level: Level) -> str:
    """All that was printed on the level's console."""
    try:
        return (folder / level.log).read_text(errors="replace")
    except OSError:
        return ""


def _panic(folder: Path) -> Words | None:
    """What a kernel of any level panicked of, with the lines around it."""
    for level in (GUEST, INNER_HOST):
        if PANIC not in (said := text(folder, level)):
            continue
        lines = said.splitlines()
        at = next(number for number, line in enumerate(lines) if PANIC in line)
        reason = lines[at].split(PANIC)[1].strip(" :-")
        first = max(0, at - BEFORE_PANIC)
        return Words(f"{level.name} panicked: {reason}", lines[first : first + TAIL_LINES])
    return None


def failure(folder: Path) -> Words | None:
    """What went wrong for good, of what the consoles tell; None where they tell nothing.

    That a guest shut down is no failure of the QEMU that ran it.
    """
    if words := _panic(folder):
        return words
    said = text(folder, INNER_HOST)
    lines = tail(folder / INNER_HOST.log)
    if refused := REFUSED.search(said):
        return Words(f"the inner host: {refused[1].strip()}", lines)
    if killed := OUT_OF_MEMORY.search(said):
        return Words(f"the inner host ran out of memory and killed {killed[1]}", lines)
    ended = QEMU_ENDED.search(said)
    if ended is None or ended[1] == "0":
        return None
    status = int(ended[1])
    if status > KILLED:
        return Words(f"the inner QEMU was killed by signal {status - KILLED}", lines)
    own = [line for line in said[: ended.start()].splitlines() if not STAMP.match(line)]
    reason = own[-1].strip() if own else "it gave no reason"
    return Words(f"the inner QEMU ended with status {status}: {reason}", lines)


def died(folder: Path) -> Level:
    """The level by whose orderly end the machine ended, where nothing failed."""
    host = text(folder, INNER_HOST)
    return INNER_HOST if host and not QEMU_ENDED.search(host) else GUEST
