# SPDX-License-Identifier: GPL-2.0-or-later
"""Device nodes, and files of the kernel that ask a device for what is in them."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from .disk import Disk
from .files import Device, Node, OpenFile, Regular, Room, Steps, Text, fail

if TYPE_CHECKING:
    from .kernel import Kernel
    from .processes import Process
    from .userland import Userland

__all__ = ["DiskNode", "SerialFile", "devices"]

BLOCK = 4096
SECTOR = 512
MEMORY, MISC, TTY, CONSOLE, DISK = 1, 10, 4, 5, 254


class _Null(OpenFile):
    def read(self, process: Process, size: int) -> Steps[bytes]:
        return b""
        yield

    def write(self, process: Process, data: bytes) -> Steps[None]:
        return
        yield

    def seek(self, position: int) -> None:
        pass


class _Zero(_Null):
    def read(self, process: Process, size: int) -> Steps[bytes]:
        return bytes(size)
        yield


class _Full(_Zero):
    def write(self, process: Process, data: bytes) -> Steps[None]:
        raise fail(errno.ENOSPC)
        yield


class _Random(_Null):
    def read(self, process: Process, size: int) -> Steps[bytes]:
        return process.userland.random.randbytes(size)
        yield


class _HardwareRandom(OpenFile):
    """What virtio-rng has to offer."""

    def read(self, process: Process, size: int) -> Steps[bytes]:
        for device in process.kernel.devices.values():
            if device.driver == "virtio_rng" and device.driving is not None:
                reader = device.driving.read  # type: ignore[attr-defined]
                found: bytes = yield from reader(lambda: process.vcpu, min(size, 64))
                return found
        raise fail(errno.ENODEV)


class _Log(OpenFile):
    """/dev/kmsg: what is written is logged."""

    def write(self, process: Process, data: bytes) -> Steps[None]:
        for line in data.decode(errors="replace").splitlines():
            process.kernel.say(line[:1000])
        return
        yield


class DiskNode(Device):
    """A disk in /dev."""

    def __init__(self, kernel: Kernel, name: str, minor: int) -> None:
        super().__init__("b", (DISK, minor), lambda: OpenDisk(self.disk()), 0o600)
        self._kernel = kernel
        self._name = name

    def disk(self) -> Disk:
        """Its driver's; raises ENXIO when that is gone."""
        disk = self._kernel.disks.get(self._name)
        if disk is None:
            raise fail(errno.ENXIO)
        return disk


class OpenDisk(OpenFile):
    """A disk without a page cache: each block that is read is a request."""

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self._disk = disk
        self._at = 0

    def read(self, process: Process, size: int) -> Steps[bytes]:
        """Up to a block."""
        task = process.job.task
        assert task is not None
        size = min(size, self._disk.size - self._at)
        if size <= 0:
            return b""
        first = self._at // SECTOR * SECTOR
        length = min(BLOCK, -(-(self._at + size - first) // SECTOR) * SECTOR)
        block = yield from self._disk.read(task, first, length)
        found = block[self._at - first :][:size]
        self._at += len(found)
        return found

    def write(self, process: Process, data: bytes) -> Steps[None]:
        """Block by block; raises ENOSPC at the end."""
        task = process.job.task
        assert task is not None
        done = 0
        while done < len(data):
            if self._at >= self._disk.size:
                raise fail(errno.ENOSPC)
            first = self._at // SECTOR * SECTOR
            part = data[done : done + BLOCK - (self._at - first)]
            before = self._at - first
            length = -(-(before + len(part)) // SECTOR) * SECTOR
            block = bytes(length)
            if before or (before + len(part)) % SECTOR:
                block = yield from self._disk.read(task, first, length)
            block = block[:before] + part + block[before + len(part) :]
            yield from self._disk.write(task, first, block)
            done += len(part)
            self._at += len(part)

    def seek(self, position: int) -> None:
        """From there on."""
        self._at = position


class SerialFile(Text):
    """/sys/block/vda/serial: the driver asks the device for it each time (VIRTIO_BLK_T_GET_ID)."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        super().__init__(lambda process: "")
        self._kernel = kernel
        self._name = name

    def disk(self) -> Disk:
        """Raises ENODEV when it is gone."""
        disk = self._kernel.disks.get(self._name)
        if disk is None:
            raise fail(errno.ENODEV)
        return disk

    def open(self, process: Process, flags: int) -> OpenFile:
        """The answer is made by the first read."""
        return _OpenSerial(self)


class _OpenSerial(OpenFile):
    def __init__(self, node: SerialFile) -> None:
        super().__init__()
        self._node = node
        self._at = 0
        self._text = b""

    def read(self, process: Process, size: int) -> Steps[bytes]:
        if not self._at:
            task = process.job.task
            assert task is not None
            self._text = (yield from self._node.disk().serial(task)).encode()
        found = self._text[self._at : self._at + size]
        self._at += len(found)
        return found

    def seek(self, position: int) -> None:
        self._at = position


def devices(userland: Userland) -> dict[str, Node]:
    """What is in /dev, but for disks."""

    def console() -> OpenFile:
        return userland.console.hold()

    room = Room(0)
    return {
        "null": Device("c", (MEMORY, 3), _Null),
        "zero": Device("c", (MEMORY, 5), _Zero),
        "full": Device("c", (MEMORY, 7), _Full),
        "random": Device("c", (MEMORY, 8), _Random),
        "urandom": Device("c", (MEMORY, 9), _Random),
        "kmsg": Device("c", (MEMORY, 11), _Log, 0o644),
        "mem": Device("c", (MEMORY, 1), lambda: Regular(room).open(userland.init, 0), 0o600),
        "hwrng": Device("c", (MISC, 183), _HardwareRandom, 0o600),
        "console": Device("c", (CONSOLE, 1), console, 0o600),
        "tty": Device("c", (CONSOLE, 0), console),
        "ttyS0": Device("c", (TTY, 64), console, 0o600),
    }
