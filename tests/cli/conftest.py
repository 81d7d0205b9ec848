# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of several verbs share."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest

from qvis.cli import main

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """`qvis` in this process: starting one for each of so many lines would take a minute."""
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in signals}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        status = main(list(words))
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, said.out, said.err)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
