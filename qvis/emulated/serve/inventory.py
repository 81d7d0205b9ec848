# SPDX-License-Identifier: GPL-2.0-or-later
"""What a machine has, in the form of QMP's answers (QEMU's qapi/*.json)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...transport import Transport
from ..devices import Block, Feature, Net, Status
from .qapi import QmpError

if TYPE_CHECKING:
    from ..machine import Attached, Machine
    from ..pci import PciFunction
    from ..virtqueue import Virtqueue

__all__ = [
    "UNMAPPED", "blocks", "cards", "disks", "filename", "pci_buses", "qdev", "queue_element",
    "queue_status", "rx_filter", "statistics", "virtio_status",
]  # fmt: skip

# Names of bits: virtio 1.3, 6 and 5.x.3; docs/virtio-interrupts.md, 2.
TRANSPORT_FEATURES = {
    28: "VIRTIO_RING_F_INDIRECT_DESC", 29: "VIRTIO_RING_F_EVENT_IDX", 32: "VIRTIO_F_VERSION_1",
    40: "VIRTIO_F_RING_RESET", 48: "VIRTIO_F_VIS", 49: "VIRTIO_F_MMIO_MSI",
}  # fmt: skip
DEVICE_FEATURES = {
    "virtio-blk": {
        2: "SEG_MAX", 4: "GEOMETRY", 6: "BLK_SIZE", 9: "FLUSH", 10: "TOPOLOGY",
        11: "CONFIG_WCE", 12: "MQ", 13: "DISCARD", 14: "WRITE_ZEROES",
    },
    "virtio-net": {
        2: "CTRL_GUEST_OFFLOADS", 5: "MAC", 15: "MRG_RXBUF", 16: "STATUS", 17: "CTRL_VQ",
        18: "CTRL_RX", 19: "CTRL_VLAN", 20: "CTRL_RX_EXTRA", 21: "GUEST_ANNOUNCE", 22: "MQ",
        23: "CTRL_MAC_ADDR",
    },
    "virtio-serial": {0: "SIZE", 1: "MULTIPORT", 2: "EMERG_WRITE"},
}  # fmt: skip
PREFIXES = {
    "virtio-blk": "VIRTIO_BLK_F", "virtio-net": "VIRTIO_NET_F", "virtio-serial": "VIRTIO_CONSOLE_F",
}  # fmt: skip
STATUSES = {
    Status.ACKNOWLEDGE: "VIRTIO_CONFIG_S_ACKNOWLEDGE",
    Status.DRIVER: "VIRTIO_CONFIG_S_DRIVER",
    Status.FEATURES_OK: "VIRTIO_CONFIG_S_FEATURES_OK",
    Status.DRIVER_OK: "VIRTIO_CONFIG_S_DRIVER_OK",
    Status.NEEDS_RESET: "VIRTIO_CONFIG_S_NEEDS_RESET",
    Status.FAILED: "VIRTIO_CONFIG_S_FAILED",
}

# PCI configuration space: PCI 3.0, 6.1.
VENDOR, CLASS, BARS, SUBSYSTEM, INTERRUPT = 0x00, 0x08, 0x10, 0x2C, 0x3C
CLASSES = {
    0x0100: "SCSI controller", 0x0200: "Ethernet controller",
    0x0600: "Host bridge", 0x0780: "Communication controller",
}  # fmt: skip
UNMAPPED = -1  # an address, as query-pci has it


def disks(machine: Machine) -> dict[str, Block]:
    """The disks by their devices' names."""
    return {
        name: attached.device
        for name, attached in machine.devices.items()
        if isinstance(attached.device, Block)
    }


def cards(machine: Machine) -> dict[str, Net]:
    """The network cards by their devices' names."""
    return {
        name: attached.device
        for name, attached in machine.devices.items()
        if isinstance(attached.device, Net)
    }


def filename(disk: Block) -> str:
    """What QEMU calls the image of a disk that is none."""
    return f'json:{{"read-zeroes": true, "driver": "null-co", "size": {disk.size}}}'


def _inserted(node: str, disk: Block) -> dict[str, Any]:
    limits = {
        "request-alignment": 1, "min-mem-alignment": 512,
        "opt-mem-alignment": 4096, "max-iov": 1024,
    }  # fmt: skip
    image = {
        "limits": limits, "virtual-size": disk.size, "filename": filename(disk),
        "format": "null-co", "actual-size": 0,
    }  # fmt: skip
    throttles = ("iops_rd", "iops_wr", "iops", "bps_wr", "bps_rd", "bps")
    return {
        **dict.fromkeys(throttles, 0),
        "detect_zeroes": "off", "active": True, "image": image, "ro": False, "children": [],
        "node-name": node, "backing_file_depth": 0, "drv": "null-co", "write_threshold": 0,
        "encrypted": False, "file": filename(disk),
        "cache": {"no-flush": False, "direct": False, "writeback": disk.write_cache},
    }  # fmt: skip


def blocks(machine: Machine, *, nodes: bool = False) -> list[dict[str, Any]]:
    """The disks as query-block has them, or with ``nodes`` as query-named-block-nodes."""
    found = []
    for number, (name, disk) in enumerate(disks(machine).items()):
        inserted = _inserted(f"disk{number}", disk)
        device = {
            "io-status": "ok", "device": "", "locked": False, "removable": False,
            "inserted": inserted, "qdev": qdev(machine, name), "type": "unknown",
        }  # fmt: skip
        found.append(inserted if nodes else device)
    return found


def statistics(machine: Machine, *, nodes: bool = False) -> list[dict[str, Any]]:
    """query-blockstats: nothing is counted, as no data moves."""
    counted = ("rd", "wr", "flush", "unmap", "zone_append")
    zeros = [f"{kind}_{what}" for kind in counted for what in ("total_time_ns", "operations")]
    zeros += [
        f"{kind}_{what}" for kind in counted if kind != "flush" for what in ("bytes", "merged")
    ]
    zeros += [f"{fault}_{kind}_operations" for fault in ("failed", "invalid") for kind in counted]
    stats = {
        **dict.fromkeys(zeros, 0),
        "wr_highest_offset": 0, "timed_stats": [],
        "account_invalid": not nodes, "account_failed": not nodes,
    }  # fmt: skip
    found = []
    for number, name in enumerate(disks(machine)):
        entry: dict[str, Any] = {"stats": stats, "node-name": f"disk{number}"}
        found.append(entry if nodes else {**entry, "device": "", "qdev": qdev(machine, name)})
    return found


def qdev(machine: Machine, name: str) -> str:
    """What QEMU calls the device that a disk is attached to."""
    if machine.config.transport is Transport.PCI:
        return f"/machine/peripheral/{name}/virtio-backend"
    return name


def rx_filter(name: str, card: Net) -> dict[str, Any]:
    """What a card lets through: everything, as it looks at nothing."""
    return {
        "promiscuous": True, "name": name, "main-mac": card.mac.hex(":"), "unicast": "all",
        "vlan": "all", "vlan-table": [], "unicast-table": [], "multicast": "all",
        "multicast-overflow": False, "unicast-overflow": False, "multicast-table": [],
        "broadcast-allowed": True,
    }  # fmt: skip


def _features(name: str, bits: int) -> dict[str, Any]:
    own = DEVICE_FEATURES.get(name, {})
    answer: dict[str, Any] = {
        "dev-features": [
            f"{PREFIXES[name]}_{feature}" for bit, feature in own.items() if bits >> bit & 1
        ],
        "transports": [feature for bit, feature in TRANSPORT_FEATURES.items() if bits >> bit & 1],
    }
    unknown = bits & ~sum(1 << bit for bit in (*own, *TRANSPORT_FEATURES))
    if unknown:
        answer["unknown-dev-features"] = unknown & (1 << 64) - 1
    return answer


def virtio_status(attached: Attached, *, running: bool) -> dict[str, Any]:
    """x-query-virtio-status."""
    device = attached.device
    live = device.status & Status.DRIVER_OK != 0
    status: dict[str, Any] = {
        "statuses": [name for bit, name in STATUSES.items() if device.status & bit]
    }
    unknown = device.status & ~sum(STATUSES)
    if unknown:
        status["unknown-statuses"] = unknown
    name = device.NAME
    used = sum(1 for queue in device.queues if queue.size)
    return {
        "name": name, "device-id": device.ID, "vhost-started": False, "device-endian": "little",
        "guest-features": _features(name, device.accepted),
        "host-features": _features(name, device.offered),
        "backend-features": _features(name, 0),
        "num-vqs": used, "status": status, "isr": device.isr,
        "queue-sel": max(used - 1, 0),  # where a driver that has set them up leaves it
        "vm-running": running, "broken": device.broken, "disabled": device.disabled,
        "use-started": True, "started": live, "start-on-kick": False,
        "disable-legacy-check": False, "bus-name": "", "use-guest-notifier-mask": True,
    }  # fmt: skip


def _queue(attached: Attached, number: int) -> Virtqueue:
    queues = attached.device.queues
    if number >= len(queues) or not queues[number].size:
        raise QmpError(f"Invalid virtqueue number {number}")
    return queues[number]


def queue_status(attached: Attached, number: int) -> dict[str, Any]:
    """x-query-virtio-queue-status."""
    queue = _queue(attached, number)
    last, shadow, used = queue.indices
    event_idx = bool(attached.device.accepted & Feature.EVENT_IDX)
    return {
        "name": attached.device.NAME, "queue-index": number, "inuse": queue.in_use,
        "vring-num": queue.size, "vring-num-default": queue.default_size, "vring-align": 4096,
        "vring-desc": queue.desc, "vring-avail": queue.avail, "vring-used": queue.used,
        "used-idx": used, "signalled-used": used, "signalled-used-valid": event_idx and used > 0,
        "last-avail-idx": last, "shadow-avail-idx": shadow,
    }  # fmt: skip


def queue_element(attached: Attached, number: int, index: int | None) -> dict[str, Any]:
    """x-query-virtio-queue-element: of a ring's entry its first descriptor."""
    queue, memory = _queue(attached, number), attached.device.memory

    def word(address: int, size: int) -> int:
        if not memory.contains(address, size):
            return 0
        return int.from_bytes(memory.read(address, size), "little")

    last, _, _ = queue.indices
    head = word(queue.avail + 4 + 2 * ((last if index is None else index) % queue.size), 2)
    at = queue.desc + 16 * (head % queue.size)
    flags = word(at + 12, 2)
    names = [name for bit, name in enumerate(("next", "write", "indirect")) if flags >> bit & 1]
    return {
        "name": attached.device.NAME, "index": head,
        "descs": [{"addr": word(at, 8), "len": word(at + 8, 4), "flags": names}],
        "avail": {"flags": word(queue.avail, 2), "idx": word(queue.avail + 2, 2), "ring": head},
        "used": {"flags": word(queue.used, 2), "idx": word(queue.used + 2, 2)},
    }  # fmt: skip


def pci_buses(machine: Machine) -> list[dict[str, Any]]:
    """query-pci: the functions of each bus."""
    if machine.pci is None:
        return []
    names = {
        attached.slot: name
        for name, attached in machine.devices.items()
        if machine.config.transport is Transport.PCI
    }
    buses: dict[int, list[dict[str, Any]]] = {}
    for where, function in sorted(machine.pci.functions.items()):
        entry = _function(where, function)
        entry["qdev_id"] = names.get(where, "")
        buses.setdefault(where >> 8, []).append(entry)
    return [{"bus": number, "devices": found} for number, found in buses.items()]


def _function(where: int, function: PciFunction) -> dict[str, Any]:
    read = function.read_config
    kind = read(CLASS, 4) >> 16
    described = {"desc": CLASSES[kind]} if kind in CLASSES else {}
    pin = read(INTERRUPT + 1, 1)
    interrupt = {"irq": read(INTERRUPT, 1)} if pin else {}
    return {
        "bus": where >> 8, "slot": where >> 3 & 31, "function": where & 7,
        "class_info": {"class": kind, **described},
        "id": {
            "vendor": read(VENDOR, 2), "device": read(VENDOR + 2, 2),
            "subsystem-vendor": read(SUBSYSTEM, 2), "subsystem": read(SUBSYSTEM + 2, 2),
        },
        "irq_pin": pin, **interrupt, "regions": sorted(_bars(function), key=_number),
    }  # fmt: skip


def _number(region: dict[str, Any]) -> int:
    return int(region["bar"])


def _bars(function: PciFunction) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "bar": bar.number, "type": "memory", "size": bar.size,
            "address": UNMAPPED if bar.start is None else bar.start,
            "prefetch": bar.wide, "mem_type_64": bar.wide,
        }
        for bar in function.bars
    ]  # fmt: skip
    memory = {entry["bar"] for entry in found}
    for number in range(6):
        at = BARS + 4 * number
        value = function.read_config(at, 4)
        if number in memory or not value & 1:
            continue
        # As anybody sizes it: what of it can be set.
        function.write_config(at, 4, 0xFFFFFFFF)
        size = -(function.read_config(at, 4) & ~3) & 0xFFFFFFFF
        function.write_config(at, 4, value)
        # No window leads to ports.
        found.append({"bar": number, "type": "io", "size": size, "address": UNMAPPED})
    return found
