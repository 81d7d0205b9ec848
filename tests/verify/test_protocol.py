# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole protocol passes, each mutation is caught, and no property passes for want of a run."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from qvis.cli import main
from qvis.verify.check import build, check
from qvis.verify.memory import Act, ViolationError
from qvis.verify.protocol import OFF, Begun, Vis, World, entry_of, may_send
from qvis.verify.scenarios import MUTATIONS, SCENARIOS, Mutation, scenario

FAST = ("unmask", "retarget once", "mask, unmask", "set up", "enable", "fence, then free",
        "one vector, two CPUs", "three vectors, two CPUs", "there and back, fence for R4",
        "there and back, targets kept", "mask copy, unmask", "both copies, reset",
        "marked: unmask", "marked: set up", "marked: mask, unmask", "marked: mask, unmask twice",
        "marked: there and back", "marked: two vectors, two CPUs",
        "marked: two vectors, two threads", "marked: reset")  # fmt: skip
WIDE = ("mask, unmask", "retarget once", "enable", "there and back", "mask copy, unmask",
        "both copies, reset", "marked: mask, unmask")  # fmt: skip
SMALL = ("unmask", "retarget once", "unmask, two fires", "mask copy, unmask", "marked: unmask",
         "marked: mask, unmask")  # fmt: skip


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("model", ["weak", "tso"])
def test_the_whole_protocol_passes(name: str, model: str) -> None:
    outcome = check(scenario(name), model)
    assert outcome.good, outcome.lines


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_each_mutation_breaks_what_the_table_says(mutation: Mutation) -> None:
    outcome = check(scenario(mutation.scenario), "weak", mutation)
    assert outcome.found == mutation.breaks
    assert len(outcome.lines) > outcome.steps or not mutation.breaks


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_each_mutation_does_on_x86_what_the_table_says(mutation: Mutation) -> None:
    assert check(scenario(mutation.scenario), "tso", mutation).found == mutation.tso


def test_all_steps_are_taken_somewhere_and_messages_do_get_lost() -> None:
    labels: set[str] = set()
    for name in WIDE:
        labels |= check(scenario(name)).labels
    steps = {
        "M1",
        "M2",
        "M3",
        "E1",
        "E2",
        "U0",
        "U1",
        "U2",
        "U3",
        "U3b",
        "U4",
        "U4w",
        "R1",
        "R2",
        "R3",
        "R4",
    }
    steps |= {
        "F0",
        "F0r",
        "F0w",
        "F1",
        "F2",
        "F3",
        "F4",
        "F6",
        "F6w",
        "F7",
        "F8",
        "F9",
        "F10",
        "F11",
    }
    steps |= {"C1", "C2", "C3", "C3r", "C4", "C5", "C5w", "D1", "D2", "D3"}
    assert steps <= labels
    assert {"handled", "vanishes"} <= labels


def test_some_run_ends_with_an_interrupt_that_waits_for_its_unmask() -> None:
    assert check(scenario("mask copy, masked at first")).waiting
    assert not check(scenario("unmask")).waiting


@pytest.mark.parametrize("name", SMALL)
def test_what_is_done_soon_hides_nothing(name: str) -> None:
    """With every step free to wait the search is longer, and finds the same."""
    where = scenario(name)
    cuts = [None, *(m for m in MUTATIONS if m.scenario == name)]
    for mutation in cuts:
        short = build(where, mutation=mutation).search()
        long = build(where, mutation=mutation, reduce=False).search()
        assert (short.finding is None) == (long.finding is None), mutation
        assert mutation is not None or long.states > short.states


MARKED = Vis(1, ("mask 0", "fire_marked 0"))
VIS = Vis(1, ("unmask 0", "fire 0"))


def memory(mask: int = 0, pending: int = 0, used: int = 0) -> tuple[int, ...]:
    return (mask, pending, 0, entry_of("A"), used)


def world() -> World:
    return VIS.world(0, "A")


def strict() -> World:
    return MARKED.world(0, "A")


def raised(world: World) -> object:
    act = next(MARKED.raise_locally("U4", 0))
    assert isinstance(act, Act)
    return act.do(world, 0)


def fired(quiet: bool = False, old: int = 0) -> World:
    return world()._replace(fires=(None, Begun(0, quiet, old)))


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        ("lost", lambda: VIS.finish(memory(used=1), world())),
        ("lost", lambda: VIS.finish(memory(mask=1, used=1), world())),
        ("lost", lambda: VIS.finish(memory(pending=1, used=1), world())),
        ("torn", lambda: may_send(0, 0x12)(fired(), 1)),
        ("torn", lambda: may_send(0, 0)(fired(), 1)),
        ("masked", lambda: may_send(0, entry_of("A"))(fired(quiet=True), 1)),
        ("old target", lambda: may_send(0, entry_of("A"))(fired(old=0b10), 1)),
        ("reset", lambda: world()._replace(status=OFF).access(1)),
        ("reset", lambda: world()._replace(status=OFF).arrive((0, 0x11), memory())),
        ("late", lambda: strict()._replace(quiet=1).arrive((0, 0x11), memory())),
        ("late", lambda: strict().arrive((0, entry_of("B")), memory())),
        ("late", lambda: may_send(0, entry_of("B"))(strict(), 1)),
        ("twice", lambda: raised(strict())),
        (
            "twice",
            lambda: may_send(0, 0x11)(
                strict()._replace(fires=(None, Begun(0, False, 0, pended=True))), 1
            ),
        ),
        ("fence", lambda: world()._replace(freed=1).arrive((0, 0x11), memory())),
    ],
)
def test_each_property_sees_a_bad_state(rule: str, bad: Callable[[], object]) -> None:
    with pytest.raises(ViolationError) as caught:
        bad()
    assert caught.value.rule == rule


def test_a_good_state_breaks_nothing() -> None:
    VIS.finish(memory(mask=1, pending=1, used=1), world())
    VIS.finish(memory(used=1), world()._replace(status=OFF))
    may_send(0, entry_of("A"))(fired(old=0b100), 1)
    world().access(1)
    world()._replace(status=OFF).access(0)


def test_a_message_in_time_and_one_raise_for_one_pending_are_good() -> None:
    strict().arrive((0, entry_of("A")), memory())
    assert raised(strict()._replace(pended=1)) == (strict(), None)
    world()._replace(quiet=1).arrive((0, entry_of("A")), memory())
    raised(world())


def test_a_handler_finds_what_is_used_when_its_message_arrives_where_somebody_listens() -> None:
    heard, word = world().arrive((0, entry_of("A")), memory(used=1))
    assert (heard.seen, word) == ((1,), "handled")
    VIS.finish(memory(used=1), heard)
    early, _ = world().arrive((0, entry_of("A")), memory(used=0))
    with pytest.raises(ViolationError):
        VIS.finish(memory(used=1), early)
    assert world().arrive((0, entry_of("B")), memory(used=1)) == (world(), "vanishes")


def test_a_counter_example_names_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--show", "F11"]) == 0
    out = capsys.readouterr().out
    assert "F9    send A" in out
    assert "it vanishes" in out
    assert "lost: vectors [0]" in out


def test_json_and_exit_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["verify", "--json", "unmask", "U4"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["good"] is True
    assert [(o["name"], o["breaks"]) for o in answer["outcomes"]] == [
        ("unmask", ""),
        ("U4", "lost"),
    ]
    wrong = Mutation("U4", "nothing", "unmask", "lost", "lost", cut="no such step")
    monkeypatch.setattr("qvis.verify.scenarios.MUTATIONS", (wrong,))
    assert main(["verify", "U4"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--model", "sc"], ["no such name"], ["--show", "unmask"], ["--show", "X9"]]
)
def test_bad_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *words]) == 2
    assert "qvis:" in capsys.readouterr().err


def test_the_list_has_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--list", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["scenarios"]) == len(SCENARIOS)
    assert len(answer["mutations"]) == len(MUTATIONS)
    assert len({s.name for s in SCENARIOS} | {m.name for m in MUTATIONS}) == len(SCENARIOS) + len(
        MUTATIONS
    )
