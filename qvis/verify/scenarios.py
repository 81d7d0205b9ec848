# SPDX-License-Identifier: GPL-2.0-or-later
"""What is checked: bounded programs of the correct protocol, and mutations that must fail."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MUTATIONS", "SCENARIOS", "SCENARIOS_2019", "Mutation", "Scenario", "scenario"]


@dataclass(frozen=True)
class Scenario:
    """Programs that run at the same time. ``entries``: one letter a vector, ``-`` not written.

    ``masked`` has a bit for each vector that is masked at first; ``cpus`` and ``devices`` are
    scripts, one an agent.
    """

    name: str
    entries: str
    masked: int
    cpus: tuple[str, ...]
    devices: tuple[str, ...]

    @property
    def vectors(self) -> int:
        return len(self.entries)


SCENARIOS = (
    # Live entries
    Scenario("unmask", "A", 1, ("unmask 0",), ("fire 0",)),
    Scenario("retarget once", "A", 0, ("retarget 0 B",), ("fire 0",)),
    Scenario("mask, unmask", "A", 0, ("mask 0; unmask 0",), ("fire 0; fire 0",)),
    Scenario("mask, unmask twice, two threads", "A", 0,
             ("mask 0; unmask 0; mask 0; unmask 0",), ("fire 0", "fire 0")),
    Scenario("unmask, mask, two threads twice", "A", 1,
             ("unmask 0; mask 0",), ("fire 0; fire 0", "fire 0; fire 0")),
    Scenario("set up", "-", 1, ("setup 0 A; unmask 0",), ("fire 0", "fire 0")),
    Scenario("retarget", "A", 0, ("retarget 0 B; retarget 0 C",), ("fire 0; fire 0", "fire 0")),
    Scenario("there and back", "A", 0, ("retarget 0 B; retarget 0 A back",), ("fire 0", "fire 0")),
    Scenario("masked retarget", "A", 0,
             ("mask 0; retarget 0 B; unmask 0",), ("fire 0", "fire 0")),
    Scenario("retarget, then mask", "A", 0,
             ("retarget 0 B; mask 0; retarget 0 C; unmask 0",), ("fire 0; fire 0",)),
    Scenario("one vector, two CPUs", "A", 0,
             ("lock 0; mask 0; unlock 0; lock 0; unmask 0; unlock 0",
              "lock 0; retarget 0 B; unlock 0"), ("fire 0; fire 0",)),
    Scenario("two vectors, two CPUs", "AA", 0,
             ("mask 0; unmask 0", "mask 1; unmask 1"), ("fire 0", "fire 1")),
    Scenario("two vectors, retarget", "AA", 1,
             ("retarget 0 B; unmask 0", "retarget 1 B"), ("fire 0; fire 1",)),
    Scenario("three vectors, two CPUs", "AAA", 0b101,
             ("unmask 0; unmask 2", "retarget 1 B"), ("fire 0; fire 1; fire 2",)),
    Scenario("reset", "A", 0, ("mask 0; unmask 0; reset",), ("fire 0; fire 0", "fire 0")),
    Scenario("reset, two vectors, two CPUs", "AA", 0b10,
             ("retarget 0 B; join; reset", "unmask 1; done"), ("fire 0; fire 1", "fire 1")),
    Scenario("two threads, one vector", "A", 1, ("unmask 0; mask 0",), ("fire 0", "fire 0")),
    Scenario("unmask, two fires", "A", 1, ("unmask 0",), ("fire 0; fire 0",)),
    Scenario("enable", "-", 0, ("enable 0; setup 0 A; unmask 0",), ("fire 0", "fire 0")),
    Scenario("fence, then free", "A", 0, ("mask 0; fence 0; free 0",), ("fire 0", "fire 0")),
    Scenario("there and back, fence for R4", "A", 0,
             ("retarget 0 B; fence 0; retarget 0 A",), ("fire 0", "fire 0")),
    Scenario("there and back, targets kept", "A", 0,
             ("retarget 0 B keep; retarget 0 A keep",), ("fire 0; fire 0", "fire 0")),
    Scenario("there and back, targets given up late", "A", 0,
             ("retarget 0 B keep; retarget 0 A keep; retire 0",), ("fire 0; fire 0", "fire 0")),
    # The device keeps copies
    Scenario("entry copy, retarget", "A", 0,
             ("retarget 0 B; retarget 0 C",), ("fire 0", "attach 0 entry; detach 0")),
    Scenario("entry copy, masked retarget", "A", 0,
             ("mask 0; retarget 0 B; unmask 0",), ("fire 0", "attach 0 entry; detach 0")),
    Scenario("mask copy", "A", 0,
             ("mask 0; unmask 0",), ("fire 0; fire 0", "attach 0 mask; detach 0")),
    Scenario("mask copy, masked at first", "A", 1,
             ("unmask 0; mask 0",), ("fire 0; fire 0", "attach 0 mask; detach 0")),
    Scenario("mask copy, unmask", "A", 1, ("unmask 0",), ("fire 0", "attach 0 mask; detach 0")),
    Scenario("entry copies of two vectors", "AA", 0,
             ("retarget 0 B", "retarget 1 B"),
             ("attach 0 entry; fire 0", "attach 1 entry; fire 1")),
    Scenario("copies come and go", "AA", 0, ("retarget 0 B",),
             ("attach 0 entry; detach 0; fire 0", "attach 1 entry; detach 1")),
    Scenario("both copies", "A", 0,
             ("mask 0; retarget 0 B; unmask 0",), ("fire 0; fire 0", "attach 0 both; detach 0")),
    Scenario("both copies, two CPUs", "A", 0,
             ("lock 0; mask 0; unlock 0; lock 0; unmask 0; unlock 0",
              "lock 0; retarget 0 B; unlock 0"), ("fire 0", "attach 0 both; detach 0")),
    Scenario("copies of two vectors", "AA", 0b10,
             ("mask 0; unmask 1",), ("fire 0; fire 1", "attach 0 mask; attach 1 both")),
    Scenario("mask copy, two threads", "A", 1,
             ("unmask 0",), ("fire 0", "fire 0", "attach 0 mask")),
    Scenario("entry copy, two threads", "A", 0,
             ("retarget 0 B",), ("fire 0", "fire 0", "attach 0 entry")),
    Scenario("both copies, reset", "A", 0,
             ("retarget 0 B; reset",), ("fire 0; fire 0", "attach 0 both; detach 0")),
    # The other device: copies for one fire
    Scenario("marked: unmask", "A", 1, ("unmask 0",), ("fire_marked 0",)),
    Scenario("marked: set up", "-", 1, ("setup 0 A; unmask 0",), ("fire_marked 0",)),
    Scenario("marked: mask, unmask", "A", 0,
             ("mask 0; unmask 0",), ("fire_marked 0; fire_marked 0",)),
    Scenario("marked: mask, unmask twice", "A", 0,
             ("mask 0; unmask 0; mask 0; unmask 0",), ("fire_marked 0", "fire_marked 0")),
    Scenario("marked: there and back", "A", 0,
             ("retarget 0 B; retarget 0 A",), ("fire_marked 0", "fire_marked 0")),
    Scenario("marked: masked retarget", "A", 0,
             ("mask 0; retarget 0 B; unmask 0; retarget 0 A",),
             ("fire_marked 0; fire_marked 0", "fire_marked 0")),
    Scenario("marked: one vector, two CPUs", "A", 0,
             ("lock 0; mask 0; unlock 0; lock 0; unmask 0; unlock 0",
              "lock 0; retarget 0 B; retarget 0 A; unlock 0"), ("fire_marked 0", "fire_marked 0")),
    Scenario("marked: two vectors, two CPUs", "AA", 0b10,
             ("retarget 0 B; retarget 0 A", "unmask 1; mask 1"),
             ("fire_marked 0; fire_marked 1",)),
    Scenario("marked: two vectors, two threads", "AA", 0b01,
             ("unmask 0; retarget 1 B",), ("fire_marked 0", "fire_marked 1")),
    Scenario("marked: reset", "A", 0,
             ("mask 0; unmask 0; reset",), ("fire_marked 0", "fire_marked 0")),
)  # fmt: skip


SCENARIOS_2019 = (
    Scenario("2019: retarget", "A", 0, ("retarget 0 B",), ("fire 0",)),
    Scenario("2019: unmask", "A", 1, ("unmask 0",), ("fire 0",)),
    Scenario("2019: unmask two at once", "AA", 0b11, ("unmask_all",), ("fire 1",)),
    Scenario("2019: two vectors, two CPUs", "AA", 0b11, ("unmask 0", "unmask 1"), ("fire 0",)),
)


@dataclass(frozen=True)
class Mutation:
    """The protocol without one thing, or the layout of 2019.

    ``cut`` names to the programs what they are to leave out. ``breaks``: the property that a
    search in ``scenario`` finds broken (the whole protocol passes it); "" if none does, as far
    as any scenario shows. ``tso``: the same on x86.
    """

    name: str
    without: str
    scenario: str
    breaks: str
    tso: str
    cut: str = ""
    layout: str = "vis"


def _cut(cut: str, without: str, scenario: str, breaks: str, tso: str | None = None) -> Mutation:
    return Mutation(cut, without, scenario, breaks, breaks if tso is None else tso, cut)


def _two(
    name: str, cut: str, without: str, scenario: str, breaks: str, tso: str | None = None
) -> Mutation:
    """One whose name is not what is cut."""
    return Mutation(name, without, scenario, breaks, breaks if tso is None else tso, cut)


def _old(name: str, bug: str, scenario: str, breaks: str) -> Mutation:
    return Mutation(name, bug, scenario, breaks, breaks, layout="2019")


MUTATIONS: tuple[Mutation, ...] = (
    # Driver
    _cut("E1w", "order of first contents and ENABLE", "enable", "torn"),
    _cut("M2", "barrier between mask and all that follows", "mask, unmask", "masked"),
    _two("M2-copy", "M2", "the same, between mask and cached", "mask copy", "masked"),
    _cut("M3", "doorbell of mask", "mask copy", "masked"),
    _cut("U0", "barrier between an entry and its first unmask", "set up", "torn", ""),
    _cut("U2", "barrier between mask and pending", "unmask", "lost"),
    _cut("U3", "doorbell of unmask", "mask copy, unmask", "lost"),
    _cut("U3b", "barrier between cached and pending", "mask copy, unmask", "lost", ""),
    _cut("U4", "look at the pending byte after unmask", "unmask", "lost"),
    _cut("U4-clear", "clear of pending by the driver", "unmask, two fires", ""),
    _cut("U4w", "barrier between clear of pending and handler", "unmask, two fires", "lost"),
    _two("U4w-full", "U4w-full", "the same, but read and write barrier", "unmask, two fires",
         "lost"),
    _two("U4w-F0", "U4w F0-full", "barrier U4w, where F0 is a full barrier",
         "two threads, one vector", "lost", ""),
    _two("U4w-write", "U4w-full U4w-read F0-full", "the same, but write barrier",
         "two threads, one vector", ""),
    _cut("R2", "barrier between entry and cached, return", "retarget once", "old target"),
    _cut("R3", "doorbell of retarget", "entry copy, retarget", "old target"),
    _cut("R4", "local interrupt when a target is taken back", "there and back", "lost"),
    # Device
    _cut("F0r", "read barrier between what caused a fire and the mask", "mask, unmask", "masked",
         ""),
    _cut("F0w", "write barrier between used ring and pending, message", "unmask", "lost", ""),
    _cut("F3", "barrier between pending and re-check", "unmask", "lost"),
    _cut("F4", "re-check of the mask (F4 to F6)", "unmask", "lost"),
    _cut("F6-read", "look whether it is still pending", "two threads, one vector", ""),
    _cut("F6-clear", "clear of pending by the device", "two threads, one vector", ""),
    _cut("F6w", "barrier between clear of pending and message", "two threads, one vector", "lost",
         ""),
    _cut("F7", "barrier between mask and entry", "set up", "torn", ""),
    _cut("F10", "barrier between message and re-check", "retarget once", "lost"),
    _cut("F11", "re-check of the entry", "retarget once", "lost"),
    _cut("rounds", "more than one repeat for a changed entry", "retarget", "lost"),
    _cut("C2", "barrier between cached and copy of the entry", "entry copy, retarget",
         "old target"),
    _two("C2-mask", "C2", "the same, copy of the mask", "mask copy", "masked"),
    _cut("C4", "refresh on a doorbell", "entry copy, retarget", "old target"),
    _cut("C4-wait", "wait for fires under way on a doorbell", "fence, then free", "fence"),
    _two("C4-back", "C4-wait", "the same, in place of R4", "there and back, fence for R4", "lost"),
    _cut("C5", "stop using the copy before its bits are cleared", "entry copy, retarget",
         "old target"),
    _cut("C5-fires", "fires under way go back to the storage", "entry copy, retarget", "lost"),
    _cut("C-lock", "lock that keeps C1 to C3 and C4 apart", "entry copy, retarget", "old target"),
    _cut("D2", "wait for fires under way on a reset", "reset", "reset"),
    # Order
    _cut("order-U1", "unmask, then look at the pending byte", "unmask", "lost"),
    _cut("order-U4", "clear pending, then raise", "unmask, two fires", "lost"),
    _cut("order-F6", "clear pending, then send", "two threads, one vector", "lost"),
    _cut("order-C1", "write the cached byte, then read the copy", "entry copy, retarget",
         "old target"),
    # One access, and a byte a vector
    _cut("entry-write", "64-bit store of an entry: two of 32", "retarget once", "torn"),
    _cut("entry-read", "64-bit load of an entry: two of 32", "retarget once", "torn"),
    _cut("bits-mask", "a mask byte for each vector: bits of a word", "two vectors, two CPUs",
         "clobbered"),
    _cut("bits-pending", "a pending byte for each vector: bits of a word",
         "two vectors, two CPUs", "clobbered"),
    _cut("bits-cached", "a cached byte for each vector: bits of a word",
         "entry copies of two vectors", "clobbered"),
    # Copies for one fire
    _two("marked-C1", "marks", "marks: the fire with re-checks (F0 to F11)",
         "marked: mask, unmask", "late"),
    _two("marked-C1-entry", "marks", "the same, targets", "marked: there and back", "late"),
    _two("marked-C1-twice", "marks", "the same, an unmask", "marked: unmask", "twice"),
    _two("marked-C1-bare", "C1", "marks, and no re-check either", "marked: unmask", "lost"),
    _two("marked-C2", "C2", "barrier between marks and copies", "marked: mask, unmask", "late"),
    _two("marked-C3r", "C3r", "barrier between mask and entry", "marked: set up", "torn", ""),
    _two("marked-C5w", "C5w", "barrier between message and clearing the marks",
         "marked: mask, unmask", "late", ""),
    _two("marked-C5w-pend", "C5w", "the same, between pending and the clearing",
         "marked: unmask", "lost", ""),
    _two("marked-wait", "C4-lock", "wait for the vector's lock on a doorbell",
         "marked: mask, unmask", "late"),
    _two("marked-U3b", "U3b", "barrier between cached and pending", "marked: unmask", "lost", ""),
    _two("marked-lock", "fire-lock", "one fire of a vector at a time",
         "marked: there and back", "late"),
    _two("marked-F0", "F0r F0w", "the queue's barriers: C2 is one", "marked: mask, unmask twice",
         ""),
    _two("marked-U4w", "U4w", "barrier between clear of pending and handler",
         "marked: mask, unmask twice", "lost", ""),
    _two("marked-U4w-write", "U4w-full U4w-read", "the same, but write barrier",
         "marked: mask, unmask twice", ""),
    _two("marked-U4-clear", "U4-clear", "clear of pending by the driver",
         "marked: mask, unmask twice", "twice"),
    # The layout of 2019
    _old("2019-torn", "an entry is three words", "2019: retarget", "torn"),
    _old("2019-lost", "pending without a re-check", "2019: unmask", "lost"),
    _old("2019-first", "only the first changed mask bit is noticed", "2019: unmask two at once",
         "lost"),
    _old("2019-clobber", "the mask word is written from shadows", "2019: two vectors, two CPUs",
         "clobbered"),
)  # fmt: skip


def scenario(name: str) -> Scenario:
    """The scenario of that name."""
    return next(s for s in (*SCENARIOS, *SCENARIOS_2019) if s.name == name)
