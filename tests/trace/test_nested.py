# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings that come out of an inner host: what its recorder says, and what it must not do here.

The recorder is played by a thread with the pages of a real recording; the real one is in
tests/nested.
"""

from __future__ import annotations

import fcntl
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest

from qvis.errors import InfraError, LostMachineError, UsageError
from qvis.folder import TRACE_SOCKET
from qvis.trace import nested
from qvis.trace.kvm import EVENTS, Reader, Recording
from qvis.trace.model import Clock

from .recordings import unpack

PAGE = 4096
Answer = Callable[["Host", str, str], None]


class Host:
    """The inner host's end of the port: ``answer`` is given each command and its token."""

    def __init__(self, folder: Path, raw: Path, answer: Answer) -> None:
        self.raw = raw
        self.pairs = [f"{ns} {tsc}" for ns, tsc in Recording.load(raw).pairs]
        self.heard: list[list[str]] = []
        self._answer = answer
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(folder / TRACE_SOCKET))
        self._server.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._line, _ = self._server.accept()
        except OSError:
            return
        with self._line, self._line.makefile("r") as lines:
            for line in lines:
                verb, token, *words = line.split()
                self.heard.append([verb, *words])
                try:
                    self._answer(self, verb, token)
                except EOFError:
                    return

    def send(self, content: bytes) -> None:
        self._line.sendall(content)

    def frame(self, name: str, content: bytes = b"") -> None:
        self.send(f"{name} {len(content)}\n".encode() + content)

    def file(self, name: str) -> None:
        self.frame(name, (self.raw / name).read_bytes())

    def formats(self) -> None:
        self.frame("pair", self.pairs[0].encode())
        for path in sorted((self.raw / "events").rglob("*")):
            if path.is_file():
                self.file(str(path.relative_to(self.raw)))

    def pages(self, first: int = 0, last: int | None = None) -> None:
        """The pages of both CPUs in turn."""
        for name in ("cpu0.raw", "cpu1.raw"):
            content = (self.raw / name).read_bytes()
            pages = [content[at : at + PAGE] for at in range(0, len(content), PAGE)]
            for page in pages[first:last]:
                self.frame(name, page)

    def rest(self) -> None:
        for cpu in (0, 1):
            self.file(f"per_cpu/cpu{cpu}/stats")
        self.frame("pair", self.pairs[1].encode())
        self.frame("ended")

    def end(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(5)
        assert not self._thread.is_alive()


def in_order(host: Host, verb: str, token: str) -> None:
    """What a recorder does with which nothing is wrong."""
    host.frame(f"@{token}")
    if verb == "start":
        host.formats()
        host.frame("started")
        host.pages(0, 5)
    else:
        if len(host.heard) == 1:
            host.formats()
        host.pages(5 if len(host.heard) > 1 else 0)
        host.rest()


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[[Answer], Host]]:
    original = unpack("msi", tmp_path / "original")
    hosts: list[Host] = []

    def start(answer: Answer) -> Host:
        hosts.append(Host(tmp_path, original, answer))
        return hosts[-1]

    yield start
    for host in hosts:
        host.end()


@pytest.fixture
def recorder(tmp_path: Path) -> nested.Recorder:
    (tmp_path / "raw").mkdir()
    return nested.Recorder(tmp_path, tmp_path / "raw", Clock.TSC)


def events(raw: Path) -> pl.DataFrame:
    return pl.concat(Reader(raw).frames())


@pytest.mark.parametrize("from_boot", [False, True])
def test_a_recording_arrives_as_it_was_sent(
    play: Callable[[Answer], Host], recorder: nested.Recorder, tmp_path: Path, from_boot: bool
) -> None:
    host = play(in_order)
    if not from_boot:
        recorder.start()
    assert recorder.stop() == []
    assert host.heard == ([] if from_boot else [["start", *EVENTS]]) + [["stop"]]
    raw = tmp_path / "raw"
    for name in ("cpu0.raw", "cpu1.raw", "per_cpu/cpu1/stats", "events/header_page"):
        assert (raw / name).read_bytes() == (host.raw / name).read_bytes()
    theirs, mine = events(host.raw), events(raw)
    assert mine.drop("vcpu").equals(theirs.drop("vcpu"))
    exits = theirs["kind"] == "exit"
    assert mine.filter(exits)["vcpu"].equals(theirs.filter(exits)["vcpu"])  # by KVM's own word


def test_without_a_clock_that_measures_there_are_no_durations(
    play: Callable[[Answer], Host], tmp_path: Path
) -> None:
    play(in_order)
    (tmp_path / "raw").mkdir()
    recorder = nested.Recorder(tmp_path, tmp_path / "raw", nested.clock(icount=False))
    assert recorder.stop() == []
    mine = events(tmp_path / "raw")
    assert mine["clock"].null_count() == mine["duration"].null_count() == len(mine) > 0
    assert mine["time"].is_sorted()


def test_when_instructions_are_counted_each_is_a_nanosecond(
    play: Callable[[Answer], Host], tmp_path: Path
) -> None:
    """Whenever the recording was asked for, which is all that differs between two boots."""
    host = play(in_order)
    (tmp_path / "raw").mkdir()
    recorder = nested.Recorder(tmp_path, tmp_path / "raw", nested.clock(icount=True))
    assert recorder.stop() == []
    mine = events(tmp_path / "raw")
    ns, tsc = map(int, host.pairs[0].split())
    assert (mine["time"] - mine["clock"].cast(pl.Int64) == ns - tsc).all()


def test_what_was_meant_for_somebody_before_is_skipped(
    play: Callable[[Answer], Host], recorder: nested.Recorder
) -> None:
    def after_somebody(host: Host, verb: str, token: str) -> None:
        if verb == "start":
            host.send(b"cpu0.raw 4096\n" + bytes(100) + b"@0123456789abcdef 0\nended 0\n")
        in_order(host, verb, token)

    play(after_somebody)
    recorder.start()
    assert recorder.stop() == []


def test_an_inner_host_that_refuses_says_why(
    play: Callable[[Answer], Host], recorder: nested.Recorder
) -> None:
    def refuse(host: Host, verb: str, token: str) -> None:
        host.frame(f"@{token}")
        host.frame("error", b"cannot make instances/qvis: Read-only file system")

    play(refuse)
    with pytest.raises(InfraError, match=r"cannot record: cannot make .*Read-only"):
        recorder.start()


def test_without_a_recorder_the_machine_is_lost(recorder: nested.Recorder, tmp_path: Path) -> None:
    with pytest.raises(LostMachineError, match="cannot be reached"):
        recorder.start()
    assert "cannot be reached" in recorder.stop()[0]
    assert "cannot be reached" in Recording.load(tmp_path / "raw").partial[0]


def test_what_came_before_a_machine_died_is_kept(
    play: Callable[[Answer], Host], recorder: nested.Recorder, tmp_path: Path
) -> None:
    def die(host: Host, verb: str, token: str) -> None:
        in_order(host, "start", token)
        host.frame("pair", host.pairs[1].encode())
        host.send(b"cpu0.raw 4096\n" + bytes(1000))
        raise EOFError

    host = play(die)
    recorder.start()
    (reason,) = {*recorder.stop()} - {"the inner host's recorder is gone: Broken pipe"}
    assert "the machine was gone before the recording had ended" in reason
    raw = tmp_path / "raw"
    for name in ("cpu0.raw", "cpu1.raw"):
        assert (raw / name).read_bytes() == (host.raw / name).read_bytes()[: 5 * PAGE]
    assert reason in Reader(raw).partial
    assert len(events(raw)) > 100


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"../../evil 3\nabc", "evil"),
        (b"cpu0.raw 99999999\n", "99999999"),
        (b"cpu0.raw -1\n", "-1"),
        (b"\x00" * 300, "begins with"),
        (b"pair 3\nabc", "invalid literal"),
    ],
)
def test_nonsense_from_the_inner_host_ends_the_recording(
    play: Callable[[Answer], Host], recorder: nested.Recorder, tmp_path: Path, said: bytes, why: str
) -> None:
    def talk(host: Host, verb: str, token: str) -> None:
        if verb == "start":
            in_order(host, verb, token)
            host.send(said)

    play(talk)
    recorder.start()
    reasons = recorder.stop()
    assert any("does not make sense" in reason and why in reason for reason in reasons), reasons
    assert not (tmp_path.parent / "evil").exists()
    assert list(Recording.load(tmp_path / "raw").partial) == reasons


def test_silence_has_an_end(
    play: Callable[[Answer], Host], recorder: nested.Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_only(host: Host, verb: str, token: str) -> None:
        if verb == "start":
            in_order(host, verb, token)

    play(start_only)
    recorder.start()
    monkeypatch.setattr(nested, "SILENCE", 0.3)
    assert any("did not say anything" in reason for reason in recorder.stop())


def test_a_full_disk_keeps_whole_pages_and_is_told(
    play: Callable[[Answer], Host], recorder: nested.Recorder, tmp_path: Path
) -> None:
    (tmp_path / "raw" / "cpu1.raw").symlink_to("/dev/full")
    play(in_order)
    recorder.start()
    assert recorder.stop() == ["no room for more on the disk: what came until then was kept"]
    assert (tmp_path / "raw" / "cpu0.raw").stat().st_size % PAGE == 0


def test_a_second_recording_of_a_machine_is_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "trace.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="is being recorded already"):
            nested.Recorder(tmp_path, tmp_path / "raw", Clock.NONE).start()
