# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose register an access was, why it was touched, and which interrupt it belongs to.

Works on a stream of frames in order of time, a few hundred thousand rows at
once and with numpy, because a trace has more events than Python can look at one
by one. What one row has to say of another is near it: rows are looked at together
with what was up to twice :data:`NEAR` before and after them, and nothing farther
away counts, so that the result does not depend on how frames are cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl

from .model import SCHEMA, Cause, Kind, Space
from .registers import MAPS, MSIX_TABLE, Map, default
from .store import Manifest, Region
from .symbols import FUNCTIONS

__all__ = ["attribute"]

# ns from a raise to its delivery at most, and from there to the interrupt's end: a busy host may
# take a vCPU's thread away meanwhile.
NEAR = 250_000_000
DRIVER_OK = 4  # virtio 1.3, 2.1
VIRTIO_COMMON = ("virtio-mmio", "virtio-pci-common")  # maps with a device status
NO_VCPU = np.uint16(0xFFFF)
NONE = -1  # no region, register, cause...
FAR = 1 << 62  # ns: a time that never comes

# docs/virtio-interrupts.md, MsiVector
MSI_SET_MSG, MSI_MASK, MSI_UNMASK = 1 << 16, 1 << 17, 1 << 18
MSIX_MASKED = 1
# 82093AA, 3.2.4: redirection entries begin at index 0x10, two words each
REDIRECTION, REDIRECTION_MASKED = 0x10, 1 << 16

# SDM volume 3, 11.12.1.2: x2APIC register n is MSR 0x800 + n, at 16 n in xAPIC's page
X2APIC = range(0x800, 0x840)
MSR_TIMER = (0x10, 0x3B, 0x6E0)  # IA32_TIME_STAMP_COUNTER, IA32_TSC_ADJUST, IA32_TSC_DEADLINE
MSR_APIC_BASE = 0x1B
MSR_KVM = range(0x4B564D00, 0x4B564E00)  # Documentation/virt/kvm/x86/msr.rst

CAUSES = list(Cause)
KINDS = list(Kind)
SPACES = list(Space)
CODE = {cause: number for number, cause in enumerate(CAUSES)}

T = TypeVar("T", bound=np.generic)
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def attribute(frames: Iterable[pl.DataFrame], manifest: Manifest) -> Iterator[pl.DataFrame]:
    """``frames`` (:data:`~qvis.trace.model.SCHEMA`, by time) with the columns from ``device`` on.

    The frames that come out hold the same rows in the same order, cut elsewhere.
    """
    state = _State.of(manifest)
    held, given = SCHEMA.to_frame(), 0  # the latest rows; how many of them were given out
    waiting, rows = [], 0
    for frame in frames:
        waiting.append(frame)
        rows += len(frame)
        # As many as are held, or small frames would have the same rows looked at again and again.
        if rows < len(held):
            continue
        held, waiting, rows = pl.concat([held, *waiting]), [], 0
        time = held["time"].to_numpy()
        if not len(time):
            continue
        until = int(np.searchsorted(time, time[-1] - 2 * NEAR, side="left"))
        if until > given:
            yield state.attribute(held, given, until)
            first = int(np.searchsorted(time, time[until] - 2 * NEAR, side="left"))
            held, given = held[first:], until - first
    held = pl.concat([held, *waiting])
    if len(held) > given:
        yield state.attribute(held, given, len(held))


def _sources(manifest: Manifest) -> dict[int, tuple[str, str]]:
    return {irq.irq: (irq.device, irq.source) for irq in manifest.irqs}


def _places(manifest: Manifest) -> tuple[Ints, Ints]:
    """The vectors that were an interrupt's all the time, in order, and whose each was."""
    places = {
        irq.cpu << 8 | irq.vector: irq.irq
        for irq in manifest.irqs
        if irq.cpu is not None and irq.vector is not None
    }
    keys, irqs = np.array(sorted(places.items()), dtype=np.int64).reshape(-1, 2).T
    return keys, irqs


class _Decoder:
    """Addresses to registers: all maps of a machine laid out one after the other, byte by byte."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.devices: list[str] = []
        self.registers: list[str] = []
        self._known: dict[str, int] = {}
        self._names: dict[str, int] = {}
        self._bases: dict[str, int] = {}
        self._parts: list[npt.NDArray[np.int64]] = []
        self._next = 0
        self._spaces: dict[Space, tuple[Ints, Ints, Ints, Ints, Ints, Ints]] = {}
        for space in (Space.MEMORY, Space.PORT):
            rows = [
                (r.start, r.end, self._device(r.device), self._base(r.map), *self._shape(r.map))
                for r in sorted(regions, key=lambda region: region.start)
                if r.space is space
            ]
            columns = np.array(rows, dtype=np.int64).reshape(-1, 6).T
            self._spaces[space] = tuple(columns)  # type: ignore[assignment]
        self.virtio = {
            self._device(region.device) for region in regions if region.map in VIRTIO_COMMON
        }
        self.lapic = self._device("LAPIC")
        self._lapic_base = self._base("apic-msi")
        self.msr = self._register("MSR")
        table = np.concatenate(self._parts, axis=1)
        self._table_register, self._table_read, self._table_write = table

    def having(self, register: Ints, *names: str) -> Bools:
        """Which of the numbers are those of registers with these names."""
        # A name that no device has must not match where nothing is mapped.
        return np.isin(register, [self._names[name] for name in names if name in self._names])

    def _device(self, name: str) -> int:
        if name not in self._known:
            self._known[name] = len(self.devices)
            self.devices.append(name)
        return self._known[name]

    def _register(self, name: str) -> int:
        if name not in self._names:
            self._names[name] = len(self.registers)
            self.registers.append(name)
        return self._names[name]

    def _shape(self, name: str) -> tuple[int, int]:
        """Entry size (a huge one if it is no table) and offset behind the last register."""
        found = MAPS.get(name) or default(name)
        return found.stride or 1 << 62, found.size

    def _base(self, name: str) -> int:
        """Where the map's bytes begin in the table; the last of them is for all offsets behind."""
        if name in self._bases:
            return self._bases[name]
        found: Map = MAPS.get(name) or default(name)
        part = np.empty((3, found.size + 1), dtype=np.int64)
        part[0] = self._register(name)
        part[1:] = CODE[found.rest]
        for register in found.registers:
            place = slice(register.offset, register.offset + register.size)
            part[0, place] = self._register(register.name)
            part[1, place] = CODE[register.read]
            part[2, place] = CODE[register.write]
        self._bases[name] = self._next
        self._next += part.shape[1]
        self._parts.append(part)
        return self._bases[name]

    def decode(self, space: Space, address: Ints, write: Bools) -> tuple[Ints, Ints, Ints]:
        """Device, register and cause by number; NONE where nothing is mapped."""
        if space is Space.MSR:
            return self._decode_msr(address, write)
        start, end, device, base, stride, size = self._spaces[space]
        if not len(start):
            none = np.full(len(address), NONE)
            return none, none, np.full(len(address), CODE[Cause.OTHER])
        region = np.searchsorted(start, address, side="right") - 1
        mapped = (region >= 0) & (address < end[region])
        offset = np.minimum((address - start[region]) % stride[region], size[region])
        at = np.where(mapped, base[region] + offset, 0)
        cause = np.where(write, self._table_write[at], self._table_read[at])
        return (
            np.where(mapped, device[region], NONE),
            np.where(mapped, self._table_register[at], NONE),
            np.where(mapped, cause, CODE[Cause.OTHER]),
        )

    def _decode_msr(self, number: Ints, write: Bools) -> tuple[Ints, Ints, Ints]:
        apic = (number >= X2APIC.start) & (number < X2APIC.stop)
        size = MAPS["apic-msi"].size
        at = np.where(apic, self._lapic_base + np.minimum((number - X2APIC.start) * 16, size), 0)
        cause = np.full(len(number), CODE[Cause.OTHER])
        cause[np.isin(number, MSR_TIMER)] = CODE[Cause.TIMER]
        paravirtual = (number >= MSR_KVM.start) & (number < MSR_KVM.stop)
        cause[paravirtual | (number == MSR_APIC_BASE)] = CODE[Cause.SETUP]
        in_apic = np.where(write, self._table_write[at], self._table_read[at])
        return (
            np.where(apic, self.lapic, NONE),
            np.where(apic, self._table_register[at], self.msr),
            np.where(apic, in_apic, cause),
        )


@dataclass
class _State:
    """What is carried from one frame to the next."""

    decoder: _Decoder
    sources: dict[int, tuple[str, str]]
    places: tuple[Ints, Ints]
    live: dict[int, bool]  # by device: its driver is at work
    selected: dict[int, int] = field(default_factory=dict)  # by IOAPIC: IOREGSEL
    pin: dict[int, int] = field(default_factory=dict)  # by IOAPIC: whose high word came last
    answers: dict[int, int] = field(default_factory=dict)  # by IOAPIC: cause of the last write
    table_cause: dict[int, int] = field(default_factory=dict)  # by device: of the last write
    interrupts: int = 0

    @classmethod
    def of(cls, manifest: Manifest) -> _State:
        decoder = _Decoder(manifest.regions)
        from_boot = manifest.command is None
        # From boot on no device has a driver yet; else those that we see started had one.
        live = dict.fromkeys(decoder.virtio, not from_boot)
        return cls(decoder, _sources(manifest), _places(manifest), live)

    def attribute(self, held: pl.DataFrame, given: int, until: int) -> pl.DataFrame:
        """The rows from ``given`` to ``until``; those around them are there to be looked at."""
        around = _Rows(held)
        decoded = self._decode(around)
        number, irq = self._interrupts(around, decoded[2], given, until)
        # What is here for later rows only is done over again with them.
        device, register, cause = (column[given:] for column in decoded)
        self._ioapics(around[given:], until - given, device, register, cause)
        rows, count = around[given:until], until - given
        device, register, cause = device[:count], register[:count], cause[:count]
        self._vector_commands(rows, device, register, cause)
        self._table_reads(rows, device, register, cause)
        self._set_up(rows, device, register, cause)
        causes = pl.Series(CAUSES, dtype=SCHEMA["cause"]).gather(_or_null(cause))
        columns = [  # a reader may know already
            pl.coalesce(_names(self.decoder.devices, device, "device"), pl.col("device")),
            _names(self.decoder.registers, register, "register"),
            pl.coalesce(causes.alias("cause"), pl.col("cause")),
        ]
        frame = held[given:until].with_columns(columns)
        return self._with_interrupts(frame, rows, number[given:until], irq[given:until])

    def _decode(self, rows: _Rows) -> tuple[Ints, Ints, Ints]:
        device, register, cause = (np.full(rows.count, NONE) for _ in range(3))
        for code, space in enumerate(SPACES):
            where = np.flatnonzero(rows.space == code)
            if len(where):
                found = self.decoder.decode(space, rows.address[where], rows.write[where])
                device[where], register[where], cause[where] = found
        return device, register, cause

    def _vector_commands(self, rows: _Rows, device: Ints, register: Ints, cause: Ints) -> None:
        """Masks and messages of virtio-mmio's MSI go through one register: look at the command."""
        where = np.flatnonzero(self.decoder.having(register, "MsiVector"))
        value, write = rows.value[where], rows.write[where]
        command = np.full(len(where), CODE[Cause.STATUS])  # to select a vector, and its state
        for bit, what in ((MSI_SET_MSG, Cause.ROUTE), (MSI_UNMASK, Cause.UNMASK),
                          (MSI_MASK, Cause.MASK)):  # fmt: skip
            command[write & (value & bit != 0)] = CODE[what]
        cause[where] = command

        where = np.flatnonzero(self.decoder.having(register, "VectorControl") & rows.write)
        masks = rows.value[where] & MSIX_MASKED != 0
        cause[where] = np.where(masks, CODE[Cause.MASK], CODE[Cause.UNMASK])

    def _table_reads(self, rows: _Rows, device: Ints, register: Ints, cause: Ints) -> None:
        """Linux reads an MSI-X table only to flush the writes before it, and for their sake."""
        members = [register.name for register in MSIX_TABLE.registers]
        for number, where in _by_device(device, self.decoder.having(register, *members)):
            first = self.table_cause.get(number, CODE[Cause.SETUP])
            filled = _last_before(rows.write[where], cause[where], first)
            cause[where] = filled
            self.table_cause[number] = int(filled[-1])

    def _ioapics(self, rows: _Rows, count: int, device: Ints, register: Ints, cause: Ints) -> None:
        """What IOWIN is depends on IOREGSEL, and why IOREGSEL is written on what follows.

        Only the first ``count`` rows change what is known of the later ones.
        """
        select, window = (self.decoder.having(register, name) for name in ("IOREGSEL", "IOWIN"))
        for number, where in _by_device(device, select | window):
            selects = select[where] & rows.write[where]
            index = _last_before(selects, rows.value[where], self.selected.get(number, 0))
            word = index - REDIRECTION
            writes = window[where] & rows.write[where] & (word >= 0)
            high, low = writes & (word & 1 == 1), writes & (word & 1 == 0)
            # A low word right after its high one is a new target, and else a mask bit.
            last = _last_before(high | low, np.where(high, word >> 1, NONE),
                                self.pin.get(number, NONE))  # fmt: skip
            before = np.concatenate([[self.pin.get(number, NONE)], last[:-1]])
            of = np.full(len(where), CODE[Cause.SETUP])
            of[high] = CODE[Cause.ROUTE]
            masked = rows.value[where] & REDIRECTION_MASKED != 0
            of[low] = np.where(masked, CODE[Cause.MASK], CODE[Cause.UNMASK])[low]
            of[low & (before == word >> 1)] = CODE[Cause.ROUTE]
            # A read back flushes the write before it; a selection is for what comes next.
            done = window[where]
            answers = _last_before(writes, of, self.answers.get(number, CODE[Cause.SETUP]))
            of = np.where(done & ~rows.write[where] & (word >= 0), answers, of)
            time = rows.time[where]
            near = _first_after(done, time, FAR) - time <= NEAR
            next_one = np.where(near, _first_after(done, of, NONE), CODE[Cause.SETUP])
            cause[where] = np.where(selects, next_one, of)
            if known := int(np.searchsorted(where, count)):
                self.selected[number] = int(index[known - 1])
                self.pin[number] = int(last[known - 1])
                self.answers[number] = int(answers[known - 1])

    def _set_up(self, rows: _Rows, device: Ints, register: Ints, cause: Ints) -> None:
        """Until its driver says that it is ready, all that is done to a device is set-up."""
        says = self.decoder.having(register, "Status", "device_status") & rows.write
        for number in list(self.live):
            where = np.flatnonzero(device == number)
            if len(where):
                ready = (rows.value[where] & DRIVER_OK) != 0
                live = _last_before(says[where], ready, self.live[number])
                cause[where[~live]] = CODE[Cause.SETUP]
                self.live[number] = bool(live[-1])

    def _interrupts(self, rows: _Rows, cause: Ints, given: int, until: int) -> tuple[Ints, Ints]:
        """The numbers of the interrupts that rows belong to, and Linux's numbers of these."""
        number, irq = np.full(rows.count, NONE), np.full(rows.count, NONE)
        groups = _Groups(rows, cause)
        delivered = np.flatnonzero(groups.starts)
        earlier, new = (int(np.count_nonzero(groups.starts[:at])) for at in (given, until))
        ids = np.full(rows.count, NONE)
        ids[delivered] = self.interrupts - earlier + 1 + np.arange(len(delivered))
        self.interrupts += new - earlier
        number[groups.members] = ids[groups.start[groups.members]]
        # The handler knows which interrupt it is for.
        handler = np.flatnonzero(rows.role("handler") & (groups.start != NONE))
        irqs = np.full(rows.count, NONE)
        irqs[groups.start[handler[::-1]]] = rows.value[handler[::-1]]  # the first one stays
        # A reader that sees no handlers, as KVM's, has the vector.
        unknown = delivered[irqs[delivered] == NONE]
        irqs[unknown] = self._irq_at(rows.key[unknown])
        irq[groups.members] = irqs[groups.start[groups.members]]
        for raised, start in _raises(rows, delivered):
            number[raised], irq[raised] = ids[start], irqs[start]
        for ended, start in _ends(rows, cause, groups):
            number[ended], irq[ended] = ids[start], irqs[start]
        return number, irq

    def _irq_at(self, key: Ints) -> Ints:
        """Linux's numbers of the interrupts with these vectors, or NONE."""
        keys, irqs = self.places
        if not len(keys):
            return np.full(len(key), NONE)
        at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        return np.where(keys[at] == key, irqs[at], NONE)

    def _with_interrupts(
        self, frame: pl.DataFrame, rows: _Rows, number: Ints, irq: Ints
    ) -> pl.DataFrame:
        """``frame`` with these, and with the devices and sources that they are of."""
        known = sorted(self.sources)
        place = np.searchsorted(known, irq) if known else np.zeros(rows.count, dtype=np.int64)
        place = np.where(
            (irq != NONE) & np.isin(irq, known), np.minimum(place, len(known) - 1), NONE
        )
        of = [self.sources[irq] for irq in known]
        its_device = _names([device for device, _ in of], place, "device")
        # An access keeps the device whose register it is.
        own = pl.Series(rows.is_kind(Kind.DELIVER, Kind.RAISE, Kind.FUNCTION))
        return frame.with_columns(
            pl.when(own & its_device.is_not_null())
            .then(its_device)
            .otherwise(pl.col("device"))
            .alias("device"),
            _names([source for _, source in of], place, "source"),
            pl.Series("irq", irq).replace(NONE, None).cast(SCHEMA["irq"]),
            pl.Series("interrupt", number).replace(NONE, None).cast(SCHEMA["interrupt"]),
        )


class _Rows:
    """The columns of a frame that attribution looks at, as arrays without nulls."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self.count = len(frame)
        self.time = frame["time"].to_numpy()
        self.kind = frame["kind"].to_physical().cast(pl.Int64).fill_null(NONE).to_numpy()
        self.space = frame["space"].to_physical().cast(pl.Int64).fill_null(NONE).to_numpy()
        self.vcpu = frame["vcpu"].fill_null(NO_VCPU).to_numpy()
        self.write = frame["write"].fill_null(False).to_numpy()
        # Above 2^63 only in values; comparisons of bits do not mind the sign.
        self.address = _signed(frame["address"])
        self.value = _signed(frame["value"])
        self.vector = frame["vector"].cast(pl.Int64).fill_null(NONE).to_numpy()
        self.key = self.vcpu.astype(np.int64) << 8 | self.vector  # a vector of a vCPU
        self.function = frame["function"]

    def __getitem__(self, part: slice) -> _Rows:
        found = copy.copy(self)
        for name, column in vars(self).items():
            if name != "count":
                setattr(found, name, column[part])
        found.count = len(found.time)
        return found

    def is_kind(self, *kinds: Kind) -> Bools:
        """Which rows are of one of these kinds."""
        return np.isin(self.kind, [KINDS.index(kind) for kind in kinds])

    def role(self, *roles: str) -> Bools:
        """Which rows enter a function that does one of these."""
        names = [name for name, role in FUNCTIONS.items() if role in roles]
        wanted: Bools = self.function.cast(pl.String).is_in(names).fill_null(False).to_numpy()
        return self.is_kind(Kind.FUNCTION) & wanted


class _Groups:
    """Which rows belong to which delivered interrupt: same vCPU, soon, before the next one."""

    def __init__(self, rows: _Rows, cause: Ints) -> None:
        order = np.argsort(rows.vcpu, kind="stable")
        vcpu = rows.vcpu[order]
        taken = rows.is_kind(Kind.DELIVER)[order] & (vcpu != NO_VCPU)
        place = np.arange(rows.count)
        last = np.maximum.accumulate(np.where(taken, place, NONE)) if rows.count else place
        segment = np.searchsorted(vcpu, vcpu, side="left")
        last[last < segment] = NONE
        start = np.full(rows.count, NONE)
        start[order] = np.where(last == NONE, NONE, order[last])
        device_vector = (start != NONE) & (rows.vector[start] != NONE)
        device_vector &= rows.time - rows.time[start] <= NEAR
        self.start = np.where(device_vector, start, NONE)
        self.starts = rows.is_kind(Kind.DELIVER) & (rows.vector != NONE)
        consists = np.isin(cause, [CODE[c] for c in (Cause.STATUS, Cause.ACKNOWLEDGE, Cause.EOI)])
        consists &= rows.is_kind(Kind.ACCESS, Kind.EXIT)
        consists |= rows.role("ack", "handler", "eoi") | self.starts
        consists |= rows.is_kind(Kind.EOI) & (rows.vcpu != NO_VCPU)
        self.members = np.flatnonzero(consists & (self.start != NONE))


def _raises(rows: _Rows, delivered: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Raises, each with the delivery that came of it."""
    raised = np.flatnonzero(rows.is_kind(Kind.RAISE) & (rows.vector != NONE))
    if not len(raised) or not len(delivered):
        return
    after = _join(raised, rows.key[raised], delivered, rows.key[delivered], "forward")
    found = (after != NONE) & (rows.time[after] - rows.time[raised] <= NEAR)
    # One raise, one delivery. Those that follow the first find it pending still and change nothing.
    claimed, first = np.unique(after[found], return_index=True)
    yield raised[found][first], claimed


def _ends(rows: _Rows, cause: Ints, groups: _Groups) -> Iterator[tuple[Ints, Ints]]:
    """Ends that an IOAPIC saw, each with the delivery that ended.

    They say the vector only, which other vCPUs may use for other interrupts. But it is the local
    APIC that tells the IOAPIC, when it is written to.
    """
    ends = np.flatnonzero(rows.is_kind(Kind.EOI) & (rows.vcpu == NO_VCPU) & (rows.vector != NONE))
    written = np.flatnonzero(
        rows.is_kind(Kind.ACCESS, Kind.EXIT) & rows.write & (cause == CODE[Cause.EOI])
        & (groups.start != NONE)
    )  # fmt: skip
    delivered = np.flatnonzero(groups.starts)
    for sources, starts in ((written, groups.start[written]), (delivered, delivered)):
        if not len(ends) or not len(sources):
            continue
        at = _join(ends, rows.vector[ends], sources, rows.vector[starts], "backward")
        found = (at != NONE) & (rows.time[ends] - rows.time[at] <= NEAR)
        which = np.searchsorted(sources, at[found])
        yield ends[found], starts[which]
        ends = ends[~found]


def _join(
    rows: Ints, key: Ints, others: Ints, their_key: Ints, strategy: Literal["backward", "forward"]
) -> Ints:
    """For each of ``rows`` the nearest of ``others`` with its key, before or after it, or NONE."""
    left = pl.DataFrame({"row": rows, "key": key})
    right = pl.DataFrame({"row": others, "key": their_key, "found": others})
    joined = left.join_asof(right, on="row", by="key", strategy=strategy, check_sortedness=False)
    return joined["found"].fill_null(NONE).to_numpy()


def _by_device(device: Ints, chosen: Bools) -> Iterator[tuple[int, Ints]]:
    """The chosen rows of each device that has some."""
    where = np.flatnonzero(chosen)
    for number in np.unique(device[where]):
        yield int(number), where[device[where] == number]


def _last_before(when: Bools, value: npt.NDArray[T], first: int | bool) -> npt.NDArray[T]:
    """For each row ``value`` of the last row, it included, of which ``when`` holds."""
    last = np.maximum.accumulate(np.where(when, np.arange(len(when)), NONE))
    return np.where(last == NONE, np.asarray(first, dtype=value.dtype), value[last])


def _first_after(when: Bools, value: Ints, otherwise: int) -> Ints:
    """For each row ``value`` of the first row, it included, of which ``when`` holds."""
    return _last_before(when[::-1], value[::-1], otherwise)[::-1]


def _signed(column: pl.Series) -> Ints:
    return column.fill_null(0).to_numpy().view(np.int64)


def _or_null(code: Ints) -> pl.Series:
    """Numbers to gather by, of which NONE gathers null."""
    return pl.Series(code).replace(NONE, None)


def _names(names: list[str], code: Ints, alias: str) -> pl.Series:
    """The names that numbers stand for; null for NONE."""
    known = pl.Series(alias, names, dtype=pl.Categorical())
    return known.gather(_or_null(code)).alias(alias)
