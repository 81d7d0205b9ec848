# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the points of a sweep are worked out: processes of this host, or a Dask cluster.

Both are a :class:`concurrent.futures.Executor`, so that nothing else knows which it is.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ..errors import InfraError, UsageError

__all__ = ["Engine", "cluster", "processes"]

LOGGERS = ("distributed", "tornado")
DEADLINE = 10.0  # seconds in which a scheduler has to answer and to have a worker
ADDRESS = re.compile(r"(\w+://)?[^/\s]+:\d{1,5}")


@dataclass(frozen=True)
class Engine:
    """Something that works."""

    name: str
    executor: Executor
    width: int  # how many points it works on at a time
    alive: Callable[[], bool]


@contextmanager
def processes(jobs: int | None, preload: str) -> Iterator[Engine]:
    """``jobs`` processes of this host, one a CPU if None; each has imported module ``preload``.

    They are forked by a server that has done nothing but import it: a fork of this
    process would copy its threads' locks (a progress bar is a thread), and to start a new
    interpreter for each takes half a second. They end with this block, and with this
    process however that dies.
    """
    jobs = jobs or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    reader, writer = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(jobs, context, _begin, (reader,))
    try:
        yield Engine("this host", executor, jobs, lambda: True)
    except BaseException:
        writer.close()  # which ends the workers in the middle of what they do
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        writer.close()
        reader.close()


def _begin(end: Connection) -> None:
    """What a process does first. Nobody but the one that wants it holds the pipe's other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all of a group

    def wait() -> None:
        end.poll(None)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def cluster(address: str) -> Iterator[Engine]:
    """The workers of the Dask scheduler at ``address``, such as ``tcp://host:8786``.

    It moves the points of a worker that is lost to others. Raises :class:`InfraError` when
    Dask is not installed, when the scheduler does not answer or has no workers, and
    :class:`UsageError` when that is no address.
    """
    name = f"the scheduler at {address}"
    with _quiet(), _client(address, name) as client:
        width = sum(client.nthreads().values())
        executor = client.get_executor(pure=False)
        try:
            yield Engine(name, executor, width, lambda: client.status != "closed")
        finally:
            executor.shutdown(wait=False)


@contextmanager
def _client(address: str, name: str) -> Iterator[Any]:
    # A client that cannot read its address complains for another 20 s when it is thrown away.
    if not ADDRESS.fullmatch(address):
        raise UsageError(f"bad scheduler {address!r}: write it as tcp://host:8786")
    try:
        distributed = importlib.import_module("distributed")
    except ImportError as problem:
        raise InfraError(
            f"--scheduler needs Dask ({problem}): `pip install 'qvis[cluster]'`"
        ) from None
    try:
        client = distributed.Client(address, timeout=DEADLINE, set_as_default=False)
    except ValueError as problem:
        raise UsageError(f"bad scheduler {address!r}: {problem}") from None
    except OSError as problem:  # TimeoutError is one
        raise InfraError(f"{name} does not answer ({DEADLINE:.0f} s)") from problem
    try:
        try:
            client.wait_for_workers(1, timeout=DEADLINE)
        except TimeoutError:
            raise InfraError(f"{name} has no workers ({DEADLINE:.0f} s)") from None
        yield client
    finally:
        client.close(timeout=DEADLINE)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask from telling at length what an exception of ours says in a line.

    It gives several loggers a level and an output of their own when it is imported.
    """
    with suppress(ImportError):
        importlib.import_module("distributed")
    names = [name for name in logging.root.manager.loggerDict if name.startswith(LOGGERS)]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
