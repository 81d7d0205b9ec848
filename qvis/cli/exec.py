# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis exec``"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys

from ..errors import UsageError
from ..folder import running
from ..openssh import session
from ._output import strip_dashes

NO_DEADLINE = 86400.0 * 365  # seconds


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("command", metavar="-- CMD", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> int:
    words = strip_dashes(args.command)
    if not words:
        raise UsageError("no command: qvis exec NAME -- CMD [ARG...]")
    folder = running(args.name)
    if shutil.which("ssh"):
        return session(folder, words)
    return _without_openssh(args.name, shlex.join(words))


def _without_openssh(name: str, command: str) -> int:
    """On a host that has only what Python brings, which is slower and without a standard input."""
    from ..machine.machine import Machine

    with Machine.attach(name) as machine:
        done = machine.ssh.run(command, deadline=NO_DEADLINE, check=False)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.status
