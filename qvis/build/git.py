# SPDX-License-Identifier: GPL-2.0-or-later
"""Running git so that nobody's configuration can change what it does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ..errors import BuildError, InfraError

__all__ = ["git"]

DEADLINE = 600.0  # seconds; the longest, adding all of Linux, takes half a minute
IDENTITY = {
    # Fixed, so that the same series gives the same commits everywhere.
    "GIT_AUTHOR_NAME": "qvis",
    "GIT_AUTHOR_EMAIL": "qvis@localhost",
    "GIT_AUTHOR_DATE": "1970-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "qvis",
    "GIT_COMMITTER_EMAIL": "qvis@localhost",
    "GIT_COMMITTER_DATE": "1970-01-01T00:00:00Z",
}


def git(repository: Path, *words: str | Path, stage: str) -> str:
    """What git prints, run in ``repository``; :class:`BuildError` when it fails.

    The error's tail is what git said. Neither the user's settings (diff
    formats, line endings, signing) nor a ``GIT_DIR`` of a hook that we were
    started from have any influence.
    """
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    environment |= IDENTITY
    environment |= {"LC_ALL": "C", "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    command = ["git", "-C", str(repository), *map(str, words)]
    try:
        done = subprocess.run(
            # As for all children: it ends when we do, however we end.
            ["setpriv", "--pdeathsig", "TERM", "--", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DEADLINE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise InfraError(f"cannot run git: {problem}", stage=stage, command=command) from problem
    if done.returncode:
        said = (done.stderr + done.stdout).splitlines()
        if any("No space left on device" in line for line in said):
            raise InfraError("the disk is full", stage=stage, command=command, tail=said)
        first = next((line for line in said if line.startswith(("error:", "fatal:"))), "")
        raise BuildError(
            f"git {words[0]} failed: {first or f'exit status {done.returncode}'}",
            stage=stage,
            command=command,
            tail=said,
        )
    return done.stdout
