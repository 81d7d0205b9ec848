# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis patches``"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..build import develop, series
from ..errors import BuildError
from ..host import ensure_packages
from ._output import print_json, print_table


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    names = series.names()

    apply = actions.add_parser("apply", help="make a git repository with the series as commits")
    refresh = actions.add_parser("refresh", help="write such a repository's commits as the series")
    for action in (apply, refresh):
        action.add_argument("series", choices=names)
        action.add_argument("directory", type=Path)

    check = actions.add_parser("check", help="does it apply, and is checkpatch content?")
    check.add_argument("series", nargs="?", choices=names, help="only this one")
    check.add_argument("--build", action="store_true", help="also build after each patch")

    listing = actions.add_parser("list", help="what there is, and what each patch touches")
    listing.add_argument("series", nargs="?", choices=names, help="only this one")
    listing.add_argument("--json", action="store_true", help="with the lines of each file, in JSON")


def run(args: argparse.Namespace) -> int:
    chosen = [args.series] if args.series else series.names()
    if args.action == "list":
        _list(chosen, args.json)
        return 0
    ensure_packages()
    if args.action == "apply":
        develop.apply(args.series, args.directory)
        print(f"{args.directory}: branch qvis, on top of the tag {develop.BASE}")
    elif args.action == "refresh":
        patches = develop.refresh(args.series, args.directory)
        print(f"{len(patches)} patches in {series.folder(args.series)}")
    else:
        for name in chosen:
            _check(name, args.build)
    return 0


def _check(name: str, build: bool) -> None:
    said = develop.check(name)
    for patch, lines in said.items():
        for line in lines:
            print(f"{patch}:{line}")
    if said:
        raise BuildError(f"checkpatch is not content with {', '.join(said)}", stage="series")
    if build:
        develop.check_builds(name)
    print(f"{name}: {len(series.read(name))} patches are fine")


def _list(names: list[str], as_json: bool) -> None:
    listing = [
        (name, number, patch) for name in names for number, patch in enumerate(series.read(name), 1)
    ]
    if as_json:
        print_json([
            {
                "series": name, "component": series.component(name), "number": number,
                "name": patch.name, "sha": patch.sha,
                "subject": patch.subject, "changes": patch.changes,
            }
            for name, number, patch in listing
        ])  # fmt: skip
        return
    rows = []
    for name, number, patch in listing:
        added, removed = (sum(lines[i] for lines in patch.changes.values()) for i in (0, 1))
        rows.append([name, str(number), patch.subject, str(len(patch.changes)),
                     f"+{added} -{removed}", patch.sha])  # fmt: skip
    print_table(["series", "number", "subject", "files", "lines", "sha"], rows)
