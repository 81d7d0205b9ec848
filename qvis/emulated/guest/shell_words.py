# SPDX-License-Identifier: GPL-2.0-or-later
"""From the shell's words to strings: parameters, splitting, names of files.

POSIX.1-2017, XCU 2.6; and of what busybox adds ``${x:1:2}`` and ``${x/a/b}``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from .files import Directory, Steps
from .patience import Pattern, patience
from .shell_arithmetic import ExpressionError, evaluate
from .shell_parser import Arithmetic, Literal, Parameter, Substitution, Word

if TYPE_CHECKING:
    from .shell import Shell

__all__ = [
    "ARGUMENT",
    "VALUE_MAX",
    "VARIABLE",
    "ExpansionError",
    "fields",
    "glob_pattern",
    "matches",
    "pattern",
    "string",
]

BLANKS = " \t\n"
MAGIC = re.compile(r"[*?\[]")
Piece = tuple[str, bool]  # text, and whether it is quoted, so neither split nor a pattern
SEPARATOR: Piece = ("\0", False)  # between the fields of "$@"
VALUE_MAX = 4 << 20  # characters in a word, and in a command
ARGUMENT = 64  # and one of the positional parameters
VARIABLE = 256  # bytes that a variable takes besides its value
FIELDS_MAX = 1 << 17  # Linux has a limit of its own on what a command is given


class ExpansionError(Exception):
    """Something that ends a shell, such as ``${x:?why}``."""


def string(shell: Shell, word: Word) -> Steps[str]:
    """What ``word`` is where it is not split: in an assignment, a redirection, ``case``."""
    pieces = yield from _pieces(shell, word, joined=True)
    return "".join(text for text, _ in pieces)


def pattern(shell: Shell, word: Word) -> Steps[str]:
    """``word`` as a pattern's regular expression; what is quoted stands for itself."""
    return glob_pattern((yield from _pieces(shell, word, joined=True)))


def fields(shell: Shell, words: list[Word]) -> Steps[list[str]]:
    """What a command is given for ``words``."""
    found: list[str] = []
    size = 0
    for word in words:
        if (plain := word.plain) is not None and not MAGIC.search(plain) and plain[:1] != "~":
            found.append(plain)  # the usual case
            continue
        pieces = yield from _pieces(shell, word, joined=False)
        size += sum(len(text) for text, _ in pieces)
        if size > VALUE_MAX:
            raise ExpansionError("out of memory")
        for field in _split(pieces, shell.variables.get("IFS", BLANKS)):
            found += _expand_names(shell, field)
        if len(found) > FIELDS_MAX:
            raise ExpansionError("out of memory")
    return found


def _pieces(shell: Shell, word: Word, *, joined: bool) -> Steps[list[Piece]]:
    """``joined``: the positional parameters are one string here, not fields of their own."""
    found: list[Piece] = []
    size = counted = 0
    for position, part in enumerate(word.parts):
        size += sum(len(text) for text, _ in found[counted:])
        counted = len(found)
        if size > VALUE_MAX:
            raise ExpansionError("out of memory")
        if isinstance(part, Literal):
            text = part.text
            if not position and not part.quoted and text.startswith("~"):
                text = _home(shell, text)
            found.append((text, part.quoted))
        elif isinstance(part, Substitution):
            output = yield from shell.substitute(part.body)
            found.append(_plain(output.rstrip("\n").replace("\0", ""), part.quoted))
        elif isinstance(part, Arithmetic):
            expression = yield from string(shell, part.word)
            names = len(shell.variables)
            try:
                value = evaluate(expression, shell.variables)
            except ExpressionError as fault:
                raise ExpansionError(str(fault)) from None
            if len(shell.variables) > names and not shell.process.charge(VARIABLE):
                raise ExpansionError("out of memory")
            found.append(_plain(str(value), part.quoted))
        else:
            found += yield from _parameter(shell, part, joined=joined)
    if size + sum(len(text) for text, _ in found[counted:]) > VALUE_MAX:
        raise ExpansionError("out of memory")
    return found


class _Splittable(str):
    """Text of an unquoted expansion: the only kind that is split into fields."""

    __slots__ = ()


def _parameter(shell: Shell, part: Parameter, *, joined: bool) -> Steps[list[Piece]]:
    name, operator, quoted = part.name, part.op, part.quoted
    if name in ("@", "*") and operator in ("", "len"):
        values = shell.positional
        if operator:
            return [(str(len(values)), quoted)]
        if joined or (name == "*" and quoted):
            glue = " " if joined and name == "@" else shell.variables.get("IFS", " ")[:1]
            return [(glue.join(values), quoted)]
        found: list[Piece] = []
        for each in values:
            found += [SEPARATOR, (each if quoted else _Splittable(each), quoted)]
        return found[1:] if found else [SEPARATOR] if quoted else []
    value = shell.parameter(name)
    word = part.word
    if operator == "len":
        return [(str(len(value or "")), quoted)]
    if operator == "" or word is None:
        if value is None:
            _unset(shell, name)
        return [_plain(value or "", quoted)]
    missing = value is None or (operator.startswith(":") and not value)
    kind = operator[-1]
    if kind in "-=?+" and operator in ("-", ":-", "=", ":=", "?", ":?", "+", ":+"):
        if kind == "+":
            return [] if missing else (yield from _word_of(shell, word, quoted, joined=joined))
        if not missing:
            return [_plain(value or "", quoted)]
        if kind == "-":
            return (yield from _word_of(shell, word, quoted, joined=joined))
        text = yield from string(shell, word)
        if kind == "?":
            raise ExpansionError(f"{name}: {text or 'parameter not set or null'}")
        shell.assign(name, text)
        return [_plain(text, quoted)]
    if value is None:
        _unset(shell, name)
        value = ""
    if operator == ":":
        return [_plain(_slice(shell, value, (yield from string(shell, word))), quoted)]
    if operator in ("/", "//"):
        return [_plain((yield from _replace(shell, value, word, operator == "//")), quoted)]
    expression = yield from pattern(shell, word)
    return [_plain(_trim(value, expression, operator), quoted)]


def _plain(text: str, quoted: bool) -> Piece:
    return (text, True) if quoted else (_Splittable(text), False)


def _word_of(shell: Shell, word: Word, quoted: bool, *, joined: bool) -> Steps[list[Piece]]:
    """The word of ``${x-word}``: its literals are split as expansions are."""
    pieces = yield from _pieces(shell, word, joined=joined)
    if quoted:
        return [(text, True) for text, _ in pieces]
    return [(text if q or text == "\0" else _Splittable(text), q) for text, q in pieces]


def _unset(shell: Shell, name: str) -> None:
    if "u" in shell.options and name not in "@*":
        raise ExpansionError(f"{name}: parameter not set")


def _slice(shell: Shell, value: str, text: str) -> str:
    first, _, second = text.partition(":")
    try:
        start = evaluate(first, shell.variables)
        length = evaluate(second, shell.variables) if _ else len(value)
    except ExpressionError as fault:
        raise ExpansionError(str(fault)) from None
    start = max(0, start + len(value)) if start < 0 else start
    return value[start : start + length if length >= 0 else len(value) + length]


def _replace(shell: Shell, value: str, word: Word, every: bool) -> Steps[str]:
    pieces = yield from _pieces(shell, word, joined=True)
    old: list[Piece] = []
    new = ""
    for number, (text, quoted) in enumerate(pieces):
        if not quoted and "/" in text:
            left, _, right = text.partition("/")
            old.append((left, False))
            new = right + "".join(rest for rest, _ in pieces[number + 1 :])
            break
        old.append((text, quoted))
    expression = glob_pattern(old)
    if not expression:
        return value
    if (len(value) + 1) * len(new) > VALUE_MAX:  # it may be too much: count first
        room = VALUE_MAX - len(value)

        def count(_: object) -> str:
            nonlocal room
            room -= len(new)
            if room < 0:
                raise ExpansionError("out of memory")
            return ""

        Pattern(expression, re.DOTALL).sub(count, value, count=0 if every else 1)
    return Pattern(expression, re.DOTALL).sub(lambda _: new, value, count=0 if every else 1)


def _trim(value: str, expression: str, operator: str) -> str:
    """Without the shortest (or with the operator doubled longest) match at its start or end."""
    matcher = re.compile(expression, re.DOTALL)
    size = len(value)
    lengths = range(size + 1) if len(operator) == 1 else range(size, -1, -1)
    with patience():
        for length in lengths:
            if operator[0] == "#" and matcher.fullmatch(value, 0, length):
                return value[length:]
            if operator[0] == "%" and matcher.fullmatch(value, size - length):
                return value[: size - length]
    return value


def _home(shell: Shell, text: str) -> str:
    user, slash, rest = text[1:].partition("/")
    home = {"": shell.variables.get("HOME", ""), "root": "/root"}.get(user, "")
    return home + slash + rest if home else text


# Splitting


def _split(pieces: list[Piece], separators: str) -> list[list[Piece]]:
    """Fields of pieces; those that nothing is in are gone unless they were quoted."""
    found: list[list[Piece]] = []
    field: list[Piece] = []
    blank = "".join(char for char in separators if char in BLANKS)
    for text, quoted in pieces:
        if (text, quoted) == SEPARATOR:
            if field:
                found.append(field)
            field = []
        elif quoted or not (isinstance(text, _Splittable) and separators):
            if text or quoted:
                field.append((text, quoted))
        else:
            for bit, ended in _bits(text, separators, blank):
                if bit:
                    field.append((bit, False))
                if ended and (field or ended == ","):
                    found.append(field or [("", False)])
                    field = []
    if field:
        found.append(field)
    return found


def _bits(text: str, separators: str, blank: str) -> list[tuple[str, str]]:
    """Runs of text with what ended each: "" at the end, " " for blanks alone, else ","."""
    hard = re.escape("".join(char for char in separators if char not in blank))
    soft = re.escape(blank)
    forms = []
    if hard:
        forms.append(f"[{soft}]*[{hard}][{soft}]*" if soft else f"[{hard}]")
    if soft:
        forms.append(f"[{soft}]+")
    expression = re.compile("|".join(forms))
    found: list[tuple[str, str]] = []
    at = 0
    for match in expression.finditer(text):
        kind = " " if not match[0].strip(blank) else ","
        found.append((text[at : match.start()], kind))
        at = match.end()
    found.append((text[at:], ""))
    return found


# Patterns and names of files


def glob_pattern(pieces: list[Piece]) -> str:
    """The regular expression of a pattern, of which quoted pieces stand for themselves."""
    found = []
    for text, quoted in pieces:
        found.append(re.escape(text) if quoted else _translate(text))
    return "".join(found)


def _translate(text: str) -> str:
    found: list[str] = []
    at = 0
    while at < len(text):
        char = text[at]
        at += 1
        if char == "*":
            # One star is as good as many, and does not take for ever to fail.
            if not found or found[-1] != ".*":
                found.append(".*")
        elif char == "?":
            found.append(".")
        elif char == "[" and (end := text.find("]", at + 1 + (text[at : at + 1] in "!^"))) > 0:
            inner = text[at:end]
            negated = inner[:1] in "!^"
            inner = inner[1:] if negated else inner
            inner = inner.replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
            for name, kind in CLASSES.items():
                inner = inner.replace(f"\\[:{name}:", kind)
            found.append(f"[{'^' if negated else ''}{inner}]")
            at = end + 1
            try:
                re.compile(found[-1])
            except re.error:
                found[-1] = re.escape(text[at - len(inner) : at])
        elif char == "\\" and at < len(text):
            found.append(re.escape(text[at]))
            at += 1
        else:
            found.append(re.escape(char))
    return "".join(found)


CLASSES = {"alpha": "a-zA-Z", "digit": "0-9", "alnum": "a-zA-Z0-9", "space": r"\s",
           "upper": "A-Z", "lower": "a-z", "xdigit": "0-9a-fA-F"}  # fmt: skip


def matches(expression: str) -> Callable[[str], bool]:
    """Whether a whole string matches."""
    compiled = Pattern(expression, re.DOTALL)
    return lambda text: compiled.fullmatch(text) is not None


def _expand_names(shell: Shell, field: list[Piece]) -> list[str]:
    """The files that ``field`` names, or itself."""
    text = "".join(bit for bit, _ in field)
    if "f" in shell.options or not any(MAGIC.search(bit) for bit, quoted in field if not quoted):
        return [text]
    # Its parts between slashes, each as pieces.
    parts: list[list[Piece]] = [[]]
    for bit, quoted in field:
        first, *rest = bit.split("/")
        parts[-1].append((first, quoted))
        for other in rest:
            parts.append([(other, quoted)])
    found = [""]
    for number, part in enumerate(parts):
        literal = "".join(bit for bit, _ in part)
        last = number == len(parts) - 1
        if not any(MAGIC.search(bit) for bit, quoted in part if not quoted):
            found = [base + literal + ("" if last else "/") for base in found]
            if last:
                found = [name for name in found if _exists(shell, name)]
            continue
        match = matches(glob_pattern(part))
        names = []
        for base in found:
            try:
                node = shell.process.find(base or ".")
            except OSError:
                continue
            if not isinstance(node, Directory):
                continue
            names += [
                base + name + ("" if last else "/")
                for name in node.names()
                if match(name) and (not name.startswith(".") or literal.startswith("."))
            ]
        found = names[:FIELDS_MAX]
    return found or [text]


def _exists(shell: Shell, path: str) -> bool:
    try:
        shell.process.find(path, follow=False)
    except OSError:
        return False
    return True
