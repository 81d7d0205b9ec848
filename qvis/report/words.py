# SPDX-License-Identifier: GPL-2.0-or-later
"""What a trace says, in sentences. Under TCG nothing is ever called an exit."""

from __future__ import annotations

from ..trace.model import Cause, Kind
from ..trace.stats import Cost, Stats
from ..trace.store import Trace
from .page import number, tcg

__all__ = ["headline", "plural", "touch"]

LISTED = 5  # devices that have a sentence
MOST = 0.95  # share of interrupts that makes a cost the usual one


def plural(noun: str, count: float) -> str:
    """ "1 access", "2 accesses"; the number is not part of it."""
    if count == 1:
        return noun
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def touch(stats: Stats, trace: Trace) -> str:
    """What touching a register is called here: an exit, or an access."""
    hardware = Kind.EXIT in stats.kinds and not tcg(trace.manifest.provenance)
    return "exit" if hardware else "access"


def headline(stats: Stats, trace: Trace) -> list[str]:
    """What was found: a sentence to stand above all, and some to stand under it."""
    if not stats.events:
        return ["Nothing was recorded", "The trace has no events"]
    if not stats.costs:
        delivered = sum(d.count for d in stats.delivered)
        if delivered:
            said = f"{number(delivered)} {plural('interrupt', delivered)}, none of a known device"
        else:
            said = f"No interrupts in {number(stats.events)} {plural('event', stats.events)}"
        return [said]
    noun = touch(stats, trace)
    named = [_sentence(cost, noun) for cost in stats.costs if cost.device][:LISTED]
    unknown = [cost for cost in stats.costs if cost.device is None]
    if unknown and named:
        count = unknown[0].interrupts
        named.append(f"{number(count)} other {plural('interrupt', count)}, of no known device")
    return named or [_sentence(cost, noun) for cost in unknown]


def _sentence(cost: Cost, noun: str) -> str:
    device = cost.device or "unknown devices"
    count = cost.interrupts
    subject = f"{number(count)} {plural('interrupt', count)} of {device}"
    rare = count - cost.usual_count
    if cost.usual_count < MOST * count:
        return f"{subject}; one costs on average {_average(cost, noun)}"
    who = "it" if count == 1 else f"all but {number(rare)}" if rare else "each"
    return f"{subject}; {who} cost {_exact(cost, noun)}"


def _exact(cost: Cost, noun: str) -> str:
    own = {cause: n for cause, n in cost.usual.items() if cause is not Cause.EOI}
    total = sum(own.values())
    said = f"no device {noun}"
    if total:
        parts = ", ".join(f"{n} {cause}" for cause, n in own.items())
        said = f"{total} device {plural(noun, total)} ({parts})"
    ends = cost.usual.get(Cause.EOI, 0)
    if ends > 1:
        return f"{said} and {ends} {plural(noun, ends)} for its EOI"
    if ends:
        return f"{said} and 1 EOI"
    return f"{said} and 1 EOI without an {noun}" if cost.ended else f"{said} and no EOI"


def _average(cost: Cost, noun: str) -> str:
    own = {cause: mean for cause, mean in cost.touches.items() if cause is not Cause.EOI}
    total = round(sum(own.values()), 6)
    said = f"{number(total)} device {plural(noun, total)}"
    if own:
        said += f" ({', '.join(f'{number(n)} {cause}' for cause, n in own.items())})"
    ends = cost.touches.get(Cause.EOI, 0.0)
    return f"{said} and {number(ends)} {plural(noun, ends)} for its EOI"
