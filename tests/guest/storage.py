# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupt storage of a device in a real guest: as its driver shows it, and as it is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qvis.machine.machine import Machine

# docs/virtio-interrupts.md, layout
LINE = 128  # bytes: areas are multiples of it
ENTRY_CACHED, MASK_CACHED = 1, 2


@dataclass(frozen=True)
class Row:
    """What there is of one vector."""

    masked: bool
    pending: bool
    entry_cached: bool
    mask_cached: bool
    address: int
    data: int


@dataclass(frozen=True)
class Storage:
    """Where in the guest's physical memory, and what of each vector."""

    address: int
    rows: tuple[Row, ...]


def shown(vm: Machine, device: str) -> Storage:
    """The storage of ``device`` ("virtio0") as the driver's debugfs file has it."""
    head, *lines = vm.ssh.run(f"cat /sys/kernel/debug/virtio/{device}/vis").stdout.splitlines()
    start = re.fullmatch(r"storage (0x[0-9a-f]+) vectors (\d+)", head)
    assert start, head
    found = []
    for number, line in enumerate(lines):
        index, _, rest = line.partition(": ")
        assert int(index) == number, line
        words = rest.split()
        of = {name: int(value, 0) for name, value in zip(words[::2], words[1::2], strict=True)}
        found.append(
            Row(bool(of["masked"]), bool(of["pending"]), bool(of["entry-cached"]),
                bool(of["mask-cached"]), of["address"], of["data"])
        )  # fmt: skip
    assert len(found) == int(start[2])
    return Storage(int(start[1], 16), tuple(found))


def in_memory(vm: Machine, address: int, vectors: int) -> Storage:
    """What QEMU finds in the guest's memory, read by the layout of the proposal."""
    area = -(-vectors // LINE) * LINE
    size = 3 * area + 8 * vectors
    listing = vm.qmp.monitor(f"xp /{size}xb {address:#x}")
    data = bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2})\b", listing))
    assert len(data) == size, listing
    mask, pending, cached = (data[n * area : (n + 1) * area] for n in range(3))
    for reserved, most in ((mask, 1), (pending, 1), (cached, 3)):
        assert max(reserved[:vectors]) <= most
    entries = [int.from_bytes(data[3 * area + 8 * v :][:8], "little") for v in range(vectors)]
    return Storage(
        address,
        tuple(
            Row(bool(mask[v]), bool(pending[v]), bool(cached[v] & ENTRY_CACHED),
                bool(cached[v] & MASK_CACHED), entries[v] & 0xFFFFFFFF, entries[v] >> 32)
            for v in range(vectors)
        ),
    )  # fmt: skip
