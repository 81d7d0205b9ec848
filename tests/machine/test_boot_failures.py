# SPDX-License-Identifier: GPL-2.0-or-later
"""Every way a boot can fail names its stage, shows the last lines, and leaves nothing."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import qvis
from qvis.backends.tcg import Tcg
from qvis.build import Entry, build_all, pack
from qvis.machine import boot as stages
from tests.conftest import gone


def failing(**changes: Path) -> Tcg:
    """A backend whose machines have some part replaced."""
    artifacts = build_all()
    for name, value in changes.items():
        if name == "initramfs":
            artifacts = dataclasses.replace(artifacts, initramfs=value)
        else:
            part, field = name.split("_")
            inner = dataclasses.replace(getattr(artifacts, part), **{field: value})
            artifacts = dataclasses.replace(artifacts, **{part: inner})
    return Tcg(artifacts)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def init(path: Path, text: str) -> Path:
    """An initramfs with busybox and this init."""
    busybox = Path("/bin/busybox").read_bytes()
    path.write_bytes(
        pack(
            [
                Entry.folder("bin"),
                Entry.folder("dev"),
                Entry.folder("etc"),
                Entry.folder("etc/dropbear"),
                Entry.folder("root"),
                Entry.folder("root/.ssh"),
                Entry("dev/console", 0o020600, device=(5, 1)),
                Entry.file("bin/busybox", busybox, 0o755),
                Entry.file("init", f"#!/bin/busybox sh\n{text}\n".encode(), 0o755),
            ]
        )
    )
    return path


@pytest.fixture
def fails(state: Path) -> Callable[..., qvis.QvisError]:
    """Boots what cannot boot; the error, once it is sure that nothing is left."""

    def run(backend: Tcg, **what: object) -> qvis.QvisError:
        with pytest.raises(qvis.QvisError) as caught:
            qvis.up(backend=backend, name="bad", smp=1, transport="intx", **what)  # type: ignore[arg-type]
        folder = state / "machines" / "bad"
        assert not folder.exists()
        assert gone(str(folder))
        assert caught.value.log
        assert caught.value.log.is_dir()
        assert caught.value.command
        return caught.value

    return run


def test_panic_ends_the_boot_at_once(fails: Callable[..., qvis.QvisError], tmp_path: Path) -> None:
    start = time.monotonic()
    problem = fails(failing(initramfs=init(tmp_path / "i", "exit 7")))
    assert isinstance(problem, qvis.BootError)
    assert problem.stage == "kernel"
    assert "panicked: Attempted to kill init" in str(problem)
    assert any("Kernel panic" in line for line in problem.tail)
    assert time.monotonic() - start < stages.CONSOLE_STAGES[1].deadline * Tcg.slowdown / 2


def test_kernel_without_an_init(fails: Callable[..., qvis.QvisError], tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(pack([Entry.folder("etc")]))
    problem = fails(failing(initramfs=tmp_path / "i"))
    assert isinstance(problem, qvis.BootError)
    assert problem.stage == "kernel"
    assert "panicked" in str(problem)


def test_init_that_hangs(
    fails: Callable[..., qvis.QvisError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [
        dataclasses.replace(stage, deadline=0.5) if stage.name == "init" else stage
        for stage in stages.CONSOLE_STAGES
    ]
    monkeypatch.setattr(stages, "CONSOLE_STAGES", short)
    text = "echo 'qvis-stage: init'; echo stuck here; /bin/busybox sleep 1000"
    problem = fails(failing(initramfs=init(tmp_path / "i", text)))
    assert isinstance(problem, qvis.BootError)
    assert problem.stage == "init"
    assert "within 3 s" in str(problem)
    assert problem.tail[-1] == "stuck here"


def test_guest_without_sshd(
    fails: Callable[..., qvis.QvisError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvis.machine.follow.SSH_DEADLINE", 0.5)
    text = (
        "for s in init network ssh; do echo qvis-stage: $s; done; echo no sshd; "
        "/bin/busybox sleep 1000"
    )
    problem = fails(failing(initramfs=init(tmp_path / "i", text)))
    assert isinstance(problem, qvis.BootError)
    assert problem.stage == "ssh"
    assert "no sshd" in problem.tail


def test_guest_that_shuts_down(fails: Callable[..., qvis.QvisError], tmp_path: Path) -> None:
    text = "echo 'qvis-stage: init'; /bin/busybox reboot -f"
    problem = fails(failing(initramfs=init(tmp_path / "i", text)))
    assert isinstance(problem, qvis.BootError)
    assert problem.stage == "init"
    assert "shut down or was reset" in str(problem)


def test_qemu_that_lacks_the_feature(fails: Callable[..., qvis.QvisError], tmp_path: Path) -> None:
    """What an unpatched QEMU does: the error carries its own words."""
    real = build_all().qemu.binary
    fake = script(tmp_path / "qemu", f'exec {real} "$@" -global virtio-mmio.no-such-thing=1')
    problem = fails(failing(qemu_binary=fake))
    assert isinstance(problem, qvis.InfraError)
    assert problem.stage == "launch"
    assert "no-such-thing" in str(problem)


def test_qemu_that_dies_without_a_word(
    fails: Callable[..., qvis.QvisError], tmp_path: Path
) -> None:
    start = time.monotonic()
    problem = fails(failing(qemu_binary=script(tmp_path / "qemu", "exit 3")))
    assert isinstance(problem, qvis.InfraError)
    assert "status 3" in str(problem)
    assert time.monotonic() - start < 5


def test_qemu_that_hangs(
    fails: Callable[..., qvis.QvisError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvis.machine.follow.LAUNCH_DEADLINE", 1.0)
    problem = fails(failing(qemu_binary=script(tmp_path / "qemu", "exec sleep 1000")))
    assert isinstance(problem, qvis.InfraError)
    assert problem.stage == "launch"


def test_qemu_that_does_not_speak(
    fails: Callable[..., qvis.QvisError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A monitor that accepts and says nothing does not hold the launch beyond its deadline."""
    monkeypatch.setattr("qvis.machine.follow.LAUNCH_DEADLINE", 2.0)
    mute = tmp_path / "mute.py"
    mute.write_text(
        "import socket, time\ns = socket.socket(socket.AF_UNIX)\n"
        "s.bind('qmp0.sock')\ns.listen()\ntime.sleep(1000)\n"
    )
    start = time.monotonic()
    qemu = script(tmp_path / "qemu", f"exec {sys.executable} {mute}")
    problem = fails(failing(qemu_binary=qemu))
    assert isinstance(problem, qvis.InfraError)
    assert problem.stage == "launch"
    assert time.monotonic() - start < 20


def test_image_that_is_no_kernel(
    fails: Callable[..., qvis.QvisError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tcg, "slowdown", 0.5)
    (tmp_path / "bzImage").write_bytes(b"\0" * 65536)
    problem = fails(failing(linux_image=tmp_path / "bzImage"))
    assert problem.stage in ("launch", "firmware")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_all()
    small = tmp_path / "d"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "qvis-test", small], check=True)
    try:
        monkeypatch.setenv("QVIS_STATE", str(small))
        with pytest.raises(qvis.InfraError, match="No space left on device"):
            qvis.up(backend="tcg", transport="intx", name="full")
        assert not list((small / "machines").iterdir())
        # Room again, and it works.
        subprocess.run(["mount", "-o", "remount,size=64M", small], check=True)
        with qvis.up(backend="tcg", transport="intx", name="full", smp=1) as vm:
            assert vm.ssh.run("true").status == 0
    finally:
        subprocess.run(["umount", "-l", small], check=True)
