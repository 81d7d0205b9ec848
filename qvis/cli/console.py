# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis console``"""

from __future__ import annotations

import argparse
import sys

from ..folder import running


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    folder = running(args.name)
    from ..machine.console import interact

    print(f"console of {args.name}: Ctrl-] leaves it", file=sys.stderr)
    interact(folder)
    print(file=sys.stderr)
    return 0
