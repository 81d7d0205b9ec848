# SPDX-License-Identifier: GPL-2.0-or-later
"""Pins, places and their order, and what is said when there is none."""

from __future__ import annotations

import hashlib
import socket
import time
from pathlib import Path

import pytest

from qvis.build import sources
from qvis.errors import InfraError, UsageError

from .conftest import Server, Toy


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own folder of tarballs."""
    path = tmp_path / "mine"
    path.mkdir()
    monkeypatch.setenv("QVIS_SOURCES", str(path))
    return path


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt that knows one archive, which is the folder returned."""
    archive = tmp_path / "mirror" / "debian"
    archive.mkdir(parents=True)
    listing = tmp_path / "sources.list"
    listing.write_text(f"deb file:{archive} bookworm main\n")
    config = tmp_path / "apt.conf"
    config.write_text(f'Dir::Etc::sourcelist "{listing}";\nDir::Etc::sourceparts "/dev/null";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    return archive


def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def test_download_is_kept_and_not_repeated(toy: Toy, server: Server) -> None:
    source, file = sources.fetch("toy")
    assert source.version == "1.0"
    assert file == toy.cache / "sources" / "toy-1.0.tar.xz"
    assert file.read_bytes() == toy.tarball
    sources.fetch("toy")
    assert server.asked == ["/toy-1.0.tar.xz"]


def test_own_folder_comes_first(toy: Toy, server: Server, folder: Path) -> None:
    (folder / "toy-1.0.tar.xz").write_bytes(toy.tarball)
    assert sources.fetch("toy")[1].parent == folder
    assert server.asked == []


def test_any_known_name_will_do(toy: Toy, server: Server, folder: Path) -> None:
    toy.pin(f'url = "{server.url}/a.tar.xz"', 'archive = "debian"\npath = "pool/t/toy_1.0.tar.xz"')
    (folder / "toy_1.0.tar.xz").write_bytes(toy.tarball)
    assert sources.fetch("toy")[1].name == "toy_1.0.tar.xz"


def test_own_folder_with_wrong_hash_is_skipped_and_named(
    toy: Toy, server: Server, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = folder / "toy-1.0.tar.xz"
    wrong.write_bytes(b"something else")
    assert sources.fetch("toy")[1].parent == toy.cache / "sources"
    assert wrong.exists()
    assert str(wrong) in capsys.readouterr().err

    (toy.cache / "sources" / "toy-1.0.tar.xz").unlink()
    server.files.clear()
    with pytest.raises(InfraError, match="SHA-256 is") as failure:
        sources.fetch("toy")
    assert str(wrong) in str(failure.value)
    assert server.url in str(failure.value)


def test_missing_own_folder_is_a_usage_error(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QVIS_SOURCES", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="nowhere"):
        sources.fetch("toy")


def test_wrong_hash_names_place_and_hashes_and_keeps_nothing(toy: Toy, server: Server) -> None:
    server.files["/toy-1.0.tar.xz"] = b"malicious"
    with pytest.raises(InfraError) as failure:
        sources.fetch("toy")
    message = str(failure.value)
    assert f"{server.url}/toy-1.0.tar.xz" in message
    assert toy.sha256 in message
    assert hashlib.sha256(b"malicious").hexdigest() in message
    assert list((toy.cache / "sources").iterdir()) == []


def test_truncated_download_goes_to_the_next_place(toy: Toy, server: Server) -> None:
    server.truncate = 7
    with pytest.raises(InfraError, match=r"ended after \d+ of \d+ bytes|IncompleteRead"):
        sources.fetch("toy")
    assert list((toy.cache / "sources").iterdir()) == []


def test_cached_file_that_rotted_is_fetched_again(toy: Toy, server: Server) -> None:
    _, file = sources.fetch("toy")
    file.write_bytes(toy.tarball[:-1])
    assert sources.fetch("toy")[1].read_bytes() == toy.tarball
    assert len(server.asked) == 2


def test_places_in_order_and_all_named_when_offline(
    toy: Toy, apt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = f"http://127.0.0.1:{closed_port()}"
    toy.pin(
        f'url = "{dead}/toy-1.0.tar.xz"',
        'url = "http://host.invalid/toy-1.0.tar.xz"',
        'archive = "debian"\npath = "pool/t/toy_1.0.tar.xz"',
        'archive = "debian-security"\npath = "pool/t/toy_1.0.tar.xz"',
    )
    started = time.monotonic()
    with pytest.raises(InfraError) as failure:
        sources.fetch("toy")
    assert time.monotonic() - started < 20
    message = str(failure.value)
    positions = [
        message.index(part)
        for part in (dead, "host.invalid", f"file:{apt}/pool", "no debian-security archive")
    ]
    assert positions == sorted(positions)
    assert "refused" in message
    assert "QVIS_SOURCES" in message


def test_distribution_archive_comes_from_apts_configuration(toy: Toy, apt: Path) -> None:
    toy.pin('archive = "debian"\npath = "pool/t/toy_1.0+ds.tar.xz"')
    (apt / "pool" / "t").mkdir(parents=True)
    (apt / "pool" / "t" / "toy_1.0+ds.tar.xz").write_bytes(toy.tarball)
    assert sources.fetch("toy")[1] == toy.cache / "sources" / "toy_1.0+ds.tar.xz"


SHOWSRC = """\
Package: toy
Version: 1.2-1
Checksums-Sha256:
 {a} 10 toy_1.2.dsc
 {b} 20 toy_1.2.orig.tar.xz
Directory: pool/main/t/toy

Package: toy
Version: 1.10-1
Checksums-Sha256:
 {c} 20 toy_1.10.orig.tar.xz
Directory: pool/updates/main/t/toy

Package: toy
Version: 2.99-1
Checksums-Sha256:
 {a} 20 toy_2.99.orig.tar.xz
Directory: pool/main/t/toy
"""


def test_fallback_is_the_newest_of_the_branch_and_is_remembered(
    toy: Toy, server: Server, apt: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    newer = toy.tarball + b"\0" * 4
    text = SHOWSRC.format(a="a" * 64, b="b" * 64, c=hashlib.sha256(newer).hexdigest())
    server.files = {"/debian-security/pool/updates/main/t/toy/toy_1.10.orig.tar.xz": newer}
    with toy.manifest.open("a") as out:
        out.write('[toy.fallback]\nbranch = "1"\npackages = ["toy"]\nsuites = [["debian", "x"]]\n')
    sources._manifest.cache_clear()
    monkeypatch.setattr(sources, "KEYRING", tmp_path)
    monkeypatch.setattr(
        sources, "_apt", lambda *words, deadline=0.0: text if "showsrc" in words else ""
    )
    monkeypatch.setattr(sources, "_mirrors", lambda archive: [f"{server.url}/{archive}"])
    source, file = sources.fetch("toy")
    assert (source.version, file.name) == ("1.10", "toy_1.10.orig.tar.xz")
    assert "taking toy 1.10 in place of 1.0" in capsys.readouterr().err
    assert sources.known("toy")[-1] == source
    # The pin, once it can be had again, has precedence.
    server.files["/toy-1.0.tar.xz"] = toy.tarball
    assert sources.known("toy")[0].version == "1.0"


def test_manifest_pins_every_place() -> None:
    for component in sources.components():
        for source in sources.known(component):
            assert len(bytes.fromhex(source.sha256)) == 32
            assert source.version in source.file
    with pytest.raises(UsageError, match="choose one of"):
        sources.known("hurd")
