# SPDX-License-Identifier: GPL-2.0-or-later
"""What an operation costs on each transport, measured side by side.

Runs are interleaved: each round boots a machine of every transport, does each
operation in it a known number of times with a trace around, and counts in the
trace what the real driver did to devices. Nothing is assumed of how a transport
does anything; a number is what was seen, divided by how often it was done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ..backends import Backend, choose
from ..errors import GuestError, InfraError, UsageError
from ..guest.load import queue_cpus
from ..guest.load import run as load
from ..machine.machine import Machine, up
from ..progress import step
from ..spec import MachineSpec
from ..trace.model import Clock, Kind
from ..trace.record import provenance, record, record_boot
from ..trace.sources import DEVICE_VECTORS, TELLING, NestedBoot
from ..trace.store import Provenance, Trace
from ..transport import Transport
from . import scripted
from .boot import sample
from .operations import DISK, OPERATIONS, SEEN, Operation, Part, Target, evidence
from .result import Evidence, Metric, Result

__all__ = ["OPERATIONS", "RESULT", "Target", "compare"]

RESULT = "result.json"
QUEUE = 1  # not the first, which the boot has used most
MASKS = {"mask", "unmask"}  # which take turns
KIB = 1024


def compare(
    folder: Path,
    transports: Sequence[Transport],
    operations: Sequence[str],
    runs: int,
    **machine: Any,
) -> Result:
    """Measure into the new ``folder``; ``machine`` are arguments of :func:`qvis.up`.

    ``folder`` holds the result (:data:`RESULT`, written after every round) and
    each run's traces. Raises what booting and recording do; what was complete by
    then stays.
    """
    chosen = _chosen(operations)
    if runs < 1:
        raise UsageError(f"the number of runs must be at least 1, not {runs}")
    if len(set(transports)) != len(transports) or not transports:
        raise UsageError("name each transport once, and at least one")
    MachineSpec("compare", **{k: v for k, v in machine.items() if k != "backend"})
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{folder} is there already: name another place") from None
    by_itself = bool(machine.get("icount")) and _nested(machine.get("backend", "auto"))
    state = _State({}, {}, [], [])
    with step("compare") as shown:
        done = 0
        for number in range(runs):
            first = number % len(transports)
            for transport in (*transports[first:], *transports[:first]):
                shown.update(done, runs * len(transports))
                if by_itself:
                    _run_by_itself(transport, chosen, folder, number, state, machine)
                else:
                    with up(transport=transport, **machine) as guest:
                        _run(guest, chosen, folder, number, state)
                done += 1
            result = state.result(chosen, transports)
            result.save(folder / RESULT)
    return result


def _nested(backend: str | Backend) -> bool:
    """Whether its machines have an inner host, which records them from their first instruction."""
    if backend == "auto":
        return False
    chosen = choose(backend).backend if isinstance(backend, str) else backend
    return getattr(chosen, "reader", None) == NestedBoot.reader


def _chosen(names: Sequence[str]) -> list[Operation]:
    for name in names:
        if name not in OPERATIONS:
            raise UsageError(f"no operation {name!r}: there are {', '.join(OPERATIONS)}")
    return [OPERATIONS[name] for name in OPERATIONS if name in names]


@dataclass
class _State:
    """What was measured so far."""

    provenance: dict[str, Provenance]
    series: dict[tuple[str, str], list[float]]
    order: list[str]
    evidence: list[Evidence]

    def add(self, transport: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.series.setdefault((name, transport), []).append(value)

    def measured(
        self, operation: Operation, trace: Trace, target: Target, count: int, number: int,
        place: Path,
    ) -> None:  # fmt: skip
        """Add what run ``number`` tells of an operation that was done ``count`` times."""
        assert operation.measure is not None
        transport = trace.manifest.provenance.transport
        self.provenance[transport] = trace.manifest.provenance
        self.add(transport, operation.measure(trace, target, count))
        if number == 0:
            rows = tuple(evidence(trace, target))
            self.evidence.append(Evidence(operation.name, transport, str(place), count, rows))

    def result(self, operations: Iterable[Operation], transports: Sequence[Transport]) -> Result:
        """All of it, under the names of what was counted: accesses on TCG, else exits."""
        clocks = {provenance.clock for provenance in self.provenance.values()}
        clock = str(next(iter(clocks))) if len(clocks) == 1 else ""
        accesses = any(source.touch is Kind.ACCESS for source in self.provenance.values())

        def counted(text: str) -> str:
            return text if accesses else text.replace("accesses", "exits")

        metrics = [
            Metric(counted(name), counted(unit).replace("clock", clock), operation.name)
            for operation in operations
            for name, unit in operation.metrics
            if any((name, transport) in self.series for transport in transports)
        ]
        return Result(
            tuple(metrics),
            {t: self.provenance[t] for t in map(str, transports)},
            {(counted(name), t): tuple(values) for (name, t), values in self.series.items()},
            tuple(self.order),
            tuple(self.evidence),
        )


def _run(
    machine: Machine, operations: Iterable[Operation], folder: Path, number: int, state: _State
) -> None:
    transport = str(machine.spec.transport)
    booted = sample(machine)
    # For when nothing is traced; else the trace's own takes its place.
    state.provenance.setdefault(transport, provenance(machine, "host", Clock.NANOSECONDS))
    state.order.append(transport)
    target = _target(machine)
    for operation in operations:
        if operation.command is None or operation.measure is None:
            state.add(transport, {"guest memory after boot": booted.guest_used_kib / KIB})
            if machine.host is None:  # else these are the emulator's
                state.add(
                    transport,
                    {
                        "boot to SSH": booted.boot_s,
                        "process's memory after boot": booted.qemu_pss_kib / KIB,
                    },
                )
            continue
        if operation.prepare:
            machine.ssh.run(operation.prepare(target))
        if operation.proof and machine.info["reader"] not in TELLING:
            machine.ssh.run(operation.proof(target))
        place = Path("traces") / f"{transport}-{number + 1}-{operation.name.replace(' ', '-')}"
        trace, completed = record(
            machine, folder / place, operation.command(target, operation.count)
        )
        if completed.status:
            raise GuestError(
                f"the operation {operation.name!r} failed: {completed.stderr.strip()}",
                stage="compare",
                log=trace.path,
            )
        _must_be_whole(trace)
        state.measured(operation, trace, target, operation.count, number, place)


def _run_by_itself(
    transport: Transport, operations: Iterable[Operation], folder: Path, number: int,
    state: _State, machine: dict[str, Any],
) -> None:  # fmt: skip
    """The same in a machine that nothing reaches from outside, and so does the same each time."""
    measured = [operation for operation in operations if operation.measure]
    wanted = {operation.name for operation in measured} | {"interrupt"}  # it tells the vector
    if wanted & MASKS:
        wanted |= MASKS
    counts = {name: count for name, count in scripted.COUNTS.items() if name in wanted}
    shape = {name: value for name, value in machine.items() if name != "backend"}
    spec = MachineSpec("compare", transport=transport, **shape)
    place = Path("traces") / f"{transport}-{number + 1}"
    trace, status = record_boot(
        folder / place, scripted.script(spec, counts), transport=transport, **machine
    )
    if status:
        raise GuestError(
            f"the guest's script ended with status {status}", stage="compare", log=trace.path
        )
    _must_be_whole(trace)
    parts = {
        name: Part(trace.path, trace.manifest, events)
        for name, events in scripted.cut(trace, counts).items()
    }
    target = _target_of(trace, parts["interrupt"], spec, counts["interrupt"])
    state.order.append(str(transport))
    for operation in measured:
        count = counts[operation.name]
        state.measured(operation, parts[operation.name], target, count, number, place)


def _must_be_whole(trace: Trace) -> None:
    """Raise InfraError for a trace of which a number would be wrong, and not look it."""
    lacks = list(trace.manifest.partial)
    if trace.manifest.lost:
        lacks.append(f"{trace.manifest.lost} events were lost")
    if lacks:
        raise InfraError(f"a trace is partial: {'; '.join(lacks)}", stage="compare", log=trace.path)


def _target_of(trace: Trace, part: Trace, spec: MachineSpec, count: int) -> Target:
    """The vector that a script's requests came by, of what was delivered meanwhile."""
    queue = min(QUEUE, spec.queues - 1, spec.smp - 1)
    named = ("", f"req.{queue}")
    ours = [i.irq for i in trace.manifest.irqs if i.device == DISK and i.source in named]
    irq = ours[0] if ours else None
    delivered = (
        part.events()
        .filter(pl.col("kind") == Kind.DELIVER, pl.col("vector").is_in(list(DEVICE_VECTORS)))
        .group_by("vcpu", "vector")
        .len()
        .filter(pl.col("len") >= SEEN * count)
        .collect()
        .rows()
    )
    if irq is None or len(delivered) != 1:
        raise InfraError(
            f"it is not clear which interrupt the disk's {count} requests came by: Linux calls it "
            f"{irq}, and {len(delivered)} vectors came so often",
            stage="compare",
            log=trace.path,
        )
    ((cpu, vector, _),) = delivered
    return Target(irq, vector, DISK, cpu, spec.smp)


def _target(machine: Machine) -> Target:
    """The vector of the disk's queue on the CPU that uses it, or the disk's line there."""
    queue = min(QUEUE, machine.spec.queues - 1, machine.spec.smp - 1)
    vector = next(
        v for v in machine.irqs.vectors()
        if v.driver == "virtio_blk" and (v.queue == queue or not v.source)
    )  # fmt: skip
    cpu = min(queue_cpus(machine.ssh)[queue])
    # An interrupt that comes on another CPU than the request costs an IPI, which is no part
    # of what a transport is about.
    machine.irqs.set_affinity(vector.irq, {cpu})
    load(machine.ssh, queue, 1)  # on x86 MSI-X moves with the next interrupt only
    chip = machine.ssh.run(f"cat /sys/kernel/debug/irq/irqs/{vector.irq}").stdout
    number = re.search(r"^ *Vector: +(\d+)$", chip, re.MULTILINE)
    if not number:
        raise GuestError(f"the guest does not say which vector IRQ {vector.irq} has",
                         stage="compare", tail=chip.splitlines())  # fmt: skip
    return Target(vector.irq, int(number[1]), vector.device, cpu, machine.spec.smp)
