# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's pages, against the text that the same kernel printed of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvis.errors import UsageError
from qvis.trace import ringbuffer
from qvis.trace.kvm import _reasons
from qvis.trace.ringbuffer import Format, Layout, PerCpu

from .recordings import NAMES, PAGE, Line, data, discarded, extend, page, stamp, text, unpack

SVM = 2
MODES = ("Fixed", "LowPrio", "SMI", "Res3", "NMI", "INIT", "SIPI", "ExtINT")
MMIO = ("unsatisfied-read", "read", "write")
REGISTERS = {0xB0: "EOI", 0x300: "ICR", 0x380: "TMICT"}


def register(number: int) -> str:
    return f"APIC_{REGISTERS[number]}" if number in REGISTERS else f"0x{number:x}"


def rw(value: int) -> str:
    return "write" if value else "read"


# How the kernel prints each event (the last line of its format), written down anew.
PRINT: dict[str, Callable[[dict[str, int], dict[int, str]], str]] = {
    "kvm_exit": lambda f, reasons: (
        f"vcpu {f['vcpu_id']} reason {reasons[f['exit_reason']]} rip 0x{f['guest_rip']:x} "
        f"info1 0x{f['info1']:016x} info2 0x{f['info2']:016x} "
        f"intr_info 0x{f['intr_info']:08x} error_code 0x{f['error_code']:08x}"
    ),
    "kvm_entry": lambda f, _: (
        f"vcpu {f['vcpu_id']}, rip 0x{f['rip']:x}"
        f"{'[immediate exit]' if f['immediate_exit'] else ''}"
    ),
    "kvm_mmio": lambda f, _: (
        f"mmio {MMIO[f['type']]} len {f['len']} gpa 0x{f['gpa']:x} val 0x{f['val']:x}"
    ),
    "kvm_pio": lambda f, _: (
        f"pio_{rw(f['rw'])} at 0x{f['port']:x} size {f['size']} count {f['count']} "
        f"val 0x{f['val']:x} {'(...)' if f['count'] > 1 else ''}"
    ),
    "kvm_msr": lambda f, _: (
        f"msr_{rw(f['write'])} {f['ecx']:x} = 0x{f['data']:x}{' (#GP)' if f['exception'] else ''}"
    ),
    "kvm_apic": lambda f, _: (
        f"apic_{rw(f['rw'])} {register(f['reg'])} = 0x{f['val']:x}"
    ),
    "kvm_apic_accept_irq": lambda f, _: (
        f"apicid {f['apicid']:x} vec {f['vec']} "
        f"({MODES[f['dm'] >> 8 & 7]}|{'level' if f['tm'] else 'edge'})"
    ),
    "kvm_inj_virq": lambda f, _: (
        f"{'Soft/INTn' if f['soft'] else 'IRQ'} 0x{f['vector']:x}"
        f"{' [reinjected]' if f['reinjected'] else ''}"
    ),
    "kvm_eoi": lambda f, _: f"apicid {f['apicid']:x} vector {f['vector']}",
    "kvm_pv_eoi": lambda f, _: f"apicid {f['apicid']:x} vector {f['vector']}",
    "kvm_set_irq": lambda f, _: (
        f"gsi {f['gsi']} level {f['level']} source {f['irq_source_id']}"
    ),
    "kvm_msi_set_irq": lambda f, _: (
        f"dst {f['address'] >> 12 & 0xFF | f['address'] >> 32 & 0xFFFFFF00:x} vec "
        f"{f['data'] & 0xFF} ({MODES[f['data'] >> 8 & 7]}|"
        f"{'logical' if f['address'] & 4 else 'physical'}|"
        f"{'level' if f['data'] & 1 << 15 else 'edge'}{'|rh' if f['address'] & 8 else ''})"
    ),
    "kvm_apic_ipi": lambda f, _: (
        f"dst {f['dest_id']:x} vec {f['icr_low'] & 0xFF} ({MODES[f['icr_low'] >> 8 & 7]}|"
        f"{'logical' if f['icr_low'] & 1 << 11 else 'physical'}|"
        f"{'assert' if f['icr_low'] & 1 << 14 else 'de-assert'}|"
        f"{'level' if f['icr_low'] & 1 << 15 else 'edge'}|"
        f"{('dst', 'self', 'all', 'all-but-self')[f['icr_low'] >> 18 & 3]})"
    ),
}  # fmt: skip


def printed(raw: Path) -> list[Line]:
    """What the kernel would have printed, from the pages, in order of time."""
    layout = Layout.read(raw / "events")
    forms = {f.number: f for f in map(Format.read, raw.glob("events/kvm/*/format"))}
    common = next(iter(forms.values())).fields
    exit_ = next(form for form in forms.values() if form.name == "kvm_exit")
    reasons = _reasons(exit_.text)[SVM]
    lines = []
    for path in sorted(raw.glob("cpu*.raw")):
        for chunk in PerCpu(path, layout).chunks():
            kinds = chunk.column(common["common_type"])
            for number in np.unique(kinds).tolist():
                form, which = forms[number], np.flatnonzero(kinds == number)
                columns = {n: chunk.column(f, which).tolist() for n, f in form.fields.items()}
                for i, time in enumerate(chunk.time[which].tolist()):
                    fields = {name: int(values[i]) for name, values in columns.items()}
                    words = PRINT[form.name](fields, reasons)
                    cpu = int(path.stem[3:])
                    lines.append(Line(time, fields["common_pid"], cpu, form.name, words))
    return sorted(lines, key=lambda line: (line.time, line.cpu))


@pytest.mark.parametrize("name", NAMES)
def test_real_pages_say_what_the_kernel_printed(name: str, tmp_path: Path) -> None:
    raw = unpack(name, tmp_path)
    expected = sorted(text(raw), key=lambda line: (line.time, line.cpu))
    assert len(expected) == {"msi": 3449, "line": 3725, "lost": 507}[name]
    assert printed(raw) == expected


def test_chunks_of_one_page_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = unpack("msi", tmp_path)
    whole = printed(raw)
    monkeypatch.setattr(ringbuffer, "PAGES", 1)
    assert printed(raw) == whole


def test_lost_events_are_where_the_kernel_says(tmp_path: Path) -> None:
    raw = unpack("lost", tmp_path)
    files = [PerCpu(raw / f"cpu{cpu}.raw", Layout.read(raw / "events")) for cpu in (0, 1)]
    first = [next(line.time for line in text(raw) if line.cpu == cpu) for cpu in (0, 1)]
    for file in files:
        assert list(file.chunks())
    # The page of CPU 0 had no room for the number.
    assert [file.lost for file in files] == [1, 1273]
    assert [file.gaps for file in files] == [[(0, first[0])], [(0, first[1])]]
    assert "overrun: 1273" in (raw / "per_cpu/cpu1/stats").read_text()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.read(unpack("msi", tmp_path) / "events")


@pytest.fixture
def read(tmp_path: Path, layout: Layout) -> Callable[..., tuple[list[Any], PerCpu]]:
    """Read pages: times and payloads, and the file they were read from."""

    def reader(*pages: bytes) -> tuple[list[Any], PerCpu]:
        path = tmp_path / "cpu0.raw"
        path.write_bytes(b"".join(pages))
        file = PerCpu(path, layout)
        found = [
            (time, bytes(chunk.bytes[at : at + length]))
            for chunk in file.chunks()
            for time, at, length in zip(
                chunk.time.tolist(), chunk.at.tolist(), chunk.length.tolist(), strict=True
            )
        ]
        return found, file

    return reader


def test_kinds_of_headers(read: Any) -> None:
    long = bytes(range(200))
    found, file = read(
        page(
            1000,
            data(0, b"aaaa")
            + data(5, b"bbbbbbbb")
            + discarded(7, 12)
            + data(1, long)
            + extend(1 << 40)
            + data(0, b"cccc")
            + stamp(1 << 50)
            + data(0, b"dddd", counted=True)
            + data(3, b"eeee"),
        )
    )
    late = 1013 + (1 << 40)
    assert found == [
        (1000, b"aaaa"),
        (1005, b"bbbbbbbb"),
        (1013, long),
        (late, b"cccc"),
        (1 << 50, b"dddd"),
        ((1 << 50) + 3, b"eeee"),
    ]
    assert file.faults == [] and file.gaps == [] and file.lost == 0


def test_absolute_times_keep_the_highest_bits(read: Any) -> None:
    high = 0x18 << 56
    found, _ = read(page(high + 100, stamp(high + 200) + data(0, b"aaaa")))
    assert found == [(high + 200, b"aaaa")]
    # The 59 bits went over since the time before.
    found, _ = read(page(high + (1 << 59) - 5, stamp(3) + data(0, b"aaaa")))
    assert found == [(high + (1 << 59) + 3, b"aaaa")]


def test_padding_ends_a_page(read: Any) -> None:
    found, file = read(page(10, data(0, b"aaaa") + b"\x1d\0\0\0" + b"\xff" * 32), page(50, b""))
    assert found == [(10, b"aaaa")] and file.faults == []


def test_missed_events_leave_a_gap(read: Any) -> None:
    found, file = read(
        page(10, data(0, b"aaaa") + data(5, b"bbbb")),
        page(100, data(0, b"cccc"), missed=42),
        page(200, data(0, b"dddd"), missed=7, counted=False),
    )
    assert [time for time, _ in found] == [10, 15, 100, 200]
    assert file.lost == 43 and file.gaps == [(15, 100), (100, 200)] and file.faults == []


def test_a_cut_file_keeps_what_is_whole(read: Any) -> None:
    first = page(10, data(0, b"aaaa"))
    second = page(20, data(0, b"bbbb") + data(1, b"c" * 40))
    found, file = read(first, second[: 16 + 8 + 12])
    assert found == [(10, b"aaaa"), (20, b"bbbb")]
    assert file.faults == ["cpu0.raw ends in the middle of a page: it was cut off"]
    for size in range(1, PAGE, 5):  # whatever is left of it, nothing is made up
        found, file = read(first, second[:size])
        assert [body[:1] for _, body in found] == [b"a", b"b", b"c"][
            : 1 + (size >= 24) + (size >= 68)
        ]
        assert len(file.faults) == 1


def test_damage_costs_what_is_behind_it_in_its_page(read: Any) -> None:
    good = page(10, data(0, b"aaaa"))
    beyond = page(20, data(0, b"bbbb") + b"\x00\0\0\0" + b"\xff\xff\0\0" + data(0, b"cccc"))
    empty = page(25, data(0, b"ffff") + bytes(16))
    size = bytearray(page(30, data(0, b"dddd")))
    size[8:12] = b"\xff\xff\xff\x0f"
    last = page(40, data(0, b"eeee"))
    found, file = read(good, beyond, empty, bytes(size), last)
    assert [body for _, body in found] == [b"aaaa", b"bbbb", b"ffff", b"eeee"]
    assert file.faults == [
        "cpu0.raw is damaged in 3 pages, the first at byte 4096; of those only what precedes "
        "the damage was read"
    ]
    assert file.gaps == [(20, 25), (25, 40)]


def test_noise_neither_hangs_nor_fails(read: Any) -> None:
    noise = np.random.default_rng(1).integers(0, 256, 64 * PAGE, np.uint8)
    pages = noise.reshape(-1, PAGE)
    pages[::2, 8:16] = np.frombuffer((4000).to_bytes(8, "little"), np.uint8)
    found, file = read(noise.tobytes())
    assert all(len(body) <= PAGE for _, body in found) and file.faults


def test_what_cannot_be_read_is_named(tmp_path: Path, layout: Layout) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*cpu7.raw"):
        list(PerCpu(tmp_path / "cpu7.raw", layout).chunks())
    with pytest.raises(UsageError, match="header_page"):
        Layout.read(tmp_path)
    events = tmp_path / "msi" / "events"
    (events / "header_page").write_text("\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n")
    with pytest.raises(UsageError, match=r"does not tell .*data"):
        Layout.read(events)
    (events / "kvm/kvm_exit/format").write_text("nothing")
    with pytest.raises(UsageError, match="is not the format of an event"):
        Format.read(events / "kvm/kvm_exit/format")


def test_fields_of_a_format(tmp_path: Path) -> None:
    path = tmp_path / "format"
    path.write_text(
        "name: thing\nID: 7\nformat:\n"
        "\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n"
        "\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n"
        "\tfield:char comm[16];\toffset:8;\tsize:16;\tsigned:0;\n"
        "\tfield:__data_loc char[] name;\toffset:24;\tsize:4;\tsigned:0;\n\n"
        'print fmt: "%d", REC->x\n'
    )
    form = Format.read(path)
    assert (form.name, form.number) == ("thing", 7)
    assert list(form.fields) == ["common_type", "common_pid", "comm", "name"]
    assert form.fields["common_pid"].signed and form.fields["comm"].end == 24
    assert re.search("print fmt", form.text)
