# SPDX-License-Identifier: GPL-2.0-or-later
"""The transports that qvis compares. Nothing else branches on which one it is."""

from __future__ import annotations

from enum import StrEnum

from .errors import UsageError

__all__ = ["COMPARED", "Transport"]

VECTORS = 64  # the least that a virtio-mmio device with MSI or VIS offers


class Transport(StrEnum):
    """How a guest's virtio devices are reached and how they interrupt.

    ``PCI``   virtio over PCI with MSI-X, the yardstick;
    ``INTX``  virtio over MMIO as it is upstream: one line for a whole device;
    ``MSI``   virtio over MMIO with ``VIRTIO_F_MMIO_MSI``: one vector a queue;
    ``VIS``   virtio over MMIO with ``VIRTIO_F_VIS``: likewise, and what says where a
              vector goes and whether it is masked is in the guest's memory;
    ``VIS_DOORBELL``  the same with a device that keeps copies of where, as a host
              with cached routes does, and so has to be told of a change.
    """

    PCI = "pci"
    INTX = "intx"
    MSI = "msi"
    VIS = "vis"
    VIS_DOORBELL = "vis-doorbell"

    @classmethod
    def parse(cls, name: str) -> Transport:
        """The transport of that name; :class:`UsageError` names those there are."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(cls)
            raise UsageError(f"unknown transport {name!r}: choose one of {known}") from None

    @property
    def vector_per_queue(self) -> bool:
        """Whether each queue can be steered to a CPU of its own."""
        return self is not Transport.INTX

    @property
    def storage(self) -> bool:
        """Whether messages and mask bits are in the guest's memory (VIS)."""
        return self in (Transport.VIS, Transport.VIS_DOORBELL)

    def device(self, kind: str) -> str:
        """QEMU's name of the ``virtio-<kind>`` device on this transport."""
        return f"virtio-{kind}-{'pci' if self is Transport.PCI else 'device'}"

    def machine_options(self) -> dict[str, str]:
        """Options of ``-M microvm`` that differ from the other transports'."""
        return {"pcie": "on"} if self is Transport.PCI else {}

    def properties(self, queues: int, *, at_once: bool) -> list[str]:
        """``-global`` settings for devices with up to ``queues`` queues.

        ``at_once`` has a vCPU that notifies a device wait for what it does, rather
        than hand it to another thread.
        """
        settings = []
        if self is Transport.PCI:
            settings.append("virtio-net-pci.romfile=")  # nothing boots over the network
        elif self.vector_per_queue:
            settings.append(f"virtio-mmio.vectors={max(VECTORS, queues + 1)}")
        if self.storage:
            settings.append("virtio-mmio.vis=on")
        if self is Transport.VIS_DOORBELL:
            settings.append("virtio-mmio.vis-cache-entries=on")
        if at_once:
            proxies = ["virtio-mmio"]
            if self is Transport.PCI:
                proxies = [self.device(kind) for kind in ("blk", "net")]
            settings += [f"{proxy}.ioeventfd=off" for proxy in proxies]
        return settings


COMPARED = (Transport.PCI, Transport.INTX, Transport.MSI, Transport.VIS)
"""What is put side by side where nothing else was asked for."""
