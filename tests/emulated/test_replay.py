# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated devices and interrupt controllers against recordings of the real ones.

Each transport's recording has to be reproduced read by read and interrupt by interrupt; and a
model with a mistake in it must not get through.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qvis.emulated.devices import Block, Net
from qvis.emulated.ioapic import IoApic
from qvis.emulated.lapic import LocalApic
from qvis.emulated.messages import ApicBus
from qvis.emulated.mmio import MmioTransport
from qvis.emulated.pci import Bar, Msix, PciFunction
from qvis.emulated.virtio import Device
from qvis.emulated.virtqueue import Chain, Virtqueue
from qvis.emulated.vis import Storage
from qvis.transport import Transport

from .replay import RECORDINGS, UNCOMPARED, Mismatch, Replay, load, provenance

PHASES = ["interrupts", "mask", "pending", "move", "move pending", "unbind", "bind", "remove",
          "add", "control", "end"]  # fmt: skip
REQUESTS = 1000  # of the phase "interrupts"
PCI, INTX, MSI, VIS, VIS_DOORBELL = Transport


@pytest.mark.parametrize("transport", Transport)
def test_every_read_and_every_interrupt_is_the_recorded_one(transport: Transport) -> None:
    replay = Replay(transport)
    replay.run()
    kinds = Counter(step.kind for step in replay.steps)
    reads = kinds["read"] + kinds["load"] + kinds["port-read"]
    skipped = sum(step.name in UNCOMPARED for step in replay.steps if step.kind == "read")
    assert replay.compared == reads - skipped
    # Most loads are of what the guest knows: they show no more than that nobody wrote there.
    assert replay.found > 2 * REQUESTS
    assert replay.found < kinds["load"] / 3
    assert replay.raised == kinds["raise"]
    assert replay.delivered == kinds["deliver"]
    assert replay.uncompared == set(UNCOMPARED)  # a reason that is none hides something


@pytest.mark.parametrize("transport", Transport)
def test_a_recording_has_every_phase_and_what_it_is_about(transport: Transport) -> None:
    steps = load(transport)
    names = [step.name for step in steps if step.kind == "phase"]
    assert names == PHASES
    counts: Counter[tuple[str | None, str]] = Counter()
    phase: str | None = "boot"
    for step in steps:
        phase = step.name if step.kind == "phase" else phase
        counts[phase, step.kind] += 1
    assert counts["interrupts", "raise"] >= REQUESTS
    assert counts["interrupts", "deliver"] >= REQUESTS
    assert counts["interrupts", "store"] > REQUESTS
    assert counts["interrupts", "load"] > REQUESTS
    assert counts["pending", "raise"] >= 5
    assert counts["move pending", "raise"] >= 5
    for phase in ("boot", "bind", "add"):
        assert counts[phase, "write"] > 50, phase
    vcpus = {step.vcpu for step in steps if step.kind == "deliver"}
    assert vcpus == set(range(provenance(transport)["machine"]["smp"]))


@pytest.mark.parametrize("transport", Transport)
def test_a_recording_is_small_and_of_what_is_beside_it(transport: Transport) -> None:
    known = provenance(transport)
    assert known["rows"] == len(load(transport))
    assert (RECORDINGS / f"{transport}.parquet").stat().st_size < 300_000
    for name in ("phases.sh", "shared.c"):
        digest = hashlib.sha256((RECORDINGS / name).read_bytes()).hexdigest()
        assert digest.startswith(known[name]), f"{name} has changed: record anew"


# Mistakes, each with a transport on which it shows.

Patch = pytest.MonkeyPatch
MISTAKES: list[tuple[Transport, Callable[[Patch], None]]] = []


def shows_on(
    *transports: Transport,
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """The function makes a mistake in the model, which recordings of ``transports`` show."""

    def register(make: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MISTAKES.extend((transport, make) for transport in transports)
        return make

    return register


def nothing(*arguments: object, **named: object) -> None:
    """In place of a method that would do something."""


@shows_on(MSI)
def a_masked_vector_in_registers_does_not_pend(patch: Patch) -> None:
    original = MmioTransport._signal

    def signal(self: MmioTransport, vector: int) -> None:
        if vector < len(self._masked) and not self._masked[vector]:
            original(self, vector)

    patch.setattr(MmioTransport, "_signal", signal)


@shows_on(PCI)
def a_masked_vector_of_msix_does_not_pend(patch: Patch) -> None:
    original = Msix.notify

    def notify(self: Msix, vector: int) -> None:
        original(self, vector)
        self._pending = 0

    patch.setattr(Msix, "notify", notify)


@shows_on(VIS, VIS_DOORBELL)
def a_masked_vector_in_storage_does_not_pend(patch: Patch) -> None:
    original = Storage.fire

    def fire(self: Storage, vector: int) -> None:
        original(self, vector)
        if vector < self.vectors:
            self._pending[vector] = 0

    patch.setattr(Storage, "fire", fire)


@shows_on(VIS, VIS_DOORBELL)
def a_mask_in_storage_is_not_looked_at(patch: Patch) -> None:
    original = Storage.fire

    def fire(self: Storage, vector: int) -> None:
        if vector < self.vectors:
            mask, self._mask[vector] = self._mask[vector], 0
            original(self, vector)
            self._mask[vector] = mask

    patch.setattr(Storage, "fire", fire)


@shows_on(VIS_DOORBELL)
def a_doorbell_does_not_drop_the_copy(patch: Patch) -> None:
    patch.setattr(Storage, "update", nothing)


@shows_on(VIS)
def copies_are_kept_that_nobody_asked_for(patch: Patch) -> None:
    original = Storage.__init__

    def init(self: Storage, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **{**named, "keep_entries": True})

    patch.setattr(Storage, "__init__", init)


@shows_on(VIS)
def queues_begin_at_vector_zero(patch: Patch) -> None:
    original = MmioTransport._interrupt_vis

    def interrupt(self: MmioTransport, queue: int) -> None:
        original(self, queue - 1)

    patch.setattr(MmioTransport, "_interrupt_vis", interrupt)


@shows_on(MSI)
def a_message_that_is_written_to_a_vector_is_ignored(patch: Patch) -> None:
    patch.setitem(MmioTransport._WRITE, 0x0EC, nothing)


@shows_on(PCI)
def a_write_to_the_msix_table_is_ignored(patch: Patch) -> None:
    patch.setattr(Msix, "write_table", nothing)


@shows_on(PCI)
def a_vector_that_is_unmasked_does_not_send_what_pends(patch: Patch) -> None:
    original = Msix._update

    def update(self: Msix, vector: int) -> None:
        pending, self._pending = self._pending, 0
        original(self, vector)
        self._pending = pending

    patch.setattr(Msix, "_update", update)


@shows_on(PCI)
def bars_are_twice_as_large(patch: Patch) -> None:
    original = PciFunction.add_bar

    def add_bar(self: PciFunction, bar: Bar) -> None:
        bar.size *= 2
        original(self, bar)

    patch.setattr(PciFunction, "add_bar", add_bar)


@shows_on(INTX)
def interrupts_that_are_acknowledged_stay(patch: Patch) -> None:
    patch.setitem(MmioTransport._WRITE, 0x064, nothing)


@shows_on(INTX)
def remote_irr_is_stuck(patch: Patch) -> None:
    patch.setattr(IoApic, "eoi", nothing)


@shows_on(INTX)
def a_level_is_sent_as_an_edge(patch: Patch) -> None:
    original = LocalApic.accept
    patch.setattr(LocalApic, "accept", lambda self, vector, level: original(self, vector, False))


@shows_on(INTX)
def an_edge_is_sent_again_at_its_end(patch: Patch) -> None:
    original = LocalApic.accept
    patch.setattr(LocalApic, "accept", lambda self, vector, level: original(self, vector, True))


@shows_on(INTX)
def interrupts_are_not_suppressed(patch: Patch) -> None:
    patch.setattr(Virtqueue, "should_interrupt", lambda self: True)


@shows_on(MSI)
def the_driver_is_not_told_when_to_notify(patch: Patch) -> None:
    original = Virtqueue.pop

    def pop(self: Virtqueue) -> Chain | None:
        chain = original(self)
        if chain is None and self._used16 is not None:
            self._used16[2 + 4 * self.size] = 0
        return chain

    patch.setattr(Virtqueue, "pop", pop)


@shows_on(*Transport)
def a_used_buffer_has_another_length(patch: Patch) -> None:
    original = Virtqueue.push

    def push(self: Virtqueue, chain: Chain, written: int) -> None:
        original(self, chain, written + 1)

    patch.setattr(Virtqueue, "push", push)


@shows_on(*Transport)
def a_request_fails(patch: Patch) -> None:
    patch.setattr(Block, "_handle", lambda self, kind, sector, chain: Block.IOERR)


@shows_on(*Transport)
def a_control_command_is_refused(patch: Patch) -> None:
    patch.setattr(Net, "_command", lambda self, *command: False)


@shows_on(*Transport)
def one_completion_in_a_thousand_is_forgotten(patch: Patch) -> None:
    original, count = Device.complete, itertools.count(1)

    def complete(self: Device, queue: Virtqueue, chain: Chain, written: int) -> None:
        if next(count) % REQUESTS:
            original(self, queue, chain, written)

    patch.setattr(Device, "complete", complete)


@shows_on(*Transport)
def a_feature_is_missing(patch: Patch) -> None:
    patch.setattr(Block, "FLAGS", Block.FLAGS & ~(1 << 9))


@shows_on(*Transport)
def a_reset_leaves_the_status(patch: Patch) -> None:
    original = Device.reset

    def reset(self: Device) -> None:
        status = self.status
        original(self)
        self.status = status

    patch.setattr(Device, "reset", reset)


@shows_on(*Transport)
def an_eoi_leaves_the_vector_in_service(patch: Patch) -> None:
    patch.setattr(LocalApic, "eoi", lambda self: -1)


@shows_on(*Transport)
def the_lowest_vector_comes_first(patch: Patch) -> None:
    original = LocalApic.pending

    def pending(self: LocalApic) -> int:
        return (self.irr & -self.irr).bit_length() - 1 if original(self) >= 0 else -1

    patch.setattr(LocalApic, "pending", pending)


@shows_on(*Transport)
def a_message_goes_to_the_next_processor(patch: Patch) -> None:
    original = ApicBus.targets

    def targets(self: ApicBus, destination: int, logical: bool) -> Sequence[LocalApic]:
        apics = self.apics
        return [apics[apic.index - 1] for apic in original(self, destination, logical)]

    patch.setattr(ApicBus, "targets", targets)


@shows_on(*Transport)
def a_vector_that_is_taken_stays_pending(patch: Patch) -> None:
    original = LocalApic.acknowledge

    def acknowledge(self: LocalApic) -> int:
        irr = self.irr
        vector = original(self)
        self.irr = irr
        return vector

    patch.setattr(LocalApic, "acknowledge", acknowledge)


@pytest.mark.parametrize(
    ("transport", "make"), MISTAKES, ids=[f"{make.__name__}-{t}" for t, make in MISTAKES]
)
def test_a_mistake_does_not_get_through(
    transport: Transport, make: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    make(monkeypatch)
    with pytest.raises(Mismatch):
        Replay(transport).run()


def test_a_mismatch_is_told_with_what_led_there(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Block, "FLAGS", Block.FLAGS & ~(1 << 9))
    with pytest.raises(Mismatch, match=r"(?s)boot: the model reads 0x.*> \d+ vCPU . read blk0"):
        Replay(MSI).run()
