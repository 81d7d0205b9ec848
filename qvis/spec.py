# SPDX-License-Identifier: GPL-2.0-or-later
"""What a machine shall be, before it is one."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import UsageError
from .transport import Transport
from .x86 import Apic, Irqchip, Platform

__all__ = ["MachineSpec", "parse_memory"]

MAX_CPUS = 1024
MAX_QUEUES = 256
MIN_MEMORY = 128  # MiB; less does not hold the kernel, the initramfs and SSH
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")


@dataclass(frozen=True)
class MachineSpec:
    """A guest: ``memory`` is in MiB, ``queues`` is per virtio-blk device.

    With ``icount`` its time is the instructions that it executes, so that a run
    can be repeated to the instruction (QEMU's ``-icount``; TCG only). ``platform``
    is what of x86's interrupt hardware there is, None for what the backend has, and
    ``costs`` a file with what exits cost, of ``qvis calibrate``; both are for
    backends that model them, and each backend may have narrower bounds.

    Raises :class:`UsageError`, naming the bound, for a value out of range.
    """

    name: str
    transport: Transport = Transport.MSI
    smp: int = 2
    memory: int = 512
    queues: int = 2
    icount: bool = False
    platform: Platform | None = None
    costs: str | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"bad machine name {self.name!r}: up to 32 letters, digits, '.', '_' or '-', "
                "the first one a letter or digit"
            )
        _within("--smp", self.smp, 1, MAX_CPUS)
        _within("--queues", self.queues, 1, MAX_QUEUES)
        _within("--memory (MiB)", self.memory, MIN_MEMORY, 1024 * 1024)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; :meth:`from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MachineSpec:
        """The specification that :meth:`to_json` wrote."""
        # One that an older qvis wrote lacks what is newer, which then is as if not asked for.
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        if platform := known.get("platform"):
            irqchip, apic = Irqchip(platform["irqchip"]), Apic(platform["apic"])
            known["platform"] = Platform(**{**platform, "irqchip": irqchip, "apic": apic})
        return cls(**{**known, "transport": Transport(known["transport"])})


def parse_memory(text: str) -> int:
    """``512``, ``512M`` or ``2G`` in MiB; :class:`UsageError` for anything else."""
    match = re.fullmatch(r"(\d+)(?:([MG])(?:i?B)?)?", text, re.IGNORECASE)
    if not match:
        raise UsageError(f"bad memory size {text!r}: write it as 512M or 2G")
    return int(match[1]) * (1024 if match[2] in ("G", "g") else 1)


def _within(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UsageError(f"{what} must be between {least} and {most}, not {value}")
