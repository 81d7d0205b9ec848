# SPDX-License-Identifier: GPL-2.0-or-later
"""A source tree that can be put to any point of a series, and its build folders.

A tree is a git repository: the tarball is its first commit, and every prefix
of a series that was ever asked for is a ref. Patches are applied beside the
tree, in a worktree with an index but no files, so that one that does not apply
leaves everything as it was. The tree then goes from one commit to the other in
one checkout, and the files in which it differs from what a build folder was
last built from, and no others, get new time stamps: the next build is as
incremental as can be.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import BuildError, InfraError
from ..paths import cache_dir
from ..process import run
from ..progress import step
from .cache import log_file, space_checked
from .git import git
from .series import Patch, digest
from .sources import Source, fetch, known

__all__ = ["BASE", "Tree", "open_tree"]

BASE = "qvis-base"  # the tag of the unpatched sources in every tree of ours
EXTRACT_DEADLINE = 900.0  # seconds
DOUBT = 30.0  # seconds; no tool takes longer to write a file that it has begun
LONG_AGO = 978307200  # seconds since the epoch: 2001-01-01
CHECKPATCH_DEADLINE = 120.0  # seconds a patch
# QEMU's checkpatch asks this of every patch to a header that it has from Linux. That ours are
# there by hand, until Linux has them, is what the patch's message says.
REMINDER = "file(s) imported from Linux, are you using"


@dataclass(frozen=True)
class Tree:
    """The extracted sources of one tarball. The caller holds the component's lock."""

    source: Source
    root: Path

    @property
    def src(self) -> Path:
        """The work tree."""
        return self.root / "src"

    def commit(self, patches: Sequence[Patch]) -> str:
        """The commit with these patches applied, without touching the work tree.

        Raises :class:`BuildError` that names the patch which does not apply,
        and the file and line that git complained about.
        """
        for done in range(len(patches), 0, -1):
            if commit := self._known(patches[:done]):
                break
        else:
            done = 0
            commit = git(self.src, "rev-parse", f"{BASE}^{{commit}}", stage="series").strip()
        return self._apply(commit, patches[:done], patches[done:])

    def checkout(self, patches: Sequence[Patch]) -> None:
        """Bring the work tree to the sources with these patches."""
        commit = self.commit(patches)
        lock = self.src / ".git" / "index.lock"
        killed = lock.exists()
        # Whoever made it is gone, since we hold the component's lock.
        lock.unlink(missing_ok=True)
        git(self.src, "checkout", "--quiet", "--force", "--detach", commit, stage="checkout")
        if killed:
            # Files that the killed checkout created are in no index.
            git(self.src, "clean", "-fdq", stage="checkout")

    @contextmanager
    def building(
        self, patches: Sequence[Patch], configuration: str, variant: str = ""
    ) -> Iterator[Path]:
        """The build folder with all that is in it from last time, if it can be trusted.

        The work tree has these ``patches``. There is a folder for the patched
        and one for the unpatched sources, and such a pair for each ``variant``, so
        that none costs another its objects. It is emptied when it was made with
        another ``configuration``.
        When the last build in it was cut short so abruptly (kill -9, power, a
        full disk) that the tools could not clean up, what they wrote last is
        removed.
        """
        name = "build" if patches else "build-base"
        name += f"-{variant}" if variant else ""
        build = self.root / name
        made_with = self.root / f"{name}.configuration"
        running = self.root / f"{name}.running"
        commits = self.root / f"{name}.commits"
        wanted = f"{self.src}\n{configuration}"
        commit = self.commit(patches)
        with space_checked():
            known = made_with.exists() and made_with.read_text() == wanted
            if not known or not commits.exists():
                shutil.rmtree(build, ignore_errors=True)
                commits.unlink(missing_ok=True)
                build.mkdir()
                made_with.write_text(wanted)
            elif running.exists():
                _distrust(build)
            # Objects may be of the last commit that was built, and of any that failed since.
            before = commits.read_text().split() if commits.exists() else []
            self._set_times(before, commit)
            commits.write_text("\n".join([*before, commit]))
            running.touch()
            try:
                yield build
            except (InfraError, OSError):
                raise
            except BaseException:
                # A compiler said no, or the user did: the tools cleaned up.
                running.unlink()
                raise
            commits.write_text(commit)
            running.unlink()

    def _set_times(self, before: Sequence[str], commit: str) -> None:
        """Make those files new that differ from the commits that were built before.

        The others that a checkout may have written hold what the objects were
        made from, so they get a time that is older than any object.
        """
        changed = {name for one in before for name in self._differing(one, commit)}
        written = self.root / "written"
        known = set(written.read_text().splitlines()) if written.exists() else set()
        known |= changed | set(self._differing(BASE, commit))
        written.write_text("\n".join(sorted(known)))
        for name in known:
            if (self.src / name).exists():
                os.utime(self.src / name, None if name in changed else (LONG_AGO, LONG_AGO))

    def _differing(self, one: str, other: str) -> list[str]:
        return git(self.src, "diff", "--name-only", one, other, stage="checkout").splitlines()

    def export(self, patches: Sequence[Patch], directory: Path) -> None:
        """A repository of a developer's own: the base, tagged, and the series as commits."""
        commit = self.commit(patches)
        git(self.root, "clone", "--quiet", "--no-checkout", self.src, directory, stage="export")
        git(directory, "remote", "remove", "origin", stage="export")
        git(directory, "checkout", "--quiet", "-B", "qvis", commit, stage="export")

    def checkpatch(self, patch: Patch) -> list[str]:
        """What the project's own style checker says about a patch; empty when it is content."""
        file = self.root / patch.name
        file.write_bytes(patch.content)
        strict = ["--strict"] if self.source.component == "linux" else []  # QEMU's has it not
        try:
            done = subprocess.run(
                ["perl", "scripts/checkpatch.pl", "--terse", "--no-summary", *strict, file],
                cwd=self.src,
                # Neither the user's .checkpatch.conf nor perl's complaints about a locale.
                env={"PATH": os.environ["PATH"], "HOME": str(self.root), "LC_ALL": "C"},
                capture_output=True,
                text=True,
                timeout=CHECKPATCH_DEADLINE,
                check=False,
            )
        finally:
            file.unlink()
        # What it asks other programs goes to its errors, as that they are not installed.
        words = done.stdout or (done.stderr if done.returncode else "")
        said = [line.removeprefix(f"{file}:") for line in words.splitlines()]
        lines = [line for line in said if REMINDER not in line]
        return lines or ([f"exit status {done.returncode}"] if done.returncode and not said else [])

    def _known(self, patches: Sequence[Patch]) -> str:
        """The commit with these patches if it was made before, else an empty string."""
        ref = _ref(patches)
        return git(self.src, "for-each-ref", "--format=%(objectname)", ref, stage="series").strip()

    def _apply(self, commit: str, before: Sequence[Patch], patches: Sequence[Patch]) -> str:
        """Apply ``patches`` on ``commit``, remember each step, and return the last."""
        if not patches:
            return commit
        scratch = self.root / "am"
        mails = self.root / "mails"
        self._discard(scratch, mails)
        mails.mkdir()
        files = []
        for number, patch in enumerate(patches):
            files.append(mails / f"{number:04}-{Path(patch.name).name}")
            files[-1].write_bytes(patch.content)
        try:
            git(self.src, "worktree", "add", "--quiet", "--no-checkout", "--detach", scratch,
                commit, stage="series")  # fmt: skip
            git(scratch, "read-tree", commit, stage="series")
            try:
                git(scratch, "am", "--committer-date-is-author-date", *files, stage="series")
            except BuildError as problem:
                raise self._refusal(patches, problem) from problem
            commits = git(
                scratch, "rev-list", "--reverse", f"{commit}..HEAD", stage="series"
            ).split()
            if len(commits) != len(patches):
                raise BuildError(
                    f"{len(patches)} patch files make {len(commits)} commits", stage="series"
                )
            for number, made in enumerate(commits, 1):
                ref = _ref([*before, *patches[:number]])
                git(self.src, "update-ref", ref, made, stage="series")
            return commits[-1]
        finally:
            self._discard(scratch, mails)

    def _discard(self, scratch: Path, mails: Path) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(mails, ignore_errors=True)
        git(self.src, "worktree", "prune", stage="series")

    def _refusal(self, patches: Sequence[Patch], problem: BuildError) -> BuildError:
        said = "\n".join(problem.tail)
        at = re.search(r"^Patch failed at (\d+)", said, re.MULTILINE)
        patch = patches[int(at[1]) - 1] if at else patches[0]
        where = re.search(r"^error: (?:patch failed: )?(.*)$", said, re.MULTILINE)
        return BuildError(
            f"{patch.name} does not apply to {self.source.component} {self.source.version}: "
            f"{where[1] if where else problem.message}",
            stage="series",
            tail=problem.tail,
        )


def open_tree(component: str) -> Tree:
    """The tree of a component, fetched and extracted if there is none yet.

    The caller holds the component's lock.
    """
    for source in known(component):
        root = _root(source)
        if root.is_dir():
            return Tree(source, root)
    source, tarball = fetch(component)
    root = _root(source)
    unfinished = root.with_name(f".{component}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    src = unfinished / "src"
    log = log_file(component)
    with space_checked(), step(f"extract {source.file}", log) as progress:
        src.mkdir(parents=True)
        run(
            ["tar", "-xJf", tarball, "-C", src, "--strip-components=1", "--no-same-owner"],
            stage="extract", log=log, deadline=EXTRACT_DEADLINE,
        )  # fmt: skip
        progress.update(1, 2)
        git(src, "init", "--quiet", "--initial-branch=base", stage="extract")
        # Loose objects are read a few times only: neither pack nor compress them.
        git(src, "config", "gc.auto", "0", stage="extract")
        git(src, "config", "core.looseCompression", "0", stage="extract")
        # By force: what the project ignores is part of its tarball all the same.
        git(src, "add", "--all", "--force", stage="extract")
        git(src, "commit", "--quiet", "--message", f"{component} {source.version}", stage="extract")
        git(src, "tag", BASE, stage="extract")
        unfinished.rename(root)
    return Tree(source, root)


def _distrust(build: Path) -> None:
    """Remove what was being written when the last build died.

    make takes an object for a good one because it is newer than its source,
    even half an object. ninja does not: it believes its log only.
    """
    written = {
        path: path.lstat().st_mtime
        for path in build.rglob("*")
        if not path.is_dir() and not path.name.startswith(".ninja_")
    }
    end = max(written.values(), default=0.0)
    for path, time in written.items():
        if time > end - DOUBT:
            path.unlink()


def _root(source: Source) -> Path:
    name = f"{source.component}-{source.version}-{source.sha256[:8]}"
    return cache_dir() / "trees" / name


def _ref(patches: Sequence[Patch]) -> str:
    return f"refs/qvis/{digest(patches)}"
