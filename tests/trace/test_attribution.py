# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose register, why, and which interrupt: rows made by hand, and what must come of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl
import pytest

from qvis.trace.attribution import NEAR, attribute
from qvis.trace.guest import meanwhile
from qvis.trace.model import SCHEMA, Kind, Space
from qvis.trace.store import Irq, Manifest, Region

from .synthetic import provenance

BLK, NIC = 0xFEB00000, 0xFEB00200  # virtio-mmio
COMMON, TABLE, ISR, ECAM = 0xFE000000, 0xFE001000, 0xFE002000, 0xB0008000  # virtio over PCI
IOAPIC, IOAPIC2, LAPIC = 0xFEC00000, 0xFEC10000, 0xFEE00000
DRIVER_OK = 0xF
REGIONS = (
    Region("blk0", "virtio-mmio", Space.MEMORY, BLK, BLK + 0x200),
    Region("nic0", "virtio-mmio", Space.MEMORY, NIC, NIC + 0x200),
    Region("vpci0", "virtio-pci-common", Space.MEMORY, COMMON, COMMON + 0x1000),
    Region("vpci0", "msix-table", Space.MEMORY, TABLE, TABLE + 0x100),
    Region("vpci0", "virtio-pci-isr", Space.MEMORY, ISR, ISR + 0x1000),
    Region("vpci0", "pci-config", Space.MEMORY, ECAM, ECAM + 0x1000),
    Region("IOAPIC", "ioapic", Space.MEMORY, IOAPIC, IOAPIC + 0x1000),
    Region("IOAPIC2", "ioapic", Space.MEMORY, IOAPIC2, IOAPIC2 + 0x1000),
    Region("LAPIC", "apic-msi", Space.MEMORY, LAPIC, LAPIC + 0x100000),
    Region("serial", "serial", Space.PORT, 0x3F8, 0x400),
    Region("RTC", "rtc-index", Space.PORT, 0x70, 0x71),
    Region("widget", "widget-regs", Space.MEMORY, 0xFD000000, 0xFD000010),
)
IRQS = (
    Irq(57, "blk0", "req.0"),
    Irq(58, "blk0", "req.1"),
    Irq(11, "nic0", ""),
    Irq(59, "blk0", "req.2", cpu=1, vector=40),
)
SELECT, WINDOW = 0x00, 0x10
MASKED = 1 << 16
MS = 1_000_000


class Rows:
    """Rows in order of time, a microsecond from each to the next unless said otherwise."""

    def __init__(self) -> None:
        self.time = 1_000_000_000
        self.rows: list[dict[str, Any]] = []

    def add(self, kind: Kind, vcpu: int | None = 0, *, after: int = 1000, **more: Any) -> int:
        self.time += after
        self.rows.append({"time": self.time, "kind": str(kind), "vcpu": vcpu, **more})
        return len(self.rows) - 1

    def touch(
        self, address: int, value: int | None, vcpu: int, space: Space, write: bool, **more: Any
    ) -> int:
        return self.add(Kind.ACCESS, vcpu, address=address, value=value, space=str(space),
                        write=write, size=4, **more)  # fmt: skip

    def write(
        self, address: int, value: int, vcpu: int = 0, space: Space = Space.MEMORY, **more: Any
    ) -> int:
        return self.touch(address, value, vcpu, space, True, **more)

    def read(
        self, address: int, value: int = 0, vcpu: int = 0, space: Space = Space.MEMORY, **more: Any
    ) -> int:
        return self.touch(address, value, vcpu, space, False, **more)

    def call(self, function: str, argument: int = 0, vcpu: int = 0, **more: Any) -> int:
        return self.add(Kind.FUNCTION, vcpu, function=function, value=argument, **more)

    def edge(self, irq: int, vector: int, vcpu: int = 0) -> dict[str, int]:
        """An edge interrupt as Linux handles it: EOI first, then the handler."""
        return {
            "raise": self.add(Kind.RAISE, vcpu, vector=vector),
            "deliver": self.add(Kind.DELIVER, vcpu, vector=vector, pc=0x1234),
            "ack": self.call("apic_ack_edge", 0xFFFF888000000000, vcpu),
            "eoi": self.write(LAPIC + 0xB0, 0, vcpu),
            "handler": self.call("vring_interrupt", irq, vcpu),
        }

    def line(self, irq: int, vector: int, vcpu: int, device: int) -> dict[str, int]:
        """A level interrupt likewise: status and acknowledge, handler, EOI seen by the IOAPIC."""
        return {
            "raise": self.add(Kind.RAISE, vcpu, vector=vector),
            "deliver": self.add(Kind.DELIVER, vcpu, vector=vector),
            "handler": self.call("vm_interrupt", irq, vcpu),
            "status": self.read(device + 0x60, 1, vcpu),
            "acknowledge": self.write(device + 0x64, 1, vcpu),
            "ack": self.call("ioapic_ack_level", 0, vcpu),
            "eoi": self.write(LAPIC + 0xB0, 0, vcpu),
            "ioapic": self.add(Kind.EOI, None, vector=vector, device="IOAPIC", cause="EOI"),
        }

    def frame(self) -> pl.DataFrame:
        columns = {
            name: pl.Series(name, [row.get(name) for row in self.rows], dtype)
            for name, dtype in SCHEMA.items()
        }
        return pl.DataFrame(columns)

    def attributed(self, *, command: str | None = "true", cuts: int = 0) -> pl.DataFrame:
        return attributed(cut(self.frame(), [cuts or len(self.rows)]), command=command)


def manifest(command: str | None = "true") -> Manifest:
    return Manifest(provenance(), "vm1", command, 0, 0.0, 1.0, regions=REGIONS, irqs=IRQS)


def cut(frame: pl.DataFrame, sizes: Sequence[int]) -> Iterable[pl.DataFrame]:
    """Frames of these many rows, in turn."""
    at = number = 0
    while at < len(frame):
        size = sizes[number % len(sizes)]
        yield frame[at : at + size]
        at, number = at + size, number + 1


def attributed(frames: Iterable[pl.DataFrame], *, command: str | None = "true") -> pl.DataFrame:
    found = [SCHEMA.to_frame(), *attribute(frames, manifest(command))]
    assert all(dict(frame.schema) == dict(SCHEMA) for frame in found)
    return pl.concat(found).with_columns(pl.col(pl.Categorical).cast(pl.String))


def cells(frame: pl.DataFrame, *names: str) -> list[Any]:
    """The rows' values in these columns."""
    return frame[names[0]].to_list() if len(names) == 1 else frame.select(names).rows()


# Registers


@pytest.mark.parametrize(
    ("offset", "write", "register", "cause"),
    [
        (0x00, False, "MagicValue", "set-up"),
        (0x14, True, "DeviceFeaturesSel", "set-up"),
        (0x50, True, "QueueNotify", "notify"),
        (0x60, False, "InterruptStatus", "interrupt status"),
        (0x64, True, "InterruptACK", "acknowledge"),
        (0x70, False, "Status", "set-up"),
        (0xC0, True, "QueueReset", "set-up"),
        (0xD0, False, "MsiVectorNum", "set-up"),
        (0xD4, True, "MsiControl", "set-up"),
        (0xD8, True, "ConfigMsixVector", "set-up"),
        (0xDC, True, "QueueMsixVector", "set-up"),
        (0xE0, True, "MsiAddrLow", "route change"),
        (0xE4, True, "MsiAddrHigh", "route change"),
        (0xE8, True, "MsiData", "route change"),
        (0xC4, True, "VisUpdate", "route change"),
        (0xF0, True, "VisStorageLow", "set-up"),
        (0xF4, True, "VisStorageHigh", "set-up"),
        (0xF8, True, "VisControl", "set-up"),
        (0xF8, False, "VisControl", "set-up"),
        (0xFC, False, "ConfigGeneration", "configuration"),
        (0x100, False, "Config", "configuration"),
        (0x1FF, False, "Config", "configuration"),
        (0x62, False, "InterruptStatus", "interrupt status"),  # in the middle of it
    ],
)
def test_virtio_mmio_registers(offset: int, write: bool, register: str, cause: str) -> None:
    rows = Rows()
    rows.touch(BLK + offset, 0, 0, Space.MEMORY, write)
    found = rows.attributed()
    assert cells(found, "device", "register", "cause") == [("blk0", register, cause)]


def test_gaps_of_a_map_have_no_register_of_a_neighbour() -> None:
    rows = Rows()
    for offset in (0xC8, 0xCC, 0x68):
        rows.write(BLK + offset, 0)
    found = rows.attributed()
    assert cells(found, "device", "cause") == [("blk0", "other")] * 3
    assert not {"InterruptACK", "VisUpdate"} & set(cells(found, "register"))


def test_regions_end_where_the_next_begins() -> None:
    rows = Rows()
    for address in (BLK - 1, BLK, BLK + 0x1FF, NIC, NIC + 0x1FF, NIC + 0x200):
        rows.read(address)
    found = rows.attributed()
    assert cells(found, "device") == [None, "blk0", "blk0", "nic0", "nic0", None]
    assert cells(found, "register")[0] is None
    assert cells(found, "cause")[0] == cells(found, "cause")[-1] == "other"


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (3, "interrupt status"),  # selects, and that is all
        (1 << 16 | 3, "route change"),
        (1 << 17 | 3, "mask"),
        (1 << 18 | 3, "unmask"),
        (1 << 16 | 1 << 18 | 3, "unmask"),  # with another message
        (1 << 16 | 1 << 17 | 3, "mask"),
    ],
)
def test_commands_of_the_vector_register(value: int, cause: str) -> None:
    rows = Rows()
    rows.write(BLK + 0xEC, value)
    assert cells(rows.attributed(), "register", "cause") == [("MsiVector", cause)]


def test_state_of_a_vector_is_read() -> None:
    rows = Rows()
    rows.read(BLK + 0xEC, 1 << 17 | 1 << 19 | 3)  # masked and pending
    assert cells(rows.attributed(), "register", "cause") == [("MsiVector", "interrupt status")]


def test_storage_is_handed_over_during_set_up_and_its_doorbell_changes_routes() -> None:
    """Five accesses between reset and DRIVER_OK, and a vector that is moved afterwards."""
    rows = Rows()
    steps = [
        (rows.write(BLK + 0x70, 0), "Status", "set-up"),
        (rows.read(BLK + 0xD0, 64), "MsiVectorNum", "set-up"),
        (rows.write(BLK + 0xF0, 0x1234000), "VisStorageLow", "set-up"),
        (rows.write(BLK + 0xF4, 0), "VisStorageHigh", "set-up"),
        (rows.write(BLK + 0xF8, 1 << 16 | 5), "VisControl", "set-up"),
        (rows.read(BLK + 0xF8, 1 << 16 | 5), "VisControl", "set-up"),
        (rows.write(BLK + 0xC4, 0), "VisUpdate", "set-up"),  # no driver is at work yet
        (rows.write(BLK + 0x70, DRIVER_OK), "Status", "set-up"),
        (rows.write(BLK + 0xC4, 2), "VisUpdate", "route change"),
    ]
    assert cells(rows.attributed(), "register", "cause") == [step[1:] for step in steps]


def test_storage_itself_is_memory() -> None:
    """An address that a guest wrote to VisStorageLow is nobody's register."""
    rows = Rows()
    rows.write(BLK + 0xF0, 0x1234000)
    rows.write(0x1234000, 1)
    assert cells(rows.attributed(), "device", "register") == [
        ("blk0", "VisStorageLow"), (None, None),
    ]  # fmt: skip


def test_msix_table() -> None:
    """Entry 1's mask bit, a change of its message, and reads that flush what came before."""
    rows, entry = Rows(), TABLE + 16
    steps = [
        (rows.write(entry + 12, 1), "VectorControl", "mask"),
        (rows.read(entry + 12, 1), "VectorControl", "mask"),
        (rows.write(entry, 0xFEE01000), "MessageAddress", "route change"),
        (rows.write(entry + 4, 0), "MessageUpperAddress", "route change"),
        (rows.write(entry + 8, 0x4041), "MessageData", "route change"),
        (rows.read(entry + 12, 1), "VectorControl", "route change"),
        (rows.write(entry + 12, 0), "VectorControl", "unmask"),
        (rows.write(BLK + 0x50, 0), "QueueNotify", "notify"),  # another device's
        (rows.read(entry, 0), "MessageAddress", "unmask"),
    ]
    assert cells(rows.attributed(), "register", "cause") == [step[1:] for step in steps]


def test_msix_table_read_before_any_write() -> None:
    rows = Rows()
    rows.read(TABLE)
    assert cells(rows.attributed(), "cause") == ["set-up"]


def redirect(rows: Rows, ioapic: int, word: int, value: int, vcpu: int = 0) -> None:
    rows.write(ioapic + SELECT, 0x10 + word, vcpu)
    rows.write(ioapic + WINDOW, value, vcpu)


def test_ioapic_mask_and_route() -> None:
    rows = Rows()
    redirect(rows, IOAPIC, 2 * 12, MASKED | 0x28)  # io_apic_modify_irq: the low word alone
    redirect(rows, IOAPIC, 2 * 12, 0x28)
    redirect(rows, IOAPIC, 2 * 12 + 1, 2 << 24)  # __ioapic_write_entry: high, then low
    redirect(rows, IOAPIC, 2 * 12, 0x28)
    redirect(rows, IOAPIC, 2 * 12, MASKED | 0x28)  # and again alone
    expected = ["mask"] * 2 + ["unmask"] * 2 + ["route change"] * 4 + ["mask"] * 2
    found = rows.attributed()
    assert cells(found, "cause") == expected
    assert cells(found, "register") == ["IOREGSEL", "IOWIN"] * 5


def test_ioapic_low_word_of_another_pin_is_no_route() -> None:
    rows = Rows()
    redirect(rows, IOAPIC, 2 * 12 + 1, 2 << 24)
    redirect(rows, IOAPIC, 2 * 13, 0x29)
    assert cells(rows.attributed(), "cause") == ["route change"] * 2 + ["unmask"] * 2


def test_ioapic_read_back_flushes_and_identity_is_setup() -> None:
    rows = Rows()
    rows.write(IOAPIC + SELECT, 1)  # version
    rows.read(IOAPIC + WINDOW, 0x170020)
    redirect(rows, IOAPIC, 24, MASKED)
    rows.read(IOAPIC + WINDOW, MASKED)  # io_apic_sync
    rows.write(IOAPIC + SELECT, 0x10 + 24)
    rows.read(IOAPIC + WINDOW, MASKED)
    assert cells(rows.attributed(), "cause") == ["set-up"] * 2 + ["mask"] * 5


def test_two_ioapics_do_not_mix() -> None:
    """Two vCPUs, each in the middle of an entry of its own IOAPIC."""
    rows = Rows()
    rows.write(IOAPIC + SELECT, 0x10 + 24, 0)
    rows.write(IOAPIC2 + SELECT, 0x10 + 25, 1)
    rows.write(IOAPIC + WINDOW, MASKED, 0)
    rows.write(IOAPIC2 + WINDOW, 1 << 24, 1)
    rows.write(IOAPIC2 + SELECT, 0x10 + 24, 1)
    rows.write(IOAPIC + SELECT, 0x10 + 24, 0)
    rows.write(IOAPIC2 + WINDOW, 0x31, 1)
    rows.write(IOAPIC + WINDOW, 0x30, 0)
    found = rows.attributed()
    first, second = ["mask", "mask", "unmask", "unmask"], ["route change"] * 4
    assert cells(found.filter(device="IOAPIC"), "cause") == first
    assert cells(found.filter(device="IOAPIC2"), "cause") == second


def test_selection_that_nothing_follows() -> None:
    rows = Rows()
    rows.write(IOAPIC + SELECT, 0x10)
    rows.write(IOAPIC + WINDOW, MASKED, after=NEAR + 1)
    assert cells(rows.attributed(), "cause") == ["set-up", "mask"]


@pytest.mark.parametrize(
    ("offset", "write", "register", "cause"),
    [
        (0x0B0, True, "EOI", "EOI"),
        (0x300, True, "ICR_Low", "IPI"),
        (0x310, True, "ICR_High", "IPI"),
        (0x380, True, "TimerInitial", "timer"),
        (0x390, False, "TimerCurrent", "timer"),
        (0x020, False, "ID", "set-up"),
        (0x1A0, False, "TMR2", "EOI"),
        (0x220, False, "IRR2", "route change"),
    ],
)
def test_lapic_by_memory_and_by_msr(offset: int, write: bool, register: str, cause: str) -> None:
    """An x2APIC's register n is MSR 0x800 + n."""
    rows = Rows()
    rows.touch(LAPIC + offset, 0, 0, Space.MEMORY, write)
    rows.touch(0x800 + offset // 16, 0, 0, Space.MSR, write)
    found = rows.attributed()
    assert cells(found, "device", "register", "cause") == [("LAPIC", register, cause)] * 2


def test_other_msrs() -> None:
    rows = Rows()
    for number in (0x6E0, 0x4B564D01, 0x8B):
        rows.write(number, 0, space=Space.MSR)
    found = rows.attributed()
    assert cells(found, "register", "cause") == [
        ("MSR", "timer"), ("MSR", "set-up"), ("MSR", "other"),
    ]  # fmt: skip


def test_ports_are_not_memory() -> None:
    rows = Rows()
    rows.write(0x3F8, ord("x"), space=Space.PORT)
    rows.write(0x3F8, ord("x"))
    rows.read(0x71, space=Space.PORT)
    found = rows.attributed()
    assert cells(found, "device", "cause") == [
        ("serial", "console"), (None, "other"), (None, "other"),
    ]  # fmt: skip


def test_unknown_regions_keep_qemus_name() -> None:
    rows = Rows()
    rows.read(0xFD000004)
    found = rows.attributed()
    assert cells(found, "device", "register", "cause") == [("widget", "widget-regs", "other")]


def test_pci_configuration() -> None:
    rows = Rows()
    rows.read(ECAM)
    rows.write(ECAM + 4, 0x406)
    rows.read(ECAM + 0x84)
    found = rows.attributed()
    assert cells(found, "register") == ["VendorID", "Command", "Capability"]
    assert cells(found, "cause") == ["configuration"] * 3


# Set-up


def test_device_is_set_up_until_its_driver_is_ready() -> None:
    rows = Rows()
    rows.write(BLK + 0x50, 0)  # at work when the recording began
    rows.write(BLK + 0x70, 0)  # reset
    rows.write(BLK + 0xEC, 1 << 17)
    rows.write(BLK + 0x50, 0)
    rows.write(NIC + 0x50, 0)  # the other one is not concerned
    rows.write(BLK + 0x70, 11)
    rows.read(BLK + 0x100)
    rows.write(BLK + 0x70, DRIVER_OK)
    rows.read(BLK + 0x100)
    rows.write(BLK + 0xEC, 1 << 17)
    rows.write(BLK + 0x50, 0)
    rows.write(BLK + 0x70, 0)
    rows.write(BLK + 0x50, 0)
    assert cells(rows.attributed(), "cause") == [
        "notify", "set-up", "set-up", "set-up", "notify", "set-up", "set-up", "set-up",
        "configuration", "mask", "notify", "set-up", "set-up",
    ]  # fmt: skip


def test_virtio_over_pci_is_set_up_likewise() -> None:
    rows = Rows()
    rows.write(COMMON + 0x14, 0)
    rows.write(TABLE + 12, 1)
    rows.read(ECAM + 0x84)
    rows.write(COMMON + 0x14, DRIVER_OK)
    rows.write(TABLE + 12, 1)
    rows.read(ECAM + 0x84)
    found = rows.attributed()
    assert cells(found, "cause") == ["set-up"] * 4 + ["mask", "configuration"]
    assert cells(found, "register")[0] == "device_status"


@pytest.mark.parametrize("size", [1, 100])
def test_from_boot_no_device_has_a_driver(size: int) -> None:
    """Also before anything was said to the device, and only what has a status."""
    rows = Rows()
    rows.read(ECAM)  # enumeration of the PCI bus, a long time before
    rows.read(NIC + 0x100)
    rows.write(LAPIC + 0xB0, 0)
    rows.write(COMMON + 0x14, DRIVER_OK, after=4 * NEAR)
    rows.read(ECAM)
    found = rows.attributed(command=None, cuts=size)
    assert cells(found, "cause") == ["set-up", "set-up", "EOI", "set-up", "configuration"]


# Interrupts


def test_edge_interrupt() -> None:
    rows = Rows()
    rows.write(BLK + 0x50, 0)
    parts = rows.edge(57, 34, 2)
    after = rows.write(BLK + 0x50, 0, 2)
    found = rows.attributed()
    for place in parts.values():
        row = found.row(place, named=True)
        assert (row["interrupt"], row["irq"], row["source"]) == (1, 57, "req.0")
    assert [found["device"][parts[part]] for part in ("raise", "deliver", "handler")] == [
        "blk0"
    ] * 3
    assert found["device"][parts["eoi"]] == "LAPIC"
    assert found["interrupt"][0] is None
    assert found["interrupt"][after] is None


def test_line_interrupt() -> None:
    rows = Rows()
    parts = rows.line(11, 35, 1, NIC)
    found = rows.attributed()
    assert cells(found, "interrupt") == [1] * 8
    assert cells(found, "irq", "source") == [(11, "")] * 8
    last = found.row(parts["ioapic"], named=True)
    assert (last["device"], last["cause"], last["vcpu"]) == ("IOAPIC", "EOI", None)
    assert found["device"][parts["status"]] == "nic0"


def test_interrupts_are_numbered_in_order_of_delivery() -> None:
    rows = Rows()
    order = [rows.edge(57 + n % 2, 34, 0)["deliver"] for n in range(10)]
    found = rows.attributed()
    assert [found["interrupt"][place] for place in order] == list(range(1, 11))
    assert [found["source"][place] for place in order] == ["req.0", "req.1"] * 5


def test_same_vector_on_two_vcpus() -> None:
    """Vectors belong to a vCPU: interleaved, each part finds its own interrupt."""
    rows = Rows()
    expected = []
    for kind in ("raise", "deliver", "ack", "eoi", "handler"):
        for vcpu in (0, 1):
            if kind in ("raise", "deliver"):
                rows.add(Kind(kind), vcpu, vector=34)
            elif kind == "eoi":
                rows.write(LAPIC + 0xB0, 0, vcpu)
            else:
                name = {"ack": "apic_ack_edge", "handler": "vring_interrupt"}[kind]
                rows.call(name, 57 + vcpu, vcpu)
            expected.append((vcpu + 1, 57 + vcpu, f"req.{vcpu}"))
    assert cells(rows.attributed(), "interrupt", "irq", "source") == expected


def test_ioapic_end_is_of_the_vcpu_that_wrote_the_eoi() -> None:
    """The other vCPU took an edge interrupt of the same vector after the line's."""
    rows = Rows()
    rows.add(Kind.DELIVER, 0, vector=34)
    rows.call("vm_interrupt", 11, 0)
    rows.add(Kind.DELIVER, 1, vector=34)
    rows.call("vring_interrupt", 57, 1)
    rows.write(LAPIC + 0xB0, 0, 0)
    end = rows.add(Kind.EOI, None, vector=34, device="IOAPIC", cause="EOI")
    found = rows.attributed()
    assert (found["interrupt"][end], found["irq"][end]) == (1, 11)


def test_ioapic_end_without_an_access_follows_the_delivery() -> None:
    """As with an APIC that the hardware virtualizes."""
    rows = Rows()
    rows.add(Kind.DELIVER, 1, vector=34)
    rows.call("vm_interrupt", 11, 1)
    end = rows.add(Kind.EOI, None, vector=34)
    other = rows.add(Kind.EOI, None, vector=35)
    found = rows.attributed()
    assert (found["interrupt"][end], found["irq"][end]) == (1, 11)
    assert found["interrupt"][other] is None


def test_raises_that_coalesce() -> None:
    """The second finds the vector pending; the third is for the next delivery."""
    rows = Rows()
    first = rows.add(Kind.RAISE, 0, vector=34)
    rows.add(Kind.RAISE, 0, vector=34)
    rows.add(Kind.DELIVER, 0, vector=34)
    third = rows.add(Kind.RAISE, 0, vector=34)
    rows.add(Kind.DELIVER, 0, vector=34)
    found = rows.attributed()
    assert cells(found, "interrupt") == [1, None, 1, 2, 2]
    assert (found["interrupt"][first], found["interrupt"][third]) == (1, 2)


def test_raise_of_another_vcpu_or_vector_or_nothing_is_left_alone() -> None:
    rows = Rows()
    rows.add(Kind.RAISE, 1, vector=34)
    rows.add(Kind.RAISE, 0, vector=35)
    rows.add(Kind.RAISE, None, vector=34)  # to more than one
    rows.add(Kind.DELIVER, 0, vector=34)
    rows.add(Kind.DELIVER, 0, vector=36, after=NEAR + 1)
    rows.add(Kind.RAISE, 0, vector=34)
    assert cells(rows.attributed(), "interrupt") == [None, None, None, 1, 2, None]


def test_timer_between_ends_an_interrupts_claims() -> None:
    """What follows a timer's delivery on that vCPU is the timer's."""
    rows = Rows()
    rows.edge(57, 34)
    rows.add(Kind.DELIVER, 0, function="sysvec_apic_timer_interrupt")
    rows.write(LAPIC + 0xB0, 0)
    rows.write(LAPIC + 0x380, 100)
    assert cells(rows.attributed(), "interrupt") == [1] * 5 + [None] * 3


def test_looking_at_a_vectors_state_is_no_part_of_an_interrupt() -> None:
    rows = Rows()
    rows.edge(57, 34)
    rows.write(BLK + 0xEC, 3)
    rows.read(BLK + 0xEC, 3)
    found = rows.attributed()
    assert cells(found, "cause")[-2:] == ["interrupt status"] * 2
    assert cells(found, "interrupt")[-2:] == [None, None]


def test_unknown_irq_has_no_device() -> None:
    rows = Rows()
    rows.edge(99, 34)
    found = rows.attributed()
    assert cells(found, "irq") == [99] * 5
    assert cells(found, "source") == [None] * 5
    assert cells(found, "device") == [None, None, None, "LAPIC", None]


def test_delivery_without_a_handler_has_no_irq() -> None:
    rows = Rows()
    rows.add(Kind.DELIVER, 0, vector=34)
    rows.write(LAPIC + 0xB0, 0)
    assert cells(rows.attributed(), "interrupt", "irq") == [(1, None)] * 2


def test_what_is_far_away_does_not_count() -> None:
    rows = Rows()
    rows.add(Kind.RAISE, 0, vector=34)
    rows.add(Kind.DELIVER, 0, vector=34, after=NEAR + 1)
    rows.read(NIC + 0x60, after=NEAR)
    rows.read(NIC + 0x60)
    rows.add(Kind.RAISE, 0, vector=34)
    rows.add(Kind.DELIVER, 0, vector=34, after=NEAR)
    assert cells(rows.attributed(), "interrupt") == [None, 1, 1, None, 2, 2]


# Frames


def story(seed: int, length: int = 400) -> pl.DataFrame:
    """All that happens above, by four vCPUs at once, at intervals from ns to seconds."""
    chance = random.Random(seed)
    scripts: list[list[dict[str, Any]]] = []
    for vcpu in range(4):
        own: list[dict[str, Any]] = []
        for _ in range(length // 4):
            rows = Rows()
            what = chance.randrange(12)
            ioapic = chance.choice((IOAPIC, IOAPIC2))
            if what < 3:
                rows.edge(chance.choice((57, 58)), chance.choice((34, 35)), vcpu)
            elif what < 5:
                rows.line(11, 35, vcpu, NIC)
            elif what == 5:
                redirect(rows, ioapic, chance.randrange(4), chance.choice((0, MASKED)), vcpu)
            elif what == 6:
                rows.write(ioapic + SELECT, 0x10 + chance.randrange(4), vcpu)
            elif what == 7:
                rows.read(ioapic + WINDOW, 0, vcpu)
            elif what == 8:
                rows.write(TABLE + chance.choice((0, 8, 12)), chance.randrange(2), vcpu)
                rows.read(TABLE, 0, vcpu)
            elif what == 9:
                device = chance.choice((BLK, NIC))
                rows.write(device + 0x70, chance.choice((0, DRIVER_OK)), vcpu)
                rows.read(device + 0x100, 0, vcpu)
                rows.write(device + 0xEC, chance.choice((1, 1 << 17, 1 << 18)), vcpu)
            elif what == 10:
                rows.write(COMMON + 0x14, chance.choice((0, DRIVER_OK)), vcpu)
                rows.read(ECAM, 0, vcpu)
                rows.add(Kind.RAISE, vcpu, vector=34)
            else:
                rows.add(Kind.DELIVER, vcpu, function="sysvec_apic_timer_interrupt")
                rows.write(LAPIC + 0xB0, 0, vcpu)
            own += rows.rows
        scripts.append(own)
    merged, time = Rows(), 0
    while any(scripts):
        script = chance.choice([script for script in scripts if script])
        gap = chance.choice((0, 10, 1000, MS, 20 * MS, NEAR // 2, NEAR, 3 * NEAR))
        time += gap if chance.random() < 0.3 else 100
        merged.rows.append({**script.pop(0), "time": time})
    return merged.frame()


@pytest.mark.parametrize("command", ["true", None], ids=["command", "from boot"])
@pytest.mark.parametrize("seed", range(3))
def test_result_does_not_depend_on_how_frames_are_cut(seed: int, command: str | None) -> None:
    frame = story(seed)
    whole = attributed([frame], command=command)
    assert whole["interrupt"].n_unique() > 50
    assert whole["cause"].n_unique() > 8
    chance = random.Random(seed)
    sizes = ([1], [7], [1000], [chance.randrange(1, 60) for _ in range(50)])
    for several in sizes:
        found = attributed(cut(frame, several), command=command)
        for name in SCHEMA:
            assert cells(found, name) == cells(whole, name), f"{name} differs with frames {several}"


@pytest.mark.parametrize("seed", range(3))
def test_rows_stay_as_they_are(seed: int) -> None:
    """All rows, in order, and nothing changed that a reader filled."""
    frame = story(seed).with_columns(pl.int_range(pl.len(), dtype=pl.UInt64).alias("duration"))
    given = [name for name in SCHEMA.names() if name not in
             ("device", "register", "cause", "source", "irq", "interrupt")]  # fmt: skip
    text = pl.col(pl.Categorical).cast(pl.String)
    found = attributed(cut(frame, [13]))
    assert found.select(given).equals(frame.with_columns(text).select(given))


def test_small_frames_are_not_looked_at_again_and_again() -> None:
    """5,000 frames of a row within what is near: minutes, if each looked at all before it."""
    rows = Rows()
    for _ in range(1000):
        rows.edge(57, 34)
    found = rows.attributed(cuts=1)
    assert found["interrupt"].n_unique() == 1000


def test_memory_is_bounded_by_time() -> None:
    """Interrupts overlap without end on four vCPUs; rows come out all the same."""
    rows = Rows()
    for _ in range(2000):
        for vcpu in range(4):
            rows.add(Kind.DELIVER, vcpu, vector=34, after=MS // 4)
            rows.call("vring_interrupt", 57, (vcpu + 1) % 4)
    held, most, seen = 0, 0, 0

    def counted() -> Iterable[pl.DataFrame]:
        nonlocal held, most
        for frame in cut(rows.frame(), [100]):
            held += len(frame)
            most = max(most, held)
            yield frame

    for frame in attribute(counted(), manifest()):
        held -= len(frame)
        seen += len(frame)
    assert seen == 16000  # two seconds
    assert most < 2 * 16000 * 4 * NEAR // (2000 * MS) + 200


def test_nothing() -> None:
    assert len(attributed([])) == 0
    assert len(attributed([SCHEMA.to_frame(), SCHEMA.to_frame()])) == 0


def test_no_regions_at_all() -> None:
    rows = Rows()
    rows.read(BLK)
    rows.write(0x80B, 0, space=Space.MSR)
    bare = Manifest(provenance(), "vm1", "true", 0, 0.0, 1.0)
    found = pl.concat(list(attribute([rows.frame()], bare)))
    assert found["cause"].to_list() == ["other", "EOI"]


def test_a_vector_tells_the_interrupt_where_no_handler_is_seen() -> None:
    rows = Rows()
    for vcpu, vector in ((1, 40), (0, 40)):
        rows.add(Kind.RAISE, vcpu, vector=vector)
        rows.add(Kind.DELIVER, vcpu, vector=vector)
    seen = rows.edge(57, 40, vcpu=1)
    frame = rows.attributed()
    named = ("device", "source", "irq")
    assert cells(frame[:2], *named) == [("blk0", "req.2", 59)] * 2
    # Of another vCPU; and of another interrupt, as its handler tells.
    assert cells(frame[2:4], *named) == [(None, None, None)] * 2
    assert cells(frame[seen["deliver"]], *named) == [("blk0", "req.0", 57)]


def answer(*interrupts: tuple[int, Sequence[int], tuple[int, int]]) -> str:
    """A guest's answer: number, counts by CPU, and the CPU and vector of each interrupt."""
    rows = [f" {irq}: {' '.join(map(str, counts))}  MMIO-MSI-LNRO0005:00  1-edge  virtio0-req.{irq}"
            for irq, counts, _ in interrupts]  # fmt: skip
    files = [
        f"/sys/kernel/debug/irq/irqs/{irq}:     {what}: {value:5}"
        for irq, _, place in interrupts
        for what, value in zip(("Target", "Vector"), place, strict=True)
    ]
    return "\n".join([*files, *rows, ""])


HERE, THERE = (0, 33), (1, 34)


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        # Each stayed, and came where it is.
        ([(1, [3, 0], HERE), (2, [0, 0], THERE)], [(1, [9, 0], HERE), (2, [0, 5], THERE)],
         {1: HERE, 2: THERE}),
        # One moved, where none comes that stayed.
        ([(1, [3, 0], HERE), (2, [0, 0], THERE)], [(1, [3, 0], HERE), (2, [0, 5], (1, 35))],
         {1: HERE}),
        # One moved, and may have had the other's vector meanwhile.
        ([(1, [3, 0], HERE), (2, [0, 0], THERE)], [(1, [9, 0], HERE), (2, [1, 0], (0, 34))], {}),
        # They changed places and went back.
        ([(1, [3, 0], HERE), (2, [0, 0], THERE)], [(1, [3, 4], HERE), (2, [4, 0], THERE)], {}),
        # One is new, and the other one is gone.
        ([(1, [3, 0], HERE)], [(2, [0, 2], THERE)], {}),
        # The guest died meanwhile.
        ([(1, [3, 0], HERE)], [], {}),
    ],
)  # fmt: skip
def test_a_vector_tells_an_interrupt_that_kept_it(
    before: list[Any], after: list[Any], kept: dict[int, tuple[int, int]]
) -> None:
    found = meanwhile(answer(*before), answer(*after), ())
    assert {irq.irq for irq in found} == {irq for irq, *_ in (*before, *after)}
    places = {irq.irq: (irq.cpu, irq.vector) for irq in found if irq.cpu is not None}
    assert places == kept
