# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the scenarios and the mutations, and put counter-examples in words."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from .memory import MESSAGE, Finding, Load, Step, System
from .protocol import ADDRESS, CACHED, DATA, ENTRIES, MASK, PENDING, Layout2019, Vis, entry_name
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
    vis = _layout(where, mutation)
    agents = range(len(vis.scripts))
    unused = range(CACHED * vis.vectors, 0 if vis.cached else ENTRIES * vis.vectors)
    return System(
        vis.start(where.masked, where.entries),
        [lambda agent=agent: vis.script(agent) for agent in agents],  # type: ignore[misc]
        vis.world(where.masked, where.entries),
        model=model,
        constant=frozenset(unused),
        finish=vis.finish,
        reduce=reduce,
    )


def _layout(where: Scenario, mutation: Mutation | None) -> Vis:
    layout = Layout2019 if mutation and mutation.layout == "2019" else Vis
    return layout(where.vectors, where.cpus + where.devices, mutation.cut if mutation else "")


def check(where: Scenario, model: str = "weak", mutation: Mutation | None = None) -> Outcome:
    """Search all interleavings of one scenario."""
    vis = _layout(where, mutation)
    result = build(where, model, mutation).search()
    finding = result.finding
    return Outcome(
        where,
        mutation,
        model,
        result.states,
        finding.rule if finding else "",
        len(finding.steps) if finding else 0,
        tuple(explain(where, vis, finding)) if finding else (),
        result.labels,
        any(
            seen < memory[loc]
            for memory, world in result.ends
            for (loc, _), seen in zip(world.queues, world.seen, strict=True)
        ),
    )


def check_all(
    scenarios: Sequence[Scenario], mutations: Sequence[Mutation], model: str = "weak"
) -> list[Outcome]:
    """All of these, in their order, on all processors."""
    whole = [(where, None) for where in scenarios]
    cut = [(scenario(mutation.scenario), mutation) for mutation in mutations]
    count = min(os.cpu_count() or 1, len(whole) + len(cut) or 1)
    # Millions of states, none of them garbage before the end of their search.
    with ProcessPoolExecutor(count, initializer=gc.disable) as pool:
        jobs = [pool.submit(check, where, model, what) for where, what in [*whole, *cut]]
        return [job.result() for job in jobs]


def explain(where: Scenario, vis: Vis, finding: Finding) -> list[str]:
    """The counter-example, one line a step: who, the step's label, what, and memory after it."""
    cpus = [f"cpu {n}" for n in range(len(where.cpus))]
    names = [*cpus, *(f"device {n}" for n in range(len(where.devices)))]
    lines = [f"{name:<9} runs: {script}" for name, script in zip(names, vis.scripts, strict=True)]
    rows = [(names[step.agent], *_words(step, vis)) for step in finding.steps]
    width = max((len(text) for _, _, text, _ in rows), default=0)
    for n, (who, label, text, memory) in enumerate(rows, 1):
        lines.append(f"{n:>3} {who:<9} {label:<5} {text:<{width}} | {memory}")
    return [*lines, f"    {finding.rule}: {finding.text}"]


def _words(step: Step, vis: Vis) -> tuple[str, str, str]:
    op, result = step.op, step.result
    if op is None:
        label, text = "", _drained(result[0], result[1], vis)
    else:
        label, text = op.label, op.text
        if isinstance(op, Load):
            text += f" -> {_value(op.loc, op.mask, result, vis)}"
        elif text.startswith("look for"):
            entry = "entry" in text
            text += f" -> {entry_name(result) if entry and result is not None else result}"
        elif result is False:
            text += " -> no"
        if step.early:
            text += " (loaded early)"
    return label, text, _memory(step.memory, vis)


def _value(loc: int, mask: int, value: int | None, vis: Vis) -> str:
    if value is None:  # the step that breaks a rule returns nothing
        return "?"
    area, _ = divmod(loc, vis.vectors)
    if area == ENTRIES:
        half = {ADDRESS: value >> 4, DATA: value}.get(mask)
        return entry_name(value if half is None else half * 0x11)
    return str(value if mask == -1 else int(value != 0))


def _drained(entry: tuple[int, Any, int, int], word: str, vis: Vis) -> str:
    loc, value, mask, _ = entry
    if loc == MESSAGE:
        vector, sent = value
        end = {"handled": ": handler runs", "vanishes": ": nobody there, it vanishes"}
        return f"message of {vector} reaches {entry_name(sent)}{end.get(word, '')}"
    if loc // vis.vectors == ENTRIES:
        part = {ADDRESS: " (address)", DATA: " (data)"}.get(mask, "")
        return f"store reaches memory: {vis.name(loc)} = {entry_name(value)}{part}"
    return f"store reaches memory: {vis.name(loc)} = {value}"


def _memory(memory: tuple[int, ...], vis: Vis) -> str:
    areas = {"mask": MASK, "pending": PENDING, "cached": CACHED}
    words = []
    for name, area in areas.items():
        if area != CACHED or vis.cached:
            values = (str(vis.is_set(memory, area, v)) for v in range(vis.vectors))
            words.append(f"{name} {' '.join(values)}")
    first, last = ENTRIES * vis.vectors, (ENTRIES + 1) * vis.vectors
    words.append("entry " + " ".join(entry_name(entry) for entry in memory[first:last]))
    if vis.queues:
        words.append("used " + " ".join(str(used) for used in memory[last:]))
    return "  ".join(words)
