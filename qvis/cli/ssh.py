# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis ssh``"""

from __future__ import annotations

import argparse
import shutil

from ..errors import InfraError, UsageError
from ..folder import MACHINE, running
from ..openssh import session


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--host", action="store_true", help="into the inner host that the guest is in"
    )


def run(args: argparse.Namespace) -> int:
    folder = running(args.name)
    if args.host and (folder.read(MACHINE) or {}).get("host_ssh_port") is None:
        raise UsageError(f"machine {args.name!r} has no inner host: --backend nested has one")
    if not shutil.which("ssh"):
        raise InfraError("a shell needs OpenSSH's client: install openssh-client")
    return session(folder, host=args.host)
