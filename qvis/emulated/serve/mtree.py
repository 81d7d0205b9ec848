# SPDX-License-Identifier: GPL-2.0-or-later
"""``info mtree``: whose addresses are whose, in the words of QEMU's system/memory.c."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...transport import Transport
from .qom import UNATTACHED

if TYPE_CHECKING:
    from ..machine import Machine

__all__ = ["mtree"]

BIOS, BIOS_COPY = range(0xFFFF0000, 1 << 32), range(0xF0000, 0x100000)
PORTS = range(0x10000)
PARENT = f"parent:{{obj path={UNATTACHED}}}"


@dataclass(frozen=True, order=True)
class Row:
    """Addresses that are all of a region, or those at ``offset`` in it."""

    start: int
    end: int
    name: str
    owner: str
    kind: str = "i/o"
    offset: int = 0
    priority: int = 0

    def text(self, owners: bool) -> str:
        """As a line of a flat view."""
        offset = f" @{self.offset:016x}" if self.offset else ""
        owner = f" {self.owner}" if owners else ""
        return (
            f"  {self.start:016x}-{self.end - 1:016x} "
            f"(prio {self.priority}, {self.kind}): {self.name}{offset}{owner}\n"
        )


def mtree(machine: Machine, *, flat: bool, owners: bool) -> str:
    """The address spaces; what is in them overlaps nowhere, so both forms have the same rows."""
    memory = sorted([*_ram(machine), *_regions(machine, "memory")])
    ports = sorted(_regions(machine, "port"))
    if not flat:
        root = f" {PARENT}" if owners else ""
        text = ""
        for name, region, last, rows in (
            ("memory", "system", (1 << 64) - 1, memory),
            ("I/O", "io", PORTS.stop - 1, ports),
        ):
            text += f"address-space: {name}\n"
            text += f"  {0:016x}-{last:016x} (prio 0, i/o): {region}{root}\n"
            text += "".join(f"  {row.text(owners)}" for row in rows) + "\n"
        return text
    ports = sorted([*ports, *_between(ports)])
    spaces = [("memory", "system")]
    for vcpu in machine.vcpus:
        spaces += [(f"cpu-memory-{vcpu.index}", "system"), (f"cpu-smm-{vcpu.index}", "memory")]
    if machine.config.transport is Transport.PCI:
        spaces += [
            (f"{attached.device.NAME}-pci", "bus master container")
            for attached in machine.devices.values()
        ]
    text = ""
    views = (([("I/O", "io")], "io", ports), (spaces, "system", memory))
    for number, (named, region, rows) in enumerate(views):
        text += f"FlatView #{number}\n"
        text += "".join(f' AS "{name}", root: {of}\n' for name, of in named)
        text += f" Root memory region: {region}\n"
        text += "".join(row.text(owners) for row in rows) + "\n"
    return text


def _regions(machine: Machine, wanted: str) -> Iterator[Row]:
    for name, owner, space, start, end in machine.regions():
        if space == wanted:
            priority = 4096 if name.endswith("apic-msi") else 0
            yield Row(start, end, name, f"owner:{{dev {owner}}}", priority=priority)


def _ram(machine: Machine) -> Iterator[Row]:
    owner = "owner:{obj path=/objects/microvm.ram}"
    yield Row(0, BIOS_COPY.start, "microvm.ram", owner, "ram")
    yield Row(BIOS_COPY.start, BIOS_COPY.stop, "pc.bios", PARENT, "ram")
    above = BIOS_COPY.stop
    yield Row(above, machine.memory.size, "microvm.ram", owner, "ram", above)
    yield Row(BIOS.start, BIOS.stop, "pc.bios", PARENT, "ram")


def _between(rows: Iterable[Row]) -> Iterator[Row]:
    """The ports where nothing is."""
    at = PORTS.start
    for row in rows:
        if at < row.start:
            yield Row(at, row.start, "io", PARENT, offset=at)
        at = row.end
    yield Row(at, PORTS.stop, "io", PARENT, offset=at)
