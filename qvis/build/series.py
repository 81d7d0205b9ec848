# SPDX-License-Identifier: GPL-2.0-or-later
"""The patch series: a folder each, with the order in its ``series`` file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .. import paths
from ..errors import BuildError, UsageError
from . import sources
from .cache import key

__all__ = ["Patch", "component", "digest", "folder", "names", "read"]

# Series beside those that are called as the component whose sources they change: this
# one is for the inner host's Linux.
MORE = {"kvm": "linux"}


@dataclass(frozen=True)
class Patch:
    """One commit of a series, as ``git format-patch`` writes it."""

    name: str  # of the file
    content: bytes

    @property
    def sha(self) -> str:
        """A short name for this very content."""
        return key(self.content)[:12]

    @cached_property
    def _text(self) -> str:
        return self.content.decode("utf-8", errors="replace")

    @property
    def subject(self) -> str:
        """The commit's first line."""
        found = re.search(r"^Subject: (?:\[[^\]]*\] )?(.*(?:\n .*)*)", self._text, re.MULTILINE)
        return found[1].replace("\n", "") if found else self.name

    @property
    def changes(self) -> dict[str, tuple[int, int]]:
        """Lines added and removed in each file that is touched."""
        result = {}
        for part in re.split(r"^diff --git ", self._text, flags=re.MULTILINE)[1:]:
            # Hunks only: the lines above them name files with the same signs.
            head, *hunks = re.split(r"^@@ .*$", part, flags=re.MULTILINE)
            names = re.match(r"a/(?P<old>\S+) b/(?P<new>\S+)", head)
            if not names:
                continue
            lines = [line for hunk in hunks for line in _without_signature(hunk).splitlines()]
            added = sum(line.startswith("+") for line in lines)
            removed = sum(line.startswith("-") for line in lines)
            result[names["new"]] = (added, removed)
        return result


def names() -> list[str]:
    """All series."""
    known = sources.components()
    return [*known, *(name for name, changed in MORE.items() if changed in known)]


def component(name: str) -> str:
    """The component whose sources the series of that name changes."""
    return MORE.get(name, name)


def folder(name: str) -> Path:
    """Where the series of that name is."""
    root = paths.patches_dir()
    if not root.is_dir():
        raise UsageError(f"{root}, where the patches should be, is not a folder")
    return root / name


def read(name: str) -> tuple[Patch, ...]:
    """The series of that name in order; none when it has no ``series`` file.

    Raises :class:`BuildError` when a patch that it names is not there.
    """
    place = folder(name)
    try:
        lines = (place / "series").read_text().split("\n")
    except FileNotFoundError:
        return ()
    patches = []
    for file in (line.partition("#")[0].strip() for line in lines):
        if not file:
            continue
        try:
            patches.append(Patch(file, (place / file).read_bytes()))
        except OSError as problem:
            raise BuildError(
                f"{place / 'series'} names {file}: {problem.strerror}", stage="series"
            ) from problem
    return tuple(patches)


def digest(patches: Sequence[Patch]) -> str:
    """A name for the contents and their order: what two results must share to be alike."""
    return key(*(patch.content for patch in patches))


def _without_signature(hunk: str) -> str:
    """The hunk without the ``-- `` that mail ends with, which is no removed line."""
    return re.split(r"^-- $", hunk, flags=re.MULTILINE)[0]
