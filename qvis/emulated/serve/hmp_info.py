# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``info`` of the human monitor shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..messages import Delivery
from . import inventory
from .hmp import Line, info
from .mtree import mtree
from .qom import CPU, Node

if TYPE_CHECKING:
    from ..machine import Machine

__all__ = ["interrupt_controllers"]

DELIVERIES = {
    Delivery.FIXED: "Fixed", Delivery.LOWEST: "LowPri", Delivery.SMI: "SMI", Delivery.NMI: "NMI",
    Delivery.INIT: "INIT", Delivery.STARTUP: "SIPI", Delivery.EXTINT: "ExtINT",
}  # fmt: skip
LVTS = {"LVT0": 0x350, "LVT1": 0x360, "LVTPC": 0x340, "LVTERR": 0x370, "LVTTHMR": 0x330,
        "LVTT": 0x320}  # fmt: skip


@info("status", "show the current VM status (running|paused)")
def _info_status(line: Line) -> str:
    status = line.qmp("query-status")["status"]
    return (
        f"VM status: {status}\n"
        if status in ("running", "paused")
        else (f"VM status: paused ({status})\n")
    )


@info("version", "show the version of QEMU")
def _info_version(line: Line) -> str:
    version = line.qmp("query-version")
    number = ".".join(str(version["qemu"][part]) for part in ("major", "minor", "micro"))
    return f"{number}{version['package']}\n"


@info("name", "show the current VM name")
def _info_name(line: Line) -> str:
    return f"{line.call.answers.name}\n"


@info("uuid", "show the current VM UUID")
def _info_uuid(line: Line) -> str:
    return f"{line.qmp('query-uuid')['UUID']}\n"


@info("kvm", "show KVM information")
def _info_kvm(line: Line) -> str:
    return "kvm support: not compiled\n"


@info("accelerators", "show present and enabled information")
def _info_accelerators(line: Line) -> str:
    return "[tcg]\n"


@info("cpus", "show infos for each CPU")
def _info_cpus(line: Line) -> str:
    return "".join(
        f"{'*' if cpu['cpu-index'] == line.cpu else ' '} CPU #{cpu['cpu-index']}: "
        f"thread_id={cpu['thread-id']} model={CPU.removesuffix('-x86_64-cpu')}\n"
        for cpu in line.qmp("query-cpus-fast")
    )


@info("usernet", "show user network stack connection states")
def _info_usernet(line: Line) -> str:
    port = line.call.answers.ssh_port()
    text = (
        "Hub -1 (net0):\n"
        "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\n"
    )
    if port is not None:
        text += f"  {'TCP[HOST_FORWARD]':17} {3:3} {'127.0.0.1':>15} {port:5} "
        text += f"{'10.0.2.15':>15} {22:5} {0:5} {0:5}\n"
    return text


@info("mtree", "show memory tree", "[-f][-o]", flags="fodD")
def _info_mtree(line: Line) -> str:
    return mtree(line.machine, flat="f" in line.options, owners="o" in line.options)


@info("pci", "show PCI info")
def _info_pci(line: Line) -> str:
    text = ""
    for function in (one for bus in line.qmp("query-pci") for one in bus["devices"]):
        identity, kind = function["id"], function["class_info"]
        text += f"  Bus {function['bus']:2}, device {function['slot']:3}, "
        text += f"function {function['function']}:\n"
        name = kind.get("desc") or f"Class {kind['class']:04}"
        text += f"    {name}: PCI device {identity['vendor']:04x}:{identity['device']:04x}\n"
        text += f"      PCI subsystem {identity['subsystem-vendor']:04x}"
        text += f":{identity['subsystem']:04x}\n"
        if "irq" in function:
            text += f"      IRQ {function['irq']}, pin {' ABCD'[function['irq_pin']]}\n"
        for region in function["regions"]:
            text += f"      BAR{region['bar']}: {_bar(region)}\n"
        text += f'      id "{function["qdev_id"]}"\n'
    return text


def _bar(region: dict[str, Any]) -> str:
    start = region["address"]
    mapped = start != inventory.UNMAPPED
    if region["type"] == "io":
        where = f"at {start:#06x} [{start + region['size'] - 1:#06x}]" if mapped else "(not mapped)"
        return f"I/O {where}"
    bits, kind = 64 if region["mem_type_64"] else 32, " prefetchable" if region["prefetch"] else ""
    where = "(not mapped)"
    if mapped:
        where = f"at {start:#010x} [{start + region['size'] - 1:#010x}]"
    return f"{bits} bit{kind} memory {where}"


@info("network", "show the network state")
def _info_network(line: Line) -> str:
    suffix = "pci" if line.machine.pci is not None else "device"
    text = ""
    for index, (name, card) in enumerate(inventory.cards(line.machine).items()):
        text += f"{name}: index=0,type=nic,model=virtio-net-{suffix},macaddr={card.mac.hex(':')}\n"
        text += f" \\ net{index}: index=0,type=user,net=10.0.2.0,restrict=off\n"
    return text


@info("block", "show info of block devices", "[-n] [-v] [device]", most=1, flags="nv")
def _info_block(line: Line) -> str:
    text = []
    for number, (name, disk) in enumerate(inventory.disks(line.machine).items()):
        mode = "writeback" if disk.write_cache else "writethrough"
        if line.rest in ("", f"disk{number}"):
            text.append(
                f"disk{number}: {inventory.filename(disk)} (null-co)\n"
                f"    Attached to:      {inventory.qdev(line.machine, name)}\n"
                f"    Cache mode:       {mode}\n"
            )
    return "\n".join(text)


@info("chardev", "show the character devices")
def _info_chardev(line: Line) -> str:
    found = line.call.answers.chardevs()
    return "".join(f"{label}: filename={name}\n" for label, name in found.items())


@info("virtio", "list all available virtio devices")
def _info_virtio(line: Line) -> str:
    return "".join(f"{one['path']} [{one['name']}]\n" for one in line.qmp("x-query-virtio"))


@info("iothreads", "show iothreads")
def _info_iothreads(line: Line) -> str:
    return ""


@info("migrate", "show migration status", "[-a]", flags="a")
def _info_migrate(line: Line) -> str:
    return ""


@info("memory_size_summary", "show the amount of memory in bytes")
def _info_memory(line: Line) -> str:
    return f"base memory: {line.machine.memory.size}\nplugged memory: 0\n"


@info("qom-tree", "show QOM composition tree", "[path]", most=1)
def _info_qom_tree(line: Line) -> str:
    tree = line.call.answers.tree

    def shown(node: Node, depth: int) -> str:
        name = node.path.rpartition("/")[2] or ""
        text = f"{'  ' * depth}/{name} ({node.type})\n"
        for _, child in sorted(node.children.items()):
            text += shown(child, depth + 1)
        return text

    return shown(tree.resolve(line.rest or "/machine"), 0)


@info("qtree", "show device tree")
def _info_qtree(line: Line) -> str:
    """The buses and what is on them, without the properties: qom-get has those."""
    tree = line.call.answers.tree
    devices: dict[str, list[Node]] = {}
    for node in tree.all():
        devices.setdefault(str(node.values.get("parent_bus")), []).append(node)
    buses = {node.path: node for node in tree.all()}

    def shown(path: str, name: str, depth: int) -> str:
        indent = "  " * depth
        text = f"{indent}bus: {name}\n{indent}  type {buses[path].type}\n"
        for node in devices.get(path, ()):
            named = node.path.startswith("/machine/peripheral/") and node.path.count("/") == 3
            identifier = node.path.rpartition("/")[2] if named else ""
            text += f'{indent}  dev: {node.type}, id "{identifier}"\n'
            for child in node.children.values():
                if child.path in devices:
                    text += shown(child.path, child.path.rpartition("/")[2], depth + 2)
        return text

    return shown("/machine/unattached/sysbus", "main-system-bus", 0)


@info("pic", "show PIC state")
def _info_pic(line: Line) -> str:
    return interrupt_controllers(line.machine)


def interrupt_controllers(machine: Machine) -> str:
    """The PICs, then the IOAPICs."""
    text = ""
    for number, chip in ((1, machine.pic._second), (0, machine.pic._first)):
        text += (
            f"pic{number}: irr={chip.irr:02x} imr={chip.imr:02x} isr={chip.isr:02x} "
            f"hprio={(chip.lowest + 1) & 7} irq_base={chip.base:02x} rr_sel={chip.read_isr:d} "
            f"elcr={chip.elcr:02x} fnm={chip.nested:d}\n"
        )
    for ioapic in machine.ioapics:
        text += f"ioapic0: ver=0x20 id={ioapic.id:#04x} sel={ioapic.read(0, 4):#04x}\n"
        for pin in range(24):
            entry = ioapic.entry(pin)
            mode = Delivery(entry >> 8 & 7).name.lower() if entry >> 8 & 7 != 3 else "reserved"
            text += (
                f"  pin {pin:<2} {entry:#018x} dest={entry >> 56:X} vec={entry & 0xFF:<3} "
                f"{'active-lo' if entry >> 13 & 1 else 'active-hi'} "
                f"{'level' if entry >> 15 & 1 else 'edge':5} "
                f"{'masked' if entry >> 16 & 1 else '':6} {mode:6} "
                f"{'logical' if entry >> 11 & 1 else 'physical'}\n"
            )
        for name, bits in (("IRR", ioapic.lines), ("Remote IRR", ioapic.remote_irr)):
            pins = " ".join(str(pin) for pin in range(24) if bits >> pin & 1)
            text += f"  {name:<{8 if name == 'IRR' else 10}} {pins or '(none)'}\n"
    return text


@info("lapic", "show local apic state", "[apic-id]", most=1)
def _info_lapic(line: Line) -> str:
    index = line.number(line.rest)[0] if line.rest else line.cpu
    if index >= len(line.machine.vcpus):
        return "No CPU available\n"
    apic = line.machine.vcpus[index].apic
    text = f"dumping local APIC state for CPU {index} \n\n"

    def read(offset: int) -> int:
        return apic.rdmsr(0x800 + (offset >> 4)) if apic.x2apic else apic.read(offset)

    for name, offset in LVTS.items():
        text += f"{name}\t {_lvt(read(offset), timer=name == 'LVTT')}\n"
    divide = read(0x3E0)
    by = 1 << (((divide >> 1 & 4 | divide & 3) + 1) & 7)
    icr = read(0x300)
    shorthand = ("no-shorthand", "self", "all-self", "all")[icr >> 18 & 3]
    spurious = read(0xF0)
    text += (
        f"Timer\t DCR={divide:#x} (divide by {by}) initial_count = {read(0x380)}"
        f" current_count = {read(0x390)}\n"
        f"SPIV\t {spurious:#010x} APIC {'enabled' if spurious & 0x100 else 'disabled'}, "
        f"focus=off, spurious vec {spurious & 0xFF}\n"
        f"ICR\t {icr & 0xFFFFFFFF:#010x} {'logical' if icr >> 11 & 1 else 'physical'} "
        f"{'level' if icr >> 15 & 1 else 'edge'} "
        f"{'assert' if icr >> 14 & 1 else 'de-assert'} {shorthand}\n"
        f"ESR\t {read(0x280):#010x}\n"
    )
    for name, bits in (("ISR", apic.isr), ("IRR", apic.irr)):
        vectors = " ".join(
            f"{vector}{'(level)' if apic.tmr >> vector & 1 else ''}"
            for vector in range(256) if bits >> vector & 1
        )  # fmt: skip
        text += f"{name}\t {vectors or '(none)'}\n"
    served = apic.isr.bit_length() - 1 & 0xF0 if apic.isr else 0
    priority = apic.tpr if apic.tpr & 0xF0 >= served else served
    return text + f"\nAPR 0x00 TPR {apic.tpr:#04x} PPR {priority:#04x}\n"


def _lvt(entry: int, *, timer: bool) -> str:
    masked = "masked" if entry >> 16 & 1 else ""
    mode = ""
    if timer:
        mode = {0: "one-shot", 1: "periodic", 2: "tsc-deadline"}.get(entry >> 17 & 3, "")
    known = {int(kind): name for kind, name in DELIVERIES.items()}
    delivery = known.get(entry >> 8 & 7, "reserved")
    vector = "" if delivery == "NMI" else f" (vec {entry & 0xFF})"
    return (
        f"{entry:#010x} {'active-lo' if entry >> 13 & 1 else 'active-hi'} "
        f"{'level' if entry >> 15 & 1 else 'edge':5} {masked:6} {mode:12} {delivery:6}{vector}"
    )
