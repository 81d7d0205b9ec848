# SPDX-License-Identifier: GPL-2.0-or-later
"""The soak in short, and that it fails when it should (docs/soak.md)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qvis
from tests.conftest import gone, processes

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak.py"
INTERRUPTS = 3000
DEADLINE = 4  # seconds of a running guest; a request takes far less than a millisecond
TIMEOUT = 300

Soak = Callable[..., tuple[subprocess.CompletedProcess[str], dict[str, Any]]]


@pytest.fixture(autouse=True)
def real(backend: str) -> None:
    """The soak is a program that a real guest runs."""
    if backend == "emulated":
        pytest.skip("the soak is a program for a real guest")


@pytest.fixture
def soak(backend: str, tmp_path: Path) -> Soak:
    """Runs the script for one transport; what it ended with, and its result."""

    def run(transport: str, *more: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        result = tmp_path / "soak.json"
        done = subprocess.run(
            [sys.executable, SCRIPT, "--backend", backend, "--transports", transport,
             "--interrupts", str(INTERRUPTS), "--deadline", str(DEADLINE), "--json", result,
             *more],
            capture_output=True, text=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip
        assert result.exists(), done.stderr
        return done, json.loads(result.read_text())["transports"][transport]

    return run


def test_nothing_is_lost_or_misdirected(soak: Soak, transport: qvis.Transport) -> None:
    if not transport.vector_per_queue:
        pytest.skip("queues that share a line have no vector to mask or move")
    done, outcome = soak(transport, "--resets", "2", "--migrations", "1")
    assert done.returncode == 0, done.stderr
    assert outcome["passed"]
    assert outcome["interrupts"] >= INTERRUPTS
    assert outcome["migrations"] == outcome["migrations_with_masked_pending"] == 1
    counts = outcome["counts"]
    assert counts["resets"] >= 2
    assert counts["masks"] > 100
    assert counts["settled_moves"] > 10
    assert not any(counts[key] for key in ("lost", "wrong_cpu", "while_masked"))
    # Everything has been accounted for, and most of it has had one CPU to come to.
    assert outcome["interrupts"] == (
        counts["requests"] - counts["coalesced"] + counts["coalesced_told_late"]
        + counts["spurious"]
    )  # fmt: skip
    assert counts["with_one_cpu_allowed"] > outcome["interrupts"] / 2
    assert len(outcome["queues"]) == 8
    assert sum(interrupts for _, interrupts in outcome["queues"].values()) == outcome["interrupts"]
    assert outcome["provenance"]["qemu_series"]


def test_a_lost_interrupt_is_found_and_named(soak: Soak) -> None:
    done, outcome = soak("msi", "--migrations", "0", "--resets", "0", "--plant", "lose")
    assert done.returncode == 1
    assert outcome["counts"]["lost"] == 1
    (vector,) = outcome["lost_vectors"]
    assert f"lost: {vector['device']}, queue {vector['queue']}, irq {vector['irq']}" in done.stderr
    assert "IRQD_IRQ_MASKED" in vector["state"]
    assert f"{vector['device']}-req.{vector['queue']}" in vector["interrupts"]
    assert len(outcome["device_queues"]) == 8


@pytest.mark.parametrize("over", ["msi", "pci"])
def test_a_misdirected_interrupt_is_found(soak: Soak, over: str) -> None:
    done, outcome = soak(over, "--migrations", "0", "--resets", "0", "--plant", "misdirect")
    assert done.returncode == 1
    assert outcome["counts"]["wrong_cpu"] > 0
    assert outcome["counts"]["lost"] == 0
    assert "on a CPU other than" in done.stderr


def test_interrupted_it_leaves_nothing(backend: str, state: Path, tmp_path: Path) -> None:
    result = tmp_path / "soak.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--backend",
        backend,
        "--transports",
        "msi",
        "--json",
        str(result),
    ]
    mine = {**os.environ, "QVIS_STATE": str(state / "interrupted")}
    with subprocess.Popen(command, env=mine, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "soak msi: started" in line:
                break
        assert processes(mine["QVIS_STATE"])
        time.sleep(1)  # in the middle of it, wherever that is
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
        assert child.wait(60) == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert gone(mine["QVIS_STATE"])
    assert not list((state / "interrupted" / "machines").iterdir())
    assert not result.exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--transports", "intx"], "intx has no vector for each queue"),
        (["--transports", "smoke"], "unknown transport 'smoke'"),
        (["--interrupts", "0"], "--interrupts must be at least 1"),
    ],
)
def test_what_cannot_be_is_said(words: list[str], reason: str) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
