# SPDX-License-Identifier: GPL-2.0-or-later
"""What somebody does who works on a patch series: take it out, check it, put it back."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UsageError
from ..progress import step
from . import cache, series
from .git import git
from .linux import LinuxBuild, Role
from .qemu import QemuBuild
from .tree import BASE, open_tree

__all__ = ["BASE", "apply", "check", "check_builds", "refresh"]

# Lines of context: one less than usual, since a series is to apply to all point
# releases of a branch (6.12.117 reworked what stands beside our changes).
CONTEXT = "--unified=2"


def apply(name: str, directory: Path) -> None:
    """Make a git repository in ``directory``: the base, tagged, and the series as commits.

    It shares nothing with our cache. Raises :class:`UsageError` when the
    directory is not empty, :class:`~qvis.errors.BuildError` when a patch does
    not apply.
    """
    if directory.exists() and any(directory.iterdir()):
        raise UsageError(f"{directory} is not empty")
    component = series.component(name)
    with cache.lock(component):
        tree = open_tree(component)
        tree.export(series.read(name), directory.absolute())


def check(name: str) -> dict[str, list[str]]:
    """Apply the series and run the component's own style checker on each patch.

    Returns what the checker said of each patch that it is not content with.
    """
    patches = series.read(name)
    component = series.component(name)
    with cache.lock(component):
        tree = open_tree(component)
        tree.checkout(patches)
        said = {}
        with step(f"check {len(patches)} patches of {name}") as progress:
            for number, patch in enumerate(patches):
                progress.update(number, len(patches))
                said[patch.name] = tree.checkpatch(patch)
    return {patch: lines for patch, lines in said.items() if lines}


def check_builds(name: str) -> None:
    """Build with none of the patches, with the first, the first two and so on.

    Raises :class:`~qvis.errors.BuildError` at the first that fails.
    """
    make: dict[str, Callable[[Sequence[series.Patch]], object]] = {
        "qemu": QemuBuild.make,
        "linux": LinuxBuild.make,
        "kvm": functools.partial(LinuxBuild.make, role=Role.HOST),
    }
    patches = series.read(name)
    for count in range(len(patches) + 1):
        make[name](patches[:count])


def refresh(name: str, tree: Path) -> tuple[series.Patch, ...]:
    """Write the commits on top of the base in a developer's ``tree`` as the new series.

    Patches that no longer exist are deleted; other files in the folder stay.
    Each step leaves either the old or the new file in place, and the commits
    are in the tree all along: if it is cut short, run it again.
    """
    place = series.folder(name)
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise UsageError(
            f"{place} cannot be written: name a copy of the patches folder in QVIS_PATCHES"
        )
    if git(tree, "status", "--porcelain", "--untracked-files=no", stage="refresh").strip():
        raise UsageError(f"{tree} has changes that are not committed: commit or stash them first")
    if git(tree, "rev-list", "--merges", f"{BASE}..HEAD", stage="refresh").strip():
        raise UsageError(f"{tree} has merge commits: a series is a straight line, rebase it")
    old = series.read(name)
    place.mkdir(exist_ok=True)
    # Beside the folder, so that each file can be renamed into it.
    new = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=place.parent))
    try:
        git(
            tree, "-c", "core.abbrev=12", "format-patch", "--quiet", "-N", "--no-signature",
            "--zero-commit", "--no-base", "--no-thread", CONTEXT, "-o", new, f"{BASE}..HEAD",
            stage="refresh",
        )  # fmt: skip
        names = sorted(path.name for path in new.iterdir())
        (new / "series").write_text("".join(f"{name}\n" for name in names))
        for file in [*names, "series"]:
            (new / file).replace(place / file)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    for patch in old:
        if patch.name not in names:
            (place / patch.name).unlink()
    return series.read(name)
