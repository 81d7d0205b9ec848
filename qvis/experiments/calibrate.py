# SPDX-License-Identifier: GPL-2.0-or-later
"""Costs of the emulated machine's exits, taken from traces of a real KVM.

The cost of a kind is the median duration of its exits, which a vCPU that was scheduled out
now and then does not move. Durations are the host's, from ``kvm_exit`` to ``kvm_entry``;
what the processor takes to switch is outside of both tracepoints.

**Who handled an exit** no tracepoint that is recorded says. It follows from what was
touched, on the machines that qvis starts (irqchip split, ioeventfds):

=====================================================  =========================================
fast                                                   kvm_fast_mmio; the EOI by an APIC-access
                                                       exit; MSR writes of a fixed IPI and, on
                                                       Intel, of the TSC deadline
                                                       (``handle_fastpath_set_msr_irqoff`` in
                                                       ``arch/x86/kvm/x86.c``); preemption timer
kernel                                                 queue notifications that no kvm_fast_mmio
                                                       tells of; local APICs and other MSRs;
                                                       exits that touch nothing
user                                                   other memory, ports
=====================================================  =========================================

**What is not fitted**: HLT, which lasts as long as there is nothing to do; EOIs of a level
(transport intx), of which some go on to the IOAPIC in user space; kinds with less than
:data:`LEAST` exits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ..emulated.costs import EXITS, Cost, Costs, Handler, Reason
from ..errors import InfraError, UsageError
from ..trace.model import Cause, Clock, Kind, Space
from ..trace.store import Trace

__all__ = ["LEAST", "Calibration", "Explained", "Fit", "calibrate", "write_costs"]

LEAST = 5  # exits of which a median is worth having
SHORTEST = 1_000_000  # ns of one vCPU that tell how fast its TSC runs

# Names of SVM's exits (``SVM_EXIT_REASONS`` in ``arch/x86/include/uapi/asm/svm.h``) by those that
# Intel has for the same; npf and msr are looked at more closely.
SVM = {
    "interrupt": Reason.EXTERNAL_INTERRUPT,
    "vintr": Reason.INTERRUPT_WINDOW,
    "cpuid": Reason.CPUID,
    "hlt": Reason.HLT,
    "io": Reason.IO_INSTRUCTION,
    "avic_unaccelerated_access": Reason.APIC_WRITE,
    "avic_incomplete_ipi": Reason.APIC_WRITE,
}
# SDM volume 3, 11.4.1 and 11.12.1.2
APIC, EOI, X2APIC_EOI, X2APIC_ICR, TSC_DEADLINE = 0xFEE00000, 0xFEE000B0, 0x80B, 0x830, 0x6E0
ICR_SPECIAL = 0xC0F00  # destination shorthand, logical mode, any delivery mode but fixed
EVERYBODY = 0xFFFFFFFF  # destination of an x2APIC's broadcast


@dataclass(frozen=True)
class Fit:
    """What was found of one kind of exit, in modelled cycles."""

    reason: Reason
    handler: Handler
    cycles: int  # the median
    low: int  # quartiles
    high: int
    count: int


@dataclass(frozen=True)
class Explained:
    """How far the fitted table accounts for one trace, in modelled cycles of all its vCPUs.

    Waiting (HLT) is not part of it.
    """

    trace: Path
    measured: int  # all exits that have a duration
    known: int  # those of a kind of the table
    predicted: int  # the same by the table
    explained: float  # share of measured; what a kind has too much makes up for no other


@dataclass(frozen=True)
class Calibration:
    """A table of costs, and why to believe it."""

    base: Costs
    costs: Costs
    fits: tuple[Fit, ...]  # in the order of EXITS; those that were kept out for LEAST too
    traces: tuple[Explained, ...]


def calibrate(traces: Sequence[Trace], base: Costs) -> Calibration:
    """``base`` with what the exits of ``traces`` cost.

    Raises :class:`UsageError` for traces that say nothing about hardware, of different
    clocks or hosts, or without exits, and those that cannot be read.
    """
    if not traces:
        raise UsageError("no trace to calibrate with")
    for trace in traces:
        _check(trace, traces[0])
    tables = [_durations(trace) for trace in traces]
    everything = pl.concat(tables).drop_nulls("kind")
    fits = []
    exits = dict(base.exits)
    for reason, handler in EXITS:
        found = everything.filter(pl.col("kind") == f"{reason}/{handler}")["cycles"]
        if not len(found):
            continue
        middle, low, high = (round(found.quantile(q, "linear") or 0) for q in (0.5, 0.25, 0.75))
        fit = Fit(reason, handler, middle, low, high, len(found))
        fits.append(fit)
        if fit.count >= LEAST:
            exits[reason, handler] = Cost(fit.cycles, _source(fit, traces))
    if not fits:
        raise UsageError(f"{traces[0].path} has no exit of a kind that the table has")
    costs = Costs(exits, base.steps)
    explained = (
        _explained(trace, table, costs) for trace, table in zip(traces, tables, strict=True)
    )
    return Calibration(base, costs, tuple(fits), tuple(explained))


def write_costs(costs: Costs, path: Path) -> None:
    """Write a table that :meth:`Costs.load` reads; :class:`InfraError` if that cannot be."""
    parts = [f"frequency = {costs.frequency}\n"]
    entries = {
        f'exits."{reason}/{handler}"': cost for (reason, handler), cost in costs.exits.items()
    }
    entries |= {f"steps.{name}": cost for name, cost in costs.steps.items()}
    for name, cost in entries.items():
        # What JSON makes of a string TOML reads as the same, without surrogates.
        source = json.dumps("".join(filter(str.isprintable, cost.source)), ensure_ascii=False)
        parts.append(f"[{name}]\ncycles = {cost.cycles}\nsource = {source}\n")
    temporary = path.with_name(f"{path.name}.new")
    try:
        temporary.write_text("\n".join(parts))
        temporary.rename(path)
    except OSError as problem:
        with suppress(OSError):
            temporary.unlink()
        raise InfraError(f"cannot write {path}: {problem.strerror}") from problem


def _check(trace: Trace, first: Trace) -> None:
    mine, others = trace.manifest.provenance, first.manifest.provenance
    if mine.touch is not Kind.EXIT or mine.clock in (Clock.INSTRUCTIONS, Clock.NONE):
        raise UsageError(
            f"{trace.path} is of {mine.accelerator}, whose times say nothing about hardware"
        )
    if mine.clock is Clock.MODELLED:
        raise UsageError(f"{trace.path} is of an emulated machine: its times come from a table")
    for what, a, b in (("clock", mine.clock, others.clock), ("host", mine.host, others.host)):
        if a != b:
            raise UsageError(f"{trace.path} has {what} {a}, and {first.path} has {b}")


def _durations(trace: Trace) -> pl.DataFrame:
    """``kind`` (as in EXITS; null: none of them) and ``cycles`` of each exit that did not wait."""
    exits = trace.events().filter(pl.col("kind") == Kind.EXIT, pl.col("duration").is_not_null())
    level = trace.manifest.provenance.transport == "intx"
    known = [f"{reason}/{handler}" for reason, handler in EXITS]
    reason = _reason()
    kind = pl.concat_str(reason, pl.lit("/"), _handler(reason, level=level))
    return (
        exits.filter(reason.is_null() | (reason != Reason.HLT))
        .select(
            pl.when(kind.is_in(known)).then(kind).alias("kind"),
            (pl.col("duration") * (Costs.frequency / _rate(trace))).alias("cycles"),
        )
        .collect()
    )


def _rate(trace: Trace) -> float:
    """Units of the trace's clock a second."""
    if trace.manifest.provenance.clock is Clock.NANOSECONDS:
        return 1e9
    time, clock = pl.col("time"), pl.col("clock").cast(pl.Int64)
    spans = (
        trace.events().filter(pl.col("vcpu").is_not_null(), pl.col("clock").is_not_null())
        .group_by("vcpu")
        .agg(time=time.last() - time.first(), clock=clock.last() - clock.first())
        .filter(pl.col("time") >= SHORTEST)
        .select((pl.col("clock") / pl.col("time")).median())
        .collect()
    )  # fmt: skip
    rate = spans.item()
    if not rate or rate <= 0:
        raise UsageError(f"{trace.path} is too short to tell how fast its TSC ran")
    return float(rate) * 1e9


def _reason() -> pl.Expr:
    """Intel's name of the exit's reason."""
    name = pl.col("reason").cast(pl.String)
    msr = pl.when(pl.col("write")).then(pl.lit("MSR_WRITE")).otherwise(pl.lit("MSR_READ"))
    return (
        pl.when(name == "npf", pl.col("address").is_not_null())
        .then(pl.lit("EPT_MISCONFIG"))
        .when(name == "msr")
        .then(msr)
        .otherwise(name.replace({k: str(v) for k, v in SVM.items()}).str.strip_suffix("_IMM"))
    )


def _handler(reason: pl.Expr, *, level: bool) -> pl.Expr:
    """Who handled the exit; null: it is not known."""
    address, write, value = pl.col("address"), pl.col("write"), pl.col("value")
    memory = pl.col("space") == Space.MEMORY
    msr = pl.col("space") == Space.MSR
    intel = pl.col("reason").cast(pl.String) == reason
    plain = (value & ICR_SPECIAL == 0) & (value // (1 << 32) != EVERYBODY)
    eoi = (memory & (address == EOI)) | (msr & (address == X2APIC_EOI))
    fast = (
        (memory & pl.col("size").is_null())
        | ((reason == "APIC_ACCESS") & (address == EOI) & write)
        | (msr & write & (address == X2APIC_ICR) & plain)
        | (msr & write & (address == TSC_DEADLINE) & intel)
        | (reason == "PREEMPTION_TIMER")
    )
    user = (pl.col("space") == Space.PORT) | (
        memory & (address // 4096 != APIC // 4096) & pl.col("cause").ne_missing(Cause.NOTIFY)
    )
    return (
        pl.when(pl.lit(level) & eoi.fill_null(False) & write)
        .then(None)
        .when(fast)
        .then(pl.lit("fast"))
        .when(user)
        .then(pl.lit("user"))
        .otherwise(pl.lit("kernel"))
    )


def _explained(trace: Trace, table: pl.DataFrame, costs: Costs) -> Explained:
    total = float(table["cycles"].sum())
    known = predicted = explained = 0.0
    prices: Mapping[str, int] = {f"{r}/{h}": cost.cycles for (r, h), cost in costs.exits.items()}
    for kind, count, cycles in (
        table.drop_nulls("kind").group_by("kind").agg(pl.len(), pl.col("cycles").sum()).iter_rows()
    ):
        price = count * prices[kind]
        known += cycles
        predicted += price
        explained += min(price, cycles)
    share = explained / total if total else 0.0
    return Explained(trace.path, round(total), round(known), round(predicted), share)


def _source(fit: Fit, traces: Sequence[Trace]) -> str:
    lines = dict.fromkeys(trace.manifest.provenance.line() for trace in traces)
    return (
        f"measured: median of {fit.count} exits, quartiles {fit.low} and {fit.high}, in "
        f"{' and in '.join(lines)}"
    )
