# SPDX-License-Identifier: GPL-2.0-or-later
"""What a real guest did, done once more to the emulated devices and interrupt controllers.

:func:`load` has a recording (``recordings/README.md``), :class:`Replay` goes through one. What
the guest did is given to the model: its writes, its stores to memory, the vectors that it took.
So is what came from elsewhere: the lines of devices that are not modelled, and the expiry of
local timers, which shows when a vCPU takes the timer's vector. All else is compared: what each
read returns, and each line that virtio devices drive, each message that reaches the local APICs
and each EOI that the IOAPICs hear of, at the step where QEMU had it, and no other.
"""

from __future__ import annotations

import functools
import json
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from qvis.emulated.devices import Block, Net
from qvis.emulated.events import Events
from qvis.emulated.ioapic import IoApic
from qvis.emulated.lapic import LocalApic
from qvis.emulated.memory import Memory
from qvis.emulated.messages import ApicBus
from qvis.emulated.mmio import MmioTransport
from qvis.emulated.pci import PciBus
from qvis.emulated.pic import PicPair
from qvis.emulated.virtio_pci import VirtioPci
from qvis.transport import VECTORS, Transport

__all__ = [
    "DEVICE_VECTORS",
    "RECORDINGS",
    "UNCOMPARED",
    "Mismatch",
    "Replay",
    "Step",
    "load",
    "provenance",
]

RECORDINGS = Path(__file__).parent / "recordings"
UNCOMPARED = {
    "LAPIC.TimerCurrent": "counts down with time, which the recording does not have",
}
"""Registers whose reads are not compared, and why."""

LOCAL_APIC, IOAPICS = range(0xFEE00000, 0xFEE01000), (0xFEC00000, 0xFEC10000)
SLOTS, SLOT_SIZE, SLOT_COUNT, FIRST_SLOT_LINE = 0xFEB00000, 0x200, 24, 24
ECAM = range(0xE0000000, 0xF0000000)
LVT_TIMER, LVT_MASKED = 0x320, 1 << 16
DEVICE_VECTORS = range(0x20, 0xEB)
PIT_LINE, PIT_PIN = 0, 2  # ACPI's interrupt source override, wired
PICS_LINES = 16


class Step(NamedTuple):
    """One row of a recording."""

    step: int
    vcpu: int | None
    kind: str
    address: int | None
    size: int | None
    value: int | None
    name: str | None


class Mismatch(AssertionError):  # noqa: N818 - what it is called where it is expected
    """The model did something else than QEMU."""


@functools.cache
def load(transport: Transport) -> tuple[Step, ...]:
    """The recording of ``transport``, in order."""
    frame = pl.read_parquet(RECORDINGS / f"{transport}.parquet")
    return tuple(Step(*row) for row in frame.iter_rows())


def provenance(transport: Transport) -> dict[str, Any]:
    """What the recording of ``transport`` is of."""
    found: dict[str, Any] = json.loads((RECORDINGS / f"{transport}.json").read_text())
    return found


class _Bus(ApicBus):
    """A bus that keeps what passes it, but IPIs: what becomes of them is seen in what is taken."""

    def __init__(self, seen: deque[tuple[object, ...]]) -> None:
        super().__init__()
        self._seen = seen

    def msi(self, address: int, data: int) -> int:
        logical = "logical" if address & 4 else "physical"
        mode = ("fixed", "lowest", "smi", "mode 3", "nmi", "init", "startup", "extint")
        how = f"{logical} {mode[data >> 8 & 7]} {'level' if data & 0x8000 else 'edge'}"
        self._seen.append(("raise", address >> 12 & 0xFF, data & 0xFF, how))
        return super().msi(address, data)

    def eoi(self, vector: int) -> None:
        self._seen.append(("eoi", None, vector, None))
        super().eoi(vector)


class Replay:
    """The machine that was recorded, as far as interrupts go; :meth:`run` goes through it."""

    def __init__(self, transport: Transport) -> None:
        self.steps = load(transport)
        self.compared = 0
        """Reads that returned what they should."""
        self.found = 0
        """Loads among them of what a device had written since the guest last knew."""
        self.raised = 0
        """Messages that were raised where they should be."""
        self.delivered = 0
        """Vectors that were taken as they should be."""
        self.uncompared: set[str] = set()
        """What of :data:`UNCOMPARED` was met."""
        machine = provenance(transport)["machine"]
        self._seen: deque[tuple[object, ...]] = deque()
        self._phase = "boot"
        self._levels: dict[int, bool] = {}
        self._known: dict[int, int] = {}  # what the guest stored or loaded last, by byte
        self.memory = Memory(machine["memory"] << 20)
        self.bus = _Bus(self._seen)
        # Nobody runs its events: a local timer expires when the recording says so.
        time = Events()
        self.apics = [LocalApic(index, self.bus, time) for index in range(machine["smp"])]
        self.ioapics = [IoApic(self.bus) for _ in IOAPICS]
        self.pic = self.bus.pic = PicPair()
        self.pic.intr = functools.partial(self.apics[0].lint, 0)
        self.events = Events()
        self.devices = [
            Block(self.events, self.memory, size=0, num_queues=machine["queues"]),
            Net(self.events, self.memory),
        ]
        self.pci: PciBus | None = None
        self._slots: dict[int, MmioTransport] = {}
        self._lines: set[int] = set()  # that virtio devices drive
        if transport is Transport.PCI:
            self.pci = PciBus()
            for number, device in enumerate(self.devices):
                self.pci.add(VirtioPci(device, self.bus.msi), PciBus.place(number))
        else:
            self._plug(transport, machine["queues"])

    def _plug(self, transport: Transport, queues: int) -> None:
        for number, device in enumerate(self.devices):
            slot = SLOT_COUNT - 1 - number
            line = FIRST_SLOT_LINE + slot
            self._lines.add(line)
            self._slots[slot] = MmioTransport(
                device,
                self.memory,
                functools.partial(self._drive, line),
                self.bus.msi,
                vectors=max(VECTORS, queues + 1) if transport.vector_per_queue else 0,
                msi_feature=transport.vector_per_queue,  # also where VIS is what the driver takes
                vis=transport.storage,
                cache_entries=transport is Transport.VIS_DOORBELL,
            )

    def run(self) -> None:
        """Go through all of it; :class:`Mismatch` where the model differs."""
        for step in self.steps:
            kind = step.kind
            if kind in ("raise", "eoi") or (kind == "line" and step.address in self._lines):
                self._expect(step)
            elif kind == "phase":
                self._phase = step.name or ""
            elif kind != "function":
                self._nothing_more(step)
                self._do(step)
        self._nothing_more(self.steps[-1])
        for apic in self.apics:
            left = [vector for vector in DEVICE_VECTORS if apic.irr >> vector & 1]
            if left:
                raise self._mismatch(self.steps[-1], f"vectors {left} were never taken")

    def _do(self, step: Step) -> None:
        match step.kind:
            case "read":
                self._compare(step, self._read(step))
            case "write":
                self._write(step)
            case "port-read":
                self._compare(step, self.pic.inp(step.address or 0))
            case "port-write":
                self.pic.outp(step.address or 0, step.value or 0)
            case "store":
                assert step.address is not None and step.size and step.value is not None
                self.memory.write(step.address, step.value.to_bytes(step.size, "little"))
                self._know(step)
            case "load":
                assert step.address is not None and step.size
                data = self.memory.read(step.address, step.size)
                self._compare(step, int.from_bytes(data, "little"))
                self.found += self._know(step)
            case "line":
                assert step.address is not None
                self._external(step.address, bool(step.value))
            case "deliver":
                self._take(step)
            case kind:
                raise ValueError(f"a recording with {kind!r}")
        self.events.run()

    # What a vCPU reaches.

    def _place(self, step: Step) -> tuple[Any, int]:
        """What answers, and the offset there."""
        address = step.address
        assert address is not None and step.vcpu is not None
        if address in LOCAL_APIC:
            return self.apics[step.vcpu], address - LOCAL_APIC.start
        for start, ioapic in zip(IOAPICS, self.ioapics, strict=True):
            if start <= address < start + 0x1000:
                return ioapic, address - start
        slot, offset = divmod(address - SLOTS, SLOT_SIZE)
        if slot in self._slots:
            return self._slots[slot], offset
        if self.pci and address in ECAM:
            return self.pci, address - ECAM.start
        bar = self.pci.find(address) if self.pci else None
        if bar is None or bar.start is None:
            raise self._mismatch(step, "the model has nothing there")
        return bar, address - bar.start

    def _read(self, step: Step) -> int:
        place, offset = self._place(step)
        found: int = place.read(offset) if place in self.apics else place.read(offset, step.size)
        return found

    def _write(self, step: Step) -> None:
        place, offset = self._place(step)
        if place in self.apics:
            place.write(offset, step.value)
        else:
            place.write(offset, step.size, step.value)

    def _know(self, step: Step) -> bool:
        """The guest knows these bytes now; whether it had known others, or zeros."""
        assert step.address is not None and step.size and step.value is not None
        data = dict(enumerate(step.value.to_bytes(step.size, "little"), start=step.address))
        new = any(self._known.get(at, 0) != byte for at, byte in data.items())
        self._known.update(data)
        return new

    def _compare(self, step: Step, value: int) -> None:
        if step.name in UNCOMPARED:
            self.uncompared.add(step.name)
        elif value != step.value:
            raise self._mismatch(step, f"the model reads {value:#x}")
        else:
            self.compared += 1

    # Interrupts.

    def _drive(self, line: int, level: bool) -> None:
        """A virtio device drives its line."""
        if self._levels.get(line, False) != level:
            self._levels[line] = level
            self._seen.append(("line", line, int(level), None))
            self._wire(line, level)

    def _external(self, line: int, level: bool) -> None:
        """A device that is not modelled does."""
        if line < PICS_LINES:
            self.pic.set_line(line, level)
        self._wire(PIT_PIN if line == PIT_LINE else line, level)

    def _wire(self, line: int, level: bool) -> None:
        number, pin = divmod(line, 24)
        self.ioapics[number].set_line(pin, level)

    def _expect(self, step: Step) -> None:
        """QEMU did this at this step: so must the model have, in answer to what came before."""
        how = step.name if step.kind == "raise" else None
        expected = (step.kind, step.address, step.value, how)
        if not self._seen:
            raise self._mismatch(step, "the model does nothing of the kind")
        if self._seen[0] != expected:
            raise self._mismatch(step, f"the model's is {self._seen[0]}")
        self._seen.popleft()
        self.raised += step.kind == "raise"

    def _nothing_more(self, step: Step) -> None:
        if self._seen:
            raise self._mismatch(step, f"before it the model does what QEMU did not: {self._seen}")

    def _take(self, step: Step) -> None:
        """A vCPU took a vector: it must be the one that its local APIC would give it now."""
        assert step.vcpu is not None and step.value is not None
        apic, vector = self.apics[step.vcpu], step.value
        entry = apic.read(LVT_TIMER)
        if entry & 0xFF == vector and not entry & LVT_MASKED and not apic.irr >> vector & 1:
            apic.accept(vector, False)
        if apic.pending() != vector:
            raise self._mismatch(step, f"the model's local APIC has {apic.pending()} to take")
        taken = apic.acknowledge()
        if taken != vector:
            raise self._mismatch(step, f"the model's local APIC gives {taken}")
        self.delivered += 1

    def _mismatch(self, step: Step, what: str) -> Mismatch:
        """With what led there, or a number alone would be all there is to go by."""
        before = self.steps[max(0, step.step - 12) : step.step]
        context = "\n".join(f"  {_line(each)}" for each in before)
        return Mismatch(f"{self._phase}: {what}, where QEMU has\n{context}\n> {_line(step)}")


def _line(step: Step) -> str:
    address = f" {step.address:#x}" if step.address is not None else ""
    value = f" = {step.value:#x}" if step.value is not None else ""
    where = f" vCPU {step.vcpu}" if step.vcpu is not None else ""
    return f"{step.step}{where} {step.kind} {step.name or ''}{address}{value}"
