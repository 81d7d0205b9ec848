# SPDX-License-Identifier: GPL-2.0-or-later
"""``scripts/fuzz``: see README.md beside this file."""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qvis.build import build_fuzz
from qvis.cli import report
from qvis.errors import QvisError
from qvis.progress import step

from .runner import TARGETS, Fuzzer, Outcome, Target, minimize

INPUTS = 1_000_000


def main() -> int:
    """Parse, run, print; the exit status is that of the first error, as qvis has it."""
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description="Fuzz our QEMU's virtio-mmio."
    )
    parser.add_argument("--runs", type=int, default=INPUTS, metavar="N",
                        help="inputs, over all targets (default: %(default)s)")  # fmt: skip
    parser.add_argument("--target", action="append", choices=[target.name for target in TARGETS],
                        metavar="NAME", help="only this one (can be repeated)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="targets at the same time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0,
                        help="of the mutations (default: another each time)")  # fmt: skip
    parser.add_argument("--replay", nargs="+", type=Path, metavar="FILE",
                        help="execute these inputs, in --target")  # fmt: skip
    parser.add_argument("--minimize", action="store_true",
                        help="then write the smallest corpus that does as much")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the targets")
    args = parser.parse_args()
    if args.list:
        for target in TARGETS:
            print(f"{target.name:40} {target.language:8} {target.share:3} %")
        return 0
    if args.replay and len(args.target or ()) != 1:
        parser.error("--replay needs one --target")
    targets = [t for t in TARGETS if not args.target or t.name in args.target]
    try:
        fuzz(Fuzzer(build_fuzz()), targets, args)
    except QvisError as problem:
        report(problem)
        return problem.exit_code
    return 0


def fuzz(fuzzer: Fuzzer, targets: list[Target], args: argparse.Namespace) -> None:
    """What the arguments ask for."""
    if args.replay:
        fuzzer.replay(targets[0], [path.absolute() for path in args.replay])
        return
    shares = sum(target.share for target in targets)
    done: dict[str, int] = {}
    total = 0
    with (
        step(f"fuzz {len(targets)} targets", fuzzer.folder) as progress,
        ThreadPoolExecutor(args.jobs) as pool,
    ):

        def run(target: Target) -> Outcome:
            def follow(inputs: int) -> None:
                done[target.name] = inputs
                progress.update(sum(done.values()), args.runs)

            inputs = -(-args.runs * target.share // shares)
            return fuzzer.run(target, inputs, seed=args.seed, on_progress=follow)

        try:
            for one in pool.map(run, targets):
                total += one.inputs
                print(f"{one.target}: {one.inputs:,} inputs in {one.seconds:.0f} s "
                      f"({one.inputs / one.seconds:.0f}/s), {one.edges} edges, "
                      f"{len(one.functions)} functions of virtio-mmio", flush=True)  # fmt: skip
        except KeyboardInterrupt:
            # The pool would wait for its fuzzers to finish. They end with their parent.
            os._exit(130)
    print(f"{total:,} inputs, nothing found; QEMU {fuzzer.build.version}, "
          f"series {fuzzer.build.series}; logs and new inputs: {fuzzer.folder}")  # fmt: skip
    if args.minimize:
        minimize(fuzzer, targets)


if __name__ == "__main__":
    sys.exit(main())
