# SPDX-License-Identifier: GPL-2.0-or-later
"""What all virtio devices have in common, whatever they do and however they are reached.

Status, features, queues and errors behave as in QEMU's hw/virtio/virtio.c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..errors import UsageError
from .events import Events
from .memory import Memory
from .virtqueue import Chain, Virtqueue

__all__ = ["NO_VECTOR", "QUEUES", "Device", "Feature", "Status", "Transport"]

QUEUES = 1024  # as many a device may have, whoever asks for them
NO_VECTOR = 0xFFFF  # VIRTIO_MSI_NO_VECTOR


class Status:
    """Bits of the device status: virtio 1.3, 2.1."""

    ACKNOWLEDGE = 0x01
    DRIVER = 0x02
    DRIVER_OK = 0x04
    FEATURES_OK = 0x08
    NEEDS_RESET = 0x40
    FAILED = 0x80


class Feature:
    """Bits that are not of a device type: virtio 1.3, 6; and docs/virtio-interrupts.md, 2."""

    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    RING_RESET = 1 << 40
    VIS = 1 << 48
    MMIO_MSI = 1 << 49


class Transport(Protocol):
    """What a device wants of how it is reached."""

    @property
    def interrupt(self) -> Callable[[int], None]:
        """Tell the driver that this queue has used buffers."""

    def config_changed(self) -> None:
        """Tell the driver that the configuration has changed."""


class _Unattached:
    """A device that has not been plugged in interrupts nobody."""

    def __init__(self) -> None:
        self.interrupt: Callable[[int], None] = lambda queue: None

    def config_changed(self) -> None:
        pass


class Device:
    """A virtio device without its transport.

    A subclass says what it is (``ID``, ``NAME``, the queues' sizes, more features), what its
    configuration space holds, and serves its queues. :class:`UsageError` if that is too many.
    """

    ID = 0
    """Device ID: virtio 1.3, 5."""
    NAME = ""
    """QEMU's name of it, such as virtio-blk."""

    def __init__(self, events: Events, memory: Memory, queue_sizes: Sequence[int]) -> None:
        if len(queue_sizes) > QUEUES:
            raise UsageError(f"a {self.NAME} device has at most {QUEUES} queues")
        self.events = events
        self.memory = memory
        self.offered = Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.RING_RESET
        """Features; the transport adds its own."""
        self.accepted = 0
        self.status = 0
        self.isr = 0
        """Bit 0: a queue has interrupted; bit 1: the configuration has changed."""
        self.generation = 0
        self.broken = False
        self.disabled = False
        """The function is no bus master: nothing moves, but nothing is lost."""
        self.stopped = False
        self.event_idx = False
        self.queues = [Virtqueue(self, n, size) for n, size in enumerate(queue_sizes)]
        self.transport: Transport = _Unattached()
        self.latency: Callable[[], int] = int
        """Modelled cycles from a notification to what comes of it; 0: before it returns."""
        self.complaints: list[str] = []
        """Why it was broken, the last few times."""

    # What a subclass may say.

    def config(self) -> bytes:
        """The configuration space as it is now."""
        return b""

    def config_written(self, config: bytes) -> None:
        """The driver wrote to the configuration space; ``config`` is all of it."""

    def serve(self, queue: Virtqueue) -> bool:
        """Take what is in a queue, but no more than a ring's worth; whether there may be more."""
        return False

    def features_changed(self) -> None:
        """The driver has accepted other features."""

    def was_reset(self) -> None:
        """Everything else has been reset."""

    # What transports call.

    def notified(self, index: int) -> None:
        """The driver has made buffers available in a queue."""
        if index >= len(self.queues):
            return
        queue = self.queues[index]
        if not queue.desc:
            return
        delay = self.latency()
        if not delay:
            if self.serve(queue):
                self._later(queue, 1)
        elif not queue.scheduled:
            self._later(queue, delay)

    def _later(self, queue: Virtqueue, delay: int) -> None:
        queue.scheduled = True
        self.events.after(delay, self._serve_late, queue)

    def _serve_late(self, queue: Virtqueue) -> None:
        queue.scheduled = False
        if queue.index >= len(self.queues) or self.queues[queue.index] is not queue:
            return  # the driver has negotiated it away since
        # A turn has an end, though a ring may be made to refill itself.
        if self.serve(queue) and not queue.scheduled:
            self._later(queue, 1)

    def accept_features(self, value: int) -> None:
        """The driver's choice of features; too late once FEATURES_OK is set."""
        if not self.status & Status.FEATURES_OK:
            self._take_features(value)

    def _take_features(self, value: int) -> None:
        self.accepted = value & self.offered
        event_idx = bool(self.accepted & Feature.EVENT_IDX)
        if event_idx != self.event_idx:
            self.event_idx = event_idx
            for queue in self.queues:
                queue.map()
        self.features_changed()

    def set_status(self, value: int) -> None:
        """The driver wrote a status other than 0."""
        self.status = value

    def set_disabled(self, disabled: bool) -> None:
        """Stop, or go on, taking buffers and interrupting."""
        self.disabled = disabled
        self.stopped = disabled or self.broken

    def reset(self) -> None:
        """As after power on, but for the generation of the configuration."""
        self.status = 0
        self.broken = self.disabled = self.stopped = False
        self.isr = 0
        for queue in self.queues:
            queue.reset()
        self._take_features(0)
        self.was_reset()

    # What the device itself calls.

    def error(self, why: str) -> None:
        """The driver has broken a rule; says so by DEVICE_NEEDS_RESET and is quiet from then on."""
        self.complaints = [*self.complaints[-9:], why]
        if self.accepted & Feature.VERSION_1:
            self.status |= Status.NEEDS_RESET
            self.notify_config()
        self.broken = self.stopped = True

    def notify_config(self) -> None:
        """Tell the driver, if there is one, that the configuration has changed."""
        if self.status & Status.DRIVER_OK:
            self.isr |= 3
            self.generation = (self.generation + 1) & 0xFFFFFFFF
            if not self.stopped:
                self.transport.config_changed()

    def complete(self, queue: Virtqueue, chain: Chain, written: int) -> None:
        """Give a chain back, and interrupt if the driver wants to know."""
        queue.push(chain, written)
        if queue.should_interrupt():
            interrupt = self.transport.interrupt
            interrupt(queue.index)

    def store(self, address: int, data: int) -> None:
        """Write a message that is not for an interrupt controller: four bytes of RAM, if any.

        What else may be there, the device's own registers included, hears nothing.
        """
        if self.memory.contains(address, 4):
            self.memory.write(address, data.to_bytes(4, "little"))

    # The configuration space, as both transports reach it.

    def read_config(self, offset: int, size: int) -> int:
        """1, 2 or 4 bytes, little endian; all ones where there is nothing."""
        config = self.config()
        if offset + size > len(config):
            return (1 << 8 * size) - 1
        return int.from_bytes(config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The same, written; ignored where there is nothing."""
        config = bytearray(self.config())
        if offset + size <= len(config):
            config[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            self.config_written(bytes(config))
