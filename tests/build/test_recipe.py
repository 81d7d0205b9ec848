# SPDX-License-Identifier: GPL-2.0-or-later
"""When something is built, and when it is not."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qvis.build import cache, recipe, series, sources
from qvis.build.recipe import Recipe
from qvis.build.tree import Tree
from qvis.errors import BuildError, InfraError
from qvis.progress import Step

from .conftest import HEADER_PATCH, Server, Toy, line_patch

ONE = ("0001-one.patch", line_patch("one", 10, "int first;"))
HEADER = ("0002-header.patch", HEADER_PATCH)


class Builder:
    """Compiles by copying; ``seen`` has what the build folder held when each build began."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.trouble: BaseException | None = None

    def recipe(self, configuration: str = "", *inputs: str) -> Recipe:
        return Recipe("toy", configuration, inputs, self.compile)

    def compile(self, tree: Tree, folder: Path, result: Path, progress: Step) -> None:
        self.seen.append(sorted(path.name for path in folder.iterdir()))
        (folder / f"object-{len(self.seen)}").touch()
        (result / "main").write_text((tree.src / "main.c").read_text())
        if self.trouble:
            raise self.trouble


@pytest.fixture
def builder() -> Builder:
    return Builder()


def test_same_inputs_no_work(toy: Toy, builder: Builder, server: Server) -> None:
    toy.series(ONE)
    first = recipe.build(builder.recipe(), series.read("toy"))
    assert "int first;" in (first / "main").read_text()
    facts = recipe.manifest(first)
    assert facts["version"] == "1.0"
    assert facts["tarball"] == toy.sha256
    assert facts["series"] == series.digest(series.read("toy"))

    # Not even the sources or the tree are wanted again.
    server.files.clear()
    subprocess.run(["rm", "-rf", toy.cache / "sources", toy.cache / "trees"], check=True)
    assert recipe.build(builder.recipe(), series.read("toy")) == first
    assert len(builder.seen) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda toy, builder: toy.series(ONE, HEADER),
        lambda toy, builder: toy.series((ONE[0], ONE[1].replace("int first", "int worst"))),
    ],
    ids=["added", "changed"],
)
def test_changed_series_is_built_in_the_folder_of_before(
    toy: Toy, builder: Builder, change: Callable[[Toy, Builder], None]
) -> None:
    toy.series(ONE)
    first = recipe.build(builder.recipe(), series.read("toy"))
    change(toy, builder)
    second = recipe.build(builder.recipe(), series.read("toy"))
    assert second != first
    assert builder.seen == [[], ["object-1"]]
    # And back: it is still there.
    toy.series(ONE)
    assert recipe.build(builder.recipe(), series.read("toy")) == first
    assert len(builder.seen) == 2


def test_variants_of_one_tree_have_folders_and_results_of_their_own(
    toy: Toy, builder: Builder
) -> None:
    def variant() -> Path:
        wanted = replace(builder.recipe(), variant="other")
        return recipe.build(wanted, series.read("toy"))

    toy.series(ONE)
    plain = recipe.build(builder.recipe(), series.read("toy"))
    other = variant()
    assert (plain.name.rsplit("-", 1)[0], other.name.rsplit("-", 1)[0]) == ("toy", "toy-other")
    assert builder.seen == [[], []]
    toy.series(ONE, HEADER)
    assert variant() != other
    assert builder.seen[2] == ["object-2"]


class Make:
    """Compiles by time stamps, as make does, and checks that the objects are right."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, tree: Tree, folder: Path, result: Path, progress: Step) -> None:
        self.compiled = []
        header = tree.src / "common.h"
        for source in sorted(tree.src.glob("*.c")):
            made = folder / f"{source.name}.o"
            wanted = source.read_text() + header.read_text()
            newest = max(source.stat().st_mtime_ns, header.stat().st_mtime_ns)
            if not made.exists() or newest >= made.stat().st_mtime_ns:
                made.write_text(wanted)
                self.compiled.append(source.name)
            assert made.read_text() == wanted, f"a stale object of {source.name}"
            if "int broken" in wanted:
                raise BuildError("broken")
        (result / "done").touch()

    def build(self, *inputs: str, patched: bool = True) -> list[str]:
        patches = series.read("toy") if patched else ()
        recipe.build(Recipe("toy", "", inputs, self.compile), patches)
        return self.compiled


def test_only_what_a_patch_touches_is_compiled_again(toy: Toy) -> None:
    make = Make()
    toy.series(ONE, HEADER)
    assert make.build() == ["main.c", "other.c"]
    # A change in one patch, though the header's is applied anew as well.
    toy.series((ONE[0], ONE[1].replace("int first", "int worst")), HEADER)
    assert make.build() == ["main.c"]
    # The unpatched sources have objects of their own, and leave these alone.
    assert make.build(patched=False) == ["main.c", "other.c"]
    toy.series((ONE[0], ONE[1].replace("int first", "int other")), HEADER)
    assert make.build() == ["main.c"]


def test_objects_of_a_failed_build_are_not_taken_for_those_of_the_one_before(toy: Toy) -> None:
    make = Make()
    toy.series(ONE)
    make.build()
    toy.series((ONE[0], ONE[1].replace("int first", "int broken")))
    with pytest.raises(BuildError):
        make.build()
    # Back to the content of the last good build; another input, so that it is built at all.
    toy.series(ONE)
    assert make.build("again") == ["main.c"]


def test_inputs_make_another_result_and_configuration_another_folder(
    toy: Toy, builder: Builder
) -> None:
    results = {
        recipe.build(builder.recipe("plain"), ()),
        recipe.build(builder.recipe("plain", "input"), ()),
        recipe.build(builder.recipe("fancy", "input"), ()),
    }
    assert len(results) == 3
    assert builder.seen == [[], ["object-1"], []]


def test_compiler_is_an_input(toy: Toy, builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = recipe.build(builder.recipe(), ())
    monkeypatch.setattr(cache, "compiler", lambda name: f"another {name}")
    assert recipe.build(builder.recipe(), ()) != first


def test_failed_build_makes_no_result_and_keeps_the_folder(toy: Toy, builder: Builder) -> None:
    builder.trouble = BuildError("line 3: expected ;")
    with pytest.raises(BuildError, match="expected"):
        recipe.build(builder.recipe(), ())
    assert recipe.find(builder.recipe(), ()) is None
    builder.trouble = None
    recipe.build(builder.recipe(), ())
    assert builder.seen == [[], ["object-1"]]


def test_full_disk_makes_the_last_objects_untrusted(toy: Toy, builder: Builder) -> None:
    builder.trouble = OSError(28, "No space left on device")
    with pytest.raises(InfraError, match="disk is full"):
        recipe.build(builder.recipe(), ())
    builder.trouble = None
    recipe.build(builder.recipe(), ())
    assert builder.seen == [[], []]


KILLED = """
import os, signal, time
from pathlib import Path
from qvis.build import recipe, sources
sources.MANIFEST = Path({manifest!r})
def compile(tree, folder, result, progress):
    for name in ("early", "early.log"):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - 300,) * 2)
    for name in ("half-an-object", ".ninja_log"):
        (folder / name).touch()
    (result / "half-a-result").touch()
    os.kill(os.getpid(), signal.SIGKILL)
recipe.build(recipe.Recipe("toy", "", (), compile), ())
"""


def test_killed_build_goes_on_without_what_it_wrote_last(toy: Toy, builder: Builder) -> None:
    code = KILLED.format(manifest=str(toy.manifest))
    child = subprocess.run([sys.executable, "-c", code], check=False)
    assert child.returncode == -signal.SIGKILL
    assert recipe.find(builder.recipe(), ()) is None
    result = recipe.build(builder.recipe(), ())
    assert builder.seen == [[".ninja_log", "early", "early.log"]]
    assert sorted(path.name for path in result.iterdir()) == ["main", "manifest.json"]


def test_results_of_any_known_tarball_will_do(toy: Toy, builder: Builder, server: Server) -> None:
    first = recipe.build(builder.recipe(), ())
    # A pin before it, which nothing was ever built from.
    other = f'[[toy.places]]\nurl = "{server.url}/other.tar.xz"\nsha256 = "{"0" * 64}"\n\n'
    toy.manifest.write_text(toy.manifest.read_text().replace("[[toy", f"{other}[[toy", 1))
    sources._manifest.cache_clear()
    assert len(sources.known("toy")) == 2
    assert recipe.build(builder.recipe(), ()) == first
    assert len(builder.seen) == 1
