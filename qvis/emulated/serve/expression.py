# SPDX-License-Identifier: GPL-2.0-or-later
"""Expressions and dumps of the human monitor (QEMU's monitor/hmp.c and hmp-cmds.c)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["DumpFormat", "ExpressionError", "dump", "evaluate", "show"]

MASK = (1 << 64) - 1
NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*")
CHARACTER = re.compile(r"'(.)'", re.DOTALL)
SIZES = {"b": 1, "h": 2, "w": 4, "g": 8, "L": 8}
MOST = 1 << 16  # bytes of a dump: QEMU's main loop stands still as long as one takes
LINE = 16
DEEPEST = 100  # parentheses


class ExpressionError(Exception):
    """What the monitor says of an expression that is none."""


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self._depth = 0

    def peek(self) -> str:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def _chain(self, operators: str, part: Callable[[], int]) -> int:
        value = part()
        while (operator := self.peek()) and operator in operators:
            self.at += 1
            value = self._apply(operator, value, part()) & MASK
        return value

    @staticmethod
    def _apply(operator: str, left: int, right: int) -> int:
        if operator in "/%" and right == 0:
            raise ExpressionError("division by zero")
        match operator:
            case "+":
                return left + right
            case "-":
                return left - right
            case "&":
                return left & right
            case "|":
                return left | right
            case "^":
                return left ^ right
            case "*":
                return left * right
            case "/":
                return left // right
            case _:
                return left % right

    # From what binds least to what binds most, in the monitor's own order.

    def sum(self) -> int:
        return self._chain("+-", self._logic)

    def _logic(self) -> int:
        return self._chain("&|^", self._product)

    def _product(self) -> int:
        return self._chain("*/%", self._unary)

    def _unary(self) -> int:
        sign = ""
        while (character := self.peek()) and character in "+-~":
            sign += character
            self.at += 1
        value = self._primary()
        for one in reversed(sign):
            value = (-value if one == "-" else ~value if one == "~" else value) & MASK
        return value

    def _primary(self) -> int:
        character = self.peek()
        if not character:
            raise ExpressionError("unexpected end of expression")
        if character == "(":
            self._depth += 1
            if self._depth > DEEPEST:
                raise ExpressionError("too many parentheses")
            self.at += 1
            value = self.sum()
            if self.peek() != ")":
                raise ExpressionError("')' expected")
            self.at += 1
            self._depth -= 1
            return value
        if character == "$":
            raise ExpressionError("unknown register")
        if quoted := CHARACTER.match(self.text, self.at):
            self.at = quoted.end()
            return ord(quoted[1])
        number = NUMBER.match(self.text, self.at)
        if not number:
            raise ExpressionError(f"invalid char '{character}' in expression")
        self.at = number.end()
        text = number[0]
        if len(text) > 24:
            raise ExpressionError("number too large")
        octal = text.startswith("0") and text.isdigit()
        value = int(text, 8) if octal else int(text, 0)
        if value > MASK:
            raise ExpressionError("number too large")
        return value


def evaluate(text: str) -> tuple[int, str]:
    """The value of the expression that ``text`` begins with, and what comes after it."""
    parser = _Parser(text)
    value = parser.sum()
    parser.peek()
    return value, text[parser.at :]


@dataclass
class DumpFormat:
    """How ``x`` and ``xp`` show memory; what one of them leaves out is as it was last time."""

    letter: str = "x"
    size: int = 4

    def parse(self, text: str) -> int:
        """Take what follows a command's slash; how many are to be shown."""
        digits = re.match(r"\d*", text)
        count = int(digits[0][:9]) if digits and digits[0] else 1
        for character in text[digits.end() if digits else 0 :]:
            if character in SIZES:
                self.size = SIZES[character]
            elif character in "xduoci":
                self.letter = character
            else:
                raise ExpressionError(f"invalid char in format: '{character}'")
        return count


def show(value: int, letter: str, bits: int = 0) -> str:
    """A number as ``print`` shows it, or with ``bits`` as a dump of numbers of that width does."""
    match letter:
        case "x":
            return f"{value:#0{bits // 4 + 2}x}" if bits else f"{value:#x}"
        case "o":
            return f"{f'0{value:o}' if value else '0':>{(bits + 2) // 3}}"
        case "c":
            escapes = {39: "\\'", 92: "\\\\", 10: "\\n", 13: "\\r"}
            byte = value & 0xFF
            plain = chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"
            return f"'{escapes.get(byte, plain)}'"
        case _:
            signed = value - (1 << 64) if letter == "d" and value >> 63 else value
            return f"{signed:>{(bits * 10 + 32) // 33}}"


def dump(
    form: DumpFormat, count: int, address: int, read: Callable[[int, int], bytes | None]
) -> str:
    """Lines of memory from ``address`` on.

    ``read`` gives so many bytes at an address, or None where there is nothing.
    """
    if form.letter == "i":
        return f"{address:#010x}: Asm output not supported on this arch\n"
    size = 1 if form.letter == "c" else form.size
    per_line = 8 if form.size == 1 else LINE
    left = min(count * form.size, MOST)
    text = ""
    while left > 0:
        length = min(left, per_line)
        data = read(address, length)
        if data is None:
            return f"{text}{address:016x}: Cannot access memory\n"
        numbers = [int.from_bytes(data[at : at + size], "little") for at in range(0, length, size)]
        shown = "".join(f" {show(number, form.letter, 8 * size)}" for number in numbers)
        text += f"{address:016x}:{shown}\n"
        address = (address + length) & MASK
        left -= length
    return text
