# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtio devices that there are: block, network, entropy, console.

What they offer, answer and object to is what QEMU's do (hw/block/virtio-blk.c,
hw/net/virtio-net.c, hw/virtio/virtio-rng.c, hw/char/virtio-serial-bus.c); layouts are those
of virtio 1.3, chapter 5. Behind a device is next to nothing: a disk of zeros, a cable that
leads back, a seeded generator.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from struct import Struct, pack

from .events import Events
from .memory import Memory
from .virtio import Device, Feature, Status, Transport
from .virtqueue import Chain, Segment, Virtqueue, gather, scatter, total

__all__ = ["Block", "Console", "Device", "Feature", "Net", "Rng", "Status", "Transport"]

_block_header = Struct("<IIQ").unpack_from
_ZEROS = bytes(1 << 16)


class Block(Device):
    """A disk of ``size`` bytes that reads as zeros and forgets what is written."""

    ID = 2
    NAME = "virtio-blk"

    SECTOR = 512
    MAX_SECTORS = 0x3FFFFF  # of one request, as QEMU's block layer has it
    TURN = 1 << 24  # bytes after which whatever else there is to do has its turn
    OK, IOERR, UNSUPP = 0, 1, 2
    IN, OUT, SCSI, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 2, 4, 8, 11, 13
    BARRIER = 1 << 31
    F_FLUSH, CONFIG_WCE, MQ = 1 << 9, 1 << 11, 1 << 12
    FLAGS = (  # with SEG_MAX, GEOMETRY, BLK_SIZE, TOPOLOGY, DISCARD, WRITE_ZEROES
        F_FLUSH | CONFIG_WCE | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 10 | 1 << 13 | 1 << 14
    )

    def __init__(
        self,
        events: Events,
        memory: Memory,
        *,
        size: int = 1 << 30,
        num_queues: int = 1,
        serial: str = "",
    ) -> None:
        super().__init__(events, memory, [256] * num_queues)
        self.offered |= self.FLAGS | (self.MQ if num_queues > 1 else 0)
        self.size = size
        self.sectors = size // self.SECTOR
        self._identity = (serial.encode() + b"\0")[:20]
        self.write_cache = True

    def config(self) -> bytes:
        cylinders = min(max(self.sectors // (16 * 63), 2), 16383)
        geometry = pack("<HBB", cylinders, 16, 63)
        topology = pack("<BBHI", 0, 0, 0, 0)
        return (
            pack("<QII", self.sectors, 0, 256 - 2)
            + geometry
            + pack("<I", self.SECTOR)
            + topology
            + pack("<BBH", self.write_cache, 0, len(self.queues))
            + pack("<III", self.MAX_SECTORS, 1, 1)
            + pack("<IIB", self.MAX_SECTORS, 1, 1)
        )

    def config_written(self, config: bytes) -> None:
        self.write_cache = config[32] != 0

    def was_reset(self) -> None:
        self.write_cache = True

    def set_status(self, value: int) -> None:
        super().set_status(value)
        if value & Status.DRIVER_OK and not self.accepted & self.CONFIG_WCE:
            self.write_cache = bool(self.accepted & self.F_FLUSH)

    def serve(self, queue: Virtqueue) -> bool:
        pop, u8, budget = queue.pop, self.memory.u8, self.TURN
        while budget > 0:
            chain = pop()
            if chain is None:
                return False
            # A turn ends after a ring's worth of requests, or of bytes, however large they are.
            budget -= chain.room + self.TURN // queue.size
            if not chain.readable or not chain.writable:
                queue.detach()
                self.error("virtio-blk missing headers")
                return False
            address, length = chain.readable[0]
            if length >= 16:
                kind, _, sector = _block_header(u8, address)
            else:
                header = gather(self.memory, chain.readable, 16)
                if len(header) < 16:
                    queue.detach()
                    self.error("virtio-blk request outhdr too short")
                    return False
                kind, _, sector = _block_header(header)
            status = self._handle(kind, sector, chain)
            if status is None:
                queue.detach()
                self.error("virtio-blk discard/write_zeroes header too short")
                return False
            address, length = chain.writable[-1]
            u8[address + length - 1] = status
            # QEMU's length is that of all that could have been written.
            self.complete(queue, chain, chain.room)
        return True

    def _handle(self, kind: int, sector: int, chain: Chain) -> int | None:
        """Do a request; its status, or None if it is malformed."""
        command = kind & ~(self.OUT | self.BARRIER)
        if command == self.IN:
            if kind & self.OUT:
                return self.OK if self._fits(sector, total(chain.readable) - 16) else self.IOERR
            return self._read(sector, chain)
        if command == self.GET_ID:
            scatter(self.memory, chain.writable, self._identity[: chain.room - 1])
            return self.OK
        if command == self.FLUSH:
            return self.OK
        if command == self.SCSI:
            if len(chain.readable) < 2 or len(chain.writable) < 3:
                return self.IOERR
            return self.UNSUPP
        if command in (self.DISCARD & ~self.OUT, self.WRITE_ZEROES & ~self.OUT):
            return self._discard(kind, chain)
        return self.UNSUPP

    def _fits(self, sector: int, size: int) -> bool:
        count = size // self.SECTOR
        return (
            not size % self.SECTOR and count <= self.MAX_SECTORS and count <= self.sectors - sector
        )

    def _read(self, sector: int, chain: Chain) -> int:
        left = chain.room - 1
        if not self._fits(sector, left):
            return self.IOERR
        u8 = self.memory.u8
        address, length = chain.writable[0]
        if left <= length and left <= len(_ZEROS):
            u8[address : address + left] = _ZEROS[:left]
            return self.OK
        for address, length in chain.writable:
            end = address + min(length, left)
            left -= end - address
            for at in range(address, end, len(_ZEROS)):
                upto = min(at + len(_ZEROS), end)
                u8[at:upto] = _ZEROS[: upto - at]
        return self.OK

    def _discard(self, kind: int, chain: Chain) -> int | None:
        size = total(chain.readable) - 16
        if not kind & self.OUT or size > 16:
            return self.UNSUPP
        if size < 16:
            return None
        sector, count, flags = Struct("<QII").unpack(gather(self.memory, chain.readable, 16, 16))
        if count > self.MAX_SECTORS or not self._fits(sector, count * self.SECTOR):
            return self.IOERR
        unmap = flags & 1
        if flags & ~1 or (unmap and kind & ~self.BARRIER != self.WRITE_ZEROES):
            return self.UNSUPP
        return self.OK


class Net(Device):
    """A network card on a cable that leads back: what a queue pair sends, it receives.

    A frame for which there are no buffers is dropped. The control queue takes the commands
    that QEMU's takes, and remembers the address and the number of pairs; nothing is filtered.
    """

    ID = 1
    NAME = "virtio-net"

    HEADER = 12  # virtio_net_hdr_mrg_rxbuf; without that feature and VERSION_1 it has 10
    FRAME = 65536 + 4096  # QEMU's NET_BUFSIZE: what is longer is dropped
    MRG_RXBUF, MQ = 1 << 15, 1 << 22
    CTRL_GUEST_OFFLOADS = 1 << 2
    FLAGS = (  # with MAC, STATUS, CTRL_VQ, CTRL_RX, CTRL_VLAN, CTRL_RX_EXTRA, GUEST_ANNOUNCE
        CTRL_GUEST_OFFLOADS
        | MRG_RXBUF
        | 1 << 5
        | 1 << 16
        | 1 << 17
        | 1 << 18
        | 1 << 19
        | 1 << 20
        | 1 << 21
        | 1 << 23  # CTRL_MAC_ADDR
    )

    def __init__(
        self,
        events: Events,
        memory: Memory,
        *,
        mac: bytes = bytes.fromhex("525400123456"),
        pairs: int = 1,
    ) -> None:
        super().__init__(events, memory, [256] * (2 * pairs) + [64])
        self.offered |= self.FLAGS | (self.MQ if pairs > 1 else 0)
        self.pairs = pairs
        self.mac = self.permanent_mac = mac
        self.current_pairs = 1
        self.link = True
        self._all = self.queues

    def set_link(self, up: bool) -> None:
        """Plug the cable in, or pull it."""
        if up != self.link:
            self.link = up
            self.notify_config()

    def config(self) -> bytes:
        config = self.mac + pack("<H", self.link)  # VIRTIO_NET_S_LINK_UP
        return config + pack("<H", self.pairs) if self.pairs > 1 else config

    def was_reset(self) -> None:
        self.mac = self.permanent_mac
        self.current_pairs = 1

    def features_changed(self) -> None:
        # Without MQ there is one pair, and the control queue comes right after it.
        if self.pairs == 1:
            return
        usable = self._all
        if not self.accepted & self.MQ:
            usable = [*self._all[:2], self._all[-1]]
        if len(usable) != len(self.queues):
            for queue in self._all[2:]:
                queue.reset()
            for number, queue in enumerate(usable):
                queue.index = number
            self.queues = usable

    def serve(self, queue: Virtqueue) -> bool:
        if queue is self.queues[-1]:
            return self._control(queue)
        if queue.index % 2 and self.status & Status.DRIVER_OK:
            return self._transmit(queue)
        return False

    def _transmit(self, queue: Virtqueue) -> bool:
        receive = self.queues[queue.index - 1]
        header = self.HEADER if self._long_header else self.HEADER - 2
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                return False
            size = total(chain.readable)
            if size <= header:
                queue.detach()
                self.error("virtio-net header is invalid")
                return False
            fits = size - header <= self.FRAME and queue.index // 2 < self.current_pairs
            if fits and self.link:
                self._receive(receive, gather(self.memory, chain.readable, size, header))
                if self.broken:
                    queue.detach()
                    return False
            self.complete(queue, chain, 0)
        return True

    @property
    def _long_header(self) -> bool:
        return bool(self.accepted & (self.MRG_RXBUF | Feature.VERSION_1))

    def _receive(self, queue: Virtqueue, frame: bytes) -> None:
        """Put a frame into as many chains as it takes, if there are that many."""
        merge = bool(self.accepted & self.MRG_RXBUF)
        need = len(frame) + (self.HEADER if self._long_header else self.HEADER - 2)
        chains: list[Chain] = []
        room = 0
        while room < need and (merge or not chains):
            chain = queue.pop()
            if chain is None:
                queue.rewind(len(chains))
                return
            if not chain.writable:
                queue.detach()
                queue.rewind(len(chains))
                self.error("virtio-net receive queue contains no in buffers")
                return
            chains.append(chain)
            room += chain.room
        if room < need:
            queue.rewind(len(chains))
            return
        header = pack("<BBHHHH", 0, 0, 0, 0, 0, 0)
        if self._long_header:
            header += pack("<H", len(chains))
        data, done = header + frame, 0
        for chain in chains:
            wrote = scatter(self.memory, chain.writable, data[done : done + chain.room])
            done += wrote
            queue.push(chain, wrote)
        if queue.should_interrupt():
            self.transport.interrupt(queue.index)

    def _control(self, queue: Virtqueue) -> bool:
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                return False
            size = total(chain.readable)
            if not chain.writable or size < 2:
                queue.detach()
                self.error("virtio-net ctrl missing headers")
                return False
            ok = self._command(chain.readable, size - 2)
            scatter(self.memory, chain.writable, b"\0" if ok else b"\1")
            self.complete(queue, chain, 1)
        return True

    def _command(self, segments: list[Segment], size: int) -> bool:
        """Whether a command is taken which has ``size`` bytes behind its class and number."""
        kind, command, *rest = gather(self.memory, segments, 8)
        data = bytes(rest)
        match kind:
            case 0:  # RX: promiscuous, multicast and so on
                return size >= 1 and command <= 5
            case 1 if command == 1:  # MAC_ADDR_SET
                if size != 6:
                    return False
                self.mac = data
                return True
            case 1 if command == 0:  # MAC_TABLE_SET
                return self._mac_table(segments, size + 2)
            case 2:  # VLAN: add, delete
                return size >= 2 and int.from_bytes(data[:2], "little") < 4096 and command <= 1
            case 4 if command == 0 and self.accepted & self.MQ:  # MQ_VQ_PAIRS_SET
                pairs = int.from_bytes(data[:2], "little")
                if size < 2 or not 1 <= pairs <= self.pairs:
                    return False
                self.current_pairs = pairs
                return True
            case _:  # there are no announcements (3) to acknowledge, nor offloads (5) to set
                return False

    def _mac_table(self, segments: list[Segment], size: int) -> bool:
        """Whether it is two tables, each behind its number of entries, and nothing else."""
        at = 2
        for last in (False, True):
            count = gather(self.memory, segments, 4, at)
            at += 4 + 6 * int.from_bytes(count, "little")
            if at > size or (last and at != size):
                return False
        return True


class Rng(Device):
    """Entropy that is the same each time, so that runs can be compared."""

    ID = 4
    NAME = "virtio-rng"
    CHUNK = 1 << 16  # bytes at most of a request, so that none takes long

    def __init__(self, events: Events, memory: Memory, *, seed: int = 0) -> None:
        super().__init__(events, memory, [8])
        self._random = random.Random(seed)

    def set_status(self, value: int) -> None:
        super().set_status(value)
        for queue in self.queues:
            self.notified(queue.index)

    def serve(self, queue: Virtqueue) -> bool:
        if not self.status & Status.DRIVER_OK:
            return False
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                return False
            size = min(chain.room, self.CHUNK)
            scatter(self.memory, chain.writable, self._random.randbytes(size))
            self.complete(queue, chain, size)
        return True


class Console(Device):
    """One port. What the guest writes goes to ``output``; :meth:`input` is what it reads."""

    ID = 3
    NAME = "virtio-serial"
    EMERG_WRITE = 1 << 2
    PENDING = 1 << 16  # bytes of input that wait for the guest; the rest is refused

    def __init__(
        self, events: Events, memory: Memory, *, output: Callable[[bytes], object] = len
    ) -> None:
        super().__init__(events, memory, [128, 128, 32, 32])
        self.offered |= self.EMERG_WRITE
        self.output = output
        self._waiting = b""

    def config(self) -> bytes:
        return pack("<HHII", 0, 0, 1, 0)

    def config_written(self, config: bytes) -> None:
        if any(config[8:12]):
            self.output(config[8:9])

    def was_reset(self) -> None:
        self._waiting = b""

    def input(self, data: bytes) -> int:
        """Type ``data``; how many bytes were taken."""
        taken = data[: self.PENDING - len(self._waiting)]
        self._waiting += taken
        self._deliver(self.queues[0])
        return len(taken)

    def serve(self, queue: Virtqueue) -> bool:
        if queue.index == 0:
            return self._deliver(queue)
        if queue.index != 1:
            return False  # control queues: nothing happens there without MULTIPORT
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                return False
            left = self.PENDING
            for segment in chain.readable:
                data = gather(self.memory, [segment], left)
                left -= len(data)
                self.output(data)
            self.complete(queue, chain, 0)
        return True

    def _deliver(self, queue: Virtqueue) -> bool:
        used = False
        for _ in range(queue.size):
            if not self._waiting:
                break
            chain = queue.pop()
            if chain is None:
                break
            done = scatter(self.memory, chain.writable, self._waiting)
            self._waiting = self._waiting[done:]
            queue.push(chain, done)
            used = True
        if used and queue.should_interrupt():
            self.transport.interrupt(queue.index)
        return used and bool(self._waiting)
