# SPDX-License-Identifier: GPL-2.0-or-later
"""The shell's language: text to a tree (POSIX.1-2017 volume XCU chapter 2, and busybox ash).

As ash does, a line is parsed when the one before it has been run; see :meth:`Parser.line`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = [
    "AndOr",
    "Arithmetic",
    "Case",
    "For",
    "Function",
    "Group",
    "If",
    "IncompleteError",
    "Listed",
    "Literal",
    "Loop",
    "Node",
    "Parameter",
    "Parser",
    "Part",
    "Pipeline",
    "Redirect",
    "ShellSyntaxError",
    "Simple",
    "Subshell",
    "Substitution",
    "Word",
]

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=")
PLAIN = re.compile(r"[^\s|&;<>()\\'\"$`#]+|#")
SPECIAL = "@*#?$!-"
REDIRECT = re.compile(r"(\d*)(<<-|<<|<>|<&|>>|>\||>&|<|>)")
RESERVED = {
    "if", "then", "elif", "else", "fi", "while", "until", "do", "done", "for", "in", "case",
    "esac", "{", "}", "!",
}  # fmt: skip
CLOSING = {"then", "elif", "else", "fi", "do", "done", "esac", "}"}
NESTING = 40  # the most that a hostile script may nest; each level takes several Python frames


class ShellSyntaxError(Exception):
    """What the text means cannot be told; says it in ash's words."""


class IncompleteError(ShellSyntaxError):
    """The text ends where it may go on: a terminal asks for another line."""


@dataclass(frozen=True, slots=True)
class Literal:
    text: str
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class Parameter:
    """``$name`` or ``${name op word}``; ``op`` is "" for a plain one, "len" for ``${#name}``."""

    name: str
    op: str = ""
    word: Word | None = None
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class Substitution:
    """``$(text)``: what it prints."""

    body: Listed
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """``$((word))``."""

    word: Word
    quoted: bool = False


Part = Literal | Parameter | Substitution | Arithmetic


@dataclass(frozen=True, slots=True)
class Word:
    parts: tuple[Part, ...]

    @property
    def plain(self) -> str | None:
        """Its text if it is one unquoted literal, as a reserved word must be."""
        if len(self.parts) == 1 and isinstance(self.parts[0], Literal) and not self.parts[0].quoted:
            return self.parts[0].text
        return None


@dataclass(slots=True)
class Redirect:
    fd: int
    op: str
    target: Word  # of a here-document, its text


@dataclass(slots=True)
class Simple:
    assignments: list[tuple[str, Word]] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    redirects: list[Redirect] = field(default_factory=list)
    line: int = 0


@dataclass(slots=True)
class Group:
    """Any compound command with its redirections; ``{ ... }`` is one around a list."""

    body: Node
    redirects: list[Redirect]


@dataclass(slots=True)
class Subshell:
    body: Listed


@dataclass(slots=True)
class If:
    branches: list[tuple[Listed, Listed]]
    otherwise: Listed | None


@dataclass(slots=True)
class Loop:
    condition: Listed
    body: Listed
    until: bool


@dataclass(slots=True)
class For:
    name: str
    words: list[Word] | None  # None: the positional parameters
    body: Listed


@dataclass(slots=True)
class Case:
    word: Word
    items: list[tuple[list[Word], Listed]]


@dataclass(slots=True)
class Function:
    name: str
    body: Node


@dataclass(slots=True)
class Pipeline:
    commands: list[Node]
    negated: bool


@dataclass(slots=True)
class AndOr:
    first: Node
    rest: list[tuple[str, Node]]


@dataclass(slots=True)
class Listed:
    """Commands one after the other; those with True go to the background."""

    items: list[tuple[Node, bool]]


Node = (
    Simple | Group | Subshell | If | Loop | For | Case | Function | Pipeline | AndOr | Listed
)  # fmt: skip


class Parser:
    """Reads ``text`` from its start; ``number`` is the line at which it is now."""

    def __init__(self, text: str, number: int = 1, depth: int = 0) -> None:
        self.text = text
        self.at = 0
        self.depth = depth
        self._first = number
        self._heredocs: list[tuple[Redirect, str, bool, bool]] = []

    @property
    def number(self) -> int:
        """The line that is being read."""
        return self._first + self.text.count("\n", 0, self.at)

    def line(self) -> Listed | None:
        """The next complete command line; None when there is no more.

        Raises :class:`ShellSyntaxError`, or :class:`IncompleteError` where more text could help.
        """
        self._newlines()
        if self.at >= len(self.text):
            return None
        found = self._list(newlines=False)
        self._blanks()
        if self.at < len(self.text):
            if self.text[self.at] != "\n":
                raise self._unexpected()
            self._newline()
        elif self._heredocs:
            self._read_heredocs()
        return found

    # Lists and pipelines

    def _list(self, *, newlines: bool, ends: tuple[str, ...] = ()) -> Listed:
        """Commands up to a newline, or with ``newlines`` up to one of the words ``ends``."""
        self.depth += 1
        if self.depth > NESTING:
            raise ShellSyntaxError("nested too deep")
        items: list[tuple[Node, bool]] = []
        while True:
            if newlines:
                self._newlines()
            if self._ended(ends):
                break
            command = self._and_or()
            separator = self._operator(("&&", "&", ";;", ";"))
            items.append((command, separator == "&"))
            if separator in ("&", ";"):
                self.at += 1
            elif separator == "&&" or not (newlines and self._peek() == "\n"):
                break
        self.depth -= 1
        if not items and newlines and ends:
            raise self._unexpected(ends[0])
        return Listed(items)

    def _ended(self, ends: tuple[str, ...]) -> bool:
        self._blanks()
        if self.at >= len(self.text):
            return True
        if self.text[self.at] in "\n)" or self.text.startswith(";;", self.at):
            return True
        word = self._reserved()
        if word in CLOSING:
            if word in ends:
                return True
            raise self._unexpected(ends[0] if ends else "")
        return False

    def _and_or(self) -> Node:
        first = self._pipeline()
        rest = []
        while operator := self._operator(("&&", "||")):
            self.at += 2
            self._newlines()
            rest.append((operator, self._pipeline()))
        return AndOr(first, rest) if rest else first

    def _pipeline(self) -> Node:
        negated = False
        while self._reserved() == "!":
            self.at += 1
            negated = not negated
            self._blanks()
        commands = [self._command()]
        while self._operator(("||", "|")) == "|":
            self.at += 1
            self._newlines()
            commands.append(self._command())
        return Pipeline(commands, negated) if negated or len(commands) > 1 else commands[0]

    # Commands

    def _command(self) -> Node:
        self._blanks()
        line = self.number
        word = self._reserved()
        if self._peek() == "(":
            self.at += 1
            body: Node = Subshell(self._list(newlines=True, ends=(")",)))
            self._expect(")")
        elif word == "{":
            self.at += 1
            body = self._list(newlines=True, ends=("}",))
            self._keyword("}")
        elif word == "if":
            body = self._if()
        elif word in ("while", "until"):
            self.at += 5
            condition = self._list(newlines=True, ends=("do",))
            body = Loop(condition, self._do(), word == "until")
        elif word == "for":
            body = self._for()
        elif word == "case":
            body = self._case()
        elif word in CLOSING:
            raise self._unexpected()
        else:
            return self._simple(line)
        redirects = self._redirects()
        return Group(body, redirects) if redirects or isinstance(body, Listed) else body

    def _if(self) -> If:
        branches, otherwise = [], None
        keyword = "if"
        while keyword != "fi":
            self._keyword(keyword)
            if keyword == "else":
                otherwise = self._list(newlines=True, ends=("fi",))
                self._keyword("fi")
                break
            condition = self._list(newlines=True, ends=("then",))
            self._keyword("then")
            branches.append((condition, self._list(newlines=True, ends=("fi", "elif", "else"))))
            keyword = self._reserved()
            if keyword not in ("elif", "else"):
                self._keyword("fi")
                break
        return If(branches, otherwise)

    def _do(self) -> Listed:
        self._keyword("do")
        body = self._list(newlines=True, ends=("done",))
        self._keyword("done")
        return body

    def _for(self) -> For:
        self.at += 3
        self._blanks()
        name = NAME.match(self.text, self.at)
        if not name:
            raise ShellSyntaxError("syntax error: bad for loop variable")
        self.at = name.end()
        words: list[Word] | None = None
        self._newlines()
        if self._reserved() == "in":
            self.at += 2
            words = []
            while (word := self._word()) is not None:
                words.append(word)
        if self._operator((";;", ";")) == ";":
            self.at += 1
        self._newlines()
        return For(name[0], words, self._do())

    def _case(self) -> Case:
        self.at += 4
        word = self._word()
        if word is None:
            raise self._unexpected()
        self._newlines()
        self._keyword("in")
        items = []
        while True:
            self._newlines()
            if self._reserved() == "esac":
                break
            if self._peek() == "(":
                self.at += 1
            patterns = []
            while True:
                pattern = self._word()
                if pattern is None:
                    raise self._unexpected(")")
                patterns.append(pattern)
                self._blanks()
                if self._peek() != "|":
                    break
                self.at += 1
            self._expect(")")
            items.append((patterns, self._list(newlines=True, ends=("esac",))
                          if not self._empty_case() else Listed([])))  # fmt: skip
            self._newlines()
            if not self.text.startswith(";;", self.at):
                break
            self.at += 2
        self._keyword("esac")
        return Case(word, items)

    def _empty_case(self) -> bool:
        self._newlines()
        return self.text.startswith(";;", self.at) or self._reserved() == "esac"

    def _simple(self, line: int) -> Node:
        found = Simple(line=line)
        while True:
            self._blanks()
            if redirect := self._redirect():
                found.redirects.append(redirect)
                continue
            if not found.words and (match := ASSIGNMENT.match(self.text, self.at)):
                self.at = match.end()
                found.assignments.append((match[1], self._word(empty=True) or Word(())))
                continue
            word = self._word()
            if word is None:
                break
            if not found.words and not found.assignments and not found.redirects:
                if word.plain == "function" and (name := self._function_name()):
                    return self._function(name)
                if word.plain and self._after("(") and NAME.fullmatch(word.plain):
                    self.at = self.text.index("(", self.at) + 1
                    self._expect(")")
                    return self._function(word.plain)
            if self._peek() == "(":
                raise self._unexpected()
            found.words.append(word)
        if not (found.words or found.assignments or found.redirects):
            raise self._unexpected()
        return found

    def _function_name(self) -> str:
        self._blanks()
        match = NAME.match(self.text, self.at)
        if not match:
            return ""
        self.at = match.end()
        if self._after("("):
            self.at = self.text.index("(", self.at) + 1
            self._expect(")")
        return match[0]

    def _function(self, name: str) -> Function:
        self._newlines()
        return Function(name, self._command())

    def _redirects(self) -> list[Redirect]:
        found = []
        self._blanks()
        while redirect := self._redirect():
            found.append(redirect)
            self._blanks()
        return found

    def _redirect(self) -> Redirect | None:
        match = REDIRECT.match(self.text, self.at)
        if not match:
            return None
        operator = match[2]
        self.at = match.end()
        self._blanks()
        start = self.at
        word = self._word()
        if word is None:
            raise self._unexpected()
        fd = int(match[1][:4]) if match[1] else int(operator[0] == ">")
        found = Redirect(fd, operator, word)
        if operator in ("<<", "<<-"):
            raw = self.text[start : self.at]
            end = re.sub(r"[\\'\"]", "", raw)
            self._heredocs.append((found, end, end != raw, operator == "<<-"))
        return found

    # Words

    def _word(self, *, empty: bool = False) -> Word | None:
        """The next word; None where there is none. ``empty``: directly here, and maybe nothing."""
        if not empty:
            self._blanks()
        start = self.at
        parts: list[Part] = []
        text = self.text
        while self.at < len(text):
            if match := PLAIN.match(text, self.at):
                if match[0] == "#" and self.at == start and not empty:
                    break
                parts.append(Literal(match[0]))
                self.at = match.end()
                continue
            char = text[self.at]
            if char == "\\":
                if self.at + 1 < len(text):
                    if text[self.at + 1] != "\n":
                        parts.append(Literal(text[self.at + 1], True))
                else:
                    parts.append(Literal("\\"))
                self.at += 2
            elif char == "'":
                end = text.find("'", self.at + 1)
                if end < 0:
                    raise IncompleteError("syntax error: unterminated quoted string")
                parts.append(Literal(text[self.at + 1 : end], True))
                self.at = end + 1
            elif char == '"':
                self.at += 1
                parts += self._quoted('"')
                self.at += 1
            elif char in "$`":
                parts.append(self._dollar(quoted=False))
            else:
                break
        return Word(_joined(parts)) if self.at > start or empty else None

    def _quoted(self, end: str) -> list[Part]:
        """Parts up to ``end`` ("": the text's) with the rules of double quotes."""
        parts: list[Part] = [Literal("", True)]
        text = self.text
        escapes = "$`\\\n" + end
        while True:
            if self.at >= len(text):
                if end:
                    raise IncompleteError(
                        "syntax error: missing '}'" if end == "}"
                        else "syntax error: unterminated quoted string"
                    )  # fmt: skip
                return parts
            char = text[self.at]
            if end and char == end:
                return parts
            if char == "\\" and self.at + 1 < len(text) and text[self.at + 1] in escapes:
                if text[self.at + 1] != "\n":
                    parts.append(Literal(text[self.at + 1], True))
                self.at += 2
            elif char in "$`":
                parts.append(self._dollar(quoted=True))
            else:
                stop = self.at + 1
                while stop < len(text) and text[stop] not in '$`\\"}':
                    stop += 1
                parts.append(Literal(text[self.at : stop], True))
                self.at = stop

    def _dollar(self, *, quoted: bool) -> Part:
        text = self.text
        if text[self.at] == "`":
            return self._backquote(quoted=quoted)
        self.at += 1
        if text.startswith("((", self.at):
            start = self.at
            try:
                return self._arithmetic(quoted=quoted)
            except ShellSyntaxError:
                self.at = start
                if "))" not in text[start:]:
                    raise
        if text.startswith("(", self.at):
            self.at += 1
            body = self._list(newlines=True)
            self._expect(")")
            return Substitution(body, quoted)
        if text.startswith("{", self.at):
            return self._braced(quoted=quoted)
        if match := NAME.match(text, self.at):
            self.at = match.end()
            return Parameter(match[0], quoted=quoted)
        if self.at < len(text) and (text[self.at] in SPECIAL or text[self.at].isdigit()):
            self.at += 1
            return Parameter(text[self.at - 1], quoted=quoted)
        return Literal("$", quoted)

    def _backquote(self, *, quoted: bool) -> Part:
        end = self.at + 1
        while end < len(self.text) and self.text[end] != "`":
            end += 1 + (self.text[end] == "\\")
        if end >= len(self.text):
            raise IncompleteError("syntax error: EOF in backquote substitution")
        inner = re.sub(r"\\([$`\\])", r"\1", self.text[self.at + 1 : end])
        parser = Parser(inner, self.number, self.depth)
        body = parser._list(newlines=True)
        if parser.at < len(inner):
            raise parser._unexpected()
        self.at = end + 1
        return Substitution(body, quoted)

    def _arithmetic(self, *, quoted: bool) -> Part:
        self.at += 2
        start, level = self.at, 0
        while True:
            if self.at >= len(self.text):
                raise IncompleteError("syntax error: missing '))'")
            char = self.text[self.at]
            if char == ")" and not level and self.text.startswith("))", self.at):
                break
            if char == ")" and not level:
                raise ShellSyntaxError("syntax error: missing '))'")
            level += (char == "(") - (char == ")")
            self.at += 1
        inner = Parser(self.text[start : self.at], self.number, self.depth)
        self.at += 2
        return Arithmetic(Word(_joined(inner._quoted(""))), quoted)

    def _braced(self, *, quoted: bool) -> Part:
        self.at += 1
        length = False
        if re.compile(r"#[A-Za-z0-9_@*]").match(self.text, self.at):
            length = True
            self.at += 1
        match = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|\d+|[@*#?$!-]").match(self.text, self.at)
        if not match:
            if self.text.find("}", self.at) < 0:
                raise IncompleteError("syntax error: missing '}'")
            raise ShellSyntaxError("syntax error: bad substitution")
        self.at = match.end()
        name = match[0]
        if self.text.startswith("}", self.at):
            self.at += 1
            return Parameter(name, "len" if length else "", quoted=quoted)
        operator = re.compile(r":?[-=?+]|##?|%%?|//?|:").match(self.text, self.at)
        if not operator or length:
            if self.at >= len(self.text):
                raise IncompleteError("syntax error: missing '}'")
            raise ShellSyntaxError("syntax error: bad substitution")
        self.at = operator.end()
        # A pattern's characters mean something within double quotes too.
        ordinary = quoted and operator[0][-1] not in "#%/"
        word = Word(_joined(self._quoted("}") if ordinary else self._until_brace()))
        self.at += 1
        return Parameter(name, operator[0], word, quoted)

    def _until_brace(self) -> list[Part]:
        """The word of an unquoted ``${name op word}``: blanks and operators are ordinary in it."""
        parts: list[Part] = []
        while not self.text.startswith("}", self.at):
            if self.at >= len(self.text):
                raise IncompleteError("syntax error: missing '}'")
            if self.text[self.at] in "'\"\\$`":
                parts += self._one()
            else:
                parts.append(Literal(self.text[self.at]))
                self.at += 1
        return parts

    def _one(self) -> list[Part]:
        """One quoted string, escape or expansion."""
        char = self.text[self.at]
        if char in "$`":
            return [self._dollar(quoted=False)]
        if char == '"':
            self.at += 1
            parts = self._quoted('"')
            self.at += 1
            return parts
        if char == "'":
            end = self.text.find("'", self.at + 1)
            if end < 0:
                raise IncompleteError("syntax error: unterminated quoted string")
            text, self.at = self.text[self.at + 1 : end], end + 1
            return [Literal(text, True)]
        self.at += 2
        return [Literal(self.text[self.at - 1 : self.at], True)]

    # Tokens

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _after(self, what: str) -> bool:
        at = self.at
        while self.text[at : at + 1] in (" ", "\t"):
            at += 1
        return self.text.startswith(what, at)

    def _blanks(self) -> None:
        text, at, size = self.text, self.at, len(self.text)
        while at < size:
            if text[at] in " \t\r":
                at += 1
            elif text.startswith("\\\n", at):
                at += 2
            elif text[at] == "#" and (at == 0 or text[at - 1] in " \t\n;&|()"):
                end = text.find("\n", at)
                at = size if end < 0 else end
            else:
                break
        self.at = at

    def _newlines(self) -> None:
        self._blanks()
        while self._peek() == "\n":
            self._newline()
            self._blanks()

    def _newline(self) -> None:
        self.at += 1
        if self._heredocs:
            self._read_heredocs()

    def _read_heredocs(self) -> None:
        waiting, self._heredocs = self._heredocs, []
        for redirect, end, literal, tabs in waiting:
            lines = []
            while True:
                if self.at >= len(self.text):
                    raise IncompleteError("syntax error: unterminated here-document")
                stop = self.text.find("\n", self.at)
                stop = len(self.text) if stop < 0 else stop
                line, self.at = self.text[self.at : stop], min(stop + 1, len(self.text))
                line = line.lstrip("\t") if tabs else line
                if line == end:
                    break
                lines.append(line + "\n")
            text = "".join(lines)
            inner = Parser(text, self.number, self.depth)
            redirect.target = Word(
                (Literal(text, True),) if literal else _joined(inner._quoted(""))
            )

    def _operator(self, known: tuple[str, ...]) -> str:
        self._blanks()
        return next((o for o in known if self.text.startswith(o, self.at)), "")

    def _reserved(self) -> str:
        self._blanks()
        match = re.compile(r"[a-z]+|[{}!]").match(self.text, self.at)
        if not match or match[0] not in RESERVED:
            return ""
        after = self.text[match.end() : match.end() + 1]
        return match[0] if not after or after in " \t\n;&|()<>\r" else ""

    def _keyword(self, word: str) -> None:
        self._newlines()
        if self._reserved() != word:
            raise self._unexpected(word)
        self.at += len(word)

    def _expect(self, char: str) -> None:
        self._newlines() if char == ")" else self._blanks()
        if self._peek() != char:
            raise self._unexpected(char)
        self.at += 1

    def _unexpected(self, wanted: str = "") -> ShellSyntaxError:
        self._blanks()
        expecting = f' (expecting "{wanted}")' if wanted else ""
        if self.at >= len(self.text):
            return IncompleteError(f"syntax error: unexpected end of file{expecting}")
        if self._peek() == "\n":
            return ShellSyntaxError(f"syntax error: unexpected newline{expecting}")
        match = re.compile(r"&&|\|\||;;|[|&;<>()]|[^\s|&;<>()]+").match(self.text, self.at)
        return ShellSyntaxError(
            f'syntax error: unexpected "{match[0] if match else self._peek()}"{expecting}'
        )


def _joined(parts: list[Part]) -> tuple[Part, ...]:
    """The same with neighbouring literals in one."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, Literal) and isinstance(last, Literal) and part.quoted == last.quoted:
            found[-1] = Literal(last.text + part.text, part.quoted)
        else:
            found.append(part)
    return tuple(found)
