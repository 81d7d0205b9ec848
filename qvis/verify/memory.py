# SPDX-License-Identifier: GPL-2.0-or-later
"""A memory that reorders, and an exhaustive search through everything that it lets happen.

An *agent* (a processor, a thread of the device) runs a program: a Python generator that yields
one operation at a time and is sent its result. Between agents anything may interleave. What
one agent does to memory is weakened in two ways:

* A plain store goes to the agent's *store buffer*, and from there to memory at any later time.
* A load may be satisfied early: it returns any value that the location has had since the
  agent's last read or full barrier, but none older than what it has read or written there.

Loads are not delayed beyond later stores: where the protocol has such a pair, a dependency
orders it. There are no atomic read-modify-writes, as the protocol has none.

The model ``tso`` is the x86 one: the store buffer is first in, first out, and loads are never
early.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = [
    "FULL", "MODELS", "READ", "WRITE", "Act", "Fence", "Finding", "Load", "Op", "Post", "Program",
    "Result", "Step", "Store", "System", "ViolationError", "World",
]  # fmt: skip

FULL, READ, WRITE = "full barrier", "read barrier", "write barrier"
ALL = -1
MODELS = ("weak", "tso")
MESSAGE = -1  # the "location" of what a Post leaves in the store buffer


class ViolationError(Exception):
    """A property does not hold. ``rule`` is its short name."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(text)
        self.rule = rule


class World(Protocol):
    """What agents share beside memory, and what the properties need to remember. Immutable."""

    def access(self, agent: int) -> None:
        """``agent`` touches memory. Raises :class:`ViolationError` if it may not."""

    def arrive(self, message: Any, memory: tuple[int, ...]) -> tuple[World, str]:
        """A posted message leaves the store buffer; and a word for what became of it."""


@dataclass(frozen=True)
class Op:
    """One operation. ``label`` is the protocol's name of the step."""

    label: str
    text: str


@dataclass(frozen=True)
class Load(Op):
    """Returns the bits of ``mask``. ``domain``: all that it can return, () for one bit."""

    loc: int
    mask: int = ALL
    domain: tuple[int, ...] = ()


@dataclass(frozen=True)
class Store(Op):
    """Changes the bits of ``mask``; those outside ``own`` are somebody else's."""

    loc: int
    value: int
    mask: int = ALL
    own: int = ALL
    then: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Fence(Op):
    kind: str


@dataclass(frozen=True)
class Act(Op):
    """Something beside memory, at once: ``do(world, agent)`` returns world and result.

    None: it has to wait. ``soon``: it is done in the moment in which it becomes possible, as
    an early one includes all that a late one lets happen. ``drained``: with nothing buffered.
    """

    do: Callable[[Any, int], tuple[Any, Any] | None]
    domain: tuple[Any, ...] = (None,)
    soon: bool = False
    drained: bool = False


@dataclass(frozen=True)
class Post(Op):
    """A message: a store whose arrival the world sees. ``check(world, agent)`` at its issue."""

    message: Hashable
    check: Callable[[Any, int], None]


Program = Generator[Op, Any, Any]
Stale = tuple[tuple[int, tuple[int, ...]], ...]
Buffer = tuple[tuple[int, Any, int, int] | None, ...]  # location, value, mask, own; None: barrier
Agent = tuple[int, Buffer, Stale]
State = tuple[tuple[int, ...], tuple[Agent, ...], Any]
# Agent, operation (None: its store buffer drains), result or what drained, what comes of it.
Move = tuple[int, Op | None, Any, "State | ViolationError"]


@dataclass
class _Node:
    op: Op | None
    edges: dict[Any, int] = field(default_factory=dict)
    live: dict[int, int] = field(default_factory=dict)
    """Bits that may be loaded before the next read barrier: only their past matters."""
    soon: bool = False


def _compile(program: Callable[[], Program], weak: bool, constant: frozenset[int]) -> list[_Node]:
    """Make a program an automaton. A node is a place in the generator and its local variables.

    So a program must keep all that it remembers in local variables that are numbers or strings
    (a ``for`` needs one that differs each time round), and yield only whole values, never in
    the middle of an expression.
    """
    nodes: list[_Node] = []
    numbers: dict[Any, int] = {}
    todo: list[tuple[int, tuple[Any, ...]]] = []

    def visit(history: tuple[Any, ...]) -> int:
        generator = program()
        op: Op | None = next(generator, None)
        try:
            for value in history:
                op = generator.send(value)
        except StopIteration:
            op = None
        key = _place(generator) if op else None
        if key not in numbers:
            numbers[key] = len(nodes)
            soon = isinstance(op, Fence | Post) or (isinstance(op, Act) and op.soon)
            soon = soon or (isinstance(op, Load) and op.loc in constant)
            nodes.append(_Node(op, soon=soon))
            todo.append((numbers[key], history))
        return numbers[key]

    visit(())
    while todo:
        number, history = todo.pop()
        here = nodes[number].op
        for value in _domain(here) if here else ():
            nodes[number].edges[value] = visit((*history, value))
    changed = weak
    while changed:
        changed = False
        for node in nodes:
            live: dict[int, int] = {}
            if node.op and not (isinstance(node.op, Fence) and node.op.kind != WRITE):
                for after in node.edges.values():
                    for loc, mask in nodes[after].live.items():
                        live[loc] = live.get(loc, 0) | mask
                if isinstance(node.op, Load) and node.op.loc not in constant:
                    live[node.op.loc] = live.get(node.op.loc, 0) | node.op.mask
            changed = changed or live != node.live
            node.live = live
    return nodes


def _domain(op: Op) -> tuple[Any, ...]:
    match op:
        case Load(domain=(), mask=mask):
            return (0, mask)
        case Load(domain=domain) | Act(domain=domain):
            return domain
    return (None,)


def _place(generator: Any) -> tuple[Any, ...]:
    chain = []
    while generator is not None:
        frame = generator.gi_frame
        names = tuple(
            (name, value)
            for name, value in sorted(frame.f_locals.items())
            if value is None or isinstance(value, int | str)
        )
        chain.append((frame.f_code.co_name, frame.f_lasti, names))
        generator = generator.gi_yieldfrom
    return tuple(chain)


@dataclass(frozen=True)
class Step:
    """One line of a counter-example, and memory and world after it.

    ``op`` None: something left the store buffer, ``result`` is what, and what became of it.
    ``early``: a load that returned what is no longer in memory.
    """

    agent: int
    op: Op | None
    result: Any
    early: bool
    memory: tuple[int, ...]
    world: Any


@dataclass(frozen=True)
class Finding:
    """A property that does not hold, and a shortest way there."""

    rule: str
    text: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Result:
    """What a search found. ``ends``: every final (memory, world); ``labels``: steps taken."""

    states: int
    finding: Finding | None
    ends: frozenset[tuple[tuple[int, ...], Any]]
    labels: frozenset[str]


class System:
    """Agents that run ``programs`` on ``memory``; ``constant`` locations are never written.

    ``finish(memory, world)`` is called when all have ended, and raises :class:`ViolationError`.
    """

    def __init__(
        self,
        memory: Sequence[int],
        programs: Sequence[Callable[[], Program]],
        world: World,
        *,
        model: str = "weak",
        constant: frozenset[int] = frozenset(),
        finish: Callable[[tuple[int, ...], Any], None] | None = None,
        reduce: bool = True,
    ) -> None:
        self.weak = model == "weak"
        self.finish = finish
        self.nodes = [_compile(program, self.weak, constant) for program in programs]
        if not reduce:
            for node in itertools.chain(*self.nodes):
                node.soon = False
        agents: tuple[Agent, ...] = tuple((0, (), ()) for _ in programs)
        self.start: State = (tuple(memory), agents, world)

    def search(self) -> Result:
        """Visit every state that can be reached, nearest first, until a property breaks."""
        parents: dict[State, State | None] = {self.start: None}
        ends: set[tuple[tuple[int, ...], Any]] = set()
        labels: set[str] = set()
        layer = [self.start]
        while layer:
            after: list[State] = []
            for state in layer:
                moves = 0
                for move in self._moves(state):
                    moves += 1
                    _, op, result, new = move
                    labels.add(op.label if op else result[1])
                    if isinstance(new, ViolationError):
                        path = self._path(parents, state, move)
                        return Result(len(parents), path, frozenset(ends), frozenset(labels))
                    if new not in parents:
                        parents[new] = state
                        after.append(new)
                if not moves:
                    try:
                        self._end(state)
                    except ViolationError as broken:
                        path = self._path(parents, state, (-1, None, None, broken))
                        return Result(len(parents), path, frozenset(ends), frozenset(labels))
                    ends.add((state[0], state[2]))
            layer = after
        return Result(len(parents), None, frozenset(ends), frozenset(labels))

    def _end(self, state: State) -> None:
        memory, agents, world = state
        waiting = [i for i, (at, _, _) in enumerate(agents) if self.nodes[i][at].op]
        if waiting:
            raise ViolationError("deadlock", f"agents {waiting} wait for ever")
        if self.finish:
            self.finish(memory, world)

    def _moves(self, state: State) -> Iterator[Move]:
        """All that can happen next. What is done ``soon`` is done alone.

        That is sound: a barrier done early leaves a longer past to the loads behind it, a
        message is only put in a buffer that nobody else sees, and for an Act its flag says so.
        """
        _, agents, _ = state
        for i, (at, _, _) in enumerate(agents):
            if self.nodes[i][at].soon:
                moves = list(self._run(state, i))
                if moves:
                    yield from moves
                    return
        for i, (_, buffer, _) in enumerate(agents):
            if buffer:
                yield from self._drain(state, i)
            yield from self._run(state, i)

    def _drain(self, state: State, i: int) -> Iterator[Move]:
        memory, agents, world = state
        at, buffer, stale = agents[i]
        before: list[tuple[int, int]] = []
        for n, entry in enumerate(buffer):
            if entry is None or (n and not self.weak):
                return  # a write barrier; or TSO, where only the oldest may leave
            loc, value, mask, _ = entry
            if any(loc == other and mask & bits for other, bits in before):
                continue
            before.append((loc, mask))
            rest = buffer[:n] + buffer[n + 1 :]
            while rest and rest[0] is None:
                rest = rest[1:]
            mine = _put(agents, i, (at, rest, stale))
            try:
                if loc == MESSAGE:
                    told, word = world.arrive(value, memory)
                    yield i, None, (entry, word), (memory, mine, told)
                    continue
                new = _merge(memory[loc], entry)
                world.access(i)
            except ViolationError as broken:
                yield i, None, (entry, ""), broken
                return
            yield i, None, (entry, ""), (*self._write(memory, mine, i, loc, new), world)

    def _run(self, state: State, i: int) -> Iterator[Move]:
        op = self.nodes[i][state[1][i][0]].op
        try:
            yield from self._do(state, i, op)
        except ViolationError as broken:
            yield i, op, None, broken

    def _do(self, state: State, i: int, op: Op | None) -> Iterator[Move]:
        memory, agents, world = state
        _, buffer, stale = agents[i]
        match op:
            case Load(loc=loc, mask=mask):
                world.access(i)
                past = next((olds for where, olds in stale if where == loc), ())
                seen = set()
                for n, old in enumerate((*past, memory[loc])):
                    value = _forward(buffer, loc, old) & mask
                    if value in seen:
                        continue  # the oldest leaves the most open
                    seen.add(value)
                    kept = tuple((w, o) if w != loc else (w, past[n:]) for w, o in stale)
                    yield i, op, value, (memory, self._go(agents, i, value, buffer, kept), world)
            case Store(loc=loc, value=value, mask=mask, own=own, then=then):
                put = (*buffer, (loc, value, mask, own))
                moved = self._go(agents, i, None, put, stale)
                yield i, op, None, (memory, moved, then(world) if then else world)
            case Fence(kind=kind):
                if kind == FULL and buffer:
                    return
                if kind == WRITE and buffer:
                    buffer = (*buffer, None)
                yield i, op, None, (memory, self._go(agents, i, None, buffer, stale), world)
            case Act(do=do, drained=drained):
                done = None if drained and buffer else do(world, i)
                if done:
                    moved = self._go(agents, i, done[1], buffer, stale)
                    yield i, op, done[1], (memory, moved, done[0])
            case Post(message=message, check=check):
                check(world, i)
                put = (*buffer, (MESSAGE, message, ALL, ALL))
                yield i, op, None, (memory, self._go(agents, i, None, put, stale), world)

    def _go(
        self, agents: tuple[Agent, ...], i: int, result: Any, buffer: Buffer, stale: Stale
    ) -> tuple[Agent, ...]:
        """Agent ``i`` takes one step, and forgets the past of what it will not load early.

        (In front of a read barrier that is everything: so a barrier needs no code of its own.)
        """
        nodes = self.nodes[i]
        to = nodes[agents[i][0]].edges[result]
        if stale:
            live = nodes[to].live
            stale = tuple((loc, past) for loc, past in stale if past and live.get(loc))
        return _put(agents, i, (to, buffer, stale))

    def _write(
        self, memory: tuple[int, ...], agents: tuple[Agent, ...], i: int, loc: int, new: int
    ) -> tuple[tuple[int, ...], tuple[Agent, ...]]:
        """Memory changes; the others may still load what was there, the writer may not."""
        old = memory[loc]
        changed = []
        for j, (at, buffer, stale) in enumerate(agents):
            past = next((olds for where, olds in stale if where == loc), ())
            mask = 0 if j == i else self.nodes[j][at].live.get(loc, 0)
            values: list[int] = []
            if mask:
                for value in (*(v & mask for v in past), old & mask):
                    if not values or values[-1] != value:
                        values.append(value)
                if values[-1] == new & mask:
                    values.pop()
            rest = [(w, o) for w, o in stale if w != loc]
            if values:
                rest = sorted([*rest, (loc, tuple(values))])
            changed.append((at, buffer, tuple(rest)))
        return _put(memory, loc, new), tuple(changed)

    def _path(self, parents: dict[State, State | None], state: State, last: Move) -> Finding:
        moves = [last]
        states = [state]
        while (parent := parents[states[-1]]) is not None:
            moves.append(next(m for m in self._moves(parent) if m[3] == states[-1]))
            states.append(parent)
        steps = []
        for before, (i, op, result, after) in zip(reversed(states), reversed(moves), strict=True):
            if i >= 0:
                memory, _, world = before if isinstance(after, ViolationError) else after
                early = (
                    isinstance(op, Load)
                    and result is not None
                    and self._early(before, i, op, result)
                )
                steps.append(Step(i, op, result, early, memory, world))
        broken = last[3]
        assert isinstance(broken, ViolationError)
        return Finding(broken.rule, str(broken), tuple(steps))

    def _early(self, before: State, i: int, op: Load, result: int) -> bool:
        memory, agents, _ = before
        return _forward(agents[i][1], op.loc, memory[op.loc]) & op.mask != result


def _put(values: tuple[Any, ...], n: int, value: Any) -> tuple[Any, ...]:
    return (*values[:n], value, *values[n + 1 :])


def _merge(old: int, entry: tuple[int, Any, int, int]) -> int:
    """What a store makes of ``old``. Others may have changed bits since the writer read them."""
    _, value, mask, own = entry
    new = (old & ~mask) | (int(value) & mask)
    if (new ^ old) & ~own:
        raise ViolationError("clobbered", "a store undoes what another vector's has written")
    return new


def _forward(buffer: Buffer, loc: int, value: int) -> int:
    """What an agent sees of ``loc``: its own stores, also those still in its buffer."""
    for entry in buffer:
        if entry and entry[0] == loc:
            value = (value & ~entry[2]) | (entry[1] & entry[2])
    return value
