# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis qmp``"""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import UsageError
from ..folder import running
from ._output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="such as query-status")
    parser.add_argument(
        "argument", metavar="key=value", nargs="*",
        help="the value is JSON where it parses as such, else a string",
    )  # fmt: skip
    parser.add_argument("--events", action="store_true", help="print events, one JSON line each")


def run(args: argparse.Namespace) -> int:
    if args.events == bool(args.command):
        raise UsageError("give a COMMAND, or --events")
    arguments = dict(_argument(text) for text in args.argument)
    folder = running(args.name)
    from ..machine.qmp import Qmp

    with Qmp(folder) as qmp:
        if args.command:
            print_json(qmp(args.command, **arguments))
            return 0
        for event in qmp.events():
            print(json.dumps(event), flush=True)
    return 0


def _argument(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UsageError(f"bad argument {text!r}: write it as key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
