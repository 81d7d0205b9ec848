# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis ssh``"""

from __future__ import annotations

import argparse
import os

from ..folder import running
from ..openssh import client_command


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    command = client_command(running(args.name).path)
    os.execvp(command[0], command)
