# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree of objects that QMP shows of a machine: QEMU's microvm, with what ours has.

Types, their properties and what these are when nobody set them are QEMU's own
(:mod:`.qapi`); values that a machine decides are filled in here. QEMU's paths are those of
hw/i386/microvm.c, which makes its devices in this order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...transport import VECTORS, Transport
from ..devices import Block, Net
from ..places import MMIO_SLOTS, slot_path
from .qapi import ErrorClass, Property, QmpError, load

if TYPE_CHECKING:
    from ..machine import Attached, Machine

__all__ = ["CPU", "NETDEV", "PERIPHERAL", "UNATTACHED", "Node", "Tree", "rng_name"]

CPU = "max-x86_64-cpu"
NETDEV = "net0"  # the back end of network cards
DEEPEST = 64  # steps of a path: links lead in circles
MACHINE = "/machine"
PERIPHERAL = f"{MACHINE}/peripheral"
UNATTACHED = f"{MACHINE}/unattached"


@dataclass
class Node:
    """An object: its type, what is in it, and properties that are not as its type has them."""

    path: str
    type: str
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Links that objects of the type need not have: name to type and path."""
    children: dict[str, Node] = field(default_factory=dict)

    def add(self, name: str, type_name: str, **values: Any) -> Node:
        """A new object in this one; underscores in names of properties stand for dashes."""
        path = f"{self.path.rstrip('/')}/{name}"
        node = Node(path, type_name, {key.replace("_", "-"): v for key, v in values.items()})
        self.children[name] = node
        return node

    def regions(self, *names: str) -> Node:
        """The same, with memory regions in it."""
        for name in names:
            index = sum(child.startswith(f"{name}[") for child in self.children)
            self.add(f"{name}[{index}]", "memory-region")
        return self

    def properties(self) -> Iterator[Property]:
        """All of them, objects in it too, as far as they can be read."""
        known = {entry.name: entry for entry in load().properties(self.type)}
        known.setdefault("type", Property("type", "string", None))
        for name, entry in known.items():
            value = self.type if name == "type" else self.values.get(name, entry.value)
            yield Property(name, entry.type, value)
        for name, (type_name, path) in self.links.items():
            yield Property(name, f"link<{type_name}>", path)
        for name, child in self.children.items():
            yield Property(name, f"child<{child.type}>", child.path)

    def property(self, name: str) -> Property:
        """One of them; QmpError if there is none of that name."""
        for entry in self.properties():
            if entry.name == name:
                return entry
        raise QmpError(f"Property '{self.type}.{name}' not found")


class Tree:
    """The tree as the machine is now. It is made anew when devices have come or gone."""

    def __init__(self, machine: Machine, chardevs: dict[str, str]) -> None:
        """``chardevs`` are the sockets: QEMU's name of each to its file."""
        self._machine = machine
        self._chardevs = chardevs
        self._made_for: list[str] | None = None
        self._root = Node("/", "container")
        self._cpus: list[str] = []

    @property
    def root(self) -> Node:
        self._update()
        return self._root

    @property
    def cpus(self) -> list[str]:
        """The paths of the vCPUs."""
        self._update()
        return self._cpus

    def resolve(self, path: str) -> Node:
        """The object at an absolute path, or at the one place where a partial path fits.

        QmpError if there is none, or more than one.
        """
        parts = _parts(path)
        if path.startswith("/"):
            found = self._follow(self.root, parts)
            matches = [found] if found else []
        else:
            matches = list(self._anywhere(parts)) if parts else []
        if len(matches) != 1:
            raise QmpError(f"Device '{path}' not found", ErrorClass.DEVICE_NOT_FOUND)
        return matches[0]

    def ambiguous(self, path: str) -> bool:
        """Whether a partial path fits in more than one place."""
        parts = _parts(path)
        return not path.startswith("/") and bool(parts) and len(list(self._anywhere(parts))) > 1

    def all(self) -> Iterator[Node]:
        """Every object, those that contain others first."""
        todo = [self.root]
        while todo:
            node = todo.pop()
            yield node
            todo += reversed(node.children.values())

    def backend(self, identifier: str) -> str:
        """The path of a device's virtio half, which on PCI is within the function."""
        if self._machine.config.transport is Transport.PCI:
            return f"{PERIPHERAL}/{identifier}/virtio-backend"
        return f"{PERIPHERAL}/{identifier}"

    def _follow(self, node: Node, parts: list[str]) -> Node | None:
        if len(parts) > DEEPEST:
            return None
        for part in parts:
            child = node.children.get(part)
            if child is None:
                link = next(
                    (
                        entry
                        for entry in node.properties()
                        if entry.name == part and entry.type.startswith("link<") and entry.value
                    ),
                    None,
                )
                if link is None:
                    return None
                child = self._follow(self._root, _parts(link.value))
                if child is None:
                    return None
            node = child
        return node

    def _anywhere(self, parts: list[str]) -> Iterator[Node]:
        for inside in self.all():
            if parts[0] in inside.children:
                found = self._follow(inside, parts)
                if found is not None:
                    yield found

    def _update(self) -> None:
        devices = list(self._machine.devices)
        if devices != self._made_for:
            self._cpus = []
            self._root = self._make()
            self._made_for = devices

    def _make(self) -> Node:
        root = Node("/", "container")
        root.add("backend", "container")
        self._machine_object(root)
        objects = root.add("objects", "container")
        for identifier, attached in self._machine.devices.items():
            if attached.device.NAME == "virtio-rng":
                objects.add(rng_name(identifier), "rng-random")
        size = self._machine.memory.size
        objects.add("microvm.ram", "memory-backend-ram", size=size).regions("microvm.ram")
        chardevs = root.add("chardevs", "container")
        for name, file in self._chardevs.items():
            chardevs.add(name, "chardev-socket", addr={"path": file, "type": "unix"})
        root.add("audiodevs", "container")
        return root

    def _machine_object(self, root: Node) -> None:
        config, smp = self._machine.config, len(self._machine.vcpus)
        levels = ("modules", "books", "threads", "dies", "sockets", "clusters", "drawers")
        topology = {**dict.fromkeys(levels, 1), "cpus": smp, "maxcpus": smp, "cores": smp}
        machine = root.add(
            "machine", "microvm-machine", smp=topology,
            memory={"size": self._machine.memory.size},
            pcie="on" if config.transport is Transport.PCI else "auto",
        )  # fmt: skip
        machine.add("ioapic", "ioapic").regions("ioapic")
        machine.add("fw_cfg", "fw_cfg_io").regions("fwcfg", "fwcfg.dma")
        peripheral = machine.add("peripheral", "container")
        machine.add("peripheral-anon", "container")
        unattached = machine.add("unattached", "container")
        unattached.regions("system", "io", "pc.bios", "isa-bios", "ram-below-4g")
        bus = unattached.add("sysbus", "System")
        self._unattached(unattached)
        for index, child in enumerate(unattached.children.values()):
            if child.values.get("parent_bus") == bus.path:
                bus.links[f"child[{index}]"] = (child.type, child.path)
        buses = {
            name: child
            for node in unattached.children.values()
            for name, child in node.children.items()
        }
        disks = 0
        for identifier, attached in self._machine.devices.items():
            values = _device_values(identifier, attached)
            if attached.device.NAME == "virtio-blk":
                values["drive"] = f"disk{disks}"
                disks += 1
            if config.transport is Transport.PCI:
                self._function(peripheral, buses["pcie.0"], attached, values)
            else:
                bus = buses[f"virtio-mmio-bus.{attached.slot}"]
                node = peripheral.add(identifier, f"{attached.device.NAME}-device")
                node.values |= {**values, "parent_bus": bus.path}
                bus.links["child[0]"] = (node.type, node.path)

    def _unattached(self, unattached: Node) -> None:
        """What nobody gave a name: numbered in the order in which it is made."""
        count = 0

        def device(type_name: str, **values: Any) -> Node:
            nonlocal count
            count += 1
            return unattached.add(f"device[{count - 1}]", type_name, **values)

        sysbus = {"parent_bus": f"{UNATTACHED}/sysbus"}
        config = self._machine.config
        for vcpu in self._machine.vcpus:
            cpu = device(CPU, apic_id=vcpu.index, core_id=vcpu.index)
            cpu.values["memory"] = f"{UNATTACHED}/system[0]"
            cpu.regions("memory", "memory").add("lapic", "apic", id=vcpu.index).regions("apic-msi")
            self._cpus.append(cpu.path)
            if not vcpu.index:
                device("kvmvapic").regions("kvmvapic")
        isa_bridge = device("isabus-bridge")
        isa = isa_bridge.add("isa.0", "ISA")
        ioapic = device("ioapic").regions("ioapic")
        transports = []
        for slot in self._slots():
            path = slot_path(self._machine, slot)
            transport = unattached.add(
                path.rpartition("/")[2], "virtio-mmio", vis=config.transport.storage,
                vis_cache_entries=config.transport is Transport.VIS_DOORBELL,
                vectors=self._vectors(), ioeventfd=not config.at_once,
            )  # fmt: skip
            transport.regions("virtio-mmio").add(f"virtio-mmio-bus.{slot}", "virtio-mmio-bus")
            transports.append(transport)
        count += MMIO_SLOTS
        ged = device("acpi-ged").regions("acpi-ged", "acpi-ged-regs", "memhp container")
        for node in (isa_bridge, ioapic, *transports, ged):
            node.values |= sysbus
        if config.transport is Transport.PCI:
            host = device("gpex-pcihost")
            host.values |= sysbus
            host.regions(
                "pcie-mmcfg-mmio", "gpex_mmio_window", "gpex_mmio", "gpex_ioport_window",
                "gpex_ioport", "pcie-ecam", "pcie-mmio32", "pcie-mmio64",
            )  # fmt: skip
            host.add("pcie.0", "PCIE")
            host.add("gpex_root", "gpex-root").values["parent_bus"] = f"{host.path}/pcie.0"
        pics = [device("isa-i8259").regions("pic", "elcr") for _ in range(2)]
        pit = device("isa-pit").regions("pit")
        rtc = device("mc146818rtc").regions("rtc", "rtc-index")
        serial = device("isa-serial").regions("serial")
        serial.add("serial", "serial")
        for node in (*pics, pit, rtc, serial):
            node.values["parent_bus"] = isa.path
            isa.links[f"child[{len(isa.links)}]"] = (node.type, node.path)

    def _slots(self) -> list[int]:
        """Slots for virtio-mmio: those that QEMU has, and those that are taken beyond."""
        found = set(range(MMIO_SLOTS))
        if self._machine.config.transport is not Transport.PCI:
            found |= {attached.slot for attached in self._machine.devices.values()}
        return sorted(found)

    def _vectors(self) -> int:
        """Of each virtio-mmio device: QEMU has one setting for all."""
        config = self._machine.config
        if config.transport in (Transport.PCI, Transport.INTX):
            return 0
        most = max((spec.queues for spec in config.devices if spec.kind == "blk"), default=1)
        return max(VECTORS, most + 1)

    def _function(
        self, peripheral: Node, bus: Node, attached: Attached, values: dict[str, Any]
    ) -> None:
        """A device behind PCI: the function, with the virtio device in it."""
        name, where = attached.device.NAME, attached.slot
        node = peripheral.add(attached.id, f"{name}-pci")
        node.values |= {
            **values,
            "parent_bus": bus.path,
            "addr": where & 0xFF,
            "legacy-addr": f"{where >> 3 & 31:02x}.{where & 7:x}",
            "vectors": len(attached.device.queues) + 1,
            "ioeventfd": not self._machine.config.at_once,
        }
        bus.links[f"child[{len(bus.links)}]"] = (node.type, node.path)
        own = node.add("virtio-bus", "virtio-pci-bus")
        backend = node.add("virtio-backend", f"{name}-device")
        backend.values |= {**values, "parent_bus": own.path}
        own.links["child[0]"] = (backend.type, backend.path)
        node.regions(
            "virtio-pci", "virtio-pci", f"{name}-pci-msix", "msix-table", "msix-pba",
            *(f"virtio-pci-{part}-{name}"
              for part in ("common", "isr", "device", "notify", "notify-pio")),
            "bus master container", "bus master",
        )  # fmt: skip


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _device_values(identifier: str, attached: Attached) -> dict[str, Any]:
    device = attached.device
    if isinstance(device, Block):
        return {"num-queues": len(device.queues)}
    if isinstance(device, Net):
        return {"mac": device.permanent_mac.hex(":"), "netdev": NETDEV}
    if device.NAME == "virtio-rng":
        return {"rng": f"/objects/{rng_name(identifier)}"}
    return {}


def rng_name(identifier: str) -> str:
    """The back end of an entropy device: rng0 is random0's."""
    number = identifier.removeprefix("random")
    return f"rng{number}" if number.isdigit() else f"rng-{identifier}"
