# SPDX-License-Identifier: GPL-2.0-or-later
"""What is compared: operations on a disk's interrupt, how each is done, and what it cost.

Nothing is assumed of how a transport does anything; a number is what a trace has,
divided by how often the operation was done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import polars as pl

from ..errors import InfraError
from ..trace.model import Cause, Clock, Kind
from ..trace.sources import TELLING
from ..trace.stats import Stats
from ..trace.store import Trace
from ..trace.symbols import FUNCTIONS
from . import exits
from .result import Row

__all__ = ["DISK", "OPERATIONS", "SEEN", "Operation", "Part", "Target", "evidence"]

DISK = "blk0"
IO_APIC = "IOAPIC"
LOCAL_APIC = "LAPIC"
DOORBELL = "VisUpdate"
COUNTED = (Clock.INSTRUCTIONS, Clock.MODELLED)  # not by a host that has other work to do
PROOF_TIME = 50_000  # us from an interrupt until its move is cleaned up: some ticks
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
class Part(Trace):
    """The part of a trace in which one operation was done, and nothing else."""

    part: pl.LazyFrame

    def events(self) -> pl.LazyFrame:
        return self.part


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
    prepare: Callable[[Target], str] | None = None  # done first, outside of the trace
    # Likewise, and fails unless the operation does something, whatever the trace tells of it.
    proof: Callable[[Target], str] | None = None


def _named(*devices: str) -> pl.Expr:
    """What has to do with these devices; IOAPICs have numbers."""
    name = pl.col("device").cast(pl.String)
    exact = name.is_in([device for device in devices if device != IO_APIC])
    return exact | name.str.starts_with(IO_APIC) if IO_APIC in devices else exact


def _of(trace: Trace, *devices: str) -> pl.Expr:
    """Touches of these devices' registers."""
    return (pl.col("kind") == trace.manifest.provenance.touch) & _named(*devices)


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
    if exits.tells(trace):
        ours_only = _named(DISK, IO_APIC, LOCAL_APIC)
        found |= {
            "exits to user space per interrupt": exits.to_user_space(trace, ours_only)
            / len(numbers),
            "exits to user space before delivery": exits.before_delivery(trace, numbers)
            / len(numbers),
        }
        found |= _known({
            "exit of a notification": exits.length(trace, _of(trace, DISK), _caused(Cause.NOTIFY)),
            "exit of an EOI": exits.length(trace, _of(trace, LOCAL_APIC), ours, _caused(Cause.EOI)),
            "arrival to delivery": exits.raise_to_delivery(trace, numbers),
        })  # fmt: skip
    return found


def _known(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


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


def _masks(cause: Cause, a: str, name: str) -> Callable[[Trace, Target, int], dict[str, float]]:
    def measure(trace: Trace, target: Target, count: int) -> dict[str, float]:
        _done(trace, count, str(cause))
        of = _of(trace, DISK, IO_APIC)
        # VIS's doorbell does not say what has changed. Nothing is moved here, and masks and
        # unmasks take turns: each has half of them.
        doorbell = pl.col("register").cast(pl.String) == DOORBELL
        share = 1.0 if isinstance(trace, Part) else 0.5
        found = {name: (_count(trace, of, _caused(cause)) + share * _count(trace, of, doorbell))
                 / count}  # fmt: skip
        if exits.tells(trace):
            found |= _known({f"exit of {a} {cause}": exits.length(trace, of, _caused(cause))})
        return found

    return measure


def _moves(trace: Trace, target: Target, count: int) -> dict[str, float]:
    _done(trace, count, "set_affinity", "write_msg")
    of = _of(trace, DISK, IO_APIC) & _caused(Cause.ROUTE, Cause.MASK, Cause.UNMASK)
    found = {"accesses per change of CPU": _count(trace, of) / count}
    if exits.tells(trace) and trace.manifest.provenance.clock in COUNTED:
        found["all exits of a change of CPU"] = exits.lengths(trace, of) / count
    return found


def _set_ups(trace: Trace, target: Target, count: int) -> dict[str, float]:
    used = _caused(Cause.NOTIFY, Cause.STATUS, Cause.ACKNOWLEDGE)
    return {"accesses per set-up": _count(trace, _of(trace, DISK, IO_APIC), ~used) / count}


def evidence(trace: Trace, target: Target) -> Iterable[Row]:
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


def _mask_works(target: Target) -> str:
    """Fails unless a masked interrupt waits, and comes when it is unmasked.

    Where the trace does not tell of the guest's functions, a mask that leaves nothing in it
    looks like one that does nothing.
    """
    file = f"/sys/kernel/debug/irq/irqs/{target.irq}"
    seen = f"sed -n 's/^ *{target.irq}://p' /proc/interrupts | cut -c1-{11 * target.cpus}"
    return (
        f"before=$({seen}); echo mask > {file} || exit 1; "
        f"qvis-load /dev/vda {target.cpu} 1 > /dev/null & "
        "i=0; until grep -q '[1-9]' /sys/block/vda/inflight; do "
        "[ $i -lt 500 ] || exit 1; usleep 10000; i=$((i + 1)); done; usleep 50000; "
        f"masked=$({seen}); echo unmask > {file} || exit 1; wait; after=$({seen}); "
        '[ "$before" = "$masked" ] && [ "$masked" != "$after" ]'
    )


def _move_works(target: Target) -> str:
    """Fails unless the interrupt goes where it is sent, there and back; for the same reason."""
    irq = f"/proc/irq/{target.irq}"
    request = f"qvis-load /dev/vda {target.cpu} 1 > /dev/null || exit 1; usleep {PROOF_TIME}; "
    return (
        f"for to in {(target.cpu + 1) % target.cpus} {target.cpu}; do "
        f"echo $to > {irq}/smp_affinity_list || exit 1; {request}{request}"
        f'[ "$(cat {irq}/effective_affinity_list)" = $to ] || exit 1; done'
    )


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
                ("exits to user space per interrupt", "exits"),
                ("exits to user space before delivery", "exits"),
                ("exit of a notification", "clock"),
                ("exit of an EOI", "clock"),
                ("arrival to delivery", "clock"),
            ),
        ),
        Operation(
            "mask",
            50,
            _mask_command,
            _masks(Cause.MASK, "a", "accesses per mask"),
            (("accesses per mask", "accesses"), ("exit of a mask", "clock")),
            proof=_mask_works,
        ),
        Operation(
            "unmask",
            50,
            _mask_command,
            _masks(Cause.UNMASK, "an", "accesses per unmask"),
            (("accesses per unmask", "accesses"), ("exit of an unmask", "clock")),
            proof=_mask_works,
        ),
        Operation(
            "change of CPU",
            20,
            _move_command,
            _moves,
            (
                ("accesses per change of CPU", "accesses"),
                ("all exits of a change of CPU", "clock"),
            ),
            proof=_move_works,
        ),
        Operation(
            "set-up",
            1,
            lambda target, count: _BIND,
            _set_ups,
            (("accesses per set-up", "accesses"),),
            prepare=lambda target: _UNBIND.format(device=target.device),
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
