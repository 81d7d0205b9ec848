# SPDX-License-Identifier: GPL-2.0-or-later
"""The human monitor, as far as it is reached by QMP's human-monitor-command.

Words and forms of answers are QEMU's (monitor/hmp.c, hmp-commands.hx), as scripts read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .expression import ExpressionError, evaluate
from .qapi import QmpError

if TYPE_CHECKING:
    from ..machine import Machine
    from .dispatch import Call

__all__ = ["COMMANDS", "INFOS", "HmpError", "Line", "answer", "command", "info", "too_much"]

INFO = "info"


class HmpError(Exception):
    """A line that is refused; the monitor then names the help for ``about``."""

    def __init__(self, words: str, about: str) -> None:
        super().__init__(words)
        self.about = about


@dataclass(frozen=True)
class Line:
    """A command with what was given to it."""

    call: Call
    cpu: int
    name: str
    """As the command was called, for the help."""
    rest: str
    options: str = ""

    @property
    def machine(self) -> Machine:
        return self.call.machine

    def number(self, text: str) -> tuple[int, str]:
        """An expression's value, and what comes after it."""
        try:
            return evaluate(text)
        except ExpressionError as problem:
            raise HmpError(str(problem), self.name) from problem

    def qmp(self, command: str, /, **arguments: Any) -> Any:
        """What a QMP command returns."""
        from .dispatch import run

        return run(self.call, command, {k.replace("_", "-"): v for k, v in arguments.items()})


@dataclass(frozen=True)
class HmpCommand:
    """A command, how it is shown in help, and what it takes.

    ``most`` is how many words follow it, None for any text; ``flags`` which options.
    """

    names: str
    arguments: str
    help: str
    run: Callable[[Line], str]
    most: int | None = 0
    flags: str = ""
    what: str = ""
    """What is said to be expected when the argument is missing; empty: it need not be there."""
    format: bool = False
    """Whether a slash and a format may follow."""


COMMANDS: dict[str, HmpCommand] = {}
INFOS: dict[str, HmpCommand] = {}

Handler = Callable[[Line], str]


def command(
    names: str, arguments: str, help: str, into: dict[str, HmpCommand] = COMMANDS, **more: Any
) -> Callable[[Handler], Handler]:
    """Decorates what does a command; ``more`` are the other members of HmpCommand."""

    def add(function: Handler) -> Handler:
        entry = HmpCommand(names, arguments, help, function, **more)
        for name in names.split("|"):
            into[name] = entry
        return function

    return add


def info(name: str, help: str, arguments: str = "", **more: Any) -> Callable[[Handler], Handler]:
    """The same for what ``info`` shows."""
    return command(name, arguments, help, INFOS, **more)


def answer(call: Call, line: str, cpu: int) -> str:
    """What the monitor prints for a line."""
    try:
        text = _answer(call, line.strip(), cpu)
    except HmpError as problem:
        text = f'{problem}\nTry "help {problem.about}" for more information\n'
    except QmpError as problem:
        text = f"Error: {problem}\n"
    return text.replace("\n", "\r\n")


def _answer(call: Call, line: str, cpu: int) -> str:
    if not line:
        return ""
    words = line.split(None, 1)
    name, rest = words[0], words[1] if len(words) > 1 else ""
    name, slash, form = name.partition("/")
    command, about = COMMANDS.get(name), name
    if name == INFO:
        if not rest:
            return _helps(INFO)
        words = rest.split(None, 1)
        about = f"{INFO} {words[0]}"
        command, rest = INFOS.get(words[0]), words[1] if len(words) > 1 else ""
        name = words[0]
    if command is None or (slash and not command.format):
        return f"unknown command: '{about}{slash}{form}'\n"
    if command.format and not slash and rest.startswith("/"):
        form, _, rest = rest[1:].partition(" ")
        slash = "/"
    return _run(call, cpu, command, about, rest.strip(), form if slash else "")


def _run(call: Call, cpu: int, command: HmpCommand, about: str, rest: str, form: str) -> str:
    options = form
    if not command.format:
        while rest.startswith("-") and len(rest) > 1:
            option, _, rest = rest.partition(" ")
            wrong = next((letter for letter in option[1:] if letter not in command.flags), None)
            if wrong is not None:
                raise HmpError(f"{command.names}: unsupported option -{wrong}", about)
            options += option[1:]
            rest = rest.strip()
    if command.most is not None and len(rest.split()) > command.most:
        raise too_much(command, about)
    if command.what and not rest:
        raise HmpError(f"{command.names}: {command.what} expected", about)
    return command.run(Line(call, cpu, about, rest, options))


def too_much(command: HmpCommand, about: str) -> HmpError:
    """The error of a line that has more than its command takes."""
    return HmpError(f"{command.names}: extraneous characters at the end of line", about)


# Help.


def _entry(command: HmpCommand, prefix: str = "") -> str:
    return f"{prefix}{command.names} {command.arguments} -- {command.help}\n"


def _helps(what: str) -> str:
    if what == INFO:
        return "".join(_entry(INFOS[name], f"{INFO} ") for name in sorted(INFOS))
    entries = {entry.names: entry for entry in COMMANDS.values()}
    return "".join(_entry(entries[names]) for names in sorted(entries))


@command("help|?", "[cmd]", "show the help", most=None)
def _help(line: Line) -> str:
    words = line.rest.split()
    if not words:
        return _helps("")
    if words[0] == INFO:
        if len(words) == 1:
            return _helps(INFO)
        known = INFOS.get(words[1])
        return _entry(known, f"{INFO} ") if known else f"unknown command: '{' '.join(words)}'\n"
    if words[0] in COMMANDS:
        return _entry(COMMANDS[words[0]])
    return f"unknown command: '{words[0]}'\n"
