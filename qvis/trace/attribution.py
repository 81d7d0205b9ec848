# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose register an access was, why it was touched, and which interrupt it belongs to.

Works on a stream of frames in order of time, a few hundred thousand rows at
once and with numpy, because a trace has more events than Python can look at one
by one. What a later row has to say of an earlier one is near it: the last
:data:`LOOKAHEAD` of a frame waits for the next, and no frame ends in the middle
of an interrupt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl

from .model import SCHEMA, Cause, Kind, Space
from .registers import MAPS, MSIX_TABLE, Map, default
from .store import Manifest, Region
from .symbols import FUNCTIONS

__all__ = ["attribute"]

LOOKAHEAD = 20_000_000  # ns from a raise to the interrupt's end, on a host that is busy
DRIVER_OK = 4  # virtio 1.3, 2.1
NO_VCPU = np.uint16(0xFFFF)
NONE = -1  # no region, register, cause...

# docs/virtio-mmio-msi.md, MsiVector
MSI_SET_MSG, MSI_MASK, MSI_UNMASK = 1 << 16, 1 << 17, 1 << 18
MSIX_MASKED = 1
# 82093AA, 3.2.4: redirection entries begin at index 0x10, two words each
REDIRECTION, REDIRECTION_MASKED = 0x10, 1 << 16

# SDM volume 3, 11.12.1.2: x2APIC register n is MSR 0x800 + n, at 16 n in xAPIC's page
X2APIC = range(0x800, 0x840)
APIC_PAGE = 0xFEE00000
MSR_TIMER = 0x6E0  # IA32_TSC_DEADLINE
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
    state = _State(_Decoder(manifest.regions), _sources(manifest), manifest.command is None)
    waiting: pl.DataFrame | None = None
    for frame in frames:
        together = frame if waiting is None else pl.concat([waiting, frame])
        cut = _cut(together, state)
        if cut:
            yield state.attribute(together[:cut])
        waiting = together[cut:]
    if waiting is not None and len(waiting):
        yield state.attribute(waiting)


def _sources(manifest: Manifest) -> dict[int, tuple[str, str]]:
    return {irq.irq: (irq.device, irq.source) for irq in manifest.irqs}


class _Decoder:
    """Addresses to registers: all maps of a machine laid out one after the other, byte by byte."""

    def __init__(self, regions: Iterable[Region]) -> None:
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
        self.lapic = self._device("LAPIC")
        self._lapic_base = self._base("apic-msi")
        self.msr = self._register("MSR")
        table = np.concatenate(self._parts, axis=1)
        self._table_register, self._table_read, self._table_write = table

    def register(self, name: str) -> int:
        """The number of the register of that name; NONE if no device has it."""
        return self._names.get(name, NONE)

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
        cause[number == MSR_TIMER] = CODE[Cause.TIMER]
        cause[(number >= MSR_KVM.start) & (number < MSR_KVM.stop)] = CODE[Cause.SETUP]
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
    from_boot: bool  # no device has a driver yet
    live: dict[int, bool] = field(default_factory=dict)  # by device: its driver is at work
    selected: dict[int, int] = field(default_factory=dict)  # by IOAPIC: IOREGSEL
    pin: dict[int, int] = field(default_factory=dict)  # by IOAPIC: whose high word came last
    answers: dict[int, int] = field(default_factory=dict)  # by IOAPIC: cause of the last write
    table_cause: dict[int, int] = field(default_factory=dict)  # by device: of the last write
    interrupts: int = 0

    def attribute(self, frame: pl.DataFrame) -> pl.DataFrame:
        rows = _Rows(frame)
        device, register, cause = self._decode(rows)
        self._vector_commands(rows, device, register, cause)
        self._table_reads(rows, device, register, cause)
        self._ioapics(rows, device, register, cause)
        self._set_up(rows, device, register, cause)
        causes = pl.Series(CAUSES, dtype=SCHEMA["cause"]).gather(_or_null(cause))
        columns = [  # a reader may know already
            pl.coalesce(_names(self.decoder.devices, device, "device"), pl.col("device")),
            _names(self.decoder.registers, register, "register"),
            pl.coalesce(causes.alias("cause"), pl.col("cause")),
        ]
        return self._interrupts(frame.with_columns(columns), rows, cause)

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
        where = np.flatnonzero(register == self.decoder.register("MsiVector"))
        value, write = rows.value[where], rows.write[where]
        command = np.full(len(where), CODE[Cause.STATUS])  # to select a vector, and its state
        for bit, what in ((MSI_SET_MSG, Cause.ROUTE), (MSI_UNMASK, Cause.UNMASK),
                          (MSI_MASK, Cause.MASK)):  # fmt: skip
            command[write & (value & bit != 0)] = CODE[what]
        cause[where] = command

        where = np.flatnonzero((register == self.decoder.register("VectorControl")) & rows.write)
        masks = rows.value[where] & MSIX_MASKED != 0
        cause[where] = np.where(masks, CODE[Cause.MASK], CODE[Cause.UNMASK])

    def _table_reads(self, rows: _Rows, device: Ints, register: Ints, cause: Ints) -> None:
        """Linux reads an MSI-X table only to flush the writes before it, and for their sake."""
        members = [self.decoder.register(register.name) for register in MSIX_TABLE.registers]
        for number, where in _by_device(device, np.isin(register, members) & (register != NONE)):
            first = self.table_cause.get(number, CODE[Cause.SETUP])
            filled = _last_before(rows.write[where], cause[where], first)
            cause[where] = filled
            self.table_cause[number] = int(filled[-1])

    def _ioapics(self, rows: _Rows, device: Ints, register: Ints, cause: Ints) -> None:
        """What IOWIN is depends on IOREGSEL, and why IOREGSEL is written on what follows."""
        select, window = (self.decoder.register(name) for name in ("IOREGSEL", "IOWIN"))
        for number, where in _by_device(
            device, (register != NONE) & ((register == select) | (register == window))
        ):
            selects = (register[where] == select) & rows.write[where]
            index = _last_before(selects, rows.value[where], self.selected.get(number, 0))
            word = index - REDIRECTION
            writes = (register[where] == window) & rows.write[where] & (word >= 0)
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
            done = register[where] == window
            answers = _last_before(writes, of, self.answers.get(number, CODE[Cause.SETUP]))
            of = np.where(done & ~rows.write[where] & (word >= 0), answers, of)
            of[selects] = _first_after(done, of, CODE[Cause.SETUP])[selects]
            cause[where] = of
            self.selected[number], self.pin[number] = int(index[-1]), int(last[-1])
            self.answers[number] = int(answers[-1])

    def _set_up(self, rows: _Rows, device: Ints, register: Ints, cause: Ints) -> None:
        """Until its driver says that it is ready, all that is done to a device is set-up."""
        status = [self.decoder.register(name) for name in ("Status", "device_status")]
        says = np.isin(register, status) & (register != NONE) & rows.write
        for number in np.unique(device[says]):
            self.live.setdefault(int(number), not self.from_boot)
        if self.from_boot:  # also what never gets a driver in this frame
            virtio = np.isin(register, status) & (register != NONE)
            for number in np.unique(device[virtio]):
                self.live.setdefault(int(number), False)
        for number in list(self.live):
            where = np.flatnonzero(device == number)
            if len(where):
                ready = (rows.value[where] & DRIVER_OK) != 0
                live = _last_before(says[where], ready, self.live[number])
                cause[where[~live]] = CODE[Cause.SETUP]
                self.live[number] = bool(live[-1])

    def _interrupts(self, frame: pl.DataFrame, rows: _Rows, cause: Ints) -> pl.DataFrame:
        """Number the interrupts, and give each's number to all that it consists of."""
        number, irq = np.full(rows.count, NONE), np.full(rows.count, NONE)
        groups = _Groups(rows, cause)
        delivered = np.flatnonzero(groups.starts)
        ids = np.full(rows.count, NONE)
        ids[delivered] = self.interrupts + 1 + np.arange(len(delivered))
        self.interrupts += len(delivered)
        number[groups.members] = ids[groups.start[groups.members]]
        # The handler knows which interrupt it is for.
        handler = np.flatnonzero(rows.role("handler") & (groups.start != NONE))
        irqs = np.full(rows.count, NONE)
        irqs[groups.start[handler[::-1]]] = rows.value[handler[::-1]]  # the first one stays
        irq[groups.members] = irqs[groups.start[groups.members]]
        for raised, start in _raises(rows, delivered):
            number[raised], irq[raised] = ids[start], irqs[start]
        for ended, start in _ends(rows, delivered):
            number[ended], irq[ended] = ids[start], irqs[start]

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
        self._function = frame["function"]

    def is_kind(self, *kinds: Kind) -> Bools:
        """Which rows are of one of these kinds."""
        return np.isin(self.kind, [KINDS.index(kind) for kind in kinds])

    def role(self, *roles: str) -> Bools:
        """Which rows enter a function that does one of these."""
        names = [name for name, role in FUNCTIONS.items() if role in roles]
        wanted: Bools = self._function.cast(pl.String).is_in(names).fill_null(False).to_numpy()
        return self.is_kind(Kind.FUNCTION) & wanted


class _Groups:
    """Which rows belong to which delivered interrupt: same vCPU, before the next one."""

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
    key = rows.vcpu.astype(np.int64) << 8 | rows.vector
    before = _join(rows, key, earlier=raised, later=delivered)
    found = before != NONE
    # One raise, one delivery: of several that point to it the first is right.
    claimed, first = np.unique(before[found], return_index=True)
    yield claimed, delivered[found][first]


def _ends(rows: _Rows, delivered: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Ends that an IOAPIC saw, each with the delivery of that vector before it."""
    ends = np.flatnonzero(rows.is_kind(Kind.EOI) & (rows.vcpu == NO_VCPU) & (rows.vector != NONE))
    if len(ends) and len(delivered):
        before = _join(rows, rows.vector, earlier=delivered, later=ends)
        found = before != NONE
        yield ends[found], before[found]


def _join(rows: _Rows, key: Ints, *, earlier: Ints, later: Ints) -> Ints:
    """For each of ``later`` the last of ``earlier`` with its key before it, or NONE."""
    left = pl.DataFrame({"row": later, "key": key[later]})
    right = pl.DataFrame({"row": earlier, "key": key[earlier], "found": earlier})
    joined = left.join_asof(right, on="row", by="key", check_sortedness=False)
    return joined["found"].fill_null(NONE).to_numpy()


def _cut(frame: pl.DataFrame, state: _State) -> int:
    """How many rows can be attributed without those that come next."""
    rows = _Rows(frame)
    if not rows.count:
        return 0
    cut = int(np.searchsorted(rows.time, rows.time[-1] - LOOKAHEAD, side="left"))
    if not cut:
        return 0
    _, register, cause = state._decode(rows)
    groups = _Groups(rows, cause)
    last = np.full(rows.count, NONE)
    np.maximum.at(last, groups.start[groups.members], groups.members)
    first = np.arange(rows.count)
    for raised, start in _raises(rows, np.flatnonzero(groups.starts)):
        np.minimum.at(first, start, raised)
    begins = np.flatnonzero(groups.starts)
    select = state.decoder.register("IOREGSEL")
    while cut:
        across = begins[(first[begins] < cut) & (last[begins] >= cut)]
        if len(across):
            cut = int(first[across].min())
        elif register[cut - 1] == select != NONE:
            cut -= 1
        else:
            break
    return cut


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
