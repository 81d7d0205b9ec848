# SPDX-License-Identifier: GPL-2.0-or-later
"""Ending a machine, whoever started it."""

from __future__ import annotations

import contextlib
import os
import signal

from ..errors import InfraError
from ..folder import Folder
from ..openssh import close_sessions

__all__ = ["end"]

DEADLINE = 10.0  # seconds


def end(folder: Folder) -> None:
    """End the machine of ``folder``, dead or alive, and remove the folder.

    Raises :class:`InfraError` when it cannot be made to end.
    """
    close_sessions(folder.path)
    # The keeper ends QEMU; should it be stuck, the kernel does when the keeper is killed.
    for number in (signal.SIGTERM, signal.SIGKILL):
        if folder.alive and (pid := folder.keeper) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            if folder.wait_dead(DEADLINE):
                break
    if folder.alive:
        raise InfraError(f"machine {folder.name!r} does not end; its folder is {folder.path}")
    folder.remove()
