# SPDX-License-Identifier: GPL-2.0-or-later
"""What an operation costs on each transport, measured side by side.

Runs are interleaved: each round boots a machine of every transport, does each
operation in it a known number of times with a trace around, and counts in the
trace what the real driver did to devices. Nothing is assumed of how a transport
does anything; a number is what was seen, divided by how often it was done.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ..errors import GuestError, InfraError, UsageError
from ..guest.load import queue_cpus
from ..guest.load import run as load
from ..machine.machine import Machine, up
from ..progress import step
from ..spec import MachineSpec
from ..trace.model import Cause, Clock, Kind
from ..trace.record import provenance, record
from ..trace.sources import TELLING
from ..trace.stats import Stats
from ..trace.store import Provenance, Trace
from ..trace.symbols import FUNCTIONS
from ..transport import Transport
from .boot import sample
from .result import Evidence, Metric, Result, Row

__all__ = ["OPERATIONS", "RESULT", "compare"]

RESULT = "result.json"
QUEUE = 1  # not the first, which the boot has used most
DISK = "blk0"
IO_APIC = "IOAPIC"
LOCAL_APIC = "LAPIC"
DOORBELL = "VisUpdate"
KIB = 1024
COUNTED = (Clock.INSTRUCTIONS, Clock.MODELLED)  # not by a host that has other work to do
SEEN = 0.9  # of the interrupts that were asked for, the least share that a trace must have


@dataclass(frozen=True)
class Target:
    """What is operated on: a vector of the disk's queue, or the disk's line."""

    irq: int
    vector: int  # of the local APIC of cpu
    device: str  # Linux's name of it: "virtio0"
    cpu: int  # whose requests go through the queue
    cpus: int


@dataclass(frozen=True)
class Operation:
    """Something whose cost is measured: a shell command that does it ``count`` times.

    Without a command it is what was done already when the guest answers: its boot.
    """

    name: str
    count: int
    command: Callable[[Target, int], str] | None
    measure: Callable[[Trace, Target, int], dict[str, float]] | None  # by metric's name
    metrics: tuple[tuple[str, str], ...]  # names and units; "clock" is the trace's
    prepare: str = ""  # done first, outside of the trace; may say {device}


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
    state = _State({}, {}, [], [])
    with step("compare") as shown:
        done = 0
        for number in range(runs):
            first = number % len(transports)
            for transport in (*transports[first:], *transports[:first]):
                shown.update(done, runs * len(transports))
                with up(transport=transport, **machine) as guest:
                    _run(guest, chosen, folder, number, state)
                done += 1
            result = state.result(chosen, transports)
            result.save(folder / RESULT)
    return result


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
            state.add(
                transport,
                {
                    "boot to SSH": booted.boot_s,
                    "guest memory after boot": booted.guest_used_kib / KIB,
                    "process's memory after boot": booted.qemu_pss_kib / KIB,
                },
            )
            continue
        if operation.prepare:
            machine.ssh.run(operation.prepare.format(device=target.device))
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
        if trace.manifest.partial:  # then a number would be wrong, and not look it
            raise InfraError(
                f"a trace is partial: {'; '.join(trace.manifest.partial)}",
                stage="compare",
                log=trace.path,
            )
        state.provenance[transport] = trace.manifest.provenance
        state.add(transport, operation.measure(trace, target, operation.count))
        if number == 0:
            rows = tuple(_rows(trace, target))
            state.evidence.append(
                Evidence(operation.name, transport, str(place), operation.count, rows)
            )


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


def _of(trace: Trace, *devices: str) -> pl.Expr:
    """Touches of these devices' registers; IOAPICs have numbers."""
    name = pl.col("device").cast(pl.String)
    exact = name.is_in([device for device in devices if device != IO_APIC])
    touched = pl.col("kind") == trace.manifest.provenance.touch
    return touched & (exact | name.str.starts_with(IO_APIC) if IO_APIC in devices else exact)


def _interrupts_of(trace: Trace, target: Target) -> list[int]:
    """The numbers of the interrupts that the target's vector, or line, was delivered for.

    KVM's tracepoints do not know Linux's numbers, but every reader knows vectors.
    """
    known = pl.col("irq") == target.irq
    guessed = pl.col("irq").is_null() & (pl.col("vector") == target.vector)
    delivered = trace.events().filter(
        pl.col("kind") == Kind.DELIVER, known | (guessed & (pl.col("vcpu") == target.cpu))
    )
    return delivered.select("interrupt").drop_nulls().collect()["interrupt"].to_list()


def _count(trace: Trace, *conditions: pl.Expr) -> int:
    return int(trace.events().filter(*conditions).select(pl.len()).collect().item())


def _caused(*causes: Cause) -> pl.Expr:
    return pl.col("cause").is_in(list(causes))


def _interrupts(trace: Trace, target: Target, count: int) -> dict[str, float]:
    numbers = _interrupts_of(trace, target)
    if len(numbers) < SEEN * count:  # else all that follows would be too little, and not look it
        raise InfraError(
            f"of {count} requests' interrupts the trace has {len(numbers)}",
            stage="compare",
            log=trace.path,
        )
    ours = pl.col("interrupt").is_in(numbers)
    used = _caused(Cause.STATUS, Cause.ACKNOWLEDGE)
    cost = next((c for c in Stats.of(trace).costs if c.device == DISK), None)
    found = {
        "device accesses per interrupt": _count(trace, _of(trace, DISK), used) / len(numbers),
        "local APIC accesses per interrupt": _count(trace, _of(trace, LOCAL_APIC), ours)
        / len(numbers),
    }
    if trace.manifest.provenance.reader in TELLING:
        ends = (pl.col("kind") == Kind.EOI, pl.col("device").cast(pl.String) == IO_APIC)
        found["IOAPIC EOIs per interrupt"] = _count(trace, *ends, ours) / len(numbers)
    if cost and cost.handler and trace.manifest.provenance.clock in COUNTED:
        found["delivery to handler"] = cost.handler.median
    if cost and cost.eoi and trace.manifest.provenance.clock in COUNTED:
        found["delivery to EOI"] = cost.eoi.median
    return found


def _done(trace: Trace, count: int, *roles: str) -> None:
    """Raise InfraError unless the kernel is seen to have done one of these so often.

    Where it touches no register at all, a trace of nothing would look the same.
    """
    if trace.manifest.provenance.reader not in TELLING:
        return
    names = [name for name, role in FUNCTIONS.items() if role in roles]
    seen = _count(
        trace, pl.col("kind") == Kind.FUNCTION, pl.col("function").cast(pl.String).is_in(names)
    )
    if seen < count:
        raise InfraError(
            f"of {count} times {' or '.join(roles)} the trace has {seen}",
            stage="compare",
            log=trace.path,
        )


def _masks(cause: Cause, name: str) -> Callable[[Trace, Target, int], dict[str, float]]:
    def measure(trace: Trace, target: Target, count: int) -> dict[str, float]:
        _done(trace, count, str(cause))
        of = _of(trace, DISK, IO_APIC)
        # VIS's doorbell does not say what has changed. Nothing is moved here, and masks and
        # unmasks take turns: each has half of them.
        doorbells = _count(trace, of, pl.col("register").cast(pl.String) == DOORBELL)
        return {name: (_count(trace, of, _caused(cause)) + doorbells / 2) / count}

    return measure


def _moves(trace: Trace, target: Target, count: int) -> dict[str, float]:
    _done(trace, count, "set_affinity", "write_msg")
    causes = _caused(Cause.ROUTE, Cause.MASK, Cause.UNMASK)
    return {"accesses per change of CPU": _count(trace, _of(trace, DISK, IO_APIC), causes) / count}


def _set_ups(trace: Trace, target: Target, count: int) -> dict[str, float]:
    used = _caused(Cause.NOTIFY, Cause.STATUS, Cause.ACKNOWLEDGE)
    return {"accesses per set-up": _count(trace, _of(trace, DISK, IO_APIC), ~used) / count}


def _rows(trace: Trace, target: Target) -> Iterable[Row]:
    """What of the trace bears on the operation: all but timers, IPIs and other interrupts."""
    ours = pl.col("interrupt").is_in(_interrupts_of(trace, target))
    local = pl.col("device").cast(pl.String) == LOCAL_APIC
    touched = _of(trace, DISK, IO_APIC, LOCAL_APIC) & ~_caused(Cause.TIMER, Cause.IPI)
    ended = (pl.col("kind") == Kind.EOI) & pl.col("device").is_not_null()
    rows = (
        trace.events()
        .filter((touched & (~local | ours)) | (ended & ours))
        .group_by("kind", "device", "register", "write", "cause")
        .len()
        .sort("len", "device", "register", descending=[True, False, False])
        .collect()
    )
    for kind, device, register, write, cause, count in rows.iter_rows():
        direction = "" if write is None else "write" if write else "read"
        seen = "end of interrupt" if kind == Kind.EOI else register
        yield Row(device, seen, direction, Cause(cause), count, kind != Kind.EOI)


def _mask_command(target: Target, count: int) -> str:
    file = f"/sys/kernel/debug/irq/irqs/{target.irq}"
    return _times(count, f"echo mask > {file} && echo unmask > {file} || exit 1")


def _move_command(target: Target, count: int) -> str:
    """Each to the next CPU, with one interrupt after it, and long enough after the last one.

    Linux finishes a move with the next interrupt, and defers one that comes
    before it has (x86's vector clean-up, within a tick).
    """
    return _times(
        count,
        f"echo $(((i + {target.cpu}) % {target.cpus})) > /proc/irq/{target.irq}/smp_affinity_list "
        f"&& qvis-load /dev/vda {target.cpu} 1 > /dev/null || exit 1; usleep 25000",
    )


def _times(count: int, what: str) -> str:
    return f"i=1; while [ $i -le {count} ]; do {what}; i=$((i + 1)); done"


# The transport's own driver lets go of the device, and takes it again in the trace.
_UNBIND = (
    "p=$(readlink -f /sys/bus/virtio/devices/{device}/..); readlink -f $p/driver > /tmp/driver; "
    "basename $p > /tmp/bus-name; cat /tmp/bus-name > $p/driver/unbind"
)
_BIND = "cat /tmp/bus-name > $(cat /tmp/driver)/bind"

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "interrupt",
            1000,
            lambda target, count: f"qvis-load /dev/vda {target.cpu} {count}",
            _interrupts,
            (
                ("device accesses per interrupt", "accesses"),
                ("local APIC accesses per interrupt", "accesses"),
                ("IOAPIC EOIs per interrupt", "EOIs"),
                ("delivery to handler", "clock"),
                ("delivery to EOI", "clock"),
            ),
        ),
        Operation(
            "mask",
            50,
            _mask_command,
            _masks(Cause.MASK, "accesses per mask"),
            (("accesses per mask", "accesses"),),
        ),
        Operation(
            "unmask",
            50,
            _mask_command,
            _masks(Cause.UNMASK, "accesses per unmask"),
            (("accesses per unmask", "accesses"),),
        ),
        Operation(
            "change of CPU",
            20,
            _move_command,
            _moves,
            (("accesses per change of CPU", "accesses"),),
        ),
        Operation(
            "set-up",
            1,
            lambda target, count: _BIND,
            _set_ups,
            (("accesses per set-up", "accesses"),),
            prepare=_UNBIND,
        ),
        Operation(
            "boot",
            1,
            None,
            None,
            (
                ("boot to SSH", "s"),
                ("guest memory after boot", "MiB"),
                ("process's memory after boot", "MiB"),
            ),
        ),
    )
}
"""By name, in the order in which they are shown."""
