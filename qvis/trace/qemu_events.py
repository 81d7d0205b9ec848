# SPDX-License-Identifier: GPL-2.0-or-later
"""Turning QEMU's own trace events on, and off again whatever becomes of us.

QEMU would write them to its trace file for as long as it lives. So a process of
its own (``python -m qvis.trace.qemu_events MACHINE``) waits for the end of a
pipe that the recorder holds, and turns them off if the recorder did not.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ..errors import QvisError
from ..folder import running
from ..machine.qmp import Qmp

__all__ = ["EVENTS", "Watch", "quiet", "start"]

EVENTS = ("apic_deliver_irq", "ioapic_eoi_broadcast")
"""What no vCPU does: a device raises an interrupt, an IOAPIC sees the end of one."""
DONE = b"done"


def start(qmp: Qmp, path: Path) -> None:
    """Have QEMU write its events to the file ``path``."""
    # Quoted as QEMU's monitor reads it (get_str() in monitor/hmp.c).
    quoted = str(path).replace("\\", "\\\\").replace('"', '\\"')
    qmp.monitor(f'trace-file set "{quoted}"')
    for name in EVENTS:
        qmp("trace-event-set-state", name=name, enable=True)
    qmp.monitor("trace-file on")


def quiet(qmp: Qmp) -> None:
    """End that, with all that there is in the file."""
    for name in EVENTS:
        qmp("trace-event-set-state", name=name, enable=False)
    qmp.monitor("trace-file flush")
    qmp.monitor("trace-file off")


class Watch:
    """The process that waits for our end."""

    def __init__(self, machine: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qvis.trace.qemu_events", machine],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what ends us is not to end it
        )

    def end(self) -> None:
        """There is nothing left to turn off."""
        self._process.communicate(DONE)


def main(machine: str) -> None:
    """Wait for the pipe's end; see the module."""
    if sys.stdin.buffer.read() == DONE:
        return
    try:
        qmp = Qmp(running(machine))
    except QvisError:
        return  # the machine is gone as well
    with qmp:
        quiet(qmp)


if __name__ == "__main__":
    main(sys.argv[1])
