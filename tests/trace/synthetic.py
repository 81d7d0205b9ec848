# SPDX-License-Identifier: GPL-2.0-or-later
"""Traces that nobody recorded, whose every number is known beforehand.

A virtio-blk with ``queues`` queues (``blk0``) completes requests; queue q
belongs to CPU q, except over ``intx``, whose line goes to CPU 0. Each tenth
interrupt is of a network card (``net0``) with one queue, on CPU 0. Interrupt i
is raised at ``START + i * SPACING`` plus what :func:`pause` says, and costs

==========  =====================================================
to deliver  ``700 + i % 7 * 100`` ns after the raise
to handler  ``300 + i % 10 * 10`` units of the clock after deliver
to EOI      120 (edges), 900 + ``i % 10 * 10`` (the line)
==========  =====================================================

One unit of the clock is one nanosecond of time; on KVM two TSC cycles are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from qvis.trace.model import SCHEMA, Cause, Clock, Kind, Space
from qvis.trace.store import Irq, Manifest, Provenance, Region, Trace

START = 5_000_000_000_000  # ns: hosts have been up for a while
SPACING = 20_000  # ns between two raises
SETUP = 20  # accesses to configure the device, before the first interrupt
IRQS = {"blk0": 57, "net0": 70}  # of the first queue
MMIO = {"blk0": 0xFEB00000, "net0": 0xFEB00200}
LAPIC = 0xFEE00000
TIMER = "sysvec_apic_timer_interrupt"


def provenance(transport: str = "msi", *, kvm: bool = False, **changes: Any) -> Provenance:
    """Of a machine that does not exist."""
    fields: dict[str, Any] = {
        "reader": "kvm-tracepoints" if kvm else "tcg-plugin",
        "clock": Clock.TSC if kvm else Clock.INSTRUCTIONS,
        "backend": "kvm" if kvm else "tcg",
        "accelerator": "kvm" if kvm else "tcg,thread=multi",
        "qemu": "10.2.2",
        "qemu_series": "3f1d0a55b2c94e10",
        "linux": "6.12.107",
        "linux_series": "9c0e51d6a7f2438b",
        "host": "AMD EPYC 7B13, Linux 6.18.44",
        "machine": "5d1b2c90",
        "memory": 512,
        "transport": transport,
        "smp": 4,
        "queues": 4,
    }
    return Provenance(**{**fields, **changes})


def make(
    folder: Path,
    transport: str = "msi",
    *,
    interrupts: int = 1000,
    kvm: bool = False,
    parts: int = 2,
    partial: tuple[str, ...] = (),
    lost: int = 0,
    clock: bool = True,
) -> Trace:
    """A trace with that many interrupts, in as many files; without clocks if not ``clock``."""
    frame = events(transport, interrupts, kvm=kvm, queues=4)
    if not clock:
        frame = frame.with_columns(pl.lit(None, pl.UInt64).alias("clock"))
    return store(
        folder, frame, provenance(transport, kvm=kvm), parts=parts, partial=partial, lost=lost
    )


def store(
    folder: Path,
    frame: pl.DataFrame,
    source: Provenance,
    *,
    parts: int = 1,
    partial: tuple[str, ...] = (),
    lost: int = 0,
) -> Trace:
    """``frame`` as a trace in ``folder``."""
    (folder / "events").mkdir(parents=True)
    rows = max(1, -(-frame.height // parts))
    for number, part in enumerate(frame.iter_slices(rows)):
        part.write_parquet(folder / "events" / f"{number:06}.parquet", row_group_size=100_000)
    times = frame["time"]
    seconds = (times[-1] - times[0]) / 1e9 if frame.height else 0.0
    manifest = Manifest(
        provenance=source,
        machine="vm1",
        command="qvis-load /dev/vda 0 1000",
        status=0,
        started=1_790_000_000.0,
        seconds=seconds,
        events=frame.height,
        lost=lost,
        partial=partial,
        regions=tuple(
            Region(device, "virtio-mmio", Space.MEMORY, start, start + 0x200)
            for device, start in MMIO.items()
        ),
        irqs=tuple(Irq(irq, device, "req.0") for device, irq in IRQS.items()),
    )
    trace = Trace(folder, manifest)
    trace.write_manifest()
    return trace


def pause(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Extra ns before these interrupts: a long pause after each burst of 200."""
    return numbers // 200 * 1_500_000


def owner(numbers: np.ndarray[Any, Any], queues: int) -> tuple[Any, Any]:
    """Device and queue of these interrupts."""
    net = numbers % 10 == 9
    return np.where(net, "net0", "blk0"), np.where(net, 0, numbers % queues)


def events(transport: str, interrupts: int, *, kvm: bool, queues: int) -> pl.DataFrame:
    """The rows of a trace, in order of time."""
    numbers = np.arange(interrupts)
    device, queue = owner(numbers, queues)
    line = transport == "intx"
    cpu = np.where(device == "net0", 0, np.zeros_like(queue) if line else queue)
    raised = START + numbers * SPACING + pause(numbers)
    delivered = raised + 700 + numbers % 7 * 100
    late = numbers % 10 * 10
    slot = np.where(device == "blk0", "req.", "input.")
    source = np.where(line, "", np.char.add(slot, queue.astype(str)))
    irq = np.where(device == "blk0", IRQS["blk0"], IRQS["net0"]) + (0 if line else queue)
    base = np.where(device == "blk0", MMIO["blk0"], MMIO["net0"])
    tied = {"interrupt": numbers + 1, "irq": irq, "source": source}
    vector = {"vector": 34 + irq % 16}

    frames = [
        step(delivered, cpu, Kind.DELIVER, device=device, pc=0xFFFFFFFF81A01234, **tied, **vector)
    ]

    def add(time: Any, kind: Kind, **columns: Any) -> None:
        frames.append(step(time, cpu, kind, **columns))

    def touch(
        time: Any, register: str, cause: Cause, offset: int, write: bool, **more: Any
    ) -> None:
        columns: dict[str, Any] = {
            "device": device,
            "register": register,
            "cause": cause,
            "address": base + offset,
            "space": Space.MEMORY,
            "size": 4,
            "write": write,
            "pc": 0xFFFFFFFF81450010 + offset,
            **more,
        }
        if kvm:
            columns |= {"reason": "EPT_MISCONFIG", "duration": 2400 + numbers % 5 * 100}
        add(time, Kind.EXIT if kvm else Kind.ACCESS, **columns)

    handler = delivered + 300 + late
    eoi = delivered + (900 + late if line else 120)
    acknowledged = eoi - 20
    ack = "ioapic_ack_level" if line else "apic_ack_edge"
    add(acknowledged, Kind.FUNCTION, function=ack, value=irq, device=device, **tied)
    frames.append(
        step(raised, None, Kind.RAISE, device=device, **tied, **vector).with_columns(
            pl.lit(None, pl.UInt64).alias("clock")
        )
    )
    touch(raised - 4000, "QueueNotify", Cause.NOTIFY, 0x50, True, value=queue)
    if line:
        add(handler, Kind.FUNCTION, function="vm_interrupt", value=irq, device=device, **tied)
        touch(handler + 80, "InterruptStatus", Cause.STATUS, 0x60, False, value=1, **tied)
        touch(handler + 120, "InterruptACK", Cause.ACKNOWLEDGE, 0x64, True, value=1, **tied)
        add(handler + 200, Kind.FUNCTION, function="vring_interrupt", value=irq, **tied)
    else:
        add(handler, Kind.FUNCTION, function="vring_interrupt", value=irq, device=device, **tied)
    lapic = {"device": "LAPIC", "space": Space.MEMORY, "size": 4, "write": True}
    if kvm:
        add(eoi, Kind.EOI, device="LAPIC", **tied, **vector)
        halted = {"reason": "HLT", "duration": 9000}
        add(eoi + 2500, Kind.EXIT, **halted)
    else:
        end = {"register": "EOI", "cause": Cause.EOI, "address": LAPIC + 0xB0, "value": 0}
        add(eoi, Kind.ACCESS, **end, **lapic, **tied)
        if line:
            add(eoi + 5, Kind.EOI, device="IOAPIC", **tied, **vector)

    ticks = START + np.arange(-(-interrupts // 100)) * SPACING * 100 + 11_000
    tick_cpu = np.arange(ticks.size) % 4
    timer = {"register": "TMICT", "cause": Cause.TIMER, "address": LAPIC + 0x380}
    kind = Kind.EXIT if kvm else Kind.ACCESS
    frames += [
        step(ticks, tick_cpu, Kind.DELIVER, function=TIMER, pc=0xFFFFFFFF81002222),
        step(ticks + 300, tick_cpu, kind, **timer, **lapic),
        step(ticks + 400, tick_cpu, kind, address=0xC000, space=Space.PORT, cause=Cause.OTHER),
    ]
    setup = START - 1_000_000 + np.arange(SETUP if interrupts else 0) * 1000
    virtio = {"device": "blk0", "address": MMIO["blk0"] + 0x70, "write": True, "size": 4}
    frames.append(
        step(setup, np.zeros_like(setup), kind, register="Status", cause=Cause.SETUP, **virtio)
    )
    frame = pl.concat(frames).sort("time", maintain_order=True)
    if kvm:
        frame = frame.with_columns(pl.col("clock") * 2)
    return frame


def step(time: Any, cpu: Any, kind: Kind, **columns: Any) -> pl.DataFrame:
    """One row of that kind at each time; columns are arrays as long, or one value for all."""
    time = np.asarray(time)
    own: dict[str, Any] = {"time": time, "kind": str(kind), **columns}
    if cpu is not None:
        # Each CPU counts on its own: their clocks must never be compared.
        own |= {"vcpu": cpu, "clock": time - START + 2_000_000 + np.asarray(cpu) * 7_000_000}
    filled = {
        name: pl.Series(name, value)
        if isinstance(value, np.ndarray)
        else pl.repeat(value, time.size, eager=True).alias(name)
        for name in SCHEMA
        if (value := own.get(name)) is not None
    }
    frame = pl.DataFrame(filled)
    missing = [pl.lit(None).alias(name) for name in SCHEMA if name not in filled]
    return frame.with_columns(missing).select(SCHEMA.names()).cast(SCHEMA)
