# SPDX-License-Identifier: GPL-2.0-or-later
"""What commands of QMP work on, and how they are found and called."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .expression import DumpFormat
from .qapi import UNCHECKED, ErrorClass, QmpError, load
from .qom import Tree

if TYPE_CHECKING:
    from ..machine import Attached, Machine

__all__ = ["COMMANDS", "Answers", "Call", "Recording", "command", "constant", "refusal", "run"]


class Recording:
    """The trace that is being recorded, of which a machine has one at a time."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.owner: object | None = None

    def start(self, owner: object, folder: str) -> None:
        """Record into ``folder`` until ``owner`` stops it, or goes."""
        if self.owner is not None:
            raise QmpError("A trace is being recorded already")
        try:
            found = bool(folder) and Path(folder).is_dir()
        except OSError:  # its name is too long, say
            found = False
        if not found:
            raise QmpError(f"Could not open '{folder}': {os.strerror(errno.ENOENT)}")
        self._machine.record(Path(folder))
        self.owner = owner

    def stop(self, owner: object) -> dict[str, Any]:
        """End it; rows that were kept, rows that were not, and the errno of why (0: all were)."""
        if self.owner is not owner:
            raise QmpError("No trace is being recorded by this connection")
        self.owner = None
        counts = self._machine.stop_recording()
        return {"recorded": counts.recorded, "dropped": counts.dropped, "error": counts.error}


@dataclass
class Answers:
    """What commands work on. There is one of it a machine."""

    machine: Machine
    tree: Tree
    recording: Recording
    name: str
    ssh_port: Callable[[], int | None]
    chardevs: Callable[[], dict[str, str]]
    """QEMU's labels of the sockets to what they are connected to."""
    actions: dict[str, str] = field(default_factory=lambda: {"reboot": "reset"})
    """What comes of a guest's request, as set-action has it."""
    dump_format: DumpFormat = field(default_factory=DumpFormat)

    def running(self) -> bool:
        return str(self.machine.status) == "running"

    def reset(self) -> None:
        """What system_reset leads to."""
        if self.actions["reboot"] == "shutdown":
            self.machine.shutdown("host-qmp-system-reset")
        else:
            self.machine.reset()

    def attached(self, path: str, what: str = "VirtIODevice") -> Attached:
        """The device whose virtio half is at ``path``, or a QmpError that it is not ``what``."""
        for name, attached in self.machine.devices.items():
            if path == self.tree.backend(name):
                return attached
        raise QmpError(f"Path {path} is not a {what}")


@dataclass(frozen=True)
class Call:
    """One command that a connection has sent."""

    answers: Answers
    connection: object
    later: Callable[[Callable[[], None]], None]
    """Have something done once the answer is on its way."""

    @property
    def machine(self) -> Machine:
        return self.answers.machine


Command = Callable[..., Any]
COMMANDS: dict[str, Command] = {}


def run(call: Call, name: str, arguments: dict[str, Any]) -> Any:
    """Do a command; what it returns. QmpError if it fails."""
    if name in UNCHECKED:
        return COMMANDS[name](call, arguments)
    load().check(name, arguments)
    words = {key.replace("-", "_"): value for key, value in arguments.items()}
    return COMMANDS[name](call, **words)


def command(name: str) -> Callable[[Command], Command]:
    """Decorates what does the command ``name``: it takes a Call and the command's arguments."""

    def add(function: Command) -> Command:
        COMMANDS[name] = function
        return function

    return add


def constant(name: str, value: Any) -> None:
    """The command ``name`` always returns the same."""
    COMMANDS[name] = lambda call, **_: value


def refusal(name: str, words: str, kind: ErrorClass = ErrorClass.GENERIC) -> None:
    """The command ``name`` always fails, with ``words``."""

    def refuse(call: Call, **_: Any) -> None:
        raise QmpError(words, kind)

    COMMANDS[name] = refuse
