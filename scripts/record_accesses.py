# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings of what a real guest does to its devices, for the emulated machine's tests.

    python scripts/record_accesses.py [TRANSPORT ...]

For each transport a machine that counts instructions (``-icount``) runs
``tests/emulated/recordings/phases.sh`` from its first instruction to its shutdown. Three
recorders write what happens with the time of one clock: qvis's tracer (accesses to devices,
interrupts taken), QEMU's trace events (interrupts raised), and ``shared.c`` (memory). One host
thread runs all vCPUs, so the order of times is the order in which it happened.

Of memory that stays which a guest and a device share (``recorded_memory.py``). The rest, and
ports on which nothing of interrupts depends, is left out. How far two recordings are the same
is in ``tests/emulated/recordings/README.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
from recorded_memory import Row, merged, shared_memory

from qvis.backends import Job
from qvis.build import build_all, cache
from qvis.build.plugin import glib_flags
from qvis.errors import InfraError
from qvis.machine.machine import Script, run_script
from qvis.trace import simpletrace, tcg
from qvis.trace.attribution import attribute
from qvis.trace.devices import regions
from qvis.trace.model import Kind, Space
from qvis.trace.record import provenance
from qvis.trace.sources import CountsReader, TcgSource, prepare
from qvis.trace.store import Manifest
from qvis.trace.symbols import Symbols
from qvis.transport import Transport

PLACE = Path(__file__).parent.parent / "tests" / "emulated" / "recordings"
MACHINE: dict[str, Any] = {"smp": 4, "queues": 4, "memory": 512, "icount": True, "backend": "tcg"}
DEADLINE = 600.0  # seconds for the phases
QEMU_TRACE, SHARED = "qemu.trace", "shared.bin"
QEMU_EVENTS = ("apic_deliver_irq", "ioapic_eoi_broadcast", "x86_gsi_interrupt")
PIC = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)
"""The ports that stay. Others are a PIT's, an RTC's, the firmware's: their interrupts are
recorded as the lines that they are on, and nothing else of them is modelled."""
SERIAL = 0x3F8
DLAB = 0x80  # of a 16550A's line control register: the first two are a divisor
ANNOUNCED = b"qvis-phase: "
MODES = ("fixed", "lowest", "smi", "mode 3", "nmi", "init", "startup", "extint")
SYSTEM_VECTORS = {
    # arch/x86/include/asm/irq_vectors.h
    "sysvec_apic_timer_interrupt": 0xEC,
    "sysvec_irq_work": 0xF6,
    "sysvec_x86_platform_ipi": 0xF7,
    "sysvec_reboot": 0xF8,
    "sysvec_call_function_single": 0xFB,
    "sysvec_call_function": 0xFC,
    "sysvec_reschedule_ipi": 0xFD,
    "sysvec_error_interrupt": 0xFE,
    "sysvec_spurious_apic_interrupt": 0xFF,
}
KINDS = ("read", "write", "port-read", "port-write", "store", "load", "raise", "deliver", "eoi",
         "line", "function", "phase")  # fmt: skip
COLUMNS = {
    "vcpu": pl.UInt8(),
    "kind": pl.Enum(KINDS),
    "address": pl.UInt64(),
    "size": pl.UInt8(),
    "value": pl.UInt64(),
    "name": pl.String(),
}


# --- recording ---


def record(transport: Transport, raw: Path) -> Manifest:
    """Run the phases in a machine of ``transport``; everything recorded is in ``raw``."""
    artifacts = build_all()
    symbols = Symbols.read(artifacts.linux.vmlinux)
    library = raw / "libshared.so"
    subprocess.run(
        [cache.COMPILER, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter",
         "-Werror", "-shared", "-fPIC", "-I", artifacts.qemu.include, "-o", library,
         PLACE / "shared.c", *glib_flags()],
        check=True,
    )  # fmt: skip
    options = [word for name in QEMU_EVENTS for word in ("-trace", f"enable={name}")]
    options += ["-trace", f"file={raw / QEMU_TRACE}"]
    options += ["-plugin", f"file={library},output={raw / SHARED},ram={MACHINE['memory'] << 20}"]
    counts: list[CountsReader] = []
    script = Script(
        Job((PLACE / "phases.sh").read_text(), "true\n"),
        deadline=DEADLINE,
        qemu_options=tuple(options),
        prepare=lambda folder: prepare(folder, raw, symbols),
        started=lambda guest: counts.append(CountsReader(guest.folder.path)),
    )
    with run_script(script, transport=transport, **MACHINE) as guest:
        mapped = regions(guest.qmp)
        source = provenance(guest, TcgSource.reader, TcgSource.clock)
    counted = counts[0]()
    if counted.error or any(counted.dropped):
        raise InfraError(f"the tracer dropped events: {counted}")
    (raw / "counts.json").write_text(json.dumps(counted.recorded))
    return Manifest(source, str(transport), None, 0, 0.0, 0.0, regions=tuple(mapped))


def events(raw: Path, manifest: Manifest) -> list[Row]:
    """What the tracer and QEMU's trace events say, in order."""
    partial: list[str] = []
    counts = json.loads((raw / "counts.json").read_text())
    traced = pl.concat(attribute(tcg.frames(raw, counts, partial), manifest))
    rows = [*_accesses(traced), *_raised(raw, partial)]
    if partial:
        raise InfraError(f"the recording is not whole: {'; '.join(partial)}")
    return sorted(rows, key=lambda row: row.time)


def _accesses(traced: pl.DataFrame) -> Iterator[Row]:
    columns = ("time", "vcpu", "kind", "space", "address", "size", "write", "value", "vector",
               "function", "device", "register")  # fmt: skip
    line, divisor = b"", False
    for (time, vcpu, kind, space, address, size, write, value, vector, function, device,
         register) in traced.select(columns).iter_rows():  # fmt: skip
        if kind == Kind.FUNCTION:
            yield Row(time, vcpu, "function", None, None, None, function)
        elif kind == Kind.DELIVER:
            taken = vector if vector is not None else SYSTEM_VECTORS[function]
            yield Row(time, vcpu, "deliver", None, None, taken, function or "")
        elif space == Space.PORT:
            if address in PIC:
                way = "port-write" if write else "port-read"
                yield Row(time, vcpu, way, address, size, value, "PIC")
            elif address == SERIAL + 3 and write:
                divisor = bool(value & DLAB)
            elif address == SERIAL and write and not divisor:
                line += bytes([value])
                if value == ord("\n"):
                    if line.startswith(ANNOUNCED):
                        name = line.removeprefix(ANNOUNCED).decode().strip()
                        yield Row(time, None, "phase", None, None, None, name)
                    line = b""
        else:
            name = f"{device}.{register}"
            yield Row(time, vcpu, "write" if write else "read", address, size, value, name)


def _raised(raw: Path, partial: list[str]) -> Iterator[Row]:
    """What QEMU's interrupt controllers were told: of lines, only that they changed."""
    levels: dict[int, int] = {}
    found: list[tuple[int, str, list[int]]] = []
    for several in simpletrace.read(raw / QEMU_TRACE, partial):
        for each in several:
            times, arguments = each.time.tolist(), each.arguments.tolist()
            found += [(at, each.name, words) for at, words in zip(times, arguments, strict=True)]
    for time, name, words in sorted(found):
        if name == "apic_deliver_irq":
            destination, logical, mode, vector, level = words
            how = ("logical" if logical else "physical", MODES[mode & 7],
                   "level" if level else "edge")  # fmt: skip
            yield Row(time, None, "raise", destination, None, vector, " ".join(how))
        elif name == "ioapic_eoi_broadcast":
            yield Row(time, None, "eoi", None, None, words[0], "")
        elif name == "x86_gsi_interrupt" and levels.get(words[0], 0) != words[1]:
            levels[words[0]] = words[1]
            yield Row(time, None, "line", words[0], None, words[1], "")


# --- the fixture ---


def fixture(transport: Transport) -> None:
    """Record ``transport`` anew and write its two files."""
    with tempfile.TemporaryDirectory(prefix="qvis-accesses-") as folder:
        raw = Path(folder)
        manifest = record(transport, raw)
        rows = events(raw, manifest)
        memory = shared_memory(raw / SHARED, rows)
    rows = sorted([*rows, *memory], key=lambda row: row.time)
    while rows[-1].vcpu is None:
        rows.pop()  # QEMU ends, and takes the network card's link down
    if not any(row.name == "end" for row in rows):
        raise InfraError("the guest did not get to the end of its phases")
    if any(a.time == b.time and a.kind != b.kind for a, b in pairwise(rows)):
        raise InfraError("two events at one time: their order is not known; record again")
    rows = list(merged(rows))
    columns = {name: [row[n + 1] for row in rows] for n, name in enumerate(COLUMNS)}
    frame = pl.DataFrame(columns, schema=COLUMNS).with_row_index("step")
    frame.write_parquet(PLACE / f"{transport}.parquet", compression="zstd", compression_level=19)
    source = manifest.provenance
    known = {
        "transport": str(transport),
        "machine": MACHINE,
        "qemu": f"{source.qemu} ({source.qemu_series})",
        "linux": f"{source.linux} ({source.linux_series})",
        "accelerator": source.accelerator,
        "phases.sh": _digest(PLACE / "phases.sh"),
        "shared.c": _digest(PLACE / "shared.c"),
        "rows": len(frame),
        "regions": [
            {"device": r.device, "map": r.map, "start": r.start, "end": r.end}
            for r in manifest.regions
            if r.space == Space.MEMORY
        ],
    }
    (PLACE / f"{transport}.json").write_text(json.dumps(known, indent=1) + "\n")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("transports", nargs="*", type=Transport.parse, metavar="TRANSPORT")
    for transport in parser.parse_args().transports or Transport:
        fixture(transport)


if __name__ == "__main__":
    main()
