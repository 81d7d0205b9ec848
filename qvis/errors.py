# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong, and whose fault it is.

::

    QvisError
     +-- UsageError         what was asked for cannot be        exit 2
     +-- BuildError         a patch or a compiler said no       exit 121
     +-- InfraError         this host: disk, network, packages  exit 122
     +-- BootError          the guest did not come up           exit 123
     +-- LostMachineError   a machine that was up is gone       exit 124
     +-- GuestError         something failed inside the guest   exit 125

The codes from 121 keep clear of those that programs run by ``qvis exec``
commonly return, since that verb passes the guest's own status through.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "BootError",
    "BuildError",
    "GuestError",
    "InfraError",
    "LostMachineError",
    "QvisError",
    "UsageError",
]


class QvisError(Exception):
    """Root of all errors that qvis raises on purpose.

    ``message`` is one line that says what is wrong and what to do about it.
    The rest is evidence, each part present where it makes sense: the named
    ``stage`` that failed, the ``command`` line that was run, the ``log`` file
    or folder that tells the whole story and its last lines in ``tail``.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        stage: str | None = None,
        command: Sequence[str] | None = None,
        log: Path | None = None,
        tail: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.command = list(command) if command is not None else None
        self.log = log
        self.tail = list(tail)
        if self.tail:  # for tracebacks and test reports; the command line shows it by itself
            self.add_note("the last lines:\n" + "\n".join(f"  {line}" for line in self.tail))

    def __str__(self) -> str:
        return f"{self.stage}: {self.message}" if self.stage else self.message


class UsageError(QvisError):
    """The request itself is wrong: an unknown name, a CPU that does not exist."""

    exit_code = 2


class BuildError(QvisError):
    """A series does not apply, or a build of QEMU, Linux or the initramfs failed."""

    exit_code = 121


class InfraError(QvisError):
    """The host is at fault: no network, no space, a package missing, QEMU not starting."""

    exit_code = 122


class BootError(QvisError):
    """The guest is at fault: it panicked, hung or never answered on SSH."""

    exit_code = 123


class LostMachineError(QvisError):
    """A machine that had been up died or stopped answering."""

    exit_code = 124


class GuestError(QvisError):
    """The machine is well, but what was asked of the guest failed inside it."""

    exit_code = 125
