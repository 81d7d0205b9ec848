# SPDX-License-Identifier: GPL-2.0-or-later
"""The VIS protocol as programs for :mod:`.memory`, step by step with the steps' own labels.

``M1`` to ``R4`` are the driver's, ``F0`` to ``F11`` a fire of the device, ``C1`` to ``C5`` the
device's keeping of copies (docs/virtio-interrupts.md, 5.3 to 5.5); ``E1`` and ``E2`` enable,
``D1`` to ``D3`` reset. ``fire_marked`` is another device, whose copies last for one fire; where
it runs, more must hold (``strict``). A program asks ``self.has(step)`` before a step that a
mutation may take out; all else is the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .memory import FULL, READ, WRITE, Act, Fence, Load, Post, Program, Store, ViolationError

__all__ = ["Layout2019", "Vis", "World", "entry_name"]

# The areas. The first four have a location a vector: a byte, or an entry; the last one has a
# location for each queue, which is what one thread of the device fires one vector for.
MASK, PENDING, CACHED, ENTRIES, USED = range(5)
AREAS = ("mask", "pending", "cached", "entry", "used")
ENTRY_BIT, MASK_BIT = 1, 2  # of a cached byte

# An entry is an address (upper four bits) and a message (lower four). Target n has address n
# and message n; so what is put together from two targets shows. 0 is an entry never written.
ADDRESS, DATA = 0xF0, 0x0F
TARGETS = "-ABC"

# VIS is enabled; being disabled; disabled, and the storage freed; not enabled yet
ON, CLOSING, OFF, BEFORE = range(4)
NOBODY = (None, None)
FIRES = ("fire", "fire_marked")


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
    old: int  # send to one of these targets: the vector had left them
    held: tuple[int | None, int | None] = NOBODY  # a copy that it uses although it is given up
    pended: bool = False  # it has set pending (kept if strict)


class World(NamedTuple):
    """The state that is not in memory: the device's own, and what the properties remember.

    Sets of vectors, of targets and of agents are bit masks.
    """

    devices: int  # agents that are the device's
    past: tuple[int, ...]  # of each vector: targets that it has left
    dead: tuple[int, ...]  # of each vector: targets that are no longer listened to
    copies: tuple[tuple[int | None, int | None], ...]  # of each vector: mask bit and entry
    fires: tuple[Begun | None, ...]  # of each agent: its fire under way
    awaited: tuple[int, ...]  # of each agent: fires that its doorbell or reset waits for
    queues: tuple[tuple[int, int], ...]  # of each queue: its location and its vector
    seen: tuple[int, ...]  # of each queue: used buffers that a handler has found
    quiet: int  # vectors whose mask has returned, with no unmask begun
    freed: int = 0  # vectors that were masked and fenced for good
    status: int = ON
    locks: int = 0  # driver's lock of vector v: bit v; the device's: bit v + 8
    done: bool = False  # the other CPU has come to its end
    strict: bool = False  # no message of before a change may come after it, nor one twice
    pended: int = 0  # vectors set pending, and not delivered since (kept if strict)
    old: tuple[int, ...] = ()  # the layout of 2019: mask word, what was noticed, pending, shadows

    def access(self, agent: int) -> None:
        """The device may not touch storage that has been freed."""
        if self.status == OFF and self.devices >> agent & 1:
            raise ViolationError("reset", "the device touches the storage after it was freed")

    def arrive(self, message: Any, memory: tuple[int, ...]) -> tuple[World, str]:
        """A message comes to its target: a handler, if there still is one, looks at the queues."""
        vector, entry = message
        if self.status == OFF:
            raise ViolationError("reset", "a message arrives after the reset has completed")
        if self.freed >> vector & 1:
            raise ViolationError("fence", f"a message of {vector} arrives after mask and a fence")
        self.in_time(vector, entry)
        if self.dead[vector] >> target(entry) & 1:
            return self, "vanishes"
        world = self
        for queue, (loc, v) in enumerate(self.queues):
            if v == vector:
                world = world.found(queue, memory[loc])
        return world, "handled"

    def in_time(self, vector: int, entry: int) -> None:
        """If strict: no message after the change that it should have heeded, of whatever fire."""
        if self.strict and self.quiet >> vector & 1:
            raise ViolationError("late", f"a message of {vector} after mask has returned")
        if self.strict and self.past[vector] >> target(entry) & 1:
            raise ViolationError(
                "late", f"a message of {vector} to {entry_name(entry)} after retarget has returned"
            )

    def found(self, queue: int, used: int) -> World:
        """A handler has read that so many buffers of ``queue`` are used."""
        return self._replace(seen=_set(self.seen, queue, max(used, self.seen[queue])))

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
                "old target", f"vector {vector} had left {entry_name(entry)} before the fire began"
            )
        world.in_time(vector, entry)
        if fire and fire.pended and not world.pended >> vector & 1:
            raise ViolationError("twice", f"the driver has taken this interrupt of {vector}")

    return check


def _set(values: tuple[Any, ...], n: int, value: Any) -> tuple[Any, ...]:
    return (*values[:n], value, *values[n + 1 :])


class Vis:
    """Driver and device of VIS that run ``scripts`` on ``vectors`` vectors, without what ``cut``
    names (several things with spaces between). ``bits-mask`` and the like take out that each
    vector has a byte of its own.
    """

    def __init__(self, vectors: int, scripts: Sequence[str] = (), cut: str = "") -> None:
        self.vectors = vectors
        self.scripts = scripts
        self.cuts = frozenset(cut.split())
        self.strict = any("fire_marked" in script for script in scripts)
        self.cached = self.strict or any("attach" in script for script in scripts)
        self.rounds = 9 if self.has("rounds") else 2
        shared = (n for n, area in enumerate(AREAS) if not self.has(f"bits-{area}"))
        self.shared = next(shared, None)
        pairs = [n * 0x11 for n in range(len(TARGETS))]
        halves = [a & ADDRESS | d & DATA for a in pairs for d in pairs]
        torn = any(name.startswith("entry-") for name in self.cuts)
        self.entries = tuple(halves if torn else pairs)
        lines = [(n, line.split()) for n, all_ in enumerate(scripts) for line in all_.split(";")]
        self.fires = [(n, int(words[1])) for n, words in lines if words[0] in FIRES]
        self.queues = sorted(set(self.fires))

    def has(self, step: str) -> bool:
        """Whether the step is there."""
        return step not in self.cuts

    def script(self, agent: int) -> Program:
        """One agent: ``verb argument...; verb argument...``, each a method of this class."""
        done: list[str] = []
        for _number, line in enumerate(self.scripts[agent].split(";")):
            done.append(line.strip())
            verb, *words = line.split()
            arguments = [int(word) if word.isdigit() else word for word in words]
            if verb in FIRES:
                arguments += [agent, done.count(line.strip())]
            yield from getattr(self, verb)(*arguments)

    # What a CPU does

    def mask(self, v: int) -> Program:
        yield from self.write("M1", MASK, v, 1)
        if self.has("M2"):
            yield Fence("M2", FULL, FULL)
        if self.has("M3") and (yield self.read("M3", CACHED, v, MASK_BIT)):
            yield from self.doorbell("M3", v)
        yield Act("", f"mask {v} returns", lambda w, i: (w._replace(quiet=w.quiet | 1 << v), None),
                  soon=True)  # fmt: skip

    def unmask(self, v: int) -> Program:
        if self.has("U0"):
            yield Fence("U0", WRITE, WRITE)
        pending = None
        if not self.has("order-U1"):
            pending = yield self.read("U4", PENDING, v)
        yield from self.write("U1", MASK, v, 0, self._unmasking(v))
        if self.has("U2"):
            yield Fence("U2", FULL, FULL)
        if self.has("U3") and (yield self.read("U3", CACHED, v, MASK_BIT)):
            yield from self.doorbell("U3", v)
        if self.has("U3b") and self.cached:
            yield Fence("U3b", READ, READ)
        if self.has("U4") and pending is None:
            pending = yield self.read("U4", PENDING, v)
        if not pending:
            return
        if not self.has("order-U4"):
            yield from self.raise_locally("U4", v)
        if self.has("U4-clear"):
            yield from self.write("U4", PENDING, v, 0)
        if self.has("U4w") and self.has("U4w-full"):
            yield Fence("U4w", FULL, FULL)
        elif self.has("U4w"):
            if self.has("U4w-read"):
                yield Fence("U4w", READ, READ)
            yield Fence("U4w", WRITE, WRITE)
        if self.has("order-U4"):
            yield from self.raise_locally("U4", v)

    def _unmasking(self, v: int) -> Callable[[World], World]:
        def begins(world: World) -> World:
            world = world._replace(quiet=world.quiet & ~(1 << v))
            return world.each_fire(v, lambda fire: fire._replace(quiet=False))

        return begins

    def raise_locally(self, label: str, v: int) -> Program:
        """The handler runs at once and on this CPU: later or elsewhere it only sees more."""

        def taken(world: World, agent: int) -> tuple[World, None]:
            if label != "U4" or not world.strict:
                return world, None
            if not world.pended >> v & 1:
                raise ViolationError("twice", f"nothing of {v} is pending but what was delivered")
            return world._replace(pended=world.pended & ~(1 << v)), None

        yield Act(label, f"raise {v} locally: handler runs", taken, soon=True)
        for queue, (agent, vector) in enumerate(self.queues):
            if vector != v:
                continue
            loc = self.used(agent, v)
            domain = tuple(range(self.fires.count((agent, v)) + 1))
            used = yield Load(label, f"handler: read {self.name(loc)}", loc, domain=domain)
            yield self.handled(label, queue, used)

    def handled(self, label: str, queue: int, used: int) -> Act:
        text = f"handler: {used} handled"
        return Act(label, text, lambda w, i: (w.found(queue, used), None), soon=True)

    def write_entry(self, label: str, v: int, name: str) -> Program:
        entry = entry_of(name)

        def begins(world: World) -> World:
            alive = ~(1 << target(entry))
            past, dead = world.past[v] & alive, world.dead[v] & alive
            world = world._replace(past=_set(world.past, v, past), dead=_set(world.dead, v, dead))
            return world.each_fire(v, lambda fire: fire._replace(old=fire.old & alive))

        text = f"write entry {v} := {name}"
        if self.has("entry-write"):
            yield Store(label, text, self.entry(v), entry, then=begins)
        else:
            yield Store(label, f"{text} (address)", self.entry(v), entry, ADDRESS, then=begins)
            yield Store(label, f"{text} (data)", self.entry(v), entry, DATA)

    def enable(self, v: int) -> Program:
        """Hand over storage of one vector, which holds whatever was there before."""

        def enabled(world: World, agent: int) -> tuple[World, None]:
            return world._replace(status=ON, quiet=world.quiet | 1 << v), None

        yield from self.write("E1", MASK, v, 1)
        yield from self.write("E1", PENDING, v, 0)
        yield from self.write("E1", CACHED, v, 0)
        yield Act("E2", "ENABLE := 1", enabled, drained=self.has("E1w"))

    def setup(self, v: int, name: str) -> Program:
        """Write the entry of a vector that is masked and has none; no barrier, unmask has it."""
        yield from self.write_entry("R1", v, name)

    def retarget(self, v: int, name: str, how: str = "") -> Program:
        """Give the old target up on return, or ``keep`` it. ``back``: had it before, R4 applies."""
        yield from self.write_entry("R1", v, name)
        if self.has("R2"):
            yield Fence("R2", FULL, FULL)
        if self.has("R3") and (yield self.read("R3", CACHED, v, ENTRY_BIT)):
            yield from self.doorbell("R3", v)
        if how == "back" and self.has("R4"):
            yield from self.raise_locally("R4", v)
        others = ~(1 << TARGETS.index(name)) & 0xF

        def returns(world: World, agent: int) -> tuple[World, None]:
            world = world._replace(past=_set(world.past, v, others))
            if how != "keep":
                world = world._replace(dead=_set(world.dead, v, others))
            return world, None

        text = f"the old target is {'kept' if how == 'keep' else 'given up'}"
        yield Act("", f"retarget {v} returns: {text}", returns, soon=True)

    def retire(self, v: int) -> Program:
        """Give kept targets up when the fires that are under way now have ended."""

        def begin(world: World, agent: int) -> tuple[World, None]:
            return world._replace(awaited=_set(world.awaited, agent, world.under_way(v))), None

        def end(world: World, agent: int) -> tuple[World, None] | None:
            if world.awaited[agent]:
                return None
            return world._replace(dead=_set(world.dead, v, world.past[v])), None

        yield Act("", f"wait for fires of {v}", begin, soon=True)
        yield Act("", f"fires of {v} have ended: old targets are given up", end)

    def fence(self, v: int) -> Program:
        """A doorbell for its own sake."""
        yield from self.doorbell("fence", v)

    def free(self, v: int) -> Program:
        """The handler of a masked vector goes."""
        yield Act("", f"handler of {v} is freed",
                  lambda w, i: (w._replace(freed=w.freed | 1 << v), None), soon=True)  # fmt: skip

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
        if self.has("C4-wait") and not self.strict:
            yield Act("C4", f"device: fires of {v} under way have ended",
                      lambda w, i: None if w.awaited[i] else (w, None))  # fmt: skip

    def refresh(self, label: str, v: int) -> Program:
        def ring(world: World, agent: int) -> tuple[World, int] | None:
            mask, entry = world.copies[v]
            kept = (mask is not None) + 2 * (entry is not None)
            if not self.has("C4-lock"):
                return world, kept
            locked = self.take("", 1 << v + 8).do(world, agent)
            return locked and (locked[0], kept)

        kept = yield Act(label, f"ring the doorbell of {v}", ring, (0, 1, 2, 3), drained=True)
        yield Fence("", "(the access traps: read barrier)", READ)
        new_mask = new_entry = None
        if self.has("C4") and kept & 1:
            new_mask = yield self.read("C4", MASK, v)
        if self.has("C4") and kept & 2:
            new_entry = yield self.whole_entry("C4", v)

        def answer(world: World, agent: int) -> tuple[World, None]:
            mask, entry = world.copies[v]
            mask = mask if new_mask is None else new_mask
            entry = entry if new_entry is None else new_entry
            copies = _set(world.copies, v, (mask, entry) if world.status == ON else NOBODY)
            awaited = world.awaited
            if not self.strict:
                awaited = _set(awaited, agent, world.under_way(v))
            locks = world.locks
            if self.has("C4-lock"):
                locks &= ~(1 << v + 8)
            return world._replace(copies=copies, locks=locks, awaited=awaited), None

        yield Act("C4", f"device: copy of {v} is refreshed", answer)

    # What a thread of the device does

    def fire(self, v: int, agent: int, number: int) -> Program:
        """The ``number``-th buffer of this thread's queue is used."""
        begun = yield from self.use(v, agent, number)
        if not begun:
            return
        for _round in range(self.rounds):
            if not (yield from self.deliver(v, agent)):
                break
        yield self._ends(v)

    def fire_marked(self, v: int, agent: int, number: int) -> Program:
        """The same by a device whose copies last for one fire, of which a vector has one at a time.

        A doorbell waits for the vector's lock, and has nothing to bring up to date.
        """
        if not self.has("marks"):
            yield from self.fire(v, agent, number)
            return
        begun = yield from self.use(v, agent, number)
        if not begun:
            return
        open_ = True
        if self.has("fire-lock"):
            open_ = yield self.enter(v)
            yield Fence("", "(taking a lock: read barrier)", READ)
        if open_:
            yield from self.deliver_marked(v, agent)
            if self.has("fire-lock"):
                yield self.leave(f"device's lock of {v}", 1 << v + 8)
        yield self._ends(v, drained=True)

    def deliver_marked(self, v: int, agent: int) -> Program:
        if self.has("C1"):
            yield from self.write("C1", CACHED, v, ENTRY_BIT | MASK_BIT)
        if self.has("C2"):
            yield Fence("C2", FULL, FULL)
        masked = yield self.read("C3", MASK, v)
        if self.has("C3r"):
            yield Fence("C3r", READ, READ)
        entry = yield self.whole_entry("C3", v)
        if masked:
            yield from self.write("F2", PENDING, v, 1, self._pends(v, agent))
        else:
            yield Post("F9", f"send {entry_name(entry)}", (v, entry), may_send(v, entry))
        if self.has("C5w"):
            yield Fence("C5w", FULL, FULL)
        yield from self.write("C5", CACHED, v, 0)

    def use(self, v: int, agent: int, number: int) -> Program:
        """F0: a buffer is used, unless VIS is not enabled."""
        begun = yield Act("F0", f"fire {v}: begins", self._begin(v), (False, True))
        if not begun:
            return False
        loc = self.used(agent, v)
        yield Store("F0", f"write {self.name(loc)} := {number}", loc, number)
        if "F0-full" in self.cuts:
            yield Fence("F0", FULL, FULL)
        if self.has("F0r"):
            yield Fence("F0r", f"(the queue's {READ})", READ)
        if self.has("F0w"):
            yield Fence("F0w", f"(the queue's {WRITE})", WRITE)
        return True

    def _ends(self, v: int, drained: bool = False) -> Act:
        def ends(world: World, agent: int) -> tuple[World, None]:
            awaited = tuple(a & ~(1 << agent) for a in world.awaited)
            return world._replace(fires=_set(world.fires, agent, None), awaited=awaited), None

        return Act("", f"fire {v}: ends", ends, soon=True, drained=drained)

    def _pends(self, v: int, agent: int) -> Callable[[World], World]:
        def pends(world: World) -> World:
            fire = world.fires[agent]
            if not world.strict or fire is None:
                return world
            fires = _set(world.fires, agent, fire._replace(pended=True))
            return world._replace(fires=fires, pended=world.pended | 1 << v)

        return pends

    def _begin(self, v: int) -> Callable[[World, int], tuple[World, bool]]:
        def begin(world: World, agent: int) -> tuple[World, bool]:
            if world.status != ON:
                return world, False
            fire = Begun(v, bool(world.quiet >> v & 1), world.past[v])
            return world._replace(fires=_set(world.fires, agent, fire)), True

        return begin

    def deliver(self, v: int, agent: int) -> Program:
        """F1 to F11, once. True: the entry has changed meanwhile."""
        taken = 0
        if (yield from self.see_mask("F1", v)):
            yield from self.write("F2", PENDING, v, 1, self._pends(v, agent))
            if self.has("F3"):
                yield Fence("F3", FULL, FULL)
            if not self.has("F4") or (yield from self.see_mask("F4", v)):
                return False
            if self.has("F6-read") and not (yield self.read("F6", PENDING, v)):
                return False
            taken = 1
            if self.has("F6-clear") and self.has("order-F6"):
                yield from self.write("F6", PENDING, v, 0)
            if self.has("F6w"):
                yield Fence("F6w", WRITE, WRITE)
        if self.has("F7"):
            yield Fence("F7", READ, READ)
        sent = yield from self.see_entry("F8", v)
        yield Post("F9", f"send {entry_name(sent)}", (v, sent), may_send(v, sent))
        if taken and not self.has("order-F6"):
            yield Fence("", WRITE, WRITE)
            yield from self.write("F6", PENDING, v, 0)
        if self.has("F10"):
            yield Fence("F10", FULL, FULL)
        if not self.has("F11"):
            return False
        now = yield from self.see_entry("F11", v)
        return bool(now != sent)

    def see_mask(self, label: str, v: int) -> Program:
        if self.cached:
            copy = yield self.copy_of(label, v, 0, (None, 0, 1))
            if copy is not None:
                return copy
        seen = yield self.read(label, MASK, v)
        return int(seen != 0)

    def see_entry(self, label: str, v: int) -> Program:
        if self.cached:
            copy = yield self.copy_of(label, v, 1, (None, *self.entries))
            if copy is not None:
                return copy
        if self.has("entry-read"):
            return (yield self.whole_entry(label, v))
        text = f"read entry {v}"
        where = self.entry(v)
        address = yield Load(label, f"{text} (address)", where, ADDRESS,
                             tuple(sorted({e & ADDRESS for e in self.entries})))  # fmt: skip
        data = yield Load(label, f"{text} (data)", where, DATA,
                          tuple(sorted({e & DATA for e in self.entries})))  # fmt: skip
        return address | data

    def copy_of(self, label: str, v: int, which: int, domain: tuple[int | None, ...]) -> Act:
        def look(world: World, agent: int) -> tuple[World, int | None]:
            copy, fire = world.copies[v][which], world.fires[agent]
            return world, fire.held[which] if copy is None and fire else copy

        return Act(label, f"look for a copy of {('mask', 'entry')[which]} {v}", look, domain)

    def attach(self, v: int, what: str) -> Program:
        """Begin to keep a copy of the ``entry``, the ``mask``, or ``both``."""
        if self.has("C-lock"):
            open_ = yield self.enter(v)
            if not open_:
                return
            yield Fence("", "(taking a lock: read barrier)", READ)
        bits = {"entry": ENTRY_BIT, "mask": MASK_BIT, "both": ENTRY_BIT | MASK_BIT}[what]
        mask = entry = None
        if self.has("order-C1"):
            yield from self.write("C1", CACHED, v, bits)
            if self.has("C2"):
                yield Fence("C2", FULL, FULL)
        if bits & MASK_BIT:
            mask = yield self.read("C3", MASK, v)
            mask = int(mask != 0)
        if bits & ENTRY_BIT:
            entry = yield self.whole_entry("C3", v)

        def keep(world: World, agent: int) -> tuple[World, None]:
            return world._replace(copies=_set(world.copies, v, (mask, entry))), None

        yield Act("C3", f"keep the copy of {v}", keep)
        if not self.has("order-C1"):
            yield from self.write("C1", CACHED, v, bits)
        if self.has("C-lock"):
            yield self.leave(f"device's lock of {v}", 1 << v + 8)

    def detach(self, v: int) -> Program:
        """Keep no copy any longer."""
        open_ = yield self.enter(v)
        if not open_:
            return

        def stop(world: World, agent: int) -> tuple[World, None]:
            if not self.has("C5-fires"):
                world = world.each_fire(v, lambda fire: fire._replace(held=world.copies[v]))
            return world._replace(copies=_set(world.copies, v, NOBODY)), None

        if self.has("C5"):
            yield Act("C5", f"stop using the copy of {v}", stop)
        yield from self.write("C5", CACHED, v, 0)
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

    def entry(self, v: int) -> int:
        """The location of an entry."""
        return ENTRIES * self.vectors + v

    def used(self, agent: int, v: int) -> int:
        """The location of the used ring of the queue that ``agent`` fires ``v`` for."""
        return USED * self.vectors + self.queues.index((agent, v))

    def byte(self, area: int, v: int) -> tuple[int, int]:
        """Location and lowest bit of a vector's mask, pending or cached byte."""
        if area == self.shared:
            return area * self.vectors, v * (2 if area == CACHED else 1)
        return area * self.vectors + v, 0

    def name(self, loc: int) -> str:
        """What is at a location."""
        area, v = divmod(loc, self.vectors)
        if area >= USED:
            agent, v = self.queues[loc - USED * self.vectors]
            cpus = sum(not self.is_device(n) for n in range(len(self.scripts)))
            return f"used ring of device {agent - cpus} for {v}"
        return f"{AREAS[area]} word" if area == self.shared else f"{AREAS[area]} {v}"

    def read(self, label: str, area: int, v: int, bit: int = 1) -> Load:
        """Not zero if the bit is set."""
        loc, lowest = self.byte(area, v)
        of = f" ({'MASK' if bit == MASK_BIT else 'ENTRY'})" if area == CACHED else ""
        return Load(label, f"read {AREAS[area]} {v}{of}", loc, bit << lowest)

    def write(self, label: str, area: int, v: int, value: int,
              then: Callable[[World], World] | None = None) -> Program:  # fmt: skip
        """Write a byte; or, where vectors share a word, read it, change it and write it back."""
        loc, lowest = self.byte(area, v)
        text = f"write {AREAS[area]} {v} := {value}"
        if area != self.shared:
            yield Store(label, text, loc, value, then=then)
            return
        own = (3 if area == CACHED else 1) << lowest
        words = tuple(range(1 << (2 if area == CACHED else 1) * self.vectors))
        old = yield Load(label, f"read {AREAS[area]} word", loc, domain=words)
        yield Store(label, f"{text}, in a word", loc, old & ~own | value << lowest,
                    own=own, then=then)  # fmt: skip

    def whole_entry(self, label: str, v: int) -> Load:
        return Load(label, f"read entry {v}", self.entry(v), domain=self.entries)

    # The whole

    def start(self, masked: int, entries: str) -> tuple[int, ...]:
        """Memory when VIS has just been enabled."""
        masks = [masked >> v & 1 for v in range(self.vectors)]
        if self.shared == MASK:
            masks[0] = masked
        zeroes = (0,) * self.vectors
        targets = (entry_of(name) for name in entries)
        return (*masks, *zeroes, *zeroes, *targets, *(0 for _ in self.queues))

    def world(self, masked: int, entries: str) -> World:
        """The world beside that memory."""
        agents = len(self.scripts)
        others = tuple(~(1 << TARGETS.index(name)) & 0xF for name in entries)
        return World(
            devices=sum(1 << n for n in range(agents) if self.is_device(n)),
            past=others,
            dead=others,
            copies=(NOBODY,) * self.vectors,
            fires=(None,) * agents,
            awaited=(0,) * agents,
            queues=tuple((self.used(agent, v), v) for agent, v in self.queues),
            seen=(0,) * len(self.queues),
            quiet=masked,
            strict=self.strict,
            status=BEFORE if any("enable" in script for script in self.scripts) else ON,
        )

    def is_device(self, agent: int) -> bool:
        """Whether an agent is a thread of the device."""
        return self.scripts[agent].startswith(("fire", "attach"))

    def finish(self, memory: tuple[int, ...], world: World) -> None:
        """When all is quiet, handlers have found all that was used, or it waits for an unmask."""
        if world.status == OFF:
            return
        found = zip(world.queues, world.seen, strict=True)
        late = {v for (loc, v), seen in found if seen < memory[loc]}
        lost = sorted(late - self.waiting(memory, world))
        if lost:
            raise ViolationError("lost", f"vectors {lost}: fired, not handled, not pending")

    def waiting(self, memory: tuple[int, ...], world: World) -> set[int]:
        """Vectors that are masked and pending."""
        return {v for v in range(self.vectors)
                if self.is_set(memory, MASK, v) and self.is_set(memory, PENDING, v)}  # fmt: skip

    def is_set(self, memory: tuple[int, ...], area: int, v: int) -> int:
        """Bit 0 of a vector's byte (for cached: both bits)."""
        loc, lowest = self.byte(area, v)
        return memory[loc] >> lowest & (3 if area == CACHED else 1)


class Layout2019(Vis):
    """The prototype of 2019, as far as it is known (the proposal has no register map left).

    An entry is written address first and data after it. All mask bits are one word, which is
    written whole, from a shadow that each vector keeps for itself; the write traps, and the
    device acts on the first bit that has changed. It sets pending and does not look again.
    """

    def __init__(self, vectors: int, scripts: Sequence[str] = (), cut: str = "") -> None:
        super().__init__(vectors, scripts, "entry-2019")

    def has(self, step: str) -> bool:
        return step not in ("entry-write", "entry-read", "R2", "R3")

    def world(self, masked: int, entries: str) -> World:
        world = super().world(masked, entries)
        return world._replace(old=(masked, masked, 0, *(masked for _ in range(self.vectors))))

    def waiting(self, memory: tuple[int, ...], world: World) -> set[int]:
        both = world.old[0] & world.old[2]
        return {v for v in range(self.vectors) if both >> v & 1}

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

        words = tuple(range(1 << self.vectors))
        word = yield Act("mask", f"take the shadow of {v}, change it", shadow, words)
        due = yield Act("mask", f"write mask word {word:0{self.vectors}b} (traps)", notice,
                        (None, *range(self.vectors)), drained=True)  # fmt: skip
        if due is not None:
            entry = yield from self.see_entry("pending", due)
            yield Post("pending", f"send {entry_name(entry)}", (due, entry), may_send(due, entry))

    def deliver(self, v: int, agent: int) -> Program:
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
