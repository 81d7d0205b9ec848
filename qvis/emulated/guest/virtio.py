# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio as Linux has it: devices, what transports do for them, and drivers.

Linux: drivers/virtio/virtio.c; virtio 1.3, section 3.1 (device initialization).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Protocol

from .ring import Ring

if TYPE_CHECKING:
    from ..machine import Attached
    from ..vcpu import Vcpu
    from .irq import IrqDesc
    from .kernel import Kernel

__all__ = [
    "Driver",
    "Parent",
    "ProbeError",
    "QueueInfo",
    "Status",
    "VirtioDevice",
    "spread",
]

VERSION_1 = 1 << 32
RING_FEATURES = 1 << 28 | 1 << 29 | VERSION_1  # indirect descriptors, event index
TRANSPORT_FEATURES = range(28, 42)


class ProbeError(Exception):
    """A driver does not want a device, or cannot drive it."""


class Status(IntFlag):
    """virtio 1.3, 2.1."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


@dataclass(frozen=True)
class QueueInfo:
    """What a driver wants of a queue; without ``callback`` no interrupts."""

    name: str
    callback: Callable[[Vcpu], None] | None


def spread(queues: int, cpus: Sequence[int]) -> list[frozenset[int]]:
    """Which of ``cpus`` each of ``queues`` is for: neighbours together, first ones more
    (lib/group_cpus.c without NUMA nodes or siblings)."""
    queues = max(queues, 1)
    groups = min(queues, len(cpus))
    each, more = divmod(len(cpus), groups)
    found, at = [], 0
    for group in range(groups):
        count = each + (group < more)
        found.append(frozenset(cpus[at : at + count]))
        at += count
    return found + [frozenset()] * (queues - groups)


class Driver(Protocol):
    """What drives one virtio device."""

    name: str
    """Of the driver, as under /sys/bus/virtio/drivers."""
    features: int
    """Bits that it knows, without those of the ring and the transport."""

    def probe(self, vcpu: Vcpu) -> None:
        """Set the device up. Raises :class:`ProbeError` or OSError."""

    def remove(self, vcpu: Vcpu) -> None:
        """Reset it and free everything."""

    def config_changed(self, vcpu: Vcpu) -> None:
        """The device says that its configuration is another now."""


class Parent(ABC):
    """What a virtio device hangs on: a platform device or a PCI function.

    A subclass does its transport's accesses. ``device`` is None while the transport's driver
    is not bound, and when it did not want it.
    """

    bus = ""
    """"platform" or "pci"."""
    transport_driver = ""
    """As under /sys/bus/<bus>/drivers."""

    def __init__(self, kernel: Kernel, attached: Attached, name: str) -> None:
        self.kernel = kernel
        self.attached = attached
        self.name = name
        """As under /sys/bus/<bus>/devices."""
        self.device: VirtioDevice | None = None
        self.rings: list[Ring] = []
        self.irqs: list[IrqDesc] = []
        """Interrupts that it has now, by vector; the line is not among them."""
        self.bound = False
        """Whether the transport's driver has it."""

    def bind(self, vcpu: Vcpu) -> None:
        """Have the transport's driver probe it; OSError ENODEV if it does not want to."""
        device = self.identify(vcpu)
        self.bound = True
        self.device = device
        device.register(vcpu)

    def unbind(self, vcpu: Vcpu) -> None:
        """Take it from the transport's driver, and so the device from its own."""
        if self.device is not None:
            self.device.unregister(vcpu)
            self.device = None
        self.bound = False
        self.release(vcpu)

    def release(self, vcpu: Vcpu) -> None:
        """What the transport's driver does last."""

    def shut_down(self, vcpu: Vcpu) -> None:
        """What it does before the machine is reset or switched off."""

    # What a virtio device needs of its transport.

    @abstractmethod
    def identify(self, vcpu: Vcpu) -> VirtioDevice:
        """Look what is there; OSError ENODEV if it is nothing."""

    @abstractmethod
    def get_status(self, vcpu: Vcpu) -> int:
        """The device's status."""

    @abstractmethod
    def set_status(self, vcpu: Vcpu, status: int) -> None:
        """Likewise; 0 is not for this."""

    @abstractmethod
    def reset(self, vcpu: Vcpu) -> None:
        """Status 0."""

    @abstractmethod
    def get_features(self, vcpu: Vcpu) -> int:
        """What the device offers."""

    @abstractmethod
    def accept(self, vcpu: Vcpu, features: int, offered: int) -> int:
        """Tell it what the driver accepts, and this transport of what it offers; all of it."""

    @abstractmethod
    def config(self, vcpu: Vcpu, offset: int, size: int) -> int:
        """A field of 1, 2 or 4 bytes of the device's configuration."""

    @abstractmethod
    def generation(self, vcpu: Vcpu) -> int:
        """Another one when the configuration has changed in between."""

    @abstractmethod
    def find_queues(
        self, vcpu: Vcpu, queues: Sequence[QueueInfo], affinities: Sequence[frozenset[int]] | None
    ) -> list[Ring]:
        """Set up queues and their interrupts; ``affinities`` are those of each queue's vector.

        Raises OSError.
        """

    @abstractmethod
    def delete_queues(self, vcpu: Vcpu) -> None:
        """And back."""

    def set_queue_affinity(self, vcpu: Vcpu, ring: Ring, cpus: frozenset[int]) -> None:
        """Send a queue's interrupts to ``cpus``, if it has a vector of its own."""


class VirtioDevice:
    """A device on the virtio bus."""

    def __init__(self, parent: Parent, kind: int, vendor: int) -> None:
        kernel = parent.kernel
        self.kernel = kernel
        self.transport = parent
        self.parent = parent.name
        self.bus = "virtio-pci" if parent.bus == "pci" else "virtio-mmio"
        self.kind = kind
        """The device ID of virtio 1.3, section 5."""
        self.vendor = vendor
        number = 0
        while f"virtio{number}" in kernel.devices:
            number += 1
        self.name = f"virtio{number}"
        self.number = number
        self.features = 0
        """Those in use."""
        self.driver: str | None = None
        """Of the driver that it has; ``driving`` is its state."""
        self.driving: Driver | None = None

    @property
    def id(self) -> str:
        """QEMU's name of it, such as "blk0"."""
        return self.transport.attached.id

    @property
    def modalias(self) -> str:
        """As in sysfs."""
        return f"virtio:d{self.kind:08X}v{self.vendor:08X}"

    def _add_status(self, vcpu: Vcpu, bit: Status) -> None:
        transport = self.transport
        transport.set_status(vcpu, int(transport.get_status(vcpu) | bit))

    def register(self, vcpu: Vcpu) -> None:
        """``register_virtio_device()``, and look for a driver."""
        self.kernel.devices[self.name] = self
        self.transport.reset(vcpu)
        self._add_status(vcpu, Status.ACKNOWLEDGE)
        if self.kernel.drivers_ready:
            self.bind(vcpu, quiet=True)

    def unregister(self, vcpu: Vcpu) -> None:
        """``unregister_virtio_device()``."""
        if self.driving is not None:
            self.unbind(vcpu)
        self.kernel.devices.pop(self.name, None)

    def bind(self, vcpu: Vcpu, *, quiet: bool = False) -> None:
        """``virtio_dev_probe()``. Raises OSError if there is no driver or it cannot.

        ``quiet``: nobody asked for it, so a failure is only in the log.
        """
        make = self.kernel.drivers.get(self.kind)
        if make is None or self.driving is not None:
            if quiet:
                return
            raise OSError(19, "No such device")
        driver = make(self)
        transport = self.transport
        try:
            self._add_status(vcpu, Status.DRIVER)
            offered = transport.get_features(vcpu)
            wanted = driver.features & offered
            for bit in TRANSPORT_FEATURES:
                if RING_FEATURES >> bit & 1:
                    wanted |= offered & 1 << bit
            self.features = transport.accept(vcpu, wanted, offered)
            self._add_status(vcpu, Status.FEATURES_OK)
            self._check_features(vcpu)
            driver.probe(vcpu)
            if not transport.get_status(vcpu) & Status.DRIVER_OK:
                self.ready(vcpu)
        except (ProbeError, OSError) as problem:
            self._add_status(vcpu, Status.FAILED)
            number = problem.errno if isinstance(problem, OSError) and problem.errno else 22
            self.kernel.say(
                f"{driver.name} {self.name}: probe with driver {driver.name} failed with error "
                f"-{number}"
            )
            if not quiet:
                raise OSError(number, str(problem)) from problem
            return
        self.driver, self.driving = driver.name, driver

    def _check_features(self, vcpu: Vcpu) -> None:
        if not self.transport.get_status(vcpu) & Status.FEATURES_OK:
            raise ProbeError("device refuses features")

    def ready(self, vcpu: Vcpu) -> None:
        """``virtio_device_ready()``."""
        self._add_status(vcpu, Status.DRIVER_OK)

    def unbind(self, vcpu: Vcpu) -> None:
        """``virtio_dev_remove()``. Raises OSError ENODEV if nothing is bound."""
        driver = self.driving
        if driver is None:
            raise OSError(19, "No such device")
        driver.remove(vcpu)
        self.driver = self.driving = None
        self.features = 0
        self.transport.get_status(vcpu)  # that it is 0 by now, Linux makes sure
        self._add_status(vcpu, Status.ACKNOWLEDGE)

    def read_status(self, vcpu: Vcpu) -> int:
        """What sysfs shows: an access to the device."""
        return self.transport.get_status(vcpu)

    def config_changed(self, vcpu: Vcpu) -> None:
        """Its configuration interrupt."""
        if self.driving is not None:
            self.driving.config_changed(vcpu)
