# SPDX-License-Identifier: GPL-2.0-or-later
"""The shell: runs what :mod:`.shell_parser` reads (POSIX.1-2017, XCU 2; busybox ash's words)."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from . import shell_parser as tree
from .files import Directory, Link, OpenFile, Pipe, PipeEnd, Regular, Sink, Steps, fail
from .processes import Interrupted, Killed, Process, Signal, fork, run
from .shell_words import (
    ARGUMENT,
    VALUE_MAX,
    VARIABLE,
    ExpansionError,
    fields,
    matches,
    pattern,
    string,
)

if TYPE_CHECKING:
    from .options import Program
    from .userland import Userland

__all__ = ["Exit", "FatalError", "Flow", "Return", "Shell", "program", "start"]

DEPTH = 150  # commands in commands; each takes a few of Python's frames
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SPECIAL = {".", ":", "break", "continue", "eval", "exec", "exit", "export", "readonly", "return",
           "set", "shift", "source", "times", "trap", "unset"}  # fmt: skip
"""Builtins whose errors end a shell (POSIX.1-2017, XCU 2.8.1)."""
ENDINGS: dict[int, str] = {
    Signal.KILL: "Killed", Signal.TERM: "Terminated", Signal.HUP: "Hangup",
    Signal.SEGV: "Segmentation fault",
}  # fmt: skip
MISSING = (errno.ENOENT, errno.ENOTDIR)


class Flow(Exception):  # noqa: N818  # it is none
    """``break`` and ``continue`` out of ``levels`` loops."""

    def __init__(self, levels: int, *, again: bool) -> None:
        super().__init__(levels)
        self.levels = levels
        self.again = again


class Return(Exception):  # noqa: N818  # it is none
    """``return`` from a function."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Exit(Exception):  # noqa: N818  # it is none
    """``exit``, or ``set -e`` at work."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class FatalError(Exception):
    """What ends a shell that is not interactive, after these words."""

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status


class Shell:
    """One shell, or a subshell of one. ``process`` is what it runs as."""

    def __init__(
        self, process: Process, name: str = "sh", positional: list[str] | None = None
    ) -> None:
        self.process = process
        self.pid = process.pid  # of its subshells too
        self.name = name
        self.positional = positional or []
        self.variables: dict[str, str] = {
            "IFS": " \t\n", "PS1": "\\w \\$ ", "PS2": "> ", "PS4": "+ ", "OPTIND": "1",
        }  # fmt: skip
        self.variables |= process.environment()
        self.variables.setdefault("PATH", PATH)
        self.variables["PWD"] = process.folder
        self.variables["PPID"] = str(process.parent.pid if process.parent else 0)
        self.exported = set(process.environment()) | {"PWD"}
        self._charges: dict[str, int] = {}  # what is counted for each variable
        self.readonly: set[str] = set()
        self.functions: dict[str, tree.Node] = {}
        self.options: set[str] = set()
        self.traps: dict[str, str] = {}
        self.status = 0
        self.background = 0
        self.line = 0
        self.script = ""  # its file's name, when it is one
        self.builtin = ""
        self.interactive = False
        self.locals: list[dict[str, str | None]] = []
        self.option_at = (1, 1)  # of getopts: the word and the letter that are next
        self._depth = 0
        self._checked = 0  # conditions that we are in: -e does not count there
        self._substituted = 0
        process.environment = self.environment

    def environment(self) -> dict[str, str]:
        """What its commands inherit."""
        return {name: self.variables[name] for name in self.exported if name in self.variables}

    def clone(self, process: Process) -> Shell:
        """Itself in a subshell."""
        other = copy.copy(self)
        other.process = process
        for name in ("variables", "exported", "readonly", "functions", "options", "positional"):
            setattr(other, name, copy.copy(getattr(self, name)))
        other.traps = {}
        other._charges = {}
        other.interactive = False
        process.environment = other.environment
        process.charge(len(self.variables) * VARIABLE)
        return other

    # Variables

    def parameter(self, name: str) -> str | None:
        """The value of ``$name``; None where it is not set."""
        if name in self.variables:
            return self.variables[name]
        if name.isdigit():
            number = int(name[:9])
            if not number:
                return self.name
            return self.positional[number - 1] if number <= len(self.positional) else None
        special: dict[str, Callable[[], str]] = {
            "?": lambda: str(self.status),
            "#": lambda: str(len(self.positional)),
            "$": lambda: str(self.pid),
            "-": lambda: "".join(sorted(self.options)) + "i" * self.interactive,
            "@": lambda: " ".join(self.positional),
            "*": lambda: " ".join(self.positional),
            "LINENO": lambda: str(self.line),
            "RANDOM": lambda: str(self.process.userland.random.randrange(32768)),
        }
        if name == "!":
            return str(self.background) if self.background else None
        return special[name]() if name in special else None

    def assign(self, name: str, value: str) -> None:
        """Set a variable; raises :class:`FatalError` for one that is read-only."""
        if name in self.readonly:
            raise FatalError(f"{name}: is read only")
        self.store(name, value)
        if "a" in self.options:
            self.exported.add(name)

    def store(self, name: str, value: str | None) -> None:
        """Keep ``value`` (None: no variable); raises :class:`FatalError` if it is too much."""
        self.variables.pop(name, None)
        self.take(name, 0 if value is None else len(value) + VARIABLE)
        if value is not None:
            self.variables[name] = value

    def take(self, name: str, size: int) -> None:
        """Hold that much for ``name``; raises :class:`FatalError` if it is too much."""
        self.process.charge(-self._charges.pop(name, 0))
        if size:
            self._charges[name] = size
            if not self.process.charge(size):
                raise FatalError("out of memory")

    # Messages

    def complain(self, text: str) -> Steps[None]:
        """Say ``text`` as ash does: its name, the script or builtin, the line."""
        where = f"{self.name}: "
        within = self.builtin or self.script
        if within and within != self.name:
            where += f"{within}: "
        if within and (not self.interactive or self.script):
            where += f"line {self.line if self.script else 0}: "
        yield from self.process.error(where + text)

    # Running

    def source(self, text: str, first: int = 1) -> Steps[int]:
        """Run all of ``text``, line after line. Raises what ends the shell."""
        parser = tree.Parser(text, first)
        status = 0
        while True:
            try:
                self.line = parser.number
                line = parser.line()
            except tree.ShellSyntaxError as problem:
                self.line = parser.number
                raise FatalError(str(problem)) from None
            except RecursionError:
                raise FatalError("syntax error: nested too deep") from None
            if line is None:
                return status
            if line.items:
                status = yield from self.execute(line)

    def main(self, steps: Steps[int]) -> Steps[int]:
        """``steps`` as all that a shell does: until it exits, or something ends it."""
        try:
            status = yield from self.guard(steps)
        except Exit as end:
            status = end.status
        if "EXIT" in self.traps:
            text = self.traps.pop("EXIT")
            try:
                yield from self.guard(self.source(text))
            except Exit as end:
                return end.status
        return status

    def guard(self, steps: Steps[int]) -> Steps[int]:
        """``steps``, with words for what ends them before their time."""
        try:
            return (yield from steps)
        except (ExpansionError, FatalError) as problem:
            yield from self.complain(str(problem))
            self.status = problem.status if isinstance(problem, FatalError) else 2
        except Return as end:
            self.status = end.status
        except Flow:
            self.status = 0
        finally:
            self.recover()
        return self.status

    def recover(self) -> None:
        """Be outside of everything that was under way."""
        self.builtin = ""
        self._depth = self._checked = 0

    def prompt(self, name: str) -> bytes:
        """What ``PS1`` or ``PS2`` shows: \\w the folder, \\h the host, \\$ who we are."""
        text = self.variables.get(name, "")
        folder, home = self.process.folder, self.variables.get("HOME", "")
        if home and home != "/" and (folder == home or folder.startswith(home + "/")):
            folder = "~" + folder[len(home) :]
        for escape, shown in (
            ("\\w", folder),
            ("\\h", self.process.userland.hostname),
            ("\\$", "#"),
        ):
            text = text.replace(escape, shown)
        return text.encode(errors="surrogateescape")

    def execute(self, node: tree.Node) -> Steps[int]:
        """Run one node; its status, which is ``$?`` too."""
        self._depth += 1
        if self._depth > DEPTH:
            raise Killed(self.process, Signal.SEGV)  # as ash ends when its stack is full
        status: int = yield from RUNNERS[type(node)](self, node)
        self._depth -= 1
        self.status = status
        return status

    def _listed(self, node: tree.Listed) -> Steps[int]:
        status = 0
        for command, background in node.items:
            if background:
                yield from self._background(command)
                status = self.status = 0
            else:
                status = yield from self.execute(command)
        return status

    def _and_or(self, node: tree.AndOr) -> Steps[int]:
        self._checked += 1
        status = yield from self.execute(node.first)
        for number, (operator, command) in enumerate(node.rest):
            last = number == len(node.rest) - 1
            self._checked -= last
            if (operator == "&&") == (status == 0):
                status = yield from self.execute(command)
        return status

    def condition(self, node: tree.Listed) -> Steps[bool]:
        """Whether it succeeds; ``set -e`` does not look."""
        self._checked += 1
        status = yield from self.execute(node)
        self._checked -= 1
        return status == 0

    def _if(self, node: tree.If) -> Steps[int]:
        for condition, body in node.branches:
            if (yield from self.condition(condition)):
                return (yield from self.execute(body))
        return (yield from self.execute(node.otherwise)) if node.otherwise else 0

    def _loop(self, node: tree.Loop) -> Steps[int]:
        status = 0
        depth, checked = self._depth, self._checked
        while True:
            yield from self.process.breathe()
            try:
                if (yield from self.condition(node.condition)) == node.until:
                    return status
                status = yield from self.execute(node.body)
            except Flow as flow:
                self._depth, self._checked = depth, checked
                if not _stays(flow):
                    return 0

    def _for(self, node: tree.For) -> Steps[int]:
        if node.words is None:
            values = list(self.positional)
        else:
            values = yield from fields(self, node.words)
        status = 0
        depth, checked = self._depth, self._checked
        for value in values:
            yield from self.process.breathe()
            self.assign(node.name, value)
            try:
                status = yield from self.execute(node.body)
            except Flow as flow:
                self._depth, self._checked = depth, checked
                if not _stays(flow):
                    return 0
        return status

    def _case(self, node: tree.Case) -> Steps[int]:
        value = yield from string(self, node.word)
        for patterns, body in node.items:
            for word in patterns:
                if matches((yield from pattern(self, word)))(value):
                    return (yield from self.execute(body))
        return 0

    def _function(self, node: tree.Function) -> Steps[int]:
        self.functions[node.name] = node.body
        return 0
        yield

    def _group(self, node: tree.Group) -> Steps[int]:
        opened = yield from self.redirect(node.redirects)
        if opened is None:
            return 1
        with _Files(self.process, opened):
            return (yield from self.execute(node.body))

    def _subshell(self, node: tree.Subshell) -> Steps[int]:
        process = self._child()
        child = self.clone(process)
        return (yield from run(process, child.main(child.execute(node.body))))

    def _child(self) -> Process:
        parent = self.process
        return Process(parent.userland, parent, parent.name, parent.files, parent.job)

    def _background(self, node: tree.Node) -> Steps[None]:
        process = self._child()
        if not self.interactive and 0 in process.files:
            process.files[0].drop()
            process.files[0] = process.open("/dev/null")
        child = self.clone(process)
        fork(process, child.main(child.execute(node)))
        self.background = process.pid
        return
        yield

    def _pipeline(self, node: tree.Pipeline) -> Steps[int]:
        self._checked += node.negated
        if len(node.commands) == 1:
            status = yield from self.execute(node.commands[0])
        else:
            status = yield from self._piped(node.commands)
        self._checked -= node.negated
        return int(not status) if node.negated else status

    def _piped(self, commands: list[tree.Node]) -> Steps[int]:
        """Each in a task of its own, joined by pipes."""
        children = []
        previous: PipeEnd | None = None
        for number, command in enumerate(commands):
            process = self._child()
            if previous is not None:
                _replace(process.files, 0, previous)
                previous = None
            if number < len(commands) - 1:
                previous, writer = Pipe().ends()
                _replace(process.files, 1, writer)
            child = self.clone(process)
            fork(process, child.main(child.execute(command)))
            children.append(process)
        status = 0
        try:
            for process in children:
                status = yield from self.process.wait_for(process)
        except (Killed, Interrupted):
            for process in children:
                process.kill(Signal.TERM)
            raise
        return status

    def substitute(self, body: tree.Listed) -> Steps[str]:
        """What ``body`` prints, in a subshell."""
        process = self._child()
        sink = Sink()
        _replace(process.files, 1, sink.hold())
        child = self.clone(process)
        self.status = yield from run(process, child.main(child.execute(body)))
        self._substituted += 1
        if sink.full:
            raise FatalError("out of memory")
        return sink.data.decode(errors="surrogateescape")

    # Simple commands

    def _simple(self, node: tree.Simple) -> Steps[int]:
        self.line = node.line
        substituted = self._substituted
        words = yield from fields(self, node.words)
        if "x" in self.options and words:
            yield from self.process.error(self.variables.get("PS4", "") + " ".join(words))
        if not words:
            for name, word in node.assignments:
                self.assign(name, (yield from string(self, word)))
            opened = yield from self.redirect(node.redirects)
            if opened is None:
                return self._failed(1)
            _close(opened)
            return self._failed(self.status if self._substituted != substituted else 0)
        opened = yield from self.redirect(node.redirects)
        if opened is None:
            return self._failed(1)
        if not node.assignments:
            return self._failed((yield from self._command(words, opened)))
        before = {name: self.variables.get(name) for name, _ in node.assignments}
        exported = set(self.exported)
        for name, word in node.assignments:
            self.assign(name, (yield from string(self, word)))
            self.exported.add(name)
        try:
            return self._failed((yield from self._command(words, opened)))
        finally:
            self._restore(before)
            self.exported = exported

    def _restore(self, values: dict[str, str | None]) -> None:
        for name, value in values.items():
            self.store(name, value)

    def _failed(self, status: int) -> int:
        self.status = status
        if status and "e" in self.options and not self._checked:
            raise Exit(status)
        return status

    def _command(self, words: list[str], opened: dict[int, OpenFile | None]) -> Steps[int]:
        """A function, a builtin or a program, with ``opened`` for its files."""
        name = words[0]
        if name in self.functions:
            with _Files(self.process, opened):
                return (yield from self._call(name, words[1:]))
        if builtin := self.process.userland.builtins.get(name):
            yield from self.process.breathe()
            keep = name == "exec" and len(words) == 1
            with _Files(self.process, opened, keep=keep):
                self.builtin = name
                try:
                    status = yield from builtin(self, words)
                except FatalError as problem:
                    if name in SPECIAL:
                        raise
                    yield from self.complain(str(problem))
                    status = problem.status
                except OSError as problem:
                    what = problem.filename or "write error"
                    yield from self.process.error(f"sh: {what}: {problem.strerror}")
                    status = 1
                self.builtin = ""
                return status
        try:
            return (yield from self.program(words, opened))
        finally:
            _close(opened)

    def _call(self, name: str, arguments: list[str]) -> Steps[int]:
        held = sum(len(text) + ARGUMENT for text in arguments)
        if not self.process.charge(held):
            self.process.charge(-held)
            raise FatalError("out of memory")
        before, self.positional = self.positional, arguments
        self.locals.append({})
        depth, checked = self._depth, self._checked
        try:
            return (yield from self.execute(self.functions[name]))
        except Return as end:
            self._depth, self._checked = depth, checked
            return end.status
        finally:
            self.positional = before
            self.process.charge(-held)
            self._restore(self.locals.pop())

    def program(self, words: list[str], opened: dict[int, OpenFile | None]) -> Steps[int]:
        """Run a program and wait for it."""
        files = _with(self.process.files, opened)
        try:
            started = start(self.process, words, files, self.variables.get("PATH", ""))
        except OSError as problem:
            with _Files(self.process, {n: f.hold() if f else f for n, f in opened.items()}):
                if problem.errno in MISSING:
                    yield from self.complain(f"{words[0]}: not found")
                    return 127
                yield from self.complain(f"{words[0]}: {problem.strerror}")
            return 126
        process, steps = started
        status = yield from run(process, steps)
        if process.signal and process.signal not in (Signal.INT, Signal.PIPE):
            said = ENDINGS.get(process.signal, f"Signal {process.signal}")
            yield from self.process.error(said)
        return status

    # Redirections

    def redirect(self, redirects: list[tree.Redirect]) -> Steps[dict[int, OpenFile | None] | None]:
        """The files that they open, by descriptor (None: closed); None when one fails."""
        opened: dict[int, OpenFile | None] = {}
        for redirect in redirects:
            text = yield from string(self, redirect.target)
            try:
                found = self._open(redirect, text, opened)
            except OSError as problem:
                _close(opened)
                writes = ">" in redirect.op and redirect.op != ">&"
                words = problem.strerror
                if problem.errno in MISSING:
                    words = "nonexistent directory" if writes else "no such file"
                verb = "create" if writes else "open"
                said = f"can't {verb} {text}: {words}"
                if redirect.op in (">&", "<&"):
                    said = f"{text}: Bad file descriptor"
                yield from self.complain(said)
                return None
            if redirect.fd in opened and (old := opened[redirect.fd]):
                old.drop()
            opened[redirect.fd] = found
        return opened

    def _open(
        self, redirect: tree.Redirect, text: str, opened: dict[int, OpenFile | None]
    ) -> OpenFile | None:
        process = self.process
        if redirect.op in ("<<", "<<-"):
            reader, writer = Pipe().ends()
            reader.pipe.put(text.encode(errors="surrogateescape"))
            writer.drop()
            return reader
        if redirect.op in (">&", "<&"):
            if text == "-":
                return None
            if not text.isdigit():
                raise fail(errno.EBADF, text)
            number = int(text[:9])
            file = opened[number] if number in opened else process.descriptor(number)
            if file is None:
                raise fail(errno.EBADF, text)
            return file.hold()
        flags = {
            "<": os.O_RDONLY,
            "<>": os.O_RDWR | os.O_CREAT,
            ">>": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
        }.get(redirect.op, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        return process.open(text, flags)


class _Files:
    """``opened`` in the place of a process's files meanwhile, or with ``keep`` for good."""

    def __init__(
        self, process: Process, opened: dict[int, OpenFile | None], *, keep: bool = False
    ) -> None:
        self._process = process
        self._opened = opened
        self._keep = keep
        self._before = process.files

    def __enter__(self) -> None:
        if self._opened:
            self._process.files = _with(self._before, self._opened)

    def __exit__(self, *_: object) -> None:
        if not self._opened or self._process.status is not None:
            return
        if self._keep:
            for number in self._opened:
                if (old := self._before.get(number)) is not None:
                    old.drop()
        else:
            self._process.files = self._before
            _close(self._opened)


def _with(files: dict[int, OpenFile], opened: dict[int, OpenFile | None]) -> dict[int, OpenFile]:
    changed = {**files, **opened}
    return {number: file for number, file in changed.items() if file is not None}


def _close(opened: dict[int, OpenFile | None]) -> None:
    for file in opened.values():
        if file is not None:
            file.drop()


def _replace(files: dict[int, OpenFile], number: int, file: OpenFile) -> None:
    """Give a process ``file``, which it holds from now on, in the place of another."""
    if number in files:
        files[number].drop()
    files[number] = file


def _stays(flow: Flow) -> bool:
    """Whether the loop that caught it goes on; what is meant for outer ones goes there."""
    if flow.levels > 1:
        raise Flow(flow.levels - 1, again=flow.again)
    return flow.again


RUNNERS: dict[type, Callable[[Shell, Any], Steps[int]]] = {
    tree.Listed: Shell._listed,
    tree.AndOr: Shell._and_or,
    tree.If: Shell._if,
    tree.Loop: Shell._loop,
    tree.For: Shell._for,
    tree.Case: Shell._case,
    tree.Function: Shell._function,
    tree.Group: Shell._group,
    tree.Subshell: Shell._subshell,
    tree.Pipeline: Shell._pipeline,
    tree.Simple: Shell._simple,
}
"""What runs each kind of node."""


def start(
    parent: Process, words: list[str], files: dict[int, OpenFile], path: str = PATH
) -> tuple[Process, Steps[int]]:
    """The program that ``words`` name, about to run as a child of ``parent``.

    Raises ENOENT where there is none, EACCES for what cannot be run.
    """
    name = words[0]
    userland = parent.userland
    if "/" not in name:
        found = next((f"{d}/{name}" for d in _folders(path) if _there(userland, d, name)), "")
        if not found:
            raise fail(errno.ENOENT, name)
        name = found
    full, node = userland.tree.walk(name, parent.folder, follow=False)
    while isinstance(node, Link) and (applet := full.rpartition("/")[2]):
        program_of = userland.programs.get(applet)
        if program_of is not None:
            return _started(parent, applet, files, _bound(program_of, words[1:]))
        full, node = userland.tree.walk(full, follow=True)
    if node is None:
        raise fail(errno.ENOENT, name)
    own = userland.programs.get(full.rpartition("/")[2]) if full.startswith("/bin/") else None
    if own is not None and not isinstance(node, Regular):
        return _started(parent, words[0], files, _bound(own, words[1:]))
    if isinstance(node, Directory) or not isinstance(node, Regular) or not node.mode & 0o111:
        raise fail(errno.EACCES, name)
    return _started(parent, words[0], files, lambda process: program(process, [name, *words[1:]]))


def _bound(program: Program, arguments: list[str]) -> Callable[[Process], Steps[int]]:
    return lambda process: program(process, arguments)


def _started(
    parent: Process,
    name: str,
    files: dict[int, OpenFile],
    steps: Callable[[Process], Steps[int]],
) -> tuple[Process, Steps[int]]:
    process = Process(parent.userland, parent, name.rpartition("/")[2], files, parent.job)
    return process, steps(process)


def _folders(path: str) -> Iterator[str]:
    return (folder or "." for folder in path.split(":"))


def _there(userland: Userland, folder: str, name: str) -> bool:
    try:
        node = userland.tree.find(f"{folder}/{name}")
    except OSError:
        return False
    return not isinstance(node, Directory)


def program(process: Process, arguments: list[str]) -> Steps[int]:
    """``sh [-eux] [-c COMMAND [NAME [ARG...]] | FILE [ARG...]]``."""
    options: set[str] = set()
    command = login = False
    words = list(arguments)
    while words and words[0][:1] in "-+" and len(words[0]) > 1:
        word = words.pop(0)
        if word == "--":
            break
        command |= "c" in word
        login |= "l" in word
        options |= set(word[1:]) - set("cls")
    shell = Shell(process, "sh")
    shell.options = options
    if command:
        if not words:
            yield from process.error("sh: -c requires an argument")
            return 2
        text = words.pop(0)
        shell.name = words.pop(0) if words else "sh"
        shell.positional = words
        return (yield from shell.main(shell.source(text)))
    if words:
        shell.name = shell.script = words.pop(0)
        shell.positional = words
        try:
            file = process.open(shell.name)
            content = yield from process.all_of(file)
        except OSError:
            yield from process.error(f"sh: can't open '{shell.name}': No such file or directory")
            return 2
        file.drop()
    else:
        return (yield from shell.main(session(shell, process.descriptor(0))))
    return (yield from shell.main(shell.source(content.decode(errors="surrogateescape"))))


def session(shell: Shell, file: OpenFile) -> Steps[int]:
    """Have ``shell`` run line after line of ``file`` as they come, asking for them if it should."""
    process, text, waiting, number, first = shell.process, "", b"", 0, 0
    while True:
        try:
            if shell.interactive:
                yield from process.write(
                    process.descriptor(2), shell.prompt("PS2" if text else "PS1")
                )
            ended = False
            while b"\n" not in waiting and not ended:
                data = yield from process.read(file)
                ended = not data
                waiting += data
                if len(waiting) + len(text) > VALUE_MAX:
                    text, waiting = "", b""
                    raise FatalError("out of memory")  # noqa: TRY301  # as others are below
            line, _newline, waiting = waiting.partition(b"\n")
            if ended and not line and not text:
                return shell.status
            number += 1
            first = first if text else number
            text += line.decode(errors="surrogateescape") + "\n"
            try:
                found = tree.Parser(text, first).line()
            except tree.IncompleteError as problem:
                if not ended:
                    continue
                text = ""
                raise FatalError(str(problem)) from None
            except tree.ShellSyntaxError as problem:
                text = ""
                raise FatalError(str(problem)) from None
            text = ""
            if found is not None and found.items:
                if shell.interactive:
                    yield from shell.guard(shell.execute(found))
                else:
                    yield from shell.execute(found)
        except FatalError as problem:
            if not shell.interactive:
                raise
            yield from shell.complain(str(problem))
            shell.status = problem.status
        except Interrupted:
            if not shell.interactive:
                raise
            text, waiting, shell.status = "", b"", 130
            shell.recover()
