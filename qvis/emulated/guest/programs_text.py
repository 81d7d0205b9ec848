# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that read text and write text."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable

from .files import OpenFile, Steps, fail
from .options import Lines, MisuseError, Program, guarded, options
from .options import each_file as opened_files
from .patience import Pattern
from .processes import BLOCK, Process

__all__ = ["PROGRAMS", "each_file", "expression"]

CLASSES = {"[:alpha:]": "a-zA-Z", "[:digit:]": "0-9", "[:alnum:]": "a-zA-Z0-9",
           "[:space:]": r"\s", "[:upper:]": "A-Z", "[:lower:]": "a-z",
           "[:xdigit:]": "0-9a-fA-F", "[:punct:]": r"!-/:-@\[-`{-~",
           "[:blank:]": " \t"}  # fmt: skip
RANGES = {"[:alpha:]": "A-Za-z", "[:digit:]": "0-9", "[:alnum:]": "0-9A-Za-z",
          "[:space:]": "\t\n\v\f\r ", "[:upper:]": "A-Z", "[:lower:]": "a-z"}  # fmt: skip


def _failed(process: Process, name: str, problem: OSError, verb: str = "") -> Steps[None]:
    """Say that a file does not open, in the words of the program."""
    what = f"{verb} '{name}'" if verb else name
    yield from process.error(f"{process.name}: {what}: {problem.strerror}")


class _Standard(OpenFile):
    """Standard input, which is closed when its process ends, however that comes."""

    def __init__(self, file: OpenFile) -> None:
        super().__init__()
        self._file = file

    def read(self, process: Process, size: int) -> Steps[bytes]:
        """As it does."""
        return self._file.read(process, size)


def each_file(process: Process, names: list[str]) -> list[tuple[str, OpenFile | OSError]]:
    """Each of the files, or standard input; for one that does not open, why."""
    found = opened_files(process, names)
    for number, (name, file) in enumerate(found):
        if name == "-" and not isinstance(file, OSError):
            file.drop()  # its process holds it
            found[number] = (name, _Standard(file))
    return found


def expression(text: str, *, extended: bool, ignore: bool = False) -> Pattern:
    """A POSIX regular expression as Python's; raises :class:`MisuseError` for a bad one."""
    found, at = [], 0
    while at < len(text):
        char = text[at]
        at += 1
        if char == "[":
            end = at + (text[at : at + 1] == "^")
            end += text[end : end + 1] == "]"
            while end < len(text) and text[end] != "]":
                close = text.find(":]", end) if text.startswith("[:", end) else -1
                end = close + 2 if close >= 0 else end + 1
            inner = text[at:end].replace("\\", "\\\\")
            for name, kind in CLASSES.items():
                inner = inner.replace(name, kind)
            negated = inner.startswith("^")
            inner = inner[1:] if negated else inner
            if inner.startswith("]"):
                inner = "\\]" + inner[1:]
            inner = inner.replace("[", "\\[")
            found.append(f"[{'^' if negated else ''}{inner}]")
            at = end + 1
        elif char == "\\" and at < len(text):
            special = text[at]
            at += 1
            if not extended and special in "(){}|+?":
                found.append(special)
            elif special in "<>":
                found.append(r"\b")
            elif special in "wWsSbB123456789":
                found.append("\\" + special)
            else:
                found.append({"n": "\n", "t": "\t"}.get(special, re.escape(special)))
        elif not extended and char in "(){}|+?":
            found.append("\\" + char)
        elif not extended and char == "*" and (not found or found[-1] in ("(", "^")):
            found.append(r"\*")
        else:
            found.append(char)
    try:
        return Pattern("".join(found), re.IGNORECASE if ignore else 0)
    except (re.error, OverflowError, RecursionError):
        raise MisuseError(f"bad regex '{text}'") from None


def _cat(process: Process, arguments: list[str]) -> Steps[int]:
    """[-n] [FILE]..."""
    chosen, names = options(arguments, "nbevAuts")
    status = number = 0
    for name, file in each_file(process, names):
        if isinstance(file, OSError):
            yield from _failed(process, name, file, "can't open")
            status = 1
            continue
        try:
            if chosen.flags & set("nb"):
                lines = Lines(process, file)
                while (line := (yield from lines.next())) is not None:
                    number += 1
                    yield from process.out(f"{number:6}\t{line}")
                continue
            while True:
                try:
                    data = yield from process.read(file)
                except OSError as problem:
                    yield from process.error(f"cat: read error: {problem.strerror}")
                    status = 1
                    break
                if not data:
                    break
                yield from process.out(data)
        finally:
            file.drop()
    return status


def _count(text: str) -> int:
    match = re.fullmatch(r"([-+]?\d{1,18})([bkmg]?)", text.lower())
    if not match:
        raise MisuseError(f"invalid number '{text}'")
    return int(match[1]) * {"": 1, "b": 512, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}[match[2]]


def _old_style(arguments: list[str]) -> list[str]:
    """``-5`` as ``-n 5``."""
    return [f"-n{a[1:]}" if re.fullmatch(r"-\d+", a) else a for a in arguments]


def _head(process: Process, arguments: list[str]) -> Steps[int]:
    """[OPTIONS] [FILE]..."""
    chosen, names = options(_old_style(arguments), "qv", "nc")
    of_bytes = "c" in chosen
    count = _count(chosen.value("c") if of_bytes else chosen.value("n", "10"))
    status = 0
    for name, file in each_file(process, names):
        if isinstance(file, OSError):
            yield from _failed(process, name, file)
            status = 1
            continue
        if len(names) > 1 and "q" not in chosen:
            yield from process.out(f"==> {name} <==\n")
        try:
            if count < 0:
                data = yield from process.all_of(file)
                kept = data[:count] if of_bytes else b"".join(data.splitlines(True)[:count])
                yield from process.out(kept)
            elif of_bytes:
                left = count
                while left and (data := (yield from process.read(file, min(left, BLOCK)))):
                    left -= len(data)
                    yield from process.out(data)
            else:
                lines = Lines(process, file)
                for _ in range(count):
                    if (line := (yield from lines.next())) is None:
                        break
                    yield from process.out(line)
        finally:
            file.drop()
    return status


def _tail(process: Process, arguments: list[str]) -> Steps[int]:
    """[OPTIONS] [FILE]..."""
    chosen, names = options(_old_style(arguments), "qvfF", "ncs")
    text = chosen.value("c") if "c" in chosen else chosen.value("n", "10")
    count = abs(_count(text))
    status = opened = 0
    for name, file in each_file(process, names):
        if isinstance(file, OSError):
            yield from _failed(process, name, file, "can't open")
            status = 1
            continue
        opened += 1
        if len(names) > 1 and "q" not in chosen:
            yield from process.out(f"==> {name} <==\n")
        if text[0] == "+":
            data = yield from process.all_of(file)
            from_there = max(0, count - 1)
            if "c" in chosen:
                kept = data[from_there:]
            else:
                kept = b"".join(data.splitlines(True)[from_there:])
        else:
            kept = yield from _last(process, file, count, of_bytes="c" in chosen)
        yield from process.out(kept)
        while chosen.flags & set("fF"):
            data = yield from process.read(file)
            yield from process.out(data)
            if not data:
                yield from process.sleep(1_000_000_000)
        file.drop()
    if names and not opened:
        yield from process.error("tail: no files")
    return status


def _last(process: Process, file: OpenFile, count: int, *, of_bytes: bool) -> Steps[bytes]:
    """The end of ``file``, of which no more than that is kept; raises ENOMEM if it is too much."""
    kept = b""
    waiting, size = [], 0
    while True:
        data = yield from process.read(file)
        waiting.append(data)
        size += len(data)
        if data and size < len(kept) + BLOCK:
            continue
        kept = b"".join([kept, *waiting])
        if of_bytes:
            kept = kept[max(0, len(kept) - count) :]
        else:
            lines = kept.splitlines(True)
            kept = b"".join(lines[max(0, len(lines) - count) :])
        waiting, size = [], 0
        if not data:
            return kept
        if len(kept) > process.userland.largest:
            raise fail(errno.ENOMEM, "read error")


def _wc(process: Process, arguments: list[str]) -> Steps[int]:
    """[-clwL] [FILE]..."""
    chosen, names = options(arguments, "clwLm")
    wanted = [letter for letter in "lwc" if letter in chosen or (letter == "c" and "m" in chosen)]
    wanted = wanted or list("lwc")
    totals = dict.fromkeys("lwc", 0)
    status = 0

    def row(counts: dict[str, int], name: str) -> str:
        if len(wanted) == 1:
            return f"{counts[wanted[0]]}" + (f" {name}" if name else "") + "\n"
        text = " ".join(f"{counts[letter]:9}" for letter in wanted)
        return text + (f" {name}" if name else "") + "\n"

    for name, file in each_file(process, names):
        if isinstance(file, OSError):
            yield from _failed(process, name, file)
            status = 1
            continue
        counts = dict.fromkeys("lwc", 0)
        within = False
        while data := (yield from process.read(file)):
            counts["c"] += len(data)
            counts["l"] += data.count(b"\n")
            counts["w"] += len(data.split()) - (within and not data[:1].isspace())
            within = not data[-1:].isspace()
        file.drop()
        for letter in counts:
            totals[letter] += counts[letter]
        yield from process.out(row(counts, name if name != "-" else ""))
    if len(names) > 1:
        yield from process.out(row(totals, "total"))
    return status


def _grep(process: Process, arguments: list[str]) -> Steps[int]:
    """[-HhnlLoqvsrRiwFE] [-m N] [-ABC N] { PATTERN | -e PATTERN... | -f FILE... } [FILE]..."""
    chosen, names = options(arguments, "HhnlLoqvsrRiwFEcxa", "emABCf")
    patterns = list(chosen.values.get("e", []))
    for path in chosen.values.get("f", []):
        data = yield from process.all_of(process.open(path))
        patterns += data.decode(errors="surrogateescape").splitlines()
    if not patterns and "f" not in chosen:
        if not names:
            raise MisuseError
        patterns = names.pop(0).split("\n")
    extended = "E" in chosen or process.name == "egrep"
    fixed = "F" in chosen or process.name == "fgrep"
    compiled = [
        expression(re.escape(p) if fixed else p, extended=extended or fixed, ignore="i" in chosen)
        for p in patterns
    ]
    matcher = _matcher(compiled, word="w" in chosen, line="x" in chosen)
    recursive = bool(chosen.flags & {"r", "R"})
    if recursive:
        names = list(process.userland.below(process, names or ["."]))
    shown = "H" in chosen or ((len(names) > 1 or recursive) and "h" not in chosen)
    most = _count(chosen.value("m", "0")) if "m" in chosen else -1
    after, before = (_count(chosen.value(x, chosen.value("C", "0"))) for x in "AB")
    found_any = failed = False
    for name, file in each_file(process, names):
        if isinstance(file, OSError):
            if "s" not in chosen:
                yield from _failed(process, name, file)
            failed = True
            continue
        prefix = f"{'(standard input)' if name == '-' else name}" if shown else ""
        label = prefix + ":" if prefix else ""
        count = number = 0
        trailing = 0
        kept: list[str] = []
        lines = Lines(process, file)
        while most < 0 or count < most or trailing:
            try:
                line = yield from lines.next()
            except OSError as problem:  # a folder, or a file that is only written
                if "s" not in chosen and problem.errno != errno.EISDIR:
                    yield from _failed(process, name, problem)
                failed |= problem.errno != errno.EISDIR
                break
            if line is None:
                break
            number += 1
            body = line.removesuffix("\n")
            hit = (most < 0 or count < most) and bool(matcher(body)) != ("v" in chosen)
            at = f"{number}:" if "n" in chosen else ""
            if not hit:
                if trailing and not chosen.flags & set("qlLco"):
                    yield from process.out(
                        f"{label.replace(':', '-')}{at.replace(':', '-')}{body}\n"
                    )
                elif before:
                    kept = [*kept[-(before - 1) :], body] if before > 1 else [body]
                trailing = max(0, trailing - 1)
                continue
            count += 1
            found_any = True
            if "q" in chosen:
                file.drop()
                return 0
            if chosen.flags & {"l", "L"}:
                break
            if "c" in chosen:
                continue
            for context in kept:
                yield from process.out(f"{label.replace(':', '-')}{context}\n")
            kept, trailing = [], after
            if "o" in chosen:
                for text in matcher(body):
                    yield from process.out(f"{label}{at}{text}\n")
            else:
                yield from process.out(f"{label}{at}{body}\n")
        file.drop()
        if "c" in chosen and not chosen.flags & set("lL"):
            yield from process.out(f"{label}{count}\n")
        if ("l" in chosen and count) or ("L" in chosen and not count):
            yield from process.out(name + "\n")
    if failed and not ("q" in chosen and found_any) and ("s" not in chosen or not found_any):
        return 2
    return int(not found_any)


def _matcher(patterns: list[Pattern], *, word: bool, line: bool) -> Callable[[str], list[str]]:
    """What of a line matches."""

    def matches(text: str) -> list[str]:
        found = []
        for pattern in patterns:
            if line:
                if pattern.fullmatch(text):
                    found.append(text)
                continue
            for match in pattern.finditer(text):
                before, after = text[: match.start()][-1:], text[match.end() :][:1]
                if word and (_of_word(before) or _of_word(after)):
                    continue
                if match[0] or not found:
                    found.append(match[0])
                if len(found) > 1000:
                    break
        return found

    return matches


def _of_word(char: str) -> bool:
    return char.isalnum() or char == "_"


def _cut(process: Process, arguments: list[str]) -> Steps[int]:
    """[OPTIONS] [FILE]..."""
    chosen, names = options(arguments, "sn", "bcfd")
    kind = next((letter for letter in "bcf" if letter in chosen), "")
    if not kind:
        raise MisuseError("expected a list of bytes, characters, or fields")
    ranges = []
    for part in chosen.value(kind).split(","):
        match = re.fullmatch(r"(\d{1,9})?(-)?(\d{1,9})?", part)
        if not match or not (match[1] or match[3]):
            raise MisuseError(f"invalid range {part}")
        low = int(match[1] or 1)
        ranges.append((low, int(match[3]) if match[3] else 1 << 30 if match[2] else low))
    delimiter = chosen.value("d", "\t")[:1] or "\0"
    status = 0
    for name, file in each_file(process, names):
        if isinstance(file, OSError):
            yield from _failed(process, name, file)
            status = 1
            continue
        lines = Lines(process, file)
        while (line := (yield from lines.next())) is not None:
            body = line.removesuffix("\n")
            parts = body.split(delimiter) if kind == "f" else list(body)
            if kind == "f" and len(parts) == 1:
                if "s" not in chosen:
                    yield from process.out(body + "\n")
                continue
            wanted = [p for n, p in enumerate(parts, 1) if any(a <= n <= b for a, b in ranges)]
            yield from process.out((delimiter if kind == "f" else "").join(wanted) + "\n")
        file.drop()
    return status


def _characters(text: str) -> str:
    """The characters of one of tr's sets."""
    for name, kind in RANGES.items():
        text = text.replace(name, kind)
    found, at = [], 0
    while at < len(text):
        match = re.compile(r"\\([0-7]{1,3}|.)", re.DOTALL).match(text, at)
        if match:
            code = match[1]
            char = chr(int(code, 8) & 255) if code[0] in "01234567" else {
                "n": "\n", "t": "\t", "r": "\r", "\\": "\\", "f": "\f", "v": "\v", "a": "\a",
            }.get(code, code)  # fmt: skip
            at = match.end()
        else:
            char = text[at]
            at += 1
        if text[at : at + 1] == "-" and at + 1 < len(text) and ord(text[at + 1]) >= ord(char):
            last = text[at + 1]
            found += [chr(c) for c in range(ord(char), min(ord(last), 0x10FF) + 1)]
            at += 2
        else:
            found.append(char)
    return "".join(found)


def _tr(process: Process, arguments: list[str]) -> Steps[int]:
    """[-cds] STRING1 [STRING2]"""
    chosen, sets = options(arguments, "cCds", first=True)
    if not sets or len(sets) > 2:
        raise MisuseError
    first = _characters(sets[0]).encode("latin-1", "replace")
    second = _characters(sets[1]).encode("latin-1", "replace") if len(sets) > 1 else b""
    if chosen.flags & {"c", "C"}:
        first = bytes(sorted(set(range(256)) - set(first)))
    removed = first if "d" in chosen else b""
    table = bytearray(range(256))
    if second and not removed:
        for number, char in enumerate(first):
            table[char] = second[min(number, len(second) - 1)]
    squeezed = set(second or first) if "s" in chosen else set()
    last = -1
    while data := (yield from process.read(process.descriptor(0))):
        data = data.translate(bytes(table), removed)
        if squeezed:
            kept = bytearray()
            for char in data:
                if char != last or char not in squeezed:
                    kept.append(char)
                last = char
            data = bytes(kept)
        yield from process.out(data)
    return 0


def _sort(process: Process, arguments: list[str]) -> Steps[int]:
    """[-nrugMcszbdfiokt] [-k START[.OFFSET][OPTS][,END]] [-t CHAR] [FILE]..."""
    chosen, names = options(arguments, "nrugMcszbdfiV", "okt")
    lines: list[str] = []
    for name, file in each_file(process, names):
        if isinstance(file, OSError):
            yield from _failed(process, name, file)
            return 2
        data = yield from process.all_of(file)
        lines += data.decode(errors="surrogateescape").splitlines()
        file.drop()
    match = re.match(
        r"(\d{1,4})(?:\.\d+)?([a-z]*)(?:,(\d{1,4}))?(?:\.\d+)?([a-z]*)", chosen.value("k")
    )
    letters = chosen.flags | (set(match[2] + match[4]) if match else set())
    separator = chosen.value("t") or None

    def key(line: str) -> tuple[float, str]:
        text = line
        if match:
            parts = line.split(separator)
            last = int(match[3]) if match[3] else len(parts)
            text = (separator or " ").join(parts[int(match[1]) - 1 : last])
        if letters & {"n", "g"}:
            number = re.match(r"\s*-?\d{0,18}(\.\d{0,18})?", text)
            digits = number[0].strip() if number else ""
            return (float(digits) if re.search(r"\d", digits) else 0.0, "")
        return (0.0, text.lower() if "f" in letters else text)

    lines.sort(key=lambda line: (key(line), line) if "s" not in chosen else (key(line), ""))
    if "r" in letters:
        lines.reverse()
    if "u" in chosen:
        seen: set[tuple[float, str]] = set()
        lines = [x for x in lines if not (key(x) in seen or seen.add(key(x)))]  # type: ignore[func-returns-value]
    text = "".join(line + "\n" for line in lines)
    if "o" in chosen:
        out = process.open(chosen.value("o"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        yield from process.write(out, text.encode(errors="surrogateescape"))
        out.drop()
    else:
        yield from process.out(text)
    return 0


def _uniq(process: Process, arguments: list[str]) -> Steps[int]:
    """[-cduiz] [-f,s,w N] [FILE [OUTFILE]]"""
    chosen, names = options(arguments, "cdui", "fsw")
    (name, file), *_ = each_file(process, names[:1])
    if isinstance(file, OSError):
        yield from _failed(process, name, file)
        return 1
    lines = Lines(process, file)
    last: str | None = None
    count = 0
    while True:
        line = yield from lines.next()
        body = line.removesuffix("\n") if line is not None else None
        if body is not None and body == last:
            count += 1
            continue
        shown = ("d" not in chosen or count > 1) and ("u" not in chosen or count == 1)
        if last is not None and shown:
            yield from process.out((f"{count:7} " if "c" in chosen else "") + last + "\n")
        if body is None:
            file.drop()
            return 0
        last, count = body, 1


def _tee(process: Process, arguments: list[str]) -> Steps[int]:
    """[-ai] [FILE]..."""
    chosen, names = options(arguments, "ai")
    how = os.O_APPEND if "a" in chosen else os.O_TRUNC
    files: list[OpenFile] = [process.descriptor(1).hold()]
    status = 0
    for name in names:
        try:
            files.append(process.open(name, os.O_WRONLY | os.O_CREAT | how))
        except OSError as problem:
            yield from _failed(process, name, problem)
            status = 1
    while data := (yield from process.read(process.descriptor(0))):
        for file in files:
            yield from process.write(file, data)
    for file in files:
        file.drop()
    return status


def _hexdump(process: Process, arguments: list[str]) -> Steps[int]:
    """[-bcdoxCv] [-e FMT] [-f FMT_FILE] [-n LEN] [-s OFS] [FILE]..."""
    chosen, names = options(arguments, "bcdoxCv", "efns")
    left = _count(chosen.value("n")) if "n" in chosen else -1
    skip = _count(chosen.value("s")) if "s" in chosen else 0
    form = chosen.value("e")
    unit = re.fullmatch(r'\s*(?:(\d{1,4})/)?(\d)?\s*"([^"]*)"\s*', form) if form else None
    if form and not unit:
        raise MisuseError(f"bad format {{{form}}}")
    at, waiting, status = 0, b"", 0
    for name, file in each_file(process, names):
        if isinstance(file, OSError):
            yield from _failed(process, name, file)
            status = 1
            continue
        while data := (yield from process.read(file)):
            if skip:
                skip, data, at = max(0, skip - len(data)), data[skip:], at + min(skip, len(data))
            data = data[:left] if left >= 0 else data
            left -= len(data) if left >= 0 else 0
            if unit:
                yield from process.out(_formatted(data, int(unit[2] or 1), unit[3]))
            else:
                waiting += data
                whole = len(waiting) // 16 * 16
                rows = [
                    _row(waiting[i : i + 16], at + i, "C" in chosen) for i in range(0, whole, 16)
                ]
                yield from process.out("".join(rows))
                at, waiting = at + whole, waiting[whole:]
            if not left:
                break
        file.drop()
    if not unit:
        last = _row(waiting, at, "C" in chosen) if waiting else ""
        yield from process.out(f"{last}{at + len(waiting):0{8 if 'C' in chosen else 7}x}\n")
    return status


def _formatted(data: bytes, size: int, form: str) -> str:
    """hexdump's ``-e``: ``form`` for each ``size`` bytes."""
    form = form.replace("\\n", "\n").replace("\\t", "\t")
    plain = re.sub(r"%(\d*)[uo]", r"%\1d", form).replace("%_p", "%s")
    found = []
    for at in range(0, len(data), size):
        value: int | str = int.from_bytes(data[at : at + size], "little")
        if "%_p" in form:
            value = chr(data[at]) if 32 <= data[at] < 127 else "."
        try:
            found.append(plain % value if "%" in plain.replace("%%", "") else plain)
        except (TypeError, ValueError):
            raise MisuseError("bad format") from None
    return "".join(found)


def _row(data: bytes, at: int, canonical: bool) -> str:
    if not canonical:
        words = (int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2))
        return f"{at:07x} " + " ".join(f"{word:04x}" for word in words) + "\n"
    text = "".join(chr(c) if 32 <= c < 127 else "." for c in data)
    halves = [" ".join(f"{c:02x}" for c in data[i : i + 8]) for i in (0, 8)]
    return f"{at:08x}  {halves[0]:23}  {halves[1]:23}  |{text}|\n"


def _rev(process: Process, arguments: list[str]) -> Steps[int]:
    """[FILE]..."""
    for name, file in each_file(process, arguments):
        if isinstance(file, OSError):
            yield from _failed(process, name, file)
            return 1
        lines = (yield from process.all_of(file)).decode(errors="surrogateescape").splitlines()
        if process.name == "tac":
            lines.reverse()
        else:
            lines = [line[::-1] for line in lines]
        yield from process.out("".join(line + "\n" for line in lines))
        file.drop()
    return 0


PROGRAMS: dict[str, Program] = {
    name: guarded(program)
    for name, program in {
        "cat": _cat, "head": _head, "tail": _tail, "wc": _wc, "grep": _grep, "egrep": _grep,
        "fgrep": _grep, "cut": _cut, "tr": _tr, "sort": _sort, "uniq": _uniq, "tee": _tee,
        "hexdump": _hexdump, "rev": _rev, "tac": _rev,
    }.items()
}  # fmt: skip
