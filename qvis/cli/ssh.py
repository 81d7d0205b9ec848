# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis ssh``"""

from __future__ import annotations

import argparse
import os
import shutil

from ..errors import InfraError
from ..folder import running
from ..openssh import client_command


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    command = client_command(running(args.name).path)
    if not shutil.which(command[0]):
        raise InfraError("a shell needs OpenSSH's client: install openssh-client")
    os.execvp(command[0], command)
