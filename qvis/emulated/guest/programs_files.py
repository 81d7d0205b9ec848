# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that look at the tree of files and change it."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable

from .files import Device, Directory, Folder, Link, Node, Regular, Steps, fail
from .options import MisuseError, Program, guarded, options
from .processes import Process, run
from .shell import start
from .shell_words import glob_pattern, matches

__all__ = ["PROGRAMS"]

SECTOR = 512


def _mode(node: Node) -> str:
    bits = "".join(
        letter if node.mode >> shift & 1 else "-"
        for shift, letter in zip(range(8, -1, -1), "rwxrwxrwx", strict=True)
    )
    return node.kind + (bits[:-1] + "t" if node.mode & 0o1000 else bits)


def _ls(process: Process, arguments: list[str]) -> Steps[int]:
    """[-1AaCdLlFhRsStir] [FILE]..."""
    chosen, names = options(arguments, "1AaCdLlFhRsStirxpnuUXvcHkgo")
    follow = not ("l" in chosen or "d" in chosen) or "L" in chosen
    status = 0
    plain: list[tuple[str, Node]] = []
    folders: list[tuple[str, Directory]] = []
    for name in names or ["."]:
        try:
            node = process.find(name, follow=follow)
        except OSError as problem:
            yield from process.error(f"ls: {name}: {problem.strerror}")
            status = 1
            continue
        if isinstance(node, Directory) and "d" not in chosen:
            folders.append((name, node))
        else:
            plain.append((name, node))
    yield from process.out(
        "".join(_listing(process, sorted(plain, key=lambda p: p[0]), chosen.flags))
    )
    titled = len(names) > 1 or "R" in chosen
    waiting = sorted(folders, key=lambda pair: pair[0], reverse=True)
    first = not plain
    while waiting:
        name, folder = waiting.pop()
        entries: list[tuple[str, Node]] = []
        for entry in folder.names():
            if entry.startswith(".") and not chosen.flags & {"a", "A"}:
                continue
            found = folder.get(entry)
            if found is not None:
                entries.append((entry, found))
        if "a" in chosen:
            entries = [(".", folder), ("..", folder), *entries]
        title = f"{'' if first else chr(10)}{name}:\n" if titled else ""
        total = "total 0\n" if "l" in chosen else ""
        rows = _listing(process, entries, chosen.flags)
        yield from process.out(title + total + "".join(rows))
        first = False
        if "R" in chosen:
            waiting += [
                (f"{name.rstrip('/')}/{entry}", node)
                for entry, node in reversed(entries)
                if isinstance(node, Directory) and entry not in (".", "..")
            ]
    return status


def _listing(process: Process, entries: list[tuple[str, Node]], flags: set[str]) -> list[str]:
    rows = []
    stamp = time.strftime("%b %e %H:%M", time.gmtime(process.userland.time))
    for name, node in reversed(entries) if "r" in flags else entries:
        inode = f"{id(node) % 100000:7} " if "i" in flags else ""
        tail = "/" if flags & {"F", "p"} and isinstance(node, Directory) else ""
        tail = "@" if "F" in flags and isinstance(node, Link) and "l" not in flags else tail
        if "l" not in flags:
            rows.append(f"{inode}{name}{tail}\n")
            continue
        links = 2 if isinstance(node, Directory) else 1
        size = f"{node.size:9}"
        if isinstance(node, Device):
            size = f"{node.number[0]:4}, {node.number[1]:3}"
        target = f" -> {node.target}" if isinstance(node, Link) else tail
        rows.append(
            f"{inode}{_mode(node)} {links:4} root     root     {size} {stamp} {name}{target}\n"
        )
    return rows


def _mkdir(process: Process, arguments: list[str]) -> Steps[int]:
    """[-m MODE] [-p] DIRECTORY..."""
    chosen, names = options(arguments, "p", "m")
    if not names:
        raise MisuseError
    tree = process.userland.tree
    status = 0
    for name in names:
        parts = name.split("/")
        steps = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)] if "p" in chosen else [name]
        for step in steps:
            if not step:
                continue
            try:
                if tree.walk(step, process.folder)[1] is not None:
                    if "p" in chosen and isinstance(process.find(step), Directory):
                        continue
                    raise fail(errno.EEXIST)
                folder, last = tree.parent(step.rstrip("/"), process.folder)
                folder.add(last, Folder(folder.room))
            except OSError as problem:
                yield from process.error(
                    f"mkdir: can't create directory '{step}': {problem.strerror}"
                )
                status = 1
                break
    return status


def _remove(folder: Folder, name: str) -> None:
    node = folder.get(name)
    waiting = [node] if isinstance(node, Folder) else []
    while waiting:
        here = waiting.pop()
        for entry in here.names():
            inner = here.get(entry)
            if isinstance(inner, Folder):
                waiting.append(inner)
            here.remove(entry)
    folder.remove(name)


def _rm(process: Process, arguments: list[str]) -> Steps[int]:
    """[-irf] FILE..."""
    chosen, names = options(arguments, "irRf")
    if not names and "f" not in chosen:
        raise MisuseError
    tree = process.userland.tree
    status = 0
    for name in names:
        try:
            node = process.find(name, follow=False)
            if isinstance(node, Directory) and not chosen.flags & {"r", "R"}:
                yield from process.error(f"rm: '{name}' is a directory")
                status = 1
                continue
            _remove(*tree.parent(name, process.folder))
        except OSError as problem:
            if problem.errno == errno.ENOENT and "f" in chosen:
                continue
            yield from process.error(f"rm: can't remove '{name}': {problem.strerror}")
            status = 1
    return status


def _rmdir(process: Process, arguments: list[str]) -> Steps[int]:
    """[-p] DIRECTORY..."""
    _, names = options(arguments, "p")
    status = 0
    for name in names:
        try:
            node = process.find(name, follow=False)
            if not isinstance(node, Directory):
                raise fail(errno.ENOTDIR)
            if node.names():
                raise fail(errno.ENOTEMPTY)
            _remove(*process.userland.tree.parent(name, process.folder))
        except OSError as problem:
            yield from process.error(f"rmdir: '{name}': {problem.strerror}")
            status = 1
    return status


def _touch(process: Process, arguments: list[str]) -> Steps[int]:
    """[-cha] FILE..."""
    chosen, names = options(arguments, "cham", "drt")
    if not names:
        raise MisuseError
    status = 0
    for name in names:
        try:
            if process.userland.tree.walk(name, process.folder)[1] is None and "c" not in chosen:
                process.userland.create(name, process.folder)
        except OSError as problem:
            yield from process.error(f"touch: {name}: {problem.strerror}")
            status = 1
    return status


def _target(process: Process, name: str, target: str) -> str:
    """Where ``name`` goes: into ``target`` if that is a directory."""
    try:
        into = isinstance(process.find(target), Directory)
    except OSError:
        into = False
    return f"{target.rstrip('/')}/{name.rstrip('/').rpartition('/')[2]}" if into else target


def _cp(process: Process, arguments: list[str]) -> Steps[int]:
    """[-arPLHpfinlsT] SOURCE... DEST"""
    _, names = options(arguments, "arRPLHpfinlsTdu")
    if len(names) < 2:
        raise MisuseError
    *sources, target = names
    status = 0
    for name in sources:
        try:
            node = process.find(name)
        except OSError as problem:
            yield from process.error(f"cp: can't stat '{name}': {problem.strerror}")
            status = 1
            continue
        if isinstance(node, Directory):
            yield from process.error(f"cp: omitting directory '{name}'")
            status = 1
            continue
        place = _target(process, name, target)
        try:
            source = process.open(name)
            copy = process.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        except OSError as problem:
            yield from process.error(f"cp: can't create '{place}': {problem.strerror}")
            status = 1
            continue
        while data := (yield from process.read(source)):
            yield from process.write(copy, data)
        source.drop()
        copy.drop()
    return status


def _mv(process: Process, arguments: list[str]) -> Steps[int]:
    """[-finT] SOURCE... DEST"""
    _, names = options(arguments, "finT")
    if len(names) < 2:
        raise MisuseError
    *sources, target = names
    tree = process.userland.tree
    status = 0
    for name in sources:
        try:
            node = process.find(name, follow=False)
            place = _target(process, name, target)
            folder, last = tree.parent(name, process.folder)
            into, new = tree.parent(place, process.folder)
            if tree.walk(place, process.folder)[0].startswith(
                tree.walk(name, process.folder, follow=False)[0] + "/"
            ):
                raise fail(errno.EINVAL)
            if (old := into.get(new)) is not None and old is not node:
                if isinstance(old, Directory):
                    raise fail(errno.EISDIR)
                _remove(into, new)
            del folder.entries[last]
            into.entries[new] = node
        except OSError as problem:
            yield from process.error(f"mv: can't rename '{name}': {problem.strerror}")
            status = 1
    return status


def _ln(process: Process, arguments: list[str]) -> Steps[int]:
    """[-sfnbtv] [-S SUF] TARGET... LINK|DIR"""
    chosen, names = options(arguments, "sfnbv")
    if not names:
        raise MisuseError
    target, place = names[0], names[1] if len(names) > 1 else "."
    place = _target(process, target, place)
    try:
        folder, last = process.userland.tree.parent(place, process.folder)
        if folder.get(last) is not None:
            if "f" not in chosen:
                raise fail(errno.EEXIST)
            _remove(folder, last)
        folder.add(last, Link(target) if "s" in chosen else process.find(target))
    except OSError as problem:
        yield from process.error(f"ln: {place}: {problem.strerror}")
        return 1
    return 0


def _chmod(process: Process, arguments: list[str]) -> Steps[int]:
    """[-Rcvf] MODE[,MODE]... FILE..."""
    words = [word for word in arguments if not re.fullmatch(r"-[Rcvf]+", word)]
    if len(words) < 2:
        raise MisuseError
    mode, *names = words
    status = 0
    for name in names:
        try:
            node = process.find(name)
        except OSError as problem:
            yield from process.error(f"chmod: {name}: {problem.strerror}")
            status = 1
            continue
        if re.fullmatch(r"[0-7]{1,4}", mode):
            node.mode = int(mode, 8)
        elif match := re.fullmatch(r"[ugoa]*([-+=])([rwx]*)", mode):
            bits = sum({"r": 0o444, "w": 0o200, "x": 0o111}[letter] for letter in set(match[2]))
            node.mode = node.mode & ~bits if match[1] == "-" else node.mode | bits
        else:
            raise MisuseError(f"invalid mode '{mode}'")
    return status


def _readlink(process: Process, arguments: list[str]) -> Steps[int]:
    """[-fnv] FILE"""
    chosen, names = options(arguments, "fnvem")
    if not names:
        raise MisuseError
    status = 0
    for name in names:
        try:
            if "f" in chosen or process.name == "realpath":
                text = process.userland.tree.walk(name, process.folder)[0]
            else:
                node = process.find(name, follow=False)
                if not isinstance(node, Link):
                    status = 1
                    continue
                text = node.target
        except OSError as problem:
            if process.name == "realpath":
                yield from process.error(f"realpath: {name}: {problem.strerror}")
            status = 1
            continue
        yield from process.out(text + ("" if "n" in chosen else "\n"))
    return status


def _find(process: Process, arguments: list[str]) -> Steps[int]:
    """[-HL] [PATH]... [OPTIONS] [ACTIONS]"""
    words = list(arguments)
    paths = []
    while words and words[0][:1] not in ("-", "!", "("):
        paths.append(words.pop(0))
    tests: list[Callable[[str, Node], bool]] = []
    deepest, shallowest, action, command = 1 << 30, 0, "print", []
    negated = False
    while words:
        word = words.pop(0)
        if word in ("!", "-not"):
            negated = True
            continue
        value = ""
        if word in ("-name", "-iname", "-path", "-type", "-maxdepth", "-mindepth"):
            if not words:
                raise MisuseError(f"{word}: requires an argument")
            value = words.pop(0)
        if word in ("-name", "-iname", "-path"):
            match = matches(("(?i)" if word == "-iname" else "") + glob_pattern([(value, False)]))
            test = _of_path(match) if word == "-path" else _of_name(match)
        elif word == "-type":
            test = _of_type(value)
        elif word in ("-maxdepth", "-mindepth"):
            if not re.fullmatch(r"\d{1,9}", value):
                raise MisuseError(f"invalid number '{value}'")
            deepest = int(value) if word == "-maxdepth" else deepest
            shallowest = int(value) if word == "-mindepth" else shallowest
            continue
        elif word in ("-print", "-print0", "-delete", "-quit"):
            action = word[1:]
            continue
        elif word == "-exec":
            action = "exec"
            while words and words[0] not in (";", "+"):
                command.append(words.pop(0))
            words = words[1:]
            continue
        else:
            yield from process.error(f"find: unrecognized: {word}")
            return 1
        tests.append(_not(test) if negated else test)
        negated = False
    status = 0
    waiting = []
    for path in reversed(paths or ["."]):
        try:
            waiting.append((path, process.find(path, follow=False), 0))
        except OSError as problem:
            yield from process.error(f"find: {path}: {problem.strerror}")
            status = 1
    while waiting:
        path, node, depth = waiting.pop()
        if isinstance(node, Directory) and depth < deepest:
            for entry in reversed(node.names()):
                if (inner := node.get(entry)) is not None:
                    waiting.append((f"{path.rstrip('/')}/{entry}", inner, depth + 1))
        if depth < shallowest or not all(test(path, node) for test in tests):
            continue
        yield from process.breathe()
        if action == "exec" and command:
            child_words = [word.replace("{}", path) for word in command]
            try:
                child, steps = start(process, child_words, process.files)
            except OSError as problem:
                yield from process.error(f"find: {command[0]}: {problem.strerror}")
                return 1
            yield from run(child, steps)
        elif action == "delete":
            try:
                _remove(*process.userland.tree.parent(path, process.folder))
            except OSError as problem:
                yield from process.error(f"find: {path}: {problem.strerror}")
                status = 1
        else:
            yield from process.out(path + ("\0" if action == "print0" else "\n"))
    return status


def _not(test: Callable[[str, Node], bool]) -> Callable[[str, Node], bool]:
    return lambda path, node: not test(path, node)


def _of_name(match: Callable[[str], bool]) -> Callable[[str, Node], bool]:
    return lambda path, node: match(path.rstrip("/").rpartition("/")[2])


def _of_path(match: Callable[[str], bool]) -> Callable[[str, Node], bool]:
    return lambda path, node: match(path)


def _of_type(kind: str) -> Callable[[str, Node], bool]:
    return lambda path, node: node.kind == {"f": "-"}.get(kind, kind)


def _xargs(process: Process, arguments: list[str]) -> Steps[int]:
    """[OPTIONS] [PROG ARGS]"""
    chosen, rest = options(arguments, "0rtx", "nIsELP", first=True)
    data = yield from process.all_of(process.descriptor(0))
    text = data.decode(errors="surrogateescape")
    holder = chosen.value("I")
    items = text.split("\0") if "0" in chosen else text.splitlines() if holder else text.split()
    items = [item for item in items if item]
    command = rest or ["echo"]
    count = chosen.value("n", "1000")
    if not re.fullmatch(r"[1-9]\d{0,8}", count):
        raise MisuseError(f"invalid number '{count}'")
    size = 1 if holder else int(count)
    status = 0
    chunks = [items[at : at + size] for at in range(0, len(items), size)]
    for chunk in chunks or ([] if "r" in chosen or holder else [[]]):
        words = [w.replace(holder, chunk[0]) for w in command] if holder else [*command, *chunk]
        try:
            child, steps = start(process, words, process.files)
        except OSError as problem:
            yield from process.error(f"xargs: {words[0]}: {problem.strerror}")
            return 127 if problem.errno == errno.ENOENT else 126
        if (yield from run(child, steps)):
            status = 123
    return status


def _dd(process: Process, arguments: list[str]) -> Steps[int]:
    """[if=FILE] [of=FILE] [bs=N] [count=N] [skip=N] [seek=N] [conv=...] [iflag=...] [oflag=...]"""
    given: dict[str, str] = {}
    for word in arguments:
        name, equals, value = word.partition("=")
        if not equals or name not in (
            "if", "of", "bs", "ibs", "obs", "count", "skip", "seek", "conv", "iflag", "oflag",
            "status",
        ):  # fmt: skip
            raise MisuseError
        given[name] = value
    numbers = {}
    for name, default in (("bs", SECTOR), ("count", -1), ("skip", 0), ("seek", 0)):
        match = re.fullmatch(r"(\d{1,12})([kKMGbcw]?)B?", given.get(name, str(max(default, 0))))
        if not match:
            yield from process.error(f"dd: invalid number '{given[name]}'")
            return 1
        unit = {
            "": 1,
            "c": 1,
            "w": 2,
            "b": 512,
            "k": 1 << 10,
            "K": 1 << 10,
            "M": 1 << 20,
            "G": 1 << 30,
        }
        numbers[name] = int(match[1]) * unit[match[2]] if name in given else default
    if not 0 < numbers["bs"] <= process.userland.largest:
        yield from process.error("dd: out of memory")
        return 1
    try:
        name = given.get("if", "")
        source = process.open(name) if name else process.descriptor(0).hold()
        name = given.get("of", "")
        cut = 0 if "notrunc" in given.get("conv", "") or numbers["seek"] else os.O_TRUNC
        target = process.descriptor(1).hold()
        if name:
            target = process.open(name, os.O_WRONLY | os.O_CREAT | cut)
    except OSError as problem:
        yield from process.error(f"dd: can't open '{name}': {problem.strerror}")
        return 1
    full = partial = 0
    if numbers["skip"]:
        source.seek(numbers["skip"] * numbers["bs"])
    if numbers["seek"]:
        target.seek(numbers["seek"] * numbers["bs"])
    while numbers["count"] < 0 or full + partial < numbers["count"]:
        data = yield from process.read(source, numbers["bs"])
        if not data:
            break
        full += len(data) == numbers["bs"]
        partial += len(data) != numbers["bs"]
        yield from process.write(target, data)
    source.drop()
    target.drop()
    if given.get("status") != "none":
        counts = f"{full}+{partial} records"
        yield from process.error(f"{counts} in\n{counts} out")
    return 0


def _stat(process: Process, arguments: list[str]) -> Steps[int]:
    """[-ltf] [-c FMT] FILE..."""
    chosen, names = options(arguments, "ltfL", "c")
    status = 0
    for name in names:
        try:
            node = process.find(name, follow="L" in chosen)
        except OSError as problem:
            yield from process.error(f"stat: can't stat '{name}': {problem.strerror}")
            status = 1
            continue
        kinds = {"d": "directory", "l": "symbolic link", "c": "character special file",
                 "b": "block special file"}  # fmt: skip
        values = {"n": name, "s": str(node.size), "a": f"{node.mode:o}", "A": _mode(node),
                  "F": kinds.get(node.kind, "regular file"), "U": "root", "G": "root", "u": "0",
                  "g": "0"}  # fmt: skip
        form = chosen.value("c") or "  File: %n\n  Size: %s\t%F\nAccess: (%a/%A)  Uid: (0/root)"
        text = "".join(
            values.get(part[1], "?") if part[:1] == "%" and len(part) == 2 else part
            for part in re.split(r"(%.)", form)
        )
        yield from process.out(text + "\n")
    return status


def _mktemp(process: Process, arguments: list[str]) -> Steps[int]:
    """[-dt] [-p DIR] [TEMPLATE]"""
    chosen, names = options(arguments, "dtqu", "p")
    name = names[0] if names else f"{chosen.value('p', '/tmp')}/tmp.XXXXXX"
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    while "X" in name:
        name = name.replace("X", process.userland.random.choice(letters), 1)
    if "d" in chosen:
        folder, last = process.userland.tree.parent(name, process.folder)
        folder.add(last, Folder(folder.room, 0o700))
    else:
        process.userland.create(name, process.folder).mode = 0o600
    yield from process.out(name + "\n")
    return 0


def _truncate(process: Process, arguments: list[str]) -> Steps[int]:
    """[-c] -s SIZE FILE..."""
    chosen, names = options(arguments, "c", "s")
    match = re.fullmatch(r"(\d{1,12})([kKMG]?)", chosen.value("s"))
    if not match or not names:
        raise MisuseError
    size = int(match[1]) << {"": 0, "k": 10, "K": 10, "M": 20, "G": 30}[match[2]]
    for name in names:
        node = process.userland.tree.walk(name, process.folder)[1]
        node = node if node is not None else process.userland.create(name, process.folder)
        if isinstance(node, Regular):
            node.resize(size)
    return 0
    yield


def _cmp(process: Process, arguments: list[str]) -> Steps[int]:
    """[-ls] FILE1 [FILE2]"""
    chosen, names = options(arguments, "lsq")
    if len(names) != 2:
        raise MisuseError
    contents = []
    for name in names:
        try:
            contents.append((yield from process.all_of(process.open(name))))
        except OSError as problem:
            yield from process.error(f"{process.name}: {name}: {problem.strerror}")
            return 2
    if contents[0] == contents[1]:
        return 0
    at = next((n for n, (a, b) in enumerate(zip(*contents, strict=False)) if a != b), -1)
    if "s" not in chosen and at >= 0:
        line = contents[0].count(b"\n", 0, at) + 1
        yield from process.out(f"{names[0]} {names[1]} differ: char {at + 1}, line {line}\n")
    elif "s" not in chosen:
        shorter = names[len(contents[0]) > len(contents[1])]
        yield from process.error(f"cmp: EOF on {shorter}")
    return 1


PROGRAMS: dict[str, Program] = {
    name: guarded(program)
    for name, program in {
        "ls": _ls, "mkdir": _mkdir, "rm": _rm, "rmdir": _rmdir, "touch": _touch, "cp": _cp,
        "mv": _mv, "ln": _ln, "chmod": _chmod, "readlink": _readlink, "realpath": _readlink,
        "find": _find, "xargs": _xargs, "dd": _dd, "stat": _stat, "mktemp": _mktemp,
        "truncate": _truncate, "cmp": _cmp,
    }.items()
}  # fmt: skip
