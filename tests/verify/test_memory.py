# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory model does what its page says: the classic litmus tests, allowed and forbidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from qvis.verify.memory import (
    FULL,
    READ,
    WRITE,
    Act,
    Fence,
    Load,
    Post,
    Program,
    Store,
    System,
)

X, Y = 0, 1
BITS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Notes:
    """A world in which agents write down what they loaded."""

    seen: tuple[tuple[str, int], ...] = ()
    arrived: tuple[str, ...] = ()

    def access(self, agent: int) -> None:
        pass

    def arrive(self, message: Any, memory: tuple[int, ...]) -> tuple[Notes, str]:
        return replace(self, arrived=(*self.arrived, message)), "arrived"


def note(name: str, value: int) -> Act:
    def do(world: Notes, agent: int) -> tuple[Notes, None]:
        return replace(world, seen=tuple(sorted((*world.seen, (name, value))))), None

    return Act("", "note", do)


def load(loc: int) -> Load:
    return Load("", "load", loc, domain=BITS)


def store(loc: int, value: int = 1) -> Store:
    return Store("", "store", loc, value)


def fence(kind: str) -> Program:
    if kind:
        yield Fence("", kind, kind)


def outcomes(*programs: Callable[[], Program], model: str = "weak") -> set[tuple[int, ...]]:
    """What the loads returned in each run, in the order of their names."""
    result = System((0, 0), programs, Notes(), model=model).search()
    assert result.finding is None
    return {tuple(value for _, value in world.seen) for _, world in result.ends}


def dekker(own: int, other: int, name: str, kind: str) -> Callable[[], Program]:
    def program() -> Program:
        yield store(own)
        yield from fence(kind)
        seen = yield load(other)
        yield note(name, seen)

    return program


@pytest.mark.parametrize("model", ["weak", "tso"])
def test_store_buffering_is_seen_without_a_full_barrier_and_never_with_one(model: str) -> None:
    for kind in ("", WRITE, READ):
        both = outcomes(dekker(X, Y, "a", kind), dekker(Y, X, "b", kind), model=model)
        assert both == {(0, 0), (0, 1), (1, 0), (1, 1)}
    fenced = outcomes(dekker(X, Y, "a", FULL), dekker(Y, X, "b", FULL), model=model)
    assert fenced == {(0, 1), (1, 0), (1, 1)}


def sender(kind: str) -> Callable[[], Program]:
    def program() -> Program:
        yield store(X)
        yield from fence(kind)
        yield store(Y)

    return program


def receiver(kind: str) -> Callable[[], Program]:
    def program() -> Program:
        flag = yield load(Y)
        yield from fence(kind)
        data = yield load(X)
        yield note("a", flag)
        yield note("b", data)

    return program


@pytest.mark.parametrize(
    ("write", "read", "stale"),
    [("", "", True), (WRITE, "", True), ("", READ, True), (WRITE, READ, False),
     (FULL, READ, False), (WRITE, FULL, False), (FULL, "", True), (WRITE, WRITE, True)],
)  # fmt: skip
def test_message_passing_needs_a_barrier_on_both_sides(write: str, read: str, stale: bool) -> None:
    assert ((1, 0) in outcomes(sender(write), receiver(read))) is stale
    assert (1, 1) in outcomes(sender(write), receiver(read))


def test_message_passing_needs_none_on_tso() -> None:
    assert (1, 0) not in outcomes(sender(""), receiver(""), model="tso")


def test_one_location_never_goes_back() -> None:
    def writer() -> Program:
        yield store(X, 1)
        yield store(X, 2)

    def reader() -> Program:
        first = yield load(X)
        second = yield load(X)
        yield note("a", first)
        yield note("b", second)

    seen = outcomes(writer, reader)
    assert seen == {(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)}


def test_an_agent_sees_its_own_stores_at_once() -> None:
    def program() -> Program:
        yield store(X, 2)
        seen = yield load(X)
        yield note("a", seen)

    assert outcomes(program) == {(2,)}


def set_bit(loc: int, bit: int) -> Callable[[], Program]:
    """A plain load, and a plain store of the whole word."""

    def program() -> Program:
        old = yield load(loc)
        yield store(loc, old | bit)

    return program


def test_plain_stores_undo_each_other_in_one_word_and_not_in_two() -> None:
    one = System((0, 0), (set_bit(X, 1), set_bit(X, 2)), Notes()).search()
    assert {memory[X] for memory, _ in one.ends} == {1, 2, 3}
    two = System((0, 0), (set_bit(X, 1), set_bit(Y, 1)), Notes()).search()
    assert {memory for memory, _ in two.ends} == {(1, 1)}


def test_a_store_that_undoes_what_another_wrote_is_found_where_it_says_what_is_its_own() -> None:
    def program(bit: int) -> Callable[[], Program]:
        def run() -> Program:
            old = yield load(X)
            yield Store("", "store", X, old | bit, own=bit)

        return run

    finding = System((0, 0), (program(1), program(2)), Notes()).search().finding
    assert finding is not None
    assert finding.rule == "clobbered"


def test_stores_to_two_places_arrive_in_any_order_but_behind_a_write_barrier() -> None:
    def watcher() -> Program:
        second = yield load(Y)
        yield from fence(READ)
        first = yield load(X)
        yield note("a", second)
        yield note("b", first)

    assert (1, 0) in outcomes(sender(""), watcher)
    assert (1, 0) not in outcomes(sender(WRITE), watcher)


def test_a_control_dependency_does_not_order_loads() -> None:
    def reader() -> Program:
        if (yield load(Y)):
            data = yield load(X)
            yield note("a", data)

    assert (0,) in outcomes(sender(WRITE), reader)


def test_a_message_is_only_ordered_by_a_full_barrier() -> None:
    def program(kind: str) -> Callable[[], Program]:
        def run() -> Program:
            yield Post("", "send", "m", lambda world, agent: None)
            yield from fence(kind)
            yield Act("", "look", lambda w, i: (replace(w, seen=(("n", len(w.arrived)),)), None))

        return run

    assert outcomes(program("")) == {(0,), (1,)}
    assert outcomes(program(READ)) == {(0,), (1,)}
    assert outcomes(program(FULL)) == {(1,)}


def test_who_waits_for_ever_is_a_deadlock() -> None:
    def waiter() -> Program:
        yield Act("", "wait", lambda world, agent: None)

    finding = System((0, 0), (waiter,), Notes()).search().finding
    assert finding is not None
    assert finding.rule == "deadlock"
