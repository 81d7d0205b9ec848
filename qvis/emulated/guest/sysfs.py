# SPDX-License-Identifier: GPL-2.0-or-later
"""/sys: buses, devices and their drivers (Documentation/ABI/testing of Linux; drivers/base)."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from .debugfs import make_debug
from .files import Directory, Link, Node, Text, fail
from .nodes import SerialFile
from .probe_pci import Function
from .proc import cpu_list, resources
from .virtio import Parent, VirtioDevice
from .virtio_pci import PciParent

if TYPE_CHECKING:
    from .disk import Disk
    from .drivers import NetDriver
    from .kernel import Kernel
    from .processes import Process
    from .userland import Userland

__all__ = ["make_sys"]

DRIVERS = {"virtio_balloon": 5, "virtio_blk": 2, "virtio_console": 3, "virtio_net": 1,
           "virtio_rng": 4}  # fmt: skip
PLATFORM, PCI = "virtio-mmio", "virtio-pci"
HEADER = 256  # bytes of a function's configuration space that sysfs shows


def _plain(text: str) -> Text:
    return Text(lambda process: text + "\n")


def _listing(names: Callable[[], dict[str, Node]]) -> Directory:
    """A directory whose entries are made anew each time."""
    return Directory(lambda: names(), lambda name: names().get(name))


def _place(parent: Parent) -> str:
    """Where a device is under /sys/devices."""
    if isinstance(parent, PciParent):
        return f"pci0000:{parent.name[5:7]}/{parent.name}"
    return f"platform/{parent.name}"


def _virtio_place(device: VirtioDevice) -> str:
    return f"{_place(device.transport)}/{device.name}"


# Devices


def _virtio(kernel: Kernel, device: VirtioDevice) -> Directory:
    """/sys/devices/.../virtioN."""

    def status(process: Process) -> str:
        return f"0x{device.read_status(process.vcpu):08x}\n"

    def features(process: Process) -> str:
        return "".join(str(device.features >> bit & 1) for bit in range(64)) + "\n"

    def event(process: Process) -> str:
        driver = f"DRIVER={device.driver}\n" if device.driver else ""
        return f"{driver}MODALIAS={device.modalias}\n"

    def entries() -> dict[str, Node]:
        found: dict[str, Node] = {
            "device": _plain(f"0x{device.kind:04x}"),
            "vendor": _plain(f"0x{device.vendor:04x}"),
            "modalias": _plain(device.modalias),
            "status": Text(status),
            "features": Text(features),
            "uevent": Text(event, lambda process, text: None),
            "subsystem": Link("/sys/bus/virtio"),
        }
        if device.driver:
            found["driver"] = Link(f"../../../../bus/virtio/drivers/{device.driver}")
        disks = {d.name: d for d in kernel.disks.values() if d.device is device}
        if disks:
            blocks = {name: _disk(kernel, disk) for name, disk in disks.items()}
            found["block"] = Directory.of(blocks)
        for name, card in _cards(kernel).items():
            if card.device is device:
                found["net"] = Directory.of({name: _card(card)})
        if device.driver == "virtio_rng":
            found["hwrng"] = Directory.of({})
        return found

    return _listing(entries)


def _parent(kernel: Kernel, parent: Parent) -> Directory:
    """A platform device or a PCI function."""

    def entries() -> dict[str, Node]:
        found: dict[str, Node] = {
            "subsystem": Link(f"/sys/bus/{parent.bus}"),
            "uevent": Text(lambda process: "", lambda process, text: None),
        }
        if parent.bound:
            found["driver"] = Link(f"../../../bus/{parent.bus}/drivers/{parent.transport_driver}")
        if parent.device is not None:
            found[parent.device.name] = _virtio(kernel, parent.device)
        if isinstance(parent, PciParent):
            found |= _pci_device(parent)
        else:
            found["modalias"] = _plain("acpi:LNRO0005:")
            found["driver_override"] = _plain("(null)")
        return found

    return _listing(entries)


def _function(function: Function) -> dict[str, Node]:
    """What configuration space says, of any PCI function."""

    def number(offset: int, size: int) -> Text:
        return Text(lambda process: f"0x{function.read(process.vcpu, offset, size):0{2 * size}x}\n")

    def config(process: Process) -> bytes:
        words = (function.read(process.vcpu, at, 4) for at in range(0, HEADER, 4))
        return b"".join(word.to_bytes(4, "little") for word in words)

    return {
        "vendor": number(0, 2),
        "device": number(2, 2),
        "subsystem_vendor": number(0x2C, 2),
        "subsystem_device": number(0x2E, 2),
        "revision": number(8, 1),
        "class": Text(lambda process: f"0x{function.read(process.vcpu, 8, 4) >> 8:06x}\n"),
        "config": Text(config, size=HEADER),
    }


def _pci_device(parent: PciParent) -> dict[str, Node]:
    """What only a PCI function with a driver of ours has."""

    def resource(process: Process) -> str:
        rows = [*resources(parent), *[(0, 0, 0)] * 7]
        return "".join(
            f"0x{start:016x} 0x{start + size - 1 if size else 0:016x} 0x{flags:016x}\n"
            for start, size, flags in rows
        )

    numbers = [desc.number for desc in parent.irqs]
    return {
        **_function(parent.function),
        "resource": Text(resource),
        "enable": Text(lambda process: f"{int(parent.bound)}\n"),
        "numa_node": _plain("-1"),
        "msi_irqs": Directory.of({str(number): _plain("msix") for number in numbers}),
    }


def _disk(kernel: Kernel, disk: Disk) -> Directory:
    """/sys/block/vda."""

    def queue(number: int, cpus: frozenset[int]) -> Directory:
        entries: dict[str, Node] = {
            "cpu_list": _plain(", ".join(str(cpu) for cpu in sorted(cpus))),
            "nr_tags": _plain("1024"),
            "nr_reserved_tags": _plain("0"),
        }
        entries |= {f"cpu{cpu}": Directory.of({}) for cpu in cpus}
        return Directory.of(entries)

    settings = {
        "logical_block_size": "512", "physical_block_size": "512", "hw_sector_size": "512",
        "scheduler": "[none]", "nr_requests": "1024", "rotational": "1", "read_ahead_kb": "128",
        "max_sectors_kb": "1280", "write_cache": "write back", "minimum_io_size": "512",
        "optimal_io_size": "0", "iostats": "1", "nomerges": "0", "rq_affinity": "1",
    }  # fmt: skip
    queues = {str(n): queue(n, cpus) for n, cpus in enumerate(disk.queues)}
    minor = 16 * list(kernel.disks).index(disk.name) if disk.name in kernel.disks else 0
    return Directory.of(
        {
            "size": Text(lambda process: f"{disk.size >> 9}\n"),
            "serial": SerialFile(kernel, disk.name),
            "dev": _plain(f"254:{minor}"),
            "ro": _plain("0"),
            "removable": _plain("0"),
            "range": _plain("16"),
            "device": Link("../../../" + disk.device.name),
            "subsystem": Link("/sys/class/block"),
            "mq": Directory.of(queues),
            "queue": Directory.of({name: _plain(text) for name, text in settings.items()}),
        }
    )


def _cards(kernel: Kernel) -> dict[str, NetDriver]:
    return {f"eth{number}": card for number, card in enumerate(kernel.network)}


def _card(card: NetDriver) -> Directory:
    """/sys/class/net/eth0."""

    def carrier(process: Process) -> str:
        if not card.up:  # drivers have a say only while it is up
            raise fail(errno.EINVAL)
        return f"{int(card.carrier)}\n"

    def state(process: Process) -> str:
        return "up\n" if card.up and card.carrier else "down\n"

    def flags(process: Process) -> str:
        return f"0x{0x1002 | card.up:x}\n"

    statistics = {
        "rx_packets": Text(lambda process: f"{card.frames_in}\n"),
        "tx_packets": Text(lambda process: f"{card.frames_out}\n"),
    }
    queues: dict[str, Node] = {}
    for pair in range(card.pairs):
        queues |= {f"rx-{pair}": Directory.of({}), f"tx-{pair}": Directory.of({})}
    return Directory.of(
        {
            "address": _plain(":".join(f"{byte:02x}" for byte in card.mac)),
            "carrier": Text(carrier),
            "operstate": Text(state),
            "flags": Text(flags),
            "mtu": _plain("1500"),
            "type": _plain("1"),
            "ifindex": _plain("2"),
            "tx_queue_len": _plain("1000"),
            "device": Link("../../../" + card.device.name),
            "subsystem": Link("/sys/class/net"),
            "statistics": Directory.of(statistics),
            "queues": Directory.of(queues),
        }
    )


# Drivers


def _binder(
    bind: Callable[[Process, str], None], unbind: Callable[[Process, str], None]
) -> dict[str, Node]:
    """The files that bind and unbind; what is written may end in a newline."""

    def stored(change: Callable[[Process, str], None]) -> Callable[[Process, str], None]:
        return lambda process, text: change(process, text.removesuffix("\n"))

    return {
        "bind": Text(None, stored(bind)),
        "unbind": Text(None, stored(unbind)),
        "uevent": Text(None, lambda process, text: None),
    }


def _virtio_driver(kernel: Kernel, driver: str) -> Directory:
    """/sys/bus/virtio/drivers/virtio_blk."""

    def bind(process: Process, name: str) -> None:
        device = kernel.devices.get(name)
        if device is None or device.kind != DRIVERS[driver]:
            raise fail(errno.ENODEV)
        if device.driver:
            raise fail(errno.EBUSY)
        device.bind(process.vcpu)

    def unbind(process: Process, name: str) -> None:
        device = kernel.devices.get(name)
        if device is None or device.driver != driver:
            raise fail(errno.ENODEV)
        device.unbind(process.vcpu)

    files = _binder(bind, unbind)

    def entries() -> dict[str, Node]:
        mine: dict[str, Node] = {
            name: Link(f"../../../../devices/{_virtio_place(device)}")
            for name, device in kernel.devices.items()
            if device.driver == driver
        }
        return {**files, **mine}

    return _listing(entries)


def _transport_driver(kernel: Kernel, driver: str, bus: str) -> Directory:
    """/sys/bus/platform/drivers/virtio-mmio, /sys/bus/pci/drivers/virtio-pci."""

    def parent(name: str) -> Parent:
        found = kernel.parents.get(name)
        if found is None or found.transport_driver != driver:
            raise fail(errno.ENODEV)
        return found

    def bind(process: Process, name: str) -> None:
        if parent(name).bound:
            raise fail(errno.EBUSY)
        parent(name).bind(process.vcpu)

    def unbind(process: Process, name: str) -> None:
        if not parent(name).bound:
            raise fail(errno.ENODEV)
        parent(name).unbind(process.vcpu)

    files = _binder(bind, unbind)

    def entries() -> dict[str, Node]:
        mine: dict[str, Node] = {
            name: Link(f"../../../../devices/{_place(found)}")
            for name, found in kernel.parents.items()
            if found.bus == bus and found.bound
        }
        return {**files, **mine}

    return _listing(entries)


# CPUs


def _cpu(kernel: Kernel, cpu: int) -> Directory:
    def online(process: Process, text: str) -> None:
        wanted = text.strip()
        if wanted not in ("0", "1"):
            raise fail(errno.EINVAL)
        if (cpu in kernel.online) != (wanted == "1"):
            raise fail(errno.EBUSY)  # this kernel keeps the CPUs that it has

    entries: dict[str, Node] = {
        "topology": Directory.of({"core_id": _plain(str(cpu)), "physical_package_id": _plain("0")}),
        "uevent": Text(lambda process: "", lambda process, text: None),
    }
    if cpu:
        entries["online"] = Text(lambda process: f"{int(cpu in kernel.online)}\n", online)
    return Directory.of(entries)


def _cpus(kernel: Kernel) -> Directory:
    everything = cpu_list(frozenset(kernel.cpus))
    offline = Text(lambda process: cpu_list(frozenset(kernel.cpus) - kernel.online) + "\n")
    files: dict[str, Node] = {
        "online": Text(lambda process: cpu_list(kernel.online) + "\n"),
        "offline": offline,
        "present": _plain(everything),
        "possible": _plain(everything),
        "isolated": _plain(""),
        "kernel_max": _plain("255" if len(kernel.cpus) <= 256 else "4095"),
    }

    def get(name: str) -> Node | None:
        match = re.fullmatch(r"cpu(\d{1,5})", name)
        if match and int(match[1]) < len(kernel.cpus):
            return _cpu(kernel, int(match[1]))
        return files.get(name)

    return Directory(lambda: [*files, *(f"cpu{cpu}" for cpu in kernel.cpus)], get)


def make_sys(userland: Userland) -> Directory:
    """The whole of it."""
    kernel = userland.kernel

    def links(bus: str) -> Callable[[], dict[str, Node]]:
        def entries() -> dict[str, Node]:
            places = {name: _place(p) for name, p in kernel.parents.items() if p.bus == bus}
            if bus == "pci":
                places |= {b.name: f"pci0000:{b.name[5:7]}/{b.name}" for b in kernel.bridges}
            return {name: Link(f"../../../devices/{place}") for name, place in places.items()}

        return entries

    def devices() -> dict[str, Node]:
        found: dict[str, Node] = {
            "platform": _one_of(kernel, "platform"),
            "system": Directory.of({"cpu": _cpus(kernel)}),
            "virtual": Directory.of({"net": Directory.of({"lo": _loopback()})}),
        }
        for name in {p.name[5:7] for p in kernel.parents.values() if isinstance(p, PciParent)}:
            found[f"pci0000:{name}"] = _one_of(kernel, "pci")
        return found

    def virtio_devices() -> dict[str, Node]:
        return {
            name: Link(f"../../../devices/{_virtio_place(device)}")
            for name, device in kernel.devices.items()
        }

    def blocks(above: str) -> Callable[[], dict[str, Node]]:
        return lambda: {
            name: Link(f"{above}devices/{_virtio_place(disk.device)}/block/{name}")
            for name, disk in kernel.disks.items()
        }

    def cards() -> dict[str, Node]:
        found: dict[str, Node] = {"lo": Link("../../devices/virtual/net/lo")}
        for name, card in _cards(kernel).items():
            found[name] = Link(f"../../devices/{_virtio_place(card.device)}/net/{name}")
        return found

    def random(process: Process) -> str:
        found = [d.number for d in kernel.devices.values() if d.driver == "virtio_rng"]
        return "".join(f"virtio_rng.{number} " for number in range(len(found)))[:-1] + "\n"

    drivers = {name: _virtio_driver(kernel, name) for name in DRIVERS}
    generator = Directory.of({"rng_current": Text(random), "rng_available": Text(random)})
    buses = {
        "virtio": Directory.of(
            {"devices": _listing(virtio_devices), "drivers": Directory.of(drivers)}
        ),
        "platform": Directory.of(
            {
                "devices": _listing(links("platform")),
                "drivers": Directory.of(
                    {PLATFORM: _transport_driver(kernel, PLATFORM, "platform")}
                ),
            }
        ),
        "pci": Directory.of(
            {
                "devices": _listing(links("pci")),
                "drivers": Directory.of({PCI: _transport_driver(kernel, PCI, "pci")}),
            }
        ),
    }
    return Directory.of(
        {
            "block": _listing(blocks("../")),
            "bus": Directory.of(buses),
            "class": Directory.of(
                {
                    "block": _listing(blocks("../../")),
                    "net": _listing(cards),
                    "misc": Directory.of({"hw_random": generator}),
                }
            ),
            "dev": Directory.of({}),
            "devices": _listing(devices),
            "firmware": Directory.of({}),
            "fs": Directory.of({}),
            "kernel": Directory.of({"debug": make_debug(userland)}),
            "module": Directory.of({}),
        }
    )


def _one_of(kernel: Kernel, bus: str) -> Directory:
    """The devices of a bus, each made when it is looked at."""

    def bridges() -> dict[str, Function]:
        return {bridge.name: bridge for bridge in kernel.bridges if bus == "pci"}

    def names() -> list[str]:
        return [*bridges(), *(n for n, parent in kernel.parents.items() if parent.bus == bus)]

    def get(name: str) -> Node | None:
        if (bridge := bridges().get(name)) is not None:
            return Directory.of(_function(bridge))
        parent = kernel.parents.get(name)
        return _parent(kernel, parent) if parent is not None and parent.bus == bus else None

    return Directory(names, get)


def _loopback() -> Directory:
    values = {"address": "00:00:00:00:00:00", "mtu": "65536", "operstate": "unknown",
              "carrier": "1", "type": "772", "ifindex": "1", "flags": "0x9"}  # fmt: skip
    return Directory.of({name: _plain(text) for name, text in values.items()})
