# SPDX-License-Identifier: GPL-2.0-or-later
"""How Linux finds PCI functions at boot and gives them addresses.

Linux: drivers/pci/probe.c, setup-bus.c, setup-res.c. Configuration space is reached by
memory (ECAM). Not modelled: bridges, INTx routing and quirks. Functions on other buses than
0, which a machine with hundreds of devices has, are looked for as those of a root bus.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..vcpu import Vcpu

__all__ = ["MSIX", "VENDOR", "Function", "probe"]

ECAM = 0xE0000000
WINDOW_32, WINDOW_64 = 0xC0000000, 0xC000000000
COMMAND, STATUS, CLASS, CACHE_LINE, HEADER, BARS = 0x04, 0x06, 0x08, 0x0C, 0x0E, 0x10
SUBSYSTEM, ROM, CAPABILITIES, LINE, PIN = 0x2C, 0x30, 0x34, 0x3C, 0x3D
EXTENDED = 0x100
HAS_CAPABILITIES = 0x10
INTX_DISABLE = 0x400
MULTIFUNCTION = 0x80
IO, WIDE = 1, 4
MODERN = 0x1040  # device IDs from there on are virtio's and that
MSIX, EXPRESS, VENDOR = 0x11, 0x10, 0x09
CAPABILITIES_MOST = 48  # PCI_FIND_CAP_TTL


class Function:
    """One PCI function: its configuration space and where its BARs are."""

    def __init__(self, where: int) -> None:
        self.where = where
        """Bus << 8 | device << 3 | function."""
        self.config = ECAM + (where << 12)
        self.bars: dict[int, int] = {}
        """Guest-physical addresses, by number."""
        self.sizes: dict[int, int] = {}
        self.wide: set[int] = set()
        self.msix = 0
        """Where its MSI-X capability is."""
        self.pin = 0
        self.vendor = self.device = 0
        """Of virtio: the subsystem's IDs with a transitional device (virtio 1.3, 4.1.2.3)."""

    @property
    def name(self) -> str:
        """As under /sys/bus/pci/devices."""
        return f"0000:{self.where >> 8:02x}:{self.where >> 3 & 31:02x}.{self.where & 7}"

    @classmethod
    def place(cls, vcpu: Vcpu, config: int, others: list[Function]) -> Function | None:
        """The function that was put in at ``config``, with room for its BARs beside others'."""
        found: list[Function] = []
        _scan(vcpu, config - ECAM >> 12, found)
        _assign(vcpu, found, others)
        return found[0] if found else None

    def read(self, vcpu: Vcpu, offset: int, size: int) -> int:
        """Configuration space."""
        return vcpu.read(self.config + offset, size)

    def write(self, vcpu: Vcpu, offset: int, size: int, value: int) -> None:
        """Likewise."""
        vcpu.write(self.config + offset, size, value)

    def find(self, vcpu: Vcpu, wanted: int) -> int:
        """Where the first capability of that ID is; 0: there is none."""
        if not self.read(vcpu, STATUS, 2) & HAS_CAPABILITIES:
            return 0
        return self._walk(vcpu, self.read(vcpu, CAPABILITIES, 1), wanted)

    def find_next(self, vcpu: Vcpu, after: int, wanted: int) -> int:
        """The next one behind the one at ``after``."""
        return self._walk(vcpu, self.read(vcpu, after + 1, 1), wanted)

    def _walk(self, vcpu: Vcpu, at: int, wanted: int) -> int:
        for _ in range(CAPABILITIES_MOST):
            at &= ~3
            if at < 0x40:
                break
            header = self.read(vcpu, at, 2)
            if header & 0xFF == wanted:
                return at
            at = header >> 8
        return 0


def probe(vcpu: Vcpu, buses: Iterable[int]) -> list[Function]:
    """Find all functions of ``buses``, and give each BAR an address; the host bridge is first."""
    found: list[Function] = []
    for bus in buses:
        for slot in range(32):
            header = _scan(vcpu, bus << 8 | slot << 3, found)
            if header & MULTIFUNCTION:
                for number in range(1, 8):
                    _scan(vcpu, bus << 8 | slot << 3 | number, found)
    for function in found:  # what was decoded by firmware, and quirks
        for offset in range(0, 0x40, 4):
            function.read(vcpu, offset, 4)
        function.find(vcpu, EXPRESS)
    for _ in range(2):
        for function in found:
            function.read(vcpu, COMMAND, 2)
    _assign(vcpu, found, [])
    for function in found:
        function.read(vcpu, CACHE_LINE, 1)
    return found


def _scan(vcpu: Vcpu, where: int, found: list[Function]) -> int:
    """``pci_scan_device()``: its header type; 0 if nothing is there."""
    function = Function(where)
    ids = function.read(vcpu, 0, 4)
    if ids & 0xFFFF in (0, 0xFFFF):
        return 0
    found.append(function)
    header = function.read(vcpu, HEADER, 1)
    function.find(vcpu, EXPRESS)
    bridge = function.read(vcpu, CLASS, 4) >> 16 == 0x0600
    if bridge:
        function.read(vcpu, EXTENDED, 4)
    else:
        function.find(vcpu, EXPRESS)
    command = function.read(vcpu, COMMAND, 2)  # can INTx be masked?
    function.write(vcpu, COMMAND, 2, command ^ INTX_DISABLE)
    function.read(vcpu, COMMAND, 2)
    function.write(vcpu, COMMAND, 2, command)
    function.pin = function.read(vcpu, PIN, 1)
    if function.pin:
        function.read(vcpu, LINE, 1)
    _size_bars(vcpu, function, bridge)
    function.vendor = function.read(vcpu, SUBSYSTEM, 2)
    function.device = function.read(vcpu, SUBSYSTEM + 2, 2)
    if ids >> 16 >= MODERN:
        function.device = (ids >> 16) - MODERN
    function.find(vcpu, EXPRESS)  # MSI and what else may be
    function.find(vcpu, EXPRESS)
    function.msix = function.find(vcpu, MSIX)
    if function.msix:
        function.read(vcpu, function.msix + 2, 2)
    for _ in range(5):
        function.find(vcpu, EXPRESS)
    return header


def _size_bars(vcpu: Vcpu, function: Function, bridge: bool) -> None:
    """``pci_read_bases()``; a bridge is not switched off meanwhile."""
    number = 0
    while number < 6:
        at = BARS + 4 * number
        low, mask = _size(vcpu, function, at, bridge, 0xFFFFFFFF)
        wide = bool(mask) and not low & IO and low & 6 == WIDE
        if wide:
            _, high = _size(vcpu, function, at + 4, True, 0xFFFFFFFF)
            mask |= high << 32
            function.wide.add(number)
        if mask and not low & IO:
            bits = (1 << 64) - 1 if wide else 0xFFFFFFFF
            function.sizes[number] = (~(mask & ~0xF) & bits) + 1
        number += 2 if wide else 1
    _size(vcpu, function, ROM, bridge, 0xFFFFF800)


def _size(vcpu: Vcpu, function: Function, at: int, quiet: bool, ones: int) -> tuple[int, int]:
    if not quiet:
        function.read(vcpu, COMMAND, 2)
    before = function.read(vcpu, at, 4)
    function.write(vcpu, at, 4, ones)
    mask = function.read(vcpu, at, 4)
    function.write(vcpu, at, 4, before)
    return before, mask


def _assign(vcpu: Vcpu, found: list[Function], others: list[Function]) -> None:
    """``pci_assign_unassigned_resources()``: first those of 64 bits; behind ``others``'."""
    ends = [at + other.sizes[n] for other in others for n, at in other.bars.items()]
    next_32 = max((end for end in ends if end <= ECAM), default=WINDOW_32)
    next_64 = max((end for end in ends if end > ECAM), default=WINDOW_64)
    for function in found:
        for number in sorted(function.wide):
            size = function.sizes.get(number, 0)
            if not size:
                continue
            at = BARS + 4 * number
            next_64 = (next_64 + size - 1) & -size
            command = function.read(vcpu, COMMAND, 2)
            function.write(vcpu, COMMAND, 2, command)
            function.write(vcpu, at, 4, next_64 & 0xFFFFFFFF | 0xC)
            function.read(vcpu, at, 4)
            function.write(vcpu, at + 4, 4, next_64 >> 32)
            function.read(vcpu, at + 4, 4)
            function.write(vcpu, COMMAND, 2, command)
            function.bars[number] = next_64
            next_64 += size
    for function in found:
        for number, size in function.sizes.items():
            if number in function.wide:
                continue
            at = BARS + 4 * number
            next_32 = (next_32 + size - 1) & -size
            function.write(vcpu, at, 4, next_32)
            function.read(vcpu, at, 4)
            function.bars[number] = next_32
            next_32 += size
