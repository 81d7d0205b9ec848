# SPDX-License-Identifier: GPL-2.0-or-later
"""Patch, build, boot and drive virtio guests, and see what every interrupt costs.

    import qvis

    with qvis.up(transport="msi", smp=4, queues=4) as vm:
        for vector in vm.irqs.vectors():
            print(vector.irq, vector.device, vector.source, vector.counts)

Everything public is here; the rest may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    BootError,
    BuildError,
    GuestError,
    InfraError,
    LostMachineError,
    QvisError,
    UsageError,
)
from .transport import Transport
from .x86 import Apic, Irqchip, Platform

if TYPE_CHECKING:
    from .machine.machine import Machine, up

__all__ = [
    "Apic",
    "BootError",
    "BuildError",
    "GuestError",
    "InfraError",
    "Irqchip",
    "LostMachineError",
    "Machine",
    "Platform",
    "QvisError",
    "Transport",
    "UsageError",
    "up",
]


def __getattr__(name: str) -> Any:
    # paramiko and asyncio take a tenth of a second to import, which `qvis exec`
    # and `qvis ls` do not need to spend.
    if name in ("Machine", "up"):
        from .machine import machine

        return getattr(machine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
