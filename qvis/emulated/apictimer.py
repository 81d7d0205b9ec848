# SPDX-License-Identifier: GPL-2.0-or-later
"""The timer of a local APIC (SDM volume 3, 11.5.4): one-shot, periodic, TSC deadline.

It counts at 1 GHz, as QEMU's does, and like that one expires a count after reaching 0.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from .events import Events

__all__ = ["CYCLES_PER_COUNT", "Alarm", "ApicTimer", "Mode"]

CYCLES_PER_COUNT = 2  # undivided: 1 GHz in cycles of 2 GHz
SHORTEST_PERIOD = 400_000  # cycles, 200 us: KVM's min_timer_period_us, so that time goes on
EXACT = 8


class Mode(IntEnum):
    """Bits 18:17 of the timer's LVT entry."""

    ONE_SHOT = 0
    PERIODIC = 1
    TSC_DEADLINE = 2
    RESERVED = 3


class Alarm:
    """Calls ``ring`` at a time that may be moved as often as anyone likes.

    Events cannot be taken back, so one of a time that was given up looks at the clock to no
    end. With a few of them ahead the next is not for the time itself but for a power of two
    of cycles before it: moving it a million times leaves some dozens behind.
    """

    __slots__ = ("_events", "_looks", "_ring", "time")

    def __init__(self, events: Events, ring: Callable[[], None]) -> None:
        self._events = events
        self._ring = ring
        self._looks: list[int] = []  # when we look what time it is, the next one last
        self.time = -1
        """When to ring; -1: never."""

    def set(self, time: int) -> None:
        """Ring at ``time``, or now if it has passed, and not when it was set to before."""
        now = self._events.now
        self.time = time = max(time, now)
        looks = self._looks
        if looks and looks[-1] <= time:
            return
        if len(looks) >= EXACT and time > now:
            time = now + (1 << (time - now).bit_length() - 1)
        looks.append(time)
        self._events.at(time, self._look)

    def stop(self) -> None:
        """Do not ring."""
        self.time = -1

    def _look(self) -> None:
        self._looks.pop()
        if self.time < 0:
            return
        if self.time <= self._events.now:
            self.time = -1
            self._ring()
        else:
            self.set(self.time)


class ApicTimer:
    """Calls ``expired`` when the count or the TSC, which counts modelled cycles, gets there.

    The attributes are what the registers read as.
    """

    __slots__ = (
        "_alarm", "_armed", "_events", "_loaded", "_masked", "_ring", "deadline", "divide",
        "initial", "mode",
    )  # fmt: skip

    def __init__(self, events: Events, expired: Callable[[], None]) -> None:
        self._alarm = Alarm(events, self._expire)
        self._events = events
        self._ring = expired
        self.reset()

    def reset(self) -> None:
        """Stopped, one-shot, masked, counting every second cycle."""
        self.initial = self.divide = self.deadline = 0
        self.mode = Mode.ONE_SHOT
        self._masked = True
        self._armed = False  # one-shot: has not expired since it was loaded
        self._loaded = 0
        self._alarm.stop()

    @property
    def count(self) -> int:
        """What is left of the initial count."""
        passed = (self._events.now - self._loaded) // self._cycles
        if self.mode == Mode.PERIODIC:
            return self.initial - passed % (self.initial + 1)
        return max(0, self.initial - passed)

    def configure(self, mode: Mode, masked: bool) -> None:
        """As the LVT entry has it now. To or from TSC-deadline mode stops the timer."""
        if mode != self.mode and Mode.TSC_DEADLINE in (mode, self.mode):
            self.initial = self.deadline = 0
        self.mode, self._masked = mode, masked
        self._set()

    def load(self, initial: int) -> None:
        """Start to count from there; 0 stops. Without effect in TSC-deadline mode."""
        if self.mode != Mode.TSC_DEADLINE:
            self.initial, self._loaded, self._armed = initial, self._events.now, True
            self._set()

    def set_divide(self, value: int) -> None:
        """Write the divide register. What was counted is counted: the rest goes at the new rate."""
        passed = (self._events.now - self._loaded) // self._cycles
        changed = value & 0xB != self.divide
        self.divide = value & 0xB
        if changed and self.initial:
            self._loaded = self._events.now - passed * self._cycles
            self._set()

    def set_deadline(self, tsc: int) -> None:
        """Write IA32_TSC_DEADLINE; 0 stops. Without effect in the other modes."""
        if self.mode == Mode.TSC_DEADLINE:
            self.deadline = tsc
            self._set()

    @property
    def _cycles(self) -> int:
        """Of one count. The divide register's bits 3, 1 and 0 say 2, 4, ... 128, and 1 for 7."""
        return CYCLES_PER_COUNT << ((self.divide & 3 | self.divide >> 1 & 4) + 1 & 7)

    def _set(self) -> None:
        time = 0
        if self.mode == Mode.TSC_DEADLINE:
            time = self.deadline
        elif self.initial:
            period = (self.initial + 1) * self._cycles
            if self.mode == Mode.ONE_SHOT and self._armed:
                time = self._loaded + period
            elif self.mode == Mode.PERIODIC and not self._masked:
                # Masked it would do nothing for ever, which is not free.
                period = max(period, SHORTEST_PERIOD)
                time = self._loaded + ((self._events.now - self._loaded) // period + 1) * period
        if time:
            self._alarm.set(time)
        else:
            self._alarm.stop()

    def _expire(self) -> None:
        self.deadline = 0
        self._armed = False
        if self.mode == Mode.PERIODIC:
            self._set()
        self._ring()
