# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the source tarballs come from.

``sources.toml`` pins them. :func:`fetch` looks into the cache, then into the
folder that ``QVIS_SOURCES`` names, then asks each pinned place in order, and
keeps nothing that does not have the pinned hash.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import subprocess
import time
import tomllib
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ..errors import InfraError, UsageError
from ..paths import cache_dir
from ..progress import note, step
from .cache import space_checked

__all__ = ["Source", "components", "fetch", "known"]

MANIFEST = Path(__file__).with_name("sources.toml")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEADLINE = 1800.0  # seconds for one tarball
STALL = 20.0  # seconds to connect, or without a byte
INDEX_DEADLINE = 300.0  # seconds for the distribution's source indexes
CHUNK = 1 << 18  # bytes


@dataclass(frozen=True)
class Source:
    """One tarball that a component can be built from."""

    component: str
    version: str
    file: str  # its name, without a folder
    sha256: str


class _UnavailableError(Exception):
    """A place does not have what we want; the text says which place, and why."""


def components() -> list[str]:
    """The names of what is built from source."""
    return list(_manifest())


def known(component: str) -> list[Source]:
    """The tarballs that will do, best first: the pins, then a fallback taken earlier."""
    sources = [_source(component, place) for place in _entry(component)["places"]]
    with suppress(OSError, ValueError, TypeError):  # never taken, the usual case
        sources.append(Source(**json.loads(_substitute(component).read_text())))
    return sources


def fetch(component: str) -> tuple[Source, Path]:
    """A tarball of ``component`` with the right hash, and the path of its file.

    Raises :class:`InfraError` that names each place and what was wrong there.
    """
    entry = _entry(component)
    failures: list[str] = []
    for source, file in _at_hand(component):
        try:
            _check(source, _sha256(file), str(file))
        except _UnavailableError as problem:
            failures.append(str(problem))
        else:
            return source, file
    for place in entry["places"]:
        source = _source(component, place)
        try:
            urls = [place["url"]] if "url" in place else _mirrored(place["archive"], place["path"])
        except _UnavailableError as problem:
            failures.append(f"{source.file}: {problem}")
            continue
        for url in urls:
            try:
                return source, _download(source, url)
            except _UnavailableError as problem:
                failures.append(str(problem))
    try:
        others = _vouched_for(component, entry["fallback"]) if "fallback" in entry else []
    except _UnavailableError as problem:
        failures.append(str(problem))
        others = []
    for source, url in others:
        try:
            file = _download(source, url)
        except _UnavailableError as problem:
            failures.append(str(problem))
            continue
        note(f"taking {component} {source.version} in place of {entry['version']}")
        with space_checked():
            _substitute(component).write_text(json.dumps(asdict(source)))
        return source, file
    raise InfraError(
        f"cannot get {component} {entry['version']}: {'; '.join(failures)}. "
        "Put the file into a folder and name that folder in QVIS_SOURCES",
        stage="sources",
    )


@cache
def _manifest() -> dict[str, Any]:
    return tomllib.loads(MANIFEST.read_text())


def _entry(component: str) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = _manifest()[component]
    except KeyError:
        names = ", ".join(components())
        raise UsageError(f"unknown component {component!r}: choose one of {names}") from None
    return entry


def _source(component: str, place: dict[str, str]) -> Source:
    name = Path(urlsplit(place.get("url") or place["path"]).path).name
    return Source(component, _entry(component)["version"], name, place["sha256"])


def _substitute(component: str) -> Path:
    """Where it is noted which tarball was taken in place of the pinned ones."""
    return _folder() / f"{component}.substitute.json"


def _folder() -> Path:
    path = cache_dir() / "sources"
    path.mkdir(exist_ok=True)
    return path


def _at_hand(component: str) -> list[tuple[Source, Path]]:
    """The files of the right names in the cache and in the user's own folder."""
    folders = [_folder()]
    if own := os.environ.get("QVIS_SOURCES"):
        if not Path(own).is_dir():
            raise UsageError(f"QVIS_SOURCES={own} is not a folder")
        folders.append(Path(own))
    return [
        (source, folder / source.file)
        for folder in folders
        for source in known(component)
        if (folder / source.file).is_file()
    ]


def _check(source: Source, found: str, where: str) -> None:
    if found != source.sha256:
        problem = f"{where}: SHA-256 is {found}, expected {source.sha256}"
        note(f"{problem}; not used")
        raise _UnavailableError(problem)


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _download(source: Source, url: str) -> Path:
    """Fetch ``url`` into the cache folder, whole and with the right hash or not at all."""
    target = _folder() / source.file
    part = target.with_name(f"{target.name}.part")
    started = time.monotonic()
    digest = hashlib.sha256()
    try:
        with (
            space_checked(),
            _opener().open(url, timeout=STALL) as answer,
            step(f"fetch {source.file} from {urlsplit(url).hostname or url}") as progress,
            part.open("wb") as out,
        ):
            total = int(answer.headers.get("Content-Length") or 0)
            done = 0
            while chunk := answer.read(CHUNK):
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress.update(done, total)
                if time.monotonic() - started > DEADLINE:
                    raise TimeoutError(f"not done after {DEADLINE:.0f} s")
            if done < total:
                raise ConnectionError(f"ended after {done} of {total} bytes")
        _check(source, digest.hexdigest(), url)
        part.replace(target)
    except (OSError, http.client.HTTPException) as problem:
        # urllib wraps what the operating system said.
        raise _UnavailableError(f"{url}: {getattr(problem, 'reason', problem)}") from problem
    finally:
        part.unlink(missing_ok=True)
    return target


@cache
def _opener() -> urllib.request.OpenerDirector:
    """Goes through the environment's proxy, or else through apt's."""
    proxies = urllib.request.getproxies()
    for scheme in ("http", "https"):
        if scheme not in proxies:
            answer = _apt("apt-config", "dump", "--format=%v", f"Acquire::{scheme}::Proxy")
            if answer.startswith("http"):
                proxies[scheme] = answer
    return urllib.request.build_opener(urllib.request.ProxyHandler(proxies))


def _mirrored(archive: str, path: str) -> list[str]:
    """The addresses of a file of the distribution's archive, by the mirrors of this host's apt."""
    return [f"{mirror}/{quote(path)}" for mirror in _mirrors(archive)]


def _mirrors(archive: str) -> list[str]:
    # What an update would fetch: all formats of apt's configuration are thereby
    # understood, and neither a network nor privileges nor earlier lists needed.
    listing = _apt("apt-get", "--print-uris", "update")
    mirrors = dict.fromkeys(re.findall(rf"^'(\S+/{archive})/+dists/", listing, re.MULTILINE))
    if not mirrors:
        raise _UnavailableError(f"this host's apt has no {archive} archive")
    return list(mirrors)


def _apt(*command: str, deadline: float = 30.0) -> str:
    """What the command prints; nothing when there is no apt here."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=deadline, check=False
        ).stdout
    except FileNotFoundError:
        return ""


def _vouched_for(component: str, rule: dict[str, Any]) -> list[tuple[Source, str]]:
    """The releases of the rule's branch in the distribution, newest first, with addresses.

    apt itself reads the archives' source indexes, in a configuration of our own
    that trusts the distribution's keys only: the signature vouches for the
    index, and the index for the tarball's hash.
    """
    if not KEYRING.exists():
        raise _UnavailableError(f"cannot verify the distribution's index: no {KEYRING}")
    area = _folder() / f"{component}.index"
    (area / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    lines = [
        f"deb-src [signed-by={KEYRING}] {mirror} {suite} main\n"
        for archive, suite in rule["suites"]
        for mirror in _mirrors(archive)
    ]
    (area / "sources.list").write_text("".join(lines))
    options = [
        f"-oDir::State={area}",
        f"-oDir::State::lists={area}/lists",
        "-oDir::State::status=/dev/null",
        f"-oDir::Cache={area}",
        f"-oDir::Etc::sourcelist={area}/sources.list",
        "-oDir::Etc::sourceparts=/dev/null",
        "-oAPT::Sandbox::User=",
        # A mirror that is behind still serves what the archive once signed; we
        # say below how old that is.
        "-oAcquire::Check-Valid-Until=false",
        f"-oAcquire::http::Timeout={STALL:.0f}",
    ]
    with step(f"read the distribution's index for {component} {rule['branch']}"):
        try:
            # Its status counts for nothing: a suite may be missing from a mirror.
            _apt("apt-get", *options, "update", deadline=INDEX_DEADLINE)
            stanzas = _apt("apt-cache", *options, "showsrc", *rule["packages"])
        except subprocess.TimeoutExpired:
            raise _UnavailableError("the distribution's index did not come in time") from None
    for release in (area / "lists").glob("*InRelease"):
        _say_if_stale(release)
    branch = re.escape(rule["branch"])
    tarball = re.compile(
        rf"^ ([0-9a-f]{{64}}) \d+ (\S+_({branch}\.(\d+))\.orig\.tar\.xz)$", re.MULTILINE
    )
    found: dict[tuple[int, str], Source] = {}
    for stanza in stanzas.split("\n\n"):
        if directory := re.search(r"^Directory: (\S+)", stanza, re.MULTILINE):
            for sha256, file, version, point in tarball.findall(stanza):
                path = f"{directory[1]}/{file}"
                found[int(point), path] = Source(component, version, file, sha256)
    if not found:
        raise _UnavailableError(
            f"no signed index of the distribution lists a {component} {rule['branch']}"
        )
    return [
        (source, url)
        for (_, path), source in sorted(found.items(), reverse=True)
        for url in _mirrored("debian-security" if "/updates/" in path else "debian", path)
    ]


def _say_if_stale(release: Path) -> None:
    fields = dict(re.findall(r"^(Suite|Valid-Until): (.*)$", release.read_text(), re.MULTILINE))
    if "Valid-Until" in fields:
        until = parsedate_to_datetime(fields["Valid-Until"])
        if until < datetime.now(UTC):
            note(
                f"the mirror's index of {fields.get('Suite', release.name)} was to be renewed "
                f"by {until:%Y-%m-%d}; its signature still counts"
            )
