# SPDX-License-Identifier: GPL-2.0-or-later
"""The VIS protocol as programs for :mod:`.memory`, step by step with the steps' own labels.

``M1`` to ``U4`` are the driver's, ``F0`` to ``F11`` a fire of the device, ``C1`` to ``C5`` the
device's keeping of copies, ``D1`` to ``D3`` a reset; docs/verify.md lists them. A program asks
``self.has(step)`` before a step that a mutation may take out; all else is the protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .memory import FULL, READ, WRITE, Act, Fence, Load, Post, Program, Rmw, Store, ViolationError

__all__ = ["Layout2019", "Vis", "World", "entry_name"]

# Locations: one word each of mask, pending, entry-cached and mask-cached bits; then the entries.
MASK, PENDING, ENTRY_CACHED, MASK_CACHED, ENTRIES = range(5)
WORDS = ("mask", "pending", "entry-cached", "mask-cached")

# An entry is an address (upper four bits) and a message (lower four). Target n has address n
# and message n; so what is put together from two targets shows. 0 is an entry never written.
ADDRESS, DATA = 0xF0, 0x0F
TARGETS = "-ABC"

ON, CLOSING, OFF = range(3)  # VIS enabled; being disabled; disabled, and the storage freed
NOBODY = (None, None)


def target(entry: int) -> int:
    """The number of the target that an entry which is not torn names."""
    return entry >> 4


def entry_of(name: str) -> int:
    """The entry of target ``A``, ``B`` or ``C``; ``-`` is none."""
    return TARGETS.index(name) * 0x11


def entry_name(entry: int) -> str:
    """``A``, or ``A/B`` for the address of A with the message of B."""
    address, data = TARGETS[entry >> 4], TARGETS[entry & DATA]
    return address if address == data else f"{address}/{data}"


class Begun(NamedTuple):
    """What a fire may not do, because of what had returned when it began."""

    vector: int
    quiet: bool  # send: its vector was masked, and no unmask has begun since
    old: int  # send to one of these targets: they were given up before


class World(NamedTuple):
    """The state that is not in memory: the device's own, and what the properties remember.

    Sets of vectors, of targets and of agents are bit masks.
    """

    devices: int  # agents that are the device's
    dead: tuple[int, ...]  # of each vector: targets that are no longer listened to
    copies: tuple[tuple[int | None, int | None], ...]  # of each vector: mask bit and entry
    fires: tuple[Begun | None, ...]  # of each agent: its fire under way
    awaited: tuple[int, ...]  # of each agent: fires that its doorbell or reset waits for
    quiet: int  # vectors whose mask has returned, with no unmask begun
    owed: int = 0  # vectors fired, with no handler begun since
    status: int = ON
    locks: int = 0  # driver's lock of vector v: bit v; the device's: bit v + 8
    done: bool = False  # the other CPU has come to its end
    old: tuple[int, ...] = ()  # the layout of 2019: mask word, what was noticed, pending, shadows

    def access(self, agent: int) -> None:
        """The device may not touch storage that has been freed."""
        if self.status == OFF and self.devices >> agent & 1:
            raise ViolationError("reset", "the device touches the storage after it was freed")

    def arrive(self, message: Any) -> tuple[World, str]:
        """A message comes to its target: a handler runs, if there still is one."""
        vector, entry = message
        if self.status == OFF:
            raise ViolationError("reset", "a message arrives after the reset has completed")
        if self.dead[vector] >> target(entry) & 1:
            return self, "vanishes"
        return self._replace(owed=self.owed & ~(1 << vector)), "handled"

    def each_fire(self, vector: int, change: Callable[[Begun], Begun]) -> World:
        fires = (change(f) if f and f.vector == vector else f for f in self.fires)
        return self._replace(fires=tuple(fires))

    def under_way(self, vector: int | None = None) -> int:
        return sum(1 << i for i, f in enumerate(self.fires)
                   if f and vector in (None, f.vector))  # fmt: skip


def may_send(vector: int, entry: int) -> Callable[[World, int], None]:
    """What must hold of a message at the moment in which it is sent."""

    def check(world: World, agent: int) -> None:
        if entry >> 4 != entry & DATA or entry == 0:
            raise ViolationError(
                "torn", f"a message {entry_name(entry)}: the driver never wrote that as an entry"
            )
        fire = world.fires[agent]
        if fire and fire.quiet:
            raise ViolationError(
                "masked", f"vector {vector} was masked before the fire began, and still is"
            )
        if fire and fire.old >> target(entry) & 1:
            raise ViolationError(
                "old target", f"{entry_name(entry)} was given up before the fire began"
            )

    return check


def _set(values: tuple[Any, ...], n: int, value: Any) -> tuple[Any, ...]:
    return (*values[:n], value, *values[n + 1 :])


class Vis:
    """Driver and device of VIS with ``vectors`` vectors, without what ``cut`` names.

    ``cached``: some program keeps copies (otherwise nobody looks for any).
    """

    def __init__(self, vectors: int, cut: str = "", cached: bool = False) -> None:
        self.vectors = vectors
        self.cut = cut
        self.cached = cached
        self.rounds = 8 if self.has("rounds") else 1
        self.words = tuple(range(1 << vectors))
        pairs = [n * 0x11 for n in range(len(TARGETS))]
        halves = [a & ADDRESS | d & DATA for a in pairs for d in pairs]
        torn = cut.startswith("entry-")
        self.entries = tuple(halves if torn else pairs)

    def has(self, step: str) -> bool:
        """Whether the step is there."""
        return step != self.cut

    def script(self, lines: str) -> Program:
        """One agent: ``verb argument...; verb argument...``, each a method of this class."""
        for _number, line in enumerate(lines.split(";")):
            yield from self.call(line)

    def call(self, line: str) -> Program:
        verb, *arguments = line.split()
        program: Program = getattr(self, verb)(*(int(a) if a.isdigit() else a for a in arguments))
        return program

    # What a CPU does

    def mask(self, v: int) -> Program:
        yield from self.change("M1", MASK, v, True)
        if self.has("M2"):
            yield Fence("M2", FULL, FULL)
        if self.has("M3") and (yield self.bit("M3", MASK_CACHED, v)):
            yield from self.doorbell("M3", v)
        yield Act("", f"mask {v} returns", lambda w, i: (w._replace(quiet=w.quiet | 1 << v), None),
                  soon=True)  # fmt: skip

    def unmask(self, v: int) -> Program:
        if self.has("U0"):
            yield Fence("U0", WRITE, WRITE)
        yield from self.change("U1", MASK, v, False, self._unmasking(v))
        if self.has("U2"):
            yield Fence("U2", FULL, FULL)
        if self.has("U3") and (yield self.bit("U3", MASK_CACHED, v)):
            yield from self.doorbell("U3", v)
        if self.has("U3b") and self.cached:
            yield Fence("U3b", READ, READ)
        if not self.has("U4") or not (yield self.bit("U4", PENDING, v)):
            return
        if (yield from self.change("U4", PENDING, v, False)):
            yield self.raise_locally("U4", v)

    def _unmasking(self, v: int) -> Callable[[World], World]:
        def begins(world: World) -> World:
            world = world._replace(quiet=world.quiet & ~(1 << v))
            return world.each_fire(v, lambda fire: fire._replace(quiet=False))

        return begins

    def raise_locally(self, label: str, v: int) -> Act:
        def handled(world: World, agent: int) -> tuple[World, None]:
            return world._replace(owed=world.owed & ~(1 << v)), None

        return Act(label, f"raise {v} locally: handler runs", handled, soon=True)

    def write_entry(self, label: str, v: int, name: str) -> Program:
        entry = entry_of(name)

        def begins(world: World) -> World:
            alive = ~(1 << target(entry))
            world = world._replace(dead=_set(world.dead, v, world.dead[v] & alive))
            return world.each_fire(v, lambda fire: fire._replace(old=fire.old & alive))

        text = f"write entry {v} := {name}"
        if self.has("entry-write"):
            yield Store(label, text, ENTRIES + v, entry, then=begins)
        else:
            yield Store(label, f"{text} (address)", ENTRIES + v, entry, ADDRESS, then=begins)
            yield Store(label, f"{text} (data)", ENTRIES + v, entry, DATA)

    def setup(self, v: int, name: str) -> Program:
        """Write the entry of a vector that is masked and has none; no barrier, unmask has it."""
        yield from self.write_entry("R1", v, name)

    def retarget(self, v: int, name: str, back: str = "") -> Program:
        yield from self.write_entry("R1", v, name)
        if self.has("R2"):
            yield Fence("R2", FULL, FULL)
        if self.has("R3") and (yield self.bit("R3", ENTRY_CACHED, v)):
            yield from self.doorbell("R3", v)
        if back and self.has("R4"):
            yield self.raise_locally("R4", v)
        others = ~(1 << TARGETS.index(name)) & 0xF

        def returns(world: World, agent: int) -> tuple[World, None]:
            return world._replace(dead=_set(world.dead, v, others)), None

        text = f"retarget {v} returns: the old target is given up"
        yield Act("", text, returns, soon=True)

    def reset(self) -> Program:
        def closing(world: World, agent: int) -> tuple[World, None]:
            awaited = _set(world.awaited, agent, world.under_way())
            copies = (NOBODY,) * len(world.copies)
            return world._replace(status=CLOSING, awaited=awaited, copies=copies), None

        def closed(world: World, agent: int) -> tuple[World, None] | None:
            busy = world.awaited[agent] or world.locks >> 8
            return None if busy else (world, None)

        yield Act("D1", "ENABLE := 0", closing, drained=True)
        if self.has("D2"):
            yield Act("D2", "device: fires under way have ended", closed)
        freed: Callable[[World, int], tuple[World, None]]
        freed = lambda w, i: (w._replace(status=OFF, awaited=_set(w.awaited, i, 0)), None)  # noqa: E731
        yield Act("D3", "reset returns: storage is freed", freed, soon=True)

    def lock(self, v: int) -> Program:
        """The driver's lock of a vector that both CPUs change (Linux: of its descriptor)."""
        yield self.take(f"lock of vector {v}", 1 << v)
        yield Fence("", "(taking a lock: read barrier)", READ)

    def unlock(self, v: int) -> Program:
        yield self.leave(f"lock of vector {v}", 1 << v)

    def done(self) -> Program:
        yield Act("", "all done", lambda w, i: (w._replace(done=True), None), soon=True,
                  drained=True)  # fmt: skip

    def join(self) -> Program:
        """Wait for the other CPU."""
        yield Act("", "wait for the other CPU", lambda w, i: (w, None) if w.done else None,
                  soon=True)  # fmt: skip

    # The doorbell: the access traps, so the CPU that wrote it does the device's work

    def doorbell(self, label: str, v: int) -> Program:
        yield from self.refresh(label, v)
        if self.has("C4-wait"):
            yield Act("C4", f"device: fires of {v} under way have ended",
                      lambda w, i: None if w.awaited[i] else (w, None))  # fmt: skip

    def refresh(self, label: str, v: int) -> Program:
        def ring(world: World, agent: int) -> tuple[World, int] | None:
            mask, entry = world.copies[v]
            kept = (mask is not None) + 2 * (entry is not None)
            locked = self.take("", 1 << v + 8).do(world, agent)
            return locked and (locked[0], kept)

        kept = yield Act(label, f"ring the doorbell of {v}", ring, (0, 1, 2, 3), drained=True)
        yield Fence("", "(the access traps: read barrier)", READ)
        new_mask = new_entry = None
        if self.has("C4") and kept & 1:
            new_mask = yield self.bit("C4", MASK, v)
        if self.has("C4") and kept & 2:
            new_entry = yield self.whole_entry("C4", v)

        def answer(world: World, agent: int) -> tuple[World, None]:
            mask, entry = world.copies[v]
            mask = mask if new_mask is None else new_mask
            entry = entry if new_entry is None else new_entry
            copies = _set(world.copies, v, (mask, entry) if world.status == ON else NOBODY)
            awaited = _set(world.awaited, agent, world.under_way(v))
            locks = world.locks & ~(1 << v + 8)
            return world._replace(copies=copies, locks=locks, awaited=awaited), None

        yield Act("C4", f"device: copy of {v} is refreshed", answer)

    # What a thread of the device does

    def fire(self, v: int) -> Program:
        begun = yield Act("F0", f"fire {v}: begins", self._begin(v), (False, True))
        if not begun:
            return
        if self.has("F0"):
            yield Fence("F0", "(barrier of the queue: used ring before the event index)", READ)
        for _round in range(self.rounds):
            if not (yield from self.deliver(v)):
                break

        def ends(world: World, agent: int) -> tuple[World, None]:
            awaited = tuple(a & ~(1 << agent) for a in world.awaited)
            return world._replace(fires=_set(world.fires, agent, None), awaited=awaited), None

        yield Act("", f"fire {v}: ends", ends, soon=True)

    def _begin(self, v: int) -> Callable[[World, int], tuple[World, bool]]:
        def begin(world: World, agent: int) -> tuple[World, bool]:
            if world.status != ON:
                return world, False
            fire = Begun(v, bool(world.quiet >> v & 1), world.dead[v])
            fires = _set(world.fires, agent, fire)
            return world._replace(fires=fires, owed=world.owed | 1 << v), True

        return begin

    def deliver(self, v: int) -> Program:
        """F1 to F11, once. True: the entry has changed meanwhile."""
        if (yield from self.see_mask("F1", v)):
            yield from self.change("F2", PENDING, v, True)
            if self.has("F3"):
                yield Fence("F3", FULL, FULL)
            if not self.has("F4") or (yield from self.see_mask("F4", v)):
                return False
            if not (yield from self.change("F6", PENDING, v, False)):
                return False
        if self.has("F7"):
            yield Fence("F7", READ, READ)
        sent = yield from self.see_entry("F8", v)
        yield Post("F9", f"send {entry_name(sent)}", (v, sent), may_send(v, sent))
        if self.has("F10"):
            yield Fence("F10", FULL, FULL)
        if not self.has("F11"):
            return False
        now = yield from self.see_entry("F11", v)
        return bool(now != sent)

    def see_mask(self, label: str, v: int) -> Program:
        if self.cached:
            copy = yield self.copy_of(label, v, 0, (None, 0, 1 << v))
            if copy is not None:
                return copy
        return (yield self.bit(label, MASK, v))

    def see_entry(self, label: str, v: int) -> Program:
        if self.cached:
            copy = yield self.copy_of(label, v, 1, (None, *self.entries))
            if copy is not None:
                return copy
        if self.has("entry-read"):
            return (yield self.whole_entry(label, v))
        text = f"read entry {v}"
        where = ENTRIES + v
        address = yield Load(label, f"{text} (address)", where, ADDRESS,
                             tuple(sorted({e & ADDRESS for e in self.entries})))  # fmt: skip
        data = yield Load(label, f"{text} (data)", where, DATA,
                          tuple(sorted({e & DATA for e in self.entries})))  # fmt: skip
        return address | data

    def copy_of(self, label: str, v: int, which: int, domain: tuple[int | None, ...]) -> Act:
        text = f"look for a copy of {('mask bit', 'entry')[which]} {v}"
        return Act(label, text, lambda w, i: (w, w.copies[v][which]), domain)

    def attach(self, v: int, what: str) -> Program:
        """Begin to keep a copy of the ``entry``, the ``mask``, or ``both``."""
        if self.has("C-lock"):
            open_ = yield self.enter(v)
            if not open_:
                return
            yield Fence("", "(taking a lock: read barrier)", READ)
        if what != "mask":
            yield from self.change("C1", ENTRY_CACHED, v, True)
        if what != "entry":
            yield from self.change("C1", MASK_CACHED, v, True)
        if self.has("C2"):
            yield Fence("C2", FULL, FULL)
        mask = entry = None
        if what != "entry":
            mask = yield self.bit("C3", MASK, v)
        if what != "mask":
            entry = yield self.whole_entry("C3", v)

        def keep(world: World, agent: int) -> tuple[World, None]:
            return world._replace(copies=_set(world.copies, v, (mask, entry))), None

        yield Act("C3", f"keep the copy of {v}", keep)
        if self.has("C-lock"):
            yield self.leave(f"device's lock of {v}", 1 << v + 8)

    def detach(self, v: int) -> Program:
        """Keep no copy any longer."""
        open_ = yield self.enter(v)
        if not open_:
            return

        def stop(world: World, agent: int) -> tuple[World, None]:
            return world._replace(copies=_set(world.copies, v, NOBODY)), None

        if self.has("C5"):
            yield Act("C5", f"stop using the copy of {v}", stop)
        yield from self.change("C5", ENTRY_CACHED, v, False)
        yield from self.change("C5", MASK_CACHED, v, False)
        if not self.has("C5"):
            yield Act("C5", f"stop using the copy of {v}", stop)
        yield self.leave(f"device's lock of {v}", 1 << v + 8)

    def enter(self, v: int) -> Act:
        def do(world: World, agent: int) -> tuple[World, bool] | None:
            if world.status != ON:
                return world, False
            locked = self.take("", 1 << v + 8).do(world, agent)
            return locked and (locked[0], True)

        return Act("", f"take device's lock of {v}", do, (False, True))

    # The same for both

    def take(self, name: str, lock: int) -> Act:
        def do(world: World, agent: int) -> tuple[World, None] | None:
            return None if world.locks & lock else (world._replace(locks=world.locks | lock), None)

        return Act("", f"take {name}", do)

    def leave(self, name: str, lock: int) -> Act:
        def do(world: World, agent: int) -> tuple[World, None]:
            return world._replace(locks=world.locks & ~lock), None

        return Act("", f"leave {name}", do, soon=True, drained=True)

    def bit(self, label: str, word: int, v: int) -> Load:
        return Load(label, f"read {WORDS[word]} bit {v}", word, 1 << v)

    def whole_entry(self, label: str, v: int) -> Load:
        return Load(label, f"read entry {v}", ENTRIES + v, domain=self.entries)

    def change(self, label: str, word: int, v: int, to: bool,
               then: Callable[[World], World] | None = None) -> Program:  # fmt: skip
        """Set or clear a bit, atomically (unless that is what is cut); returns what it was."""
        text = f"{'set' if to else 'clear'} {WORDS[word]} bit {v}"
        bit = 1 << v
        if self.has(f"atomic-{label}"):
            return (yield Rmw(label, text, word, bit, to, then))
        old = yield Load(label, f"read {WORDS[word]} word", word, domain=self.words)
        new = old | bit if to else old & ~bit
        yield Store(label, f"{text}: write the word", word, new, own=bit, then=then)
        return old & bit

    # The whole

    def start(self, masked: int, entries: str) -> tuple[int, ...]:
        """Memory when VIS has just been enabled."""
        return (masked, 0, 0, 0, *(entry_of(name) for name in entries))

    def world(self, agents: int, devices: int, masked: int, entries: str) -> World:
        """The world beside that memory."""
        return World(
            devices=devices,
            dead=tuple(~(1 << TARGETS.index(name)) & 0xF for name in entries),
            copies=(NOBODY,) * self.vectors,
            fires=(None,) * agents,
            awaited=(0,) * agents,
            quiet=masked,
        )

    def finish(self, memory: tuple[int, ...], world: World) -> None:
        """When all is quiet, what was fired was handled, or waits for its unmask."""
        lost = world.owed & ~self.waiting(memory, world)
        if lost and world.status != OFF:
            vectors = [v for v in range(self.vectors) if lost >> v & 1]
            raise ViolationError("lost", f"vectors {vectors}: fired, not handled, not pending")

    def waiting(self, memory: tuple[int, ...], world: World) -> int:
        """Vectors that are masked and pending."""
        return memory[MASK] & memory[PENDING]


class Layout2019(Vis):
    """The prototype of 2019, as far as it is known (the proposal has no register map left).

    An entry is written address first and data after it. All mask bits are one word, which is
    written whole, from a shadow that each vector keeps for itself; the write traps, and the
    device acts on the first bit that has changed. It sets pending and does not look again.
    """

    def __init__(self, vectors: int, cut: str = "", cached: bool = False) -> None:
        super().__init__(vectors, "entry-2019")

    def has(self, step: str) -> bool:
        return step not in ("entry-write", "entry-read", "R2", "R3")

    def world(self, agents: int, devices: int, masked: int, entries: str) -> World:
        world = super().world(agents, devices, masked, entries)
        return world._replace(old=(masked, masked, 0, *(masked for _ in range(self.vectors))))

    def waiting(self, memory: tuple[int, ...], world: World) -> int:
        return world.old[0] & world.old[2]

    def mask(self, v: int) -> Program:
        yield from self.write_mask(v, 1 << v, True)
        yield Act("", f"mask {v} returns", lambda w, i: (w._replace(quiet=w.quiet | 1 << v), None),
                  soon=True)  # fmt: skip

    def unmask(self, v: int) -> Program:
        yield from self.write_mask(v, 1 << v, False)

    def unmask_all(self) -> Program:
        yield from self.write_mask(0, (1 << self.vectors) - 1, False)

    def write_mask(self, v: int, bits: int, to: bool) -> Program:
        def shadow(world: World, agent: int) -> tuple[World, int]:
            word = world.old[3 + v] | bits if to else world.old[3 + v] & ~bits
            return world._replace(old=_set(world.old, 3 + v, word)), word

        def notice(world: World, agent: int) -> tuple[World, int | None]:
            old, seen, pending, *shadows = world.old
            if (word ^ old) & ~bits:
                raise ViolationError("clobbered", "the word undoes what another vector wrote")
            for n in range(self.vectors):
                if bits >> n & 1 and not to:
                    world = self._unmasking(n)(world)
            changed = (seen ^ word) & -(seen ^ word)
            seen ^= changed
            due = changed & ~word & pending
            world = world._replace(old=(word, seen, pending & ~due, *shadows))
            return world, due.bit_length() - 1 if due else None

        word = yield Act("mask", f"take the shadow of {v}, change it", shadow, self.words)
        due = yield Act("mask", f"write mask word {word:0{self.vectors}b} (traps)", notice,
                        (None, *range(self.vectors)), drained=True)  # fmt: skip
        if due is not None:
            entry = yield from self.see_entry("pending", due)
            yield Post("pending", f"send {entry_name(entry)}", (due, entry), may_send(due, entry))

    def deliver(self, v: int) -> Program:
        def look(world: World, agent: int) -> tuple[World, bool]:
            return world, bool(world.old[1] >> v & 1)

        def pend(world: World, agent: int) -> tuple[World, None]:
            return world._replace(old=_set(world.old, 2, world.old[2] | 1 << v)), None

        masked = yield Act("fire", f"is {v} masked", look, (False, True))
        if masked:
            yield Act("fire", f"set pending bit {v}", pend)
            return False
        sent = yield from self.see_entry("fire", v)
        yield Post("fire", f"send {entry_name(sent)}", (v, sent), may_send(v, sent))
        yield Fence("fire", FULL, FULL)
        return False
