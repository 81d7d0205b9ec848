# SPDX-License-Identifier: GPL-2.0-or-later
"""What exits and other steps cost, in modelled cycles, and who says so.

A table is a TOML file::

    frequency = 2000000000                 # cycles a second

    [exits."EPT_MISCONFIG/user"]           # KVM's name of the reason, and who handles it
    cycles = 9000                          # from leaving guest mode to being back
    source = "..."                         # who measured it, where; or "assumed: why"

    [steps.line]                           # a key of STEPS
    cycles = 3000
    source = "..."

``user`` is QEMU behind an exit to user space, ``kernel`` is KVM, ``fast`` is KVM without
decoding an instruction or before it is all the way out (``kvm_fast_mmio``,
``EXIT_FASTPATH_*`` in ``arch/x86/kvm``).
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..errors import UsageError

__all__ = ["EXITS", "STEPS", "Cost", "Costs", "Handler", "Reason"]

FREQUENCY = 2_000_000_000
"""Cycles a second. Everything of this package counts in them, so no table has another."""

MOST = 20_000_000
"""Cycles that a single thing may cost: 10 ms, more than under a nested hypervisor."""

LARGEST = 1 << 20
"""Bytes of a file that are read: no table is as long."""


class Reason(StrEnum):
    """Why a vCPU leaves guest mode, by KVM's names (``VMX_EXIT_REASONS`` in ``uapi/asm/vmx.h``)."""

    EXTERNAL_INTERRUPT = "EXTERNAL_INTERRUPT"
    INTERRUPT_WINDOW = "INTERRUPT_WINDOW"
    CPUID = "CPUID"
    HLT = "HLT"
    IO_INSTRUCTION = "IO_INSTRUCTION"
    MSR_READ = "MSR_READ"
    MSR_WRITE = "MSR_WRITE"
    APIC_ACCESS = "APIC_ACCESS"
    EOI_INDUCED = "EOI_INDUCED"
    EPT_MISCONFIG = "EPT_MISCONFIG"
    PREEMPTION_TIMER = "PREEMPTION_TIMER"
    APIC_WRITE = "APIC_WRITE"


class Handler(StrEnum):
    """Who deals with an exit."""

    FAST = "fast"
    KERNEL = "kernel"
    USER = "user"


@dataclass(frozen=True)
class Cost:
    """Modelled cycles, and who says that it is so many."""

    cycles: int
    source: str


EXITS = tuple(
    (reason, handler)
    for reason, handlers in {
        Reason.EXTERNAL_INTERRUPT: "kernel user",
        Reason.INTERRUPT_WINDOW: "kernel user",
        Reason.CPUID: "kernel",
        Reason.HLT: "kernel user",
        Reason.IO_INSTRUCTION: "kernel user",
        Reason.MSR_READ: "kernel",
        Reason.MSR_WRITE: "fast kernel user",
        Reason.APIC_ACCESS: "fast kernel user",
        Reason.EOI_INDUCED: "kernel user",
        Reason.EPT_MISCONFIG: "fast kernel user",
        Reason.PREEMPTION_TIMER: "fast",
        Reason.APIC_WRITE: "kernel",
    }.items()
    for handler in map(Handler, handlers.split())
)
"""Every kind of exit that a machine can have. A table has all of them."""

STEPS = {
    "ioeventfd": "from the kick of a queue to the device's thread at work on it",
    "service": "what a device does for a request",
    "line": "from a device's line or message to the local APIC by an ioctl of QEMU's",
    "signal": "from QEMU's local APIC to a vCPU's thread, when both are in user space",
    "notify": "from a local APIC in KVM to a vCPU that runs: the IPI from CPU to CPU",
    "posted": "what a processor does to deliver what was posted to it",
    "wake": "from a local APIC to a halted vCPU in guest mode",
    "entry": "a guest's entry through the IDT and its way back, without handler and EOI",
    "handler": "what a guest does for an interrupt that is no access",
    "virtual": "an access to a virtual APIC that does not exit",
    "pv_eoi": "an EOI that is a bit in memory",
}
"""What takes time and is no exit."""


@dataclass(frozen=True)
class Costs:
    """A table of costs: of all of :data:`EXITS`, and of all of :data:`STEPS`."""

    exits: Mapping[tuple[Reason, Handler], Cost]
    steps: Mapping[str, Cost]
    frequency: int = FREQUENCY

    @classmethod
    def load(cls, path: Path | None = None) -> Costs:
        """The table in the file ``path``, or the one that comes with qvis.

        Raises :class:`UsageError`, with what is wrong with it, in one line.
        """
        path = path or Path(__file__).with_name("costs.toml")
        try:
            with path.open("rb") as file:
                data = tomllib.loads(file.read(LARGEST).decode())
        except OSError as problem:
            raise UsageError(f"cannot read {path}: {problem.strerror}") from problem
        except (ValueError, RecursionError) as problem:  # of which decoding errors are
            reason = str(problem).splitlines()[0]
            raise UsageError(f"{path} is no table of costs: {reason}") from problem
        if data.pop("frequency", FREQUENCY) != FREQUENCY:
            raise UsageError(f"{path}: frequency must be {FREQUENCY}, the nominal one")
        exits = _costs(path, "exits", data, [f"{r}/{h}" for r, h in EXITS])
        steps = _costs(path, "steps", data, list(STEPS))
        if data:
            raise UsageError(f"{path}: unknown {next(iter(data))!r}")
        return cls({key: exits[f"{key[0]}/{key[1]}"] for key in EXITS}, steps)

    @property
    def identity(self) -> str:
        """A hash of its numbers: of the same table, the same."""
        numbers = [f"{r}/{h}={cost.cycles}" for (r, h), cost in self.exits.items()]
        numbers += [f"{name}={cost.cycles}" for name, cost in self.steps.items()]
        return hashlib.sha256(" ".join(sorted(numbers)).encode()).hexdigest()[:8]

    def exit(self, reason: Reason, handler: Handler) -> int:
        """Cycles of such an exit; KeyError if it is none of :data:`EXITS`."""
        return self.exits[reason, handler].cycles

    def step(self, name: str) -> int:
        """Cycles of a step; KeyError if it is none of :data:`STEPS`."""
        return self.steps[name].cycles


def _costs(path: Path, part: str, data: dict[str, Any], keys: list[str]) -> dict[str, Cost]:
    """The costs of ``part``, each of ``keys`` and no other; takes them out of ``data``."""
    table = data.pop(part, {})
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {part} is no table")
    if unknown := sorted(table.keys() - set(keys)):
        raise UsageError(f"{path}: unknown {part}.{unknown[0]!r}; there is {', '.join(keys)}")
    if missing := [key for key in keys if key not in table]:
        raise UsageError(f"{path}: {part}.{missing[0]!r} is missing")
    found = {}
    for key, entry in table.items():
        if not isinstance(entry, dict) or entry.keys() != {"cycles", "source"}:
            raise UsageError(f"{path}: {part}.{key!r} needs cycles and a source, no more")
        cycles, source = entry["cycles"], entry["source"]
        if type(cycles) is not int or not 0 <= cycles <= MOST:
            raise UsageError(f"{path}: {part}.{key!r}: cycles must be a number from 0 to {MOST}")
        if not isinstance(source, str) or not source.strip():
            raise UsageError(f"{path}: {part}.{key!r}: who says so? source must not be empty")
        found[key] = Cost(cycles, source)
    return found
