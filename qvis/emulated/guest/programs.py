# SPDX-License-Identifier: GPL-2.0-or-later
"""Small programs that need little of the machine: busybox's words and statuses."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Iterator

from .files import Device, Directory, Link, Steps, fail
from .options import MisuseError, Program, guarded, options
from .patience import Pattern
from .processes import Process, Signal, fork, run

__all__ = ["PROGRAMS", "duration", "echo", "kill", "printf", "test"]

ESCAPES = {"a": "\a", "b": "\b", "e": "\x1b", "f": "\f", "n": "\n", "r": "\r", "t": "\t",
           "v": "\v", "\\": "\\"}  # fmt: skip
ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{1,2}|0?[0-7]{1,3}|.)", re.DOTALL)
CONVERSION = re.compile(r"%([-+ 0#]*)(\d+|\*)?(?:\.(\d+|\*)?)?([diouxXcsbfeEgG%])")
UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIGNALS = (
    "HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP "
    "TSTP TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH POLL PWR SYS"
)
CHUNK = 64  # numbers that seq writes at once


def _unescaped(text: str) -> tuple[str, bool]:
    """``text`` with its backslashes done, and whether ``\\c`` ended it."""
    text, ended, _ = text.partition("\\c")

    def one(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] == "x" and len(code) > 1:
            return bytes([int(code[1:], 16)]).decode(errors="surrogateescape")
        if code[0] in "01234567":
            return bytes([int(code, 8) & 255]).decode(errors="surrogateescape")
        return ESCAPES.get(code, match[0])

    return ESCAPE.sub(one, text), bool(ended)


def echo(process: Process, arguments: list[str]) -> Steps[int]:
    """[-neE] [ARG]..."""
    newline, escapes = "\n", False
    while arguments and re.fullmatch("-[neE]+", arguments[0]):
        word, *arguments = arguments
        newline = "" if "n" in word else newline
        escapes = ("e" in word or escapes) and "E" not in word
    text = " ".join(arguments)
    if escapes:
        text, ended = _unescaped(text)
        newline = "" if ended else newline
    yield from process.out(text + newline)
    return 0


def printf(process: Process, arguments: list[str]) -> Steps[int]:
    """FORMAT [ARG]..."""
    if not arguments:
        raise MisuseError
    form, *values = arguments
    form, ended = _unescaped(form)
    status, found, taken = 0, [], iter(values)
    room = process.userland.largest
    while True:
        left = len(values)
        text, used, problems = _formatted(form, taken, room)
        found.append(text)
        room -= len(text)
        if room < 0:
            raise fail(errno.ENOMEM)
        for problem in problems:
            status = 1
            yield from process.error(f"{process.name}: invalid number '{problem}'")
        values = values[used:]
        if not values or len(values) == left or ended:
            break
        if len(found) % 64 == 0:
            yield from process.breathe()
    yield from process.out("".join(found))
    return status


def _formatted(form: str, values: Iterator[str], room: int) -> tuple[str, int, list[str]]:
    """One pass of ``form``: the text, how many values it took, and what was no number.

    Raises ENOMEM for what is padded to more than ``room`` characters.
    """
    used = 0
    problems: list[str] = []

    def value() -> str:
        nonlocal used
        found = next(values, None)
        used += found is not None
        return found or ""

    def number(text: str) -> int:
        if text[:1] in "'\"" and len(text) > 1:
            return ord(text[1])
        try:
            return int(text, 0) if text else 0
        except ValueError:
            try:
                return int(text)
            except ValueError:
                problems.append(text)
                return 0

    def size(text: str | None) -> int:
        nonlocal room
        found = number(value()) if text == "*" else int((text or "0")[:18])
        room -= abs(found)
        if room < 0:
            raise fail(errno.ENOMEM)
        return found

    def one(match: re.Match[str]) -> str:
        flags, width, precision, kind = match.groups()
        if kind == "%":
            return "%"
        wide = size(width)
        exact = f".{size(precision)}" if "." in match[0] else ""
        form = f"%{flags}{wide or ''}{exact}"
        text = value()
        if kind == "b":
            return _unescaped(text)[0]
        if kind in "sc":
            return (form + "s") % (text[:1] if kind == "c" else text)
        if kind in "diouxX":
            return str((form + ("d" if kind in "iu" else kind)) % number(text)).replace("0o", "")
        try:
            return str((form + kind) % float(text or 0))
        except ValueError:
            problems.append(text)
            return str((form + kind) % 0.0)

    return CONVERSION.sub(one, form), used, problems


# test


class _TestError(Exception):
    """What ``test`` is given is no expression."""


def test(process: Process, arguments: list[str]) -> Steps[int]:
    """EXPRESSION"""
    try:
        found = _holds(process, arguments)
    except _TestError as problem:
        yield from process.error(f"sh: {problem}")
        return 2
    return int(not found)


def _holds(process: Process, arguments: list[str]) -> bool:
    tokens = list(reversed(arguments))
    found = bool(tokens) and _either(process, tokens)
    if tokens:
        raise _TestError(f"{tokens[-1]}: unknown operand")
    return found


def _either(process: Process, tokens: list[str]) -> bool:
    found = _both(process, tokens)
    while tokens and tokens[-1] in ("-o", "||"):
        tokens.pop()
        found = _both(process, tokens) or found
    return found


def _both(process: Process, tokens: list[str]) -> bool:
    found = _one_test(process, tokens, 0)
    while tokens and tokens[-1] in ("-a", "&&"):
        tokens.pop()
        found = _one_test(process, tokens, 0) and found
    return found


def _one_test(process: Process, tokens: list[str], depth: int) -> bool:
    if not tokens:
        raise _TestError("argument expected")
    if depth > 50:
        raise _TestError("too many nested expressions")
    binary = len(tokens) >= 3 and tokens[-2] in COMPARISONS
    if binary:
        left, operator, right = tokens.pop(), tokens.pop(), tokens.pop()
        return _compared(process, left, operator, right)
    token = tokens.pop()
    if token == "!" and tokens:
        return not _one_test(process, tokens, depth + 1)
    if token == "(" and tokens:
        found = _either(process, tokens)
        if not tokens or tokens.pop() != ")":
            raise _TestError("closing paren expected")
        return found
    if len(token) == 2 and token[0] == "-" and token[1] in "nzedfrwxsLhbcptSugk" and tokens:
        return _unary_test(process, token[1], tokens.pop())
    return bool(token)


def _unary_test(process: Process, letter: str, value: str) -> bool:
    if letter in "nz":
        return bool(value) == (letter == "n")
    if letter == "t":
        return (
            value.isdigit() and (f := process.files.get(int(value[:9]))) is not None and f.terminal
        )
    try:
        node = process.find(value, follow=letter not in "Lh")
    except OSError:
        return False
    kinds = {"d": Directory, "L": Link, "h": Link}
    if letter in kinds:
        return isinstance(node, kinds[letter])
    if letter in "bc":
        return isinstance(node, Device) and node.kind == letter
    if letter == "f":
        return not isinstance(node, Directory | Link | Device)
    if letter == "s":
        return node.size > 0
    if letter == "x":
        return isinstance(node, Directory) or bool(node.mode & 0o111)
    return letter in "erw"


NUMERIC = {
    "-eq": int.__eq__, "-ne": int.__ne__, "-lt": int.__lt__, "-le": int.__le__,
    "-gt": int.__gt__, "-ge": int.__ge__,
}  # fmt: skip
COMPARISONS = {*NUMERIC, "=", "==", "!=", "<", ">", "-nt", "-ot", "-ef", "=~"}


def _compared(process: Process, left: str, operator: str, right: str) -> bool:
    if operator in NUMERIC:
        numbers = []
        for text in (left, right):
            if not re.fullmatch(r"\s*[-+]?\d{1,20}\s*", text):
                raise _TestError(f"{text}: bad number")
            numbers.append(int(text))
        return bool(NUMERIC[operator](numbers[0], numbers[1]))
    if operator in ("=", "=="):
        return left == right
    if operator in ("-nt", "-ot", "-ef"):
        tree, folder = process.userland.tree, process.folder
        try:
            return operator == "-ef" and tree.walk(left, folder)[0] == tree.walk(right, folder)[0]
        except OSError:
            return False
    if operator == "=~":
        try:
            return Pattern(right).search(left) is not None
        except re.error:
            return False
    return {"!=": left != right, "<": left < right, ">": left > right}[operator]


# Signals and time


def kill(process: Process, arguments: list[str]) -> Steps[int]:
    """[-l] [-SIG] PID..."""
    name = process.name
    signal = int(Signal.TERM)
    if arguments and arguments[0] == "-l":
        names = "".join(f"{n:2}) {name}\n" for n, name in enumerate(SIGNALS.split(), 1))
        yield from process.out(names)
        return 0
    if arguments and arguments[0] == "-s" and len(arguments) > 1:
        arguments = ["-" + arguments[1], *arguments[2:]]
    if arguments and re.fullmatch(r"-\w+", arguments[0]):
        word, *arguments = arguments
        chosen = word[1:].upper().removeprefix("SIG")
        if chosen.isdigit():
            signal = int(chosen[:3])
        elif chosen in Signal.__members__:
            signal = Signal[chosen]
        else:
            yield from process.error(f"{name}: bad signal name '{word[1:]}'")
            return 1
    if not arguments:
        yield from process.error(f"{name}: you need to specify whom to kill")
        return 1
    status = 0
    for word in arguments:
        if not re.fullmatch(r"-?\d{1,9}", word):
            yield from process.error(f"{name}: invalid number '{word}'")
            status = 1
            continue
        target = process.userland.processes.get(abs(int(word)))
        if target is None and abs(int(word)) not in process.userland.kernel_threads:
            yield from process.error(f"{name}: can't kill pid {word}: No such process")
            status = 1
        elif target is not None and target is not process.userland.init:
            target.kill(signal)
    return status


def duration(text: str) -> float:
    """Seconds in ``text`` such as "0.5" or "2m"; raises :class:`ValueError`."""
    match = re.fullmatch(r"(\d{0,12}(?:\.\d{0,12})?)([smhd]?)", text)
    if not match or not re.search(r"\d", match[1]):
        raise ValueError(text)
    return float(match[1]) * UNITS[match[2]]


def _sleep(process: Process, arguments: list[str]) -> Steps[int]:
    """[N]...

    Pause for a time equal to the total of the args given, where each arg can
    have an optional suffix of (s)econds, (m)inutes, (h)ours, or (d)ays"""
    if not arguments:
        raise MisuseError
    total = 0.0
    for word in arguments:
        try:
            total += duration(word)
        except ValueError:
            yield from process.error(f"sleep: invalid number '{word}'")
            return 1
    yield from process.sleep(int(total * 1e9))
    return 0


def _usleep(process: Process, arguments: list[str]) -> Steps[int]:
    """N"""
    if len(arguments) != 1:
        raise MisuseError
    if not re.fullmatch(r"\d{1,12}", arguments[0]):
        yield from process.error(f"usleep: invalid number '{arguments[0]}'")
        return 1
    yield from process.sleep(int(arguments[0]) * 1000)
    return 0


def _timeout(process: Process, arguments: list[str]) -> Steps[int]:
    """[-s SIG] [-k KILL_SECS] SECS PROG ARGS"""
    from .shell import start

    chosen, rest = options(arguments, "", "sk", first=True)
    if len(rest) < 2:
        raise MisuseError
    try:
        limit = int(duration(rest[0]) * 1e9)
        child, steps = start(process, rest[1:], process.files)
    except ValueError:
        yield from process.error(f"timeout: invalid number '{rest[0]}'")
        return 1
    except OSError as problem:
        yield from process.error(f"timeout: can't execute '{rest[1]}': {problem.strerror}")
        return 127 if problem.errno == errno.ENOENT else 126
    signal = chosen.value("s", "TERM").upper().removeprefix("SIG")
    number = int(signal) if signal.isdigit() else Signal.__members__.get(signal, Signal.TERM)
    expired = False

    def watch() -> Steps[int]:
        nonlocal expired
        yield from watcher.sleep(limit)
        if child.status is None:
            expired = True
            child.kill(number)
        return 0

    watcher = Process(process.userland, process, "timeout", {}, process.job)
    fork(watcher, watch())
    status = yield from run(child, steps)
    watcher.kill(Signal.KILL)
    return 143 if expired else status


def _date(process: Process, arguments: list[str]) -> Steps[int]:
    """[OPTIONS] [+FMT]"""
    now = process.userland.time
    form = next((word[1:] for word in arguments if word.startswith("+")), "")
    text = time.strftime(form or "%a %b %e %H:%M:%S UTC %Y", time.gmtime(now))
    yield from process.out(text + "\n")
    return 0


# Words and names


def _basename(process: Process, arguments: list[str]) -> Steps[int]:
    """FILE [SUFFIX] | -a FILE... | -s SUFFIX FILE..."""
    chosen, names = options(arguments, "a", "s")
    if not names:
        raise MisuseError
    suffix = chosen.value("s")
    if "a" not in chosen and "s" not in chosen:
        suffix = names[1] if len(names) > 1 else ""
        names = names[:1]
    for name in names:
        base = name.rstrip("/").rpartition("/")[2] or ("/" if "/" in name else "")
        if suffix and base != suffix:
            base = base.removesuffix(suffix)
        yield from process.out(base + "\n")
    return 0


def _dirname(process: Process, arguments: list[str]) -> Steps[int]:
    """FILENAME"""
    if len(arguments) != 1:
        raise MisuseError
    name = arguments[0].rstrip("/") or "/"
    above = name.rpartition("/")[0].rstrip("/") if name != "/" else "/"
    yield from process.out((above or ("/" if name.startswith("/") else ".")) + "\n")
    return 0


def _seq(process: Process, arguments: list[str]) -> Steps[int]:
    """[-w] [-s SEP] [FIRST [INC]] LAST"""
    flags: list[str] = []
    words = list(arguments)
    separator = "\n"
    while words and re.match(r"-[^\d.]", words[0]):
        word = words.pop(0)
        flags.append(word)
        if word.startswith("-s"):
            separator = word[2:] or (words.pop(0) if words else "")
    if not 1 <= len(words) <= 3 or not all(
        re.fullmatch(r"[-+]?\d{1,18}(\.\d{1,9})?", word) for word in words
    ):
        raise MisuseError
    digits = max(len(word.partition(".")[2]) for word in words)
    scale = 10**digits
    numbers = [round(float(word) * scale) if digits else int(word) for word in words]
    first = numbers[0] if len(words) > 1 else scale
    step = numbers[1] if len(words) == 3 else scale
    last = numbers[-1]
    wide = max(len(words[0]), len(words[-1])) if "-w" in flags else 0

    def shown(value: int) -> str:
        text = f"{value / scale:.{digits}f}" if digits else str(value)
        return text.zfill(wide)

    if not step:
        raise MisuseError
    value, chunk, started = first, [], False
    while (value <= last) if step > 0 else (value >= last):
        chunk.append(shown(value))
        value += step
        if len(chunk) == CHUNK:
            yield from process.out((separator if started else "") + separator.join(chunk))
            started, chunk = True, []
    if chunk:
        yield from process.out((separator if started else "") + separator.join(chunk))
    yield from process.out("\n")
    return 0


def _yes(process: Process, arguments: list[str]) -> Steps[int]:
    """[STRING]"""
    line = (" ".join(arguments) or "y") + "\n"
    while True:
        yield from process.out(line * 256)


def _expr(process: Process, arguments: list[str]) -> Steps[int]:
    """EXPRESSION"""
    from .shell_arithmetic import ExpressionError, evaluate

    if len(arguments) == 3 and arguments[1] == ":":
        try:
            pattern = arguments[2].replace("\\(", "(").replace("\\)", ")")
            match = Pattern(pattern).match(arguments[0])
        except re.error:
            match = None
        text = str(len(match[0]) if match else 0)
        if match and match.re.groups:
            text = match[1] or ""
    elif len(arguments) == 3 and arguments[1] in ("=", "!="):
        text = str(int((arguments[0] == arguments[2]) == (arguments[1] == "=")))
    elif arguments[:1] == ["length"] and len(arguments) == 2:
        text = str(len(arguments[1]))
    else:
        try:
            text = str(
                evaluate(" ".join(a.replace("=", "==") if a == "=" else a for a in arguments), {})
            )
        except ExpressionError:
            yield from process.error("expr: syntax error")
            return 2
    yield from process.out(text + "\n")
    return int(text in ("", "0"))


def _env(process: Process, arguments: list[str]) -> Steps[int]:
    """[-i] [NAME=VALUE]... [PROG ARGS]"""
    from .shell import start

    values = {} if arguments[:1] == ["-i"] else dict(process.environment())
    words = arguments[1:] if arguments[:1] in (["-i"], ["-"]) else list(arguments)
    while words and "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        values[name] = value
    if not words:
        yield from process.out("".join(f"{name}={value}\n" for name, value in values.items()))
        return 0
    process.environment = lambda: values
    try:
        child, steps = start(process, words, process.files)
    except OSError as problem:
        yield from process.error(f"env: can't execute '{words[0]}': {problem.strerror}")
        return 127 if problem.errno == errno.ENOENT else 126
    return (yield from run(child, steps))


def _through(process: Process, arguments: list[str]) -> Steps[int]:
    """PROG ARGS"""
    from .shell import start

    words = arguments
    while words and words[0].startswith("-"):
        words = words[2:] if words[0] == "-n" and len(words) > 2 else words[1:]
    if not words:
        raise MisuseError
    try:
        child, steps = start(process, words, process.files)
    except OSError as problem:
        yield from process.error(f"{process.name}: can't execute '{words[0]}': {problem.strerror}")
        return 127 if problem.errno == errno.ENOENT else 126
    return (yield from run(child, steps))


def _true(process: Process, arguments: list[str]) -> Steps[int]:
    return 0
    yield


def _false(process: Process, arguments: list[str]) -> Steps[int]:
    return 1
    yield


def _bracket(process: Process, arguments: list[str]) -> Steps[int]:
    """EXPRESSION ]"""
    if not arguments or arguments[-1] != "]":
        yield from process.error("[: missing ]")
        return 2
    return (yield from test(process, arguments[:-1]))


def _which(process: Process, arguments: list[str]) -> Steps[int]:
    """COMMAND..."""
    status = 0
    for name in arguments:
        if found := process.userland.which(name, process.environment().get("PATH", "")):
            yield from process.out(found + "\n")
        else:
            status = 1
    return status


def _tty(process: Process, arguments: list[str]) -> Steps[int]:
    """[-s]"""
    file = process.files.get(0)
    name = process.userland.terminal_name(file) if file is not None else ""
    yield from process.out((name or "not a tty") + "\n")
    return int(not name)


PROGRAMS: dict[str, Program] = {
    name: guarded(program)
    for name, program in {
        "echo": echo, "printf": printf, "test": test, "[": _bracket, "kill": kill,
        "sleep": _sleep, "usleep": _usleep, "timeout": _timeout, "date": _date,
        "basename": _basename, "dirname": _dirname, "seq": _seq, "yes": _yes, "expr": _expr,
        "env": _env, "nohup": _through, "setsid": _through,
        "true": _true, "false": _false, "sync": _true, "stty": _true, "clear": _true,
        "which": _which, "tty": _tty,
    }.items()
}  # fmt: skip
