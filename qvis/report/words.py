# SPDX-License-Identifier: GPL-2.0-or-later
"""What a trace says, in sentences. Under TCG nothing is ever called an exit."""

from __future__ import annotations

from ..trace.model import Cause, Kind
from ..trace.stats import Cost, Stats
from ..trace.store import Trace
from .page import number, share, tcg

__all__ = ["headline", "plural", "touch"]

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
    first, *others = (_sentence(cost, noun) for cost in stats.costs)
    return [first, *others[:4]]


def _sentence(cost: Cost, noun: str) -> str:
    device = cost.device or "an unknown device"
    count = cost.interrupts
    subject = f"{number(count)} {plural('interrupt', count)} of {device}"
    usual = cost.usual_count / count
    if usual < MOST:
        return f"{subject}; one costs on average {_average(cost, noun)}"
    who = "it" if count == 1 else "each"
    if usual < 1:
        who = f"{share(usual)} of them"
    return f"{subject}; {who} cost {_exact(cost, noun)}"


def _exact(cost: Cost, noun: str) -> str:
    own = {cause: n for cause, n in cost.usual.items() if cause is not Cause.EOI}
    total = sum(own.values())
    said = f"{number(total) if total else 'no'} device {plural(noun, total)}"
    if not total:
        said = f"no device {noun}"
    elif own:
        said += f" ({', '.join(f'{n} {cause}' for cause, n in own.items())})"
    ends = cost.usual.get(Cause.EOI, 0)
    if ends:
        return f"{said} and {ends} {plural('EOI', ends)}"
    return f"{said} and 1 EOI without an {noun}" if cost.ended else f"{said} and no EOI"


def _average(cost: Cost, noun: str) -> str:
    own = {cause: mean for cause, mean in cost.touches.items() if cause is not Cause.EOI}
    total = sum(own.values())
    said = f"{number(round(total, 2))} device {plural(noun, total)}"
    if own:
        said += f" ({', '.join(f'{number(round(n, 2))} {cause}' for cause, n in own.items())})"
    ends = cost.touches.get(Cause.EOI, 0.0)
    return f"{said} and {number(round(ends, 2))} {plural('EOI', ends)}"
