# SPDX-License-Identifier: GPL-2.0-or-later
"""A grid of emulated machines, worked out on all cores or a cluster, that survives its death.

A sweep has a folder::

    results.jsonl   a line a point, appended when the point is done
    results.csv     those of the latest grid as a table, written at the end
    lock            held while a sweep works here

A point is known by its parameters, its costs and the model's sources: what of a grid is in
``results.jsonl`` already is not done again, unless it failed.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..emulated.costs import Costs
from ..errors import InfraError, QvisError, UsageError
from ..progress import step
from . import offered
from .engine import Engine, cluster, processes
from .grid import Grid, Point

__all__ = ["CSV", "RESULTS", "Outcome", "Results", "sweep"]

RESULTS = "results.jsonl"
CSV = "results.csv"
LOCK = "lock"
AHEAD = 4  # points given out for each that is worked on, so that nobody waits for the next
KILLED = "a worker was killed, as happens when memory runs out (fewer --jobs need less)"
AGAIN = "; the same command goes on with what is missing"
WATCH = 1.0  # seconds between two looks at an engine that gives no result

Measure = Callable[[Point, Costs], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What a sweep leaves."""

    path: Path  # of the lines
    lines: tuple[dict[str, Any], ...]  # of all points of the grid, in its order
    measured: int  # how many of them were not there before

    @property
    def failed(self) -> int:
        """How many points have an error instead of numbers."""
        return sum("error" in line for line in self.lines)


def sweep(
    folder: Path,
    grid: Grid,
    *,
    costs: Costs | None = None,
    jobs: int | None = None,
    scheduler: str | None = None,
    measure: Measure = offered.measure,
) -> Outcome:
    """Measure the points of ``grid`` that ``folder`` does not have yet.

    ``jobs`` processes of this host do it (one a CPU if None), or the workers of the Dask
    scheduler at the address ``scheduler``. A point that fails is a line with its error.
    ``costs`` are the model's own if None; ``measure`` is a function of a module.

    Raises :class:`UsageError` when another sweep works in ``folder`` or its lines are
    damaged; :class:`InfraError` when it cannot be written, when a worker dies or is of
    another qvis, and when the scheduler does not answer. What was done stays.
    """
    costs = costs or Costs.load()
    model = offered.identity()
    with Results(folder) as results:
        keys = {key(point, costs, model): point for point in grid.points()}
        missing = {name: point for name, point in keys.items() if not results.has(name)}
        if missing:
            engine = cluster(scheduler) if scheduler else processes(jobs, offered.__name__)
            same = {"costs": costs.identity, "model": model}
            with step(f"sweep of {len(missing)} points") as progress, engine as at:
                found = _complete(at, missing, lambda point: (measure, point, costs, model))
                for done, (name, numbers) in enumerate(found, 1):
                    results.add({"key": name, **same, **missing[name].parameters(), **numbers})
                    progress.update(done, len(missing))
        lines = tuple(results.line(name) for name in keys)
        write_csv(folder / CSV, lines)
    return Outcome(folder / RESULTS, lines, len(missing))


def key(point: Point, costs: Costs, model: str) -> str:
    """What a point's result is known by."""
    identity = [point.parameters(), costs.identity, model]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def attempt(measure: Measure, point: Point, costs: Costs, model: str) -> dict[str, Any]:
    """What a worker does: a point's numbers, or its error.

    Raises :class:`InfraError` when this worker would measure another model.
    """
    if (own := offered.identity()) != model:
        raise InfraError(
            f"the worker on {os.uname().nodename} has another qvis: its model is {own}, "
            f"and here it is {model}"
        )
    begun = time.thread_time()
    try:
        found = measure(point, costs)
    except Exception as problem:
        words = str(problem) if isinstance(problem, QvisError) else repr(problem)
        found = {"error": " ".join(words.split())}
    return {**found, "host seconds": round(time.thread_time() - begun, 6)}


def _complete(
    at: Engine, points: Mapping[str, Point], arguments: Callable[[Point], tuple[Any, ...]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The points' results as they come."""
    running: dict[Future[dict[str, Any]], str] = {}
    waiting = iter(points)
    while True:
        while len(running) < AHEAD * at.width and (name := next(waiting, None)):
            try:
                work = at.executor.submit(attempt, *arguments(points[name]))
            except BrokenProcessPool:
                raise InfraError(f"{KILLED}{AGAIN}") from None
            running[work] = name
        if not running:
            return
        done = wait(running, timeout=WATCH, return_when=FIRST_COMPLETED).done
        if not done and not at.alive():
            raise InfraError(f"{at.name} is gone{AGAIN}")
        for work in done:
            name = running.pop(work)
            yield name, _result(work, at)


def _result(work: Future[dict[str, Any]], at: Engine) -> dict[str, Any]:
    """What became of a point."""
    try:
        return work.result()
    except QvisError:
        raise
    except BrokenProcessPool:
        raise InfraError(f"{KILLED}{AGAIN}") from None
    except CancelledError:
        raise InfraError(f"{at.name} is gone{AGAIN}") from None
    except (ImportError, AttributeError) as problem:  # what a worker cannot unpickle
        raise InfraError(f"a worker of {at.name} has another qvis, or none: {problem}") from None
    except Exception as problem:  # it was lost with its worker, and so again elsewhere
        return {"error": " ".join(f"{type(problem).__name__}: {problem}".split())}


class Results:
    """The lines in a folder, and the right to add to them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / RESULTS
        self._places: dict[str, int] = {}  # where the latest line of each point is
        self._failed: set[str] = set()

    def __enter__(self) -> Results:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / LOCK).open("a")
            self._file = self._path.open("a+b", buffering=0)
        except OSError as problem:
            raise InfraError(f"cannot write in {self._folder}: {problem.strerror}") from problem
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._close()
            raise UsageError(f"another sweep works in {self._folder}") from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, what: BaseException | None, at: TracebackType | None
    ) -> None:
        self._close()

    def has(self, name: str) -> bool:
        """Whether that point was measured, and did not fail."""
        return name in self._places and name not in self._failed

    def line(self, name: str) -> dict[str, Any]:
        """What is known of a point; KeyError if nothing."""
        with self._path.open("rb") as file:
            file.seek(self._places[name])
            found: dict[str, Any] = json.loads(file.readline())
        return found

    def add(self, line: dict[str, Any]) -> None:
        """Keep a point's line for good: it is the file's when this returns."""
        data = json.dumps(line).encode() + b"\n"
        try:
            at = self._file.seek(0, os.SEEK_END)
            written = self._file.write(data)
        except OSError as problem:
            raise InfraError(f"cannot write {self._path}: {problem.strerror}") from problem
        if written != len(data):
            raise InfraError(f"cannot write {self._path}: {os.strerror(errno.ENOSPC)}")
        self._note(line, at)

    def _note(self, line: dict[str, Any], at: int) -> None:
        self._places[line["key"]] = at
        (self._failed.add if "error" in line else self._failed.discard)(line["key"])

    def _read(self) -> None:
        """Learn what is there; half a line at the end is of a sweep that was killed."""
        at = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self._file.truncate(at)
                    break
                try:
                    self._note(json.loads(line), at)
                except (ValueError, KeyError, TypeError):
                    raise UsageError(
                        f"{self._path} is damaged in line {number}: take that line out"
                    ) from None
                at += len(line)

    def _close(self) -> None:
        self._file.close()
        self._lock.close()


def write_csv(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """The lines as a table, one column a number; of a list, such as one per CPU, its parts."""
    rows = [dict(_flat(line)) for line in lines]
    columns = dict.fromkeys(column for row in rows for column in row)
    temporary = path.with_suffix(".new")
    try:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(rows)
        temporary.rename(path)
    except OSError as problem:
        raise InfraError(f"cannot write {path}: {problem.strerror}") from problem


def _flat(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}: ")
        elif isinstance(value, list):
            yield f"{prefix}{name}", " ".join(map(str, value))
        else:
            yield f"{prefix}{name}", value
