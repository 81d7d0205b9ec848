# SPDX-License-Identifier: GPL-2.0-or-later
"""A footprint as tables, and these as a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..experiments.boot import BootSample
from ..experiments.footprint import TALK, Footprint, median
from ..experiments.surface import Area

__all__ = ["Table", "html", "source", "tables"]

NAMES = {"linux": "Linux", "qemu": "QEMU"}


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the first column names the rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(result: Footprint) -> list[Table]:
    """All that was counted and measured; the talk's figures stand beside ours."""
    return [_code(result), _components(result), _sizes(result), _boots(result), _surfaces(result)]


def source(result: Footprint) -> str:
    """Where the figures come from, in one line."""
    where, linux, qemu = result.provenance, result.programs["linux"], result.programs["qemu"]
    host = where["host"]
    return (
        f"Linux {linux.version} (series {linux.series}), QEMU {qemu.version} (series "
        f"{qemu.series}), backend {where['backend']} ({where['accelerator']}); host: "
        f"{host['cpus']} CPUs, {host['model']}, Linux {host['kernel']}, load "
        f"{host['load_before']:.1f}; guests: {where['smp']} vCPUs, {where['memory_mib']} MiB, "
        f"{where['queues']} queues"
    )


def html(result: Footprint) -> str:
    """The tables as a document of their own."""
    # Here, since a footprint in the terminal needs nothing that a page does.
    from . import page

    body = [page.h("h1", "What virtio over PCI costs, and what virtio over MMIO")]
    body.append(page.h("p", source(result), class_="source"))
    for table in tables(result):
        grid = page.table(table.columns, table.rows, text=1)
        body.append(page.h("section", page.h("h2", table.title), grid))
    notes = [page.h("li", note) for note in result.notes]
    body.append(page.h("section", page.h("h2", "What was counted"), page.h("ul", *notes)))
    return page.page("qvis footprint", *body)


def _code(result: Footprint) -> Table:
    rows = []
    for name, program in result.programs.items():
        pci, mmio, talk = program.code.pci, program.code.mmio, TALK[name]
        was, now = mmio.released, mmio.lines
        for what, figures in (
            (
                "files",
                (talk.pci_files, talk.mmio_files, pci.files, mmio.released_files, mmio.files),
            ),
            ("lines", (talk.pci_lines, talk.mmio_lines, pci.lines.all, was.all, now.all)),
            ("code lines", (None, None, pci.lines.code, was.code, now.code)),
            ("headers", (None, None, pci.headers, None, mmio.headers)),
            ("lines of these", (None, None, pci.header_lines.all, None, mmio.header_lines.all)),
            ("bytes, loaded", (None, None, pci.sizes.total, None, mmio.sizes.total)),
            ("text of these", (None, None, pci.sizes.text, None, mmio.sizes.text)),
        ):
            rows.append((f"{NAMES[name]}: {what}", *map(_number, figures)))
    columns = ("", "talk: PCI", "talk: MMIO", "PCI", "MMIO as released", "MMIO with MSI, VIS")
    return Table("Code of the transports", columns, tuple(rows))


def _components(result: Footprint) -> Table:
    rows = []
    for name, program in result.programs.items():
        for part in (*program.code.parts, program.code.whole):
            sizes = part.sizes
            figures = (part.files, part.lines.all, part.lines.code)
            loaded = (sizes.text, sizes.rodata, sizes.data, sizes.bss)
            label = f"{NAMES[name]}: {part.name}" + (f" ({part.over})" if part.over else "")
            rows.append((label, *map(_number, (*figures, *loaded))))
    columns = ("", "files", "lines", "code lines", "text", "rodata", "data", "bss")
    return Table("Code by component, and what it is there for", columns, tuple(rows))


def _sizes(result: Footprint) -> Table:
    rows = []
    for name, file in (("linux", "bzImage"), ("qemu", "qemu-system-x86_64")):
        program = result.programs[name]
        whole = program.code.whole.sizes.total
        shares = [
            f"{part.sizes.total:,} ({part.sizes.total / whole:.2%})"
            for part in (program.code.pci, program.code.mmio)
        ]
        figures = (program.file_size, program.loaded.total, whole)
        rows.append((f"{NAMES[name]} ({file})", *map(_number, figures), *shares))
    columns = ("", "file", "loaded, aligned", "its objects", "of these, PCI", "of these, MMIO")
    return Table("Size of the programs, in bytes", columns, tuple(rows))


def _boots(result: Footprint) -> Table:
    figures: dict[str, tuple[Callable[[BootSample], float], int]] = {
        "boot to SSH, s": (lambda one: one.boot_s, 2),
        "kernel of that, s": (lambda one: one.kernel_s, 2),
        "guest uptime then, s": (lambda one: one.guest_uptime_at_ssh_s, 2),
        "guest memory used, MiB": (lambda one: one.guest_used_kib / 1024, 1),
        "slab, MiB": (lambda one: one.guest_slab_kib / 1024, 1),
        "QEMU's PSS, MiB": (lambda one: one.qemu_pss_kib / 1024, 0),
    }
    rows = []
    for transport, samples in result.boots.items():
        row = [transport]
        for figure, digits in figures.values():
            values = [figure(one) for one in samples]
            shown = [f"{v:.{digits}f}" for v in (figure(median(samples)), min(values), max(values))]
            row.append(f"{shown[0]} ({shown[1]} to {shown[2]})")
        rows.append(tuple(row))
    runs = max(map(len, result.boots.values()))
    title = f"Boot and memory, medians of {runs} (least to largest)"
    return Table(title, ("transport", *figures), tuple(rows))


def _surfaces(result: Footprint) -> Table:
    surfaces = result.surfaces.values()
    names = {"pci": "PCI", "mmio": "virtio-mmio", "both": "rest of the machine"}
    figures: dict[str, Callable[[Area], int]] = {
        "regions": lambda area: area.regions,
        "bytes": lambda area: area.size,
        "registers": lambda area: area.registers,
        "words without a table": lambda area: area.words,
        "lines of QEMU behind": lambda area: area.code.all,
        "code lines of these": lambda area: area.code.code,
    }
    rows = []
    for over, name in names.items():
        areas = [surface.areas.get(over) for surface in surfaces]
        for what, figure in figures.items():
            values = [figure(area) if area else 0 for area in areas]
            if any(values):
                rows.append((f"{name}: {what}", *map(_number, values)))
    rows.append(("virtio devices", *(_number(surface.devices) for surface in surfaces)))
    rows.append(("PCI functions", *(_number(surface.functions) for surface in surfaces)))
    return Table("What a vCPU can reach in QEMU", ("", *result.surfaces), tuple(rows))


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
