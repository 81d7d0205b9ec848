# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks: the driver of virtio-blk, and requests by the queue of the CPU that asks.

Linux: drivers/block/virtio_blk.c, block/blk-mq.c, block/blk-mq-virtio.c. A request that
completes on another CPU than it came from is handed back by an IPI
(``blk_mq_complete_need_ipi()``).
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING, Any

from .ring import NEXT, WRITE, Ring
from .tasks import Task, Wait
from .virtio import QueueInfo, VirtioDevice, spread

if TYPE_CHECKING:
    from ..vcpu import Vcpu

__all__ = ["BLOCK", "BlkDriver", "Disk"]

BLOCK = 4096
SECTOR = 512
T_IN, T_OUT, T_FLUSH, T_GET_ID = 0, 1, 4, 8
SERIAL_BYTES = 20
# Of a request's page: header, status, the table of descriptors.
STATUS_AT, TABLE_AT = 64, 128
REQUESTS_A_PAGE = 16
REQUEST = 256
BLK_SIZE, FLUSH, TOPOLOGY, WCE, MQ, DISCARD, ZEROES = 6, 9, 10, 11, 12, 13, 14
SEG_MAX, SIZE_MAX = 2, 1
Steps = Generator[Wait, Any, Any]


class _Request:
    """One of a queue's requests; ``wait`` is woken when it is done."""

    __slots__ = ("at", "data", "kind", "length", "owner", "queue", "status", "wait")

    def __init__(self, queue: _Queue, at: int, data: int) -> None:
        self.queue = queue
        self.at = at
        self.data = data
        self.wait = Wait()
        self.kind = -1
        self.length = -1
        self.status = 0
        self.owner: Vcpu


class _Queue:
    """A hardware queue: its ring and what it has for requests."""

    def __init__(self, disk: Disk, cpus: frozenset[int]) -> None:
        self.disk = disk
        self.cpus = cpus
        self.ring: Ring
        self.free: list[_Request] = []
        self.room = Wait()
        memory = disk.driver.kernel.memory
        self._u8, self._u64 = memory.u8, memory.u64

    def more(self) -> None:
        """Memory for some more requests; OSError ENOMEM."""
        take = self.disk.driver.take
        page = take(REQUESTS_A_PAGE * REQUEST)
        for number in range(REQUESTS_A_PAGE):
            self.free.append(_Request(self, page + number * REQUEST, 0))

    def prepare(self, request: _Request, kind: int, length: int) -> None:
        """Write its descriptors, which stay what they are for the next of its kind."""
        request.kind, request.length = kind, length
        if length and not request.data:
            request.data = self.disk.driver.take(BLOCK)
        at, words = request.at, self._u64
        table = at + TABLE_AT >> 3
        device = WRITE if kind != T_OUT else 0
        words[table] = at
        words[table + 1] = 16 | NEXT << 32 | 1 << 48
        if length:
            words[table + 2] = request.data
            words[table + 3] = length | (NEXT | device) << 32 | 2 << 48
        last = table + (4 if length else 2)
        words[last] = at + STATUS_AT
        words[last + 1] = 1 | WRITE << 32

    def submit(self, vcpu: Vcpu, request: _Request, kind: int, sector: int, length: int) -> None:
        """``virtio_queue_rq()``."""
        if request.kind != kind or request.length != length:
            self.prepare(request, kind, length)
        at = request.at
        words = self._u64
        words[at >> 3] = kind
        words[(at >> 3) + 1] = sector
        self._u8[at + STATUS_AT] = 0xFF
        request.owner = vcpu
        self.ring.add_table(at + TABLE_AT, 3 if length else 2, request)
        self.ring.kick(vcpu)

    def done(self, vcpu: Vcpu) -> None:
        """``virtblk_done()``."""
        self.ring.drain(self.complete, vcpu)

    def complete(self, vcpu: Vcpu, request: _Request) -> None:
        """One request is done."""
        request.status = self._u8[request.at + STATUS_AT]
        if request.owner is vcpu:
            request.wait.wake(None, vcpu)
        else:
            self.disk.driver.kernel.call_on(vcpu, request.owner, request.wait.wake, None)


class Disk:
    """A disk such as vda: ``size`` in bytes, ``queues`` the CPUs of each of its queues."""

    def __init__(self, driver: BlkDriver, name: str, queues: list[frozenset[int]]) -> None:
        self.driver = driver
        self.name = name
        self.size = 0
        self.queues = queues
        self.device = driver.device
        self.hardware = [_Queue(self, cpus) for cpus in queues]
        self._of_cpu = {cpu: queue for queue in self.hardware for cpu in queue.cpus}
        self.gone = False

    def read(self, task: Task, offset: int = 0, length: int = BLOCK) -> Generator[Wait, Any, bytes]:
        """``length`` bytes, up to a block, at ``offset``, both of whole sectors; OSError."""
        self._check(offset, length)
        request = yield from self._do(task, T_IN, offset // SECTOR, length)
        return self._take(request, length)

    def write(self, task: Task, offset: int, data: bytes) -> Generator[Wait, Any, None]:
        """Likewise; it is not on the disk before :meth:`flush`."""
        self._check(offset, len(data))
        request = yield from self._claim(task)
        self._prepared(request, T_OUT, len(data))
        self.driver.kernel.memory.write(request.data, data)
        yield from self._run(task, request, T_OUT, offset // SECTOR, len(data))
        self._take(request, 0)

    def flush(self, task: Task) -> Generator[Wait, Any, None]:
        """Have it all on the disk."""
        request = yield from self._do(task, T_FLUSH, 0, 0)
        self._take(request, 0)

    def serial(self, task: Task) -> Generator[Wait, Any, str]:
        """Its serial number, which the device is asked for each time."""
        request = yield from self._do(task, T_GET_ID, 0, SERIAL_BYTES)
        return self._take(request, SERIAL_BYTES).split(b"\0")[0].decode("latin-1")

    def _check(self, offset: int, length: int) -> None:
        if offset % SECTOR or length % SECTOR or not 0 < length <= BLOCK:
            raise OSError(errno.EINVAL, "Invalid argument")
        if offset < 0 or offset + length > self.size:
            raise OSError(errno.EIO, "Input/output error")

    def _claim(self, task: Task) -> Generator[Wait, Any, _Request]:
        if self.gone:
            raise OSError(errno.ENXIO, "No such device or address")
        queue = self._of_cpu[task.cpu]
        while not queue.free:
            if queue.ring.room < REQUESTS_A_PAGE:
                yield queue.room
                if self.gone:
                    raise OSError(errno.EIO, "Input/output error")
            else:
                queue.more()
        return queue.free.pop()

    def _prepared(self, request: _Request, kind: int, length: int) -> None:
        if request.kind != kind or request.length != length:
            request.queue.prepare(request, kind, length)

    def _run(
        self, task: Task, request: _Request, kind: int, sector: int, length: int
    ) -> Generator[Wait, Any, None]:
        request.queue.submit(task.vcpu, request, kind, sector, length)
        yield request.wait

    def _do(
        self, task: Task, kind: int, sector: int, length: int
    ) -> Generator[Wait, Any, _Request]:
        if self.gone:
            raise OSError(errno.ENXIO, "No such device or address")
        queue = self._of_cpu[task.vcpu.index]
        free = queue.free
        request = free.pop() if free else (yield from self._claim(task))
        request.queue.submit(task.vcpu, request, kind, sector, length)
        yield request.wait
        return request

    def _take(self, request: _Request, length: int) -> bytes:
        """The data of a request that is done, which others may use from now on."""
        status, at = request.status, request.data
        data = self.driver.kernel.memory.read(at, length) if length and not status else b""
        free = request.queue.free
        free.append(request)
        if len(free) == 1:
            request.queue.room.wake()
        if status:
            number = errno.EOPNOTSUPP if status == 2 else errno.EIO
            raise OSError(number, "Input/output error")
        return data

    def fail(self) -> None:
        """The device is gone: what is under way fails."""
        self.gone = True
        for queue in self.hardware:
            for request in queue.ring.outstanding():
                request.status = 1
                request.wait.wake()
            queue.room.wake()


class BlkDriver:
    """The driver of virtio-blk."""

    name = "virtio_blk"
    features = sum(1 << bit for bit in (1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 16))

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self.kernel = device.kernel
        self.transport = device.transport
        self._pages: list[tuple[int, int]] = []
        self.disk: Disk | None = None

    def take(self, size: int) -> int:
        """Pages that are the driver's until it is removed."""
        address = self.kernel.pages.take(size)
        self._pages.append((address, size))
        return address

    def _has(self, bit: int) -> bool:
        return bool(self.device.features >> bit & 1)

    def probe(self, vcpu: Vcpu) -> None:
        """``virtblk_probe()``."""
        kernel, config = self.kernel, self.transport.config
        count = config(vcpu, 34, 2) if self._has(MQ) else 1
        if not count:
            raise OSError(errno.EINVAL, "MQ advertised but zero queues reported")
        cpus = kernel.cpus
        queues = spread(min(count, len(cpus)), cpus)
        kernel.say(f"virtio_blk {self.device.name}: {len(queues)}/0/0 default/read/poll queues")
        disk = Disk(self, self._name(), queues)
        infos = [QueueInfo(f"req.{n}", queue.done) for n, queue in enumerate(disk.hardware)]
        rings = self.transport.find_queues(vcpu, infos, queues)
        for queue, ring in zip(disk.hardware, rings, strict=True):
            queue.ring = ring
            ring.callback = partial(ring.drain, queue.complete)  # as done() does it, but faster
        self._read_limits(vcpu)
        if self._has(WCE):
            config(vcpu, 32, 1)
        disk.size = self._capacity(vcpu) * SECTOR
        kernel.say(
            f"virtio_blk {self.device.name}: [{disk.name}] {disk.size // SECTOR} "
            f"512-byte logical blocks ({_sizes(disk.size)})"
        )
        self.device.ready(vcpu)
        self.disk = disk
        kernel.disks[disk.name] = disk

    def _name(self) -> str:
        """The next of vda, vdb, ... vdz, vdaa, ..."""
        number = 0
        while (name := "vd" + _letters(number)) in self.kernel.disks:
            number += 1
        return name

    def _read_limits(self, vcpu: Vcpu) -> None:
        """``virtblk_read_limits()``."""
        config = self.transport.config
        for bit, fields in (
            (SEG_MAX, ((12, 4),)),
            (SIZE_MAX, ((8, 4),)),
            (BLK_SIZE, ((20, 4),)),
            (TOPOLOGY, ((24, 1), (25, 1), (26, 2), (28, 4))),
            (DISCARD, ((44, 4), (36, 4), (40, 4))),
            (ZEROES, ((48, 4),)),
        ):
            if self._has(bit):
                for offset, size in fields:
                    config(vcpu, offset, size)

    def _capacity(self, vcpu: Vcpu) -> int:
        transport = self.transport
        while True:
            before = transport.generation(vcpu)
            low = transport.config(vcpu, 0, 4)
            high = transport.config(vcpu, 4, 4)
            if transport.generation(vcpu) == before:
                return high << 32 | low

    def config_changed(self, vcpu: Vcpu) -> None:
        """The disk may have another size."""
        if self.disk is not None:
            self.disk.size = self._capacity(vcpu) * SECTOR

    def remove(self, vcpu: Vcpu) -> None:
        """``virtblk_remove()``."""
        disk = self.disk
        if disk is not None:
            self.kernel.disks.pop(disk.name, None)
            disk.fail()
        self.transport.reset(vcpu)
        self.transport.delete_queues(vcpu)
        for address, size in self._pages:
            self.kernel.pages.give(address, size)
        self._pages.clear()


def _letters(number: int) -> str:
    text = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, 26)
        text = chr(ord("a") + letter) + text
    return text


def _sizes(size: int) -> str:
    """As string_get_size() has it, in decimal and in binary."""
    return f"{_size(size, 1000, 'kMGT')}B/{_size(size, 1024, 'KMGT', 'i')}B"


def _size(size: int, step: int, letters: str, suffix: str = "") -> str:
    value, unit = float(size), ""
    for letter in letters:
        if value < step:
            break
        value, unit = value / step, letter + suffix
    if not unit:
        return f"{size} "
    digits = 2 - (value >= 10) - (value >= 100)
    return f"{value:.{digits}f} {unit}"
