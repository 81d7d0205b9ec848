# SPDX-License-Identifier: GPL-2.0-or-later
"""Running other programs so that they can neither hang nor outlive us."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .errors import BuildError, InfraError, QvisError

__all__ = ["TAIL_LINES", "run", "tail"]

TAIL_LINES = 15
GRACE = 5.0  # seconds between asking a process group to end and killing it


def run(
    command: Sequence[str | os.PathLike[str]],
    *,
    stage: str,
    log: Path,
    deadline: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    error: type[QvisError] = BuildError,
) -> None:
    """Run ``command`` with its output appended to ``log``; return when it succeeded.

    ``deadline`` is in seconds; ``on_line`` sees each line of output as it
    comes; ``env`` adds to the environment, in which the locale is always C.
    Raises ``error`` with the log's last lines when the command fails or takes
    too long, and :class:`InfraError` when it cannot be started or the disk is
    full. The command is told to end when this process dies, however it dies.
    """
    words = [os.fspath(word) for word in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "LC_ALL": "C", **(env or {})}
    expired = threading.Event()
    with log.open("a", encoding="utf-8", errors="replace") as out:
        print(f"$ {' '.join(words)}", file=out, flush=True)
        try:
            child = subprocess.Popen(
                # TERM rather than KILL: make and ninja then stop their own children.
                ["setpriv", "--pdeathsig", "TERM", "--", *words],
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as problem:
            raise InfraError(f"cannot run {words[0]}: {problem}", stage=stage) from problem

        def expire() -> None:
            expired.set()
            _end(child)

        timer = threading.Timer(deadline, expire)
        timer.daemon = True
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                out.write(line)
                if on_line:
                    on_line(line)
            child.wait()
        except BaseException:
            _end(child)
            raise
        finally:
            timer.cancel()
            if child.stdout:
                child.stdout.close()
    if expired.is_set():
        raise error(
            f"did not finish within {deadline:.0f} s", stage=stage, command=words, log=log,
            tail=tail(log),
        )  # fmt: skip
    if child.returncode:
        last = tail(log)
        if any("No space left on device" in line for line in last):
            raise InfraError("the disk is full", stage=stage, command=words, log=log, tail=last)
        raise error(
            f"failed with exit status {child.returncode}", stage=stage, command=words, log=log,
            tail=last,
        )  # fmt: skip


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last ``lines`` lines of ``log``; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 64 * 1024))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()[-lines:]


def _end(child: subprocess.Popen[str]) -> None:
    """End the child's whole session: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(GRACE)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
