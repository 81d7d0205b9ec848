# SPDX-License-Identifier: GPL-2.0-or-later
"""The parent of one machine's process, so that it is neither orphaned nor forgotten.

Started as ``python -m qvis.machine.keeper FOLDER LOCK`` with the folder's
locked file as descriptor LOCK and a pipe from the process that wants the
machine as its standard input. Until the word ``detach`` comes through that
pipe, its end (whoever held it finished, crashed or was killed) ends the
machine. Should the keeper itself be killed, the kernel kills the machine's
process for it.

It imports nothing of qvis but the folder's layout and so starts in a few tens
of milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..folder import EXIT, LAUNCH, PROCESS_LOG, Folder

__all__ = ["DETACH", "main"]

DETACH = b"detach\n"
GRACE = 2.0  # seconds that QEMU has to close its files after SIGTERM


def main(arguments: list[str]) -> int:
    """Start what ``launch.json`` says, watch it and its owner, note how it ended."""
    folder = Folder(Path(arguments[0]))
    lock = int(arguments[1])
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)

    # SIGTERM (`qvis down`) and SIGCHLD wake the select() below through this pipe.
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    asked_to_end = False

    def end_asked(number: int, frame: object) -> None:
        nonlocal asked_to_end
        asked_to_end = True

    signal.signal(signal.SIGTERM, end_asked)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for harmless in (signal.SIGINT, signal.SIGHUP):
        signal.signal(harmless, signal.SIG_IGN)

    launch = folder.read(LAUNCH)
    if launch is None:
        return 1
    with (folder / PROCESS_LOG).open("ab") as log:
        child = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *launch["command"]],
            cwd=folder.path,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    owned = True
    while child.poll() is None and not asked_to_end:
        ready, _, _ = select.select([wake, *([0] if owned else [])], [], [])
        if wake in ready:
            os.read(wake, 4096)
        if 0 in ready:
            word = os.read(0, 64)
            if word == DETACH:
                owned = False
            else:
                break  # the owner is gone
    abandoned = owned and child.poll() is None and not asked_to_end
    _end(child)
    if not abandoned:
        # Signals are negative in Python; 0 is a guest that shut itself down.
        with contextlib.suppress(OSError):
            facts = {"status": child.returncode, "time": time.time(), "asked": asked_to_end}
            folder.write(EXIT, facts)
        return 0
    # Nobody is left to look at it. Our own lock would keep the folder from being removed.
    os.close(lock)
    folder.remove()
    return 0


def _end(child: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
