# SPDX-License-Identifier: GPL-2.0-or-later
"""Which machines a sweep looks at: all combinations of lists, but for those that cannot be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

from ..errors import UsageError
from ..transport import Transport
from ..x86 import Apic, Irqchip, Platform

__all__ = ["AXES", "DEFAULTS", "LARGEST", "Grid", "Point"]

LARGEST = 100_000  # points
MOST_REQUESTS = 1_000_000
XAPIC_CPUS = 255  # IDs of eight bits, of which 0xff is everybody (SDM volume 3, 11.4.6)

E = TypeVar("E", bound=StrEnum)


@dataclass(frozen=True)
class Point:
    """One machine, and what is asked of it."""

    transport: Transport
    smp: int
    queues: int  # of each disk
    rate: int  # requests per second of modelled time, offered to each queue
    apic: Apic
    apicv: bool
    pv_eoi: bool
    irqchip: Irqchip
    disks: int
    requests: int  # in all

    @property
    def platform(self) -> Platform:
        """The switches among its parameters."""
        return Platform(self.irqchip, self.apic, self.apicv, self.pv_eoi)

    @property
    def possible(self) -> bool:
        """Whether there can be such a machine (:func:`~qvis.emulated.machine.check`)."""
        in_kvm = self.apic is Apic.X2APIC or self.apicv or self.pv_eoi
        if self.irqchip is Irqchip.OFF and in_kvm:
            return False
        if self.irqchip is Irqchip.ON and self.transport is Transport.INTX:
            return False
        return self.apic is Apic.X2APIC or self.smp <= XAPIC_CPUS

    def parameters(self) -> dict[str, Any]:
        """What tells it from other points, as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        shape = f"{self.smp} vCPUs, {self.disks} x {self.queues} queues, {self.rate}/s"
        return f"{self.transport}, {shape}, {self.platform.description}"


def _number(most: int, axis: str, word: str) -> int:
    try:
        value = int(word)
    except ValueError:
        raise UsageError(f"--{axis}: {word!r} is no whole number") from None
    if not 1 <= value <= most:
        raise UsageError(f"--{axis} must be between 1 and {most}, not {value}")
    return value


def _choice(kind: type[E], axis: str, word: str) -> E:
    try:
        return kind(word)
    except ValueError:
        raise UsageError(f"unknown {axis} {word!r}: choose one of {', '.join(kind)}") from None


def _switch(axis: str, word: str) -> bool:
    if word not in ("on", "off"):
        raise UsageError(f"--{axis}: {word!r} is neither on nor off")
    return word == "on"


AXES: Mapping[str, Callable[[str, str], Any]] = {
    "transport": lambda axis, word: Transport.parse(word),
    "smp": partial(_number, 1024),
    "queues": partial(_number, 256),
    "rate": partial(_number, 1_000_000_000),
    "apic": partial(_choice, Apic),
    "apicv": _switch,
    "pv-eoi": _switch,
    "irqchip": partial(_choice, Irqchip),
    "disks": partial(_number, 1024),
}
"""The lists of which a grid is made, in the order in which it varies them, the last first."""

DEFAULTS: Mapping[str, str] = {
    "transport": "pci,intx,msi,vis",
    "smp": "4",
    "queues": "4",
    "rate": "10000",
    "apic": "x2apic",
    "apicv": "off",
    "pv-eoi": "off",
    "irqchip": "split",
    "disks": "1",
}
"""What a list is that nobody gave."""


@dataclass(frozen=True)
class Grid:
    """All combinations of the values of each axis, each with as many requests."""

    values: Mapping[str, tuple[Any, ...]]  # by axis, as AXES orders them
    requests: int

    @classmethod
    def parse(cls, lists: Mapping[str, str], requests: int) -> Grid:
        """The grid of lists such as ``{"smp": "1,4"}``, with :data:`DEFAULTS` for the rest.

        Raises :class:`UsageError` for a value that cannot be, an empty list, too many
        points, and if not one of the points is possible.
        """
        if not 1 <= requests <= MOST_REQUESTS:
            raise UsageError(f"--requests must be between 1 and {MOST_REQUESTS}, not {requests}")
        values = {}
        for axis, parse in AXES.items():
            words = [word.strip() for word in lists.get(axis, DEFAULTS[axis]).split(",")]
            if not all(words):
                raise UsageError(f"--{axis}: a value is missing: write it as {DEFAULTS[axis]}")
            values[axis] = tuple(dict.fromkeys(parse(axis, word) for word in words))
        grid = cls(values, requests)
        if grid.size > LARGEST:
            raise UsageError(f"a grid of {grid.size} points: {LARGEST} is the most")
        if not any(True for _ in grid.points()):
            raise UsageError(
                "no such machine: x2APIC, APICv and PV EOI need local APICs in KVM (--irqchip "
                f"on or split), and more than {XAPIC_CPUS} vCPUs need --apic x2apic"
            )
        return grid

    @property
    def size(self) -> int:
        """How many combinations there are."""
        return math.prod(map(len, self.values.values()))

    def points(self) -> Iterator[Point]:
        """The possible ones."""
        names = [axis.replace("-", "_") for axis in self.values]
        for values in itertools.product(*self.values.values()):
            point = Point(**dict(zip(names, values, strict=True)), requests=self.requests)
            if point.possible:
                yield point
