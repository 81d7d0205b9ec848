# SPDX-License-Identifier: GPL-2.0-or-later
"""How programs are told what to do: their options (getopt(3)), and how they refuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from .files import OpenFile, Steps
from .processes import Process

__all__ = [
    "BANNER",
    "Lines",
    "MisuseError",
    "Options",
    "Program",
    "each_file",
    "guarded",
    "options",
]

BANNER = "BusyBox v1.35.0 (Debian 1:1.35.0-4+deb12u1+b1)"
Program = Callable[[Process, list[str]], Steps[int]]


class MisuseError(Exception):
    """The arguments make no sense: ends the program with the status 1 and what it is for."""


class Options:
    """Options that were given; a letter that takes a value has all its values."""

    def __init__(self) -> None:
        self.flags: set[str] = set()
        self.values: dict[str, list[str]] = {}

    def __contains__(self, letter: str) -> bool:
        return letter in self.flags or letter in self.values

    def value(self, letter: str, default: str = "") -> str:
        """The last value of ``-letter``."""
        return self.values.get(letter, [default])[-1]


def options(
    arguments: list[str], flags: str, valued: str = "", *, first: bool = False
) -> tuple[Options, list[str]]:
    """``arguments`` split into options and the rest; with ``first`` the rest begins at the first
    that is none. Raises :class:`MisuseError` for an option that is not known."""
    found, rest = Options(), []
    waiting = list(reversed(arguments))
    while waiting:
        word = waiting.pop()
        if word == "--":
            break
        if word[:1] != "-" or word == "-":
            rest.append(word)
            if first:
                break
            continue
        for at, letter in enumerate(word[1:], 2):
            if letter in valued:
                value = word[at:] or (waiting.pop() if waiting else None)
                if value is None:
                    raise MisuseError(f"option requires an argument -- '{letter}'")
                found.values.setdefault(letter, []).append(value)
                break
            if letter not in flags:
                if word.startswith("--"):
                    raise MisuseError(f"unrecognized option '{word}'")
                raise MisuseError(f"invalid option -- '{letter}'")
            found.flags.add(letter)
    return found, rest + list(reversed(waiting))


def guarded(program: Program) -> Program:
    """``program``, with words for :class:`MisuseError`."""

    def steps(process: Process, arguments: list[str]) -> Steps[int]:
        try:
            return (yield from program(process, arguments))
        except MisuseError as problem:
            name = process.name
            if str(problem):
                yield from process.error(f"{name}: {problem}")
            usage = inspect.cleandoc(program.__doc__ or "")
            yield from process.error(
                f"{BANNER} multi-call binary.\n\nUsage: {name} {usage}".rstrip()
            )
            return 1

    return steps


class Lines:
    """A file's lines, read as they come."""

    def __init__(self, process: Process, file: OpenFile) -> None:
        self._process = process
        self._file = file
        self._waiting = b""
        self._ended = False

    def next(self) -> Steps[str | None]:
        """The next one with its newline, if it has one; None at the end."""
        while True:
            line, newline, rest = self._waiting.partition(b"\n")
            if newline or self._ended:
                self._waiting = rest
                found = (line + newline).decode(errors="surrogateescape")
                return found or None
            data = yield from self._process.read(self._file)
            self._ended = not data
            self._waiting += data
            if len(self._waiting) > self._process.userland.largest:
                raise MemoryError


def each_file(process: Process, names: list[str]) -> list[tuple[str, OpenFile | OSError]]:
    """Each of the files, or standard input; for one that does not open, why."""
    found: list[tuple[str, OpenFile | OSError]] = []
    for name in names or ["-"]:
        try:
            file = process.descriptor(0).hold() if name == "-" else process.open(name)
        except OSError as problem:
            found.append((name, problem))
        else:
            found.append((name, file))
    return found
