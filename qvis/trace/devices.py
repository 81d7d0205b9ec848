# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose addresses are whose, as QEMU has them mapped at this moment."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from .model import Space
from .store import Region

__all__ = ["regions"]

Query = Callable[..., Any]  # a QMP session: command and arguments to what it returned

VIEW = re.compile(r"^FlatView #\d+\n(.*?)(?=^FlatView #|\Z)", re.MULTILINE | re.DOTALL)
ROW = re.compile(
    r"^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, i/o\): (\S+)(?: @[0-9a-f]+)? "
    r"(?:owner|parent):\{(?:dev|obj) (id|path)=(\S+)\}$",
    re.MULTILINE,
)
# What QEMU's parts are called where the field has a name for them.
NAMES = {
    "apic-msi": "LAPIC",
    "kvm-apic-msi": "LAPIC",
    "kvm-ioapic": "IOAPIC",
    "kvm-pit": "PIT",
    "kvm-pic": "PIC",
    "kvm-elcr": "PIC",
    "ioapic": "IOAPIC",
    "serial": "serial",
    "rtc": "RTC",
    "rtc-index": "RTC",
    "pit": "PIT",
    "pic": "PIC",
    "elcr": "PIC",
    "fwcfg": "fw_cfg",
    "fwcfg.dma": "fw_cfg",
    "acpi-ged": "GED",
    "acpi-ged-regs": "GED",
    "pcie-mmcfg-mmio": "PCIe",
    "gpex_mmio_window": "PCIe",
}
MEMORY_VIEWS = (' AS "memory", root: system\n', Space.MEMORY), (' AS "I/O", root: io\n', Space.PORT)
# Ports of a PC that Linux looks at although this machine has nothing there. They
# are the empty I/O space to QEMU.
NOTHING = "io"
LEGACY_PORTS = (
    Region("port B", "port-b", Space.PORT, 0x61, 0x62),  # gates the PIT for calibration
    Region("POST", "post", Space.PORT, 0x80, 0x81),  # a write takes time, and that is all
    Region("DMA", "legacy", Space.PORT, 0x87, 0x88),
    Region("FPU", "legacy", Space.PORT, 0xF0, 0xF2),
    Region("PCI", "pci-ports", Space.PORT, 0xCF8, 0xD00),  # is there PCI? (mechanism 1 and 2)
)
ECAM = "pcie-mmcfg-mmio"
CONFIG_SIZE = 4096  # bytes a function, PCI Express 7.2.2


def regions(query: Query) -> list[Region]:
    """What a vCPU reaches that is no memory, in order of address.

    Whole regions of a bus that stand behind their devices are among them, last
    in the sense that they end where a device's begin. Sources: ``info mtree``,
    ``query-pci`` and the QOM tree.
    """
    found = list(_mapped(query))
    ecam = next((region for region in found if region.map == ECAM), None)
    if ecam:
        found.remove(ecam)
        found += _functions_and_gaps(query, ecam)
    ports = [region for region in found if region.space is Space.PORT]
    found += [
        legacy
        for legacy in LEGACY_PORTS
        if not any(region.start < legacy.end and legacy.start < region.end for region in ports)
    ]
    return sorted(found, key=lambda region: (region.space, region.start))


def _mapped(query: Query) -> Iterator[Region]:
    text = query("human-monitor-command", **{"command-line": "info mtree -f -o"})
    buses = _mmio_buses(query)
    ioapics = 0
    for view in VIEW.findall(text.replace("\r", "")):
        space = next((space for line, space in MEMORY_VIEWS if line in view), None)
        if space is None:
            continue  # what devices see
        for first, last, name, kind, owner in ROW.findall(view):
            if name == NOTHING:
                continue
            start, end = int(first, 16), int(last, 16) + 1
            map_name, device = _map(name), NAMES.get(name, name)
            if kind == "id":
                device = owner
            elif name == "virtio-mmio":
                device = buses.get(owner, f"virtio-mmio@{start:x}")
            elif map_name == "ioapic":
                ioapics += 1
                device = device if ioapics == 1 else f"{device}{ioapics}"
            yield Region(device, map_name, space, start, end)


def _map(name: str) -> str:
    """The register map of a region: what kind of device is behind virtio's does not matter."""
    match = re.fullmatch(r"(virtio-pci-(?:common|isr|device|notify))-.*", name)
    # What KVM emulates has the same registers as what QEMU does.
    return match[1] if match else name.removeprefix("kvm-")


def _mmio_buses(query: Query) -> dict[str, str]:
    """The devices on virtio-mmio transports: QOM path of the transport to the device's name."""
    found = {}
    for child in query("qom-list", path="/machine/peripheral"):
        if child["type"].startswith("child<"):
            path = f"/machine/peripheral/{child['name']}"
            bus = query("qom-get", path=path, property="parent_bus")
            found[bus.rsplit("/", 1)[0]] = child["name"]
    return found


def _functions_and_gaps(query: Query, ecam: Region) -> Iterator[Region]:
    """What is in the memory that maps configuration spaces: those of functions, and nothing."""
    at = ecam.start
    for function in sorted(_pci_functions(query, ecam), key=lambda region: region.start):
        if at < function.start:
            yield Region(ecam.device, ECAM, ecam.space, at, function.start)
        yield function
        at = function.end
    yield Region(ecam.device, ECAM, ecam.space, at, ecam.end)


def _pci_functions(query: Query, ecam: Region) -> Iterator[Region]:
    """Each PCI function's configuration space in the memory that maps them all."""
    for bus in query("query-pci"):
        for function in bus["devices"]:
            number = bus["bus"] << 8 | function["slot"] << 3 | function["function"]
            start = ecam.start + number * CONFIG_SIZE
            name = function["qdev_id"] or f"PCI {function['class_info'].get('desc', '').lower()}"
            yield Region(name, "pci-config", ecam.space, start, start + CONFIG_SIZE)
