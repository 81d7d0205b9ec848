# SPDX-License-Identifier: GPL-2.0-or-later
"""Results that are named by what went into them.

The cache folder holds::

    sources/    tarballs, each checked against its pin
    trees/      one extracted source tree a tarball, with its build folder
    results/    <component>-<key>/: what :func:`create` finished
    logs/       the output of the last build of each component
    locks/      one file a component

A result exists under its name only when it is whole: it is made in a folder
with another name and renamed, so nothing has to be repaired after a kill.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InfraError
from ..paths import cache_dir
from ..progress import note

__all__ = [
    "COMPILER",
    "compiler",
    "create",
    "find",
    "key",
    "lock",
    "log_file",
    "result",
    "space_checked",
]

COMPILER = "gcc"


def key(*inputs: str | bytes) -> str:
    """A name for what these inputs make: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in inputs:
        data = part.encode() if isinstance(part, str) else part
        # The length keeps ("ab", "c") apart from ("a", "bc").
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:16]


def result(component: str, result_key: str) -> Path:
    """The folder that the result of that name is in once it is made."""
    return _folder("results") / f"{component}-{result_key}"


def find(component: str, result_key: str) -> Path | None:
    """The folder of the result of that name, if there is one."""
    path = result(component, result_key)
    return path if path.is_dir() else None


@contextmanager
def create(component: str, result_key: str) -> Iterator[Path]:
    """A folder to make a result in; it becomes findable when the block succeeds.

    The caller holds the component's :func:`lock`.
    """
    final = result(component, result_key)
    unfinished = final.with_name(f".{component}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with space_checked():
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            unfinished.rename(final)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


@contextmanager
def space_checked() -> Iterator[None]:
    """Turn the operating system's "disk full" into an :class:`InfraError`."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InfraError(
            f"the disk is full: free some space under {cache_dir()} (all of it can be made again)"
        ) from problem


@contextmanager
def lock(component: str) -> Iterator[None]:
    """Keep other processes away from a component's tree, build folder and results.

    Says so, and names the other process, when it has to wait. The lock goes
    with the process that holds it, however that ends. Not reentrant.
    """
    path = _folder("locks") / component
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            note(f"waiting for another qvis (process {file.read() or '?'}) to finish {component}")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def log_file(component: str) -> Path:
    """Where the output of a component's build goes."""
    return _folder("logs") / f"{component}.log"


def compiler(name: str = COMPILER) -> str:
    """A C compiler's version line, asked for once for each compiler file."""
    found = shutil.which(name)
    if not found:
        raise InfraError(f"no {name} on the path")
    path = Path(found).resolve()
    status = path.stat()
    identity = f"{path} {status.st_size} {status.st_mtime_ns}"
    memo = cache_dir() / ("compiler.json" if name == COMPILER else f"compiler-{name}.json")
    try:
        known = json.loads(memo.read_text())
        if known["identity"] == identity:
            return str(known["version"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no memo, or not one of ours: ask
    answer = subprocess.run(
        [path, "--version"], capture_output=True, text=True, timeout=30, check=True
    )
    version = answer.stdout.splitlines()[0]
    with space_checked():
        # Two processes may do this at once: each replaces the file whole.
        temporary = memo.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"identity": identity, "version": version}))
        temporary.replace(memo)
    return version


def _folder(name: str) -> Path:
    path = cache_dir() / name
    path.mkdir(exist_ok=True)
    return path
