# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's serial console, with qvis's own client and raw ones."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvis.errors import GuestError
from qvis.folder import CONSOLE_SOCKET
from qvis.machine.boot import CONSOLE_STAGES
from qvis.machine.console import Console

from .served import Served
from .userland import Guest


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.close()


def test_a_boot_says_its_stages_in_order() -> None:
    said = Guest().console.decode()
    places = [said.index(stage.marker) for stage in CONSOLE_STAGES]
    assert places == sorted(places)
    assert said.count("\n") == said.count("\r\n")
    assert said.endswith("\r\n/ # ")


def test_qviss_client(served: Served) -> None:
    with Console(served.folder) as console:
        assert console.run("echo one; echo two") == "one\ntwo"
        assert console.run("cd /sys; pwd; foo") == "/sys\n/bin/sh: foo: not found"
        with pytest.raises(GuestError, match="did not come back"):
            console.run("sleep 1", deadline=0.3)
    with Console(served.folder) as console:
        assert console.run("echo again") == "again"
    assert b"one\r\ntwo\r\n" in (served.folder / "console.log").read_bytes()


def test_a_second_client_waits_for_the_first(served: Served) -> None:
    first, second = (socket.socket(socket.AF_UNIX) for _ in range(2))
    for client in (first, second):
        client.settimeout(10)
        client.connect(str(served.folder / CONSOLE_SOCKET))
    second.sendall(b"echo from the second\r")
    first.sendall(b"echo from the first\r")
    said = b""
    while b"\r\nfrom the first\r\n" not in said:
        said += first.recv(4096)
    assert b"second" not in said
    first.close()
    said = b""
    while b"\r\nfrom the second\r\n" not in said:
        said += second.recv(4096)
    second.close()


def test_a_shell_that_ends_is_started_anew(served: Served) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(served.folder / CONSOLE_SOCKET))
        for sent, wanted in (
            (b"sleep 50\r", b"sleep 50\r\n"), (b"\x03", b"^C\r\n/ # "),
            (b"x=1\r", b"/ # "), (b"\x04", b"BusyBox"), (b"echo .$x.\r", b"..\r\n"),
        ):  # fmt: skip
            client.sendall(sent)
            said = b""
            while wanted not in said:
                data = client.recv(4096)
                assert data
                said += data


def test_keys_without_end_are_no_burden(served: Served) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(0.05)
        client.connect(str(served.folder / CONSOLE_SOCKET))
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                client.sendall(b"\x1b[A\x1b" + bytes(range(128, 256)) + b"x" * 4000)
    ssh = served.ssh()
    assert ssh.run("echo fine").stdout == "fine\n"
    ssh.close()
