# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's SSH server, with paramiko's and OpenSSH's clients."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import pytest

from qvis.emulated.guest.processes import Outlet
from qvis.emulated.guest.terminal import Terminal
from qvis.errors import GuestError, LostMachineError
from qvis.openssh import CLIENT_KEY, KNOWN_HOSTS, client_command, close_sessions, write_config

from .served import Served, make_key

MANY = 1000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("m"))
    yield made
    made.close()


def becomes(holds: Callable[[], bool], wait: float = 10.0) -> bool:
    end = time.monotonic() + wait
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def running(served: Served) -> set[str]:
    return {process.name for process in list(served.guest.userland.processes.values())}


def test_results_of_a_command(served: Served) -> None:
    ssh = served.ssh()
    done = ssh.run("echo out; echo err >&2; exit 3", check=False)
    assert (done.status, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(GuestError, match="ended with status 3"):
        ssh.run("exit 3")
    assert ssh.run("foo", check=False).status == 127
    big = ssh.run("head -c 300000 /dev/zero | tr '\\0' x; head -c 300000 /dev/zero >&2")
    assert (len(big.stdout), len(big.stderr)) == (300000, 300000)
    ssh.close()


def test_a_command_that_never_ends_is_ended_with_its_channel(served: Served) -> None:
    ssh = served.ssh()
    with pytest.raises(GuestError, match="did not end within 1 s"):
        ssh.run("while :; do seq 1000 > /dev/null; done", deadline=1)
    assert ssh.run("echo still there").stdout == "still there\n"
    assert becomes(lambda: "seq" not in running(served))
    ssh.close()


def test_a_client_that_vanishes_takes_its_command_along(served: Served) -> None:
    ssh = served.ssh()
    ssh.connect(5)

    def wait() -> None:
        with contextlib.suppress(LostMachineError):
            ssh.run("sleep 77")

    threading.Thread(target=wait).start()
    assert becomes(lambda: "sleep" in running(served))
    ssh.close()
    assert becomes(lambda: "sleep" not in running(served))


def test_a_client_that_does_not_read_holds_up_nobody(served: Served) -> None:
    slow, other = served.ssh(), served.ssh()
    slow.connect(5)
    assert slow._client
    _, out, _ = slow._client.exec_command("cat /dev/zero")
    assert other.run("echo fine").stdout == "fine\n"
    out.channel.close()
    assert becomes(lambda: "cat" not in running(served))
    slow.close()
    other.close()


def test_sessions_side_by_side(served: Served) -> None:
    ssh = served.ssh()
    ssh.connect(5)
    assert ssh._client
    started = [ssh._client.exec_command(f"cat; echo {n}") for n in range(20)]
    for number, (stdin, out, _) in enumerate(started):
        stdin.write(f"to {number}\n")
        stdin.channel.shutdown_write()
        assert out.read().decode() == f"to {number}\n{number}\n"
        assert out.channel.recv_exit_status() == 0
    ssh.close()


def test_input_of_any_size_arrives(served: Served) -> None:
    ssh = served.ssh()
    ssh.connect(5)
    assert ssh._client
    stdin, out, _ = ssh._client.exec_command("wc -c")
    stdin.write("x" * 500_000)
    stdin.channel.shutdown_write()
    assert out.read() == b"500000\n"
    ssh.close()


def test_a_shell_on_a_terminal(served: Served) -> None:
    ssh = served.ssh()
    ssh.connect(5)
    assert ssh._client
    channel = ssh._client.invoke_shell("xterm")
    said = bytearray()

    def until(text: bytes) -> None:
        while text not in said:
            data = channel.recv(4096)
            assert data, bytes(said)
            said.extend(data)
        del said[: said.index(text) + len(text)]

    channel.settimeout(10)
    until(b"~ # ")
    channel.send(b"echo aX\x7fb $TERM\r")
    until(b"echo aX\b \bb $TERM\r\n")
    until(b"ab xterm\r\n~ # ")
    channel.send(b"sleep 99\r")
    until(b"sleep 99\r\n")
    assert becomes(lambda: "sleep" in running(served))
    channel.send(b"\x03")
    until(b"^C\r\n~ # ")
    channel.send(b"while :; do :; done\r")
    until(b"done\r\n")
    channel.send(b"\x03")
    until(b"~ # ")
    channel.send(b"tty; foo\r")
    until(b"/dev/pts/0\r\n-sh: foo: not found\r\n~ # ")
    channel.send(b"exit 3\r")
    assert channel.recv_exit_status() == 3
    ssh.close()


def test_a_flooded_terminal_keeps_a_line_and_holds_up_nobody(served: Served) -> None:
    flood, other = served.ssh(), served.ssh()
    flood.connect(5)
    assert flood._client
    channel = flood._client.invoke_shell("xterm")
    channel.settimeout(0.3)
    sent = 0
    with contextlib.suppress(OSError):
        for _ in range(200):
            sent += channel.send(b"x" * 30000)
    assert sent
    assert other.run("echo fine").stdout == "fine\n"
    terminals = [
        file
        for process in list(served.guest.userland.processes.values())
        for file in process.files.values()
        if isinstance(file, Terminal) and file.name == "/dev/pts/0"
    ]
    assert terminals
    assert becomes(lambda: all(len(terminal._line) == 4095 for terminal in terminals))
    channel.close()
    flood.close()
    other.close()


def test_a_terminal_that_nobody_looks_at_keeps_little(served: Served) -> None:
    shown: list[int] = []
    terminal = Terminal("/dev/pts/1", Outlet(lambda data: shown.append(len(data)), terminal=True))
    for _ in range(100):
        terminal.type(b"x" * 5000 + b"\r")
    assert sum(shown) <= (1 << 18) + 5000
    assert terminal._count <= 65536 + 4096
    console = served.guest.userland.console
    before = served.guest.machine.status
    served.call(lambda: console.type(b"y" * 300_000 + b"\x15"))
    ssh = served.ssh()
    assert ssh.run("echo fine").stdout == "fine\n"
    assert served.guest.machine.status == before
    ssh.close()


def test_openssh_and_its_control_master(served: Served) -> None:
    folder = served.folder.path
    write_config(folder, f"qvis-{folder.name}", served.port)
    for number in range(3):
        command = client_command(folder, ["sh", "-c", f"cat; exit {number}"])
        done = subprocess.run(command, input=b"in", capture_output=True, timeout=20, check=False)
        assert (done.returncode, done.stdout) == (number, b"in")
    killed = client_command(folder, ["sh", "-c", "kill -9 $$"])
    assert subprocess.run(killed, timeout=20, check=False).returncode in (137, 255)
    close_sessions(folder)


@pytest.mark.parametrize(("user", "wrong_key"), [("root", True), ("bob", False)])
def test_strangers_are_refused(served: Served, tmp_path: Path, user: str, wrong_key: bool) -> None:
    key_file = served.folder / CLIENT_KEY
    if wrong_key:
        key_file = tmp_path / "key"
        key_file.write_bytes(make_key()[0])
    with paramiko.SSHClient() as client:
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        key = paramiko.Ed25519Key.from_private_key_file(str(key_file))
        with pytest.raises(paramiko.AuthenticationException):
            client.connect("127.0.0.1", served.port, user, pkey=key, allow_agent=False,
                           look_for_keys=False)  # fmt: skip
        with pytest.raises(paramiko.AuthenticationException):
            client.connect("127.0.0.1", served.port, "root", password="root", allow_agent=False,
                           look_for_keys=False)  # fmt: skip
    ssh = served.ssh()
    assert ssh.run("echo fine").stdout == "fine\n"
    ssh.close()


def test_forwarding_and_sftp_are_refused(served: Served) -> None:
    ssh = served.ssh()
    ssh.connect(5)
    assert ssh._client
    transport = ssh._client.get_transport()
    assert transport
    with pytest.raises(paramiko.ChannelException):
        transport.open_channel("direct-tcpip", ("127.0.0.1", 22), ("127.0.0.1", 1))
    with pytest.raises(paramiko.SSHException):
        ssh._client.open_sftp()
    with pytest.raises(paramiko.SSHException):
        transport.request_port_forward("127.0.0.1", 0)
    assert ssh.run("echo fine").stdout == "fine\n"
    ssh.close()


def test_a_thousand_connections_at_once(served: Served) -> None:
    """Five may try to log in, as dropbear has it; the rest is closed at once; all goes on."""
    known = served.ssh()
    known.connect(5)
    before = len(list(Path("/proc/self/task").iterdir()))
    clients = [socket.create_connection(("127.0.0.1", served.port), 10) for _ in range(MANY)]
    greeted = 0
    for client in clients:
        with contextlib.suppress(ConnectionResetError):
            greeted += bool(client.recv(64))
    assert 1 <= greeted <= 5
    assert len(list(Path("/proc/self/task").iterdir())) <= before + 10
    assert known.run("echo fine").stdout == "fine\n"
    for client in clients:
        client.close()
    other = served.ssh()
    assert other.run("echo fine").stdout == "fine\n"
    other.close()
    known.close()


def test_garbage_is_no_client(served: Served) -> None:
    for garbage in (b"GET / HTTP/1.0\r\n\r\n", b"\0" * 5000, b"SSH-2.0-x\r\n" + b"\xff" * 5000):
        with socket.create_connection(("127.0.0.1", served.port), 10) as client:
            client.settimeout(0.5)
            client.sendall(garbage)
            with contextlib.suppress(OSError):  # it may wait for the rest of a line
                while client.recv(4096):
                    pass
    ssh = served.ssh()
    assert ssh.run("echo fine").stdout == "fine\n"
    ssh.close()


def test_without_a_network_nobody_gets_in(served: Served) -> None:
    ssh = served.ssh()
    ssh.connect(5)
    ssh.run("(sleep 0.1; ifconfig eth0 down; sleep 3; ifconfig eth0 up) > /dev/null 2>&1 &")
    time.sleep(0.3)
    with pytest.raises((GuestError, LostMachineError)):
        ssh.run("true", deadline=0.5)
    assert ssh.run("echo back", deadline=20).stdout == "back\n"
    ssh.close()


def test_a_reset_drops_everybody(served: Served) -> None:
    ssh = served.ssh()
    ssh.run("echo x > /tmp/there")
    served.call(served.guest.machine.reset)
    with pytest.raises((GuestError, LostMachineError)):
        ssh.run("sleep 60", deadline=20)
    assert ssh.run("ls /tmp").stdout == ""
    ssh.close()


def test_the_host_key_is_the_machines(served: Served, tmp_path: Path) -> None:
    from qvis.machine.ssh import Ssh, host_alias

    other = tmp_path / "m"
    other.mkdir()
    (other / CLIENT_KEY).write_bytes((served.folder / CLIENT_KEY).read_bytes())
    (other / KNOWN_HOSTS).write_bytes(host_alias(other).encode() + b" " + make_key()[1] + b"\n")
    with pytest.raises(LostMachineError, match="host key"):
        Ssh(other, served.port).connect(5)
