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
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .folder import SSH_CONTROL

__all__ = ["CLIENT_KEY", "KNOWN_HOSTS", "USER", "client_command", "close_sessions", "write_config"]

USER = "root"
CLIENT_KEY = "id_ed25519"
KNOWN_HOSTS = "known_hosts"
CONFIG = "ssh_config"
CLOSE_DEADLINE = 5.0  # seconds


def write_config(folder: Path, alias: str, port: int) -> None:
    """Write the configuration for the guest whose SSH is at loopback ``port``.

    ``alias`` is the name under which its host key is known.
    """
    (folder / CONFIG).write_text(
        f"""Host {folder.name}
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
    ControlPath "{folder / SSH_CONTROL}"
    ControlPersist yes
    ServerAliveInterval 15
    ServerAliveCountMax 4
    ConnectTimeout 30
    LogLevel ERROR
"""
    )


def client_command(folder: Path, command: Sequence[str] = ()) -> list[str]:
    """The command line for a session, or for ``command`` word by word, in the guest."""
    words = ["ssh", "-F", str(folder / CONFIG), folder.name]
    return [*words, "--", shlex.join(command)] if command else words


def close_sessions(folder: Path) -> None:
    """End the session in the background, if there is one."""
    if (folder / SSH_CONTROL).exists():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [*client_command(folder)[:3], "-O", "exit", folder.name],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=CLOSE_DEADLINE,
                check=False,
            )
