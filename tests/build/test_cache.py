# SPDX-License-Identifier: GPL-2.0-or-later
"""Results are whole or absent, whatever happens while they are made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvis.build import cache
from qvis.errors import InfraError

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("QVIS_CACHE", str(path))
    return path


def start(code: str) -> subprocess.Popen[str]:
    """Another process with the same cache; it prints a line when it is where it should be."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"import time\nfrom qvis.build import cache\n{code}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout
    assert child.stdout.readline() == "there\n"
    return child


def test_key_tells_all_inputs_apart() -> None:
    inputs = [("a", "b"), ("ab",), ("b", "a"), ("a", "b", ""), ("", "a", "b"), ("a1:b",)]
    assert len({cache.key(*parts) for parts in inputs}) == len(inputs)
    assert cache.key("a") == cache.key(b"a")


def test_result_appears_only_when_it_is_whole() -> None:
    with cache.create("toy", KEY) as made:
        (made / "file").write_text("half")
        assert cache.find("toy", KEY) is None
        (made / "file").write_text("whole")
    found = cache.find("toy", KEY)
    assert found
    assert (found / "file").read_text() == "whole"


def test_failure_leaves_nothing(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), cache.create("toy", KEY) as made:
        (made / "file").write_text("half")
        raise KeyboardInterrupt
    assert cache.find("toy", KEY) is None
    assert list((folder / "results").iterdir()) == []


def test_killed_builder_leaves_nothing_that_counts(folder: Path) -> None:
    child = start(
        f"with cache.lock('toy'), cache.create('toy', '{KEY}') as made:\n"
        "    (made / 'file').write_text('half')\n"
        "    print('there', flush=True)\n"
        "    time.sleep(60)\n"
    )
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert cache.find("toy", KEY) is None
    # Neither its lock nor its folder is in the way.
    with cache.lock("toy"), cache.create("toy", KEY) as made:
        assert list(made.iterdir()) == []
    assert [path.name for path in (folder / "results").iterdir()] == [f"toy-{KEY}"]


def test_second_process_waits_and_says_for_whom(capfd: pytest.CaptureFixture[str]) -> None:
    child = start(
        "with cache.lock('toy'):\n"
        "    print('there', flush=True)\n"
        "    time.sleep(1.5)\n"
    )  # fmt: skip
    with cache.lock("other"):
        pass  # another component is nobody's business
    started = time.monotonic()
    with cache.lock("toy"):
        assert time.monotonic() - started > 0.5
    assert f"waiting for another qvis (process {child.pid}) to finish toy" in capfd.readouterr().err
    child.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_full_disk_is_the_hosts_fault_and_heals(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QVIS_CACHE", str(small_disk))
    with pytest.raises(InfraError, match="disk is full"), cache.create("toy", KEY) as made:
        (made / "file").write_bytes(b"x" * 512 * 1024)
    assert cache.find("toy", KEY) is None
    with cache.create("toy", KEY) as made:
        (made / "file").write_bytes(b"x" * 100 * 1024)
    assert cache.find("toy", KEY)


def test_compiler_is_asked_once_for_each_compiler(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    compiler = tmp_path / "gcc"

    def install(version: str) -> None:
        compiler.write_text(f"#!/bin/sh\necho x >> {asked}\necho gcc {version}\n")
        compiler.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    install("12.2")
    assert [cache.compiler() for _ in range(3)] == ["gcc 12.2"] * 3
    assert asked.read_text() == "x\n"
    install("14.20")
    assert cache.compiler() == "gcc 14.20"
    (folder / "compiler.json").write_text("{ half")
    assert cache.compiler() == "gcc 14.20"

    # Another one is remembered beside it.
    compiler.rename(tmp_path / "other")
    install("15")
    assert [cache.compiler("other"), cache.compiler()] == ["gcc 14.20", "gcc 15"]
    assert [cache.compiler("other"), cache.compiler()] == ["gcc 14.20", "gcc 15"]
    assert asked.read_text() == "x\n" * 5
