# SPDX-License-Identifier: GPL-2.0-or-later
"""A component that is as small as can be, with a server that has its tarball."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qvis.build import sources

FILES = {
    "main.c": "".join(f"int line_{number};\n" for number in range(40)),
    "common.h": "#define COMMON 1\n",
    "other.c": "int other;\n",
    ".gitignore": "*.blob\n",
    # Stands in for the projects' own: it has one rule.
    "scripts/checkpatch.pl": """\
my ($patch) = grep { !/^--/ } @ARGV;
open my $in, "<", $patch or die;
while (<$in>) { print "$patch:$.: WARNING: ugly\n" if /^[+].*UGLY/; }
""",
    "kept.blob": "what the project ignores is in its tarball all the same\n",
}


def tarball() -> bytes:
    """The toy's sources, the same bytes each time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, text in FILES.items():
            info = tarfile.TarInfo(f"toy-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


@dataclass
class Server:
    """Serves ``files`` by path, and remembers what it was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    truncate: int = 0  # bytes to leave out of each answer


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            data = state.files.get(self.path)
            if data is None:
                self.send_error(404, "not here")
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) - state.truncate])

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    yield state
    httpd.shutdown()
    httpd.server_close()


@dataclass
class Toy:
    """The component called ``toy``."""

    tarball: bytes
    cache: Path
    patches: Path
    manifest: Path
    places: list[str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tarball).hexdigest()

    def pin(self, *places: str) -> None:
        """Rewrite the manifest: each place is a TOML line with a url or an archive path."""
        blocks = [f'[[toy.places]]\n{place}\nsha256 = "{self.sha256}"\n' for place in places]
        self.manifest.write_text('[toy]\nversion = "1.0"\n' + "\n".join(blocks))
        sources._manifest.cache_clear()

    def series(self, *patches: tuple[str, str]) -> None:
        """Write a series of (name, content)."""
        folder = self.patches / "toy"
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in patches:
            (folder / name).write_text(content)
        (folder / "series").write_text("".join(f"{name}\n" for name, _ in patches))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Iterator[Toy]:
    made = Toy(tarball(), tmp_path / "cache", tmp_path / "patches", tmp_path / "sources.toml", [])
    made.patches.mkdir()
    monkeypatch.setenv("QVIS_CACHE", str(made.cache))
    monkeypatch.setenv("QVIS_PATCHES", str(made.patches))
    monkeypatch.delenv("QVIS_SOURCES", raising=False)
    monkeypatch.setattr(sources, "MANIFEST", made.manifest)
    server.files["/toy-1.0.tar.xz"] = made.tarball
    made.pin(f'url = "{server.url}/toy-1.0.tar.xz"')
    yield made
    sources._manifest.cache_clear()


def patch(name: str, file: str, before: list[str], old: str, new: str, after: list[str],
          at: int) -> str:  # fmt: skip
    """A patch, as git format-patch writes it, that replaces one line of ``file``."""
    size = len(before) + 1 + len(after)
    hunk = [*(f" {line}" for line in before), f"-{old}", f"+{new}", *(f" {line}" for line in after)]
    body = "\n".join(hunk)
    return (
        "From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\n"
        "From: A Developer <a@example.org>\nDate: Thu, 1 Jan 2026 00:00:00 +0000\n"
        f"Subject: [PATCH] {name}\n\nWhy.\n---\n"
        f"diff --git a/{file} b/{file}\n--- a/{file}\n+++ b/{file}\n"
        f"@@ -{at},{size} +{at},{size} @@\n{body}\n"
    )


def line_patch(name: str, number: int, new: str) -> str:
    """A patch that replaces ``int line_<number>;`` of main.c."""
    return patch(
        name,
        "main.c",
        [f"int line_{n};" for n in range(number - 3, number)],
        f"int line_{number};",
        new,
        [f"int line_{n};" for n in range(number + 1, number + 4)],
        number - 2,
    )


HEADER_PATCH = patch("header", "common.h", [], "#define COMMON 1", "#define COMMON 2", [], 1)
