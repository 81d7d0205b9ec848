# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures by life cycle, times two dimensions: ``transport`` and ``backend``.

``vm`` is a booted guest shared by all tests of one transport and backend that
leave it as they found it; ``boot`` makes a guest of a test's own. Everything
runs in a state folder of the test run's, which must be empty of machines, and
the host of QEMUs, when it ends.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qvis
from qvis import backends
from qvis.machine.machine import Machine
from qvis.transport import COMPARED

SMP = QUEUES = 4
EVERY_TRANSPORT = pytest.mark.parametrize(
    "transport", list(qvis.Transport), indirect=True, scope="session"
)


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder for this run; at its end nothing may be alive in it."""
    folder = tmp_path_factory.mktemp("s")
    previous = os.environ.get("QVIS_STATE")
    os.environ["QVIS_STATE"] = str(folder)
    yield folder
    gone(str(folder), 5)
    survivors = processes(str(folder))
    for folder_left in (folder / "machines").glob("*"):
        survivors.append(f"folder {folder_left.name}")
    if previous is None:
        del os.environ["QVIS_STATE"]
    else:
        os.environ["QVIS_STATE"] = previous
    assert not survivors, f"the tests left behind: {survivors}"


def processes(text: str) -> list[str]:
    """Command lines of processes, other than this one, that name ``text`` or work in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            place = str((process / "cwd").readlink())
        except OSError:
            continue
        if line and (text in line or place.startswith(text)):
            found.append(f"{process.name}: {line}")
    return found


def gone(text: str, wait: float = 10.0) -> bool:
    """Whether no process names ``text`` any more, within ``wait`` seconds.

    A process that has let go of its lock still has to exit.
    """
    end = time.monotonic() + wait
    while processes(text):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="session", params=["tcg", "kvm", "emulated"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend; one that does not work here is skipped, with why."""
    name: str = request.param
    probe = backends.available()[name].probe()
    if not probe.works:
        pytest.skip(f"backend {name} does not work here: {probe.reason}")
    return name


@pytest.fixture(scope="session", params=list(COMPARED))
def transport(request: pytest.FixtureRequest) -> qvis.Transport:
    """Each transport; tests that are cheap take vis-doorbell as well (``EVERY_TRANSPORT``)."""
    value: qvis.Transport = request.param
    return value


@pytest.fixture(scope="session")
def vm(backend: str, transport: qvis.Transport) -> Iterator[Machine]:
    """A guest of four vCPUs and four queues, shared by the tests of its dimensions."""
    with qvis.up(backend=backend, transport=transport, smp=SMP, queues=QUEUES) as machine:
        yield machine


@pytest.fixture
def boot(backend: str) -> Iterator[Callable[..., Machine]]:
    """Boots guests that end with the test."""
    machines: list[Machine] = []

    def make(**what: Any) -> Machine:
        machines.append(qvis.up(**{"backend": backend, **what}))
        return machines[-1]

    yield make
    for machine in machines:
        machine.down()


@pytest.fixture
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``qvis`` as a user would."""

    def run(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["qvis", *words], capture_output=True, text=True, timeout=400, check=False, **more
        )

    return run
