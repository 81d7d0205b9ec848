# SPDX-License-Identifier: GPL-2.0-or-later
"""The PC's two 8259A interrupt controllers, the second on input 2 of the first.

Behaves as Intel's data sheet (231468) says and, where that leaves a choice, as QEMU's
``hw/intc/i8259.c``. ELCR, the registers that make an input level-triggered, are those
of the 82371 chip sets.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["PicPair"]

CASCADE = 2
SPURIOUS = 7


def _ignore(level: bool) -> None:
    """Nobody is connected."""


class _Chip:
    """One 8259A."""

    __slots__ = (
        "auto_eoi", "base", "elcr", "elcr_mask", "expects", "imr", "irr", "isr", "lines", "lowest",
        "ltim", "nested", "poll", "read_isr", "rotate", "single", "special_mask", "with_icw4",
    )  # fmt: skip

    def __init__(self, elcr_mask: int) -> None:
        self.elcr_mask = elcr_mask
        self.reset()

    def reset(self) -> None:
        """As after power-on: edge-triggered, no vector base, nothing masked."""
        self.elcr = self.irr = self.lines = 0
        self.ltim = False
        self._initialize()

    def _initialize(self) -> None:
        """What ICW1 resets; ELCR and the inputs that it makes levels stay."""
        self.lines = 0
        self.irr &= self.elcr
        self.imr = self.isr = self.base = 0
        self.lowest = 7  # the input with the lowest priority; the next one has the highest
        self.expects = 0  # the ICW that comes next: 2, 3 or 4; 0: none
        self.read_isr = self.poll = self.special_mask = self.nested = False
        self.auto_eoi = self.rotate = self.with_icw4 = self.single = False

    def rank(self, inputs: int) -> int:
        """How far the first of ``inputs`` is behind the highest priority; 8: there is none."""
        first = self.lowest + 1 & 7
        turned = (inputs << 8 | inputs) >> first & 0xFF
        return (turned & -turned).bit_length() - 1 if turned else 8

    def wanted(self, cascade: int = 0) -> int:
        """The input to interrupt for now, or -1. ``cascade``: inputs that have a chip behind."""
        request = self.rank(self.irr & ~self.imr)
        busy = self.isr
        if self.special_mask:
            busy &= ~self.imr
        if self.nested:
            busy &= ~cascade
        return self.lowest + 1 + request & 7 if request < self.rank(busy) else -1

    def set_line(self, line: int, level: bool) -> None:
        bit = 1 << line
        if not level:
            self.lines &= ~bit
            if self.ltim or self.elcr & bit:
                self.irr &= ~bit
        else:
            if not self.lines & bit or self.ltim or self.elcr & bit:
                self.irr |= bit
            self.lines |= bit

    def acknowledge(self, line: int) -> None:
        bit = 1 << line
        if not self.auto_eoi:
            self.isr |= bit
        elif self.rotate:
            self.lowest = line
        if not self.ltim and not self.elcr & bit:
            self.irr &= ~bit

    def command(self, value: int) -> None:
        if value & 0x10:  # ICW1
            self._initialize()
            self.expects = 2
            self.with_icw4, self.single = bool(value & 1), bool(value & 2)
            self.ltim = bool(value & 8)
        elif value & 0x08:  # OCW3
            if value & 0x04:
                self.poll = True
            if value & 0x02:
                self.read_isr = bool(value & 1)
            if value & 0x40:
                self.special_mask = bool(value & 0x20)
        else:
            self._end(value >> 5, value & 7)

    def _end(self, command: int, line: int) -> None:
        """OCW2: rotate, EOI, or both; ``line`` is for the specific ones (bit 1 of command)."""
        rotate, specific, eoi = command & 4, command & 2, command & 1
        if not eoi:
            if not specific:
                self.rotate = bool(rotate)
            elif rotate:
                self.lowest = line
            return
        if not specific:
            rank = self.rank(self.isr)
            if rank == 8:
                return
            line = self.lowest + 1 + rank & 7
        self.isr &= ~(1 << line)
        if rotate:
            self.lowest = line

    def data(self, value: int) -> None:
        if self.expects == 2:
            self.base = value & 0xF8
            self.expects = 3 if not self.single else 4 if self.with_icw4 else 0
        elif self.expects == 3:
            self.expects = 4 if self.with_icw4 else 0
        elif self.expects == 4:
            self.nested, self.auto_eoi = bool(value & 0x10), bool(value & 0x02)
            self.expects = 0
        else:
            self.imr = value


class PicPair:
    """Sixteen inputs, one output to the processor: ports 0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1."""

    PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)

    def __init__(self) -> None:
        self.intr: Callable[[bool], None] = _ignore
        """Told the level of the output whenever that changes."""
        self._level = False
        # Inputs 0, 1, 2, 8 and 13 have edge-triggered devices in every PC.
        self._first = _Chip(0xF8)
        self._second = _Chip(0xDE)

    def reset(self) -> None:
        """As after power-on."""
        self._first.reset()
        self._second.reset()
        self._update()

    @property
    def output(self) -> bool:
        """Whether the processor is asked to take an interrupt."""
        return self._level

    def set_line(self, irq: int, level: bool) -> None:
        """The line of ``irq``, 0 to 15 and not 2, is high from now on, or low."""
        if irq == CASCADE:
            return
        chip = self._second if irq & 8 else self._first
        chip.set_line(irq & 7, level)
        self._update()

    def acknowledge(self) -> int:
        """What the processor gets when it takes the interrupt: its vector.

        If the request is gone by then that is input 7's, and nothing is in service for it.
        """
        line = self._first.wanted(1 << CASCADE)
        if line < 0:
            return self._first.base + SPURIOUS
        vector = self._first.base + line
        if line == CASCADE:
            behind = self._second.wanted()
            vector = self._second.base + (behind if behind >= 0 else SPURIOUS)
            if behind >= 0:
                self._second.acknowledge(behind)
            # Its output falls with this, and what else it wants is an edge of its own.
            self._first.set_line(CASCADE, False)
        self._first.acknowledge(line)
        self._update()
        return vector

    def inp(self, port: int) -> int:
        """One byte of a port; 0xff from one that is not ours."""
        if port not in self.PORTS:
            return 0xFF
        chip = self._second if port in (0xA0, 0xA1, 0x4D1) else self._first
        if port >= 0x4D0:
            return chip.elcr
        if chip.poll:
            return self._poll(chip)
        if port & 1:
            return chip.imr
        return chip.isr if chip.read_isr else chip.irr

    def outp(self, port: int, value: int) -> None:
        """One byte to a port; without effect if it is not ours."""
        if port not in self.PORTS:
            return
        value &= 0xFF
        chip = self._second if port in (0xA0, 0xA1, 0x4D1) else self._first
        if port >= 0x4D0:
            chip.elcr = value & chip.elcr_mask
            chip.irr |= chip.lines & chip.elcr
        elif port & 1:
            chip.data(value)
        else:
            chip.command(value)
        self._update()

    def _poll(self, chip: _Chip) -> int:
        """A read after OCW3's poll command: an acknowledgement without the processor."""
        chip.poll = False
        line = chip.wanted(1 << CASCADE if chip is self._first else 0)
        if line < 0:
            return 0
        chip.acknowledge(line)
        self._update()
        return 0x80 | line

    def _update(self) -> None:
        self._first.set_line(CASCADE, self._second.wanted() >= 0)
        level = self._first.wanted(1 << CASCADE) >= 0
        if level != self._level:
            self._level = level
            self.intr(level)
