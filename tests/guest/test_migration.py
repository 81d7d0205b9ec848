# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that migrates in the middle of I/O loses no interrupt.

A lost interrupt would leave the load waiting for ever, since each request has
to complete before the next is made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

import qvis
from qvis.guest import load
from qvis.machine.machine import Machine

ROUNDS = 3
QUEUES = 2


def test_no_interrupt_is_lost_in_migration(
    boot: Callable[..., Machine], transport: qvis.Transport
) -> None:
    vm = boot(transport=transport, smp=QUEUES, queues=QUEUES)
    stay_if_emulated(vm)
    if transport.vector_per_queue:
        vm.irqs.spread()
    cpus = load.queue_cpus(vm.ssh)
    # Long enough to be under way through all rounds; ended by the flag.
    for queue in range(QUEUES):
        vm.ssh.run(
            f"(while [ ! -e /tmp/stop ]; do qvis-load /dev/vda {min(cpus[queue])} 100 "
            f">> /tmp/load.{queue} || echo FAILED >> /tmp/load.{queue}; done; "
            f"echo ended >> /tmp/load.{queue}) < /dev/null > /dev/null 2>&1 &"
        )
    current = vm
    try:
        for _ in range(ROUNDS):
            time.sleep(0.3)
            before = progress(current)
            current = current.migrate()
            time.sleep(0.3)
            after = progress(current)
            assert all(after[queue] > before[queue] for queue in range(QUEUES)), (
                f"a queue stands still after migration: {before} {after}"
            )
        affinities = {v.source: v.effective for v in current.irqs.vectors() if v.queue is not None}
        current.ssh.run("touch /tmp/stop")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            logs = [current.ssh.run(f"cat /tmp/load.{queue}").stdout for queue in range(QUEUES)]
            if all("ended" in log for log in logs):
                break
            time.sleep(0.1)
        for log in logs:
            *lines, last = log.splitlines()
            assert last == "ended"
            assert all(json.loads(line)["completed"] == 100 for line in lines)
        if transport.vector_per_queue:
            assert affinities == {"req.0": frozenset({0}), "req.1": frozenset({1})}
    finally:
        if current is not vm:
            current.down()


def stay_if_emulated(vm: Machine) -> None:
    """It refuses, with a reason and going on."""
    if vm.info["provenance"]["backend"] == "emulated":
        with pytest.raises(qvis.UsageError, match="an emulated machine cannot be migrated"):
            vm.migrate()
        assert vm.ssh.run("echo here").stdout == "here\n"
        pytest.skip("an emulated machine cannot be migrated")


def progress(vm: Machine) -> dict[int, int]:
    """Requests that each queue has completed (the fields of /sys/block/vda/mq are gone, so
    the load's own lines are counted)."""
    return {queue: int(vm.ssh.run(f"wc -l < /tmp/load.{queue}").stdout) for queue in range(QUEUES)}


@pytest.mark.parametrize("kind", ["msi", "vis", "vis-doorbell"])
def test_masked_and_pending_survives_migration(boot: Callable[..., Machine], kind: str) -> None:
    """A vector masked and pending when the guest moves is delivered after unmask there."""
    from .test_masking import becomes, bits_of, read_ended, start_read

    vm = boot(transport=kind, smp=QUEUES, queues=QUEUES)
    stay_if_emulated(vm)
    vector = next(v for v in vm.irqs.vectors() if v.queue == 1)
    bits = bits_of(vm, vector)
    vm.ssh.run(bits.mask)
    start_read(vm)
    assert becomes(bits.pending)
    moved = vm.migrate()
    try:
        assert not read_ended(moved, 0.5)
        there = bits_of(moved, vector)
        assert there.masked()
        assert there.pending()
        moved.ssh.run(there.unmask)
        assert read_ended(moved, 20.0), "the interrupt was lost in migration"
        assert not there.pending()
        assert not there.masked()
        load.run(moved.ssh, 1, 100)  # and the vector works on
    finally:
        moved.down()
