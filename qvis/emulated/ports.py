# SPDX-License-Identifier: GPL-2.0-or-later
"""I/O ports: the serial console, the PIC, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from .irqchip import Exit, Rules
from .pic import PicPair

__all__ = ["PIC_PORTS", "SERIAL", "Port", "Ports", "Serial"]

SERIAL = 0x3F8
PIC_PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)


class Port:
    """Where nothing is: all ones, and what is written is lost (QEMU's unassigned_io_ops)."""

    def inp(self, port: int, size: int) -> int:
        """What IN gives."""
        return (1 << size * 8) - 1

    def outp(self, port: int, size: int, value: int) -> None:
        """What OUT does."""


class _Pic(Port):
    def __init__(self, pic: PicPair) -> None:
        self._pic = pic

    def inp(self, port: int, size: int) -> int:
        return self._pic.inp(port)

    def outp(self, port: int, size: int, value: int) -> None:
        self._pic.outp(port, value & 0xFF)


class Serial(Port):
    """A 16550 that has always sent what it is given, and never interrupts.

    Registers are those of National Semiconductor's PC16550D; it receives nothing.
    """

    THR, IER, IIR, LCR, LSR, MSR = 0, 1, 2, 3, 5, 6
    DLAB = 0x80
    NOTHING_PENDING, FIFO, SENT, CONNECTED = 0x01, 0xC0, 0x60, 0xB0

    def __init__(self) -> None:
        self.output: Callable[[int], object] = int
        """Told of each byte that the guest sends."""
        self.reset()

    def reset(self) -> None:
        """As after power-on."""
        self._registers = bytearray((0, 0, 0, 0, 0x08, 0, 0, 0))
        self._divisor = bytearray((0x0C, 0))
        self._fifo = 0

    def inp(self, port: int, size: int) -> int:
        register = port - SERIAL
        if self._registers[self.LCR] & self.DLAB and register <= self.IER:
            return self._divisor[register]
        if register == self.IIR:
            return self.NOTHING_PENDING | self._fifo
        if register == self.LSR:
            return self.SENT
        if register == self.MSR:
            return self.CONNECTED
        return self._registers[register] if register else 0

    def outp(self, port: int, size: int, value: int) -> None:
        register, value = port - SERIAL, value & 0xFF
        if self._registers[self.LCR] & self.DLAB and register <= self.IER:
            self._divisor[register] = value
        elif register == self.THR:
            self.output(value)
        elif register == self.IIR:
            self._fifo = self.FIFO if value & 1 else 0
        elif register not in (self.LSR, self.MSR):
            self._registers[register] = value & (0x0F if register == self.IER else 0xFF)


class Ports:
    """All ports of a machine: which exit an access is, and who answers."""

    def __init__(self, rules: Rules, pic: PicPair) -> None:
        self.serial = Serial()
        self._nothing = (rules.port, Port())
        self._known: dict[int, tuple[Exit, Port]] = {
            **dict.fromkeys(range(SERIAL, SERIAL + 8), (rules.port, self.serial)),
            **dict.fromkeys(PIC_PORTS, (rules.pic, _Pic(pic))),
        }

    def find(self, port: int) -> tuple[Exit, Port]:
        """The exit for an access to ``port``, and who is there."""
        return self._known.get(port, self._nothing)
