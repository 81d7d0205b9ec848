# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine's folder: what lies where, who holds it, and whether it lives.

A machine lives exactly as long as somebody holds the lock on its folder: first
the process that makes it, then its keeper (:mod:`qvis.machine.keeper`), which
inherits the locked file. The kernel drops the lock however they die, so a
folder without a holder is a machine that is gone, and no process number is
ever trusted.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import levels
from .errors import InfraError, LostMachineError, UsageError
from .paths import state_dir

__all__ = ["Folder", "check_free", "claim", "find", "folders", "qmp_sockets", "running"]

INITRD = "initrd.img"
HOST_KEY = "host_key"  # of an emulated guest, private
AUTHORIZED_KEYS = "authorized_keys"  # likewise
CONSOLE_LOG = levels.GUEST.log
CONSOLE_SOCKET = "console.sock"
HOST_CONSOLE_LOG = levels.INNER_HOST.log
HOST_CONSOLE_SOCKET = "host-console.sock"
HOST_QMP = "host-qmp.sock"  # of the QEMU that an inner host is in
TRACE_SOCKET = "trace.sock"  # to the port of the inner host that traces come out of
MIGRATION_SOCKET = "migration.sock"
PROCESS_LOG = "process.log"  # what QEMU, say, printed
LAUNCH = "launch.json"  # what the keeper is to start
MACHINE = "machine.json"  # written when the machine is up
TRACE_CONTROL = "trace.control"  # what the tracer in QEMU shares with `qvis trace`
EXIT = "exit.json"  # written by the keeper when it ended
LOCK = "lock"
USER_QMP = "qmp.sock"  # for the user's own tools: qvis never connects to it
QMP_CLIENTS = 4  # how many qvis processes can speak QMP to one machine at once
KEPT_LOGS = 10  # folders of failed boots that are kept to be read

SSH_CONTROL = "ssh.sock"
HOST_SSH_CONTROL = "host.sock"  # short, as it has the longest path of all
# OpenSSH binds its control socket under this longer name first.
SOCKETS = (HOST_CONSOLE_SOCKET, MIGRATION_SOCKET, USER_QMP, f"{HOST_SSH_CONTROL}.{'x' * 16}")
# sun_path holds 108 bytes with its terminating zero (unix(7)).
LONGEST_SOCKET_PATH = 107


def qmp_sockets(folder: Path) -> dict[str, Path]:
    """The QMP sockets of the machine in ``folder`` by chardev name: the user's, then ours."""
    names = {"qmp-user": USER_QMP, **{f"qmp{n}": f"qmp{n}.sock" for n in range(QMP_CLIENTS)}}
    return {name: folder / file for name, file in names.items()}


class Folder:
    """One machine's folder, whether or not the machine lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def alive(self) -> bool:
        """Whether somebody holds the lock.

        Looking takes it shared and for a moment, so that those who look do not
        take each other for the holder.
        """
        try:
            with (self / LOCK).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def wait_dead(self, deadline: float) -> bool:
        """Wait up to ``deadline`` seconds for the machine to be gone; whether it is."""
        end = time.monotonic() + deadline
        while self.alive:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def obituary(self, patience: float = 0.0) -> str:
        """Why the machine is gone, to be appended to a message; empty as long as it lives.

        Waits for its end for ``patience`` seconds, where something of it has just gone.
        """
        if not self.wait_dead(patience):
            return ""
        words = levels.failure(self.path)
        return f": {words.message if words else self._end()}"

    def _end(self) -> str:
        """How its process ended, where no console tells why."""
        if not self.path.exists():
            return "it was taken down"
        record = self.read(EXIT) or {}
        program = (self.read(LAUNCH) or {}).get("program", "its process")
        match record.get("status"), record.get("asked"):
            case int(), True:
                return f"{program} was told to end"
            case 0, _:
                return f"{levels.died(self.path).name} shut down, or {program} was told to end"
            case int(status), _ if status < 0:
                return f"{program} was killed by signal {-status}"
            case int(status), _:
                return f"{program} ended with status {status}"
        return "nothing tells how"

    def lost(self) -> LostMachineError:
        """What to raise where the machine is gone."""
        name = self.name
        left = f"; `qvis logs {name}` shows its last words, `qvis down {name}` clears it away"
        if not self.path.exists():
            left = ""
        return LostMachineError(f"machine {name!r} is not running any more{self.obituary()}{left}")

    @property
    def keeper(self) -> int | None:
        """The keeper's process number; to be used only while :attr:`alive`."""
        try:
            return int((self / LOCK).read_text())
        except (OSError, ValueError):
            return None

    def read(self, name: str) -> dict[str, Any] | None:
        """The JSON object in file ``name``; None when it is absent or half written."""
        try:
            data = json.loads((self / name).read_text())
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) else None

    def write(self, name: str, data: dict[str, Any]) -> None:
        """Put ``data`` into file ``name`` in one step."""
        temporary = self / f"{name}.new"
        temporary.write_text(json.dumps(data, indent=2) + "\n")
        temporary.rename(self / name)

    def remove(self) -> None:
        """Remove the folder of a machine that is gone, with all that is in it.

        A machine that has taken the name meanwhile is left alone.
        """
        with _all_locked():
            if not self.alive:
                self._remove_locked()

    def _remove_locked(self) -> None:
        # Out of the way in one step, so that nobody sees half of it.
        trash = Path(tempfile.mkdtemp(prefix="removed-", dir=state_dir()))
        with suppress(FileNotFoundError):
            self.path.rename(trash / self.name)
        shutil.rmtree(trash, ignore_errors=True)

    def keep_logs(self) -> Path:
        """Move the logs to where they outlive the machine; the folder that holds them."""
        kept = state_dir() / "logs"
        kept.mkdir(mode=0o700, exist_ok=True)
        stem = f"{self.name}-{time.strftime('%Y%m%d-%H%M%S')}-"
        target = Path(tempfile.mkdtemp(prefix=stem, dir=kept))
        for name in (CONSOLE_LOG, HOST_CONSOLE_LOG, PROCESS_LOG, LAUNCH, EXIT):
            # What cannot be copied, on a full disk say, is not worth hiding the reason for it.
            with suppress(OSError):
                shutil.copy2(self / name, target / name)
        for old in sorted(kept.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT_LOGS]:
            shutil.rmtree(old, ignore_errors=True)
        return target


def folders() -> list[Folder]:
    """All machine folders, by name."""
    return [Folder(path) for path in sorted(_root().iterdir()) if path.is_dir()]


def find(name: str) -> Folder:
    """The folder of machine ``name``; :class:`UsageError` names the machines there are."""
    for folder in folders():
        if folder.name == name:
            return folder
    known = ", ".join(folder.name for folder in folders()) or "there are none"
    raise UsageError(f"no machine named {name!r} ({known}); `qvis up --name {name}` makes it")


def running(name: str) -> Folder:
    """The folder of machine ``name``, which is up.

    Raises :class:`UsageError` when there is none or it is still starting, and
    :class:`LostMachineError` when it has died.
    """
    folder = find(name)
    if not folder.alive:
        raise folder.lost()
    if folder.read(MACHINE) is None:
        raise UsageError(f"machine {name!r} is still starting")
    return folder


def check_free(name: str) -> None:
    """Raise :class:`UsageError` when a living machine has that name."""
    if Folder(_root() / name).alive:
        raise UsageError(
            f"machine {name!r} is already up: choose another --name, or `qvis down {name}`"
        )


def claim(name: str | None) -> tuple[Folder, int]:
    """Make the folder of a new machine and lock it: the folder and the lock's descriptor.

    Without a ``name`` the first free one of ``vm1``, ``vm2``... is taken. What
    a dead machine left behind is swept away; the name of a living one is a
    :class:`UsageError`.
    """
    with _all_locked():
        if name is None:
            taken = {folder.name for folder in folders() if folder.alive}
            name = next(free for n in range(1, len(taken) + 2) if (free := f"vm{n}") not in taken)
        check_free(name)
        folder = Folder(_root() / name)
        longest = max(len(os.fsencode(folder / name)) for name in SOCKETS)
        if longest > LONGEST_SOCKET_PATH:
            raise InfraError(
                f"the path of a socket in {folder.path} is {longest} bytes long and Unix sockets "
                f"allow {LONGEST_SOCKET_PATH}: set QVIS_STATE to a shorter folder"
            )
        folder._remove_locked()
        folder.path.mkdir(mode=0o700)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # at most somebody looks at it for a moment
            os.write(lock, str(os.getpid()).encode())
        except BaseException:
            os.close(lock)
            folder._remove_locked()
            raise
        return folder, lock


def _root() -> Path:
    root = state_dir() / "machines"
    root.mkdir(mode=0o700, exist_ok=True)
    return root


@contextmanager
def _all_locked() -> Iterator[None]:
    """Keep others from claiming a name at the same time."""
    with (state_dir() / "machines.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
