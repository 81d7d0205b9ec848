# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis verify``"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ._output import print_json, print_table

if TYPE_CHECKING:
    from ..verify.check import Outcome

NOTES = """\
Runs bounded programs of driver and device through all their interleavings on a memory that
reorders: the whole protocol must pass, and each mutation of it must fail. Exit status 1 if one
of them does not do as it should. docs/verify.md tells what is checked and what is not."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = NOTES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="scenarios or mutations (default: all)")  # fmt: skip
    parser.add_argument("--model", default="weak", help="weak or tso (default: %(default)s)")
    parser.add_argument("--show", metavar="NAME", help="the counter-example of a mutation")
    parser.add_argument("--list", action="store_true", help="what there is, without a run")
    parser.add_argument("--json", action="store_true", help="print it in JSON")


def run(args: argparse.Namespace) -> int:
    from ..verify.check import check, check_all
    from ..verify.memory import MODELS
    from ..verify.scenarios import MUTATIONS, SCENARIOS, scenario

    if args.model not in MODELS:
        raise UsageError(f"unknown model {args.model!r}: choose one of {', '.join(MODELS)}")
    mutations = {mutation.name: mutation for mutation in MUTATIONS}
    known = [*(s.name for s in SCENARIOS), *mutations]
    for name in args.names:
        if name not in known:
            raise UsageError(f"unknown scenario or mutation {name!r} (see `qvis verify --list`)")
    scenarios = [s for s in SCENARIOS if not args.names or s.name in args.names]
    chosen = [m for m in MUTATIONS if not args.names or m.name in args.names]
    if args.show:
        if args.show not in mutations:
            raise UsageError(f"unknown mutation {args.show!r} (see `qvis verify --list`)")
        mutation = mutations[args.show]
        outcome = check(scenario(mutation.scenario), args.model, mutation)
        if args.json:
            print_json({**_row(outcome), "lines": outcome.lines})
            return 0 if outcome.good else 1
        print(f"{mutation.name}, without: {mutation.without}; scenario: {mutation.scenario}")
        print("\n".join(outcome.lines or ["nothing breaks"]))
        return 0 if outcome.good else 1
    if args.list:
        _list(scenarios, chosen, args.json)
        return 0
    outcomes = check_all(scenarios, chosen, args.model)
    good = all(outcome.good for outcome in outcomes)
    if args.json:
        print_json({"model": args.model, "good": good, "outcomes": [_row(o) for o in outcomes]})
        return 0 if good else 1
    _tables(outcomes)
    wrong = [_row(o)["name"] for o in outcomes if not o.good]
    if wrong:
        print("\nNOT as it should be: " + ", ".join(wrong))
        for outcome in outcomes:
            if not outcome.good and outcome.mutation is None:
                print("\n".join(["", *outcome.lines]))
    else:
        print("\nall is as it should be")
    return 0 if good else 1


def _row(outcome: Outcome) -> dict[str, Any]:
    mutation = outcome.mutation
    return {
        "name": mutation.name if mutation else outcome.scenario.name,
        "kind": "mutation" if mutation else "scenario",
        "scenario": outcome.scenario.name,
        "without": mutation.without if mutation else None,
        "states": outcome.states,
        "breaks": outcome.found,
        "expected": outcome.expected,
        "steps": outcome.steps if outcome.found else None,
        "good": outcome.good,
    }


def _list(scenarios: Any, mutations: Any, as_json: bool) -> None:
    if as_json:
        print_json({
            "scenarios": [{"name": s.name, "cpus": s.cpus, "devices": s.devices}
                          for s in scenarios],
            "mutations": [{"name": m.name, "without": m.without, "scenario": m.scenario,
                           "breaks": m.breaks, "tso": m.tso} for m in mutations],
        })  # fmt: skip
        return
    print_table(
        ["scenario", "CPUs", "device"],
        [[s.name, " | ".join(s.cpus), " | ".join(s.devices)] for s in scenarios],
    )
    print()
    print_table(
        ["mutation", "without", "in scenario", "breaks", "on x86"],
        [[m.name, m.without, m.scenario, m.breaks or "-", m.tso or "-"] for m in mutations],
    )


def _tables(outcomes: list[Outcome]) -> None:
    whole = [o for o in outcomes if o.mutation is None]
    cut = [o for o in outcomes if o.mutation is not None]
    if whole:
        print_table(
            ["scenario", "states", "result"],
            [[o.scenario.name, str(o.states), "passes" if o.good else f"BREAKS: {o.found}"]
             for o in whole],
        )  # fmt: skip
    if whole and cut:
        print()
    if cut:
        print_table(
            ["mutation", "without", "breaks", "steps", "result"],
            [[o.mutation.name, o.mutation.without, o.found or "nothing",
              str(o.steps) if o.found else "-",
              _verdict(o)] for o in cut if o.mutation],
        )  # fmt: skip


def _verdict(outcome: Outcome) -> str:
    if outcome.good:
        return "caught" if outcome.expected else "not needed"
    return f"WRONG: expected {outcome.expected or 'nothing'}"
