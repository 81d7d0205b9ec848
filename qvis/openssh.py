# SPDX-License-Identifier: GPL-2.0-or-later
"""OpenSSH's own client for a machine: interactive sessions and quick commands.

A machine's folder holds a configuration for it, so that ``ssh``, ``scp`` and
``rsync`` work with ``-F`` as well. The first session stays open in the
background for those that follow, which then need no key exchange; it ends
when the machine does.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from .folder import HOST_SSH_CONTROL, SSH_CONTROL, Folder

__all__ = [
    "CLIENT_KEY", "KNOWN_HOSTS", "USER", "client_command", "close_sessions", "session",
    "write_config",
]  # fmt: skip

USER = "root"
CLIENT_KEY = "id_ed25519"
KNOWN_HOSTS = "known_hosts"
CONFIG = "ssh_config"
HOST_SUFFIX = "-host"  # of the inner host's name there
CLOSE_DEADLINE = 5.0  # seconds
FAILED = 255  # when it failed by itself, or what it ran ended so
DEATH = 3.0  # seconds that a machine which has cut a session takes to end, at most
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def write_config(folder: Path, alias: str, port: int, host_port: int | None = None) -> None:
    """Write the configuration for the guest whose SSH is at loopback ``port``.

    ``alias`` is the name under which its host key is known. An inner host, if the guest
    is in one, has the same keys at ``host_port``.
    """
    text = _host(folder, folder.name, alias, port, SSH_CONTROL)
    if host_port is not None:
        text += _host(folder, f"{folder.name}{HOST_SUFFIX}", alias, host_port, HOST_SSH_CONTROL)
    (folder / CONFIG).write_text(text)


def _host(folder: Path, name: str, alias: str, port: int, control: str) -> str:
    return f"""Host {name}
    HostName 127.0.0.1
    Port {port}
    User {USER}
    IdentityFile "{folder / CLIENT_KEY}"
    IdentitiesOnly yes
    HostKeyAlias {alias}
    UserKnownHostsFile "{folder / KNOWN_HOSTS}"
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    PasswordAuthentication no
    ControlMaster auto
    ControlPath "{folder / control}"
    ControlPersist yes
    ServerAliveInterval 15
    ServerAliveCountMax 4
    ConnectTimeout 30
    LogLevel ERROR
"""


def client_command(folder: Path, command: Sequence[str] = (), *, host: bool = False) -> list[str]:
    """The command line for a session, or for ``command`` word by word, in the guest.

    Or, with ``host``, in the inner host.
    """
    name = f"{folder.name}{HOST_SUFFIX}" if host else folder.name
    words = ["ssh", "-F", str(folder / CONFIG), name]
    return [*words, "--", shlex.join(command)] if command else words


def session(folder: Folder, command: Sequence[str] = (), *, host: bool = False) -> int:
    """Have the client run a session, or ``command``, on this terminal; its exit status.

    Signals go to it, so it is for a process that does nothing else. Raises
    :class:`LostMachineError` when the machine has died under it.
    """
    words = client_command(folder.path, command, host=host)
    received: list[int] = []
    with subprocess.Popen(["setpriv", "--pdeathsig", "TERM", "--", *words]) as client:

        def pass_on(number: int, _: FrameType | None) -> None:
            received.append(number)
            client.send_signal(number)

        for number in PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, pass_on)
        status = client.wait()
    if received and status == FAILED:
        status = -received[0]
    if status == FAILED and folder.wait_dead(DEATH):
        raise folder.lost()
    return status if status >= 0 else 128 - status


def close_sessions(folder: Path) -> None:
    """End the sessions in the background, if there are any."""
    for control, host in ((SSH_CONTROL, False), (HOST_SSH_CONTROL, True)):
        if not (folder / control).exists():
            continue
        *words, name = client_command(folder, host=host)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [*words, "-O", "exit", name],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=CLOSE_DEADLINE,
                check=False,
            )
