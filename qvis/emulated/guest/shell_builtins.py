# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that are part of the shell."""

from __future__ import annotations

import re
from collections.abc import Callable

from .files import Directory, Steps
from .options import Program
from .processes import run
from .programs import PROGRAMS
from .shell import Exit, FatalError, Flow, Return, Shell, start
from .shell_arithmetic import ExpressionError, evaluate
from .shell_parser import NAME
from .shell_words import ARGUMENT, VALUE_MAX, VARIABLE

__all__ = ["BUILTINS"]

Builtin = Callable[[Shell, list[str]], Steps[int]]
SETTINGS = {"errexit": "e", "nounset": "u", "xtrace": "x", "noglob": "f", "allexport": "a",
            "pipefail": "", "verbose": "v", "noexec": "n", "noclobber": "C"}  # fmt: skip


def _same(program: Program) -> Builtin:
    """A program that the shell has in itself."""

    def builtin(shell: Shell, words: list[str]) -> Steps[int]:
        return (yield from program(shell.process, words[1:]))

    return builtin


def _true(shell: Shell, words: list[str]) -> Steps[int]:
    return 0
    yield


def _false(shell: Shell, words: list[str]) -> Steps[int]:
    return 1
    yield


def _bracket(shell: Shell, words: list[str]) -> Steps[int]:
    closing = "]" * len(words[0])
    if words[-1] != closing or len(words) == 1:
        yield from shell.process.error(f"sh: missing {closing}")
        return 2
    return (yield from PROGRAMS["test"](shell.process, words[1:-1]))


def _number(shell: Shell, words: list[str], default: int) -> int:
    if len(words) < 2:
        return default
    if not re.fullmatch(r"\d{1,9}", words[1]):
        raise FatalError(f"Illegal number: {words[1]}")
    return int(words[1])


def _break(shell: Shell, words: list[str]) -> Steps[int]:
    raise Flow(max(1, _number(shell, words, 1)), again=words[0] == "continue")
    yield


def _return(shell: Shell, words: list[str]) -> Steps[int]:
    raise Return(_number(shell, words, shell.status) & 255)
    yield


def _exit(shell: Shell, words: list[str]) -> Steps[int]:
    raise Exit(_number(shell, words, shell.status) & 255)
    yield


def _cd(shell: Shell, words: list[str]) -> Steps[int]:
    names = [word for word in words[1:] if word not in ("-L", "-P", "--")]
    target = names[0] if names else shell.variables.get("HOME", "/")
    if target == "-":
        target = shell.variables.get("OLDPWD", shell.process.folder)
        yield from shell.process.out(target + "\n")
    try:
        # Dots are of the path as it was typed, so links are followed only afterwards.
        logical = _logical(shell.variables.get("PWD", "/"), target)
        node = shell.process.userland.tree.find(logical)
    except OSError as problem:
        raise FatalError(f"can't cd to {target}: {problem.strerror}") from None
    if not isinstance(node, Directory):
        raise FatalError(f"can't cd to {target}: Not a directory")
    shell.variables["OLDPWD"] = shell.process.folder
    shell.process.folder = shell.variables["PWD"] = logical
    return 0


def _logical(folder: str, target: str) -> str:
    names: list[str] = [] if target.startswith("/") else folder.strip("/").split("/")
    for name in target.split("/"):
        if name == "..":
            names = names[:-1]
        elif name not in ("", "."):
            names.append(name)
    return "/" + "/".join(name for name in names if name)


def _pwd(shell: Shell, words: list[str]) -> Steps[int]:
    folder = shell.process.folder
    if "-P" in words:
        folder = shell.process.userland.tree.walk(folder)[0]
    yield from shell.process.out(folder + "\n")
    return 0


def _export(shell: Shell, words: list[str]) -> Steps[int]:
    kept = shell.exported if words[0] == "export" else shell.readonly
    names = [word for word in words[1:] if word != "-p"]
    if not names:
        for name in sorted(kept):
            value = shell.variables.get(name)
            text = f"={_quoted(value)}" if value is not None else ""
            yield from shell.process.out(f"{words[0]} {name}{text}\n")
    for word in names:
        name, equals, value = word.partition("=")
        _checked(name, word)
        if equals:
            shell.assign(name, value)
        kept.add(name)
    return 0


def _checked(name: str, word: str) -> None:
    if not NAME.fullmatch(name):
        raise FatalError(f"{word.partition('=')[0]}: bad variable name")


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "'\"'\"'") + "'"


def _unset(shell: Shell, words: list[str]) -> Steps[int]:
    functions = "-f" in words
    for name in words[1:]:
        if name in ("-f", "-v"):
            continue
        if functions:
            shell.functions.pop(name, None)
            continue
        _checked(name, name)
        if name in shell.readonly:
            raise FatalError(f"{name}: is read only")
        shell.store(name, None)
        shell.exported.discard(name)
    return 0
    yield


def _local(shell: Shell, words: list[str]) -> Steps[int]:
    if not shell.locals:
        raise FatalError("not in a function")
    for word in words[1:]:
        name, equals, value = word.partition("=")
        _checked(name, word)
        shell.locals[-1].setdefault(name, shell.variables.get(name))
        if equals:
            shell.assign(name, value)
    return 0
    yield


def _set(shell: Shell, words: list[str]) -> Steps[int]:
    if len(words) == 1:
        lines = [f"{n}={_quoted(v)}\n" for n, v in sorted(shell.variables.items())]
        yield from shell.process.out("".join(lines))
        return 0
    arguments = words[1:]
    while arguments and arguments[0][:1] in "-+" and len(arguments[0]) > 1:
        word = arguments.pop(0)
        if word == "--":
            break
        letters = set(word[1:])
        if "o" in letters:
            letters = {SETTINGS.get(arguments.pop(0), "") if arguments else ""} - {""}
        change = shell.options.update if word[0] == "-" else shell.options.difference_update
        change(letters)
        if not arguments:
            return 0
    shell.take("@", sum(len(text) + ARGUMENT for text in arguments))
    shell.positional = arguments
    return 0


def _shift(shell: Shell, words: list[str]) -> Steps[int]:
    count = _number(shell, words, 1)
    if count > len(shell.positional):
        return 1
    shell.positional = shell.positional[count:]
    return 0
    yield


def _eval(shell: Shell, words: list[str]) -> Steps[int]:
    return (yield from shell.source(" ".join(words[1:])))


def _source(shell: Shell, words: list[str]) -> Steps[int]:
    if len(words) < 2:
        return 0
    try:
        file = shell.process.open(words[1])
        text = yield from shell.process.all_of(file)
    except OSError as problem:
        raise FatalError(f"can't open '{words[1]}': {problem.strerror}") from None
    file.drop()
    before = shell.positional
    shell.positional = words[2:] or before
    try:
        return (yield from shell.source(text.decode(errors="surrogateescape")))
    except Return as end:
        return end.status
    finally:
        shell.positional = before


def _exec(shell: Shell, words: list[str]) -> Steps[int]:
    if len(words) == 1:
        return 0
    process = shell.process
    try:
        child, steps = start(process, words[1:], process.files, shell.variables.get("PATH", ""))
    except OSError as problem:
        missing = problem.errno in (2, 20)
        raise FatalError(
            f"{words[1]}: {'not found' if missing else problem.strerror}", 127 if missing else 126
        ) from None
    raise Exit((yield from run(child, steps)))


def _read(shell: Shell, words: list[str]) -> Steps[int]:
    raw, names, arguments = False, [], words[1:]
    while arguments and arguments[0].startswith("-"):
        word = arguments.pop(0)
        raw |= "r" in word
        if word[-1] in "ptnu" and arguments:
            value = arguments.pop(0)
            if word[-1] == "p":
                yield from shell.process.write(shell.process.descriptor(2), value.encode())
    names = arguments or ["REPLY"]
    for name in names:
        _checked(name, name)
    line, status, escaped = bytearray(), 1, False
    file = shell.process.descriptor(0)
    while char := (yield from shell.process.read(file, 1)):
        if char == b"\n" and not escaped:
            status = 0
            break
        if char == b"\\" and not raw and not escaped:
            escaped = True
            continue
        if not (escaped and char == b"\n"):
            line += char
            if len(line) > VALUE_MAX:
                raise FatalError("out of memory")
        escaped = False
    text = line.decode(errors="surrogateescape")
    separators = shell.variables.get("IFS", " \t\n")
    blank = "".join(char for char in separators if char in " \t\n")
    text = text.strip(blank) if blank else text
    for number, name in enumerate(names):
        if number == len(names) - 1 or not separators:
            shell.assign(name, text)
            text = ""
            continue
        match = re.search(f"[{re.escape(separators)}]", text)
        end = match.start() if match else len(text)
        shell.assign(name, text[:end])
        text = text[end + 1 :].lstrip(blank) if blank else text[end + 1 :]
    return status


def _wait(shell: Shell, words: list[str]) -> Steps[int]:
    process = shell.process
    status = 0
    if len(words) == 1:
        for child in list(process.children):
            yield from process.wait_for(child)
        process.children.clear()
        return 0
    for word in words[1:]:
        child_of = next((c for c in process.children if str(c.pid) == word), None)
        if child_of is None:
            if not word.isdigit():
                raise FatalError(f"{word}: bad pid or %job")
            status = 127
            continue
        status = yield from process.wait_for(child_of)
        process.children.remove(child_of)
    return status


def _kill(shell: Shell, words: list[str]) -> Steps[int]:
    words = [
        str(shell.background) if re.fullmatch(r"%[1%+]?\d*", word) and shell.background else word
        for word in words
    ]
    status = yield from PROGRAMS["kill"](shell.process, words[1:])
    if (pending := shell.process.job.pending) is not None:  # it was for us
        shell.process.job.pending = None
        raise pending
    return status


def _trap(shell: Shell, words: list[str]) -> Steps[int]:
    if len(words) == 1:
        for name, action in shell.traps.items():
            yield from shell.process.out(f"trap -- {_quoted(action)} {name}\n")
    for name in words[2:]:
        name = {"0": "EXIT"}.get(name, name.removeprefix("SIG"))
        if words[1] == "-":
            shell.traps.pop(name, None)
        else:
            shell.take(f"trap {name}", len(words[1]) + VARIABLE)
            shell.traps[name] = words[1]
    return 0


def _type(shell: Shell, words: list[str]) -> Steps[int]:
    status = 0
    for name in words[1:]:
        if name in shell.functions:
            said = f"{name} is a function"
        elif name in BUILTINS:
            said = f"{name} is a shell builtin"
        elif found := shell.process.userland.which(name, shell.variables.get("PATH", "")):
            said = f"{name} is {found}"
        else:
            said, status = f"{name}: not found", 127
        yield from shell.process.out(said + "\n")
    return status


def _command(shell: Shell, words: list[str]) -> Steps[int]:
    arguments = words[1:]
    if arguments and arguments[0] in ("-v", "-V"):
        status = 0
        for name in arguments[1:]:
            if name in shell.functions or name in BUILTINS:
                yield from shell.process.out(name + "\n")
            elif found := shell.process.userland.which(name, shell.variables.get("PATH", "")):
                yield from shell.process.out(found + "\n")
            else:
                status = 127
        return status
    if arguments and arguments[0] in ("-p", "--"):
        arguments = arguments[1:]
    if not arguments:
        return 0
    if builtin := BUILTINS.get(arguments[0]):
        return (yield from builtin(shell, arguments))
    return (yield from shell.program(arguments, {}))


def _getopts(shell: Shell, words: list[str]) -> Steps[int]:
    if len(words) < 3:
        raise FatalError("usage: getopts optstring var [arg]")
    options, name = words[1:3]
    arguments = words[3:] or shell.positional
    at, within = shell.option_at
    if shell.variables.get("OPTIND") == "1" and within == 1:
        at = 1
    word = arguments[at - 1] if 0 < at <= len(arguments) else ""
    if len(word) < 2 or word[0] != "-" or word == "--":
        shell.assign("OPTIND", str(at + (word == "--")))
        shell.assign(name, "?")
        shell.option_at = (1, 1)
        return 1
    letter, rest = word[within], word[within + 1 :]
    following = (at, within + 1) if rest else (at + 1, 1)
    known = letter != ":" and letter in options
    if known and options[options.index(letter) + 1 :].startswith(":"):
        known = bool(rest) or at < len(arguments)
        if known:
            shell.assign("OPTARG", rest or arguments[at])
        following = (at + 1 if rest else at + 2, 1)
    if not known and not options.startswith(":"):
        yield from shell.process.error(f"{shell.name}: illegal option -{letter}")
    shell.option_at = following
    shell.assign("OPTIND", str(following[0]))
    shell.assign(name, letter if known else "?")
    return 0


def _umask(shell: Shell, words: list[str]) -> Steps[int]:
    if len(words) == 1:
        yield from shell.process.out("0022\n")
    return 0


def _ulimit(shell: Shell, words: list[str]) -> Steps[int]:
    limits = {"-n": "1024", "-s": "8192"}
    yield from shell.process.out(limits.get(words[-1], "unlimited") + "\n")
    return 0


def _times(shell: Shell, words: list[str]) -> Steps[int]:
    yield from shell.process.out("0m0.000s 0m0.000s\n" * 2)
    return 0


def _time(shell: Shell, words: list[str]) -> Steps[int]:
    process = shell.process
    before = process.userland.nanoseconds
    status = 0
    if len(words) > 1:
        status = yield from _command(shell, ["command", *words[1:]])
    took = (process.userland.nanoseconds - before) / 1e9
    minutes, seconds = divmod(took, 60)
    real = f"real\t{int(minutes)}m {seconds:.2f}s"
    yield from process.error(f"{real}\nuser\t0m 0.00s\nsys\t{int(minutes)}m {seconds:.2f}s")
    return status


def _let(shell: Shell, words: list[str]) -> Steps[int]:
    value = 0
    for word in words[1:]:
        try:
            value = evaluate(word, shell.variables)
        except ExpressionError as fault:
            raise FatalError(str(fault)) from None
    return int(not value)
    yield


def _help(shell: Shell, words: list[str]) -> Steps[int]:
    names = " ".join(sorted(BUILTINS))
    yield from shell.process.out(f"Built-in commands:\n------------------\n\t{names}\n")
    return 0


def _jobs(shell: Shell, words: list[str]) -> Steps[int]:
    for number, child in enumerate(shell.process.children, 1):
        if child.status is None:
            yield from shell.process.out(f"[{number}]+  Running                    {child.name}\n")
    return 0


BUILTINS: dict[str, Builtin] = {
    ":": _true, "true": _true, "false": _false, "[": _bracket, "[[": _bracket,
    "test": _same(PROGRAMS["test"]), "echo": _same(PROGRAMS["echo"]),
    "printf": _same(PROGRAMS["printf"]), "kill": _kill,
    "break": _break, "continue": _break, "return": _return, "exit": _exit,
    "cd": _cd, "chdir": _cd, "pwd": _pwd, "export": _export, "readonly": _export,
    "unset": _unset, "local": _local, "set": _set, "shift": _shift, "eval": _eval,
    ".": _source, "source": _source, "exec": _exec, "read": _read, "wait": _wait,
    "trap": _trap, "type": _type, "command": _command, "getopts": _getopts,
    "umask": _umask, "ulimit": _ulimit, "times": _times, "time": _time, "let": _let,
    "help": _help, "jobs": _jobs, "alias": _true, "unalias": _true, "hash": _true,
    "fg": _true, "bg": _true,
}  # fmt: skip
