# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis ls``"""

from __future__ import annotations

import argparse
from typing import Any

from .. import levels
from ..folder import EXIT, MACHINE, Folder, folders
from ._output import print_json, print_table


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="everything known, in JSON")


def run(args: argparse.Namespace) -> int:
    machines = [(folder, _state(folder), folder.read(MACHINE) or {}) for folder in folders()]
    if args.json:
        print_json([{"name": f.name, "state": state, **info} for f, state, info in machines])
        return 0
    if not machines:
        print("no machines; `qvis up` makes one")
        return 0
    columns = ["name", "state", "backend", "transport", "vCPUs", "MiB", "queues", "ssh port"]
    print_table(columns, [[f.name, state, *_row(info)] for f, state, info in machines])
    return 0


def _state(folder: Folder) -> str:
    if folder.alive:
        return "running" if folder.read(MACHINE) else "starting"
    status = (folder.read(EXIT) or {}).get("status")
    if status is None or levels.failure(folder.path):
        return "died"
    return "shut down" if status == 0 else f"died (status {status})"


def _row(info: dict[str, Any]) -> list[str]:
    if not info:
        return ["-"] * 6
    spec = info["spec"]
    return [
        info["provenance"]["backend"],
        *(str(spec[key]) for key in ("transport", "smp", "memory", "queues")),
        str(info["ssh_port"]),
    ]
