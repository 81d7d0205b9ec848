# SPDX-License-Identifier: GPL-2.0-or-later
"""What a program was linked from: objects, their sources and headers, and what each takes.

Read from what the build itself left, never from file names: the archives that
make lists and ``.cmd`` files beside the objects of Linux, ``build.ninja`` and
ninja's log of dependencies for QEMU. Members of libraries count when the linker
had a reason to take them (an undefined symbol that they define), which is
worked out here as ``ld`` does it.

:func:`linux_objects` and :func:`qemu_objects` look at a build folder that has
just been built; :meth:`Objects.save` keeps what they saw beside the result, so
that it is known long after the folder has gone on to another series.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..errors import BuildError, InfraError
from .git import git
from .tree import BASE

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

__all__ = [
    "RECORD",
    "Lines",
    "ObjectFile",
    "Objects",
    "Sizes",
    "SourceFile",
    "count_lines",
    "linux_objects",
    "qemu_objects",
    "section_sizes",
]

OBJECTS = "objects.json"  # the file in a result's folder
SHAPE = 1  # of that file
RECORD = f"{OBJECTS} {SHAPE}"
"""What a recipe names among its inputs, so that no result without the file is taken."""

DEADLINE = 60.0  # seconds for ar or ninja to print a list
GENERATED = "build:"  # before the path of a file that the build made
WRITE, ALLOC, EXECINSTR = 1, 2, 4  # SHF_: a section's flags
LOCAL, GLOBAL, FUNCTION = 0, 1, 2  # STB_LOCAL, STB_GLOBAL, STT_FUNC: a symbol's
# Sections that Linux's linker script takes out again, though they say that they are loaded.
DISCARDED = (".discard", ".export_symbol", ".modinfo")
# What a compiler turns into code, also where another source includes it.
SOURCES = (".c", ".S", ".rs", ".c.inc")


@dataclass(frozen=True)
class Lines:
    """Lines of a file: all of them, and those with more on them than blanks and comments."""

    all: int = 0
    code: int = 0

    def __add__(self, other: Lines) -> Lines:
        return Lines(self.all + other.all, self.code + other.code)

    def __sub__(self, other: Lines) -> Lines:
        return Lines(self.all - other.all, self.code - other.code)


@dataclass(frozen=True)
class Sizes:
    """Bytes that are in memory when a program runs, by the sections' flags."""

    text: int = 0  # executable
    rodata: int = 0  # neither executable nor writable
    data: int = 0  # writable
    bss: int = 0  # writable, and not in the file

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(
            self.text + other.text,
            self.rodata + other.rodata,
            self.data + other.data,
            self.bss + other.bss,
        )

    @property
    def total(self) -> int:
        """All of them."""
        return self.text + self.rodata + self.data + self.bss


@dataclass(frozen=True)
class SourceFile:
    """A file that was compiled or included, as built and as its authors released it."""

    lines: Lines
    released: Lines  # none where our series adds the file


@dataclass(frozen=True)
class ObjectFile:
    """One object that is in the program. Paths are relative to the source tree, except
    ``path``, which is in the build folder, and those that start with ``build:``."""

    path: str
    sources: tuple[str, ...]  # the one compiled, then sources that it includes
    headers: tuple[str, ...]
    sizes: Sizes
    functions: dict[str, int]  # that it defines, also local ones, and their bytes
    needs: tuple[str, ...]  # symbols that others have to define
    options: tuple[str, ...]  # CONFIG_ names that its Makefile lines depend on; Linux only

    @property
    def source(self) -> str:
        """The file that was compiled."""
        return self.sources[0]


@dataclass(frozen=True)
class Objects:
    """All that is linked into one program, in the order of the link."""

    objects: tuple[ObjectFile, ...]
    files: dict[str, SourceFile]  # every source and header that an object names

    def save(self, result: Path) -> None:
        """Write it into a result's folder, where :meth:`load` finds it."""
        # Most headers are in most objects: each is named once.
        names = {name: number for number, name in enumerate(self.files)}
        data = {
            "shape": SHAPE,
            "files": [
                [name, *vars(file.lines).values(), *vars(file.released).values()]
                for name, file in self.files.items()
            ],
            "objects": [
                {
                    **vars(one),
                    "sources": [names[name] for name in one.sources],
                    "headers": [names[name] for name in one.headers],
                    "sizes": [*vars(one.sizes).values()],
                }
                for one in self.objects
            ],
        }
        (result / OBJECTS).write_text(json.dumps(data, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, result: Path) -> Self:
        """What :meth:`save` wrote; :class:`BuildError` when there is none or it is damaged."""
        path = result / OBJECTS
        again = f"remove {result} and run `qvis build`"
        try:
            data = json.loads(path.read_text())
            if data["shape"] != SHAPE:
                raise BuildError(f"{path} is of another qvis: {again}", stage="objects")
            files = {
                name: SourceFile(Lines(lines, code), Lines(all_before, code_before))
                for name, lines, code, all_before, code_before in data["files"]
            }
            names = list(files)
            return cls(tuple(_object(one, names) for one in data["objects"]), files)
        except FileNotFoundError as problem:
            raise BuildError(
                f"{path} is missing, so nobody knows what was compiled: {again}", stage="objects"
            ) from problem
        except OSError as problem:
            raise InfraError(f"cannot read {path}: {problem}", stage="objects") from problem
        except (ValueError, KeyError, TypeError, IndexError) as problem:
            raise BuildError(f"{path} is damaged: {again}", stage="objects") from problem


def linux_objects(build: Path, source: Path) -> Objects:
    """What the ``vmlinux`` in a build folder was linked from.

    ``source`` is the work tree that it was built from. Not among them: the
    symbol table that the link makes of its own first pass (kallsyms), and what
    only the bzImage has (its setup and decompressor). Raises
    :class:`BuildError` when the folder is not that of a whole build.
    """
    link = re.search(r"--start-group (.*?) --end-group", _read(build / ".vmlinux.o.cmd"))
    if not link:
        raise BuildError("cannot see which libraries vmlinux is linked with", stage="objects")
    always = _members(build, "vmlinux.a")
    always.append("init/version-timestamp.o")  # link-vmlinux.sh makes and adds it
    libraries = [_members(build, library) for library in link[1].split()]
    linked = _linked(build, always, libraries)
    makefiles = _Makefiles(source)
    return _gather(
        build,
        source,
        linked,
        {path: _kernel_dependencies(build, path) for path in linked},
        {path: makefiles.options(path) for path in linked},
    )


def qemu_objects(build: Path, source: Path, program: str) -> Objects:
    """What ``program``, such as ``qemu-system-x86_64``, in a build folder was linked from.

    ``source`` is the work tree that it was built from. Raises
    :class:`BuildError` when the folder is not that of a whole build.
    """
    ninja = _read(build / "build.ninja").replace("$\n", "")
    # build OUTPUT: RULE INPUT... | IMPLICIT INPUT... || ORDER-ONLY INPUT...
    edges = {
        output: (rule, inputs.split())
        for output, rule, inputs in re.findall(r"^build (\S+): (\S+)([^|\n]*)", ninja, re.MULTILINE)
    }
    if program not in edges:
        raise BuildError(f"build.ninja does not make {program}", stage="objects")
    linking = re.search(
        rf"^build {re.escape(program)}:.*\n(?: .*\n)*? LINK_ARGS = (.*)$", ninja, re.MULTILINE
    )
    arguments = linking[1].split() if linking else []
    libraries = [edges[word][1] for word in arguments if word in edges and word.endswith(".a")]
    forced = [
        symbol
        for word in arguments
        if word.startswith("@")
        for symbol in re.findall(r"-u,(\w+)", _read(build / word[1:]))
    ]
    always = [path for path in edges[program][1] if path.endswith(".o")]
    linked = _linked(build, always, libraries, forced)
    text = _output(["ninja", "-t", "deps", *linked], build)
    dependencies = {
        block.partition(": #deps ")[0]: [line.strip() for line in block.splitlines()[1:]]
        for block in text.split("\n\n")
    }
    if missing := [path for path in linked if not dependencies.get(path)]:
        raise BuildError(f"ninja does not know what {missing[0]} was made of", stage="objects")
    return _gather(
        build,
        source,
        linked,
        {path: [edges[path][1][0], *dependencies[path]] for path in linked},
        {},
    )


def count_lines(text: str) -> Lines:
    """Lines of a C, assembler or Rust source.

    A line is code when something is left of it without comments: ``/* */`` and
    ``//``, not the assembler's own.
    """
    code = COMMENT.sub(_without_comment, text)
    return Lines(
        all=text.count("\n") + (text[-1:] not in ("", "\n")),
        code=sum(1 for line in code.splitlines() if line.strip()),
    )


# Strings are matched as well so that what looks like a comment in one is none.
COMMENT = re.compile(
    r"""//(?:[^\n\\]|\\.)*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'""", re.DOTALL
)


def _without_comment(match: re.Match[str]) -> str:
    text = match[0]
    return text if text[0] in "\"'" else "\n" * text.count("\n") or " "


def section_sizes(path: Path) -> Sizes:
    """What the sections of an object or a program take in memory."""
    with _elf(path) as elf:
        return _sizes(elf)


@contextmanager
def _elf(path: Path) -> Iterator[ELFFile]:
    """An object or a program, open; :class:`BuildError` when it is none or damaged."""
    # Here, since whoever only boots a machine need not wait for it.
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        with path.open("rb") as file:
            yield ELFFile(file)
    except (OSError, ELFError) as problem:
        raise BuildError(f"{path} is no object: {problem}", stage="objects") from problem


def _sizes(elf: ELFFile) -> Sizes:
    text = rodata = data = bss = 0
    for section in elf.iter_sections():
        flags, size = section["sh_flags"], section["sh_size"]
        if not flags & ALLOC or section.name.startswith(DISCARDED):
            continue
        if section["sh_type"] == "SHT_NOBITS":
            bss += size
        elif flags & EXECINSTR:
            text += size
        elif flags & WRITE:
            data += size
        else:
            rodata += size
    return Sizes(text, rodata, data, bss)


@dataclass(frozen=True)
class _Symbols:
    """An object's symbols as a linker sees them."""

    sizes: Sizes
    defines: frozenset[str]  # for other objects
    needs: tuple[str, ...]  # not those that may stay undefined (weak)
    functions: dict[str, int]


def _symbols(path: Path) -> _Symbols:
    defines: set[str] = set()
    needs: list[str] = []
    functions: dict[str, int] = {}
    with _elf(path) as elf:
        table = elf.get_section_by_name(".symtab")
        if table is not None:
            names = elf.get_section(table["sh_link"]).data()
            # Elf64_Sym by hand: pyelftools would take seconds for a kernel's.
            for offset, info, _, section, _, size in struct.iter_unpack("<IBBHQQ", table.data()):
                binding, kind = info >> 4, info & 15
                if not offset or (binding == LOCAL and kind != FUNCTION):
                    continue
                name = names[offset : names.index(b"\0", offset)].decode(errors="replace")
                if not section:
                    if binding == GLOBAL:
                        needs.append(name)
                    continue
                if binding != LOCAL:
                    defines.add(name)
                if kind == FUNCTION:
                    functions[name] = functions.get(name, 0) + size
        sizes = _sizes(elf)
    return _Symbols(sizes, frozenset(defines), tuple(needs), functions)


def _linked(
    build: Path,
    always: Sequence[str],
    libraries: Sequence[Sequence[str]],
    forced: Iterable[str] = (),
) -> dict[str, _Symbols]:
    """The objects that a linker takes: ``always`` these, of libraries those in demand.

    The libraries are a group: they are searched until nothing more is found.
    """
    linked = {path: _symbols(build / path) for path in always}
    defined = {name for symbols in linked.values() for name in symbols.defines}
    wanted = {name for symbols in linked.values() for name in symbols.needs}
    wanted = (wanted | set(forced)) - defined
    waiting = {path: _symbols(build / path) for members in libraries for path in members}
    progress = True
    while progress:
        progress = False
        for path, symbols in list(waiting.items()):
            if wanted.isdisjoint(symbols.defines):
                continue
            linked[path] = waiting.pop(path)
            defined |= symbols.defines
            wanted = (wanted | set(symbols.needs)) - defined
            progress = True
    return linked


def _gather(
    build: Path,
    source: Path,
    linked: dict[str, _Symbols],
    dependencies: dict[str, list[str]],
    options: dict[str, tuple[str, ...]],
) -> Objects:
    """Put together what is known of the objects and count the lines of their files."""
    build, source = build.resolve(), source.resolve()

    @cache
    def name(dependency: str) -> str | None:
        """How we call a file; none of ours, such as a compiler's header, has no name."""
        path = (build / dependency).resolve()
        # The build folder may be inside the source tree, and the other way round.
        if path.is_relative_to(build):
            return f"{GENERATED}{path.relative_to(build)}"
        return str(path.relative_to(source)) if path.is_relative_to(source) else None

    objects = []
    for path, symbols in linked.items():
        names = [found for word in dependencies[path] if (found := name(word))]
        sources = [found for found in names if found.endswith(SOURCES)]
        if names[:1] != sources[:1]:
            raise BuildError(f"{path} was made of {dependencies[path][:1]}", stage="objects")
        objects.append(
            ObjectFile(
                path=path,
                sources=tuple(dict.fromkeys(sources)),
                headers=tuple(dict.fromkeys(x for x in names if not x.endswith(SOURCES))),
                sizes=symbols.sizes,
                functions=symbols.functions,
                needs=symbols.needs,
                options=options.get(path, ()),
            )
        )
    files = {}
    changed = set(git(source, "diff", "--name-only", BASE, "HEAD", stage="objects").splitlines())
    for file in sorted({name for one in objects for name in (*one.sources, *one.headers)}):
        ours = file.removeprefix(GENERATED)
        place = build / ours if file != ours else source / ours
        lines = count_lines(_read(place))
        files[file] = SourceFile(lines, _released(source, file) if file in changed else lines)
    return Objects(tuple(objects), files)


def _released(source: Path, file: str) -> Lines:
    """The lines of a file before our series."""
    if not git(source, "ls-tree", BASE, "--", file, stage="objects"):
        return Lines()
    return count_lines(git(source, "show", f"{BASE}:{file}", stage="objects"))


def _kernel_dependencies(build: Path, path: str) -> list[str]:
    """The source of an object of Linux, then all that it includes."""
    place = Path(path)
    text = _read(build / place.parent / f".{place.name}.cmd")
    main = re.search(r"^source_\S+ := (\S+)$", text, re.MULTILINE)
    listed = re.search(r"^deps_\S+ := \\\n((?:.*\\\n)*)", text, re.MULTILINE)
    if not main or not listed:
        raise BuildError(f"make does not know what {path} was made of", stage="objects")
    words = (line.strip(" \\") for line in listed[1].splitlines())
    return [main[1], *(word for word in words if not word.startswith("$("))]


class _Makefiles:
    """What the Makefiles of Linux say about when an object is built."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._read: dict[str, dict[str, set[str]]] = {}

    def options(self, path: str) -> tuple[str, ...]:
        """The CONFIG_ names that an object depends on, by its own line or a folder's."""
        found: set[str] = set()
        place = Path(path)
        found |= self._of(str(place.parent)).get(place.name, set())
        for folder in place.parents:
            if folder.name:
                found |= self._of(str(folder.parent)).get(f"{folder.name}/", set())
            for above in folder.parents:
                # arch/x86/Makefile names its folders from the top.
                found |= self._of(str(above)).get(f"{folder}/", set())
        return tuple(sorted(found))

    def _of(self, folder: str) -> dict[str, set[str]]:
        """Objects and folders that a folder's Makefiles name, with their options."""
        if folder not in self._read:
            named: dict[str, set[str]] = {}
            parts: dict[str, list[str]] = {}
            for name in ("Kbuild", "Makefile"):
                path = self._source / folder / name
                if path.exists():
                    for target, words, options in _assignments(_read(path)):
                        for word in words:
                            named.setdefault(word, set()).update(options)
                            parts.setdefault(f"{target}.o", []).append(word)
            # foo-y := a.o: what foo.o depends on, a.o does.
            for whole, members in parts.items():
                for member in members:
                    named[member] |= named.get(whole, set())
            self._read[folder] = named
        return self._read[folder]


def _assignments(makefile: str) -> Iterator[tuple[str, list[str], set[str]]]:
    """``target-$(CONFIG_A) += words``: target, words, and CONFIG_ names with those around it."""
    around: list[set[str]] = []
    for line in makefile.replace("\\\n", " ").splitlines():
        text = line.split("#")[0].strip()
        if re.match(r"if(n?def|n?eq)\b", text):
            around.append(set(re.findall(r"CONFIG_\w+", text)))
        elif text.startswith("endif") and around:
            around.pop()
        elif match := re.match(r"([\w-]+)-(y|\$\(\w+\))\s*[:+]?=\s*(.*)$", text):
            options = set(re.findall(r"CONFIG_\w+", match[2])).union(*around)
            yield match[1], match[3].split(), options


def _members(build: Path, archive: str) -> list[str]:
    """The objects in a thin archive, as paths from the build folder."""
    listed = _output(["ar", "t", archive], build).splitlines()
    return [line.removeprefix("./") for line in listed]


def _output(command: Sequence[str], folder: Path) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise InfraError(f"cannot run {command[0]}: {problem}", stage="objects") from problem
    if done.returncode:
        raise BuildError(
            f"{command[0]} cannot say what was linked",
            stage="objects",
            command=command[:3],  # what follows are a thousand objects
            tail=done.stderr.splitlines(),
        )
    return done.stdout


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as problem:
        raise BuildError(f"the build left no {path.name}: {problem}", stage="objects") from problem


def _object(data: dict[str, Any], names: Sequence[str]) -> ObjectFile:
    return ObjectFile(
        path=data["path"],
        sources=tuple(names[number] for number in data["sources"]),
        headers=tuple(names[number] for number in data["headers"]),
        sizes=Sizes(*data["sizes"]),
        functions=data["functions"],
        needs=tuple(data["needs"]),
        options=tuple(data["options"]),
    )
