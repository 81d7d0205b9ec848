# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis exec``"""

from __future__ import annotations

import argparse
import os

from ..errors import UsageError
from ..folder import running
from ..openssh import client_command
from ._output import strip_dashes


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("command", metavar="-- CMD", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> int:
    words = strip_dashes(args.command)
    if not words:
        raise UsageError("no command: qvis exec NAME -- CMD [ARG...]")
    # OpenSSH's client passes the command's exit status on; 255 is its own failure.
    command = client_command(running(args.name).path, words)
    os.execvp(command[0], command)
