# SPDX-License-Identifier: GPL-2.0-or-later
"""From a pinned tarball and a series to a result in the cache.

What QEMU and Linux have in common; each brings its own ``compile``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import progress
from . import cache, series
from .sources import known
from .tree import Tree, open_tree

__all__ = ["Recipe", "build", "cpus", "find", "manifest", "prepare"]


@dataclass(frozen=True)
class Recipe:
    """How one component is made."""

    component: str
    # Whatever has an influence on the result, beside sources, series and
    # compiler. When ``configuration`` changes the build starts from nothing;
    # when ``inputs`` do, the build system knows what to do.
    configuration: str
    inputs: tuple[str, ...]
    # Told the tree, its build folder and the folder that the result goes to.
    compile: Callable[[Tree, Path, Path, progress.Step], None]
    variant: str = ""  # of several that are made from one tree; each has a build folder
    compiler: str = cache.COMPILER

    @property
    def name(self) -> str:
        """What its results are called."""
        return f"{self.component}-{self.variant}" if self.variant else self.component


def find(recipe: Recipe, patches: Sequence[series.Patch]) -> Path | None:
    """The folder of the recipe's result with these patches, if it was ever made.

    A result of any of the tarballs that will do is taken.
    """
    for source in known(recipe.component):
        if found := cache.find(recipe.name, _key(recipe, source.sha256, patches)):
            return found
    return None


def build(recipe: Recipe, patches: Sequence[series.Patch]) -> Path:
    """The folder of the recipe's result with these patches, made if there is none."""
    component = recipe.component
    if found := find(recipe, patches):
        return found
    with cache.lock(component):
        # Somebody may have made it while we waited.
        if found := find(recipe, patches):
            return found
        tree = prepare(recipe, patches)
        name = _key(recipe, tree.source.sha256, patches)
        what = f"build {recipe.name} {tree.source.version} with {len(patches)} patches"
        with (
            progress.step(what, cache.log_file(component)) as step,
            tree.building(patches, recipe.configuration, recipe.variant) as folder,
            cache.create(recipe.name, name) as unfinished,
        ):
            recipe.compile(tree, folder, unfinished, step)
            facts = {
                "component": component,
                "version": tree.source.version,
                "tarball": tree.source.sha256,
                "series": series.digest(patches),
                "patches": [patch.name for patch in patches],
                "compiler": cache.compiler(recipe.compiler),
                "key": name,
            }
            (unfinished / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n")
        return cache.result(recipe.name, name)


def prepare(recipe: Recipe, patches: Sequence[series.Patch]) -> Tree:
    """The component's tree with these patches in it, and a fresh log. Needs the lock."""
    cache.log_file(recipe.component).unlink(missing_ok=True)
    tree = open_tree(recipe.component)
    tree.checkout(patches)
    return tree


def manifest(result: Path) -> dict[str, Any]:
    """What :func:`build` noted about a result."""
    facts: dict[str, Any] = json.loads((result / "manifest.json").read_text())
    return facts


def cpus() -> int:
    """How many jobs to run at once: the CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _key(recipe: Recipe, tarball: str, patches: Sequence[series.Patch]) -> str:
    return cache.key(
        tarball,
        series.digest(patches),
        recipe.configuration,
        *recipe.inputs,
        cache.compiler(recipe.compiler),
    )
