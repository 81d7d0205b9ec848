# SPDX-License-Identifier: GPL-2.0-or-later
"""The I/O APIC: a message for each of its pins (Intel 82093AA, and version 0x20's EOI register).

A line is *asserted* or not: polarity is the wiring's business, as in QEMU's
``hw/intc/ioapic.c``, which this follows where the data sheet leaves a choice.
"""

from __future__ import annotations

from .messages import MSI_BASE, ApicBus, Delivery

__all__ = ["KVMS_VERSION", "VERSION_WITH_EOI", "IoApic"]

IOREGSEL, IOWIN, EOI = 0x00, 0x10, 0x40
ID, VERSION, ARBITRATION, TABLE = 0x00, 0x01, 0x02, 0x10
VERSION_WITH_EOI = 0x20
KVMS_VERSION = 0x11  # arch/x86/kvm/ioapic.h, IOAPIC_VERSION_ID

MASKED = 1 << 16
LEVEL = 1 << 15
REMOTE_IRR = 1 << 14
STATUS = 1 << 12
READ_ONLY = REMOTE_IRR | STATUS


class IoApic:
    """``pins`` inputs, each with an entry that says which message its interrupt is.

    A level-triggered pin sends when its line is asserted and it is not masked, once,
    and again when the processor's EOI of that vector finds the line asserted still;
    between them the entry's Remote IRR is set. An edge-triggered pin sends when its line
    becomes asserted; if it is masked then, that edge is lost. SMI, NMI, INIT and ExtINT
    are by edge whatever the entry says: nobody would end them.
    """

    __slots__ = (
        "_bus", "_entries", "_id", "_in_service", "_levels", "_lines", "_masked", "_messages",
        "_select", "_version", "id",
    )  # fmt: skip

    def __init__(
        self, bus: ApicBus, pins: int = 24, id: int = 0, version: int = VERSION_WITH_EOI
    ) -> None:
        self._bus = bus
        self._version = version
        self._id = id
        self._entries = [MASKED] * pins
        self._messages = [(MSI_BASE, 0)] * pins
        self._lines = 0  # this and those that follow are sets of pins
        bus.ioapics.append(self)
        self.reset()

    def reset(self) -> None:
        """As after power-on. Lines are as what drives them has them."""
        self.id = self._id
        self._select = 0
        self._in_service = self._levels = 0
        self._masked = (1 << len(self._entries)) - 1
        for pin in range(len(self._entries)):
            self._entries[pin] = MASKED
            self._messages[pin] = (MSI_BASE, 0)

    @property
    def remote_irr(self) -> int:
        """The pins whose interrupt a processor has accepted and not ended; a bit set."""
        return self._in_service

    @property
    def lines(self) -> int:
        """The pins whose line is asserted; a bit set."""
        return self._lines

    def entry(self, pin: int) -> int:
        """The redirection entry of ``pin``, 64 bits, as a guest would read it."""
        return self._entries[pin] | (REMOTE_IRR if self._in_service >> pin & 1 else 0)

    def set_line(self, pin: int, level: bool) -> None:
        """The line at ``pin`` is asserted from now on, or not; what is so already is no edge."""
        bit = 1 << pin
        if not level:
            self._lines &= ~bit
        elif not self._lines & bit:
            self._lines |= bit
            if not self._masked & bit:
                if not self._levels & bit:
                    self._send(pin)
                elif not self._in_service & bit:
                    self._in_service |= bit
                    self._send(pin)

    def eoi(self, vector: int) -> None:
        """A processor ended ``vector``: the pins that had sent it may send again."""
        waiting = self._in_service
        while waiting:
            bit = waiting & -waiting
            waiting ^= bit
            pin = bit.bit_length() - 1
            # Sending below may end in another EOI of this vector before we are back.
            if self._entries[pin] & 0xFF == vector and self._in_service & bit:
                self._in_service ^= bit
                self._service(pin)

    def read(self, offset: int, size: int) -> int:
        """A register at ``offset``; 0 where there is none, or none of that ``size`` in bytes."""
        offset &= 0xFF
        if offset == IOREGSEL:
            return self._select
        if offset != IOWIN or size < 4:
            return 0
        select = self._select
        if select in (ID, ARBITRATION):
            return self.id << 24
        if select == VERSION:
            return self._version | len(self._entries) - 1 << 16
        pin = select - TABLE >> 1
        if not 0 <= pin < len(self._entries):
            return 0
        return self.entry(pin) >> (32 if select & 1 else 0) & 0xFFFFFFFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register; without effect where :meth:`read` finds none."""
        offset &= 0xFF
        if offset == IOREGSEL:
            self._select = value & 0xFF
        elif size < 4:
            return
        elif offset == IOWIN:
            self._write_selected(value & 0xFFFFFFFF)
        elif offset == EOI and self._version >= VERSION_WITH_EOI:
            # QEMU ends it on all IOAPICs, whichever one's register it was.
            for ioapic in self._bus.ioapics:
                ioapic.eoi(value & 0xFFFFFFFF)

    def _write_selected(self, value: int) -> None:
        select = self._select
        if select == ID:
            self.id = value >> 24 & 0xF
        pin = select - TABLE >> 1
        if not 0 <= pin < len(self._entries):
            return
        entry = self._entries[pin]
        if select & 1:
            entry = entry & 0xFFFFFFFF | value << 32
        else:
            entry = entry & ~0xFFFFFFFF | value & ~READ_ONLY
        self._entries[pin] = entry
        # Bits 55:48 and 63:56 are address bits 11:4 and 19:12, as for an extended destination.
        self._messages[pin] = (
            MSI_BASE | (entry >> 48 & 0xFFFF) << 4 | entry >> 9 & 4,
            entry & (LEVEL | 0x7FF),
        )
        bit = 1 << pin
        self._masked = self._masked | bit if entry & MASKED else self._masked & ~bit
        if not entry & LEVEL:
            # By edge nothing is in service: Linux ends an interrupt this way (__eoi_ioapic_pin).
            self._in_service &= ~bit
        if entry & LEVEL and entry >> 8 & 7 in (Delivery.FIXED, Delivery.LOWEST):
            self._levels |= bit
            self._service(pin)
        else:
            self._levels &= ~bit

    def _service(self, pin: int) -> None:
        """Send for a level-triggered pin if that is due."""
        bit = 1 << pin
        if self._lines & self._levels & ~(self._in_service | self._masked) & bit:
            self._in_service |= bit
            self._send(pin)

    def _send(self, pin: int) -> None:
        address, data = self._messages[pin]
        if data & 0x700 == 0x700 and self._bus.pic is not None:
            data = data & ~0xFF | self._bus.pic.acknowledge()
        self._bus.msi(address, data)
