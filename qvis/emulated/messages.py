# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupt messages, and which local APICs one of them goes to.

A message is a write to 0xfeexxxxx: the address says which processors, the data which
vector and how (SDM volume 3, 11.11). Devices with MSI write one, an IOAPIC writes one
for a pin, and an IPI is the same thing without the address. :class:`ApicBus` finds the
receivers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ioapic import IoApic
    from .lapic import LocalApic
    from .pic import PicPair

__all__ = ["MSI_BASE", "MSI_END", "ApicBus", "Delivery", "Message", "decode_msi"]

MSI_BASE = 0xFEE00000
MSI_END = 0xFEF00000
BROADCAST = 0xFFFFFFFF
XAPIC_BROADCAST = 0xFF
ROUTES = 1 << 17  # receivers of messages to remember; a guest can make up any number of routes

Acceptor = Callable[[int, bool], bool]


class Delivery(IntEnum):
    """What a processor does with a message, as bits 10:8 of MSI data, ICR and IOAPIC entry."""

    FIXED = 0
    LOWEST = 1
    SMI = 2
    NMI = 4
    INIT = 5
    STARTUP = 6
    EXTINT = 7


BY_VECTOR = (Delivery.FIXED, Delivery.LOWEST, Delivery.EXTINT)
DELIVERIES = {int(delivery): delivery for delivery in Delivery}


@dataclass(frozen=True)
class Message:
    """One interrupt on its way: ``destination`` as its mode has it, ``level`` its trigger."""

    vector: int
    destination: int
    logical: bool = False
    delivery: Delivery = Delivery.FIXED
    level: bool = False


def decode_msi(address: int, data: int) -> Message | None:
    """What a device's write of ``data`` to ``address`` asks for; None: nothing.

    Nothing is what another address asks for, and a delivery mode that is reserved in a
    message (3 and 6). Bits 11:5 of the address are bits 14:8 of the destination, as KVM's
    and QEMU's guests may use them (KVM_FEATURE_MSI_EXT_DEST_ID), unless bit 4 says that
    they are an IOMMU's; address bits 63:40 are bits 31:8, as an x2APIC format has them.
    """
    low = address & 0xFFFFFFFF
    if not MSI_BASE <= low < MSI_END:
        return None
    delivery = DELIVERIES.get(data >> 8 & 7)
    if delivery is None or delivery is Delivery.STARTUP:
        return None
    high = address >> 32 & 0xFFFFFF00
    if not high and not low & 0x10:
        high = (low & 0xFE0) << 3
    return Message(
        vector=data & 0xFF,
        destination=high | low >> 12 & 0xFF,
        logical=bool(low & 4),
        delivery=delivery,
        level=bool(data & 0x8000),
    )


class ApicBus:
    """Carries messages to local APICs, and the ends of level-triggered interrupts to IOAPICs.

    They join it when they are made. A local APIC's place in ``apics`` is its index, which is
    its x2APIC ID. ``pic`` answers for a pin in ExtINT mode.
    """

    def __init__(self) -> None:
        self.apics: list[LocalApic] = []
        self.ioapics: list[IoApic] = []
        self.pic: PicPair | None = None
        self.on_accept: Callable[[LocalApic, int, bool], None] | None = None
        """Told of each vector that reaches an enabled local APIC, also of one that was
        in IRR already: (who, vector, level)."""
        self._routes: dict[tuple[int, int], tuple[tuple[Acceptor, ...], int, bool]] = {}
        self._held = 0  # what counts for ROUTES
        self._by_id: dict[int, tuple[LocalApic, ...]] | None = None
        self._xapics: tuple[LocalApic, ...] | None = None

    def changed(self) -> None:
        """Forget who receives what: an LDR, a DFR, or whether one is enabled has changed."""
        self._routes.clear()

    def switched(self) -> None:
        """The same when the mode of one has changed."""
        self._xapics = None
        self._routes.clear()

    def renamed(self) -> None:
        """The same when the ID of one has changed."""
        self._by_id = None
        self._routes.clear()

    def msi(self, address: int, data: int) -> int:
        """Deliver a device's write of ``data`` to ``address``.

        How many local APICs have newly a vector pending for it; 0 also if each of them had.
        """
        route = self._routes.get((address, data))
        if route is None:
            route = self._route(address, data)
        acceptors, vector, level = route
        new = 0
        for accept in acceptors:
            new += accept(vector, level)
        return new

    def send(self, message: Message) -> int:
        """Deliver one message; how many took it that did not have it already."""
        acceptors = self._acceptors(message)
        return sum([accept(message.vector, message.level) for accept in acceptors])

    def signal(self, targets: Iterable[LocalApic], delivery: Delivery, vector: int) -> int:
        """Give what is not by vector (SMI, NMI, INIT, start-up) to ``targets``; how many."""
        return sum([target.signalled(delivery, vector, False) for target in targets])

    def eoi(self, vector: int) -> None:
        """A processor ended ``vector``, which was level-triggered: the IOAPICs hear of it."""
        for ioapic in self.ioapics:
            ioapic.eoi(vector)

    def targets(self, destination: int, logical: bool) -> Sequence[LocalApic]:
        """Those whom ``destination`` names, lowest index first (SDM volume 3, 11.6.2)."""
        if logical:
            return self._logical(destination)
        if destination == BROADCAST:
            return self.apics
        by_id = self._by_id
        if by_id is None:
            by_id = {}
            for apic in self.apics:
                by_id[apic.id] = (*by_id.get(apic.id, ()), apic)
            self._by_id = by_id
        found = by_id.get(destination, ())
        if destination == XAPIC_BROADCAST:
            everyone = {apic.index: apic for apic in (*found, *self._in_xapic_mode())}
            return [everyone[index] for index in sorted(everyone)]
        return found

    def _logical(self, destination: int) -> Sequence[LocalApic]:
        if destination == BROADCAST:
            found = [apic for apic in self.apics if apic.x2apic]
        else:
            # The logical ID follows from the ID: a cluster is sixteen neighbours.
            found, first, bits = [], destination >> 16 << 4, destination & 0xFFFF
            apics = self.apics if first < len(self.apics) else ()
            while apics and bits:
                index = first + (bits & -bits).bit_length() - 1
                bits &= bits - 1
                if index < len(apics) and apics[index].x2apic:
                    found.append(apics[index])
        others = self._in_xapic_mode()
        if others:
            found += [apic for apic in others if apic.named(destination & 0xFF)]
            found.sort(key=lambda apic: apic.index)
        return found

    def _in_xapic_mode(self) -> tuple[LocalApic, ...]:
        found = self._xapics
        if found is None:
            found = self._xapics = tuple([apic for apic in self.apics if not apic.x2apic])
        return found

    def _acceptors(self, message: Message) -> tuple[Acceptor, ...]:
        targets = self.targets(message.destination, message.logical)
        if message.delivery not in BY_VECTOR:
            return tuple([partial(target.signalled, message.delivery) for target in targets])
        if message.delivery is Delivery.LOWEST:
            targets = [target for target in targets if target.enabled][:1]
        return tuple([target.accept for target in targets])

    def _route(self, address: int, data: int) -> tuple[tuple[Acceptor, ...], int, bool]:
        message = decode_msi(address, data)
        route: tuple[tuple[Acceptor, ...], int, bool] = ((), 0, False)
        if message is not None:
            route = self._acceptors(message), message.vector, message.level
        self._held += 1 + len(route[0])
        if self._held > ROUTES:
            self._routes.clear()
            self._held = 1 + len(route[0])
        self._routes[address, data] = route
        return route
