# SPDX-License-Identifier: GPL-2.0-or-later
"""The inner host's file system: the guest's programs, QEMU, and what ``guest-kernel/host`` has.

The nested backend boots it with the inner host's kernel and appends what one machine
needs: the guest's kernel and initramfs, keys, and QEMU's command line.
"""

from __future__ import annotations

from pathlib import Path

from ..paths import guest_kernel_dir
from ..process import run
from . import cache, initramfs
from .initramfs import Entry, compile_program, pack, userland
from .qemu import QemuBuild

__all__ = ["FIRMWARE", "FOLDER", "QEMU", "find_host_initramfs", "make_host_initramfs"]

ARCHIVE = "host.cpio"
FOLDER = "qvis"  # in the archive: where QEMU finds its files
QEMU = f"{FOLDER}/qemu"
FIRMWARE = f"{FOLDER}/firmware"
STRIP_DEADLINE = 60.0  # seconds


def find_host_initramfs(qemu: QemuBuild) -> Path | None:
    """The archive with this QEMU in it, if it was ever made."""
    found = cache.find("host", _key(qemu))
    return found / ARCHIVE if found else None


def make_host_initramfs(qemu: QemuBuild) -> Path:
    """The archive with this QEMU in it, made if it never was.

    Raises :class:`~qvis.errors.BuildError` when one of its programs does not compile.
    """
    if found := find_host_initramfs(qemu):
        return found
    with cache.lock("host"):
        if found := find_host_initramfs(qemu):
            return found
        name = _key(qemu)
        with cache.create("host", name) as result:
            (result / ARCHIVE).write_bytes(pack(_entries(qemu, result)))
        return cache.result("host", name) / ARCHIVE


def _folder() -> Path:
    return guest_kernel_dir() / "host"


def _key(qemu: QemuBuild) -> str:
    # These modules are inputs too: what they put where is the recipe.
    inputs = [_folder() / "init", *sorted(_folder().glob("*.c")), Path(__file__)]
    inputs += [Path(initramfs.__file__), *map(initramfs.host_program, initramfs.USERLAND)]
    return cache.key(qemu.key, cache.compiler(), *(path.read_bytes() for path in inputs))


def _entries(qemu: QemuBuild, result: Path) -> list[Entry]:
    """What the archive holds; programs are left in the folder ``result`` as well."""
    log = cache.log_file("host")
    programs = {"init": _folder() / "init", QEMU: result / "qemu"}
    # Its symbols are of no use there, and every byte is copied twice in each boot.
    run(
        ["strip", "-o", programs[QEMU], qemu.binary],
        stage="strip qemu", log=log, deadline=STRIP_DEADLINE,
    )  # fmt: skip
    for source in sorted(_folder().glob("*.c")):
        program = result / f"qvis-{source.stem}"
        compile_program(source, program, log)
        programs[f"bin/{program.name}"] = program
    firmware = [
        Entry.file(f"{FIRMWARE}/{file.name}", file.read_bytes())
        for file in sorted(qemu.firmware.iterdir())
    ]
    return [*userland(programs), Entry.folder(FIRMWARE), *firmware]
