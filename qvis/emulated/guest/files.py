# SPDX-License-Identifier: GPL-2.0-or-later
"""Files: the kinds of nodes that a tree is made of, paths through it, and open files.

Whatever may have to wait (a pipe, a disk) is a generator that yields what it waits for, so
that it can be a step of a task. Errors are :class:`OSError` with Linux's errno.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .tasks import Step, Wait

if TYPE_CHECKING:
    from .processes import Process

__all__ = [
    "Device",
    "Directory",
    "Folder",
    "Link",
    "Node",
    "OpenFile",
    "Pipe",
    "PipeEnd",
    "Regular",
    "Sink",
    "Steps",
    "Text",
    "Tree",
    "Wakeup",
    "fail",
]

T = TypeVar("T")
Steps = Generator[Step, Any, T]

LINKS = 40  # symbolic links in one path, as Linux allows (MAXSYMLINKS)
PIPE_SIZE = 65536  # bytes, pipe(7)
SINK_SIZE = 4 << 20  # bytes that a command substitution may print
NAME_MAX = 255


def fail(number: int, path: str = "") -> OSError:
    """The error of that number, for ``path``."""
    return OSError(number, os.strerror(number), path)


class Wakeup:
    """Those who wait for one thing to change. They look again whenever it does."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[Wait] = []

    def wait(self) -> Wait:
        """Something to yield, once; a signal may end it as well (see :mod:`.processes`)."""
        wait = Wait()
        self._waiting.append(wait)
        return wait

    def wake(self) -> None:
        """Let everybody look again."""
        waiting, self._waiting = self._waiting, []
        for wait in waiting:
            wait.wake()


# Nodes


class Node:
    """What a name stands for; ``mode`` are its permission bits."""

    kind = "-"
    mode = 0o644

    def open(self, process: Process, flags: int) -> OpenFile:
        """Open it; ``flags`` are open(2)'s, of which O_WRONLY, O_RDWR, O_TRUNC, O_APPEND count."""
        raise fail(errno.ENXIO)

    @property
    def size(self) -> int:
        """Bytes, as ls shows them."""
        return 0


class Link(Node):
    """A symbolic link."""

    kind, mode = "l", 0o777

    def __init__(self, target: str) -> None:
        self.target = target


class Directory(Node):
    """Names, made when they are asked for; nobody can add any."""

    kind, mode = "d", 0o755

    def __init__(
        self, names: Callable[[], Iterable[str]], get: Callable[[str], Node | None]
    ) -> None:
        self._names = names
        self._get = get

    @classmethod
    def of(cls, entries: Mapping[str, Node]) -> Directory:
        """One whose names never change."""
        return cls(lambda: entries, entries.get)

    def names(self) -> list[str]:
        """All of them, sorted."""
        return sorted(self._names())

    def get(self, name: str) -> Node | None:
        """The node of that name."""
        return self._get(name)

    def open(self, process: Process, flags: int) -> OpenFile:
        """For reading only, which then fails."""
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise fail(errno.EISDIR)
        return OpenDirectory()


class Folder(Directory):
    """A directory in memory that can be changed; ``room`` is how many bytes its files may have."""

    def __init__(self, room: Room, mode: int = 0o755) -> None:
        self.entries: dict[str, Node] = {}
        self.room = room
        self.mode = mode
        super().__init__(lambda: self.entries, self.entries.get)

    def add(self, name: str, node: Node) -> None:
        """Make ``name`` stand for ``node``; raises ENAMETOOLONG, ENOSPC."""
        if len(name.encode(errors="replace")) > NAME_MAX:
            raise fail(errno.ENAMETOOLONG)
        self.room.take(Room.NODE)
        self.entries[name] = node

    def remove(self, name: str) -> None:
        """Forget ``name`` and what its file takes up."""
        node = self.entries.pop(name)
        self.room.give(Room.NODE)
        if isinstance(node, Regular):
            node.resize(0)


class Room:
    """How much more the files of one file system may hold."""

    NODE = 512  # bytes that a name takes

    def __init__(self, size: int) -> None:
        self.size = self.free = size

    def take(self, count: int) -> None:
        """Raises ENOSPC when it is not there."""
        if count > self.free:
            raise fail(errno.ENOSPC)
        self.free -= count

    def give(self, count: int) -> None:
        """Back."""
        self.free += count


class Regular(Node):
    """A file in memory."""

    def __init__(self, room: Room, content: bytes = b"", mode: int = 0o644) -> None:
        self.data = bytearray(content)
        self.room = room
        self.mode = mode

    @property
    def size(self) -> int:
        """Its length."""
        return len(self.data)

    def resize(self, size: int) -> None:
        """Cut it, or pad it with zeros; raises ENOSPC."""
        more = size - len(self.data)
        if more > 0:
            self.room.take(more)
            self.data.extend(bytes(more))
        else:
            self.room.give(-more)
            del self.data[size:]

    def open(self, process: Process, flags: int) -> OpenFile:
        """As open(2) says."""
        if flags & os.O_TRUNC:
            self.resize(0)
        return OpenRegular(self, append=bool(flags & os.O_APPEND))


class Text(Node):
    """A file of the kernel: ``show`` makes its text, ``store`` takes what is written.

    ``store`` may be a generator function. One without ``show`` can only be written.
    """

    def __init__(
        self,
        show: Callable[[Process], str | bytes] | None,
        store: Callable[[Process, str], Steps[None] | None] | None = None,
        size: int = 4096,
    ) -> None:
        self.show = show
        self.store = store
        self.mode = (0o444 if show else 0) | (0o200 if store else 0)
        self._size = size

    @property
    def size(self) -> int:
        """What the file system says, not what is in it."""
        return self._size

    def open(self, process: Process, flags: int) -> OpenFile:
        """Any way: what cannot be done fails when it is tried, since everybody is root."""
        return OpenText(self)


class Device(Node):
    """A device node, of "c"haracter or "b"lock kind."""

    def __init__(
        self, kind: str, number: tuple[int, int], opened: Callable[[], OpenFile], mode: int = 0o666
    ) -> None:
        self.kind = kind
        self.number = number
        self.opened = opened
        self.mode = mode

    def open(self, process: Process, flags: int) -> OpenFile:
        """Its driver's file."""
        return self.opened()


# Open files


class OpenFile:
    """What file descriptors refer to. It closes with the last of those who hold it."""

    def __init__(self) -> None:
        self.holders = 1

    def hold(self) -> OpenFile:
        """Itself, for one more."""
        self.holders += 1
        return self

    def drop(self) -> None:
        """For one less."""
        self.holders -= 1
        if not self.holders:
            self.close()

    def close(self) -> None:
        """Nobody has it any more."""

    def read(self, process: Process, size: int) -> Steps[bytes]:
        """Up to ``size`` bytes; none at the end."""
        raise fail(errno.EBADF)
        yield

    def write(self, process: Process, data: bytes) -> Steps[None]:
        """All of ``data``."""
        raise fail(errno.EBADF)
        yield

    def seek(self, position: int) -> None:
        """Go on from there; raises ESPIPE."""
        raise fail(errno.ESPIPE)

    @property
    def terminal(self) -> bool:
        """Whether it is one."""
        return False


class OpenDirectory(OpenFile):
    """Cannot be read as a file is."""

    def read(self, process: Process, size: int) -> Steps[bytes]:
        """Raises EISDIR."""
        raise fail(errno.EISDIR)
        yield


class OpenRegular(OpenFile):
    """A file in memory."""

    def __init__(self, node: Regular, *, append: bool) -> None:
        super().__init__()
        self._node = node
        self._at = 0
        self._append = append

    def read(self, process: Process, size: int) -> Steps[bytes]:
        """From where it is."""
        found = bytes(self._node.data[self._at : self._at + size])
        self._at += len(found)
        return found
        yield

    def write(self, process: Process, data: bytes) -> Steps[None]:
        """There, or at the end."""
        node = self._node
        at = len(node.data) if self._append else self._at
        if at + len(data) > len(node.data):
            node.resize(at + len(data))
        node.data[at : at + len(data)] = data
        self._at = at + len(data)
        return
        yield

    def seek(self, position: int) -> None:
        """From there on."""
        self._at = position


class OpenText(OpenFile):
    """A file of the kernel, made when its first byte is read (seq_file)."""

    def __init__(self, node: Text) -> None:
        super().__init__()
        self._node = node
        self._content: bytes | None = None
        self._at = 0

    def read(self, process: Process, size: int) -> Steps[bytes]:
        """Raises EIO for a file that is only written."""
        if self._content is None or not self._at:
            if self._node.show is None:
                raise fail(errno.EIO)
            made = self._node.show(process)
            self._content = made.encode() if isinstance(made, str) else made
        found = self._content[self._at : self._at + size]
        self._at += len(found)
        return found
        yield

    def write(self, process: Process, data: bytes) -> Steps[None]:
        """The whole of it at once; raises what the kernel says to it."""
        if self._node.store is None:
            raise fail(errno.EIO)
        steps = self._node.store(process, data.decode(errors="replace"))
        if steps is not None:
            yield from steps

    def seek(self, position: int) -> None:
        """From there on."""
        self._at = position


class Sink(OpenFile):
    """Collects what is written, for a command substitution."""

    def __init__(self) -> None:
        super().__init__()
        self.data = bytearray()
        self.full = False

    def write(self, process: Process, data: bytes) -> Steps[None]:
        """Raises EPIPE when it is too much: who reads has given up."""
        if self.full or len(self.data) + len(data) > SINK_SIZE:
            self.full = True
            raise fail(errno.EPIPE)
        self.data += data
        return
        yield


class Pipe:
    """Bytes on their way from writers to readers."""

    def __init__(self, size: int = PIPE_SIZE) -> None:
        self.data = bytearray()
        self.size = size
        self.readers = self.writers = 0
        self.changed = Wakeup()
        self.drained: Callable[[], None] | None = None
        """For those who put: told when it is not over its size any more."""

    def ends(self) -> tuple[PipeEnd, PipeEnd]:
        """One to read, one to write."""
        return PipeEnd(self, writes=False), PipeEnd(self, writes=True)

    def put(self, data: bytes) -> None:
        """From outside of the guest, which keeps to the size itself."""
        self.data += data
        self.changed.wake()


class PipeEnd(OpenFile):
    """One side of a pipe."""

    def __init__(self, pipe: Pipe, *, writes: bool) -> None:
        super().__init__()
        self.pipe = pipe
        self.writes = writes
        if writes:
            pipe.writers += 1
        else:
            pipe.readers += 1

    def close(self) -> None:
        """The other side learns of it."""
        if self.writes:
            self.pipe.writers -= 1
        else:
            self.pipe.readers -= 1
        self.pipe.changed.wake()

    def read(self, process: Process, size: int) -> Steps[bytes]:
        """What there is; waits for something, or for the last writer to close."""
        pipe = self.pipe
        if self.writes:
            raise fail(errno.EBADF)
        while not pipe.data:
            if not pipe.writers:
                return b""
            yield from process.wait(pipe.changed.wait())
        found = bytes(pipe.data[:size])
        del pipe.data[:size]
        pipe.changed.wake()
        if pipe.drained is not None and len(pipe.data) < pipe.size:
            pipe.drained()
        return found

    def write(self, process: Process, data: bytes) -> Steps[None]:
        """Waits for room; raises EPIPE when nobody is going to read."""
        pipe = self.pipe
        if not self.writes:
            raise fail(errno.EBADF)
        at = 0
        while at < len(data):
            if not pipe.readers:
                raise fail(errno.EPIPE)
            room = pipe.size - len(pipe.data)
            if room <= 0:
                yield from process.wait(pipe.changed.wait())
                continue
            pipe.data += data[at : at + room]
            at += room
            pipe.changed.wake()


# Paths


class Tree:
    """Nodes under a root, by their paths."""

    def __init__(self, root: Directory) -> None:
        self.root = root

    def find(self, path: str, start: str = "/", *, follow: bool = True) -> Node:
        """The node at ``path``; raises ENOENT, ENOTDIR, ELOOP."""
        node = self.walk(path, start, follow=follow)[1]
        if node is None:
            raise fail(errno.ENOENT, path)
        return node

    def walk(self, path: str, start: str = "/", *, follow: bool = True) -> tuple[str, Node | None]:
        """Its name without links and dots, and its node; None if only the last name is missing.

        ``follow``: through a link at the end too. Raises ENOENT, ENOTDIR, ELOOP.
        """
        if not path:
            raise fail(errno.ENOENT, path)
        names: list[str] = []
        nodes: list[Node] = [self.root]
        waiting = _names(path) if path.startswith("/") else _names(path) + _names(start)
        links = 0
        while waiting:
            name = waiting.pop()
            here = nodes[-1]
            if not isinstance(here, Directory):
                raise fail(errno.ENOTDIR, path)
            if name == ".":
                continue
            if name == "..":
                if names:
                    names.pop()
                    nodes.pop()
                continue
            node = here.get(name)
            if isinstance(node, Link) and (follow or waiting):
                links += 1
                if links > LINKS:
                    raise fail(errno.ELOOP, path)
                if node.target.startswith("/"):
                    names, nodes = [], [self.root]
                waiting += _names(node.target)
                continue
            if node is None:
                if waiting:
                    raise fail(errno.ENOENT, path)
                return "/" + "/".join([*names, name]), None
            names.append(name)
            nodes.append(node)
        if path.endswith("/") and not isinstance(nodes[-1], Directory):
            raise fail(errno.ENOTDIR, path)
        return "/" + "/".join(names), nodes[-1]

    def parent(self, path: str, start: str = "/") -> tuple[Folder, str]:
        """The directory that ``path`` can be made or removed in, and its name there.

        Raises ENOENT, ENOTDIR, and EPERM for a directory of the kernel's.
        """
        full = self.walk(path, start, follow=False)[0]
        above, _, name = full.rpartition("/")
        folder = self.find(above or "/")
        if not isinstance(folder, Folder):
            raise fail(errno.EPERM, path)
        if not name:
            raise fail(errno.EBUSY, path)
        return folder, name


def _names(path: str) -> list[str]:
    """The names in ``path``, the last one first."""
    return [name for name in reversed(path.split("/")) if name]
