# SPDX-License-Identifier: GPL-2.0-or-later
"""A recording of ``kvm:*`` tracepoints, as events of the model.

=================================================  ==========================================
tracepoints of one vCPU's thread                   rows
=================================================  ==========================================
kvm_exit, to the kvm_entry that follows            EXIT, with the first register behind it
kvm_mmio, kvm_pio, kvm_msr, kvm_apic,              part of that EXIT; each further one in the
kvm_fast_mmio                                      same exit, or one without an exit: ACCESS
kvm_userspace_exit                                 that EXIT's ``user``: QEMU was asked
kvm_inj_virq                                       DELIVER, at the ``rip`` of the kvm_entry
kvm_eoi                                            EOI
kvm_apic_accept_irq, on any thread                 RAISE
=================================================  ==========================================

**One access, told more than once.** A read that QEMU answers is a kvm_mmio
``unsatisfied-read`` and later a kvm_mmio ``read`` with the value: one access.
A local APIC register is a kvm_apic beside the kvm_mmio or kvm_msr that reached
it: one access, as the latter has it. Where KVM tells kvm_apic only (APIC-access
and APIC-write exits), the address is that of the register in an xAPIC at
0xfee00000, or its MSR if the exit is one of an MSR instruction. A string of
port accesses is one row with the first value.

**One interrupt, told more than once.** A RAISE is what arrives at a local
APIC, and kvm_apic_accept_irq tells of each arrival (``__apic_accept_irq`` in
``arch/x86/kvm/lapic.c``): MSIs, lines, IPIs, local timers. What precedes it is
not recorded, since it would be counted twice or would be no interrupt at all:
kvm_set_irq and kvm_ioapic_set_irq also tell of falling lines, of masked and of
merged ones, and kvm_msi_set_irq also of routes that are merely looked at
(``kvm_scan_ioapic_routes``). A message to several CPUs is a RAISE for each.
``vcpu`` of a RAISE is the one that it goes to, whoever raised it. INIT, start-up
and SMI are none; an NMI or ExtINT has no vector. Likewise kvm_pv_eoi always
follows a kvm_eoi; both come at the exit after the guest's EOI, which itself did
not exit. What hardware delivers or ends by itself (APICv, AVIC, posted
interrupts) is in no tracepoint.

Reinjections and software interrupts are no DELIVER. An EXIT without its
kvm_entry, or with events lost meanwhile, has no duration.

Sources: ``arch/x86/kvm/trace.h``, ``include/trace/events/kvm.h`` of Linux.
Fields are taken by name, since kernels differ in where they are.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ..errors import UsageError
from .model import SCHEMA, Clock, Kind, Space
from .ringbuffer import Events, Field, Format, Layout, PerCpu

__all__ = ["CLOCKS", "ESSENTIAL", "EVENTS", "Reader", "Recording", "lost"]

Table = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[np.bool_]

CLOCKS = {"x86-tsc": Clock.TSC, "mono": Clock.NANOSECONDS}
"""The kernel's names of the clocks that are read here, the better one first."""

# Which column each event's fields go to; "a|b": as kernels call it, "?": need not be there.
_FIELDS: dict[str, dict[str, str]] = {
    "kvm_exit": {"value": "exit_reason", "detail": "isa", "pc": "guest_rip?", "id": "vcpu_id?"},
    "kvm_entry": {"pc": "rip?", "id": "vcpu_id?"},
    "kvm_mmio": {"address": "gpa", "size": "len", "write": "type", "value": "val"},
    "kvm_pio": {"address": "port", "size": "size", "write": "rw", "value": "val?"},
    "kvm_msr": {"address": "ecx", "write": "write", "value": "data"},
    "kvm_apic": {"address": "reg", "write": "rw", "value": "val"},
    "kvm_fast_mmio": {"address": "gpa"},
    "kvm_apic_accept_irq": {"value": "vec", "id": "apicid?", "detail": "dm?"},
    "kvm_inj_virq": {"value": "vector|irq", "write": "soft?", "detail": "reinjected?"},
    "kvm_eoi": {"value": "vector"},
    "kvm_userspace_exit": {"value": "reason", "detail": "errno"},
}
EVENTS = tuple(_FIELDS)
"""The tracepoints that are of use."""

ESSENTIAL = EVENTS[:2]
"""Those without which there is no recording."""

EXIT, ENTRY, MMIO, PIO, MSR, APIC, FAST, ACCEPT, INJECT, EOI, USER, OTHER = range(len(EVENTS) + 1)

# One event of any kind. What a kernel does not tell is 0, and -1 as id.
_EVENT = np.dtype(
    [
        ("time", "<u8"),  # in the recording's clock
        ("address", "<u8"),
        ("value", "<u8"),
        ("pc", "<u8"),
        ("thread", "<i4"),
        ("id", "<i4"),  # KVM's of a vCPU
        ("detail", "<u4"),
        ("size", "u1"),
        ("write", "u1"),
        ("event", "u1"),  # place in EVENTS
    ]
)

MOST = 0xFFFF  # vCPUs, of which KVM has 4,096 at most
HELD = 8_000_000  # events that may wait for the end of an exit
VMX, SVM = 1, 2  # KVM_ISA_* in arch/x86/kvm/trace.h
VMX_MSR = (31, 32, 84, 85)  # EXIT_REASON_MSR_READ, _WRITE, and both with an immediate
SVM_MSR = 0x7C  # SVM_EXIT_MSR
MMIO_UNSATISFIED, MMIO_READ, MMIO_WRITE = range(3)  # KVM_TRACE_MMIO_* in trace/events/kvm.h
FAILED_ENTRY = 1 << 31  # VMX_EXIT_REASONS_FAILED_VMENTRY in arch/x86/include/uapi/asm/vmx.h
APIC_BASE = 0xFEE00000  # where an xAPIC's registers are
APIC_MSR = 0x800  # where an x2APIC's are, 16 times denser
NO_REGISTER = (1 << 64) - 1
FIXED, LOWEST, NMI, EXTINT = 0, 1, 4, 7  # delivery modes, Intel SDM vol. 3, 11.6.1

RECORDING = "recording.json"
_STATS = re.compile(r"^(overrun|commit overrun|dropped events): (\d+)$", re.MULTILINE)
_SYMBOLS = re.compile(r"__print_symbolic\(\s*REC->exit_reason[^,]*,((?:\s*\{[^{}]*\},?)+)")
_SYMBOL = re.compile(r"\{\s*([^,{}]+?)\s*,\s*\"([^\"]*)\"\s*\}")

_KINDS = pl.Series(list(Kind), dtype=pl.Enum(Kind))
_SPACES = pl.Series([*Space, None], dtype=pl.Enum(Space))
_ACCESS, _EXIT, _RAISE, _DELIVER, _EOI = (
    list(Kind).index(kind) for kind in (Kind.ACCESS, Kind.EXIT, Kind.RAISE, Kind.DELIVER, Kind.EOI)
)
_MEMORY, _PORT, _MSR, _NOWHERE = 0, 1, 2, 3


@dataclass(frozen=True)
class Recording:
    """What a recorder says of the folder that it wrote (``raw/`` of a trace).

    Beside it lie ``cpu<N>.raw``, and as in tracefs ``events/header_page``,
    ``events/header_event``, ``events/kvm/*/format`` and ``per_cpu/cpu<N>/stats``.
    """

    clock: str  # a key of CLOCKS
    vcpus: dict[int, int]  # thread to number of the vCPU, of QMP's query-cpus-fast
    pairs: tuple[tuple[int, int], ...] = ()
    """(ns of CLOCK_MONOTONIC, TSC) at the same moment, at the start and the end."""
    khz: float | None = None  # of the TSC, needed only with less than two pairs
    partial: tuple[str, ...] = ()  # why it is not all, each a sentence
    counted: bool = True  # whether ticks of the clock are a measure: an emulator's TSC is none

    def save(self, raw: Path) -> None:
        """Put it into the folder ``raw``; OSError if it cannot be written."""
        (raw / RECORDING).write_text(json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def load(cls, raw: Path) -> Recording:
        """The one in ``raw``; :class:`UsageError` when there is none, or it is not one."""
        file = raw / RECORDING
        try:
            data = json.loads(file.read_text())
            found = cls(
                clock=data["clock"],
                vcpus={int(thread): int(vcpu) for thread, vcpu in data["vcpus"].items()},
                pairs=tuple((int(ns), int(tsc)) for ns, tsc in data["pairs"]),
                khz=data["khz"],
                partial=tuple(data["partial"]),
                counted=data.get("counted", True),
            )
        except FileNotFoundError:
            raise UsageError(f"{raw} is no recording: it has no {RECORDING}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise UsageError(f"{file} is damaged: {problem!r}") from problem
        if found.clock not in CLOCKS:
            raise UsageError(f"{file}: clock {found.clock} is none of {', '.join(CLOCKS)}")
        return found

    def nanoseconds(self, ticks: npt.NDArray[np.uint64]) -> Ints:
        """CLOCK_MONOTONIC at these times of the recording's clock.

        From the first pair on at the rate that the last one tells, or ``khz``;
        without pairs, from the TSC's own start. :class:`UsageError` when
        neither is known.
        """
        if CLOCKS[self.clock] is Clock.NANOSECONDS:
            return ticks.astype(np.int64)
        (ns, tsc), (last_ns, last_tsc) = (
            (self.pairs[0], self.pairs[-1]) if self.pairs else ((0, 0), (0, 0))
        )
        if last_tsc > tsc:
            rate = (last_ns - ns) / (last_tsc - tsc)
        elif self.khz:
            rate = 1e6 / self.khz
        else:
            raise UsageError(f"{RECORDING} does not tell how fast the TSC ran")
        since = (ticks - np.uint64(tsc)).astype(np.int64)  # wraps to what is before it
        found: Ints = np.rint(since * rate).astype(np.int64)
        found += ns
        return found


def lost(stats: str) -> int:
    """How many events a CPU's buffer lost, of the text of its ``stats`` file."""
    return sum(int(match[2]) for match in _STATS.finditer(stats))


class Reader:
    """The recording in the folder ``raw``.

    Raises :class:`UsageError` when it is none, when a tracepoint lacks a field
    that is needed, or when it cannot be read.
    """

    def __init__(self, raw: Path) -> None:
        self.recording = Recording.load(raw)
        self.clock = CLOCKS[self.recording.clock]
        layout = Layout.read(raw / "events")
        formats = [Format.read(path) for path in sorted(raw.glob("events/kvm/*/format"))]
        self._decoders = _decoders(raw, {format.name: format for format in formats})
        self._formats = {format.number for format in formats}
        self._common = formats[0].fields
        self._reasons = _reasons(self._decoders[EXIT].format.text)
        self._files = [PerCpu(path, layout) for path in sorted(raw.glob("cpu*.raw"))]
        if not self._files:
            raise UsageError(f"{raw} is no recording: it has no cpu<N>.raw")
        stats = raw.glob("per_cpu/cpu*/stats")
        self._stats = sum(lost(path.read_text(errors="replace")) for path in stats)
        self._vcpus = dict(self.recording.vcpus)
        self._numbers: dict[int, int] = {}  # KVM's id to number of the vCPU
        self._short = 0
        self._unknown = 0
        self._waited = 0

    @property
    def lost(self) -> int:
        """Events that the kernel had no room for: what its statistics say, or else the pages.

        Without statistics it is known when :meth:`frames` is exhausted, and
        then the least that it can be.
        """
        return max(self._stats, sum(file.lost for file in self._files))

    @property
    def partial(self) -> tuple[str, ...]:
        """Why this is not all, each a sentence; complete when :meth:`frames` is exhausted."""
        found = [*self.recording.partial, *(fault for file in self._files for fault in file.faults)]
        if self._short:
            found.append(f"{self._short} events were shorter than their format says: left out")
        if self._unknown:
            found.append(f"{self._unknown} events have no format in the recording: left out")
        if self._waited:
            found.append(
                f"{self._waited} exits had no end within {HELD} further events: without duration"
            )
        return tuple(found)

    def frames(self) -> Iterator[pl.DataFrame]:
        """The events in order of time, as frames of :data:`~qvis.trace.model.SCHEMA`; once.

        Memory is bounded: a frame holds what happened while some pages of each
        CPU filled, and longer only while a vCPU is outside the guest, since its
        exit comes before what others did meanwhile, and has to be told with its
        duration.
        """
        held = np.empty(0, _EVENT)
        told = 0  # of those held, how many are there for what follows them only
        waiting: list[Table] = []
        fresh = 0
        for batch in self._batches():
            waiting.append(batch)
            fresh += len(batch)
            if fresh < len(held):
                continue  # looking at all that is held is worth it for as much news only
            span = _Span(np.concatenate([held, *waiting]), told)
            cut = span.open_exit()
            if len(span.events) - cut > HELD:
                self._waited += span.give_up()
                cut = len(span.events)
            if cut > told:
                yield self._frame(span, cut)
            held, told = span.rest(cut)
            waiting, fresh = [], 0
        span = _Span(np.concatenate([held, *waiting]), told)
        if len(span.events) > told:
            yield self._frame(span, len(span.events))

    def _batches(self) -> Iterator[Table]:
        """All events in order of time, in pieces."""
        streams = [map(self._decode, file.chunks()) for file in self._files]
        ready: dict[int, Table] = {}
        alive = set(range(len(streams)))
        while True:
            for number in sorted(alive - ready.keys()):
                chunk = next((chunk for chunk in streams[number] if len(chunk)), None)
                if chunk is None:
                    alive.discard(number)
                else:
                    ready[number] = chunk
            if not ready:
                return
            # Up to here nothing can come any more from any CPU.
            first = min(ready, key=lambda number: int(ready[number]["time"][-1]))
            horizon = ready[first]["time"][-1]
            parts = []
            for number in sorted(ready):
                chunk = ready[number]
                end = int(np.searchsorted(chunk["time"], horizon, "right"))
                end = len(chunk) if number == first else end
                parts.append(chunk[:end])
                if end == len(chunk):
                    del ready[number]
                else:
                    ready[number] = chunk[end:]
            batch = np.concatenate(parts)
            yield batch[np.argsort(batch["time"], kind="stable")]

    def _decode(self, chunk: Events) -> Table:
        """The events of a chunk that are of use."""
        whole = chunk.length >= self._common["common_pid"].end
        if not whole.all():
            self._short += int((~whole).sum())
            chunk = Events(chunk.time[whole], chunk.at[whole], chunk.length[whole], chunk.bytes)
        kinds = chunk.column(self._common["common_type"])
        threads = chunk.column(self._common["common_pid"])
        table = np.zeros(len(kinds), _EVENT)
        table["time"], table["thread"], table["event"], table["id"] = chunk.time, threads, OTHER, -1
        for event, decoder in self._decoders.items():
            which = np.flatnonzero(kinds == decoder.format.number)
            whole = chunk.length[which] >= decoder.end
            if not whole.all():
                self._short += int((~whole).sum())
                which = which[whole]
            table["event"][which] = event
            for column, field in decoder.columns.items():
                table[column][which] = chunk.column(field, which)
        used = table["event"] != OTHER
        if not used.all():
            known = np.isin(kinds, list(self._formats))
            self._unknown += int((~known).sum())
        return np.compress(used, table)

    def _frame(self, span: _Span, cut: int) -> pl.DataFrame:
        """The rows of the events before ``cut`` that were not told yet."""
        self._learn(span.events)
        rows = span.rows(cut)
        gaps = self._gaps(int(span.events["time"][0]))
        kinds, time = rows.kind, rows.time
        is_exit = kinds == _EXIT
        ended = is_exit & (rows.until > 0) & ~_overlap(time, rows.until, gaps)
        inside = is_exit | (kinds == _DELIVER)
        told_pc = np.where(is_exit, self._tells(EXIT, "pc"), self._tells(ENTRY, "pc"))
        accepted = kinds == _RAISE
        told_value = rows.answered & ((rows.source != PIO) | self._tells(PIO, "value"))
        vectored = np.isin(kinds, [_DELIVER, _EOI]) & (rows.value < 256)
        vectored |= accepted & np.isin(rows.detail >> 8 & 7, [FIXED, LOWEST])
        target = _translate(rows.id, self._numbers, None)
        vcpu = np.where(accepted, target, _translate(rows.thread, self._vcpus, -1))
        counted = np.full(len(time), self.recording.counted)
        columns = [
            pl.Series("time", self.recording.nanoseconds(time)),
            _series("clock", time, counted),
            _series("vcpu", vcpu, vcpu >= 0),
            _KINDS.gather(kinds.astype(np.uint32)).alias("kind"),
            _SPACES.gather(rows.space.astype(np.uint32)).alias("space"),
            _series("address", rows.address, rows.space != _NOWHERE),
            _series("size", rows.size, rows.size > 0),
            _series("write", rows.write, rows.space != _NOWHERE),
            _series("value", rows.value, told_value),
            _series("vector", rows.value & 0xFF, vectored),
            _series("pc", rows.pc, inside & told_pc & rows.placed),
            self._named(rows.reason, is_exit),
            _series("duration", rows.until - time, ended & counted),
            _series("user", rows.user, is_exit & (rows.user | ended) & self._tells(USER, "value")),
        ]
        have = pl.DataFrame(columns)
        # Not strict: in a damaged recording a number may be larger than any that fits.
        return have.select(
            pl.col(name).cast(kind, strict=False)
            if name in have.columns
            else pl.lit(None, kind).alias(name)
            for name, kind in SCHEMA.items()
        )

    def _learn(self, events: Table) -> None:
        """Which thread is which vCPU, as far as nobody said it, and which id KVM calls it by."""
        own = events[(events["event"] <= ENTRY) & (events["id"] >= 0) & (events["id"] <= MOST)]
        pairs = np.unique(own["thread"].astype(np.int64) << 32 | own["id"])
        for pair in pairs.tolist():
            self._numbers[pair & 0xFFFFFFFF] = self._vcpus.setdefault(pair >> 32, pair & 0xFFFFFFFF)

    def _gaps(self, since: int) -> list[tuple[int, int]]:
        """Between which times events are missing; those that ended before ``since`` go."""
        for file in self._files:
            file.gaps = [gap for gap in file.gaps if gap[1] >= since]
        return [gap for file in self._files for gap in file.gaps]

    def _tells(self, event: int, column: str) -> bool:
        """Whether this kernel tells that of the event."""
        return event in self._decoders and column in self._decoders[event].columns

    def _named(self, reasons: Ints, which: Bits) -> pl.Series:
        """The names of exit reasons."""
        codes, places = np.unique(np.where(which, reasons, -1), return_inverse=True)
        names = [None if code < 0 else self._name(int(code)) for code in codes]
        series = pl.Series("reason", names, dtype=pl.Categorical())
        return series.gather(places.astype(np.uint32))

    def _name(self, code: int) -> str:
        isa, reason = code >> 32, code & 0xFFFFFFFF
        number, flags = (reason & 0xFFFF, reason & ~0xFFFF) if isa == VMX else (reason, 0)
        name = self._reasons.get(isa, {}).get(number, f"{number:#x}")
        return f"{name} FAILED_VMENTRY" if flags & FAILED_ENTRY else name


@dataclass(frozen=True)
class _Decoder:
    """How one kind of event is read."""

    format: Format
    columns: dict[str, Field]  # of _EVENT
    end: int  # bytes that it needs


def _decoders(raw: Path, formats: Mapping[str, Format]) -> dict[int, _Decoder]:
    """The decoders of the events in EVENTS that the recording has, by place in EVENTS."""
    found = {}
    for place, (event, columns) in enumerate(_FIELDS.items()):
        if event not in formats:
            if event in ESSENTIAL:
                raise UsageError(f"{raw} has no format of {event}: without it there is no trace")
            continue
        fields = formats[event].fields
        taken = {}
        for column, wanted in columns.items():
            names = wanted.removesuffix("?").split("|")
            name = next((name for name in names if name in fields), None)
            if name:
                taken[column] = fields[name]
            elif not wanted.endswith("?"):
                raise UsageError(
                    f"this kernel's {event} has no field {' or '.join(names)}, which is needed"
                )
        end = max((field.end for field in taken.values()), default=0)
        found[place] = _Decoder(formats[event], taken, end)
    return found


def _reasons(text: str) -> dict[int, dict[int, str]]:
    """The names of exit reasons by KVM_ISA_*, of kvm_exit's format.

    The recorded kernel prints them from the tables in ``uapi/asm/vmx.h`` and
    ``uapi/asm/svm.h`` of its own, which it spells out there: those of later
    kernels need no change here. What is in no table is printed in hexadecimal,
    by the kernel and here.
    """
    tables = [
        {
            sum(int(term, 0) for term in number.split("+")) & 0xFFFFFFFF: name
            for number, name in _SYMBOL.findall(table)
        }
        for table in _SYMBOLS.findall(text)
    ]
    return dict(zip((VMX, SVM), tables, strict=False))


@dataclass(frozen=True)
class _Rows:
    """What happened, in order of time; columns as in the model unless said otherwise."""

    kind: Ints  # place in Kind
    time: npt.NDArray[np.uint64]  # in the recording's clock
    until: npt.NDArray[np.uint64]  # when an exit ended; 0: not known
    thread: Ints
    id: Ints  # KVM's, of the vCPU that a RAISE is for
    detail: Ints
    reason: Ints  # KVM_ISA_* << 32 | exit_reason
    pc: npt.NDArray[np.uint64]
    placed: Bits  # whether pc is known
    user: Bits  # of an exit: whether KVM returned to user space before the next entry
    value: npt.NDArray[np.uint64]  # of the access, or the vector
    # Of the access, if there is one:
    source: Ints  # the event that told of it
    space: Ints  # place in Space, or _NOWHERE
    address: npt.NDArray[np.uint64]
    size: Ints  # 0: not known
    write: Bits
    answered: Bits  # whether there is a value


class _Span:
    """The events of some time, and what belongs to what among them.

    ``events`` are in order of time. The first ``told`` of them were told of
    already; they are there since an exit may reach from them into the others.
    """

    def __init__(self, events: Table, told: int) -> None:
        self.events = events
        self.told = told
        # From here on thread by thread, each in order of time.
        self._order = np.argsort(events["thread"], kind="stable")
        self._own = own = events[self._order]
        self._event = event = own["event"].astype(np.int64)
        places = np.arange(len(own))
        first = np.ones(len(own), np.bool_)
        first[1:] = own["thread"][1:] != own["thread"][:-1]
        starts = np.flatnonzero(first)
        counts = np.diff(starts, append=len(own))
        self._start = np.repeat(starts, counts)  # of the thread
        self._end = np.repeat(starts + counts - 1, counts)  # its last event
        self._border = border = event <= ENTRY
        # The exit or entry at or before, and the one behind: -1 if there is none.
        before = np.maximum.accumulate(np.where(border, places, -1))
        self._before = np.where(before >= self._start, before, -1)
        behind = np.full(len(own), len(own))
        if len(own):
            behind[:-1] = np.minimum.accumulate(np.where(border, places, len(own))[::-1])[::-1][1:]
        known = behind < len(own)
        known[known] = self._start[behind[known]] == self._start[known]
        self._behind = np.where(known, behind, -1)
        self._open = (event == EXIT) & ~known
        self._given_up = np.zeros(len(own), np.bool_)

    def open_exit(self) -> int:
        """Place of the first event from which on an exit has not ended, or behind the last."""
        places = self._order[self._open]
        return int(places.min()) if len(places) else len(self.events)

    def give_up(self) -> int:
        """Keep nothing for the exits that have not ended; how many there are."""
        self._given_up = self._open
        return int(self._open.sum())

    def rest(self, cut: int) -> tuple[Table, int]:
        """What has to be kept when all before ``cut`` is told, and how much of it is told."""
        places = np.arange(len(self._own))
        old = self._order < cut
        last = np.maximum.accumulate(np.where(self._border & old, places, -1))[self._end]
        needed = old & (last >= self._start) & (places >= last) & ~self._given_up[last]
        keep = np.zeros(len(self.events), np.bool_)
        keep[self._order[needed]] = True
        keep[cut:] = True
        return self.events[keep], int(needed.sum())

    def rows(self, cut: int) -> _Rows:
        """What happened before ``cut`` and was not told."""
        own, event = self._own, self._event
        access, answer = self._accesses()
        exits = np.where(self._before >= 0, self._before, 0)
        of = np.where((self._before >= 0) & (event[exits] == EXIT), exits, -1)[access]
        head = of >= 0  # the first access of its exit, which becomes part of it
        head[1:] &= of[1:] != of[:-1]

        kinds = np.full(len(own), -1)
        kinds[event == EXIT] = _EXIT
        kinds[access[~head]] = _ACCESS
        modes = own["detail"] >> 8 & 7
        kinds[(event == ACCEPT) & np.isin(modes, [FIXED, LOWEST, NMI, EXTINT])] = _RAISE
        kinds[(event == INJECT) & (own["write"] == 0) & (own["detail"] == 0)] = _DELIVER
        kinds[event == EOI] = _EOI
        # Where the access of a row is; itself for those without, whose columns are not looked at.
        at = np.arange(len(own))
        at[of[head]] = access[head]
        given = np.arange(len(own))  # where its value is
        given[access] = answer
        touches = np.zeros(len(own), np.bool_)
        touches[access] = True

        chosen = np.empty(len(own), np.int64)  # back to the order of time
        chosen[self._order] = np.arange(len(own))
        chosen = chosen[self.told : cut]
        row = chosen[kinds[chosen] >= 0]
        kind, source = kinds[row], event[at[row]]
        touch = touches[at[row]]
        behind = self._behind[row]
        entered = (behind >= 0) & (event[behind] == ENTRY)
        deliver = kind == _DELIVER
        returned = np.zeros(len(own) + 1, np.bool_)  # the last one is for what follows no border
        returned[self._before[event == USER]] = True
        reason = (own["detail"][row].astype(np.int64) << 32) | (
            own["value"][row] & 0xFFFFFFFF
        ).astype(np.int64)
        space, address, size = self._place(at[row], touch)
        value = np.where(touch, own["value"][given[at[row]]], own["value"][row])
        told_write = own["write"][given[at[row]]]
        return _Rows(
            kind=kind,
            time=own["time"][row],
            until=np.where(entered & (kind == _EXIT), own["time"][behind], 0),
            thread=own["thread"][row].astype(np.int64),
            id=own["id"][row].astype(np.int64),
            detail=own["detail"][row].astype(np.int64),
            reason=reason,
            pc=np.where(deliver, own["pc"][behind], own["pc"][row]),
            placed=~deliver | entered,
            user=returned[row] & (kind == _EXIT),
            value=value,
            source=source,
            space=space,
            address=address,
            size=size,
            write=np.where(source == MMIO, told_write == MMIO_WRITE, told_write != 0)
            | (source == FAST),
            answered=touch
            & (source != FAST)
            & ((source != MMIO) | (told_write != MMIO_UNSATISFIED)),
        )

    def _accesses(self) -> tuple[Ints, Ints]:
        """Each access once: where it was told of, and where its value was."""
        own, event = self._own, self._event
        access: Ints = np.flatnonzero((event >= MMIO) & (event <= FAST))
        kind, address = event[access], own["address"][access]
        # The register of a local APIC as kvm_apic calls it, if it is one.
        msr = np.where(
            (kind == MSR) & (address >> 8 == APIC_MSR >> 8), (address & 0xFF) << 4, NO_REGISTER
        )
        register = np.where(
            kind == APIC,
            address & 0xFF0,
            np.where((kind == MMIO) & (address >> 12 == APIC_BASE >> 12), address & 0xFF0, msr),
        )
        same = self._together(access) & (register[1:] == register[:-1])
        same &= register[1:] != NO_REGISTER
        same &= (kind[1:] == APIC) != (kind[:-1] == APIC)
        twice = np.zeros(len(access), np.bool_)
        twice[1:] |= same
        twice[:-1] |= same
        access = access[~(twice & (kind == APIC))]

        kind, address, type_ = event[access], own["address"][access], own["write"][access]
        answered = self._together(access) & (address[1:] == address[:-1])
        answered &= (kind[1:] == MMIO) & (kind[:-1] == MMIO)
        answered &= (type_[:-1] == MMIO_UNSATISFIED) & (type_[1:] == MMIO_READ)
        answer = access.copy()
        answer[:-1] = np.where(answered, access[1:], access[:-1])
        whole = np.ones(len(access), np.bool_)
        whole[1:] = ~answered
        return access[whole], answer[whole]

    def _together(self, access: Ints) -> Bits:
        """Which of these, but the first, are in the same exit as the one before."""
        start, before = self._start[access], self._before[access]
        found: Bits = (start[1:] == start[:-1]) & (before[1:] == before[:-1])
        return found

    def _place(self, at: Ints, touch: Bits) -> tuple[Ints, npt.NDArray[np.uint64], Ints]:
        """Space, address and size of the accesses at these places."""
        own, event = self._own[at], self._event[at]
        exits = np.where(self._before[at] >= 0, self._before[at], 0)
        isa, reason = self._own["detail"][exits], self._own["value"][exits]
        by_msr = (self._before[at] >= 0) & (
            ((isa == SVM) & (reason == SVM_MSR))
            | ((isa == VMX) & np.isin(reason & 0xFFFF, VMX_MSR))
        )
        apic_msr = (event == APIC) & by_msr
        space = np.select(
            [~touch, event == PIO, (event == MSR) | apic_msr], [_NOWHERE, _PORT, _MSR], _MEMORY
        )
        register = own["address"]
        address = np.select(
            [apic_msr, event == APIC], [APIC_MSR + (register >> 4), APIC_BASE + register], register
        )
        size = np.select(
            [~touch, event == FAST, space == _MSR, event == APIC],
            [0, 0, 8, 4],
            own["size"].astype(np.int64),
        )
        return space, address, size


def _overlap(
    start: npt.NDArray[np.uint64], end: npt.NDArray[np.uint64], gaps: list[tuple[int, int]]
) -> Bits:
    """Which of the times from ``start`` to ``end`` have a part in one of ``gaps``."""
    if not gaps:
        return np.zeros(len(start), np.bool_)
    begins, ends = np.array(sorted(gaps), np.uint64).T
    latest = np.maximum.accumulate(ends)
    count = np.searchsorted(begins, end, "left")  # of the gaps that began before
    found: Bits = (count > 0) & (latest[np.maximum(count - 1, 0)] > start)
    return found


def _translate(values: Ints, names: Mapping[int, int], missing: int | None) -> Ints:
    """``names`` of these values; for those that have none ``missing``, or themselves."""
    found, places = np.unique(values, return_inverse=True)
    other = [value if missing is None else missing for value in found.tolist()]
    named = [names.get(value, rest) for value, rest in zip(found.tolist(), other, strict=True)]
    return np.array(named, np.int64)[places]


def _series(name: str, values: npt.NDArray[Any], known: Bits | npt.NDArray[Any]) -> pl.Series:
    """A column that is null where it is not ``known``."""
    frame = pl.DataFrame({name: values, "known": known})
    return frame.select(pl.when("known").then(name)).to_series()
