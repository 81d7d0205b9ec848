# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever fails, at whatever level: the error names it, and nothing is left."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qvis
from qvis.backends import nested
from qvis.backends.nested import Nested
from qvis.backends.qemu import Accelerator
from qvis.build import Entry, build_all, pack
from qvis.build import Host as HostBuild
from qvis.machine import boot as stages
from qvis.machine.machine import Machine
from qvis.spec import MachineSpec
from tests.conftest import gone

Fails = Callable[..., qvis.QvisError]


class Other(Nested):
    """A nested backend with other options for the inner QEMU, or something added to the host."""

    def __init__(self, *options: str, host: bytes = b"", guest: bytes = b"") -> None:
        artifacts = build_all()
        super().__init__(artifacts)
        self._options, self._host_more, self._guest_more = options, host, guest

    def host(self) -> HostBuild:
        host = super().host()
        return dataclasses.replace(host, initramfs=_Longer(host.initramfs, self._host_more))

    def artifacts(self) -> qvis.build.Artifacts:
        artifacts = super().artifacts()
        longer = _Longer(artifacts.initramfs, self._guest_more)
        return dataclasses.replace(artifacts, initramfs=longer)

    def accelerator(self, spec: MachineSpec) -> Accelerator:
        usual = super().accelerator(spec)
        return dataclasses.replace(usual, options=(*usual.options, *self._options))


class _Longer(type(Path())):  # type: ignore[misc]  # the class of this platform's paths
    """A file to whose content something is appended when it is read."""

    def __new__(cls, path: Path, more: bytes) -> _Longer:
        self: _Longer = super().__new__(cls, path)
        self.more = more
        return self

    def read_bytes(self) -> bytes:
        return Path(str(self)).read_bytes() + self.more


def init(text: str) -> bytes:
    return pack([Entry.file("init", f"#!/bin/sh\n{text}\n".encode(), 0o755)])


@pytest.fixture
def fails(state: Path) -> Fails:
    """Boots what cannot boot; the error, once it is sure that nothing is left."""

    def run(backend: Nested, **what: object) -> qvis.QvisError:
        with pytest.raises(qvis.QvisError) as caught:
            qvis.up(backend=backend, name="bad", **{"smp": 1, "transport": "intx", **what})  # type: ignore[arg-type]
        folder = state / "machines" / "bad"
        assert not folder.exists()
        assert gone(str(folder))
        return caught.value

    return run


def test_a_guest_that_panics(fails: Fails) -> None:
    problem = fails(Other(guest=init("exit 7")))
    assert isinstance(problem, qvis.BootError)
    assert problem.stage == "kernel"
    assert "the guest panicked: Attempted to kill init" in str(problem)
    assert any("Kernel panic" in line for line in problem.tail)
    assert problem.log
    assert (problem.log / "host-console.log").exists()


def test_an_inner_host_that_panics(fails: Fails) -> None:
    problem = fails(Other(host=init("exit 7")))
    assert isinstance(problem, qvis.BootError)
    assert problem.stage == "host kernel"
    assert "the inner host panicked: Attempted to kill init" in str(problem)


def test_an_inner_host_that_hangs(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [
        dataclasses.replace(stage, deadline=0.2) if stage.name == "host init" else stage
        for stage in stages.HOST_STAGES
    ]
    monkeypatch.setattr("qvis.machine.follow.HOST_STAGES", short)
    problem = fails(Other(host=init("echo qvis-stage: host init; echo stuck here; sleep 1000")))
    assert isinstance(problem, qvis.BootError)
    assert problem.stage == "host init"
    assert "the inner host's console within" in str(problem)
    assert problem.tail[-1] == "stuck here"


def test_an_inner_host_that_shuts_down(fails: Fails) -> None:
    problem = fails(Other(host=init("/bin/busybox reboot -f")))
    assert "the inner host shut down or was reset" in str(problem)


def test_a_guest_that_shuts_down(fails: Fails) -> None:
    problem = fails(Other(guest=init("/bin/busybox reboot -f")))
    assert isinstance(problem, qvis.BootError)
    assert "the guest shut down or was reset" in str(problem)


def test_an_inner_qemu_that_refuses_its_command_line(fails: Fails) -> None:
    problem = fails(Other("-global", "virtio-mmio.no-such-thing=1"))
    assert isinstance(problem, qvis.BootError)
    assert "the inner QEMU ended with status 1: " in str(problem)
    assert "no-such-thing" in str(problem)


def test_a_processor_without_svm(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = nested._outer

    def without(spec: MachineSpec) -> Accelerator:
        return dataclasses.replace(usual(spec), cpu="max,svm=off")

    monkeypatch.setattr(nested, "_outer", without)
    problem = fails(Other())
    assert isinstance(problem, qvis.BootError)
    assert problem.stage == "host init"
    assert "the inner host: no KVM: /dev/kvm" in str(problem)


def test_too_little_memory_on_this_host(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested, "_available", lambda: 600)
    problem = fails(Nested(), memory=512)
    assert isinstance(problem, qvis.InfraError)
    assert "needs 1024 MiB for a guest with 512, and this host has 600 left" in str(problem)


@contextlib.contextmanager
def lost(why: str) -> Iterator[Machine]:
    """A machine that is to die in the block, of the level that ``why`` names."""
    with qvis.up(backend="nested", transport="intx", smp=1, name="dying") as vm:
        yield vm
        with pytest.raises(qvis.LostMachineError, match=why):
            vm.ssh.run("sleep 60")
        assert vm.folder.wait_dead(10)
        with pytest.raises(qvis.LostMachineError, match=why):
            qvis.Machine.attach("dying")


def test_an_inner_qemu_that_is_killed() -> None:
    with lost("the inner QEMU was killed by signal 9") as vm:
        assert vm.host is not None
        vm.host.run("kill -9 $(cat /run/qemu.pid)")


def test_an_inner_host_that_panics_later() -> None:
    with lost("the inner host panicked: sysrq triggered crash") as vm:
        assert vm.host is not None
        vm.host.run("(sleep 1; echo c > /proc/sysrq-trigger) >/dev/null 2>&1 &")


def test_an_inner_host_that_runs_out_of_memory() -> None:
    with lost("the inner host ran out of memory and killed qemu") as vm:
        assert vm.host is not None
        fill = "mount -o remount,size=100% /tmp; (sleep 1; cat /dev/zero > /tmp/fill)"
        vm.host.run(f"({fill}) >/dev/null 2>&1 &")


def test_a_guest_that_panics_later() -> None:
    with lost("the guest panicked: sysrq triggered crash") as vm:
        vm.ssh.run("(sleep 1; echo c > /proc/sysrq-trigger) >/dev/null 2>&1 &")
