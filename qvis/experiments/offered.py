# SPDX-License-Identifier: GPL-2.0-or-later
"""One point of a sweep: an emulated machine whose disks are offered requests.

Requests come as they do from many users who do not wait for each other: at random times
(a Poisson process for each queue, the same at each run), on each of the queue's CPUs in turn,
and whether or not earlier ones are done. Who asks costs nothing: what is counted is the
request, from the guest's driver to its handler. A request on a queue without room waits.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, cast

from ..emulated.config import Config, DeviceSpec
from ..emulated.costs import Costs, Handler
from ..emulated.guest.disk import BLOCK, Disk
from ..emulated.guest.kernel import Kernel
from ..emulated.guest.tasks import Work
from ..emulated.identity import model_identity
from ..emulated.lapic import LocalApic
from ..emulated.machine import Machine
from ..emulated.recorder import NAMES, NOBODY, Recorder, Row, RowKind, what
from ..errors import GuestError
from ..trace.model import Clock
from .grid import Point

__all__ = ["identity", "measure"]

MEMORY = 2048  # MiB; what nobody touches costs nothing
BATCH = 4096  # events between two looks at whether all is done
PATIENCE, GAPS = 1.0, 100  # seconds and mean times between requests without a completion
HANDLERS = frozenset(
    (
        "vm_interrupt",
        "vm_msi_vring_interrupt",
        "vp_interrupt",
        "vp_vring_interrupt",
        "vring_interrupt",
    )
)  # of drivers/virtio, for queues
KIND = 0xFF  # of a row's first word
RAISE = what(RowKind.RAISE)


@functools.cache
def identity() -> str:
    """A hash of all that decides which numbers a point gives, but for its costs."""
    own = hashlib.sha256(Path(__file__).read_bytes())
    own.update(model_identity().encode())
    return own.hexdigest()[:16]


def measure(point: Point, costs: Costs) -> dict[str, Any]:
    """The numbers of ``point``, as JSON can hold them.

    Times are in modelled cycles, of which the line says how many make a second. Raises
    :class:`GuestError` when a guest cannot have such a machine, and what
    :class:`~qvis.emulated.machine.Machine` raises.
    """
    disks = tuple(DeviceSpec("blk", f"blk{n}", point.queues) for n in range(point.disks))
    config = Config(point.transport, point.smp, MEMORY, point.platform, disks)
    machine = Machine(config, costs)
    machine.guest = kernel = Kernel(machine)
    kernel.boot(lambda: None)
    machine.events.run()
    if len(kernel.disks) != point.disks:
        raise GuestError(f"{len(kernel.disks)} of {point.disks} disks came up")

    before = [exit_.count for exit_ in machine.rules.exits]
    seen = Interrupts(point.smp)
    seen.follow(machine)
    begun = _latest(machine)
    done = _offer(machine, kernel, point, begun)
    seen.finish()

    exits = [
        (exit_, exit_.count - count)
        for exit_, count in zip(machine.rules.exits, before, strict=True)
        if exit_.count > count
    ]
    interrupts = sum(seen.delivered)
    each = max(interrupts, 1)
    total = sum(count for _, count in exits)
    to_user = sum(count for exit_, count in exits if exit_.handler is Handler.USER)
    lost = point.requests - done
    return {
        **({"error": f"{lost} requests were never completed"} if lost else {}),
        "unit": str(Clock.MODELLED),
        "unit per second": costs.frequency,
        "completed": done,
        "lost": lost,
        "interrupts": interrupts,
        "delivered": seen.delivered,
        "other interrupts": seen.others,
        "exits per interrupt": {
            "all": total / each,
            "to user space": to_user / each,
            "in KVM": (total - to_user) / each,
        },
        "exits per interrupt by reason": {exit_.name: count / each for exit_, count in exits},
        "modelled cycles from raise": {
            "to delivery": _quantiles(seen.to_delivery),
            "to handler": _quantiles(seen.to_handler),
            "to EOI": _quantiles(seen.to_eoi),
        },
        "modelled cycles": _latest(machine) - begun,
    }


def _latest(machine: Machine) -> int:
    """The time that the vCPU which is ahead of the others has come to."""
    return max(machine.events.now, *(vcpu.clock for vcpu in machine.vcpus))


def _offer(machine: Machine, kernel: Kernel, point: Point, begin: int) -> int:
    """Offer the point's requests, from the time ``begin`` on; how many were completed."""
    events, completed = machine.events, 0
    gap = machine.costs.frequency / point.rate

    def request(disk: Disk, number: int) -> Work:
        nonlocal completed
        assert kernel.current is not None
        yield from disk.read(kernel.current, number * BLOCK % disk.size)
        completed += 1
        return 0

    def arrivals(disk: Disk, cpus: list[int], random: Random, count: int) -> None:
        def arrive(number: int, time: float) -> None:
            kernel.spawn(request(disk, number), cpus[number % len(cpus)])
            after(number + 1, time)

        def after(number: int, time: float) -> None:
            if number < count:
                time += random.expovariate(1) * gap
                events.at(int(time), arrive, number, time)

        after(0, begin)

    queues = [(disk, sorted(cpus)) for disk in kernel.disks.values() for cpus in disk.queues]
    each, more = divmod(point.requests, len(queues))
    for place, (disk, cpus) in enumerate(queues):
        arrivals(disk, cpus, Random(place), each + (place < more))
    progress, seen = begin, 0
    patience = PATIENCE * machine.costs.frequency + GAPS * gap
    while events.next is not None and events.now < progress + patience:
        events.run(BATCH)
        if completed > seen:
            progress, seen = events.now, completed
    return completed


class Interrupts:
    """Follows disks' interrupts through what a machine's recorder is told.

    An interrupt is one if a driver's handler is entered for it; others (between processors,
    of timers) are only counted. Linux ends an edge before it calls the handler.
    """

    def __init__(self, smp: int) -> None:
        self.delivered = [0] * smp  # by CPU
        self.others = 0
        self.to_delivery: list[int] = []
        self.to_handler: list[int] = []
        self.to_eoi: list[int] = []
        self._rows: list[Row] = []
        self.add: Callable[[Row], None] = self._rows.append
        self._raised: dict[tuple[int, int], int] = {}
        # By vCPU, of the interrupt that it took last: vector, raise, delivery, handler, EOI.
        self._current: list[list[int] | None] = [None] * smp

    def follow(self, machine: Machine) -> None:
        """Be told of all that happens from now on, in the recorder's place."""
        add, events = self.add, machine.events

        def accepted(apic: LocalApic, vector: int, level: bool) -> None:
            add((RAISE, apic.index, events.now, 0, vector, 0))

        machine.bus.on_accept = accepted
        machine.recorder = cast(Recorder, self)
        for vcpu in machine.vcpus:
            vcpu.record(add)

    def due(self) -> bool:
        """Whether rows wait that had better be looked at."""
        return len(self._rows) >= 1 << 16

    def flush(self, floor: int) -> None:
        """Look at the rows that there are."""
        current, raised = self._current, self._raised
        handlers = {number for number, name in enumerate(NAMES) if name in HANDLERS}
        for word, vcpu, time, place, value, _ in self._rows:
            kind = word & KIND
            if kind == RowKind.RAISE:
                # A vector that is pending already is one interrupt with what it merges with.
                raised.setdefault((vcpu, value), time)
            elif kind == RowKind.DELIVER:
                self._close(vcpu)
                current[vcpu] = [value, raised.pop((vcpu, value), -1), time, -1, -1]
            elif kind == RowKind.FUNCTION:
                if place in handlers and (one := current[vcpu]) and one[3] < 0:
                    one[3] = time
            elif (
                kind == RowKind.EOI
                and vcpu != NOBODY
                and (one := current[vcpu])
                and one[0] == value
            ):
                one[4] = time
        self._rows.clear()

    def finish(self) -> None:
        """Nothing else happens."""
        self.flush(0)
        for vcpu in range(len(self._current)):
            self._close(vcpu)

    def _close(self, vcpu: int) -> None:
        """The interrupt that this vCPU took last is over."""
        one, self._current[vcpu] = self._current[vcpu], None
        if one is None:
            return
        _, raised, delivered, handler, eoi = one
        if handler < 0:
            self.others += 1
            return
        self.delivered[vcpu] += 1
        if raised >= 0:
            self.to_delivery.append(delivered - raised)
            self.to_handler.append(handler - raised)
            self.to_eoi.append(eoi - raised)


def _quantiles(values: list[int]) -> dict[str, int | None]:
    """Median and 99th percentile, each a value that occurred (nearest rank)."""
    ordered = sorted(values)
    return {
        name: ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else None
        for name, share in (("median", 0.5), ("p99", 0.99))
    }
