# SPDX-License-Identifier: GPL-2.0-or-later
"""Making a chosen virtio-blk queue complete requests (guest-kernel/load.c)."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..cpus import format_cpus, parse_cpus
from ..errors import UsageError
from .interrupts import Shell

__all__ = ["Load", "queue_cpus", "run"]

DEADLINE = 120.0  # seconds


@dataclass(frozen=True)
class Load:
    """Requests that completed one at a time, submitted from ``cpu`` through ``queue``.

    ``guest_ns`` is how long that took by the guest's own clock.
    """

    queue: int
    cpu: int
    completed: int
    guest_ns: int


def queue_cpus(shell: Shell, disk: str = "vda") -> dict[int, frozenset[int]]:
    """Which CPUs submit through which of ``disk``'s queues (blk-mq's map)."""
    listing = shell.run(f"cd /sys/block/{disk}/mq && grep -H . */cpu_list").stdout
    return {
        int(path.split("/")[0]): parse_cpus(cpus)
        for path, _, cpus in (line.partition(":") for line in listing.splitlines())
    }


def run(
    shell: Shell, queue: int, count: int, *, cpu: int | None = None, disk: str = "vda",
    deadline: float = DEADLINE,
) -> Load:  # fmt: skip
    """Complete ``count`` requests on ``queue``, from ``cpu`` or the queue's first CPU.

    Raises :class:`UsageError` for a queue that is not there and for a CPU that
    submits through another one.
    """
    if count < 1:
        raise UsageError(f"the number of requests must be at least 1, not {count}")
    queues = queue_cpus(shell, disk)
    if queue not in queues:
        raise UsageError(f"{disk} has no queue {queue}; it has {format_cpus(queues)}")
    if cpu is None:
        cpu = min(queues[queue])
    if cpu not in queues[queue]:
        raise UsageError(
            f"CPU {cpu} does not submit through queue {queue} of {disk}; "
            f"CPUs {format_cpus(queues[queue])} do"
        )
    done = shell.run(f"qvis-load /dev/{disk} {cpu} {count}", deadline=deadline)
    result = json.loads(done.stdout)
    return Load(queue, cpu, result["completed"], result["guest_ns"])
