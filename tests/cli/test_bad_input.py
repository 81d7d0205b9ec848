# SPDX-License-Identifier: GPL-2.0-or-later
"""Bad input gets one clear line, its documented exit status, and leaves nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qvis.cli import VERBS

Cli = Callable[..., subprocess.CompletedProcess[str]]

USAGE = [
    ("frobnicate", "unknown verb 'frobnicate'"),
    (
        "up --transport isa",
        "unknown transport 'isa': choose one of pci, intx, msi, vis, vis-doorbell",
    ),
    ("up --backend xen", "unknown backend 'xen': choose one of auto, emulated, kvm, nested, tcg"),
    ("up --smp 0", "--smp must be between 1 and 1024, not 0"),
    ("up --smp many", "invalid int value: 'many'"),
    ("up --queues 0", "--queues must be between 1 and 256, not 0"),
    ("up --memory 5Q", "bad memory size '5Q'"),
    ("up --memory 512B", "bad memory size '512B'"),
    ("up --memory 1M", "--memory (MiB) must be between 128 and"),
    ("up --name ../../etc", "bad machine name '../../etc'"),
    ("up --name -x", "expected one argument"),
    ("down", "name the machines to end, or say --all"),
    ("down ghost", "no machine named 'ghost'"),
    ("ssh ghost", "no machine named 'ghost'"),
    ("exec ghost -- true", "no machine named 'ghost'"),
    ("exec ghost", "no command"),
    ("console ghost", "no machine named 'ghost'"),
    ("logs ghost", "no machine named 'ghost'"),
    ("qmp ghost query-status", "no machine named 'ghost'"),
    ("qmp ghost", "give a COMMAND, or --events"),
    ("qmp ghost cont x", "bad argument 'x': write it as key=value"),
    ("irq ghost", "no machine named 'ghost'"),
    ("irq ghost frob", "unknown action 'frob'"),
    ("irq ghost set 1", "usage: qvis irq NAME"),
    ("irq ghost set x 0", "bad IRQ 'x'"),
    ("load ghost 0", "no machine named 'ghost'"),
]


@pytest.mark.parametrize(("line", "says"), USAGE, ids=[line for line, _ in USAGE])
def test_usage_error(cli: Cli, state: Path, line: str, says: str) -> None:
    done = cli(*line.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((state / "machines").glob("ghost"))


def test_help_of_every_verb(cli: Cli) -> None:
    listing = cli("--help").stdout
    for verb in VERBS:
        assert verb in listing
        done = cli(verb, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith("usage: qvis")


def test_unwritable_state_is_one_line(cli: Cli) -> None:
    import os

    done = cli("ls", env={**os.environ, "QVIS_STATE": "/proc/nowhere"})
    assert done.returncode == 122
    assert done.stderr.startswith("qvis: ")
    assert "Traceback" not in done.stderr
