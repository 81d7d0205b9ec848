# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis logs``"""

from __future__ import annotations

import argparse

from ..folder import CONSOLE_LOG, HOST_CONSOLE_LOG, PROCESS_LOG, find


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    folder = find(args.name)
    logs = [("console", CONSOLE_LOG), ("process", PROCESS_LOG)]
    if (folder / HOST_CONSOLE_LOG).exists():
        logs.insert(1, ("console of the inner host", HOST_CONSOLE_LOG))
    for title, name in logs:
        path = folder / name
        text = path.read_text(errors="replace") if path.exists() else ""
        print(f"== {title}: {path}")
        print(text.replace("\r", ""), end="" if text.endswith("\n") else "\n")
    return 0
