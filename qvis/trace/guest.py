# SPDX-License-Identifier: GPL-2.0-or-later
"""What a trace has to ask its guest: which kernel it is, and which interrupt is whose."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..errors import GuestError, UsageError
from ..guest.interrupts import Shell
from .model import Space
from .store import Irq, Region
from .symbols import TEXT, Symbols

__all__ = ["INTERRUPTS", "PLACES", "irqs", "kernel_moved", "meanwhile"]

KERNEL = f"hexdump -v -e '1/1 \"%02x\"' /sys/kernel/notes; echo; grep -w {TEXT} /proc/kallsyms"
# Which interrupts there are, which of them virtio devices have, and where each device's
# registers are: a platform device's in /proc/iomem, a PCI function's in its resource file.
INTERRUPTS = (
    "grep '^ *[0-9]' /proc/interrupts; cd /sys/bus/virtio/devices; "
    'for d in *; do p=$(readlink -f $d/..); echo "= $d ${p##*/}"; '
    "grep -s '^0x0*[1-9a-f]' $p/resource; done; grep -v PCI /proc/iomem"
)
# The same, and which vector of which CPU each has (CONFIG_GENERIC_IRQ_DEBUGFS).
PLACES = f"grep -sH 'Vector:\\|Target:' /sys/kernel/debug/irq/irqs/*; {INTERRUPTS}"
# An ELF note of owner "GNU", type 3: sizes, type, name, then 20 bytes (elf(5)).
BUILD_ID = re.compile("040000001400000003000000474e5500([0-9a-f]{40})")
COUNTS = re.compile(r"^ *(\d+):((?: +\d+)+) ", re.MULTILINE)
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


def irqs(text: str, regions: Sequence[Region]) -> list[Irq]:
    """What :data:`INTERRUPTS` printed, with the devices' names in ``regions``."""
    text = text.replace("\r", "")
    names = dict(_device_names(text, regions))
    return [
        Irq(int(number), names.get(device, device), source)
        for number, actions in ROW.findall(text)
        for device, source in ACTION.findall(actions)
    ]


def meanwhile(before: str, after: str, regions: Sequence[Region]) -> tuple[Irq, ...]:
    """The interrupts of two answers to :data:`PLACES`, each with its place if it has kept it.

    It may have been moved away and back. So it must have come to its own CPU only, and there
    none that did not stay itself: that one may have had the vector meanwhile.
    """
    were, now = irqs(before, regions), irqs(after, regions)
    old, new = _places(before), _places(after)
    came = _came(before, after)
    stayed = {irq: at for irq, at in new.items() if old.get(irq) == at and came[irq] <= {at[0]}}
    visited = {cpu for irq in new.keys() - stayed.keys() for cpu in came[irq]}
    kept = {irq: at for irq, at in stayed.items() if at[0] not in visited}
    there = {irq.irq for irq in now}
    return tuple(
        replace(irq, cpu=kept[irq.irq][0], vector=kept[irq.irq][1]) if irq.irq in kept else irq
        for irq in (*(irq for irq in were if irq.irq not in there), *now)
    )


def _places(text: str) -> dict[int, tuple[int, int]]:
    """The CPU and the vector of each interrupt that has them."""
    found = {(int(irq), what): int(value) for irq, what, value in PLACE.findall(text)}
    return {
        irq: (cpu, found[irq, "Vector"])
        for (irq, what), cpu in found.items()
        if what == "Target" and (irq, "Vector") in found
    }


def _came(before: str, after: str) -> defaultdict[int, set[int]]:
    """To which CPUs each interrupt came between two answers; since it began if it is new."""
    old, new = (
        {int(irq): [int(count) for count in counts.split()] for irq, counts in COUNTS.findall(text)}
        for text in (before, after)
    )
    came: defaultdict[int, set[int]] = defaultdict(set)
    for irq, counts in new.items():
        earlier = old.get(irq, [0] * len(counts))
        came[irq] = {cpu for cpu, pair in enumerate(zip(earlier, counts, strict=False))
                     if pair[0] != pair[1]}  # fmt: skip
    return came


def _device_names(text: str, regions: Sequence[Region]) -> Iterable[tuple[str, str]]:
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
