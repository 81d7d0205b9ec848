# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever happens in whatever order: no interrupt is lost, none is invented."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qvis.emulated.events import Events
from qvis.emulated.ioapic import IoApic
from qvis.emulated.lapic import LocalApic
from qvis.emulated.messages import ApicBus
from qvis.emulated.pic import PicPair

SMALL = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

TPR, EOI, SVR = 0x80, 0xB0, 0xF0
# Few enough to meet again, in three classes, with the highest and the lowest there are.
VECTORS = st.sampled_from([0x10, 0x1F, 0x41, 0x42, 0x4F, 0x50, 0xEF, 0xFF])


class ReferenceApic:
    """A local APIC as one would write it down: sets, a stack, and the words of the manual."""

    def __init__(self) -> None:
        self.pending: set[int] = set()
        self.stack: list[int] = []
        self.level: set[int] = set()
        self.tpr = 0
        self.enabled = True

    def accept(self, vector: int, level: bool) -> bool:
        if not self.enabled:
            return False
        (self.level.add if level else self.level.discard)(vector)
        new = vector not in self.pending
        self.pending.add(vector)
        return new

    def next(self) -> int:
        classes = [self.tpr // 16] + [vector // 16 for vector in self.stack]
        able = [vector for vector in self.pending if vector // 16 > max(classes)]
        return max(able) if able and self.enabled else -1

    def take(self) -> int:
        vector = self.next()
        self.pending.remove(vector)
        self.stack.append(vector)
        return vector

    def end(self) -> tuple[int, bool]:
        """What ended, and whether it was a level's."""
        if not self.stack:
            return -1, False
        vector = self.stack.pop()
        return vector, vector in self.level


class Broadcasts:
    """Stands for an IOAPIC that notes what it is told."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def eoi(self, vector: int) -> None:
        self.seen.append(vector)


class LocalApicIsAsWrittenDown(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        bus = ApicBus()
        self.broadcasts = Broadcasts()
        bus.ioapics.append(self.broadcasts)  # type: ignore[arg-type]
        self.apic = LocalApic(0, bus, Events())
        self.apic.write(SVR, 0x1FF)
        self.model = ReferenceApic()
        self.woken = False
        self.apic.wake = self.wake
        self.accepted: dict[int, int] = {}
        self.delivered: dict[int, int] = {}

    def wake(self) -> None:
        self.woken = True

    @rule(vector=VECTORS, level=st.booleans())
    def message(self, vector: int, level: bool) -> None:
        had = self.apic.pending()
        self.woken = False
        new = self.apic.accept(vector, level)
        assert new == self.model.accept(vector, level)
        self.accepted[vector] = self.accepted.get(vector, 0) + new
        assert self.woken or self.apic.pending() == had

    @rule(vector=st.integers(0, 15), level=st.booleans())
    def illegal(self, vector: int, level: bool) -> None:
        assert not self.apic.accept(vector, level)

    @precondition(lambda self: self.model.next() >= 0)
    @rule()
    def take(self) -> None:
        vector = self.apic.acknowledge()
        assert vector == self.model.take()
        self.delivered[vector] = self.delivered.get(vector, 0) + 1

    @precondition(lambda self: self.model.next() < 0)
    @rule()
    def take_what_is_not_there(self) -> None:
        assert self.apic.acknowledge() == self.apic.read(SVR) & 0xFF

    @rule(by_register=st.booleans())
    def end(self, by_register: bool) -> None:
        vector, level = self.model.end()
        before, had = list(self.broadcasts.seen), self.apic.pending()
        self.woken = False
        if by_register:
            self.apic.write(EOI, 0)
        else:
            assert self.apic.eoi() == vector
        assert self.broadcasts.seen == before + [vector] * level
        assert self.woken or self.apic.pending() in (-1, had)

    @rule(value=st.integers(0, 255))
    def priority(self, value: int) -> None:
        had = self.apic.pending()
        self.woken = False
        self.apic.write(TPR, value)
        self.model.tpr = value
        assert self.woken or self.apic.pending() in (-1, had)

    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        self.apic.write(SVR, 0xFF | enabled << 8)
        self.model.enabled = enabled

    @invariant()
    def same(self) -> None:
        apic, model = self.apic, self.model
        assert apic.pending() == model.next()
        assert apic.irr == sum(1 << vector for vector in model.pending)
        assert apic.isr == sum(1 << vector for vector in model.stack)
        assert apic.tmr == sum(1 << vector for vector in model.level)

    def teardown(self) -> None:
        """Each acceptance that found IRR clear is one delivery, in the end."""
        self.apic.write(SVR, 0x1FF)
        self.apic.write(TPR, 0)
        while self.apic.eoi() >= 0:
            pass
        while (vector := self.apic.pending()) >= 0:
            self.apic.acknowledge()
            self.apic.eoi()
            self.delivered[vector] = self.delivered.get(vector, 0) + 1
        accepted = {vector: count for vector, count in self.accepted.items() if count}
        assert self.delivered == accepted


EDGE_PINS, LEVEL_PINS = (0, 1), (2, 3, 4)
PINS = st.sampled_from(EDGE_PINS + LEVEL_PINS)
PIN_VECTORS = {0: 0x31, 1: 0x51, 2: 0x41, 3: 0x61, 4: 0x61}  # the last two share one
MASKED, LEVEL = 1 << 16, 1 << 15


class LinesReachTheProcessor(RuleBasedStateMachine):
    """IOAPIC and local APIC together; pins 3 and 4 have the same vector."""

    def __init__(self) -> None:
        super().__init__()
        bus = ApicBus()
        self.apic = LocalApic(0, bus, Events())
        self.apic.write(SVR, 0x1FF)
        self.ioapic = IoApic(bus)
        self.lines: set[int] = set()
        self.masked: set[int] = set()
        self.owed: set[int] = set()  # vectors of edges that were sent and not taken yet
        self.stack: list[int] = []
        for pin in PIN_VECTORS:
            self.set_entry(pin, masked=False)

    def set_entry(self, pin: int, *, masked: bool) -> None:
        entry = PIN_VECTORS[pin] | (LEVEL if pin in LEVEL_PINS else 0) | (MASKED if masked else 0)
        self.ioapic.write(0, 4, 0x10 + 2 * pin)
        self.ioapic.write(0x10, 4, entry)

    @rule(pin=PINS)
    def rise(self, pin: int) -> None:
        if pin in EDGE_PINS and pin not in self.lines | self.masked:
            self.owed.add(PIN_VECTORS[pin])
        self.lines.add(pin)
        self.ioapic.set_line(pin, True)

    @rule(pin=PINS)
    def fall(self, pin: int) -> None:
        self.lines.discard(pin)
        self.ioapic.set_line(pin, False)

    @rule(pin=PINS)
    def mask(self, pin: int) -> None:
        self.masked.add(pin)
        self.set_entry(pin, masked=True)

    @rule(pin=PINS)
    def unmask(self, pin: int) -> None:
        self.masked.discard(pin)
        self.set_entry(pin, masked=False)

    @rule(pin=st.sampled_from(LEVEL_PINS))
    def end_by_switching_the_trigger(self, pin: int) -> None:
        """As Linux does for an IOAPIC without an EOI register."""
        entry = PIN_VECTORS[pin]
        for bits in (MASKED, MASKED | LEVEL, LEVEL | (MASKED if pin in self.masked else 0)):
            self.ioapic.write(0, 4, 0x10 + 2 * pin)
            self.ioapic.write(0x10, 4, entry | bits)

    @precondition(lambda self: self.apic.pending() >= 0)
    @rule()
    def take(self) -> None:
        vector = self.apic.acknowledge()
        self.owed.discard(vector)
        self.stack.append(vector)

    @precondition(lambda self: self.stack)
    @rule()
    def end(self) -> None:
        assert self.apic.eoi() == self.stack.pop()

    @invariant()
    def a_level_that_is_due_is_on_its_way(self) -> None:
        for pin in LEVEL_PINS:
            if pin in self.lines and pin not in self.masked:
                vector = PIN_VECTORS[pin]
                assert self.ioapic.remote_irr >> pin & 1
                assert (self.apic.irr | self.apic.isr) >> vector & 1

    @invariant()
    def an_edge_is_pending_until_it_is_taken(self) -> None:
        for pin in EDGE_PINS:
            vector = PIN_VECTORS[pin]
            assert bool(self.apic.irr >> vector & 1) == (vector in self.owed)

    @invariant()
    def only_what_is_served_is_in_service(self) -> None:
        assert self.apic.isr == sum(1 << vector for vector in self.stack)

    def teardown(self) -> None:
        """With all lines down it becomes quiet; an interrupt or two for each that was up."""
        for pin in PIN_VECTORS:
            self.fall(pin)
        for _ in range(20):
            if self.apic.pending() >= 0:
                self.take()
            elif self.stack:
                self.end()
        assert (self.apic.irr, self.apic.isr, self.ioapic.remote_irr) == (0, 0, 0)


IRQS = st.sampled_from([0, 1, 3, 7, 8, 9, 12, 15])
ELCR_LINES = (3, 9)


class PicPairServesAll(RuleBasedStateMachine):
    """Two 8259A, fully nested, with irq 3 and irq 9 by level."""

    def __init__(self) -> None:
        super().__init__()
        self.pic = PicPair()
        for command, data, values in ((0x20, 0x21, (0x20, 4, 1)), (0xA0, 0xA1, (0x28, 2, 1))):
            self.pic.outp(command, 0x11)
            for value in values:
                self.pic.outp(data, value)
        self.pic.outp(0x4D0, 1 << 3)
        self.pic.outp(0x4D1, 1 << 1)
        self.asked: set[int] = set()
        self.lines: set[int] = set()
        self.masks = [0, 0]
        self.stack: list[int] = []

    def wanted(self) -> list[int]:
        """What may be served now, the first one first."""
        order = [0, 1, 8, 9, 12, 15, 3, 7]
        free = [irq for irq in order if irq in self.asked and not self.is_masked(irq)]
        first = [2 if irq >= 8 else irq for irq in self.stack]
        second = [irq - 8 for irq in self.stack if irq >= 8]
        return [
            irq
            for irq in free
            if (2 if irq >= 8 else irq) < min([8, *first])
            and (irq < 8 or irq - 8 < min([8, *second]))
        ]

    def is_masked(self, irq: int) -> bool:
        return bool(self.masks[irq >> 3] >> (irq & 7) & 1)

    @rule(irq=IRQS)
    def rise(self, irq: int) -> None:
        if irq in ELCR_LINES or irq not in self.lines:
            self.asked.add(irq)
        self.lines.add(irq)
        self.pic.set_line(irq, True)

    @rule(irq=IRQS)
    def fall(self, irq: int) -> None:
        if irq in ELCR_LINES:
            self.asked.discard(irq)
        self.lines.discard(irq)
        self.pic.set_line(irq, False)

    @rule(chip=st.sampled_from([0, 1]), mask=st.sampled_from([0, 0x01, 0x08, 0x92, 0xFB]))
    def mask(self, chip: int, mask: int) -> None:
        self.masks[chip] = mask
        self.pic.outp((0x21, 0xA1)[chip], mask)

    @precondition(lambda self: self.pic.output)
    @rule()
    def take(self) -> None:
        irq = self.pic.acknowledge() - 0x20
        wanted = self.wanted()
        if irq == 15 and 15 not in wanted[:1]:
            # The second chip asked and thinks no more of it. Handlers end the first one's.
            assert not any(other >= 8 for other in wanted[:1])
            self.pic.outp(0x20, 0x20)
            return
        assert [irq] == wanted[:1]
        self.stack.append(irq)
        if irq not in ELCR_LINES:
            self.asked.discard(irq)

    @precondition(lambda self: self.stack)
    @rule()
    def end(self) -> None:
        irq = self.stack.pop()
        if irq >= 8:
            self.pic.outp(0xA0, 0x20)
        self.pic.outp(0x20, 0x20)

    @precondition(lambda self: not self.pic.output)
    @rule()
    def spurious(self) -> None:
        assert self.pic.acknowledge() == 0x27

    @invariant()
    def what_is_wanted_is_asked_for(self) -> None:
        if self.wanted():
            assert self.pic.output

    def teardown(self) -> None:
        """Unmasked and served until it is quiet, all that was asked for has come."""
        for chip in (0, 1):
            self.mask(chip, 0)
        for irq in ELCR_LINES:
            self.fall(irq)
        for _ in range(60):
            if self.pic.output:
                self.take()
            elif self.stack:
                self.end()
        assert not self.pic.output
        assert not self.asked


class OneChipIsAsWrittenDown(RuleBasedStateMachine):
    """All modes of one 8259A, against priorities kept as a list, the highest first."""

    LINES = st.sampled_from([0, 1, 3, 4, 7])

    def __init__(self) -> None:
        super().__init__()
        self.pic = PicPair()
        self.initialize(automatic=False)

    @rule(automatic=st.booleans())
    def initialize(self, automatic: bool) -> None:
        for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1 | automatic << 1)):
            self.pic.outp(port, value)
        self.order = list(range(8))
        self.asked: set[int] = set()
        self.served: set[int] = set()
        self.masked: set[int] = set()
        self.automatic, self.rotating, self.special = automatic, False, False

    def next(self) -> int | None:
        blocking = self.served - self.masked if self.special else self.served
        for line in self.order:
            if line in blocking:
                return None
            if line in self.asked - self.masked:
                return line
        return None

    def make_lowest(self, line: int) -> None:
        at = self.order.index(line) + 1
        self.order = self.order[at:] + self.order[:at]

    @rule(line=LINES)
    def pulse(self, line: int) -> None:
        self.asked.add(line)
        self.pic.set_line(line, True)
        self.pic.set_line(line, False)

    @rule(lines=st.sets(LINES))
    def mask(self, lines: set[int]) -> None:
        self.masked = lines
        self.pic.outp(0x21, sum(1 << line for line in lines))

    @precondition(lambda self: self.next() is not None)
    @rule(poll=st.booleans())
    def take(self, poll: bool) -> None:
        line = self.next()
        assert line is not None
        if poll:
            self.pic.outp(0x20, 0x0C)
            assert self.pic.inp(0x20) == 0x80 | line
        else:
            assert self.pic.acknowledge() == 0x20 + line
        self.asked.discard(line)
        if not self.automatic:
            self.served.add(line)
        elif self.rotating:
            self.make_lowest(line)

    @rule(rotate=st.booleans())
    def end(self, rotate: bool) -> None:
        self.pic.outp(0x20, 0x20 | rotate << 7)
        for line in self.order:
            if line in self.served:
                self.served.remove(line)
                if rotate:
                    self.make_lowest(line)
                return

    @rule(line=LINES, rotate=st.booleans())
    def end_one(self, line: int, rotate: bool) -> None:
        self.pic.outp(0x20, 0x60 | rotate << 7 | line)
        self.served.discard(line)
        if rotate:
            self.make_lowest(line)

    @rule(line=LINES)
    def set_priority(self, line: int) -> None:
        self.pic.outp(0x20, 0xC0 | line)
        self.make_lowest(line)

    @rule(rotate=st.booleans())
    def rotate_automatically(self, rotate: bool) -> None:
        self.pic.outp(0x20, rotate << 7)
        self.rotating = rotate

    @rule(special=st.booleans())
    def special_mask(self, special: bool) -> None:
        self.pic.outp(0x20, 0x48 | special << 5)
        self.special = special

    @invariant()
    def same(self) -> None:
        assert self.pic.output == (self.next() is not None)
        for command, expected in ((0x0A, self.asked), (0x0B, self.served)):
            self.pic.outp(0x20, command)
            assert self.pic.inp(0x20) == sum(1 << line for line in expected)


@pytest.mark.parametrize(
    "machine",
    [
        LocalApicIsAsWrittenDown,
        LinesReachTheProcessor,
        PicPairServesAll,
        OneChipIsAsWrittenDown,
    ],
)
def test_any_order_of_events_is_as_it_should_be(machine: type[RuleBasedStateMachine]) -> None:
    case = machine.TestCase
    case.settings = SMALL
    case("runTest").runTest()
