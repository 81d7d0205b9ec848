# SPDX-License-Identifier: GPL-2.0-or-later
"""Which patch of a series changed the counts of a golden file.

A prefix of the series is good or bad by ``qvis gate check``, run as a process of its own with
``QVIS_PATCHES`` naming that prefix: so whatever is built of patches is built of these, and a
probe is what anybody can repeat by hand. What was built before is in the cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import paths
from ..build import series
from ..errors import InfraError, UsageError
from ..progress import note
from ..transport import Transport
from .gate import Cell, Change, Golden

__all__ = ["Found", "bisect", "search"]

DEADLINE = 3 * 3600.0  # seconds for one probe: the builds' and boots' own deadlines and some
Key = tuple[Transport, str, Cell | None]
Probe = Callable[[int, Sequence[Transport]], "Sequence[Change] | None"]
"""What differs with the first N patches, on these transports (none: all); None: no telling."""


@dataclass(frozen=True)
class Found:
    """``suspects`` are the patches between the last good and the first bad prefix."""

    total: int
    good: int  # so many patches are good
    bad: int  # and so many bad; `good` + 1 unless what is between cannot be tested
    suspects: tuple[series.Patch, ...]
    changes: tuple[Change, ...]  # of the counts that decided, at the first bad prefix

    def lines(self) -> list[str]:
        """The answer in words; the changes are to follow."""
        if not self.bad:
            return [f"with all {self.total} patches the counts are the file's: nothing to find"]
        named = [f"  {patch.name}: {patch.subject}" for patch in self.suspects]
        if len(named) == 1:
            return [f"the first {self.good} patches are good; this one changes counts:", *named]
        reason = f"what is between {self.good} and {self.bad} patches cannot be tested"
        return [f"one of these changes counts ({reason}):", *named]


def bisect(file: Path, component: str, *, good: int | None = None) -> Found:
    """Find the first patch of ``component``'s series with which ``file``'s counts change.

    ``good`` is a number of patches that are known to be good; without, one is looked for,
    backwards from the whole series. Raises :class:`UsageError` when there is none, or nothing
    to be bisected, and :class:`InfraError` when a probe comes to no verdict.
    """
    golden = Golden.load(file)
    if component == "kvm" and golden.shape.backend != "nested":
        raise UsageError(
            f"{file} was recorded on {golden.shape.backend}, where no patch of KVM is at work"
        )
    patches = series.read(component)
    if not patches:
        raise UsageError(f"the series {component} has no patches")
    if good is not None and not 0 <= good < len(patches):
        raise UsageError(f"--good must be between 0 and {len(patches) - 1}, not {good}")
    with _probing(file.absolute(), component, patches) as probe:
        return search(patches, probe, good)


def search(patches: Sequence[series.Patch], probe: Probe, good: int | None = None) -> Found:
    """Bisect ``patches``; the logic of :func:`bisect` with ``probe`` to say what a prefix does.

    Counts decide that the whole series changes, and only in the direction in which it does:
    with fewer patches others differ, and these too, for lack of what is not there yet. Counts
    that grew decide alone if there are any, since what is not there yet makes none grow.
    """
    total = len(patches)
    now = probe(total, ())
    if now is None:
        raise UsageError("with all patches it does not come to a count: nothing can be compared")
    if not now:
        return Found(total, total, 0, (), ())
    grown = [change for change in now if change.after > change.before]
    decisive = {_key(change): change.after > change.before for change in grown or now}
    transports = sorted({transport for transport, _, _ in decisive})
    known: dict[int, list[Change] | None] = {
        total: [change for change in now if _key(change) in decisive]
    }

    def look(count: int) -> list[Change] | None:
        if count not in known:
            differs = probe(count, transports)
            known[count] = None if differs is None else [
                change for change in differs
                if decisive.get(_key(change)) == (change.after > change.before)
            ]  # fmt: skip
        return known[count]

    if good is None:
        best = _last_good(total, look)
    elif look(best := good) is None or look(best):
        how = "cannot be tested" if look(best) is None else "has the change already"
        raise UsageError(f"what has the first {good} patches {how}: name another one with --good")
    worst = min(count for count, changes in known.items() if changes and count > best)
    while untried := [n for n in range(best + 1, worst) if n not in known]:
        middle = min(untried, key=lambda n: abs(2 * n - best - worst))
        changes = look(middle)
        if changes:
            worst = middle
        elif changes is not None:
            best = middle
    return Found(total, best, worst, tuple(patches[best:worst]), tuple(known[worst] or ()))


def _last_good(total: int, look: Callable[[int], list[Change] | None]) -> int:
    """A prefix without the change, looked for in steps that double."""
    step = 1
    while step < 2 * total:
        count = max(total - step, 0)
        if look(count) == []:
            return count
        step *= 2
    raise UsageError(
        "no prefix that was tried is without the change: it may come of something else (another "
        "series, the compiler, qvis), or a good prefix was stepped over: name it with --good N"
    )


def _key(change: Change) -> Key:
    return change.transport, change.operation, change.cell


@contextmanager
def _probing(file: Path, component: str, patches: Sequence[series.Patch]) -> Iterator[Probe]:
    """A probe that builds prefixes of a series and checks each against ``file``."""
    with tempfile.TemporaryDirectory(prefix="qvis-bisect-") as folder:
        root = Path(folder) / "patches"
        shutil.copytree(paths.patches_dir(), root)
        order = root / component / "series"

        def probe(count: int, transports: Sequence[Transport]) -> Sequence[Change] | None:
            order.write_text("".join(f"{patch.name}\n" for patch in patches[:count]))
            what = f"the first {count} of {len(patches)} {component} patches"
            note(f"bisect: testing {what}")
            changes = _check(file, root, transports)
            verdict = "cannot be tested" if changes is None else f"{len(changes)} counts differ"
            note(f"bisect: {what}: {verdict}")
            return changes

        yield probe


def _check(file: Path, patches: Path, transports: Sequence[Transport]) -> Sequence[Change] | None:
    chosen = ["--transports", ",".join(transports)] if transports else []
    command = [sys.executable, "-m", "qvis", "gate", "check", str(file), "--json", *chosen]
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", "--", *command],
        env={**os.environ, "QVIS_PATCHES": str(patches)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is ours, and told once
    ) as child:
        try:
            said, _ = child.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            child.terminate()
            return None
        except BaseException:
            child.terminate()  # which lets it clean up
            child.wait()
            raise
    if child.returncode == 125:
        return None
    if child.returncode not in (0, 1):
        raise InfraError(
            f"`qvis gate check` came to no verdict (exit status {child.returncode}): what it said "
            "is above",
            stage="bisect",
            command=command,
        )
    try:
        return [Change.from_json(each) for each in json.loads(said)["changes"]]
    except (ValueError, KeyError, TypeError) as problem:
        raise InfraError(f"`qvis gate check` said nothing that can be read: {problem!r}",
                         stage="bisect", command=command) from problem  # fmt: skip
