# SPDX-License-Identifier: GPL-2.0-or-later
"""sed: its script, and what that does to lines (POSIX.1-2017, XCU sed)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from .files import Regular, Steps
from .options import Lines, MisuseError, Program, guarded, options
from .patience import Pattern
from .processes import Process
from .programs_text import each_file, expression

__all__ = ["PROGRAMS"]

LOOPS = 20  # branches on one line, after which others get their turn
HOLD = 1 << 20  # characters that a space may have


@dataclass(slots=True)
class Address:
    """A line's number, ``$`` (-1), or an expression."""

    number: int = 0
    pattern: Pattern | None = None


@dataclass(slots=True)
class Command:
    """One command; ``jump`` is where a branch or a block that is not entered goes on."""

    name: str
    addresses: list[Address]
    negated: bool = False
    pattern: Pattern | None = None
    text: str = ""
    flags: str = ""
    count: int = 1
    jump: int = -1
    active: bool = field(default=False)  # within its range


class _Script:
    """Reads a script."""

    def __init__(self, text: str, *, extended: bool) -> None:
        self.text = text
        self.at = 0
        self.extended = extended
        self.commands: list[Command] = []
        self._blocks: list[int] = []
        self._labels: dict[str, int] = {}
        self._last: Pattern | None = None

    def read(self) -> list[Command]:
        while True:
            self._skip(" \t\n;")
            if self.at >= len(self.text):
                break
            if self.text[self.at] == "#":
                self._until("\n")
                continue
            self._command()
        if self._blocks:
            raise MisuseError("unterminated {")
        for command in self.commands:
            if command.name in "bt" and command.jump < 0:
                if command.text and command.text not in self._labels:
                    raise MisuseError(f"can't find label for jump to '{command.text}'")
                command.jump = self._labels.get(command.text, len(self.commands))
        return self.commands

    def _command(self) -> None:
        addresses = []
        while address := self._address():
            addresses.append(address)
            self._skip(" \t")
            if len(addresses) == 2 or self._peek() != ",":
                break
            self.at += 1
            self._skip(" \t")
        self._skip(" \t")
        command = Command("", addresses)
        while self._peek() == "!":
            self.at += 1
            command.negated = True
            self._skip(" \t")
        command.name = self._peek()
        self.at += 1
        number = len(self.commands)
        if command.name == ":":
            self._labels[self._until("\n;").strip()] = number
            return
        if command.name == "}":
            if not self._blocks:
                raise MisuseError("unexpected '}'")
            self.commands[self._blocks.pop()].jump = number
            return
        self.commands.append(command)
        if command.name == "{":
            self._blocks.append(number)
        elif command.name == "s":
            self._substitute(command)
        elif command.name == "y":
            delimiter = self._delimiter()
            command.text, command.flags = self._part(delimiter), self._part(delimiter)
            if len(command.text) != len(command.flags):
                raise MisuseError("y strings have different lengths")
        elif command.name in ("a", "i", "c"):
            self._skip(" \t")
            if self._peek() == "\\":
                self.at += 1
                self._skip(" \t\n")
            command.text = self._until("\n")
        elif command.name in ("b", "t", "T"):
            command.text = self._until("\n;}").strip()
        elif command.name in ("q", "Q"):
            self._until("\n;}")
        elif command.name not in tuple("dDpPnNgGhHx=l"):
            raise MisuseError(f"unsupported command {command.name}")

    def _substitute(self, command: Command) -> None:
        delimiter = self._delimiter()
        source = self._part(delimiter)
        command.text = self._part(delimiter)
        match = re.compile(r"[gpIi0-9]*").match(self.text, self.at)
        command.flags = match[0] if match else ""
        self.at += len(command.flags)
        digits = re.sub(r"\D", "", command.flags)
        command.count = int(digits[:9]) if digits else 1
        command.pattern = self._pattern(source, ignore="i" in command.flags.lower())

    def _pattern(self, source: str, *, ignore: bool = False) -> Pattern:
        if not source:
            if self._last is None:
                raise MisuseError("no previous regexp")
            return self._last
        self._last = expression(source, extended=self.extended, ignore=ignore)
        return self._last

    def _address(self) -> Address | None:
        char = self._peek()
        if char == "$":
            self.at += 1
            return Address(-1)
        if char.isdigit():
            match = re.compile(r"\d{1,9}").match(self.text, self.at)
            assert match
            self.at = match.end()
            return Address(int(match[0]))
        if char in ("/", "\\") and char:
            self.at += char == "\\"
            delimiter = self._delimiter()
            source = self._part(delimiter)
            ignore = self._peek() == "I"
            self.at += ignore
            return Address(0, self._pattern(source, ignore=ignore))
        return None

    def _delimiter(self) -> str:
        char = self._peek()
        if not char or char in "\\\n":
            raise MisuseError("unmatched delimiter")
        self.at += 1
        return char

    def _part(self, delimiter: str) -> str:
        found = []
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "\\" and self.at + 1 < len(self.text):
                following = self.text[self.at + 1]
                found.append(following if following == delimiter else char + following)
                self.at += 2
                continue
            self.at += 1
            if char == delimiter:
                return "".join(found)
            found.append(char)
        raise MisuseError(f"unmatched '{delimiter}'")

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _skip(self, chars: str) -> None:
        while self.at < len(self.text) and self.text[self.at] in chars:
            self.at += 1

    def _until(self, ends: str) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in ends:
            self.at += 1
        return self.text[start : self.at]


class _Editor:
    """A script at work on one stream of lines."""

    def __init__(self, commands: list[Command], *, quiet: bool) -> None:
        self.commands = commands
        self.quiet = quiet
        self.number = 0
        self.hold = ""
        self.over = False

    def line(self, process: Process, text: str, lines: Lines, last: list[str | None]) -> Steps[str]:
        """What ``text`` becomes, with all that is printed on its way. ``last`` is what follows."""
        out: list[str] = []
        appended: list[str] = []
        at = loops = 0
        substituted = deleted = False
        while at < len(self.commands):
            command = self.commands[at]
            at += 1
            name = command.name
            if self._selects(command, text, last[0] is None) == command.negated:
                if name == "{":
                    at = command.jump
                continue
            if name == "s":
                text, done = _substitute(command, text)
                substituted |= done
                if done and "p" in command.flags:
                    out.append(text + "\n")
            elif name == "p":
                out.append(text + "\n")
            elif name == "P":
                out.append(text.partition("\n")[0] + "\n")
            elif name in ("d", "D", "c"):
                if name == "c":
                    out.append(command.text + "\n")
                deleted = True
                break
            elif name in ("q", "Q"):
                self.over = True
                deleted = name == "Q"
                break
            elif name == "=":
                out.append(f"{self.number}\n")
            elif name == "i":
                out.append(command.text + "\n")
            elif name == "a":
                appended.append(command.text + "\n")
            elif name == "y":
                text = text.translate(str.maketrans(command.text, command.flags))
            elif name in ("n", "N"):
                following = last[0]
                if following is None:
                    self.over = True
                    break
                last[0] = yield from lines.next()
                self.number += 1
                following = following.removesuffix("\n")
                if name == "n":
                    if not self.quiet:
                        out.append(text + "\n")
                    text = following
                else:
                    text = (text + "\n" + following)[-HOLD:]
            elif name in ("b", "t", "T"):
                if name == "b" or substituted == (name == "t"):
                    at = command.jump
                    loops += 1
                    if loops % LOOPS == 0:
                        yield from process.breathe()
                if name != "b":
                    substituted = False
            elif name in "gGhHx":
                text, self.hold = {
                    "g": (self.hold, self.hold),
                    "G": (f"{text}\n{self.hold}"[:HOLD], self.hold),
                    "h": (text, text),
                    "H": (text, f"{self.hold}\n{text}"[-HOLD:]),
                    "x": (self.hold, text),
                }[name]
        if not deleted and not self.quiet:
            out.append(text + "\n")
        return "".join(out + appended)

    def _selects(self, command: Command, text: str, final: bool) -> bool:
        addresses = command.addresses
        if not addresses:
            return True
        if len(addresses) == 1:
            return self._at(addresses[0], text, final)
        if command.active:
            command.active = not self._ends(addresses[1], text, final)
            return True
        if not self._at(addresses[0], text, final):
            return False
        end = addresses[1]
        command.active = end.pattern is not None or end.number < 0 or end.number > self.number
        command.active &= not (end.number == -1 and final)
        return True

    def _at(self, address: Address, text: str, final: bool) -> bool:
        if address.pattern is not None:
            return address.pattern.search(text) is not None
        return final if address.number < 0 else address.number == self.number

    def _ends(self, address: Address, text: str, final: bool) -> bool:
        if address.pattern is None and address.number >= 0:
            return self.number >= address.number
        return self._at(address, text, final)


def _substitute(command: Command, text: str) -> tuple[str, bool]:
    assert command.pattern is not None
    seen = done = 0

    def one(match: re.Match[str]) -> str:
        nonlocal seen, done
        seen += 1
        if seen < command.count or (seen > command.count and "g" not in command.flags):
            return match[0]
        done += 1
        return _replacement(command.text, match)

    only = 1 if "g" not in command.flags and command.count == 1 else 0
    found = command.pattern.sub(one, text, count=only)
    return found[:HOLD], bool(done)


def _replacement(text: str, match: re.Match[str]) -> str:
    def one(part: re.Match[str]) -> str:
        if part[0] == "&":
            return match[0]
        code = part[0][1]
        if code.isdigit():
            number = int(code)
            return (match[number] or "") if number <= match.re.groups else ""
        return {"n": "\n", "t": "\t"}.get(code, code)

    return re.sub(r"&|\\(?:.|\n)", one, text)


def _sed(process: Process, arguments: list[str]) -> Steps[int]:
    """[-i[SFX]] [-nrE] [-f FILE]... [-e CMD]... [FILE]...
    or: sed [-i[SFX]] [-nrE] CMD [FILE]..."""
    # -i takes its value from its own word only.
    words = ["-i" if re.fullmatch(r"-i\.?\w*", word) else word for word in arguments]
    chosen, names = options(words, "nrEisz", "ef")
    texts = list(chosen.values.get("e", []))
    for path in chosen.values.get("f", []):
        data = yield from process.all_of(process.open(path))
        texts.append(data.decode(errors="surrogateescape"))
    if not texts:
        if not names:
            raise MisuseError
        texts = [names.pop(0)]
    extended = bool(chosen.flags & {"r", "E"})
    commands = _Script("\n".join(texts), extended=extended).read()
    editor = _Editor(commands, quiet="n" in chosen)
    status = 0
    for name, file in each_file(process, names):
        if isinstance(file, OSError):
            yield from process.error(f"sed: {name}: {file.strerror}")
            status = 1
            continue
        if "i" in chosen:
            editor = _Editor(commands, quiet="n" in chosen)
        lines = Lines(process, file)
        last: list[str | None] = [(yield from lines.next())]
        edited: list[str] = []
        while last[0] is not None and not editor.over:
            text = last[0].removesuffix("\n")
            last[0] = yield from lines.next()
            editor.number += 1
            printed = yield from editor.line(process, text, lines, last)
            if "i" in chosen:
                edited.append(printed)
            else:
                yield from process.out(printed)
        file.drop()
        if "i" in chosen and isinstance(process.find(name), Regular):
            out = process.open(name, os.O_WRONLY | os.O_TRUNC)
            yield from process.write(out, "".join(edited).encode(errors="surrogateescape"))
            out.drop()
        if editor.over and "i" not in chosen:
            break
    return status


PROGRAMS: dict[str, Program] = {"sed": guarded(_sed)}
