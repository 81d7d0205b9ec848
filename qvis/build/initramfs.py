# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's file system: busybox, dropbear with its libraries, init, the load program."""

from __future__ import annotations

import shutil
import stat
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import BuildError, InfraError
from ..paths import guest_kernel_dir
from ..process import run
from . import cache

__all__ = [
    "Entry",
    "compile_program",
    "find_initramfs",
    "host_program",
    "libraries",
    "make_initramfs",
    "pack",
    "userland",
]

ARCHIVE = "initramfs.cpio"
USERLAND = ("busybox", "dropbear")
ELF = b"\x7fELF"
COMPILE_DEADLINE = 120.0  # seconds
FOLDERS = ("bin", "dev", "etc", "etc/dropbear", "proc", "root", "root/.ssh", "run", "sys", "tmp")
PRIVATE = ("root", "root/.ssh")
TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
}
# Where ld.so looks without a cache of its own, which the guest has not.
LIBRARY_PATH = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64",
                "/lib", "/usr/lib")  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A file in an archive: ``mode`` with its type, ``device`` numbers of a node."""

    path: str  # without a leading slash
    mode: int
    content: bytes = b""  # or a symbolic link's target
    device: tuple[int, int] = (0, 0)

    @classmethod
    def folder(cls, path: str, permissions: int = 0o755) -> Entry:
        """A directory."""
        return cls(path, stat.S_IFDIR | permissions)

    @classmethod
    def file(cls, path: str, content: bytes, permissions: int = 0o644) -> Entry:
        """A regular file."""
        return cls(path, stat.S_IFREG | permissions, content)

    @classmethod
    def link(cls, path: str, target: str) -> Entry:
        """A symbolic link."""
        return cls(path, stat.S_IFLNK | 0o777, target.encode())


def pack(entries: Iterable[Entry]) -> bytes:
    """The entries as a cpio archive ("newc": Documentation/driver-api/early-userspace).

    Sorted, owned by root and without times, so that equal entries make equal
    archives. The folders that files are in are entries too. An archive may be
    appended to another: the kernel unpacks one after the other.
    """
    parts = []
    last = Entry("TRAILER!!!", 0)
    for number, entry in enumerate([*sorted(entries, key=lambda entry: entry.path), last]):
        name = entry.path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor,
        # rdevmajor, rdevminor, namesize, check
        fields = (number, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, *entry.device,
                  len(name), 0)  # fmt: skip
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        parts += [_padded(header + name, 4), _padded(entry.content, 4)]
    return _padded(b"".join(parts), 512)


def find_initramfs() -> Path | None:
    """The archive that every guest starts from, without keys, if it was ever made."""
    found = cache.find("initramfs", _key())
    return found / ARCHIVE if found else None


def make_initramfs() -> Path:
    """The archive that every guest starts from, without keys, made if it never was."""
    if found := find_initramfs():
        return found
    with cache.lock("initramfs"):
        if found := find_initramfs():
            return found
        name = _key()
        with cache.create("initramfs", name) as result:
            (result / ARCHIVE).write_bytes(pack(_entries(result / "qvis-load")))
        return cache.result("initramfs", name) / ARCHIVE


def _key() -> str:
    # This module is an input too: what it puts where is the recipe.
    own = [host_program(name) for name in USERLAND]
    inputs = [*own, *_own().values(), Path(__file__)]
    return cache.key(cache.compiler(), *(path.read_bytes() for path in inputs))


def _own() -> dict[str, Path]:
    return {name: guest_kernel_dir() / name for name in ("init", "load.c")}


def _entries(load: Path) -> list[Entry]:
    """What the archive holds; the load program is compiled to the file ``load``."""
    compile_program(_own()["load.c"], load, cache.log_file("initramfs"))
    return userland({"init": _own()["init"], "bin/qvis-load": load})


def compile_program(source: Path, program: Path, log: Path) -> None:
    """Compile one C file so that it needs no library; :class:`BuildError` when it does not."""
    run(
        ["gcc", "-static", "-O2", "-Wall", "-Werror", "-o", program, source],
        stage=f"compile {source.name}",
        log=log,
        deadline=COMPILE_DEADLINE,
    )


def userland(more: Mapping[str, Path]) -> list[Entry]:
    """busybox, dropbear and the programs ``more`` by their paths in the archive.

    With the folders that they are in, and the libraries of all of them.
    """
    programs = {f"bin/{name}": host_program(name) for name in USERLAND} | dict(more)
    for file in list(programs.values()):
        programs |= {str(library).lstrip("/"): library for library in libraries(file)}
    applets = subprocess.run(
        [host_program("busybox"), "--list"], capture_output=True, text=True, timeout=30, check=True
    )
    entries = {
        "dev/console": Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        "dev/null": Entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)),
    }
    for applet in applets.stdout.split():
        entries[f"bin/{applet}"] = Entry.link(f"bin/{applet}", "busybox")
    for path, text in TEXTS.items():
        entries[path] = Entry.file(path, text.encode())
    for path, file in programs.items():
        entries[path] = Entry.file(path, file.read_bytes(), 0o755)
    parents = {str(parent) for path in entries for parent in Path(path).parents} - {"."}
    for path in {*FOLDERS, *parents}:
        entries[path] = Entry.folder(path, 0o700 if path in PRIVATE else 0o755)
    return list(entries.values())


def host_program(name: str) -> Path:
    """A program of this machine that guests are given, whatever the user's path says."""
    found = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
    if not found:
        raise InfraError(f"no {name} on this host (Debian: busybox-static, dropbear-bin)")
    return Path(found)


def libraries(program: Path) -> set[Path]:
    """The dynamic linker and all libraries that ``program`` needs, as paths on this host.

    None for a program that is static or no ELF file.
    """
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile
    from elftools.elf.segments import InterpSegment

    found: set[Path] = set()
    with program.open("rb") as file:
        waiting = [program] if file.read(len(ELF)) == ELF else []
    while waiting:
        with waiting.pop().open("rb") as file:
            elf = ELFFile(file)
            needed = [
                Path(segment.get_interp_name())
                for segment in elf.iter_segments()
                if isinstance(segment, InterpSegment)
            ]
            needed += [
                _library(tag.needed)  # type: ignore[attr-defined]  # set by its name
                for section in elf.iter_sections()
                if isinstance(section, DynamicSection)
                for tag in section.iter_tags("DT_NEEDED")
            ]
        waiting += [path for path in needed if path not in found]
        found.update(needed)
    return found


def _library(name: str) -> Path:
    for folder in LIBRARY_PATH:
        if (path := Path(folder, name)).exists():
            return path
    raise BuildError(
        f"no {name}, which a program of the guest's needs, in {', '.join(LIBRARY_PATH)}"
    )


def _padded(data: bytes, unit: int) -> bytes:
    return data + b"\0" * (-len(data) % unit)
