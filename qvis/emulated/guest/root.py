# SPDX-License-Identifier: GPL-2.0-or-later
"""The root of the guest's files: what its initramfs holds, and what is mounted in it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from .files import Directory, Folder, Link, Node, OpenFile, Regular, Room, fail
from .nodes import DiskNode, devices
from .proc import make_proc
from .sysfs import make_sys

if TYPE_CHECKING:
    from .processes import Process
    from .userland import Userland

__all__ = ["make_root"]

PASSWD = b"root:x:0:0:root:/root:/bin/sh\n"


class Binary(Node):
    """A program that is not a script."""

    mode = 0o755

    @property
    def size(self) -> int:
        """Something."""
        return 1 << 20

    def open(self, process: Process, flags: int) -> OpenFile:
        """There is nothing to read: raises EPERM."""
        raise fail(errno.EPERM)


class _Root(Folder):
    """The root: files can be made in it, and its folders stay."""

    def remove(self, name: str) -> None:
        """Raises EBUSY for what is mounted or needed."""
        if not isinstance(self.entries.get(name), Folder | Regular | Link):
            raise fail(errno.EBUSY)
        super().remove(name)


def make_root(userland: Userland) -> Directory:
    """All of it; all files that can be made share one file system."""
    kernel = userland.kernel
    room = userland.room
    root = _Root(room)
    programs: dict[str, Node] = {name: Link("busybox") for name in userland.programs}
    programs |= {name: Binary() for name in ("busybox", "qvis-load", "dropbear")}
    etc = Folder(room)
    etc.entries |= {
        "hostname": Regular(Room(1 << 20), userland.hostname.encode() + b"\n"),
        "passwd": Regular(Room(1 << 20), PASSWD),
        "group": Regular(Room(1 << 20), b"root:x:0:\n"),
        "dropbear": Folder(room, 0o700),
    }
    fixed = devices(userland)

    def names() -> list[str]:
        return [*fixed, *kernel.disks]

    def get(name: str) -> Node | None:
        if name in kernel.disks:
            return DiskNode(kernel, name, 16 * list(kernel.disks).index(name))
        return fixed.get(name)

    root.entries |= {
        "bin": Directory.of(programs),
        "dev": Directory(names, get),
        "etc": etc,
        "init": Binary(),
        "lib": Directory.of({}),
        "lib64": Directory.of({}),
        "proc": make_proc(userland),
        "root": Folder(room, 0o700),
        "run": Folder(room),
        "sys": make_sys(userland),
        "tmp": Folder(room, 0o1777),
    }
    return root
