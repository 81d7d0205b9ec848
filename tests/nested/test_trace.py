# SPDX-License-Identifier: GPL-2.0-or-later
"""Traces of a real KVM, out of an inner host: its own recorder, and boots that are all the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

import qvis
from qvis.errors import LostMachineError
from qvis.experiments.compare import compare
from qvis.machine.machine import Machine
from qvis.trace.model import Cause, Clock, Kind
from qvis.trace.record import record, record_boot, recording
from qvis.trace.store import Trace
from qvis.transport import COMPARED

REQUESTS = 100
MACHINE = {"backend": "nested", "smp": 2, "queues": 2}


@pytest.fixture(scope="module")
def nested() -> Iterator[Machine]:
    with qvis.up(transport="msi", **MACHINE) as vm:
        vm.irqs.spread()
        yield vm


def exits(trace: Trace, *conditions: pl.Expr) -> pl.DataFrame:
    return trace.events().filter(pl.col("kind") == Kind.EXIT, *conditions).collect()


def test_each_request_is_one_notification_and_one_interrupt(
    nested: Machine, tmp_path: Path
) -> None:
    for turn in ("first", "second"):  # the recorder goes on
        trace, done = record(nested, tmp_path / turn, f"qvis-load /dev/vda 1 {REQUESTS}")
        assert done.status == 0
        assert (trace.manifest.partial, trace.manifest.lost) == ((), 0)
        assert trace.manifest.provenance.clock is Clock.NONE
        notified = exits(trace, pl.col("device") == "blk0", pl.col("cause") == Cause.NOTIFY)
        assert 0 < len(notified) <= REQUESTS  # while its IOThread polls QEMU wants none
        assert set(notified["reason"]) == {"npf"}
        assert set(notified["user"]) == {False}  # ioeventfd
        assert notified["duration"].null_count() == len(notified)
        arrived = trace.events().filter(pl.col("kind") == Kind.RAISE, pl.col("vcpu") == 1)
        vectors = arrived.group_by("vector").len().filter(pl.col("len") == REQUESTS).collect()
        assert len(vectors) == 1
        of_queue = pl.col("device") == "blk0", pl.col("source") == "req.1"
        for kind in (Kind.RAISE, Kind.DELIVER):
            came = trace.events().filter(pl.col("kind") == kind, *of_queue).collect()
            assert (len(came), set(came["vector"])) == (REQUESTS, set(vectors["vector"]))
    assert nested.host is not None
    assert nested.host.run("ls /sys/kernel/tracing/instances").stdout == ""


def test_a_machine_that_dies_leaves_what_was_recorded(tmp_path: Path) -> None:
    with qvis.up(transport="vis", **MACHINE) as vm:
        host = vm.host
        assert host is not None

        def end() -> None:
            time.sleep(2)
            host.run("kill -9 $(cat /run/qemu.pid)", check=False)

        killer = threading.Thread(target=end)
        with pytest.raises(LostMachineError), recording(vm, tmp_path / "t"):
            killer.start()
            vm.ssh.run("qvis-load /dev/vda 1 1000000", deadline=60)
        killer.join()
    trace = Trace.open(tmp_path / "t")
    assert trace.manifest.partial
    assert len(exits(trace)) > REQUESTS


def test_two_boots_are_the_same_to_the_instruction(tmp_path: Path) -> None:
    frames = []
    for turn in ("first", "second"):
        trace, status = record_boot(
            tmp_path / turn, f"qvis-load /dev/vda 1 {REQUESTS}", transport="vis", icount=True,
            **MACHINE,
        )  # fmt: skip
        assert (status, trace.manifest.partial, trace.manifest.lost) == (0, (), 0)
        assert trace.manifest.provenance.clock is Clock.INSTRUCTIONS
        frames.append(trace.events().collect())
    assert frames[0].equals(frames[1])
    assert frames[0]["reason"].drop_nulls().n_unique() > 5
    assert frames[0]["duration"].drop_nulls().len() > 1000


def test_the_table_in_real_exits(tmp_path: Path) -> None:
    result = compare(tmp_path / "c", COMPARED, ["interrupt", "mask", "unmask"], 1, **MACHINE)
    found = {
        metric.name: tuple(result.series[metric.name, t][0] for t in result.transports)
        for metric in result.metrics
    }
    assert result.transports == ("pci", "intx", "msi", "vis")
    assert found["device exits per interrupt"] == (0, 2, 0, 0)
    assert found["exits to user space per interrupt"] == (0, pytest.approx(3, abs=0.1), 0, 0)
    # intx's handler itself goes to user space, where it can meet the next request's interrupt
    assert found["exits to user space before delivery"] == (0, pytest.approx(0, abs=0.1), 0, 0)
    assert found["exits per mask"] == (2, 3, 1, 0)
    assert found["exits per unmask"] == (1, 2, 1, 0)
