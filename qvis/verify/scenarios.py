# SPDX-License-Identifier: GPL-2.0-or-later
"""What is checked: bounded programs of the correct protocol, and mutations that must fail."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MUTATIONS", "SCENARIOS", "SCENARIOS_2019", "Mutation", "Scenario", "scenario"]


@dataclass(frozen=True)
class Scenario:
    """Programs that run at the same time. ``entries``: one letter a vector, ``-`` not written.

    ``masked`` is the first mask word; ``cpus`` and ``devices`` are scripts, one an agent.
    """

    name: str
    entries: str
    masked: int
    cpus: tuple[str, ...]
    devices: tuple[str, ...]

    @property
    def vectors(self) -> int:
        return len(self.entries)

    @property
    def cached(self) -> bool:
        """Whether the device keeps copies."""
        return any("attach" in script for script in self.devices)


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
             ("mask 0; retarget 0 B; unmask 0",), ("fire 0; fire 0", "fire 0")),
    Scenario("retarget, then mask", "A", 0,
             ("retarget 0 B; mask 0; retarget 0 C; unmask 0",), ("fire 0", "fire 0")),
    Scenario("one vector, two CPUs", "A", 0,
             ("lock 0; mask 0; unlock 0; lock 0; unmask 0; unlock 0",
              "lock 0; retarget 0 B; unlock 0"), ("fire 0", "fire 0")),
    Scenario("two vectors, two CPUs", "AA", 0,
             ("mask 0; unmask 0", "mask 1; unmask 1"), ("fire 0", "fire 1")),
    Scenario("two vectors, retarget", "AA", 0,
             ("mask 0; retarget 0 B; unmask 0", "retarget 1 B"), ("fire 0; fire 1", "fire 1")),
    Scenario("three vectors, two CPUs", "AAA", 0b101,
             ("unmask 0; retarget 1 B", "unmask 2"), ("fire 0; fire 1", "fire 2")),
    Scenario("three vectors, two threads", "AAA", 0b110,
             ("mask 0; unmask 1; unmask 0", "unmask 2; retarget 2 B"),
             ("fire 0; fire 1", "fire 2")),
    Scenario("reset", "A", 0, ("mask 0; unmask 0; reset",), ("fire 0; fire 0", "fire 0")),
    Scenario("reset, two vectors, two CPUs", "AA", 0b10,
             ("retarget 0 B; join; reset", "unmask 1; done"), ("fire 0; fire 1", "fire 1")),
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
             ("mask 0; unmask 0", "unmask 1; retarget 1 B"),
             ("fire 0; fire 1", "attach 0 mask; attach 1 both")),
    Scenario("both copies, two threads", "A", 0,
             ("mask 0; unmask 0",), ("fire 0", "fire 0", "attach 0 both; detach 0")),
    Scenario("entry copy, two threads", "A", 0,
             ("retarget 0 B",), ("fire 0", "fire 0", "attach 0 entry; detach 0")),
    Scenario("copies of three vectors", "AAA", 0b100,
             ("mask 0; unmask 2", "retarget 1 B"),
             ("attach 0 mask; fire 0; fire 2", "attach 1 entry; fire 1")),
    Scenario("both copies, reset", "A", 0,
             ("retarget 0 B; reset",), ("fire 0; fire 0", "attach 0 both; detach 0")),
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


def _old(name: str, bug: str, scenario: str, breaks: str) -> Mutation:
    return Mutation(name, bug, scenario, breaks, breaks, layout="2019")


MUTATIONS: tuple[Mutation, ...] = (
    # Driver
    _cut("M2", "barrier between mask bit and mask-cached bit", "mask copy", "masked", ""),
    _cut("M3", "doorbell of mask", "mask copy", "masked"),
    _cut("U0", "barrier between an entry and its first unmask", "set up", "torn", ""),
    _cut("U2", "barrier between mask bit and pending bit", "unmask", "lost", ""),
    _cut("U3", "doorbell of unmask", "mask copy, unmask", "lost"),
    _cut("U3b", "barrier between mask-cached bit and pending bit (new)", "mask copy, unmask",
         "lost", ""),
    _cut("U4", "look at the pending bit after unmask", "unmask", "lost"),
    _cut("R2", "barrier between entry and entry-cached bit", "retarget once", "old target"),
    _cut("R3", "doorbell of retarget", "entry copy, retarget", "old target"),
    _cut("R4", "local interrupt when a target is taken back (new)", "there and back", "lost"),
    # Device
    _cut("F0", "barrier of the queue before a fire", "mask, unmask", "masked", ""),
    _cut("F3", "barrier between pending bit and re-check", "unmask", "lost", ""),
    _cut("F4", "re-check of the mask (F4 to F6)", "unmask", "lost"),
    _cut("F7", "barrier between mask and entry", "set up", "torn", ""),
    _cut("F10", "barrier between message and re-check", "retarget once", "lost"),
    _cut("F11", "re-check of the entry", "retarget once", "lost"),
    _cut("rounds", "more than one re-check of the entry", "retarget", "lost"),
    _cut("C2", "barrier between cached bit and copy", "entry copy, retarget", "old target", ""),
    _cut("C4", "refresh on a doorbell", "entry copy, retarget", "old target"),
    _cut("C4-wait", "wait for fires under way on a doorbell", "both copies", ""),
    _cut("C5", "stop using the copy before its bits are cleared", "entry copy, retarget",
         "old target"),
    _cut("C-lock", "lock that keeps C1 to C3 and C4 apart (new)", "entry copy, retarget",
         "old target"),
    _cut("D2", "wait for fires under way on a reset", "reset", "reset"),
    # One access
    _cut("entry-write", "64-bit store of an entry: two of 32", "retarget once", "torn"),
    _cut("entry-read", "64-bit load of an entry: two of 32", "retarget once", "torn"),
    _cut("atomic-F2", "atomic set of a pending bit", "two vectors, two CPUs", "clobbered"),
    _cut("atomic-F6", "atomic clear of a pending bit (device)", "two vectors, two CPUs",
         "clobbered"),
    _cut("atomic-U4", "atomic clear of a pending bit (driver)", "two vectors, two CPUs",
         "clobbered"),
    _cut("atomic-M1", "atomic set of a mask bit", "two vectors, two CPUs", "clobbered"),
    _cut("atomic-U1", "atomic clear of a mask bit", "two vectors, two CPUs", "clobbered"),
    _cut("atomic-C1", "atomic set of a cached bit", "entry copies of two vectors", "clobbered"),
    _cut("atomic-C5", "atomic clear of a cached bit", "copies come and go", "clobbered"),
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
