# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis patches``"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..build import develop, series, sources
from ..errors import BuildError
from ..host import ensure_packages
from ._output import print_json, print_table


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    names = sources.components()

    apply = actions.add_parser("apply", help="make a git repository with the series as commits")
    refresh = actions.add_parser("refresh", help="write such a repository's commits as the series")
    for action in (apply, refresh):
        action.add_argument("component", choices=names)
        action.add_argument("directory", type=Path)

    check = actions.add_parser("check", help="does it apply, and is checkpatch content?")
    check.add_argument("component", nargs="?", choices=names, help="only this one's series")
    check.add_argument("--build", action="store_true", help="also build after each patch")

    listing = actions.add_parser("list", help="what there is, and what each patch touches")
    listing.add_argument("component", nargs="?", choices=names, help="only this one's series")
    listing.add_argument("--json", action="store_true", help="with the lines of each file, in JSON")


def run(args: argparse.Namespace) -> int:
    chosen = [args.component] if args.component else sources.components()
    if args.action == "list":
        _list(chosen, args.json)
        return 0
    ensure_packages()
    if args.action == "apply":
        develop.apply(args.component, args.directory)
        print(f"{args.directory}: branch qvis, on top of the tag {develop.BASE}")
    elif args.action == "refresh":
        patches = develop.refresh(args.component, args.directory)
        print(f"{len(patches)} patches in {series.folder(args.component)}")
    else:
        for component in chosen:
            _check(component, args.build)
    return 0


def _check(component: str, build: bool) -> None:
    said = develop.check(component)
    for name, lines in said.items():
        for line in lines:
            print(f"{name}:{line}")
    if said:
        raise BuildError(f"checkpatch is not content with {', '.join(said)}", stage="series")
    if build:
        develop.check_builds(component)
    print(f"{component}: {len(series.read(component))} patches are fine")


def _list(components: list[str], as_json: bool) -> None:
    listing = [
        (component, number, patch)
        for component in components
        for number, patch in enumerate(series.read(component), 1)
    ]
    if as_json:
        print_json([
            {
                "component": component, "number": number, "name": patch.name, "sha": patch.sha,
                "subject": patch.subject, "changes": patch.changes,
            }
            for component, number, patch in listing
        ])  # fmt: skip
        return
    rows = []
    for component, number, patch in listing:
        added, removed = (sum(lines[i] for lines in patch.changes.values()) for i in (0, 1))
        rows.append([component, str(number), patch.subject, str(len(patch.changes)),
                     f"+{added} -{removed}", patch.sha])  # fmt: skip
    print_table(["component", "number", "subject", "files", "lines", "sha"], rows)
