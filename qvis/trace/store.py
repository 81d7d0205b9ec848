# SPDX-License-Identifier: GPL-2.0-or-later
"""A trace on disk: a folder that says all that is needed to read it.

::

    manifest.json    where it came from, whether it is whole (:class:`Manifest`)
    raw/             what the recorder wrote, untouched
    events/*.parquet attributed events in order of time (:data:`~qvis.trace.model.SCHEMA`)
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from ..errors import UsageError
from .model import SCHEMA, Clock, Kind, Space

__all__ = ["Irq", "Manifest", "Provenance", "Region", "Trace"]

FORMAT = 1
MANIFEST = "manifest.json"
RAW = "raw"
EVENTS = "events"


@dataclass(frozen=True)
class Provenance:
    """Where numbers come from. Those of two traces compare if :meth:`clashes` is empty."""

    reader: str  # "tcg-plugin", "kvm-tracepoints", ...
    clock: Clock
    backend: str
    accelerator: str
    qemu: str
    qemu_series: str
    linux: str
    linux_series: str
    host: str  # CPU model and kernel of the machine that ran it
    machine: str  # names that machine without telling which it is
    transport: str
    smp: int
    queues: int
    memory: int  # MiB
    host_linux: str = ""  # the inner host's kernel; empty: there is none
    kvm_series: str = ""  # and the patches to its KVM

    @property
    def touch(self) -> Kind:
        """What a guest that touches a register does: nothing exits on TCG."""
        return Kind.ACCESS if self.accelerator.startswith("tcg") else Kind.EXIT

    def clashes(self, other: Provenance) -> list[str]:
        """What forbids to compare with ``other``, in words; the transport may differ."""
        return [
            f"{name}: {mine} against {theirs}"
            for name in ("clock", "reader", "backend", "accelerator", "machine", "host", "smp",
                         "queues", "memory", "qemu", "qemu_series", "linux", "linux_series",
                         "host_linux", "kvm_series")
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]  # fmt: skip

    def line(self) -> str:
        """All of it in one line, to stand beside a figure."""
        inner = f" in Linux {self.host_linux} (KVM: {self.kvm_series})" if self.host_linux else ""
        return (
            f"{self.transport}, {self.smp} vCPUs, {self.memory} MiB, {self.queues} queues; "
            f"{self.backend} "
            f"({self.accelerator}); QEMU {self.qemu} ({self.qemu_series}), Linux {self.linux} "
            f"({self.linux_series}){inner}; {self.reader}, clock: {self.clock}; {self.host}"
        )


@dataclass(frozen=True)
class Region:
    """Addresses that belong to a device, and the register map that names what is there."""

    device: str  # "blk0", "IOAPIC", "LAPIC"
    map: str  # a key of qvis.trace.registers.MAPS, or QEMU's name of a region that has no map
    space: Space
    start: int
    end: int  # first address that does not belong


@dataclass(frozen=True)
class Irq:
    """A Linux interrupt number of a device while the trace was recorded."""

    irq: int
    device: str  # as in Region
    source: str  # "req.1", "config", or "" for a line that serves the whole device
    # Where it was delivered all the time; None: not there, or not known.
    cpu: int | None = None
    vector: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What a trace says of itself."""

    provenance: Provenance
    machine: str  # the machine's name
    command: str | None  # what ran in the guest meanwhile; None: from boot to shutdown
    status: int | None  # with what it ended; None: it did not
    started: float  # seconds since the epoch
    seconds: float  # how long was recorded
    events: int = 0
    lost: int = 0  # events that were seen and not kept, by the recorder's own count
    partial: tuple[str, ...] = ()  # why this is not all, each a sentence; empty: it is
    regions: tuple[Region, ...] = ()
    irqs: tuple[Irq, ...] = ()
    format: int = field(default=FORMAT)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """The manifest that :meth:`to_json` wrote; KeyError, TypeError or ValueError if not."""
        source = data["provenance"]
        regions = (Region(**{**r, "space": Space(r["space"])}) for r in data["regions"])
        return cls(
            **{
                **data,
                "provenance": Provenance(**{**source, "clock": Clock(source["clock"])}),
                "partial": tuple(data["partial"]),
                "regions": tuple(regions),
                "irqs": tuple(Irq(**irq) for irq in data["irqs"]),
            }
        )


@dataclass(frozen=True)
class Trace:
    """A trace in the folder ``path``."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Trace:
        """The trace in folder ``path``.

        Raises :class:`UsageError` when there is none, when its manifest is
        damaged, or when it has a format that this version does not read.
        """
        file = path / MANIFEST
        try:
            data = json.loads(file.read_text())
            version = data["format"]
        except FileNotFoundError:
            raise UsageError(f"{path} is no trace: it has no {MANIFEST}") from None
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise UsageError(f"{file} is damaged: {problem!r}") from problem
        if version != FORMAT:
            raise UsageError(f"{path} has format {version}; this qvis reads {FORMAT} only")
        try:
            return cls(path, Manifest.from_json(data))
        except (KeyError, TypeError, ValueError) as problem:
            raise UsageError(f"{file} is damaged: {problem!r}") from problem

    def events(self) -> pl.LazyFrame:
        """The events in order of time, to be collected in part or streamed.

        Columns are those of :data:`~qvis.trace.model.SCHEMA`. Raises
        :class:`UsageError` when they are not there, or not all, or damaged.
        """
        parts = sorted((self.path / EVENTS).glob("*.parquet"))
        again = f"`qvis trace attribute {self.path}` makes them of what was recorded"
        if not (self.path / EVENTS).is_dir():
            raise UsageError(f"{self.path} has no events yet: {again}")
        try:
            events = pl.scan_parquet(parts) if parts else SCHEMA.to_frame().lazy()
            # What was written before there was such a column does not tell of it.
            told = events.collect_schema().names()
            missing = [pl.lit(None, SCHEMA[name]).alias(name) for name in set(SCHEMA) - set(told)]
            if missing:
                events = events.with_columns(missing).select(SCHEMA.names())
            count = events.select(pl.len()).collect().item()
        except (pl.exceptions.PolarsError, OSError) as problem:
            reason = str(problem).splitlines()[0]
            raise UsageError(f"the events of {self.path} are damaged ({reason}): {again}") from None
        if count != self.manifest.events:
            raise UsageError(
                f"{self.path} has {count} of its {self.manifest.events} events: {again}"
            )
        return events

    def write_manifest(self) -> None:
        """Put the manifest into the folder, in one step."""
        temporary = self.path / f"{MANIFEST}.new"
        temporary.write_text(json.dumps(self.manifest.to_json(), indent=1) + "\n")
        temporary.rename(self.path / MANIFEST)
