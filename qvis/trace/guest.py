# SPDX-License-Identifier: GPL-2.0-or-later
"""What a trace has to ask its guest: which kernel it is, and which interrupt is whose."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import UsageError
from ..guest.interrupts import SNAPSHOT as INTERRUPTS
from ..guest.interrupts import Shell, parse
from .model import Space
from .store import Irq, Region
from .symbols import TEXT, Symbols

__all__ = ["irqs", "kernel_moved"]

KERNEL = f"hexdump -v -e '1/1 \"%02x\"' /sys/kernel/notes; echo; grep -w {TEXT} /proc/kallsyms"
# Where each virtio device's registers are: a platform device's in /proc/iomem,
# a PCI function's in its resource file.
PLACES = (
    "cd /sys/bus/virtio/devices && for d in *; do p=$(readlink -f $d/..); echo = $d ${p##*/}; "
    "grep -s '^0x0*[1-9a-f]' $p/resource; done; echo ==; cat /proc/iomem"
)
# An ELF note of owner "GNU", type 3: sizes, type, name, then 20 bytes (elf(5)).
BUILD_ID = re.compile("040000001400000003000000474e5500([0-9a-f]{40})")


def kernel_moved(shell: Shell, symbols: Symbols) -> int:
    """How many bytes from where it was linked to the guest's kernel runs (KASLR).

    Raises :class:`UsageError` when the symbols are another kernel's.
    """
    notes, _, place = shell.run(KERNEL).stdout.partition("\n")
    running = BUILD_ID.search(notes)
    if symbols.build_id and running and running[1] != symbols.build_id:
        raise UsageError(
            f"the vmlinux does not match the running guest: build ID {symbols.build_id[:12]}..., "
            f"the guest has {running[1][:12]}..."
        )
    loaded = int(place.split()[0], 16) if place else 0
    return loaded - symbols.addresses[TEXT] if loaded else 0  # 0: kptr_restrict hides it


def irqs(shell: Shell, regions: Iterable[Region]) -> list[Irq]:
    """The guest's interrupts of virtio devices, under the devices' names in ``regions``."""
    names = _device_names(shell.run(PLACES).stdout, regions)
    vectors, _ = parse(shell.run(INTERRUPTS).stdout)
    return [Irq(v.irq, names.get(v.device, v.device), v.source) for v in vectors]


def _device_names(text: str, regions: Iterable[Region]) -> dict[str, str]:
    """Linux's name of each virtio device ("virtio0") to the machine's."""
    resources, _, iomem = text.partition("==\n")
    names = {}
    for block in resources.split("= ")[1:]:
        head, *bars = block.splitlines()
        virtio, parent = head.split()
        at = re.search(rf"^\s*([0-9a-f]+)-[0-9a-f]+ : {re.escape(parent)}$", iomem, re.MULTILINE)
        starts = [int(bar.split()[0], 16) for bar in bars] or ([int(at[1], 16)] if at else [])
        for region in regions:
            if region.space is Space.MEMORY and any(
                region.start <= start < region.end for start in starts
            ):
                names[virtio] = region.device
                break
    return names
