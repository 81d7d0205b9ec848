# SPDX-License-Identifier: GPL-2.0-or-later
"""The operations of a comparison as one script that a guest runs by itself.

A run that nothing from outside reaches can be repeated to the exit. So everything is in one
shell text for the guest's init: it finds the disk's interrupt, does each operation so often as
it is told, and announces on the console what it does, in phases. The announcement goes by
``/dev/kmsg``, which prints a line before the write to it ends; the bytes that the serial port
is given are in every trace, whoever recorded it, and :func:`cut` finds the phases by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import polars as pl

from ..errors import GuestError, UsageError
from ..spec import MachineSpec
from ..trace.model import Kind, Space
from ..trace.store import Trace

__all__ = ["BOOT", "COUNTS", "Phase", "chosen", "cut", "phases", "script"]

BOOT = "boot"
"""The operation that needs no script: all before the first phase."""

COUNTS: Mapping[str, int] = {
    BOOT: 1, "interrupt": 200, "mask": 10, "unmask": 10, "change of CPU": 10, "set-up": 1,
}  # fmt: skip
"""How often each operation is done, by name and in the order in which they are shown."""

QUEUE = 1  # not the first, which the boot has used most
PREPARATION = "preparation"  # of what comes next, or nothing any more: counted nowhere
ANNOUNCED = b"qvis-phase: "
SERIAL = 0x3F8  # the first serial port's transmit register, or its divisor's low byte
LINE_CONTROL, DLAB = SERIAL + 3, 0x80  # 16550A: the bit that makes a divisor of the first two

# $D is Linux's name of the disk, $I its interrupt's number, $C the CPU that uses the queue.
# A disk without a size answers at once, which is when reading its serial number is a request.
# What an operation sets off may end on another CPU after it: `settle` waits for that, and
# costs nothing where time is counted in instructions.
HEAD = """\
phase() {{ echo "<5>qvis-phase: $1" > /dev/kmsg || exit 1; }}
settle() {{ usleep 50000; }}
disk() {{
    for d in /sys/bus/virtio/devices/*; do
        case $(readlink $d/driver) in */virtio_blk) basename $d ;; esac
    done
}}
number() {{
    grep -e " $D-req.{queue}\\$" -e " $D\\$" /proc/interrupts | sed 's/:.*//;s/ //g'
}}
load() {{ qvis-load $F $C $1 > /dev/null || exit 1; }}
F=/dev/vda
[ "$(cat /sys/block/vda/size)" != 0 ] || F=/sys/block/vda/serial
D=$(disk)
I=$(number)
C=$(sed 's/[^0-9].*//' /sys/block/vda/mq/{queue}/cpu_list)
[ "$I" ] && [ "$C" ] || {{ echo "the disk has no interrupt, or no CPU"; exit 1; }}
"""

# An interrupt that comes on another CPU than its request costs an IPI, which is no part of
# what a transport is about. On x86 it moves with the next interrupt.
TO_OUR_CPU = """\
echo $C > /proc/irq/$I/smp_affinity_list || exit 1
load 1
settle
"""

MASKS = """\
phase mask
echo mask > /sys/kernel/debug/irq/irqs/$I || exit 1
phase unmask
echo unmask > /sys/kernel/debug/irq/irqs/$I || exit 1
"""

# Linux moves an MSI with the next interrupt, and takes it for moved, a tick later, with the
# first that comes where it goes then; until that a further move has to wait.
MOVE = """\
echo $(((i + C + 1) % {cpus})) > /proc/irq/$I/smp_affinity_list || exit 1
load 1
settle
load 1
settle
read now < /proc/irq/$I/effective_affinity_list
[ "$now" = $(((i + C + 1) % {cpus})) ] || {{ echo "the interrupt did not move"; exit 1; }}
"""

# The transport's own driver lets go of the device, and takes it again.
UNBIND = """\
P=$(readlink -f /sys/bus/virtio/devices/$D/..)
R=$(readlink -f $P/driver)
basename $P > $R/unbind || exit 1
settle
"""
BIND = "basename $P > $R/bind || exit 1\n"


@dataclass(frozen=True)
class Phase:
    """An operation that was done, from one event's place in its trace up to another's."""

    operation: str
    start: int
    end: int


def chosen(operations: Mapping[str, int]) -> dict[str, int]:
    """These operations and how often each is done, in the order of :data:`COUNTS`.

    Raises :class:`UsageError` for a name that is none, for none at all, and for a number that
    cannot be.
    """
    for name, count in operations.items():
        if name not in COUNTS:
            raise UsageError(f"no operation {name!r}: there are {', '.join(COUNTS)}")
        if count < 1 or (name == BOOT and count != 1):
            raise UsageError(f"the operation {name!r} cannot be done {count} times")
    if not operations:
        raise UsageError("name at least one operation")
    if len({operations[name] for name in ("mask", "unmask") if name in operations}) > 1:
        raise UsageError("mask and unmask take turns: do them equally often")
    return {name: operations[name] for name in COUNTS if name in operations}


def script(spec: MachineSpec, operations: Mapping[str, int]) -> str:
    """Shell text that does ``operations`` in a guest of ``spec``; fails when one does."""
    counts = chosen(operations)
    queue = min(QUEUE, spec.queues - 1, spec.smp - 1)
    lines = [HEAD.format(queue=queue)]
    if count := counts.get("interrupt"):
        lines += [f"phase {PREPARATION}\n", TO_OUR_CPU, "phase interrupt\n", f"load {count}\n",
                  "settle\n"]  # fmt: skip
    if count := max(counts.get("mask", 0), counts.get("unmask", 0)):
        lines += [_times(count, MASKS)]
    if count := counts.get("change of CPU"):
        lines += [f"phase {PREPARATION}\n", TO_OUR_CPU, "phase 'change of CPU'\n",
                  _times(count, MOVE.format(cpus=spec.smp))]  # fmt: skip
    for _ in range(counts.get("set-up", 0)):
        lines += [f"phase {PREPARATION}\n", UNBIND, "phase set-up\n", BIND, "settle\n"]
    lines.append(f"phase {PREPARATION}\n")
    return "".join(lines)


def _times(count: int, what: str) -> str:
    return f"i=0\nwhile [ $i -lt {count} ]; do\n{what}i=$((i + 1))\ndone\n"


def phases(trace: Trace) -> list[Phase]:
    """The phases of a trace whose guest ran a :func:`script`, and what was before the first.

    Raises :class:`GuestError` for a trace in which nothing is announced: the guest did not get
    to it, or what recorded the trace sees no ports.
    """
    written = (
        trace.events()
        .with_row_index("row")
        .filter(
            pl.col("kind").is_in([Kind.ACCESS, Kind.EXIT]),
            pl.col("space") == Space.PORT,
            pl.col("address").is_in([SERIAL, LINE_CONTROL]),
            pl.col("write"),
        )
        .select("row", "address", "value")
        .collect()
    )
    begun = list(_announced(written))
    if not begun:
        raise GuestError("the trace has no phase: the guest announced none, or its console is not "
                         "in the trace", stage="phases", log=trace.path)  # fmt: skip
    marks = [(BOOT, 0), *begun]
    ends = [start for _, start in marks[1:]] + [trace.manifest.events]
    return [
        Phase(name, start, end)
        for (name, start), end in zip(marks, ends, strict=True)
        if name != PREPARATION
    ]


def cut(trace: Trace, operations: Mapping[str, int]) -> dict[str, pl.LazyFrame]:
    """The events of each operation, those of its repetitions one after the other.

    Raises :class:`GuestError` when one of ``operations`` was never announced, or too rarely:
    the guest did not get there.
    """
    numbered = trace.events().with_row_index("row")
    found = phases(trace)
    frames = {}
    for name in chosen(operations):
        mine = [phase for phase in found if phase.operation == name]
        times = operations[name] if name in ("mask", "unmask", "set-up") else 1
        if len(mine) != times:
            raise GuestError(
                f"the guest announced {name!r} {len(mine)} times instead of {times}",
                stage="phases",
                log=trace.path,
            )
        within = pl.any_horizontal(
            *(pl.col("row").is_between(p.start, p.end, closed="left") for p in mine)
        )
        frames[name] = numbered.filter(within).drop("row")
    return frames


def _announced(written: pl.DataFrame) -> Iterator[tuple[str, int]]:
    """Each phase's name, and the row after the last byte of its announcement."""
    line, divisor = b"", False
    for row, address, value in written.iter_rows():
        if value is None:
            continue
        if address == LINE_CONTROL:
            divisor = bool(value & DLAB)
        elif not divisor:
            line += bytes([value & 0xFF])
            if line.endswith(b"\n"):
                _, found, name = line.partition(ANNOUNCED)
                if found:
                    yield name.decode(errors="replace").strip(), row + 1
                line = b""
