# SPDX-License-Identifier: GPL-2.0-or-later
"""What of QEMU a guest can reach: regions, registers, and the code behind them.

Asked of a running machine by QMP, so that it is what the guest really has:
``info mtree -f -o`` shows the address spaces of a vCPU, flattened, with RAM and
what lies hidden under something else left out; ``xp`` reads configuration
space; ``x-query-virtio`` tells which device is plugged in where.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..build.objects import Lines, Objects
from ..errors import InfraError, UsageError
from ..machine.machine import Machine
from .code import lines_of, matches, table

__all__ = ["Area", "Device", "Region", "Surface", "config_registers", "regions", "surface"]

VIEWS = ('AS "cpu-memory-0"', 'AS "I/O"')  # what loads and stores, and what in and out reach
# 00000000fea00000-00000000fea00003 (prio 0, i/o): acpi-ged @... owner:{dev path=...}
PIECE = re.compile(
    r"^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (\S+)\): (.*?)"
    r"(?: @([0-9a-f]+))?(?: (?:owner|parent):\{(?:dev|obj) (id|path)=(.*?)\})*$"
)
DUMPED = re.compile(r"^[0-9a-f]+:((?: 0x[0-9a-f]{8})+)", re.MULTILINE)
CONFIG_BYTES = 256  # of a PCI function that are not PCI Express's
CONFIG_STRIDE = 4096  # from one function to the next in ECAM


@dataclass(frozen=True)
class Region:
    """One region that has I/O behind it, of whose ``size`` bytes ``visible`` are reachable."""

    space: str  # "memory" or "I/O"
    name: str
    owner: str  # QOM path of the device that it belongs to, or its ID
    start: int  # where its first byte is, or would be
    visible: int  # bytes


@dataclass(frozen=True)
class Device:
    """A virtio device: which transport it is plugged into, and what that offers."""

    transport: str  # QOM path
    queues: int
    vectors: int  # of virtio-mmio with MSI or VIS; 0 without
    vis: bool


@dataclass(frozen=True)
class Area:
    """Regions that serve one end: for PCI, for virtio over MMIO, for both, or for nothing."""

    over: str  # as in footprint.toml
    regions: int
    size: int  # bytes
    registers: int  # by footprint.toml
    words: int  # of 4 bytes, in regions that it has no registers for
    code: Lines  # of the QEMU sources behind them


@dataclass(frozen=True)
class Surface:
    """All that a vCPU of one machine can reach, by what it is there for."""

    areas: dict[str, Area]
    functions: int  # on PCI buses
    devices: int  # virtio
    regions: tuple[Region, ...]


def surface(machine: Machine, objects: Objects) -> Surface:
    """What a guest that is up can reach of a QEMU that was linked from ``objects``.

    Raises :class:`InfraError` when QEMU's answers are not of the known form.
    """
    found = regions(machine.qmp.monitor("info mtree -f -o"))
    devices = list(_devices(machine))
    functions = list(_functions(machine.qmp("query-pci")))
    areas: dict[str, list[tuple[Region, dict[str, Any], int, int]]] = {}
    for region in found:
        entry: dict[str, Any] = next(
            (one for one in table()["region"] if matches(region.name, [one["name"]])), {}
        )
        registers, words = _count(region, entry, devices)
        if entry.get("config"):
            for bus, slot in functions:
                at = region.start + ((bus << 8) + slot) * CONFIG_STRIDE
                named, other = config_registers(_physical(machine, at, CONFIG_BYTES))
                registers, words = registers + named, words + other
        areas.setdefault(entry.get("over", "both"), []).append((region, entry, registers, words))
    return Surface(
        areas={over: _area(over, inside, objects) for over, inside in areas.items()},
        functions=len(functions),
        devices=len(devices),
        regions=tuple(found),
    )


def regions(mtree: str) -> list[Region]:
    """The regions with I/O behind them in what ``info mtree -f -o`` says of a vCPU.

    A region that another one covers in part comes in several pieces: it is one.
    """
    found: dict[tuple[str, str, str, int], int] = {}
    seen = 0
    # The human monitor ends its lines as terminals want them.
    for view in re.split(r"^FlatView #\d+$", mtree.replace("\r", ""), flags=re.MULTILINE):
        space = next((name for name in VIEWS if f" {name}," in view), None)
        if not space:
            continue
        seen += 1
        for line in view.splitlines():
            piece = PIECE.match(line)
            if not piece or piece[3] != "i/o":
                continue
            first, last = int(piece[1], 16), int(piece[2], 16)
            start = first - int(piece[5] or "0", 16)
            name = "memory" if space == VIEWS[0] else "I/O"
            key = (name, piece[4], _owner(piece[6], piece[7]), start)
            found[key] = found.get(key, 0) + last - first + 1
    if seen != len(VIEWS):
        raise InfraError("QEMU's `info mtree -f -o` is not of the known form", stage="surface")
    return [Region(*key, visible) for key, visible in found.items()]


def config_registers(data: bytes) -> tuple[int, int]:
    """Registers in the configuration space of a PCI function: by name, and in 4-byte words.

    Words are what capabilities have that ``footprint.toml`` does not know.
    """
    headers, known = table()["pci-header"], table()["pci-capability"]
    registers: int = headers.get(str(data[0x0E] & 0x7F), 0)
    words = 0 if registers else 0x40 // 4
    places: list[int] = []
    place = data[0x34] & ~3 if data[0x06] & 0x10 else 0  # Status: has capabilities
    while place and place not in places:
        places.append(place)
        place = data[place + 1] & ~3
    for place in places:
        kind = str(data[place])
        registers += known.get(kind, 0)
        if kind == "9":
            # How long a vendor's capability is it says itself; virtio's have 16 bytes or more.
            words += (data[place + 2] - 16) // 4
        elif kind not in known:
            after = min((other for other in places if other > place), default=CONFIG_BYTES)
            words += (after - place) // 4
    return registers, words


def _count(region: Region, entry: dict[str, Any], devices: Sequence[Device]) -> tuple[int, int]:
    """A region's registers and, where the table has none, its words."""
    if "each" in entry:
        return region.visible // entry["each"], 0
    if "registers" not in entry:
        return 0, -(-region.visible // 4)
    device = next((one for one in devices if one.transport == region.owner), None)
    if not device:
        return entry.get("empty", entry["registers"]), 0
    registers = entry["registers"] + entry.get("queues", 0) * device.queues
    registers += entry.get("msi", 0) if device.vectors else 0
    return registers + (entry.get("vis", 0) if device.vis else 0), 0


def _area(
    over: str, inside: Sequence[tuple[Region, dict[str, Any], int, int]], objects: Objects
) -> Area:
    code = {pattern for _, entry, _, _ in inside for pattern in entry.get("code", [])}
    return Area(
        over=over,
        regions=len(inside),
        size=sum(region.visible for region, _, _, _ in inside),
        registers=sum(registers for _, _, registers, _ in inside),
        words=sum(words for _, _, _, words in inside),
        code=lines_of(objects, sorted(code)),
    )


def _owner(kind: str | None, value: str | None) -> str:
    return f"/machine/peripheral/{value}" if kind == "id" else value or ""


def _devices(machine: Machine) -> Iterator[Device]:
    for device in machine.qmp("x-query-virtio"):
        path = device["path"]
        bus = machine.qmp("qom-get", path=path, property="parent_bus")
        transport = bus.rpartition("/")[0]
        vectors = _ours(machine, transport, "vectors")
        vis = bool(_ours(machine, transport, "vis"))
        queues = machine.qmp("x-query-virtio-status", path=path)["num-vqs"]
        yield Device(transport, queues, vectors, vis)


def _ours(machine: Machine, transport: str, name: str) -> int:
    """A property that our series gives virtio-mmio; 0 without it."""
    try:
        return int(machine.qmp("qom-get", path=transport, property=name))
    except UsageError:
        return 0


def _functions(buses: Iterable[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    """Bus and device-and-function number of each PCI function."""
    for bus in buses:
        for device in bus["devices"]:
            yield device["bus"], (device["slot"] << 3) | device["function"]
            yield from _functions([device["pci_bridge"]] if "pci_bridge" in device else [])


def _physical(machine: Machine, address: int, size: int) -> bytes:
    """What is at a guest's physical address. Configuration space does not mind being read."""
    text = machine.qmp.monitor(f"xp /{size // 4}xw {address:#x}")
    words = " ".join(DUMPED.findall(text.replace("\r", ""))).split()
    if len(words) != size // 4:
        raise InfraError(f"QEMU does not show what is at {address:#x}: {text}", stage="surface")
    return b"".join(int(word, 16).to_bytes(4, "little") for word in words)
