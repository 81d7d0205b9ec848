# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's device interrupts: who they belong to, where they go, how to move them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..cpus import format_cpus, parse_cpus
from ..errors import GuestError, UsageError

__all__ = ["Interrupts", "Shell", "Vector", "parse"]

# One trip into the guest: under TCG each process started there costs
# milliseconds, so grep prints every file with its name in one go.
SNAPSHOT = (
    "cat /proc/interrupts; echo ==; "
    "grep -s . /proc/irq/*/smp_affinity_list /proc/irq/*/effective_affinity_list; echo ==; "
    "cd /sys/bus/virtio/devices && ls -l */driver; echo ==; "
    "cat /sys/devices/system/cpu/online"
)
BATCH = 50  # interrupts a command; dropbear takes none longer than 9,000 bytes
# "virtio0-req.1" and "virtio0-config" (virtio-pci, and virtio-mmio with MSI or VIS), or
# plain "virtio0" for virtio-mmio's one line.
ACTION = re.compile(r"(virtio\d+)(?:-(\S+))?")
ROW = re.compile(r"\s*(\d+):((?:\s+\d+)+)\s+(.*)")
AFFINITY = re.compile(r"/proc/irq/(\d+)/(smp|effective)_affinity_list:(.*)")
DRIVER = re.compile(r"(virtio\d+)/driver -> .*/(\S+)")


class Completed(Protocol):
    """A command that ended."""

    @property
    def status(self) -> int: ...
    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...


class Shell(Protocol):
    """Something that runs commands in the guest."""

    def run(self, command: str, *, deadline: float = ..., check: bool = ...) -> Completed:
        """Run ``command``; raises GuestError if ``check`` and it fails."""


@dataclass(frozen=True)
class Vector:
    """One interrupt of one virtio device.

    ``source`` is the queue's name ("req.0"), "config", or "" where a single
    line serves the whole device. ``counts`` are interrupts taken so far by CPU
    number. ``affinity`` is what was asked for, ``effective`` where it goes.
    """

    irq: int
    device: str
    driver: str
    source: str
    chip: str
    counts: dict[int, int]
    affinity: frozenset[int]
    effective: frozenset[int]

    @property
    def queue(self) -> int | None:
        """The request queue's number; None for anything else."""
        match = re.fullmatch(r"req\.(\d+)", self.source)
        return int(match[1]) if match else None


class Interrupts:
    """The interrupts of one guest."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def vectors(self) -> list[Vector]:
        """All interrupts of virtio devices, by IRQ number."""
        return parse(self._shell.run(SNAPSHOT).stdout)[0]

    def set_affinity(self, irq: int, cpus: str | Iterable[int]) -> Vector:
        """Send interrupt ``irq`` to ``cpus`` ("0-2,5" or numbers); the vector as it is then.

        Raises :class:`UsageError` for an interrupt or CPU that is not there, and
        :class:`GuestError` with the kernel's reason when it refuses.
        """
        wanted = parse_cpus(cpus) if isinstance(cpus, str) else frozenset(cpus)
        vectors, online = parse(self._shell.run(SNAPSHOT).stdout)
        if not wanted or not wanted <= online:
            missing = format_cpus(wanted - online) or "none"
            raise UsageError(
                f"no such CPU in the guest: {missing}; it has {format_cpus(online)} online"
            )
        if irq not in {vector.irq for vector in vectors}:
            known = ", ".join(str(vector.irq) for vector in vectors)
            raise UsageError(f"no virtio device of the guest uses IRQ {irq}; there are {known}")
        return self._move({irq: wanted})[irq]

    def spread(self) -> list[Vector]:
        """Give each queue's vector a CPU of its own, round robin; the vectors as they are then.

        Configuration vectors stay where they are. Raises :class:`UsageError`
        when the devices have one line each, which nothing can spread.
        """
        vectors, online = parse(self._shell.run(SNAPSHOT).stdout)
        queues = [v for v in vectors if v.source not in ("", "config")]
        if not queues:
            raise UsageError(
                "the guest's devices have one interrupt line each for all their queues, so "
                "queues cannot be spread: use --transport vis, msi or pci"
            )
        targets: dict[int, frozenset[int]] = {}
        order = sorted(online)
        for device in sorted({vector.device for vector in queues}):
            mine = [vector for vector in queues if vector.device == device]
            for position, vector in enumerate(mine):
                targets[vector.irq] = frozenset({order[position % len(order)]})
        moved = self._move(targets)
        return [moved.get(vector.irq, vector) for vector in vectors]

    def _move(self, targets: dict[int, frozenset[int]]) -> dict[int, Vector]:
        refused, reasons = [], []
        items = list(targets.items())
        for start in range(0, len(items), BATCH):
            script = "; ".join(
                f"echo {format_cpus(cpus)} > /proc/irq/{irq}/smp_affinity_list || echo {irq}"
                for irq, cpus in items[start : start + BATCH]
            )
            done = self._shell.run(script)
            refused += done.stdout.split()
            reasons.append(done.stderr.strip())
        if refused:
            raise GuestError(
                f"the guest's kernel refuses to move IRQ {refused[0]} "
                f"({' '.join(reasons) or 'no reason'}); "
                "an interrupt that it manages itself cannot be moved",
                stage="irq",
            )
        return {vector.irq: vector for vector in self.vectors() if vector.irq in targets}


def parse(snapshot: str) -> tuple[list[Vector], frozenset[int]]:
    """The vectors and the online CPUs in what :data:`SNAPSHOT` printed."""
    try:
        table, affinities, drivers, online = snapshot.split("==\n")
        header, *rows = table.splitlines()
        present = parse_cpus(online)
        cpus = [int(word.removeprefix("CPU")) for word in header.split()]
        allowed: dict[tuple[int, str], frozenset[int]] = {
            (int(match[1]), match[2]): parse_cpus(match[3])
            for match in AFFINITY.finditer(affinities)
        }
        driver = {match[1]: match[2] for match in DRIVER.finditer(drivers)}
        vectors = []
        for row in rows:
            match = ROW.fullmatch(row)
            if not match:
                continue
            chip, _, action = match[3].rpartition(" ")
            named = ACTION.fullmatch(action)
            if not named:
                continue
            irq = int(match[1])
            asked = allowed.get((irq, "smp"), frozenset(cpus))
            vectors.append(
                Vector(
                    irq=irq,
                    device=named[1],
                    driver=driver.get(named[1], "?"),
                    source=named[2] or "",
                    chip=" ".join(chip.split()),
                    counts=dict(zip(cpus, map(int, match[2].split()), strict=True)),
                    affinity=asked,
                    effective=allowed.get((irq, "effective"), asked),
                )
            )
    except (ValueError, IndexError, UsageError) as problem:
        raise GuestError(
            f"cannot read the guest's interrupts: {problem}",
            stage="irq",
            tail=snapshot.splitlines()[-15:],
        ) from problem
    return sorted(vectors, key=lambda vector: vector.irq), present
