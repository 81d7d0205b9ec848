# SPDX-License-Identifier: GPL-2.0-or-later
"""Recording from tracefs: from this host's own where it lets us, and what is said where not.

A process that makes a virtual machine and signals a known number of MSIs to it
stands for QEMU. Its vCPU never runs, so that any /dev/kvm will do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest

from qvis.errors import InfraError, LostMachineError
from qvis.trace import tracefs
from qvis.trace.kvm import Reader
from qvis.trace.model import Kind
from qvis.trace.tracefs import Recorder, probe

SIGNALLER = """
import fcntl, os, struct, sys, threading
def number(n, size=0, way=0): return way << 30 | size << 16 | 0xAE << 8 | n
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, number(0x01), 0)
fcntl.ioctl(vm, number(0x60), 0)  # KVM_CREATE_IRQCHIP
vcpu = fcntl.ioctl(vm, number(0x41), 0)
lapic = bytearray(1024)
fcntl.ioctl(vcpu, number(0x8E, 1024, 2), lapic)
lapic[0xF1] |= 1  # enabled
fcntl.ioctl(vcpu, number(0x8F, 1024, 1), bytes(lapic))
def signal(count):
    for i in range(count):
        msi = struct.pack("<IIII16x", 0xFEE00000, 0, 32 + i % 200, 0)
        fcntl.ioctl(vm, number(0xA5, 32, 1), msi)
print("ready", flush=True)
for line in sys.stdin:
    count = int(line)
    if count < 0:  # in a thread that did not exist before
        thread = threading.Thread(target=signal, args=(-count,))
        thread.start()
        thread.join()
    signal(count)
    print("done", flush=True)
"""


class Signaller:
    """A virtual machine that is sent MSIs."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SIGNALLER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        if self._answer() != "ready\n":
            self.process.wait()
            assert self.process.stderr
            pytest.skip(f"no virtual machine: {self.process.stderr.read().splitlines()[-1]}")

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def signal(self, count: int) -> None:
        """Send so many MSIs, with vectors 32 to 231 in turn; if negative, from a new thread."""
        assert self.process.stdin
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        assert self._answer() == "done\n"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """This host's tracefs, mounted for these tests if it is not, with the events of KVM."""
    place = tracefs.TRACEFS
    mounted = None
    if not (place / "events").is_dir() and os.geteuid() == 0:
        place = mounted = tmp_path_factory.mktemp("tracefs")
        done = subprocess.run(["mount", "-t", "tracefs", "tracefs", place], capture_output=True)
        if done.returncode:
            pytest.skip(f"tracefs cannot be mounted: {done.stderr.decode().strip()}")
    try:
        if reason := probe(place):
            pytest.skip(reason)
        yield place
        assert not list((place / "instances").glob(f"qvis-{os.getpid()}-*"))
    finally:
        if mounted:
            subprocess.run(["umount", mounted], check=True)


@pytest.fixture
def signaller() -> Iterator[Callable[[], Signaller]]:
    started: list[Signaller] = []

    def start() -> Signaller:
        started.append(Signaller())
        return started[-1]

    yield start
    for one in started:
        one.end()


def instances(root: Path) -> list[str]:
    return [path.name for path in (root / "instances").glob("qvis-*")]


def test_all_events_of_the_one_machine_are_recorded(
    root: Path, tmp_path: Path, signaller: Callable[[], Signaller]
) -> None:
    mine, other = signaller(), signaller()
    raw = tmp_path / "raw"
    mine.signal(10)  # before
    started = time.monotonic_ns()
    with Recorder(mine.pid, {mine.pid: 3}, raw, root=root) as recorder:
        assert len(instances(root)) == 1
        other.signal(500)
        mine.signal(20_000)
        mine.signal(-3_000)
        time.sleep(3 * tracefs.INTERVAL)  # an idle buffer makes no pages
        mine.signal(7)
    ended = time.monotonic_ns()
    mine.signal(10)  # behind
    assert instances(root) == []
    assert recorder.lost == 0 and recorder.partial == ()
    reader = Reader(raw)
    got = pl.concat(reader.frames())
    assert reader.lost == 0 and reader.partial == ()
    assert got["kind"].to_list() == [Kind.RAISE] * 23_007
    assert set(got["vcpu"]) == {0}  # KVM's number of it: it never ran, so nobody knows better
    ran = [*range(20_000), *range(3_000), *range(7)]
    assert got["vector"].to_list() == [32 + i % 200 for i in ran]
    assert got["time"].is_sorted()
    assert started < got["time"][0] and got["time"][-1] < ended
    pages = sum(path.stat().st_size for path in raw.glob("cpu*.raw")) / 4096
    assert pages < 23_007 * 32 / 4096 * 2 + 20
    assert not (raw / "reserve").exists()


def test_lost_events_are_counted(
    root: Path,
    tmp_path: Path,
    signaller: Callable[[], Signaller],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracefs, "BUFFER_MIN", 64)
    monkeypatch.setattr(tracefs, "BUFFER_MAX", 64)
    monkeypatch.setattr(tracefs, "INTERVAL", 30)
    machine = signaller()
    with Recorder(machine.pid, {}, tmp_path / "raw", root=root) as recorder:
        machine.signal(30_000)
    assert recorder.lost > 10_000 and recorder.partial == ()
    reader = Reader(tmp_path / "raw")
    got = pl.concat(reader.frames())
    assert reader.lost == recorder.lost
    assert got.height + reader.lost == 30_000


class Unforeseen(BaseException):
    """Nothing that anybody catches."""


@pytest.mark.parametrize("problem", [KeyboardInterrupt, SystemExit, ValueError, Unforeseen])
def test_the_instance_goes_whatever_happens(
    problem: type[BaseException],
    root: Path,
    tmp_path: Path,
    signaller: Callable[[], Signaller],
) -> None:
    machine = signaller()
    with pytest.raises(problem), Recorder(machine.pid, {}, tmp_path / "raw", root=root):
        machine.signal(100)
        raise problem
    assert instances(root) == []
    assert sum(frame.height for frame in Reader(tmp_path / "raw").frames()) == 100
    assert "qvis-trace" not in {thread.name for thread in threading.enumerate()}


def test_no_such_process(root: Path, tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(LostMachineError, match=f"no process {gone.pid}"):
        Recorder(gone.pid, {}, tmp_path / "raw", root=root).__enter__()
    assert instances(root) == []


def test_a_machine_that_ends_meanwhile(
    root: Path, tmp_path: Path, signaller: Callable[[], Signaller]
) -> None:
    machine = signaller()
    with Recorder(machine.pid, {}, tmp_path / "raw", root=root) as recorder:
        machine.signal(100)
        machine.end()
    assert recorder.partial == ()
    assert sum(frame.height for frame in Reader(tmp_path / "raw").frames()) == 100


def test_a_full_disk_ends_the_recording_and_keeps_it(
    root: Path, tmp_path: Path, signaller: Callable[[], Signaller]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=640k", "tmpfs"]
    if subprocess.run(["mount", *options, disk], capture_output=True).returncode:
        pytest.skip("no small disk: mount is not permitted")
    try:
        machine = signaller()
        with Recorder(machine.pid, {}, disk / "raw", root=root) as recorder:
            machine.signal(20_000)
            time.sleep(5 * tracefs.INTERVAL)
            machine.signal(20_000)
        (reason,) = recorder.partial
        assert "No space left on device" in reason and "is kept" in reason
        reader = Reader(disk / "raw")
        got = pl.concat(reader.frames())
        assert reader.partial == (reason,)  # and no page is cut
        assert 2_000 < got.height < 40_000
        assert got["vector"].to_list() == [32 + i % 200 for i in range(got.height)]
    finally:
        subprocess.run(["umount", disk], check=True)
    assert instances(root) == []


def test_instances_of_killed_recorders_are_removed(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys, os, signal\nfrom pathlib import Path\n"
        "from qvis.trace.tracefs import Recorder\n"
        "Recorder(os.getpid(), {}, Path(sys.argv[1]), root=Path(sys.argv[2])).__enter__()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "a", root])
    assert killed.returncode == -9 and len(instances(root)) == 1
    with Recorder(os.getpid(), {}, tmp_path / "b", root=root):
        assert [name.split("-")[1] for name in instances(root)] == [str(os.getpid())]
    assert instances(root) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_told_what_would_permit_it(root: Path) -> None:
    os.seteuid(65534)
    try:
        reason = str(probe(root))
    finally:
        os.seteuid(0)
    assert "this user may not use tracefs" in reason
    assert f"`mount -o remount,uid=65534 {root}` as root" in reason


# Folders that look like tracefs, for what this host is not.


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder with what the probe looks at."""
    for event in ("kvm_exit", "kvm_entry"):
        (tmp_path / "t/events/kvm" / event).mkdir(parents=True)
    (tmp_path / "t/instances").mkdir()
    (tmp_path / "t/trace_clock").write_text("[local] global mono x86-tsc\n")
    assert probe(tmp_path / "t") is None
    return tmp_path / "t"


def test_why_not(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as denied:
        denied.setattr(os, "access", lambda *_, **__: False)
        denied.setattr(os, "geteuid", lambda: 1000)
        assert f"`mount -o remount,uid=1000 {fake}` as root" in str(probe(fake))
        denied.setattr(os, "geteuid", lambda: 0)
        assert "not even root" in str(probe(fake))
    (fake / "events/kvm/kvm_entry").rmdir()
    assert probe(fake) == "this kernel's kvm has no event kvm_entry"
    (fake / "events/kvm/kvm_exit").rmdir()
    (fake / "events/kvm").rmdir()
    assert "load KVM (`modprobe kvm_intel` or `kvm_amd` as root)" in str(probe(fake))
    (fake / "instances").rmdir()
    assert probe(fake) == "this kernel's tracefs has no instances"
    for place in (tmp_path / "nowhere", tmp_path):
        known = "\ttracefs\n" in Path("/proc/filesystems").read_text()
        message = f"`mount -t tracefs tracefs {place}` as root" if known else "has no tracefs"
        assert message in str(probe(place))
    with pytest.raises(InfraError, match="no instances"):
        Recorder(os.getpid(), {}, tmp_path / "raw", root=fake).__enter__()


def test_a_refusal_leaves_no_instance(fake: Path, tmp_path: Path) -> None:
    """A folder made in a plain folder has none of the files that one in tracefs has."""
    with pytest.raises(InfraError, match=r"cannot record: .*No such file.*tracing_on"):
        Recorder(os.getpid(), {}, tmp_path / "raw", root=fake).__enter__()
    assert list((fake / "instances").iterdir()) == []
