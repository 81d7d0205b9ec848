# SPDX-License-Identifier: GPL-2.0-or-later
"""Real git on a tiny project: applying, refusing, moving between states, refreshing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qvis.build import develop, series
from qvis.build.git import git
from qvis.build.tree import Tree, open_tree
from qvis.errors import BuildError, UsageError

from .conftest import FILES, HEADER_PATCH, Toy, line_patch

ONE = ("0001-one.patch", line_patch("one", 10, "int first;"))
TWO = ("0002-two.patch", line_patch("two", 20, "int second;"))
HEADER = ("0002-header.patch", HEADER_PATCH)
# Its context names a line that is not there: patch(1) would apply it with fuzz.
FUZZY = ("0002-fuzzy.patch", line_patch("fuzzy", 30, "int third;").replace("line_27", "line_72"))


def at(toy: Toy, *patches: tuple[str, str]) -> Tree:
    """The toy's tree with these patches."""
    toy.series(*patches)
    tree = open_tree("toy")
    tree.checkout(series.read("toy"))
    return tree


def times(tree: Tree) -> dict[str, int]:
    return {name: (tree.src / name).stat().st_mtime_ns for name in FILES}


def state(tree: Tree) -> dict[str, object]:
    """All that a failed operation must leave alone."""
    return {
        "head": git(tree.src, "rev-parse", "HEAD", stage="test"),
        "files": {name: (tree.src / name).read_text() for name in FILES},
        "times": times(tree),
        "beside": sorted(path.name for path in tree.root.iterdir()),
        "worktrees": git(tree.src, "worktree", "list", stage="test"),
    }


def test_read_keeps_order_and_skips_comments(toy: Toy) -> None:
    toy.series(TWO, ONE)
    listing = toy.patches / "toy" / "series"
    listing.write_text(f"# why\n\n{TWO[0]}  # first\n{ONE[0]}\n")
    assert [patch.name for patch in series.read("toy")] == [TWO[0], ONE[0]]


def test_patch_that_the_series_names_but_is_not_there(toy: Toy) -> None:
    toy.series(ONE)
    (toy.patches / "toy" / ONE[0]).unlink()
    with pytest.raises(BuildError, match=ONE[0]):
        series.read("toy")


def test_no_series_is_no_patches_but_no_folder_is_an_error(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert series.read("toy") == ()
    monkeypatch.setenv("QVIS_PATCHES", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="nowhere"):
        series.read("toy")


def test_digest_depends_on_content_and_order(toy: Toy) -> None:
    toy.series(ONE, TWO)
    one, two = series.read("toy")
    digests = {series.digest(patches) for patches in ((), (one,), (one, two), (two, one))}
    assert len(digests) == 4


def test_what_a_patch_says_of_itself(toy: Toy) -> None:
    signed = ONE[1].replace("Subject: [PATCH] one", "Subject: [PATCH] one that\n is long")
    toy.series((ONE[0], signed + "-- \n2.39\n"))
    (patch,) = series.read("toy")
    assert patch.subject == "one that is long"
    assert patch.changes == {"main.c": (1, 1)}


def test_tree_holds_the_whole_tarball_and_goes_both_ways(toy: Toy) -> None:
    tree = at(toy, ONE, HEADER)
    assert "int first;" in (tree.src / "main.c").read_text()
    assert (tree.src / "common.h").read_text() == "#define COMMON 2\n"
    tree.checkout(())
    assert {name: (tree.src / name).read_text() for name in FILES} == FILES


def test_changing_one_patch_touches_only_what_differs(toy: Toy) -> None:
    tree = at(toy, ONE, HEADER)
    before = times(tree)
    # The first patch changes, so the header's is applied anew: to the same content.
    changed = (ONE[0], line_patch("one", 10, "int different;"))
    at(toy, changed, HEADER)
    after = times(tree)
    assert "int different;" in (tree.src / "main.c").read_text()
    assert {name for name in FILES if before[name] != after[name]} == {"main.c"}


def test_patch_that_does_not_apply_is_named_and_leaves_the_tree(toy: Toy) -> None:
    tree = at(toy, ONE)
    before = state(tree)
    toy.series(ONE, FUZZY)
    with pytest.raises(BuildError) as failure:
        tree.checkout(series.read("toy"))
    assert str(failure.value) == f"series: {FUZZY[0]} does not apply to toy 1.0: main.c:28"
    assert state(tree) == before


def test_patch_that_is_no_patch(toy: Toy) -> None:
    tree = at(toy, ONE)
    before = state(tree)
    toy.series(ONE, ("0002-noise.patch", "this is not a patch\n"))
    with pytest.raises(BuildError, match=r"0002-noise.patch does not apply to toy 1\.0: \w+"):
        tree.checkout(series.read("toy"))
    assert state(tree) == before


def test_same_series_makes_same_commits(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toy.series(ONE, TWO)
    patches = series.read("toy")
    first = open_tree("toy").commit(patches)
    monkeypatch.setenv("QVIS_CACHE", str(tmp_path / "another"))
    # Neither the user's settings nor a hook's environment may matter.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "not-a-repository"))
    monkeypatch.setenv("GIT_COMMITTER_NAME", "Somebody Else")
    assert open_tree("toy").commit(patches) == first


def test_checkout_that_was_killed_is_done_again(toy: Toy) -> None:
    tree = at(toy, ONE)
    # What a checkout leaves that dies half way: a lock, a file half written,
    # a file that no index has.
    (tree.src / ".git" / "index.lock").touch()
    (tree.src / "main.c").write_text("int ")
    (tree.src / "created.c").write_text("int created;\n")
    tree.checkout(())
    assert (tree.src / "main.c").read_text() == FILES["main.c"]
    assert not (tree.src / "created.c").exists()


def test_extraction_that_was_killed_is_done_again(toy: Toy) -> None:
    leftover = toy.cache / "trees" / ".toy.unfinished" / "src"
    leftover.mkdir(parents=True)
    (leftover / "stray.c").write_text("half")
    tree = open_tree("toy")
    assert not (tree.src / "stray.c").exists()
    assert not leftover.exists()


def test_tarball_that_is_cut_off_makes_no_tree(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    # With the right hash: a pin may be wrong, or the disk fail.
    toy.tarball = toy.tarball[:-40]
    folder = toy.cache.parent / "mine"
    folder.mkdir()
    (folder / "toy-1.0.tar.xz").write_bytes(toy.tarball)
    monkeypatch.setenv("QVIS_SOURCES", str(folder))
    toy.pin('url = "http://127.0.0.1:1/toy-1.0.tar.xz"')
    for _ in range(2):
        with pytest.raises(BuildError, match="extract"):
            open_tree("toy")
    assert not list((toy.cache / "trees").glob("toy-*"))


def test_apply_and_refresh_are_inverse(toy: Toy, tmp_path: Path) -> None:
    toy.series(ONE, HEADER)
    before = [patch.changes for patch in series.read("toy")]
    mine = tmp_path / "mine"
    develop.apply("toy", mine)
    assert git(mine, "log", "--format=%s", f"{develop.BASE}..", stage="test").split() == [
        "header",
        "one",
    ]
    develop.refresh("toy", mine)
    first = series.read("toy")
    assert [patch.changes for patch in first] == before
    # From now on the format is stable.
    develop.refresh("toy", mine)
    assert series.read("toy") == first


def test_refresh_takes_new_commits_and_drops_old_ones(toy: Toy, tmp_path: Path) -> None:
    toy.series(ONE, HEADER)
    (toy.patches / "toy" / "README").write_text("stays\n")
    mine = tmp_path / "mine"
    develop.apply("toy", mine)
    git(mine, "reset", "--hard", "HEAD~1", stage="test")
    (mine / "other.c").write_text("int new;\n")
    git(mine, "commit", "--all", "--message", "other: something new", stage="test")
    patches = develop.refresh("toy", mine)
    assert [patch.subject for patch in patches] == ["one", "other: something new"]
    assert sorted(path.name for path in (toy.patches / "toy").iterdir()) == [
        "0001-one.patch",
        "0002-other-something-new.patch",
        "README",
        "series",
    ]
    open_tree("toy").checkout(patches)


def test_refresh_wants_everything_committed(toy: Toy, tmp_path: Path) -> None:
    toy.series(ONE)
    mine = tmp_path / "mine"
    develop.apply("toy", mine)
    (mine / "other.c").write_text("int uncommitted;\n")
    with pytest.raises(UsageError, match="not committed"):
        develop.refresh("toy", mine)
    assert [patch.name for patch in series.read("toy")] == [ONE[0]]


def test_refresh_into_an_installed_package_says_what_to_do(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.series(ONE)
    develop.apply("toy", tmp_path / "mine")
    # Root may write anywhere, so ask in another way than by permissions.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="QVIS_PATCHES"):
        develop.refresh("toy", tmp_path / "mine")


def test_refresh_that_fails_leaves_the_series(toy: Toy, tmp_path: Path) -> None:
    toy.series(ONE, TWO)
    before = series.read("toy")
    mine = tmp_path / "mine"
    develop.apply("toy", mine)
    git(mine, "tag", "--delete", develop.BASE, stage="test")
    with pytest.raises(BuildError):
        develop.refresh("toy", mine)
    assert series.read("toy") == before
    assert sorted(path.name for path in toy.patches.iterdir()) == ["toy"]


def test_apply_needs_an_empty_directory(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not empty"):
        develop.apply("toy", tmp_path)


def test_developers_repository_does_without_the_cache(toy: Toy, tmp_path: Path) -> None:
    toy.series(ONE)
    develop.apply("toy", tmp_path / "mine")
    subprocess.run(["rm", "-rf", toy.cache], check=True)
    assert git(tmp_path / "mine", "fsck", "--full", stage="test") == ""
