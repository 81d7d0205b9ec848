# SPDX-License-Identifier: GPL-2.0-or-later
"""What a trace has to ask its guest: which kernel it is, and which interrupt is whose."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from ..errors import GuestError, UsageError
from ..guest.interrupts import Shell
from .model import Space
from .store import Irq, Region
from .symbols import TEXT, Symbols

__all__ = ["INTERRUPTS", "irqs", "kernel_moved", "meanwhile"]

KERNEL = f"hexdump -v -e '1/1 \"%02x\"' /sys/kernel/notes; echo; grep -w {TEXT} /proc/kallsyms"
# Which interrupts virtio devices have, where each device's registers are (a platform
# device's in /proc/iomem, a PCI function's in its resource file), and which vector of which CPU
# each interrupt has, if the kernel has CONFIG_GENERIC_IRQ_DEBUGFS.
INTERRUPTS = (
    "grep virtio /proc/interrupts; cd /sys/bus/virtio/devices; "
    'for d in *; do p=$(readlink -f $d/..); echo "= $d ${p##*/}"; '
    "grep -s '^0x0*[1-9a-f]' $p/resource; done; "
    "grep -sH 'Vector:\\|Target:' /sys/kernel/debug/irq/irqs/*; grep -v PCI /proc/iomem"
)
# An ELF note of owner "GNU", type 3: sizes, type, name, then 20 bytes (elf(5)).
BUILD_ID = re.compile("040000001400000003000000474e5500([0-9a-f]{40})")
ROW = re.compile(r"^\s*(\d+):.*?((?:virtio\d+\S*(?:,\s+)?)+)\s*$", re.MULTILINE)
ACTION = re.compile(r"(virtio\d+)(?:-([^\s,]+))?")
PLACE = re.compile(r"^/sys/kernel/debug/irq/irqs/(\d+): *(Vector|Target): +(\d+)", re.MULTILINE)
DEVICE = re.compile(r"^= (virtio\d+) (\S+)\s*$((?:\s^0x.*$)*)", re.MULTILINE)


def kernel_moved(shell: Shell, symbols: Symbols) -> int:
    """How many bytes from where it was linked to the guest's kernel runs (KASLR).

    Raises :class:`UsageError` when the symbols are another kernel's, and
    :class:`GuestError` when the guest does not tell.
    """
    notes, _, place = shell.run(KERNEL).stdout.partition("\n")
    running = BUILD_ID.search(notes)
    if symbols.build_id and running and running[1] != symbols.build_id:
        raise UsageError(
            f"the vmlinux does not match the running guest: build ID {symbols.build_id[:12]}..., "
            f"the guest has {running[1][:12]}..."
        )
    loaded = int(place.split()[0], 16) if place else 0
    if not loaded:
        raise GuestError(
            "the guest does not tell where its kernel is (kptr_restrict, or no kallsyms): without "
            "that no interrupt can be told from another",
            stage="trace",
        )
    return loaded - symbols.addresses[TEXT]


def irqs(text: str, regions: Iterable[Region]) -> list[Irq]:
    """What :data:`INTERRUPTS` printed, with the devices' names in ``regions``."""
    text = text.replace("\r", "")
    names = dict(_device_names(text, list(regions)))
    places = {(int(irq), what): int(value) for irq, what, value in PLACE.findall(text)}
    return [
        Irq(irq, names.get(device, device), source,
            places.get((irq, "Target")), places.get((irq, "Vector")))
        for irq, actions in ((int(number), actions) for number, actions in ROW.findall(text))
        for device, source in ACTION.findall(actions)
    ]  # fmt: skip


def meanwhile(before: Iterable[Irq], after: Iterable[Irq]) -> tuple[Irq, ...]:
    """Those that there were at either time; with a place if it was the same at both."""
    known = {irq.irq: irq for irq in before}
    stayed = set(known.values()) & set(after)
    known |= {irq.irq: irq for irq in after}
    return tuple(
        irq if irq in stayed else replace(irq, cpu=None, vector=None) for irq in known.values()
    )


def _device_names(text: str, regions: list[Region]) -> Iterable[tuple[str, str]]:
    """Linux's name of each virtio device ("virtio0"), and the machine's."""
    for virtio, parent, resource in DEVICE.findall(text):
        at = re.search(rf"^\s*([0-9a-f]+)-[0-9a-f]+ : {re.escape(parent)}$", text, re.MULTILINE)
        starts = [int(line.split()[0], 16) for line in resource.split("\n") if line]
        starts = starts or ([int(at[1], 16)] if at else [])
        for region in regions:
            if region.space is Space.MEMORY and any(
                region.start <= start < region.end for start in starts
            ):
                yield virtio, region.device
                break
