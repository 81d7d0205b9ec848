# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs against a real guest, as a user types them."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable

import qvis
from qvis.machine.machine import Machine

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_up_ls_exec_irq_down(cli: Cli, backend: str) -> None:
    up = cli("up", "--backend", backend, "--transport", "msi", "--smp", "2", "--queues", "2",
             "--name", "typed", "--json")  # fmt: skip
    assert up.returncode == 0, up.stderr
    info = json.loads(up.stdout)
    assert info["spec"]["queues"] == 2
    try:
        assert "typed" in cli("ls").stdout
        (listed,) = (m for m in json.loads(cli("ls", "--json").stdout) if m["name"] == "typed")
        assert listed["state"] == "running"
        assert cli("exec", "typed", "--", "sh", "-c", "exit 42").returncode == 42
        assert cli("exec", "typed", "echo", "a  b", "$HOME").stdout == "a  b $HOME\n"
        assert cli("exec", "typed", "--", "cat", input="through\n").stdout == "through\n"

        vectors = json.loads(cli("irq", "typed", "--json").stdout)
        (first,) = (v for v in vectors if v["source"] == "req.0")
        moved = cli("irq", "typed", "set", str(first["irq"]), "1", "--json")
        assert json.loads(moved.stdout)[0]["affinity"] == "1"
        loaded = json.loads(cli("load", "typed", "0", "--count", "50").stdout)
        assert loaded["completed"] == 50
        after = json.loads(cli("irq", "typed", "--json").stdout)
        (again,) = (v for v in after if v["irq"] == first["irq"])
        assert again["counts"]["1"] - first["counts"]["1"] >= 50
        assert cli("irq", "typed", "spread").returncode == 0

        refused = cli("irq", "typed", "set", str(first["irq"]), "7")
        assert refused.returncode == 2
        assert "no such CPU in the guest: 7; it has 0-1 online" in refused.stderr

        assert json.loads(cli("qmp", "typed", "query-status").stdout)["running"]
        hmp = cli("qmp", "typed", "human-monitor-command", "command-line=info version")
        assert "10.2" in json.loads(hmp.stdout)
        bad = cli("qmp", "typed", "qom-get", "path=/nowhere", "property=x")
        assert bad.returncode == 2
        assert "Traceback" not in bad.stderr

        used = cli("up", "--backend", backend, "--name", "typed")
        assert used.returncode == 2
        assert "already up" in used.stderr
    finally:
        assert cli("down", "typed").stdout == "typed is gone\n"
    assert cli("exec", "typed", "--", "true").returncode == 2


def test_exec_does_not_hold_its_callers_pipes(cli: Cli, vm: Machine) -> None:
    """OpenSSH's background session must not keep a captured output open."""
    start = time.monotonic()
    for _ in range(3):
        assert cli("exec", vm.name, "--", "echo", "x").stdout == "x\n"
    assert time.monotonic() - start < 60


def test_qmp_events(vm: Machine) -> None:
    with subprocess.Popen(
        ["qvis", "qmp", vm.name, "--events"], stdout=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout
        names: list[str] = []
        end = time.monotonic() + 20
        while "RESUME" not in names and time.monotonic() < end:
            vm.qmp("stop")
            vm.qmp("cont")
            while select.select([follower.stdout], [], [], 0.2)[0]:
                names.append(json.loads(follower.stdout.readline())["event"])
                if names[-1] == "RESUME":
                    break
        follower.terminate()
    assert names[:2] == ["STOP", "RESUME"]


def test_console_on_a_terminal(vm: Machine) -> None:
    """Ctrl-] leaves it, and the terminal is as it was."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        ["qvis", "console", vm.name], stdin=follower, stdout=follower, stderr=subprocess.DEVNULL
    ) as client:
        time.sleep(0.5)
        os.write(leader, b"\recho con''sole-$((40+2))\r")
        said = b""
        end = time.monotonic() + 20
        while b"console-42" not in said and time.monotonic() < end:
            if select.select([leader], [], [], 0.2)[0]:
                said += os.read(leader, 4096)
        os.write(leader, b"\x1d")
        assert client.wait(10) == 0
    os.close(leader)
    os.close(follower)
    assert b"console-42" in said


def test_ssh_passes_the_status_on(vm: Machine) -> None:
    done = subprocess.run(
        ["qvis", "ssh", vm.name], input="exit 5\n", capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 5


def test_doctor(cli: Cli) -> None:
    done = cli("doctor")
    assert done.returncode == 0, done.stdout
    for check in ("python", "packages", "cache", "qemu series", "linux series", "backend tcg"):
        assert f"ok       {check}: " in done.stdout
    verdicts = {f["check"]: f["verdict"] for f in json.loads(cli("doctor", "--json").stdout)}
    assert "missing" not in verdicts.values()


def test_doctor_names_a_remedy(cli: Cli) -> None:
    done = cli("doctor", env={**os.environ, "PATH": os.environ["PATH"], "QVIS_PATCHES": "/nowhere"})
    assert done.returncode == qvis.InfraError.exit_code
    assert "missing" in done.stdout


def test_backend_that_does_not_work(cli: Cli) -> None:
    from qvis import backends

    if backends.available()["kvm"].probe().works:
        done = cli("up", "--backend", "kvm", "--smp", "1", "--name", "k")
        assert done.returncode == 0
        cli("down", "k")
        return
    done = cli("up", "--backend", "kvm")
    assert done.returncode == qvis.InfraError.exit_code
    assert "backend kvm does not work here: " in done.stderr


def test_exec_says_that_its_guest_has_died(cli: Cli) -> None:
    with qvis.up(backend="tcg", transport="msi", smp=1) as vm:
        done = cli("exec", vm.name, "--", "sh", "-c", "echo c > /proc/sysrq-trigger")
        assert done.returncode == qvis.LostMachineError.exit_code
        assert "the guest panicked: sysrq triggered crash" in done.stderr


def test_exec_says_that_its_machine_was_taken_down(cli: Cli) -> None:
    with qvis.up(backend="emulated", transport="msi", smp=1) as vm, subprocess.Popen(
        ["qvis", "exec", vm.name, "--", "sh", "-c", "echo up; sleep 1000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout
        assert child.stderr
        assert child.stdout.readline() == "up\n"
        assert cli("down", vm.name).returncode == 0
        assert child.wait(20) == qvis.LostMachineError.exit_code
        said = child.stderr.read()
        # Its folder may be there still.
        assert re.search("not running any more: (it was taken down|.* was told to end)", said)


def test_a_signal_to_exec_ends_it(vm: Machine) -> None:
    with subprocess.Popen(
        ["qvis", "exec", vm.name, "--", "sh", "-c", "echo up; exec sleep 1000"],
        stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout
        assert child.stdout.readline() == "up\n"
        child.terminate()
        assert child.wait(20) == 128 + signal.SIGTERM
