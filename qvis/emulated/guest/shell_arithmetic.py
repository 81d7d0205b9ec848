# SPDX-License-Identifier: GPL-2.0-or-later
"""The shell's ``$((...))``: C's operators on 64-bit integers (POSIX.1-2017, XCU 2.6.4)."""

from __future__ import annotations

import re
from collections.abc import Callable, MutableMapping

__all__ = ["ExpressionError", "evaluate"]

TOKEN = re.compile(
    r"\s*(?:(0[xX][0-9a-fA-F]+|\d+#\w+|\d+)|([A-Za-z_]\w*)"
    r"|(<<=|>>=|\*\*|\+\+|--|&&|\|\||<<|>>|[-+*/%&|^<>=!]=|[-+*/%&|^<>=!~?:(),]))"
)
# From the loosest to the tightest, each from left to right.
LEVELS = (
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<=", ">=", "<", ">"), ("<<", ">>"),
    ("+", "-"), ("*", "/", "%"),
)  # fmt: skip
ASSIGN = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>="}
NESTING = 40
BITS = 64


class ExpressionError(Exception):
    """It is no expression, or divides by zero; says so in ash's words."""


def evaluate(text: str, variables: MutableMapping[str, str], depth: int = 0) -> int:
    """What ``text`` comes to; assigns to ``variables`` where it says so."""
    return _Expression(text, variables, depth).value()


def _wrapped(value: int) -> int:
    value &= (1 << BITS) - 1
    return value - (1 << BITS) if value >> (BITS - 1) else value


def _quotient(left: int, right: int) -> int:
    """Towards zero, as C divides."""
    if not right:
        raise ExpressionError("divide by zero")
    found = abs(left) // abs(right)
    return found if (left < 0) == (right < 0) else -found


OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
    "&": lambda a, b: a & b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<<": lambda a, b: a << (b & 63),
    ">>": lambda a, b: a >> (b & 63),
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": _quotient,
    "%": lambda a, b: a - b * _quotient(a, b),
}


class _Expression:
    """Reads tokens from the left; ``_dry`` counts the branches that are not taken."""

    def __init__(self, text: str, variables: MutableMapping[str, str], depth: int) -> None:
        self._variables = variables
        self._depth = depth
        self._dry = 0
        self._tokens: list[str] = []
        at = 0
        text = text.rstrip()
        while at < len(text):
            match = TOKEN.match(text, at)
            if not match:
                raise ExpressionError("arithmetic syntax error")
            self._tokens.append(match[0].strip())
            at = match.end()
        self._tokens.reverse()

    def value(self) -> int:
        if not self._tokens:
            return 0
        found = self._comma()
        if self._tokens:
            raise ExpressionError("arithmetic syntax error")
        return found

    def _next(self) -> str:
        return self._tokens[-1] if self._tokens else ""

    def _take(self, *known: str) -> str:
        return self._tokens.pop() if self._next() in known else ""

    def _comma(self) -> int:
        self._depth += 1
        if self._depth > NESTING:
            raise ExpressionError("expression recursion loop detected")
        found = self._assignment()
        while self._take(","):
            found = self._assignment()
        self._depth -= 1
        return found

    def _assignment(self) -> int:
        tokens = self._tokens
        if len(tokens) > 1 and _is_name(tokens[-1]) and tokens[-2] in ASSIGN:
            name, operator = tokens.pop(), tokens.pop()
            right = self._assignment()
            if operator != "=":
                right = self._apply(operator[:-1], self._read(name), right)
            return self._assign(name, right)
        return self._conditional()

    def _conditional(self) -> int:
        condition = self._binary(0)
        if not self._take("?"):
            return condition
        self._dry += not condition
        left = self._comma()
        self._dry += (bool(condition)) - (not condition)
        if not self._take(":"):
            raise ExpressionError("arithmetic syntax error")
        right = self._assignment()
        self._dry -= bool(condition)
        return left if condition else right

    def _binary(self, level: int) -> int:
        if level == len(LEVELS):
            return self._power()
        left = self._binary(level + 1)
        while operator := self._take(*LEVELS[level]):
            if operator in ("&&", "||"):
                decided = bool(left) == (operator == "||")
                self._dry += decided
                right = self._binary(level + 1)
                self._dry -= decided
                left = int(bool(left) if decided else bool(right))
            else:
                left = self._apply(operator, left, self._binary(level + 1))
        return left

    def _apply(self, operator: str, left: int, right: int) -> int:
        return 0 if self._dry else _wrapped(int(OPERATIONS[operator](left, right)))

    def _power(self) -> int:
        base = self._unary()
        if not self._take("**"):
            return base
        exponent = self._power()
        if exponent < 0:
            raise ExpressionError("exponent less than 0")
        return _wrapped(pow(base, exponent, 1 << BITS))

    def _unary(self) -> int:
        signs = []
        while sign := self._take("-", "+", "!", "~"):
            signs.append(sign)
        step = self._take("++", "--")
        if step:
            if not _is_name(self._next()):
                raise ExpressionError("arithmetic syntax error")
            name = self._tokens.pop()
            found = self._assign(name, self._read(name) + (1 if step == "++" else -1))
        else:
            found = self._primary()
        for sign in reversed(signs):
            found = _wrapped({"-": -found, "+": found, "!": int(not found), "~": ~found}[sign])
        return found

    def _primary(self) -> int:
        token = self._tokens.pop() if self._tokens else ""
        if token == "(":
            found = self._comma()
            if not self._take(")"):
                raise ExpressionError("arithmetic syntax error")
            return found
        if _is_name(token):
            found = self._read(token)
            if step := self._take("++", "--"):
                self._assign(token, found + (1 if step == "++" else -1))
            return found
        return _number(token)

    def _read(self, name: str) -> int:
        text = self._variables.get(name, "").strip()
        if not text:
            return 0
        try:
            return _number(text)
        except ExpressionError:
            return evaluate(text, self._variables, self._depth + 1)

    def _assign(self, name: str, value: int) -> int:
        value = _wrapped(value)
        if not self._dry:
            self._variables[name] = str(value)
        return value


def _is_name(token: str) -> bool:
    return token[:1].isalpha() or token[:1] == "_"


def _number(token: str) -> int:
    try:
        if "#" in token:
            base, _, digits = token.partition("#")
            return _wrapped(int(digits, int(base)))
        digits = token.lstrip("-+")
        sign = -1 if token.startswith("-") else 1
        base_of = 16 if digits[:2] in ("0x", "0X") else 8 if digits[:1] == "0" else 10
        if len(digits) > 100:
            raise ExpressionError("arithmetic syntax error")
        return _wrapped(sign * int(digits, base_of))
    except ValueError:
        raise ExpressionError("arithmetic syntax error") from None
