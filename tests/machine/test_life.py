# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine from up to down: what it offers, and that nothing outlives it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qvis
from qvis.folder import EXIT, QMP_CLIENTS, Folder, qmp_sockets
from qvis.machine.machine import Machine
from qvis.machine.qmp import Qmp
from qvis.transport import Transport
from tests.conftest import gone, processes

MACHINE = re.compile(r"qemu-system|qvis\.emulated\.serve")  # a machine's process
Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_with_block_ends_the_machine(backend: str) -> None:
    with qvis.up(backend=backend, transport="intx", smp=1) as vm:
        folder = vm.folder
        assert vm.ssh.run("echo $((6 * 7))").stdout == "42\n"
    assert not folder.path.exists()
    assert gone(str(folder.path))


def test_boot_says_what_it_is_made_of(vm: Machine) -> None:
    source = vm.info["provenance"]
    assert source["qemu"].startswith("10.2")
    assert vm.qmp("query-version")["qemu"]["major"] == 10
    assert source["linux"] in vm.ssh.run("uname -r").stdout
    assert source["backend"] in ("tcg", "kvm", "emulated")
    assert list(vm.info["boot"]["stages"]) == [
        "launch", "firmware", "kernel", "init", "network", "ssh",
    ]  # fmt: skip


def test_guest_command_results(vm: Machine) -> None:
    done = vm.ssh.run("echo out; echo err >&2; exit 3", check=False)
    assert (done.status, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(qvis.GuestError, match="ended with status 3"):
        vm.ssh.run("exit 3")
    big = vm.ssh.run("head -c 300000 /dev/zero | tr '\\0' x; head -c 300000 /dev/zero >&2")
    assert (len(big.stdout), len(big.stderr)) == (300000, 300000)


def test_guest_command_that_never_ends(vm: Machine) -> None:
    with pytest.raises(qvis.GuestError, match="did not end within 1 s"):
        vm.ssh.run("sleep 30", deadline=1)
    assert vm.ssh.run("echo still there").stdout == "still there\n"


def test_console_works_beside_ssh(vm: Machine) -> None:
    with vm.console() as console:
        assert console.run("echo one; echo two") == "one\ntwo"
        with pytest.raises(qvis.GuestError, match="did not come back"):
            console.run("sleep 3", deadline=0.5)


def test_console_survives_a_dead_network(boot: Callable[..., Machine]) -> None:
    vm = boot(transport="msi", smp=1)
    with vm.console() as console:
        console.run("ifconfig eth0 down")
        with pytest.raises((qvis.GuestError, qvis.LostMachineError)):
            vm.ssh.run("true", deadline=1)
        console.run("ifconfig eth0 up")
    vm.ssh.close()
    assert vm.ssh.run("echo back").stdout == "back\n"


def test_user_qmp_socket_is_free_and_ours_are_a_pool(vm: Machine) -> None:
    vm.qmp("query-status")
    users = qmp_sockets(vm.folder.path)["qmp-user"]
    with socket.socket(socket.AF_UNIX) as tool:
        tool.settimeout(5)
        tool.connect(str(users))
        assert b"QMP" in tool.recv(4096)
    with contextlib.ExitStack() as held:
        for _ in range(QMP_CLIENTS - 1):
            held.enter_context(Qmp(vm.folder))
        with pytest.raises(qvis.InfraError, match="all 4 QMP sessions"):
            Qmp(vm.folder)
    with Qmp(vm.folder) as qmp:
        assert qmp("query-status")["running"]


def test_qmp_error_carries_qemus_words(vm: Machine) -> None:
    with pytest.raises(qvis.UsageError, match="no-such-command"):
        vm.qmp("no-such-command")


def test_host_key_is_checked(vm: Machine, tmp_path: Path) -> None:
    """A client that knows another key for this machine is refused."""
    from qvis.machine.ssh import Ssh, make_keys
    from qvis.openssh import CLIENT_KEY

    other = tmp_path / vm.name
    other.mkdir()
    make_keys(other)  # writes a known host with a key that the guest does not have
    (other / CLIENT_KEY).write_bytes((vm.folder / CLIENT_KEY).read_bytes())
    with pytest.raises(qvis.LostMachineError, match="host key"):
        Ssh(other, vm.info["ssh_port"]).connect(5)


def test_other_keys_do_not_log_in(vm: Machine, tmp_path: Path) -> None:
    from qvis.machine.ssh import Ssh, make_keys
    from qvis.openssh import KNOWN_HOSTS

    stranger = tmp_path / vm.name
    stranger.mkdir()
    make_keys(stranger)  # a key that the guest does not know
    (stranger / KNOWN_HOSTS).write_bytes((vm.folder / KNOWN_HOSTS).read_bytes())
    with pytest.raises(qvis.LostMachineError, match="Authentication"):
        Ssh(stranger, vm.info["ssh_port"]).connect(2)


def test_sockets_and_keys_are_private(vm: Machine) -> None:
    assert vm.folder.path.stat().st_mode & 0o777 == 0o700
    assert (vm.folder / "id_ed25519").stat().st_mode & 0o077 == 0


@pytest.fixture
def owner(backend: str) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Another process that makes a machine and says its folder when it is up."""
    children: list[subprocess.Popen[str]] = []

    def start(after: str) -> subprocess.Popen[str]:
        code = (
            "import qvis, time, sys\n"
            f"vm = qvis.up(backend={backend!r}, transport='intx', smp=1)\n"
            f"print(vm.folder.path, flush=True)\n{after}\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_machine_dies_with_its_owner(
    owner: Callable[[str], subprocess.Popen[str]], number: signal.Signals
) -> None:
    child = owner("time.sleep(60)")
    assert child.stdout
    folder = child.stdout.readline().strip()
    assert processes(folder)
    child.send_signal(number)
    assert gone(folder)
    end = time.monotonic() + 5
    while Path(folder).exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(folder).exists()


def test_killed_during_boot_leaves_nothing(state: Path, backend: str) -> None:
    folder = state / "machines" / "early"
    with subprocess.Popen(
        ["qvis", "up", "--backend", backend, "--transport", "intx", "--name", "early"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as child:  # fmt: skip
        try:
            end = time.monotonic() + 30
            while not any(MACHINE.search(line) for line in processes(str(folder))):
                assert time.monotonic() < end
                time.sleep(0.02)
        finally:
            child.kill()
    assert gone(str(folder))
    end = time.monotonic() + 5
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not folder.exists()


def test_killed_keeper_takes_the_machine_with_it(boot: Callable[..., Machine]) -> None:
    vm = boot(transport="intx", smp=1)
    vm.qmp("query-status")
    pid = vm.folder.keeper
    assert pid
    os.kill(pid, signal.SIGKILL)
    assert vm.folder.wait_dead(5)
    assert gone(str(vm.folder.path))
    with pytest.raises(qvis.LostMachineError):
        vm.qmp("query-status")
    with pytest.raises(qvis.LostMachineError):
        vm.ssh.run("true", deadline=5)


def test_killed_during_a_command_is_a_lost_machine(boot: Callable[..., Machine]) -> None:
    vm = boot(transport="intx", smp=1)
    killer = threading.Timer(0.5, os.kill, (vm.process, signal.SIGKILL))
    killer.start()
    with pytest.raises(qvis.LostMachineError):
        vm.ssh.run("sleep 30", deadline=30)
    killer.join()


def test_those_who_look_do_not_hold(tmp_path: Path) -> None:
    """Two that ask at once whether a dead machine lives both hear that it does not."""
    (tmp_path / "lock").touch()
    answers: list[bool] = []

    def look() -> None:
        answers.extend(Folder(tmp_path).alive for _ in range(500))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 2000
    assert not any(answers)


def test_it_is_told_how_a_machine_ended(boot: Callable[..., Machine]) -> None:
    orphan, shut_down = boot(transport="intx", smp=1), boot(transport="intx", smp=1)
    assert orphan.folder.keeper is not None
    os.kill(orphan.folder.keeper, signal.SIGKILL)
    assert orphan.folder.obituary(5) == ": nothing tells how"
    (orphan.folder.path / EXIT).write_text('{"status": "damaged"}')
    assert orphan.folder.obituary() == ": nothing tells how"
    shut_down.ssh.run("(sleep 0.2; poweroff -f) > /dev/null 2>&1 &")
    assert shut_down.folder.obituary(30).startswith(": the guest shut down, or ")


def test_killed_machine_is_noticed(boot: Callable[..., Machine], cli: Cli) -> None:
    vm = boot(transport="intx", smp=1)
    vm.detach()
    os.kill(vm.process, signal.SIGKILL)
    assert vm.folder.wait_dead(5)
    listed = json.loads(cli("ls", "--json").stdout)
    assert [m["state"] for m in listed if m["name"] == vm.name] == ["died (status -9)"]
    refused = cli("exec", vm.name, "--", "true")
    assert refused.returncode == qvis.LostMachineError.exit_code
    assert "is not running any more: " in refused.stderr
    assert " was killed by signal 9; " in refused.stderr
    assert "Linux version" in cli("logs", vm.name).stdout
    assert cli("down", vm.name).returncode == 0


def test_stale_folder_does_not_keep_a_name(state: Path, boot: Callable[..., Machine]) -> None:
    stale = state / "machines" / "again"
    stale.mkdir(parents=True)
    (stale / "machine.json").write_text("{half")
    (stale / "lock").write_text("1")  # init's number: must not be taken for a keeper
    vm = boot(transport="intx", smp=1, name="again")
    assert vm.ssh.run("hostname").stdout == "again\n"
    with pytest.raises(qvis.UsageError, match="already up"):
        boot(transport="intx", smp=1, name="again")


def test_guest_that_shuts_down_is_seen(boot: Callable[..., Machine]) -> None:
    vm = boot(transport="intx", smp=1)
    vm.ssh.run("(sleep 0.2; reboot -f) > /dev/null 2>&1 &")
    assert vm.folder.wait_dead(10)
    outcome = vm.folder.read("exit.json")
    assert outcome is not None
    assert (outcome["status"], outcome["asked"]) == (0, False)


def test_two_machines_at_once(boot: Callable[..., Machine]) -> None:
    first, second = boot(transport="msi", smp=1), boot(transport="pci", smp=1)
    assert first.name != second.name
    assert first.info["ssh_port"] != second.info["ssh_port"]
    assert first.ssh.run("hostname").stdout.strip() == first.name
    assert second.ssh.run("hostname").stdout.strip() == second.name


def test_a_path_too_long_for_sockets_is_said(monkeypatch: pytest.MonkeyPatch, state: Path) -> None:
    monkeypatch.setenv("QVIS_STATE", str(state / ("x" * 100)))
    with pytest.raises(qvis.InfraError, match="QVIS_STATE to a shorter folder"):
        qvis.up(backend="tcg", transport=Transport.INTX)


def test_folder_written_in_one_step(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("x.json", {"a": 1})
    assert folder.read("x.json") == {"a": 1}
    (tmp_path / "x.json").write_text('{"a": ')
    assert folder.read("x.json") is None
    assert not folder.alive
