# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest under KVM in an inner host: what comes out of it, and what does not."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator

import pytest

import qvis
from qvis.backends import Job
from qvis.machine.machine import Machine, Script, run_script
from qvis.openssh import client_command
from qvis.transport import Transport

HOST = "10.0.2.2"  # what an inner QEMU's user network calls the inner host
READY = 30.0  # seconds


@pytest.fixture(scope="module")
def nested() -> Iterator[Machine]:
    with qvis.up(backend="nested", transport="vis", smp=2, queues=2, name="nested") as vm:
        yield vm


def test_the_guest_is_under_kvm(nested: Machine) -> None:
    assert nested.qmp("query-kvm") == {"enabled": True, "present": True}
    assert "Hypervisor detected: KVM" in nested.ssh.run("dmesg").stdout
    assert nested.ssh.run("hostname").stdout == "nested\n"


def test_qmp_is_that_of_the_inner_qemu(nested: Machine) -> None:
    assert nested.qmp("query-name") == {"name": "qvis-nested"}
    with qvis.Machine.attach("nested") as again:  # a second session at the same time
        assert again.qmp("query-status")["status"] == "running"


def test_the_inner_host_can_be_logged_in_to(nested: Machine) -> None:
    assert nested.host is not None
    assert nested.host.run("uname -r").stdout.endswith("-qvis-host\n")
    words = ["cat", "/sys/module/kvm/parameters/halt_poll_ns"]
    command = client_command(nested.folder.path, words, host=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stdout == "0\n"


def test_the_consoles_are_apart(nested: Machine) -> None:
    with nested.console() as console:
        assert console.run("uname -r").endswith("-qvis")
    guest = (nested.folder / "console.log").read_text(errors="replace")
    host = (nested.folder / "host-console.log").read_text(errors="replace")
    assert "qvis-stage: host init" not in guest
    assert "qvis-stage: host init" in host
    assert "qvis-stage: ssh" not in host


def test_the_guest_reaches_nothing_of_the_inner_host(nested: Machine) -> None:
    for port in (2222, 4400, 4401):
        # Where this can be reached, it says something first.
        said = nested.ssh.run(f"nc -w 3 {HOST} {port} </dev/null", check=False, deadline=READY)
        assert said.stdout == ""
    assert nested.host is not None
    assert "QMP" in nested.host.run("nc -w 3 127.0.0.1 4400 </dev/null", deadline=READY).stdout


def test_traces_have_a_way_out(nested: Machine) -> None:
    assert nested.host is not None
    with socket.socket(socket.AF_UNIX) as outside:
        outside.settimeout(READY)
        outside.connect(str(nested.folder / "trace.sock"))
        nested.host.run("echo to the outside > /dev/virtio-ports/qvis.trace")
        assert outside.recv(100) == b"to the outside\n"


def test_interrupts_can_be_moved_and_caused(nested: Machine) -> None:
    nested.irqs.spread()
    vectors = {v.source: v for v in nested.irqs.vectors() if v.device == "virtio0"}
    assert vectors["req.0"].effective == {0}
    assert vectors["req.1"].effective == {1}
    before = sum(vectors["req.1"].counts.values())
    nested.ssh.run("qvis-load /dev/vda 1 100")
    after = {v.source: v for v in nested.irqs.vectors() if v.device == "virtio0"}
    assert sum(after["req.1"].counts.values()) >= before + 100


def test_a_guest_does_not_leave_its_inner_host(nested: Machine) -> None:
    with pytest.raises(qvis.UsageError, match="inner host cannot be migrated"):
        nested.migrate()
    assert nested.ssh.run("true").status == 0


def test_xapic_is_reached_by_memory() -> None:
    platform = qvis.Platform(qvis.Irqchip.ON, qvis.Apic.XAPIC, pv_eoi=False)
    with qvis.up(backend="nested", transport="msi", smp=1, platform=platform) as vm:
        assert " x2apic" not in vm.ssh.run("grep ^flags /proc/cpuinfo").stdout
        assert count(vm, "kvm_apic") > 100  # each EOI is a write that KVM emulates


def count(vm: Machine, event: str) -> int:
    """How often a tracepoint is hit while 100 requests are completed."""
    assert vm.host is not None
    enable = f"/sys/kernel/tracing/events/kvm/{event}/enable"
    vm.host.run(f"echo 1 > {enable}")
    vm.ssh.run("qvis-load /dev/vda 0 100")
    vm.host.run(f"echo 0 > {enable}")
    return int(vm.host.run(f"grep -c {event}: /sys/kernel/tracing/trace || true").stdout)


@pytest.mark.parametrize("pv_eoi", [True, False])
def test_paravirtual_eoi_is_used_where_it_is_offered(pv_eoi: bool) -> None:
    platform = qvis.Platform(qvis.Irqchip.ON, pv_eoi=pv_eoi)
    with qvis.up(backend="nested", transport="msi", smp=1, platform=platform) as vm:
        assert (count(vm, "kvm_pv_eoi") > 50) is pv_eoi


def repeatable() -> tuple[str, str]:
    """What both levels print in a run of which nothing is left to chance."""
    job = Job("qvis-load /dev/vda 0 100; cat /proc/interrupts\n", "true\n", "echo before QEMU\n")
    script = Script(job, 120.0, (), lambda folder: None, lambda machine: None)
    with run_script(script, backend="nested", transport=Transport.VIS, smp=1, icount=True) as vm:
        assert vm.qmp("query-status")["status"] == "shutdown"
        logs = [vm.folder / name for name in ("console.log", "host-console.log")]
        guest, host = (log.read_text(errors="replace") for log in logs)
        return guest, host


def test_a_run_can_be_repeated() -> None:
    (guest, host), again = repeatable(), repeatable()
    assert "before QEMU" in host
    assert "qvis-status: 0" in guest
    assert (guest, host) == again  # with the time of each message to the microsecond
