# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's JSON: a stream of values, read with its extensions, its limits and its errors.

What QEMU reads is more than JSON (strings in single quotes, any value at the top), and what
it answers to anything else is part of how a monitor behaves. Sources: QEMU's qobject/
json-lexer.c, json-streamer.c and json-parser.c; docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

__all__ = ["JsonError", "JsonStream", "dumps"]

MAX_TOKEN_SIZE = 64 << 20  # bytes, of one token and of all of one message
MAX_TOKEN_COUNT = 2 << 20
MAX_NESTING = 1 << 10
MAX_WORDS = 1023  # bytes of what a parse error quotes

QUOTES = b"\"'"
STRUCTURE = b"{}[],:"
SPACE = re.compile(rb"[ \t\r\n]*")
KEYWORD = re.compile(rb"[a-z]*")
# Possessive, so that a match needs no memory for what it might take back.
BODY = {
    ord('"'): re.compile(rb"(?:[\x20\x21\x23-\x5b\x5d-\xfd]++|\\[\x20-\xfd])*+"),
    ord("'"): re.compile(rb"(?:[\x20-\x26\x28-\x5b\x5d-\xfd]++|\\[\x20-\xfd])*+"),
}
# Where reading goes on after an error: docs/interop/qmp-spec.rst has clients use them.
RESUME = re.compile(rb"[\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]")
ESCAPE = re.compile(rb"\\(.)", re.DOTALL)
HEX = re.compile(rb"[0-9a-fA-F]{4}")
PLAIN = {
    b'"': '"', b"'": "'", b"\\": "\\", b"/": "/",
    b"b": "\b", b"f": "\f", b"n": "\n", b"r": "\r", b"t": "\t",
}  # fmt: skip
NONCHARACTER = re.compile(r"[\ufdd0-\ufdef]|[^\x00-\uffff]|[\ufffe\uffff]")


class JsonError(Exception):
    """What QEMU says of a message that is none."""


class Kind(Enum):
    """What a token is."""

    STRUCTURE = auto()
    STRING = auto()
    NUMBER = auto()
    KEYWORD = auto()
    STRAY = auto()  # no token
    TOO_LONG = auto()


class Digit(Enum):
    """Where in a number its next byte is."""

    SIGN = auto()
    ZERO = auto()
    DIGITS = auto()
    POINT = auto()
    FRACTION = auto()
    E = auto()
    E_SIGN = auto()
    EXPONENT = auto()


_ANY, _NONZERO = b"0123456789", b"123456789"


def _steps(*rules: tuple[bytes, Digit | None]) -> dict[int, Digit | None]:
    return {byte: step for text, step in rules for byte in text}


# From where, with which byte, to where; None: no number can be that.
STEPS: dict[Digit, dict[int, Digit | None]] = {
    Digit.SIGN: _steps((b"0", Digit.ZERO), (_NONZERO, Digit.DIGITS)),
    Digit.ZERO: _steps((_ANY, None), (b".", Digit.POINT)),
    Digit.DIGITS: _steps((_ANY, Digit.DIGITS), (b"eE", Digit.E), (b".", Digit.POINT)),
    Digit.POINT: _steps((_ANY, Digit.FRACTION)),
    Digit.FRACTION: _steps((_ANY, Digit.FRACTION), (b"eE", Digit.E)),
    Digit.E: _steps((b"+-", Digit.E_SIGN), (_ANY, Digit.EXPONENT)),
    Digit.E_SIGN: _steps((_ANY, Digit.EXPONENT)),
    Digit.EXPONENT: _steps((_ANY, Digit.EXPONENT)),
}
COMPLETE = {Digit.ZERO, Digit.DIGITS, Digit.FRACTION, Digit.EXPONENT}


class Lexer:
    """Bytes to tokens. What was looked at is not looked at again when more comes."""

    def __init__(self) -> None:
        self._text = bytearray()  # from where a token begins
        self._at = 0  # how much of it is known to belong to that token
        self._digit: Digit | None = None  # within a number: where
        self._lost = False  # after an error

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """The tokens that end in ``data``."""
        text = self._text
        text += data
        while text:
            if self._lost:
                resume = RESUME.search(text)
                del text[: resume.start() if resume else len(text)]
                self._lost = resume is None
                continue
            if not self._at:
                del text[: SPACE.match(text).end()]  # type: ignore[union-attr] # it may be empty
                if not text:
                    return
            kind = self._scan(text)
            if self._at > MAX_TOKEN_SIZE:
                kind, self._at = Kind.TOO_LONG, MAX_TOKEN_SIZE + 1
            if kind is None:
                return
            token = bytes(text[: self._at])
            del text[: self._at]
            self._at, self._digit, self._lost = 0, None, kind is Kind.STRAY
            yield kind, token

    def _scan(self, text: bytearray) -> Kind | None:
        """Go on to the end of the token that ``text`` begins with; None: it is not there yet."""
        first = text[0]
        if first in STRUCTURE:
            self._at = 1
            return Kind.STRUCTURE
        if first in QUOTES:
            return self._string(text, first)
        if first == ord("-") or first in _ANY:
            return self._number(text)
        if ord("a") <= first <= ord("z"):
            self._at = KEYWORD.match(text, self._at).end()  # type: ignore[union-attr]
            return Kind.KEYWORD if self._at < len(text) else None
        self._at = 1
        return Kind.STRAY

    def _string(self, text: bytearray, quote: int) -> Kind | None:
        self._at = BODY[quote].match(text, max(1, self._at)).end()  # type: ignore[union-attr]
        rest = len(text) - self._at
        if not rest or (text[self._at] == ord("\\") and rest == 1):
            return None
        if text[self._at] == quote:
            self._at += 1
            return Kind.STRING
        self._at += 2 if text[self._at] == ord("\\") else 1
        return Kind.STRAY

    def _number(self, text: bytearray) -> Kind | None:
        digit, at = self._digit, self._at
        if digit is None:
            digit, at = {ord("-"): Digit.SIGN, ord("0"): Digit.ZERO}.get(text[0], Digit.DIGITS), 1
        for byte in memoryview(text)[at:]:
            following = STEPS[digit].get(byte)
            if following is None:
                # Another byte ends a number that is complete and is not part of it.
                over = digit in COMPLETE and byte not in STEPS[digit]
                self._at = at if over else at + 1
                return Kind.NUMBER if over else Kind.STRAY
            digit, at = following, at + 1
        self._digit, self._at = digit, at
        return None


class _Container:
    """An object or array that is not at its end."""

    __slots__ = ("is_key", "key", "value")

    def __init__(self, value: dict[str, Any] | list[Any], is_key: bool) -> None:
        self.value = value
        self.key: str | None = None  # whose value comes next
        self.is_key = is_key  # it is where a key should be


class _Need(Enum):
    """What may come next."""

    VALUE = auto()
    FIRST = auto()  # of an array or object, or its end
    COLON = auto()
    SEPARATOR = auto()
    NOTHING = auto()


class _Message:
    """One message while it comes. The first thing wrong with it is kept, the rest only counted."""

    def __init__(self) -> None:
        self.tokens = 0
        self.size = 0
        self.braces = 0
        self.brackets = 0
        self._stack: list[_Container] = []
        self._need = _Need.VALUE
        self._value: Any = None
        self._error: JsonError | None = None

    def add(self, kind: Kind, token: bytes) -> bool:
        """Take a token; whether the message is at its end. JsonError: it never will be."""
        if kind is Kind.STRAY:
            words = token.split(b"\0", 1)[0].decode(errors="replace")
            raise JsonError(f"JSON parse error, stray '{words}'")
        if kind is Kind.STRUCTURE:
            self.braces += (token == b"{") - (token == b"}")
            self.brackets += (token == b"[") - (token == b"]")
        self.tokens += 1
        if kind is Kind.TOO_LONG or self.size + len(token) + 1 > MAX_TOKEN_SIZE:
            raise JsonError("JSON token size limit exceeded")
        if self.tokens > MAX_TOKEN_COUNT:
            raise JsonError("JSON token count limit exceeded")
        if self.braces + self.brackets > MAX_NESTING:
            raise JsonError("JSON nesting depth limit exceeded")
        self.size += len(token)
        if self._error is None:
            try:
                self._parse(kind, token)
            except JsonError as problem:
                self._error, self._stack = problem, []
        return self.braces < 0 or self.brackets < 0 or not (self.braces or self.brackets)

    def end(self) -> Any:
        """What it is; JsonError if it is nothing."""
        if self._error is None and self._need is not _Need.NOTHING:
            self._error = JsonError("JSON parse error, premature EOI")
        if self._error is not None:
            raise self._error
        return self._value

    def _parse(self, kind: Kind, token: bytes) -> None:
        inside = self._stack[-1] if self._stack else None
        if self._need is _Need.COLON:
            if token != b":" or kind is not Kind.STRUCTURE:
                raise JsonError("JSON parse error, missing : in object pair")
            self._need = _Need.VALUE
        elif self._need is _Need.SEPARATOR:
            assert inside is not None
            is_object = isinstance(inside.value, dict)
            if kind is Kind.STRUCTURE and token == (b"}" if is_object else b"]"):
                self._close()
            elif kind is Kind.STRUCTURE and token == b",":
                self._need = _Need.VALUE
            else:
                where = "dict" if is_object else "list"
                raise JsonError(f"JSON parse error, expected separator in {where}")
        elif kind is not Kind.STRUCTURE:
            self._put(_scalar(kind, token))
        elif token in (b"{", b"["):
            is_key = inside is not None and isinstance(inside.value, dict) and inside.key is None
            self._stack.append(_Container({} if token == b"{" else [], is_key))
            self._need = _Need.FIRST
        elif (
            self._need is _Need.FIRST
            and inside is not None
            and token == (b"}" if isinstance(inside.value, dict) else b"]")
        ):
            self._close()
        else:
            raise JsonError("JSON parse error, expecting value")

    def _close(self) -> None:
        done = self._stack.pop()
        if done.is_key:
            raise JsonError("JSON parse error, key is not a string in object")
        self._put(done.value)

    def _put(self, value: Any) -> None:
        if not self._stack:
            self._value, self._need = value, _Need.NOTHING
            return
        inside = self._stack[-1]
        if isinstance(inside.value, list):
            inside.value.append(value)
        elif inside.key is None:
            if not isinstance(value, str):
                raise JsonError("JSON parse error, key is not a string in object")
            inside.key, self._need = value, _Need.COLON
            return
        else:
            if inside.key in inside.value:
                raise JsonError("JSON parse error, duplicate key")
            inside.value[inside.key] = value
            inside.key = None
        self._need = _Need.SEPARATOR


class JsonStream:
    """Messages out of bytes, however these are cut. Bounded: see the limits above."""

    def __init__(self) -> None:
        self._lexer = Lexer()
        self._message = _Message()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that end in ``data``; a JsonError stands for one that is none."""
        for kind, token in self._lexer.feed(data):
            found: Any
            try:
                if not self._message.add(kind, token):
                    continue
                found = self._message.end()
            except JsonError as problem:
                found = problem
            self._message = _Message()
            yield found


def dumps(value: Any) -> str:
    """``value`` as QEMU writes it, on one line."""
    try:
        return json.dumps(value)
    except RecursionError:
        # An id that a client nested as deep as it may: it gets that back.
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + 4 * MAX_NESTING)
        try:
            return json.dumps(value)
        finally:
            sys.setrecursionlimit(limit)


def _scalar(kind: Kind, token: bytes) -> Any:
    if kind is Kind.STRING:
        return _string(token)
    if kind is Kind.KEYWORD:
        values = {b"true": True, b"false": False, b"null": None}
        if token not in values:
            words = f"invalid keyword '{token.decode()}'"[:MAX_WORDS]
            raise JsonError(f"JSON parse error, {words}")
        return values[token]
    if token.isdigit() or token[1:].isdigit():
        # Beyond 64 bits it is a floating-point number, of which more digits change nothing.
        value = int(token) if len(token) <= 20 else None
        if value is not None and -(1 << 63) <= value < 1 << 64:
            return value
    return float(token)


def _string(token: bytes) -> str:
    body, parts, at = token[1:-1], [], 0
    while escape := ESCAPE.search(body, at):
        parts.append(_decode(body[at : escape.start()]))
        at = escape.end()
        if escape[1] in PLAIN:
            parts.append(PLAIN[escape[1]])
        elif escape[1] == b"u":
            code = _hex(body, at)
            at += 4
            if 0xD800 <= code < 0xDC00 and body[at : at + 2] == b"\\u":
                trailing = _hex(body, at + 2)
                paired = 0xDC00 <= trailing < 0xE000
                code = 0x10000 + ((code & 0x3FF) << 10 | trailing & 0x3FF) if paired else -1
                at += 6 if paired else 0
            if not _valid(code):
                raw = token[1 + escape.start() : 1 + at].decode(errors="replace")
                raise JsonError(f"JSON parse error, {raw} is not a valid Unicode character")
            parts.append(chr(code))
        else:
            raise JsonError("JSON parse error, invalid escape sequence in string")
    parts.append(_decode(body[at:]))
    return "".join(parts)


def _hex(body: bytes, at: int) -> int:
    match = HEX.match(body, at)
    return int(match[0], 16) if match else -1


def _valid(code: int) -> bool:
    """Whether it is a character (QEMU's util/unicode.c leaves noncharacters out)."""
    return (
        0 <= code <= 0x10FFFF
        and not 0xD800 <= code < 0xE000
        and not 0xFDD0 <= code <= 0xFDEF
        and code & 0xFFFE != 0xFFFE
    )


def _decode(text: bytes) -> str:
    try:
        # NUL has two bytes in modified UTF-8.
        found = text.replace(b"\xc0\x80", b"\0").decode()
    except UnicodeDecodeError:
        found = None
    if found is None or not all(_valid(ord(match[0])) for match in NONCHARACTER.finditer(found)):
        raise JsonError("JSON parse error, invalid UTF-8 sequence in string")
    return found
