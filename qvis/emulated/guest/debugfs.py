# SPDX-License-Identifier: GPL-2.0-or-later
"""/sys/kernel/debug: interrupts (kernel/irq/debugfs.c) and virtio devices' storage."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .chips import IoApicChip, MsixChip
from .files import Directory, Node, Text
from .irq import IrqDesc
from .msi import Storage
from .proc import cpu_list
from .virtio_pci import PciParent

if TYPE_CHECKING:
    from .kernel import Kernel
    from .processes import Process
    from .userland import Userland
    from .virtio import Parent, VirtioDevice

__all__ = ["make_debug"]

# Bits of irq_common_data's state (include/linux/irq.h), in the order in which they are shown.
STATES = (
    (1 << 13, "IRQD_LEVEL"),
    (1 << 9, "IRQD_ACTIVATED"),
    (1 << 22, "IRQD_IRQ_STARTED"),
    (1 << 16, "IRQD_IRQ_DISABLED"),
    (1 << 17, "IRQD_IRQ_MASKED"),
    (1 << 24, "IRQD_SINGLE_TARGET"),
    (1 << 15, "IRQD_MOVE_PCNTXT"),
    (1 << 12, "IRQD_AFFINITY_SET"),
    (1 << 8, "IRQD_SETAFFINITY_PENDING"),
    (1 << 21, "IRQD_AFFINITY_MANAGED"),
    (1 << 28, "IRQD_AFFINITY_ON_ACTIVATE"),
    (1 << 26, "IRQD_CAN_RESERVE"),
    (1 << 25, "IRQD_DEFAULT_TRIGGER_SET"),
    (1 << 27, "IRQD_HANDLE_ENFORCE_IRQCTX"),
)
LEVEL_HIGH = 4
IN_DEPTH = "            "


def _state(kernel: Kernel, desc: IrqDesc) -> int:
    chip = desc.hardware
    line, own = isinstance(chip, IoApicChip), not isinstance(chip, IoApicChip | MsixChip)
    state = 1 << 28 | 1 << 27
    state |= (1 << 24) * desc.activated | (1 << 9) * desc.activated | (1 << 22) * desc.started
    state |= (1 << 16) * (not desc.started) | (1 << 17) * desc.masked
    state |= (1 << 26) * (not own)  # MSIs of virtio-mmio are no reservation
    state |= (1 << 15) * (not chip.moves_in_interrupt and own)
    state |= (1 << 12) * (desc.affinity != frozenset(kernel.cpus) or own)
    state |= (1 << 8) * (desc.pending is not None) | (1 << 21) * desc.managed
    if line and not chip.edge:
        state |= 1 << 25 | 1 << 13 | LEVEL_HIGH
    return state


def _domain(kernel: Kernel, desc: IrqDesc) -> str:
    chip = desc.hardware
    if isinstance(chip, IoApicChip):
        lines = kernel._gsis
        return f"IO-APIC-{next((n // 24 for n, d in lines.items() if d is desc), 0)}"
    return f"{chip.name}-{12 if isinstance(chip, MsixChip) else 15}"


def _show(kernel: Kernel, desc: IrqDesc) -> str:
    chip = desc.hardware
    line = isinstance(chip, IoApicChip)
    state = _state(kernel, desc)
    names = [name for bit, name in STATES if state & bit]
    if state & LEVEL_HIGH:
        names.insert(0, "IRQ_TYPE_LEVEL_HIGH")
    flags = ["IRQCHIP_SKIP_SET_WAKE"] + ["IRQCHIP_ONESHOT_SAFE"] * (not line)
    device = "(null)" if line else re.sub(r"^\S+?-(?:MSIX|MSI|VIS)-", "", chip.name)
    status = 0x100 if line and not chip.edge else 0x400 if line else 0x4000
    lines = [
        f"handler:  handle_{'edge' if chip.edge else 'fasteoi'}_irq",
        f"device:   {device}",
        f"status:   0x{0 if isinstance(chip, MsixChip) else status:08x}",
        *([f"{IN_DEPTH}_IRQ_NOPROBE"] if status == 0x400 else []),
        "istate:   0x00004000",
        "ddepth:   0",
        "wdepth:   0",
        f"dstate:   0x{state:08x}",
        *(f"{IN_DEPTH}{name}" for name in names),
        "node:     0",
        f"affinity: {cpu_list(desc.affinity)}",
        f"effectiv: {cpu_list(desc.effective)}",
        f"pending:  {cpu_list(desc.pending or frozenset())}",
        f"domain:  {_domain(kernel, desc)}",
        f" hwirq:   0x{chip.hwirq:x}",
        f" chip:    {chip.name}",
        f"  flags:   0x{0x410 if line else 0x430:x}",
        *(f"             {flag}" for flag in flags),
        " parent:",
        "    domain:  VECTOR",
        f"     hwirq:   0x{desc.number:x}",
        "     chip:    APIC",
        "      flags:   0x0",
    ]
    if desc.vector:
        lines += [f"     Vector: {desc.vector:5}", f"     Target: {desc.cpu:5}"]
        if desc.prev_vector:
            lines += [
                f"     Previous vector: {desc.prev_vector:5}",
                f"     Previous target: {desc.prev_cpu:5}",
            ]
    lines += [
        f"     move_in_progress: {int(desc.move_in_progress)}",
        f"     is_managed:       {int(desc.managed)}",
        f"     can_reserve:      {int(bool(state & 1 << 26))}",
        "     has_reserved:     0",
        f"     cleanup_pending:  {int(desc.cleanup_pending)}",
    ]
    return "\n".join(lines) + "\n"


def _irq(kernel: Kernel, desc: IrqDesc) -> Text:
    def store(process: Process, text: str) -> None:
        """``mask`` and ``unmask`` are of our series; others of the kernel's are not modelled."""
        command = text.strip()
        if command == "mask":
            desc.mask(process.vcpu)
        elif command == "unmask":
            desc.unmask(process.vcpu)
        # Linux takes any other words too, and does nothing.

    return Text(lambda process: _show(kernel, desc), store, 0)


def _irqs(kernel: Kernel) -> Directory:
    descs = kernel.irqs.descs

    def get(name: str) -> Node | None:
        desc = descs.get(int(name)) if re.fullmatch(r"[1-9]\d{0,8}", name) else None
        return _irq(kernel, desc) if desc is not None else None

    return Directory(lambda: [str(number) for number in descs], get)


def _domains(kernel: Kernel) -> Directory:
    def names() -> list[str]:
        found = {"IO-APIC-0", "IO-APIC-1", "VECTOR", "default"}
        for parent in kernel.parents.values():
            if isinstance(parent, PciParent):
                found.add(f"PCI-MSIX-{parent.name}-12")
            elif parent.irqs:
                found.add(_domain(kernel, parent.irqs[0]))
        return sorted(found)

    def get(name: str) -> Node | None:
        return Text(lambda process: f"name:   {name}\n", size=0) if name in names() else None

    return Directory(names, get)


def _storage(parent: Parent) -> Storage | None:
    """What the driver of virtio-mmio handed over, if it did."""
    found = getattr(parent, "_msi", None)
    return found if isinstance(found, Storage) else None


def _vis(kernel: Kernel, device: VirtioDevice, storage: Storage) -> Text:
    """Our series' file: what is in interrupt storage now."""

    def show(process: Process) -> str:
        u8, u64 = kernel.memory.u8, kernel.memory.u64
        lines = [f"storage {storage.address:#x} vectors {storage.count}"]
        for number in range(storage.count):
            entry = u64[storage.entries_at + 8 * number >> 3]
            cached = u8[storage.cached_at + number]
            irqs = device.transport.irqs
            irq = irqs[number].number if number < len(irqs) else 0
            lines.append(
                f"{number}: irq {irq} masked {u8[storage.mask_at + number] & 1} "
                f"pending {u8[storage.pending_at + number] & 1} entry-cached {cached & 1} "
                f"mask-cached {cached >> 1 & 1} address 0x{entry & 0xFFFFFFFF:08x} "
                f"data 0x{entry >> 32:08x}"
            )
        return "\n".join(lines) + "\n"

    text = Text(show, size=0)
    text.mode = 0o400
    return text


def _virtio(kernel: Kernel) -> Directory:
    def get(name: str) -> Node | None:
        device = kernel.devices.get(name)
        if device is None:
            return None
        entries: dict[str, Node] = {}
        storage = _storage(device.transport)
        if storage is not None:
            entries["vis"] = _vis(kernel, device, storage)

        def features(process: Process) -> str:
            offered = device.transport.get_features(process.vcpu)
            return "".join(f"{bit}\n" for bit in range(64) if offered >> bit & 1)

        entries["device_features"] = Text(features, size=0)
        return Directory.of(entries)

    return Directory(lambda: list(kernel.devices), get)


def make_debug(userland: Userland) -> Directory:
    """The whole of it."""
    kernel = userland.kernel
    return Directory.of(
        {
            "irq": Directory.of({"irqs": _irqs(kernel), "domains": _domains(kernel)}),
            "virtio": _virtio(kernel),
        }
    )
