# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis down``"""

from __future__ import annotations

import argparse

from ..errors import UsageError
from ..folder import find, folders


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="end every machine")


def run(args: argparse.Namespace) -> int:
    if bool(args.name) == args.all:
        raise UsageError("name the machines to end, or say --all")
    # All names are looked up before any machine is touched.
    chosen = folders() if args.all else [find(name) for name in args.name]
    from ..machine.end import end

    for folder in chosen:
        end(folder)
        print(f"{folder.name} is gone")
    return 0
