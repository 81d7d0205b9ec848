# SPDX-License-Identifier: GPL-2.0-or-later
"""How often a guest touches what, kept in a file that later runs are held against.

Where time is counted in instructions a run can be repeated to the access, so a count is
exact: one more is a change of the code, not noise. For each transport one machine boots and
does :mod:`.scripted`'s operations; :class:`Counts` has a number for each :class:`Cell`, a kind
of touch. What only follows how long something took (timers, IPIs, the console's polling,
halts) moves with every instruction that anybody adds: of that a sum is kept, to be shown, and
a check does not depend on it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ..backends import Backend, available
from ..backends.nested import Nested
from ..build import LinuxBuild, cache
from ..errors import GuestError, InfraError, QvisError, UsageError
from ..progress import note
from ..spec import MachineSpec
from ..trace.model import Cause, Kind
from ..trace.record import record_boot
from ..trace.sources import DEVICE_VECTORS, TELLING
from ..trace.store import Provenance, Trace
from ..transport import Transport
from .scripted import chosen, cut, script

__all__ = [
    "Cell",
    "Change",
    "Counts",
    "Golden",
    "Shape",
    "check",
    "counts_of",
    "differences",
    "measure",
    "record",
    "with_kernels",
]

FORMAT = 1
LOCAL_APIC = "LAPIC"
BY_TIME = (Cause.TIMER, Cause.IPI, Cause.CONSOLE)
"""Causes whose number follows from how long a guest ran."""
BY_TIME_REASONS = (
    "hlt", "interrupt", "nmi", "smi", "vintr", "pause", "npf", "vmmcall", "external_interrupt",
    "exception_nmi", "interrupt_window", "nmi_window", "pause_instruction", "ept_violation",
    "preemption_timer", "vmcall",
)  # fmt: skip
"""Reasons, of AMD's and then of Intel's processors, of exits for no register, likewise: the
host's interrupts, idle CPUs, memory that is touched for the first time, kicks and IPIs."""
CLASHES = ("reader", "accelerator", "clock")  # of provenance: what counts of two runs must share


@dataclass(frozen=True, order=True)
class Cell:
    """A kind of touch, as its trace has it; "" where that does not tell, or there is none."""

    device: str
    register: str  # of a delivery: the source, such as "req.1"
    direction: str  # "read" or "write"
    cause: str
    kind: str  # access, exit, eoi (of an IOAPIC) or deliver
    reason: str  # of an exit
    user: str  # of an exit: "user space" if KVM could not do it alone, else "kernel"

    def __str__(self) -> str:
        what = [self.device or self.reason or "(unknown)", self.register, self.direction]
        return " ".join(word for word in what if word)


@dataclass(frozen=True)
class Counts:
    """What one operation did on one transport, all its repetitions together."""

    cells: Mapping[Cell, int]
    background: int  # touches that follow the time
    medians: Mapping[str, float]  # in the provenance's clock; never compared

    @property
    def total(self) -> int:
        """Exits, or accesses where nothing exits."""
        return sum(n for cell, n in self.cells.items() if cell.kind in (Kind.ACCESS, Kind.EXIT))


@dataclass(frozen=True)
class Shape:
    """What machines are measured; ``memory`` in MiB, ``platform`` as in :func:`qvis.up`."""

    backend: str
    smp: int
    memory: int
    queues: int
    platform: Mapping[str, Any] | None = None

    def spec(self, transport: Transport) -> MachineSpec:
        """The machine of ``transport``; :class:`UsageError` for one that cannot be."""
        shape = dataclasses.asdict(self)
        del shape["backend"]
        return MachineSpec.from_json(
            {**shape, "name": "gate", "transport": str(transport), "icount": True}
        )


@dataclass(frozen=True)
class Golden:
    """Counts by transport and operation, and where they come from."""

    provenance: Mapping[str, Any]  # of all transports alike
    shape: Shape
    operations: Mapping[str, int]
    counts: Mapping[Transport, Mapping[str, Counts]]

    def save(self, file: Path) -> None:
        """Write it to ``file``, sorted and a cell a line, so that a difference can be read.

        Raises :class:`UsageError` when something else is there, or it cannot be written.
        """
        if file.exists():
            Golden.load(file, any_format=True)
        data = {
            "format": FORMAT,
            "provenance": dict(self.provenance),
            "shape": dataclasses.asdict(self.shape),
            "operations": dict(self.operations),
            "transports": {
                str(transport): {name: _counts_json(c) for name, c in counts.items()}
                for transport, counts in self.counts.items()
            },
        }
        temporary = file.with_name(f".{file.name}.new")
        try:
            temporary.write_text(_lines(data) + "\n")
            temporary.rename(file)
        except OSError as problem:
            raise UsageError(f"cannot write {file}: {problem.strerror}") from problem

    @classmethod
    def load(cls, file: Path, *, any_format: bool = False) -> Golden:
        """The file that :meth:`save` wrote; :class:`UsageError`, in a line, for any other.

        With ``any_format`` one of another version of qvis is no error, and empty.
        """
        try:
            data = json.loads(file.read_text())
            version = data["format"]
            data["operations"], data["transports"]
        except OSError as problem:
            raise UsageError(f"cannot read {file}: {problem.strerror}") from problem
        except (ValueError, KeyError, TypeError) as problem:
            raise UsageError(f"{file} is damaged, or no file of `qvis gate record`") from problem
        if version != FORMAT:
            if any_format:
                return cls({}, Shape("", 0, 0, 0), {}, {})
            raise UsageError(
                f"{file} has format {version}, and this qvis knows {FORMAT} only: record it anew"
            )
        try:
            golden = cls(
                provenance=dict(data["provenance"]),
                shape=Shape(**data["shape"]),
                operations=chosen(data["operations"]),
                counts={
                    Transport.parse(name): {op: _counts(each) for op, each in counts.items()}
                    for name, counts in data["transports"].items()
                },
            )
            _complete(golden)
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            raise UsageError(f"{file} is damaged: {problem!r}") from problem
        except UsageError as problem:
            raise UsageError(f"{file} is damaged: {problem}") from problem
        return golden


@dataclass(frozen=True)
class Change:
    """A count that is another one now. ``cell`` None: the sum of what follows the time."""

    transport: Transport
    operation: str
    cell: Cell | None
    before: int
    after: int
    times: int  # how often the operation was done

    @property
    def each(self) -> float:
        """How many more for each time that the operation was done."""
        return (self.after - self.before) / self.times

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        cell = dataclasses.asdict(self.cell) if self.cell else {"cause": "background"}
        return {
            "transport": str(self.transport), "operation": self.operation, **cell,
            "before": self.before, "after": self.after, "times": self.times,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Change:
        """The change that :meth:`to_json` wrote, if it was one of a cell's."""
        cell = Cell(**{field.name: data[field.name] for field in dataclasses.fields(Cell)})
        return cls(Transport(data["transport"]), data["operation"], cell, data["before"],
                   data["after"], data["times"])  # fmt: skip


Measure = Callable[[Shape, Transport, Mapping[str, int]], tuple[dict[str, Counts], Provenance]]


def measure(
    shape: Shape, transport: Transport, operations: Mapping[str, int], **machine: Any
) -> tuple[dict[str, Counts], Provenance]:
    """One run: the counts of each operation, and where they come from.

    ``machine`` replaces arguments of :func:`qvis.up` which follow from ``shape``. Raises what
    :func:`~qvis.trace.record.record_boot` does, :class:`GuestError` when the guest's script
    fails, and :class:`InfraError` for a trace that is not whole; the trace then stays, and the
    error says where.
    """
    spec = shape.spec(transport)
    folder = Path(tempfile.mkdtemp(prefix="qvis-gate-"))
    try:
        trace, status = record_boot(
            folder / f"{transport}.trace",
            script(spec, operations),
            **{
                "backend": shape.backend, "transport": transport, "smp": spec.smp,
                "memory": spec.memory, "queues": spec.queues, "platform": spec.platform,
                "icount": True, **machine,
            },
        )  # fmt: skip
        counted = counts_of(_whole(trace, status), operations)
    except BaseException as problem:
        kept = isinstance(problem, QvisError) and problem.log and folder in problem.log.parents
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return counted, trace.manifest.provenance


def with_kernels(backend: str, guest: Path | None, host: Path | None) -> Backend:
    """The backend of that name with kernels of build folders of Linux: a guest's, a host's.

    Raises :class:`UsageError` for a folder in which no kernel was built, and for a backend that
    cannot: only what records KVM's tracepoints needs no symbols, and boots with any kernel.
    """
    chosen = available().get(backend)
    if not isinstance(chosen, Nested):
        raise UsageError(f"a kernel that was built elsewhere needs --backend nested, not {backend}")
    artifacts = chosen.artifacts()
    return Nested(
        dataclasses.replace(
            artifacts,
            linux=_kernel(guest) if guest else artifacts.linux,
            host_linux=_kernel(host) if host else artifacts.host_linux,
        )
    )


def _kernel(folder: Path) -> LinuxBuild:
    names = ("arch/x86/boot/bzImage", "vmlinux", ".config", "include/config/kernel.release")
    for name in names:
        if not (folder / name).is_file():
            raise UsageError(f"{folder / name} is not there: was a kernel built in this folder?")
    image, vmlinux, config, release = (folder.absolute() / name for name in names)
    return LinuxBuild(
        image=image, vmlinux=vmlinux, config=config, version=release.read_text().strip(),
        series="built elsewhere", key=cache.key(image.read_bytes()),
    )  # fmt: skip


def record(
    shape: Shape,
    transports: Sequence[Transport],
    operations: Mapping[str, int],
    run: Measure = measure,
) -> tuple[Golden, list[Change]]:
    """Measure everything twice: the first counts, and what the second had otherwise.

    A count that differs must not become a golden number. Raises what ``run`` does.
    """
    if len(set(transports)) != len(transports) or not transports:
        raise UsageError("name each transport once, and at least one")
    golden = _measured(shape, transports, operations, run)
    again = _measured(shape, transports, operations, run)
    return golden, differences(golden, again, background=True)


def check(
    golden: Golden, transports: Sequence[Transport] = (), run: Measure = measure
) -> tuple[Golden, list[Change]]:
    """Measure once what ``golden`` has, or ``transports`` of it: what is so now, and differs.

    Raises :class:`UsageError` for a transport that it does not have, or when what it was
    recorded with cannot be compared with what is here, and what ``run`` does.
    """
    for transport in transports:
        if transport not in golden.counts:
            raise UsageError(f"the file has no {transport}: {', '.join(golden.counts)}")
    now = _measured(golden.shape, transports or list(golden.counts), golden.operations, run)
    for name in CLASHES:
        if (then := golden.provenance.get(name)) != (here := now.provenance.get(name)):
            raise UsageError(
                f"the file was recorded with the {name} {then!r}, which here is {here!r}: "
                "record it anew"
            )
    return now, differences(golden, now)


def differences(before: Golden, after: Golden, *, background: bool = False) -> list[Change]:
    """What differs on the transports that both have, most important first.

    That is what was added before what went away, and what there is more of for each operation
    first. With ``background`` the sums of what follows the time are compared too.
    """
    found = []
    for transport, counts in after.counts.items():
        for name, now in counts.items():
            then, times = before.counts[transport][name], after.operations[name]
            pairs: list[tuple[Cell | None, int, int]] = [
                (cell, then.cells.get(cell, 0), now.cells.get(cell, 0))
                for cell in sorted({*then.cells, *now.cells})
            ]
            if background:
                pairs.append((None, then.background, now.background))
            found += [Change(transport, name, c, a, b, times) for c, a, b in pairs if a != b]
    return sorted(found, key=lambda change: (change.each < 0, -abs(change.each)))


def _measured(
    shape: Shape, transports: Iterable[Transport], operations: Mapping[str, int], run: Measure
) -> Golden:
    counts: dict[Transport, dict[str, Counts]] = {}
    known: dict[str, Any] = {}
    for transport in transports:
        counts[transport], provenance = run(shape, transport, operations)
        known = {**dataclasses.asdict(provenance), "clock": str(provenance.clock)}
        done = ", ".join(f"{name} {each.total}" for name, each in counts[transport].items())
        note(f"{transport}: {done}")
    for name in ("transport", "smp", "queues", "memory"):
        del known[name]  # the shape's
    return Golden(known, shape, chosen(operations), counts)


def _whole(trace: Trace, status: int) -> Trace:
    """The trace, unless something is missing of it."""
    if trace.manifest.partial:
        reasons = "; ".join(trace.manifest.partial)
        raise InfraError(f"the trace is partial: {reasons}", stage="gate", log=trace.path)
    if status:
        raise GuestError(
            f"the guest's script ended with status {status}", stage="script", log=trace.path
        )
    return trace


def counts_of(trace: Trace, operations: Mapping[str, int]) -> dict[str, Counts]:
    """What each of the operations did that :func:`~.scripted.script` put into ``trace``."""
    source, events = trace.manifest.provenance, trace.events()
    of_device = pl.col("device").is_not_null()
    told = source.reader in TELLING
    if not told:  # of Linux's numbers, and so of devices
        of_device |= pl.col("vector").is_in(list(DEVICE_VECTORS))
    delivered = (
        events.filter(pl.col("kind") == Kind.DELIVER, of_device)
        .select(pl.col("interrupt").drop_nulls().unique())
        .collect()["interrupt"]
    )
    ours = pl.col("interrupt").is_in(delivered.implode()).fill_null(False)
    touch = pl.col("kind") == source.touch
    device, reason = pl.col("device").cast(pl.String), pl.col("reason").cast(pl.String)
    ended = (pl.col("kind") == Kind.EOI) & pl.col("device").is_not_null()
    background = (
        pl.col("cause").is_in([str(cause) for cause in BY_TIME]).fill_null(False)
        | ((device == LOCAL_APIC).fill_null(False) & (pl.col("cause") == Cause.EOI) & ~ours)
        | (ended & ~ours)
        # Handed to a thread of the device. A driver need not notify while that is at work, so
        # this is a matter of who is faster.
        | ((pl.col("cause") == Cause.NOTIFY) & (pl.col("user") == False))  # noqa: E712
        | (
            pl.col("register").is_null()
            & reason.str.to_lowercase().is_in(BY_TIME_REASONS).fill_null(False)
        )
    )
    taken = (pl.col("kind") == Kind.DELIVER) & pl.col("device").is_not_null()
    found = {}
    for name, frame in cut(trace, operations).items():
        rows = (
            frame.filter(touch | ended | taken)
            .select(
                device=device,
                register=pl.when(taken).then(pl.col("source").cast(pl.String))
                .otherwise(pl.col("register").cast(pl.String)),
                direction=pl.when(pl.col("write")).then(pl.lit("write"))
                .when(pl.col("write").is_not_null()).then(pl.lit("read")),
                cause=pl.col("cause").cast(pl.String),
                kind=pl.col("kind").cast(pl.String),
                reason=reason,
                user=pl.when(pl.col("user")).then(pl.lit("user space"))
                .when(pl.col("user").is_not_null()).then(pl.lit("kernel")),
                background=background.fill_null(False),
            )
            .with_columns(pl.col(pl.String).fill_null(""))
            .group_by(pl.all())
            .len()
            .collect()
        )  # fmt: skip
        cells = {}
        for row in rows.filter(~pl.col("background")).drop("background").iter_rows(named=True):
            count = row.pop("len")
            cells[Cell(**row)] = count
        sum_ = int(rows.filter("background", pl.col("kind") == str(source.touch))["len"].sum())
        found[name] = Counts(cells, sum_, _medians(frame, ours if told else pl.lit(False)))
    return found


def _medians(frame: pl.LazyFrame, ours: pl.Expr) -> dict[str, float]:
    """What interrupts of devices and exits cost in the trace's clock, where it has one."""
    start = pl.col("clock").filter(pl.col("kind") == Kind.DELIVER).min()
    end = pl.col("clock").filter(pl.col("cause") == Cause.EOI).max()
    ended = (
        frame.filter(ours)
        .group_by("interrupt")
        .agg((end.cast(pl.Int64) - start.cast(pl.Int64)).alias("cost"))
        .select(pl.col("cost").median())
    )
    out = frame.filter(pl.col("kind") == Kind.EXIT).select(pl.col("duration").median())
    found = {"delivery to EOI": ended.collect().item(), "exit": out.collect().item()}
    return {name: value for name, value in found.items() if value is not None}


def _complete(golden: Golden) -> None:
    """:class:`UsageError` unless it has machines that can be, and all operations of each."""
    if not golden.counts:
        raise UsageError("it has no transport")
    for transport, counts in golden.counts.items():
        golden.shape.spec(transport)
        if set(counts) != set(golden.operations):
            raise UsageError(f"{transport} has other operations than the file")


def _counts_json(counts: Counts) -> dict[str, Any]:
    cells = []
    for cell, count in sorted(counts.cells.items()):
        known = {name: value for name, value in dataclasses.asdict(cell).items() if value}
        cells.append({**known, "count": count})
    return {
        "total": counts.total, "background": counts.background,
        "medians": dict(counts.medians), "cells": cells,
    }  # fmt: skip


def _counts(data: Mapping[str, Any]) -> Counts:
    cells = {}
    for line in data["cells"]:
        fields = {field.name: str(line.get(field.name, "")) for field in dataclasses.fields(Cell)}
        if set(line) - set(fields) != {"count"} or type(line["count"]) is not int:
            raise ValueError(f"no cell: {line}")
        cells[Cell(**fields)] = line["count"]
    counts = Counts(cells, data["background"], dict(data["medians"]))
    if len(cells) != len(data["cells"]) or counts.total != data["total"]:
        raise ValueError("the cells do not add up to the total")
    return counts


def _lines(value: Any, indent: str = "") -> str:
    """JSON with each member of a list, and each key, in one line."""
    more = indent + " "
    if isinstance(value, dict) and value:
        inside = [f"{more}{json.dumps(k)}: {_lines(value[k], more)}" for k in sorted(value)]
        return "{\n" + ",\n".join(inside) + f"\n{indent}}}"
    if isinstance(value, list) and value:
        inside = [f"{more}{json.dumps(each)}" for each in value]
        return "[\n" + ",\n".join(inside) + f"\n{indent}]"
    return json.dumps(value)
