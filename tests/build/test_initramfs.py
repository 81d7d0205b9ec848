# SPDX-License-Identifier: GPL-2.0-or-later
"""The archive, read back by somebody else's cpio."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from qvis.build import initramfs
from qvis.build.initramfs import Entry, find_initramfs, make_initramfs, pack
from qvis.errors import BuildError

ENTRIES = [
    Entry.folder("etc", 0o700),
    Entry.file("etc/odd", b"12345", 0o640),
    Entry.file("etc/empty", b""),
    Entry.link("etc/link", "odd"),
]


def cpio(archive: bytes, *options: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        ["busybox", "cpio", *options], input=archive, capture_output=True, cwd=cwd, check=True
    )
    return done.stdout.decode()


def test_another_cpio_unpacks_it(tmp_path: Path) -> None:
    cpio(pack(ENTRIES), "-i", cwd=tmp_path)
    assert (tmp_path / "etc" / "odd").read_bytes() == b"12345"
    assert (tmp_path / "etc" / "empty").read_bytes() == b""
    assert (tmp_path / "etc" / "link").readlink() == Path("odd")
    assert stat.S_IMODE((tmp_path / "etc").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "etc" / "odd").stat().st_mode) == 0o640


def test_device_nodes_have_their_numbers(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("device nodes are made by root only")
    cpio(pack([Entry("console", stat.S_IFCHR | 0o600, device=(5, 1))]), "-i", cwd=tmp_path)
    status = (tmp_path / "console").stat()
    assert status.st_mode == stat.S_IFCHR | 0o600
    assert (os.major(status.st_rdev), os.minor(status.st_rdev)) == (5, 1)


def test_order_of_entries_does_not_matter_and_size_is_padded() -> None:
    assert pack(ENTRIES) == pack(reversed(ENTRIES))
    assert len(pack(ENTRIES)) % 512 == 0


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert find_initramfs() is None
        made = make_initramfs()
        assert find_initramfs() == made
        assert make_initramfs() == made
        return made.read_bytes()


def test_archive_is_the_same_each_time(
    archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QVIS_CACHE", str(tmp_path))
    assert make_initramfs().read_bytes() == archive


def test_archive_has_what_a_guest_starts_with(archive: bytes) -> None:
    listing = cpio(archive, "-t").split()
    assert listing == sorted(listing)
    for name in ("init", "bin/sh", "bin/dropbear", "bin/qvis-load", "dev/console", "etc/passwd"):
        assert name in listing
    for name in listing:
        parent = str(Path(name).parent)
        assert parent == "." or listing.index(parent) < listing.index(name)


def test_programs_run_where_nothing_else_is(archive: bytes, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("chroot is for root")
    cpio(archive, "-i", cwd=tmp_path)
    for command in (["/bin/dropbear", "-V"], ["/bin/ls", "/init"]):
        subprocess.run(["chroot", tmp_path, *command], check=True, capture_output=True)
    usage = subprocess.run(["chroot", tmp_path, "/bin/qvis-load"], check=False, capture_output=True)
    assert usage.returncode == 2


def test_library_that_is_nowhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initramfs, "LIBRARY_PATH", ("/nowhere",))
    with pytest.raises(BuildError, match=r"no lib\S+, which a program of the guest's needs"):
        initramfs.libraries(initramfs.host_program("dropbear"))
