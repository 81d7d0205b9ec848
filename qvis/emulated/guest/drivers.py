# SPDX-License-Identifier: GPL-2.0-or-later
"""Drivers of virtio-rng, the console and the network; disks are in :mod:`.disk`.

Linux: drivers/char/hw_random/virtio-rng.c, drivers/char/virtio_console.c,
drivers/net/virtio_net.c. Of each: probe, interrupts, traffic, removal.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

from .disk import BlkDriver
from .ring import WRITE, Ring
from .tasks import Wait
from .virtio import Driver, QueueInfo, VirtioDevice

if TYPE_CHECKING:
    from ..vcpu import Vcpu

__all__ = ["DRIVERS", "PROBE_ORDER", "ConsoleDriver", "NetDriver", "RngDriver"]

PAGE = 4096
RNG_BYTES = 64


class _Driver:
    """What those here have in common."""

    name = ""
    features = 0

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self.kernel = device.kernel
        self.transport = device.transport
        self._pages: list[tuple[int, int]] = []

    def _take(self, size: int) -> int:
        address = self.kernel.pages.take(size)
        self._pages.append((address, size))
        return address

    def remove(self, vcpu: Vcpu) -> None:
        """Reset the device and give back what it had."""
        self.transport.reset(vcpu)
        self.transport.delete_queues(vcpu)
        for address, size in self._pages:
            self.kernel.pages.give(address, size)
        self._pages.clear()

    def config_changed(self, vcpu: Vcpu) -> None:
        """Nothing that matters here."""


class RngDriver(_Driver):
    """Entropy. There is always a request under way, as in Linux."""

    name = "virtio_rng"

    def probe(self, vcpu: Vcpu) -> None:
        """``probe_common()`` and the first request."""
        self._buffer = self._take(RNG_BYTES)
        self._arrived = Wait()
        self._data = b""
        self._ring = self.transport.find_queues(vcpu, [QueueInfo("input", self._received)], None)[0]
        self.device.ready(vcpu)
        self._request(vcpu)

    def remove(self, vcpu: Vcpu) -> None:
        """And those who wait for entropy go without."""
        super().remove(vcpu)
        self._arrived.wake(vcpu=vcpu)

    def _request(self, vcpu: Vcpu) -> None:
        self._ring.add([(self._buffer, RNG_BYTES | WRITE << 32)], self)
        self._ring.kick(vcpu)

    def _received(self, vcpu: Vcpu) -> None:
        if self._ring.get() is not None:
            length = min(self._ring.written, RNG_BYTES)
            self._data = self.kernel.memory.read(self._buffer, length)
            self._arrived.wake(vcpu=vcpu)
        self._ring.listen()

    def read(self, vcpu: Callable[[], Vcpu], length: int) -> Generator[Wait, Any, bytes]:
        """``length`` random bytes (/dev/hwrng); ``vcpu()``: where the task is by then.

        Fewer if the driver goes meanwhile.
        """
        found = b""
        while len(found) < length and self.device.driving is self:
            if not self._data:
                yield self._arrived
                continue
            data, self._data = self._data, b""
            found += data
            self._request(vcpu())
        return found[:length]


class ConsoleDriver(_Driver):
    """The first port: hvc0. ``input`` is told of what arrives."""

    name = "virtio_console"
    features = 1 << 0  # SIZE

    def probe(self, vcpu: Vcpu) -> None:
        """``virtcons_probe()`` without multiport."""
        self.input: Callable[[bytes], object] = bytes
        infos = [QueueInfo("input", self._received), QueueInfo("output", self._sent)]
        self._in, self._out = self.transport.find_queues(vcpu, infos, None)
        self.device.ready(vcpu)
        buffer = self._take(PAGE)
        self._fill(vcpu, buffer)
        self._free = [self._take(PAGE)]

    def _fill(self, vcpu: Vcpu, buffer: int) -> None:
        self._in.add([(buffer, PAGE | WRITE << 32)], buffer)
        self._in.kick(vcpu)

    def _received(self, vcpu: Vcpu) -> None:
        while True:
            while (buffer := self._in.get()) is not None:
                self.input(self.kernel.memory.read(buffer, min(self._in.written, PAGE)))
                self._fill(vcpu, buffer)
            if self._in.listen():
                return

    def _sent(self, vcpu: Vcpu) -> None:
        while True:
            while (buffer := self._out.get()) is not None:
                self._free.append(buffer)
            if self._out.listen():
                return

    def write(self, vcpu: Vcpu, data: bytes) -> int:
        """Send up to a page of ``data``; how many bytes, 0 while all buffers are in use."""
        if not self._free or not data:
            return 0
        buffer = self._free.pop()
        data = data[:PAGE]
        self.kernel.memory.write(buffer, data)
        self._out.add([(buffer, len(data))], buffer)
        self._out.kick(vcpu)
        return len(data)


class NetDriver(_Driver):
    """An Ethernet card, with mergeable receive buffers of a page."""

    name = "virtio_net"
    features = sum(
        1 << bit
        for bit in (0, 1, 2, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 21, 22, 23)
    )
    HEADER = 12
    STATUS, MQ, CTRL_VQ, MAC, CTRL_RX = 16, 22, 17, 5, 18
    RX, MAC_CLASS, MQ_CLASS = 0, 1, 4
    BUFFERS = 64  # filled at once; Linux fills the ring

    def probe(self, vcpu: Vcpu) -> None:
        """``virtnet_probe()``."""
        transport = self.transport
        self.up = self.promiscuous = False
        self.carrier = True
        self.received: Callable[[Vcpu, bytes], object] | None = None
        """Told of each frame that arrives."""
        self.frames_in = self.frames_out = 0
        pairs = transport.config(vcpu, 8, 2) if self._has(self.MQ) else 1
        if self._has(self.MAC):
            self.mac = self._read_mac(vcpu)
        else:
            self.mac = bytes((2, 0, 0, 0, 0, self.device.number & 0xFF))
        pairs = max(1, pairs)
        infos = []
        for pair in range(pairs):
            infos.append(QueueInfo(f"input.{pair}", partial(self._receive, pair)))
            infos.append(QueueInfo(f"output.{pair}", partial(self._sent, pair)))
        if self._has(self.CTRL_VQ):
            infos.append(QueueInfo("control", None))
        rings = transport.find_queues(vcpu, infos, None)
        self._in, self._out = rings[0 : 2 * pairs : 2], rings[1 : 2 * pairs : 2]
        self._control: Ring | None = rings[-1] if self._has(self.CTRL_VQ) else None
        self._free: list[list[int]] = [[] for _ in self._out]
        self._command_page = self._take(PAGE)
        cpus = self.kernel.cpus
        self.pairs = min(pairs, len(cpus))
        self._spread(vcpu)
        self.device.ready(vcpu)
        if self.pairs > 1:
            self._command(vcpu, self.MQ_CLASS, 0, self.pairs.to_bytes(2, "little"))

    def _has(self, bit: int) -> bool:
        return bool(self.device.features >> bit & 1)

    def _read_mac(self, vcpu: Vcpu) -> bytes:
        transport = self.transport
        while True:
            before = transport.generation(vcpu)
            mac = bytes(transport.config(vcpu, n, 1) & 0xFF for n in range(6))
            if transport.generation(vcpu) == before:
                return mac

    def _spread(self, vcpu: Vcpu) -> None:
        """``virtnet_set_affinity()``: CPUs in turn, each pair its share."""
        cpus = self.kernel.cpus
        stride, more = divmod(len(cpus), self.pairs)
        stride, more = max(stride, 1), more if len(cpus) >= self.pairs else 0
        at = 0
        for pair in range(self.pairs):
            count = stride + (pair < more)
            mine = frozenset(cpus[(at + n) % len(cpus)] for n in range(count))
            at += count
            self.transport.set_queue_affinity(vcpu, self._in[pair], mine)
            self.transport.set_queue_affinity(vcpu, self._out[pair], mine)

    def open(self, vcpu: Vcpu) -> None:
        """``ifconfig up``: buffers to receive into, link, what to receive."""
        if self.up:
            return
        self.up = True
        for ring in self._in[: self.pairs]:
            for _ in range(min(ring.room, self.BUFFERS)):
                ring.add([(buffer := self._take(PAGE), PAGE | WRITE << 32)], buffer)
            ring.kick(vcpu)
            ring.listen()
        if self._has(self.STATUS):
            self.config_changed(vcpu)
        self.set_promiscuous(vcpu, False)

    def set_promiscuous(self, vcpu: Vcpu, on: bool) -> None:
        """``virtnet_rx_mode_work()``: whose frames to receive, all anew."""
        self.promiscuous = on
        if self._control is not None and self._has(self.CTRL_RX):
            self._command(vcpu, self.RX, 0, bytes([on]))
            self._command(vcpu, self.RX, 1, b"\0")
            self._command(vcpu, self.MAC_CLASS, 0, bytes(8))

    def config_changed(self, vcpu: Vcpu) -> None:
        """The link may be down, or up again."""
        if self._has(self.STATUS) and self.up:
            self.carrier = bool(self.transport.config(vcpu, 6, 2) & 1)

    def _command(self, vcpu: Vcpu, kind: int, command: int, data: bytes) -> None:
        """One on the control queue.

        Linux spins until it is answered. A guest's code here runs at one time, so the answer
        is taken when the next command is given; none of them is one that fails.
        """
        ring = self._control
        assert ring is not None
        while ring.get() is not None:
            pass
        if ring.room < 3:
            return
        page, memory = self._command_page, self.kernel.memory
        at = page + 1024 + (ring.room % 32) * 64
        memory.write(at, bytes((kind, command)) + data + b"\xff")
        status = at + 2 + len(data)
        table = page + (ring.room % 16) * 64
        memory.u64[table >> 3] = at
        memory.u64[(table >> 3) + 1] = 2 | 1 << 32 | 1 << 48
        memory.u64[(table >> 3) + 2] = at + 2
        memory.u64[(table >> 3) + 3] = len(data) | 1 << 32 | 2 << 48
        memory.u64[(table >> 3) + 4] = status
        memory.u64[(table >> 3) + 5] = 1 | WRITE << 32
        ring.add_table(table, 3, self)
        ring.kick(vcpu)
        while ring.get() is not None:
            pass

    def _receive(self, pair: int, vcpu: Vcpu) -> None:
        ring, memory = self._in[pair], self.kernel.memory
        while True:
            taken = False
            while (buffer := ring.get()) is not None:
                length = min(ring.written, PAGE)
                self.frames_in += 1
                if self.received is not None and length > self.HEADER:
                    self.received(vcpu, memory.read(buffer, length)[self.HEADER :])
                ring.add([(buffer, PAGE | WRITE << 32)], buffer)
                taken = True
            if taken:
                ring.kick(vcpu)
            if ring.listen():
                return

    def _sent(self, pair: int, vcpu: Vcpu) -> None:
        ring = self._out[pair]
        while True:
            while (buffer := ring.get()) is not None:
                self._free[pair].append(buffer)
            if ring.listen():
                return

    def send(self, vcpu: Vcpu, frame: bytes) -> bool:
        """Transmit an Ethernet frame by the pair of that CPU; False if the card is down or full."""
        if not self.up or len(frame) > PAGE - self.HEADER:
            return False
        pair = vcpu.index % self.pairs
        ring, free = self._out[pair], self._free[pair]
        self._sent(pair, vcpu)
        if not free:
            if ring.room < 1:
                return False
            free.append(self._take(PAGE))
        buffer = free.pop()
        memory = self.kernel.memory
        memory.write(buffer, bytes(self.HEADER) + frame)
        ring.add([(buffer, self.HEADER + len(frame))], buffer)
        self.frames_out += 1
        ring.kick(vcpu)
        return True


DRIVERS: dict[int, Callable[[VirtioDevice], Driver]] = {
    1: NetDriver,
    2: BlkDriver,
    3: ConsoleDriver,
    4: RngDriver,
}
PROBE_ORDER = (3, 4, 2, 1)
"""Device IDs in the order in which Linux's drivers register: as they are linked."""
