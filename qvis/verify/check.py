# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the scenarios and the mutations, and put counter-examples in words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from .memory import MESSAGE, Finding, Load, Rmw, Step, System
from .protocol import (
    ADDRESS,
    DATA,
    ENTRIES,
    ENTRY_CACHED,
    MASK,
    MASK_CACHED,
    PENDING,
    WORDS,
    Layout2019,
    Vis,
    World,
    entry_name,
)
from .scenarios import Mutation, Scenario, scenario

__all__ = ["Outcome", "build", "check", "check_all", "explain"]


@dataclass(frozen=True)
class Outcome:
    """What a search in one scenario found, of the whole protocol or of a mutation of it.

    ``found``: the property that breaks, "" for none, in ``steps`` that ``lines`` describe.
    ``labels``: all steps that were taken in some run, and what became of messages.
    ``waiting``: some run ended with an interrupt that is pending and masked.
    """

    scenario: Scenario
    mutation: Mutation | None
    model: str
    states: int
    found: str
    steps: int
    lines: tuple[str, ...]
    labels: frozenset[str]
    waiting: bool

    @property
    def expected(self) -> str:
        """The property that is to break; "" for none."""
        if self.mutation is None:
            return ""
        return self.mutation.breaks if self.model == "weak" else self.mutation.tso

    @property
    def good(self) -> bool:
        """Whether all is as it should be."""
        return self.found == self.expected


def build(
    where: Scenario, model: str = "weak", mutation: Mutation | None = None, *, reduce: bool = True
) -> System:
    """The scenario as a system to search."""
    layout = Layout2019 if mutation and mutation.layout == "2019" else Vis
    vis = layout(where.vectors, mutation.cut if mutation else "", where.cached)
    scripts = where.cpus + where.devices
    devices = sum(1 << n for n in range(len(where.cpus), len(scripts)))
    unused = () if where.cached else (ENTRY_CACHED, MASK_CACHED)
    return System(
        vis.start(where.masked, where.entries),
        [lambda script=script: vis.script(script) for script in scripts],  # type: ignore[misc]
        vis.world(len(scripts), devices, where.masked, where.entries),
        model=model,
        constant=frozenset(unused),
        finish=vis.finish,
        reduce=reduce,
    )


def check(where: Scenario, model: str = "weak", mutation: Mutation | None = None) -> Outcome:
    """Search all interleavings of one scenario."""
    result = build(where, model, mutation).search()
    finding = result.finding
    return Outcome(
        where,
        mutation,
        model,
        result.states,
        finding.rule if finding else "",
        len(finding.steps) if finding else 0,
        tuple(explain(where, finding)) if finding else (),
        result.labels,
        any(world.owed for _, world in result.ends),
    )


def check_all(
    scenarios: Sequence[Scenario], mutations: Sequence[Mutation], model: str = "weak"
) -> list[Outcome]:
    """All of these, in their order, on all processors."""
    whole = [(where, None) for where in scenarios]
    cut = [(scenario(mutation.scenario), mutation) for mutation in mutations]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(whole) + len(cut) or 1)) as pool:
        jobs = [pool.submit(check, where, model, what) for where, what in [*whole, *cut]]
        return [job.result() for job in jobs]


def explain(where: Scenario, finding: Finding) -> list[str]:
    """The counter-example, one line a step: who, the step's label, what, and memory after it."""
    cpus = [f"cpu {n}" for n in range(len(where.cpus))]
    names = [*cpus, *(f"device {n}" for n in range(len(where.devices)))]
    scripts = (*where.cpus, *where.devices)
    lines = [f"{name:<9} runs: {script}" for name, script in zip(names, scripts, strict=True)]
    rows = [(names[step.agent], *_words(step, where.vectors)) for step in finding.steps]
    width = max((len(text) for _, _, text, _ in rows), default=0)
    for n, (who, label, text, memory) in enumerate(rows, 1):
        lines.append(f"{n:>3} {who:<9} {label:<5} {text:<{width}} | {memory}")
    return [*lines, f"    {finding.rule}: {finding.text}"]


def _words(step: Step, vectors: int) -> tuple[str, str, str]:
    op, result = step.op, step.result
    if op is None:
        label, text = "", _drained(result[0], result[1], vectors)
    else:
        label, text = op.label, op.text
        if isinstance(op, Load | Rmw):
            text += f" -> {_value(op.loc, op.mask, result, vectors)}"
        elif text.startswith("look for"):
            word = MASK if "mask" in text else ENTRIES
            text += f" -> {'none' if result is None else _value(word, 1, result, vectors)}"
        elif result is False:
            text += " -> no"
        if step.early:
            text += " (loaded early)"
    return label, text, _memory(step.memory, step.world, vectors)


def _value(loc: int, mask: int, value: int | None, vectors: int) -> str:
    if value is None:  # the step that breaks a rule returns nothing
        return "?"
    if loc >= ENTRIES:
        half = {ADDRESS: value >> 4, DATA: value}.get(mask)
        return entry_name(value if half is None else half * 0x11)
    return f"{value:0{vectors}b}" if mask == -1 else str(int(value != 0))


def _drained(entry: tuple[int, Any, int, int], word: str, vectors: int) -> str:
    loc, value, mask, _ = entry
    if loc == MESSAGE:
        vector, sent = value
        end = {"handled": ": handler runs", "vanishes": ": nobody there, it vanishes"}
        return f"message of {vector} reaches {entry_name(sent)}{end.get(word, '')}"
    if loc >= ENTRIES:
        part = {ADDRESS: " (address)", DATA: " (data)"}.get(mask, "")
        return f"store reaches memory: entry {loc - ENTRIES} = {entry_name(value)}{part}"
    return f"store reaches memory: {WORDS[loc]} word = {value:0{vectors}b}"


def _memory(memory: tuple[int, ...], world: World, vectors: int) -> str:
    mask, pending = (world.old[0], world.old[2]) if world.old else (memory[MASK], memory[PENDING])
    entries = " ".join(entry_name(entry) for entry in memory[ENTRIES:])
    text = f"mask {mask:0{vectors}b} pending {pending:0{vectors}b} entries {entries}"
    cached = (memory[ENTRY_CACHED], memory[MASK_CACHED])
    if any(cached):
        text += f" cached {cached[0]:0{vectors}b} {cached[1]:0{vectors}b}"
    return text
