# SPDX-License-Identifier: GPL-2.0-or-later
"""What an emulated machine is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..spec import MachineSpec
from ..transport import Transport
from ..x86 import Platform

__all__ = ["Config", "DeviceSpec"]


@dataclass(frozen=True)
class DeviceSpec:
    """One virtio device: ``kind`` is "blk", "net", "rng" or "console", ``id`` QEMU's name of it."""

    kind: str
    id: str
    queues: int = 1  # request queues of a blk, queue pairs of a net; others have what they have


@dataclass(frozen=True)
class Config:
    """A machine. ``memory`` is in MiB; devices come up in their order.

    ``at_once`` completes what a guest asks for before its notification returns (no
    ioeventfd, no latency), as QEMU's machines do that count instructions.
    """

    transport: Transport = Transport.MSI
    smp: int = 2
    memory: int = 512
    platform: Platform = field(default_factory=Platform)
    devices: tuple[DeviceSpec, ...] = ()
    at_once: bool = False

    @classmethod
    def of(cls, spec: MachineSpec) -> Config:
        """The machine of ``spec``, with the devices that QEMU's backends give it."""
        return cls(
            transport=spec.transport,
            smp=spec.smp,
            memory=spec.memory,
            platform=spec.platform or Platform(),
            devices=(
                DeviceSpec("blk", "blk0", spec.queues),
                DeviceSpec("net", "nic0"),
                DeviceSpec("rng", "random0"),
            ),
        )
