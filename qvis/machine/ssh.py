# SPDX-License-Identifier: GPL-2.0-or-later
"""SSH into the guest, with keys of the machine's own and its host key checked."""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import paramiko
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from ..errors import GuestError, LostMachineError
from ..folder import Folder
from ..openssh import CLIENT_KEY, KNOWN_HOSTS, USER

__all__ = ["Completed", "Keys", "Ssh", "host_alias", "make_keys"]

COMMAND_DEADLINE = 60.0  # seconds
OBITUARY_DEADLINE = 3.0  # in which a machine ends that a connection broke with

# Its threads print tracebacks for what connect() expects and tries again.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Keys:
    """What goes into the guest: its private host key in OpenSSH's format, and who may log in."""

    host_key: bytes
    authorized: bytes


@dataclass(frozen=True)
class Completed:
    """A command that ended in the guest."""

    command: str
    status: int
    stdout: str
    stderr: str


def make_keys(folder: Path) -> Keys:
    """Make a machine's two key pairs; the client's and the known host stay in ``folder``."""
    client = Ed25519PrivateKey.generate()
    host = Ed25519PrivateKey.generate()
    private = client.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    key_file = folder / CLIENT_KEY
    key_file.touch(mode=0o600)
    key_file.write_bytes(private)
    (folder / KNOWN_HOSTS).write_bytes(b"%s %s\n" % (host_alias(folder).encode(), _public(host)))

    host_key = host.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return Keys(host_key, _public(client) + b"\n")


class Ssh:
    """A connection to the guest; it is made when first needed and kept."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        self._client: paramiko.SSHClient | None = None

    def connect(self, deadline: float) -> None:
        """Log in; tries again until ``deadline`` seconds are over or the machine is gone.

        Raises :class:`LostMachineError` with the last reason. A host key that
        is not the machine's is refused at once.
        """
        end = time.monotonic() + deadline
        host_keys = paramiko.HostKeys(str(self._folder / KNOWN_HOSTS))
        key = paramiko.Ed25519Key.from_private_key_file(str(self._folder / CLIENT_KEY))
        while True:
            left = max(0.5, end - time.monotonic())
            client = paramiko.SSHClient()
            try:
                connection = socket.create_connection(("127.0.0.1", self._port), timeout=left)
                client.set_missing_host_key_policy(paramiko.RejectPolicy())
                known = client.get_host_keys()
                for kind, host_key in host_keys[host_alias(self._folder)].items():
                    known.add(host_alias(self._folder), kind, host_key)
                client.connect(
                    host_alias(self._folder),
                    username=USER,
                    pkey=key,
                    sock=connection,
                    timeout=left,
                    banner_timeout=left,
                    auth_timeout=left,
                    allow_agent=False,
                    look_for_keys=False,
                )
            except paramiko.BadHostKeyException as problem:
                client.close()
                raise LostMachineError(f"not the machine's host key: {problem}") from problem
            except (OSError, EOFError, paramiko.SSHException) as problem:
                client.close()
                if time.monotonic() >= end or not Folder(self._folder).alive:
                    raise LostMachineError(
                        f"SSH does not answer: {problem}{Folder(self._folder).obituary()}"
                    ) from problem
                time.sleep(0.05)
                continue
            self._client = client
            return

    def run(
        self, command: str, *, deadline: float = COMMAND_DEADLINE, check: bool = True
    ) -> Completed:
        """Run ``command`` with the guest's shell.

        Raises :class:`GuestError` when it does not end within ``deadline``
        seconds (it may then still run in the guest) or, with ``check``, ends
        with a status other than 0; :class:`LostMachineError` when the
        connection breaks.
        """
        if self._client is None:
            self.connect(deadline)
        assert self._client is not None
        try:
            transport = self._client.get_transport()
            assert transport is not None  # a client that connected has one
            channel = transport.open_session(timeout=deadline)
            channel.settimeout(deadline)
            channel.exec_command(command)
            stdout, stderr = _drain(channel, time.monotonic() + deadline)
            status = channel.recv_exit_status()
            channel.close()
        except TimeoutError as problem:
            raise GuestError(
                f"did not end within {deadline:.0f} s", stage="guest command", command=[command]
            ) from problem
        except (OSError, EOFError, paramiko.SSHException) as problem:
            self.close()
            raise self._lost(command, f" ({problem})") from problem
        if status < 0 and not transport.is_active():  # paramiko's word for no status at all
            self.close()
            raise self._lost(command)
        done = Completed(command, status, stdout, stderr)
        if check and status:
            raise GuestError(
                f"{command!r} ended with status {status}: "
                f"{(stderr or stdout).strip() or 'it said nothing'}",
                stage="guest command",
                tail=(stdout + stderr).splitlines()[-15:],
            )
        return done

    def _lost(self, command: str, reason: str = "") -> LostMachineError:
        why = Folder(self._folder).obituary(OBITUARY_DEADLINE)
        return LostMachineError(
            f"the connection broke during {command!r}{reason}{why}", stage="ssh"
        )

    def close(self) -> None:
        """End the connection; the next command makes a new one."""
        if self._client:
            self._client.close()
            self._client = None


def _drain(channel: paramiko.Channel, end: float) -> tuple[str, str]:
    """Both outputs to their ends: reading one after the other could block the guest."""
    outputs = {"out": bytearray(), "err": bytearray()}
    while True:
        # Asked before reading: what comes between is read in the next round.
        ended = channel.closed or (channel.exit_status_ready() and channel.eof_received)
        idle = True
        if channel.recv_ready():
            outputs["out"] += channel.recv(65536)
            idle = False
        if channel.recv_stderr_ready():
            outputs["err"] += channel.recv_stderr(65536)
            idle = False
        if idle and ended:
            break
        if time.monotonic() > end:
            channel.close()
            raise TimeoutError
        if idle:
            channel.status_event.wait(0.002)
            time.sleep(0.001)
    return tuple(bytes(text).decode(errors="replace") for text in outputs.values())  # type: ignore[return-value]


def host_alias(folder: Path) -> str:
    """The name under which the machine's host key is known."""
    return f"qvis-{folder.name}"


def _public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
