# SPDX-License-Identifier: GPL-2.0-or-later
"""What a trace is made of: events of one shape, whoever recorded them.

A row is something that happened at one ``time`` on one ``vcpu``. Readers fill
what their source knows; :mod:`qvis.trace.attribution` adds whose register it
was and why it was touched. ``time`` orders the events of a machine;
``clock`` is what costs are counted in, and its unit is the manifest's.
"""

from __future__ import annotations

from enum import StrEnum

import polars as pl

__all__ = ["SCHEMA", "Cause", "Clock", "Kind", "Space", "empty"]


class Kind(StrEnum):
    """What happened."""

    ACCESS = "access"
    """A guest touched a register. On TCG nothing exits, so it is never called an exit."""
    EXIT = "exit"
    """A vCPU left guest mode, for ``reason``, until ``duration`` later."""
    RAISE = "raise"
    """A device or an interrupt controller asked for ``vector`` to be delivered."""
    DELIVER = "deliver"
    """A vCPU took ``vector``; it was at ``pc``."""
    FUNCTION = "function"
    """A vCPU entered ``function`` of the guest's kernel."""
    EOI = "eoi"
    """An interrupt controller saw the end of ``vector``."""


class Cause(StrEnum):
    """Why a register was touched."""

    STATUS = "interrupt status"
    ACKNOWLEDGE = "acknowledge"
    EOI = "EOI"
    MASK = "mask"
    UNMASK = "unmask"
    ROUTE = "route change"
    NOTIFY = "notify"
    CONFIGURATION = "configuration"
    SETUP = "set-up"
    TIMER = "timer"
    IPI = "IPI"
    CONSOLE = "console"
    OTHER = "other"


class Space(StrEnum):
    """What ``address`` is an address in."""

    MEMORY = "memory"
    PORT = "port"
    MSR = "msr"


class Clock(StrEnum):
    """The unit of ``clock`` and ``duration``. Two of them are never compared."""

    INSTRUCTIONS = "instructions"  # that the vCPU executed
    TSC = "TSC cycles"
    NANOSECONDS = "nanoseconds"
    MODELLED = "modelled cycles"
    NONE = "none"  # there are orders of events, and no measure of time


_COLUMNS: dict[str, pl.DataType | type[pl.DataType]] = {
    "time": pl.Int64,  # ns of the recording host's monotonic clock
    "clock": pl.UInt64,  # of this vCPU, in the manifest's unit; null: the source has none
    "vcpu": pl.UInt16,  # of a raise its target; null: not on a vCPU, or more than one
    "kind": pl.Enum(Kind),
    "space": pl.Enum(Space),
    "address": pl.UInt64,  # guest-physical, port or MSR number; null: no register
    "size": pl.UInt8,  # bytes
    "write": pl.Boolean,
    "value": pl.UInt64,  # written or read; a function's first argument
    "vector": pl.UInt8,  # of the x86 local APIC
    "function": pl.Categorical(),
    "pc": pl.UInt64,
    "reason": pl.Categorical(),  # KVM's name of an exit reason, such as EPT_MISCONFIG
    "duration": pl.UInt64,  # of an exit, in the unit of clock
    "user": pl.Boolean,  # of an exit: whether it went on to user space; null: not known
    # From here on filled by attribution.
    "device": pl.Categorical(),  # as the machine calls it: "blk0", "IOAPIC", "LAPIC"
    "register": pl.Categorical(),  # as its specification calls it: "InterruptStatus"
    "cause": pl.Enum(Cause),
    "source": pl.Categorical(),  # what of the device interrupted: "req.1", "config"
    "irq": pl.UInt16,  # Linux's number
    "interrupt": pl.UInt32,  # links raise, deliver, handler and EOI of one interrupt
}
SCHEMA = pl.Schema(_COLUMNS)


def empty() -> pl.DataFrame:
    """A trace in which nothing happened."""
    return SCHEMA.to_frame()
