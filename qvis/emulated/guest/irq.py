# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupts as Linux keeps them: descriptors, flow, vectors and where they go.

Linux: kernel/irq/{chip,manage,migration,irqdesc,matrix}.c, arch/x86/kernel/apic/vector.c.
A vector is allocated when its interrupt is requested, on the CPU that has the most left of
those that the affinity allows, and there the lowest. When an interrupt moves, its old
vector is kept until the first one has arrived at the new place, and then given back by a
timer on the old CPU, unless one is still pending there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .apic import Vector

if TYPE_CHECKING:
    from ..vcpu import Vcpu
    from .chips import Chip
    from .kernel import Kernel

__all__ = ["Handler", "IrqDesc", "Irqs", "Vectors"]

Handler = Callable[["Vcpu", int], object]
"""What a driver requests an interrupt with: called with the CPU and the IRQ's number."""
VECTORS = 256
JIFFY = 10_000_000  # ns
ALLOWED = sum(
    1 << vector
    for vector in range(Vector.FIRST_EXTERNAL, Vector.FIRST_SYSTEM)
    if vector != Vector.SYSCALL
)


class Vectors:
    """Which vectors of which CPU are taken (kernel/irq/matrix.c)."""

    def __init__(self, cpus: int) -> None:
        self._used = [0] * cpus
        self._count = [0] * cpus

    def allocate(self, cpus: Iterable[int]) -> tuple[int, int]:
        """The CPU with the most vectors left and its lowest free one; OSError ENOSPC."""
        best, fewest = -1, VECTORS
        count = self._count
        for cpu in cpus:
            if count[cpu] < fewest:
                best, fewest = cpu, count[cpu]
                if not fewest:
                    break
        free = ALLOWED & ~self._used[best] if best >= 0 else 0
        if not free:
            raise OSError(errno.ENOSPC, "no vector left")
        lowest = free & -free
        self._used[best] |= lowest
        count[best] += 1
        return best, lowest.bit_length() - 1

    def free(self, cpu: int, vector: int) -> None:
        """Give one back."""
        self._used[cpu] &= ~(1 << vector)
        self._count[cpu] -= 1


class Irqs:
    """All of the guest's interrupts, and which of a CPU's vectors is whose."""

    def __init__(self, kernel: Kernel, first: int) -> None:
        self.kernel = kernel
        self.descs: dict[int, IrqDesc] = {}
        cpus = len(kernel.machine.vcpus)
        self.vectors = Vectors(cpus)
        self.entries: list[list[Callable[[Vcpu], None]]] = [
            [self._unexpected] * VECTORS for _ in range(cpus)
        ]
        self.spurious = 0
        """Interrupts that nobody had asked for, such as one that was freed meanwhile."""
        self._first = first
        self._cleanup: list[list[IrqDesc]] = [[] for _ in range(cpus)]

    def create(
        self, chip: Chip, affinity: frozenset[int] | None = None, managed: bool = False
    ) -> IrqDesc:
        """A descriptor with the lowest free number; without ``affinity`` all CPUs' will do."""
        number = self._first
        while number in self.descs:
            number += 1
        desc = IrqDesc(self, number, chip, affinity, managed)
        self.descs[number] = desc
        return desc

    def remove(self, desc: IrqDesc) -> None:
        """Its number may be another one's now."""
        self.descs.pop(desc.number, None)

    def _unexpected(self, vcpu: Vcpu) -> None:
        self.spurious += 1
        vcpu.eoi()

    def place(self, desc: IrqDesc, cpu: int, vector: int) -> None:
        """``vector`` of ``cpu`` is ``desc``'s."""
        self.entries[cpu][vector] = desc.entry

    def release(self, cpu: int, vector: int) -> None:
        """It is nobody's."""
        self.entries[cpu][vector] = self._unexpected
        self.vectors.free(cpu, vector)

    def schedule_cleanup(self, vcpu: Vcpu, desc: IrqDesc) -> None:
        """``desc`` has arrived: let its old CPU free the old vector, in a jiffy."""
        old = self._cleanup[desc.prev_cpu]
        old.append(desc)
        if len(old) == 1:
            self._arm(vcpu, desc.prev_cpu)

    def _arm(self, vcpu: Vcpu, cpu: int) -> None:
        now = self.kernel.now(vcpu)
        due = now - now % JIFFY + JIFFY
        other = self.kernel.machine.vcpus[cpu]
        self.kernel.timers.add_on(vcpu, other, due, self._clean)

    def _clean(self, vcpu: Vcpu) -> None:
        waiting = self._cleanup[vcpu.index]
        again = []
        for desc in waiting:
            if self.kernel.apic.pending(vcpu, desc.prev_vector):
                again.append(desc)
            else:
                desc.forget_previous()
        self._cleanup[vcpu.index] = again
        if again:
            self._arm(vcpu, vcpu.index)

    def cancel_cleanup(self, desc: IrqDesc) -> None:
        """``desc`` frees its old vector itself."""
        waiting = self._cleanup[desc.prev_cpu]
        if desc in waiting:
            waiting.remove(desc)


class IrqDesc:
    """One interrupt of the guest."""

    __slots__ = (
        "_by_memory",
        "_irqs",
        "actions",
        "activated",
        "affinity",
        "cleanup_pending",
        "counts",
        "cpu",
        "effective",
        "entry",
        "handlers",
        "hardware",
        "managed",
        "masked",
        "move_in_progress",
        "number",
        "pending",
        "prev_cpu",
        "prev_vector",
        "started",
        "unsettled",
        "vector",
    )

    def __init__(
        self,
        irqs: Irqs,
        number: int,
        hardware: Chip,
        affinity: frozenset[int] | None,
        managed: bool,
    ) -> None:
        self._irqs = irqs
        self._by_memory = not irqs.kernel.apic.deadline
        self.number = number
        self.hardware = hardware
        self.actions: list[str] = []
        """Names of those who requested it, as in the last column of /proc/interrupts."""
        self.handlers: list[Handler] = []
        self.counts = [0] * len(irqs.entries)
        self.affinity: frozenset[int] = affinity or irqs.kernel.online
        self.effective: frozenset[int] = frozenset()
        self.vector = 0
        self.cpu = 0
        self.managed = managed
        self.masked = True
        self.activated = False
        self.started = False
        self.pending: frozenset[int] | None = None
        """An affinity that is to take effect with the next interrupt."""
        self.move_in_progress = False
        """It moved, and nothing has arrived at the new place yet."""
        self.cleanup_pending = False
        self.prev_vector = 0
        self.prev_cpu = 0
        self.unsettled = False
        """``pending`` or ``move_in_progress``: an acknowledgement has more to do."""
        self.entry: Callable[[Vcpu], None] = self._edge if hardware.edge else self._level
        hardware.desc = self

    @property
    def chip(self) -> str:
        """Controller, number there and flow, as in /proc/interrupts but for the spaces."""
        chip = self.hardware
        return f"{chip.name} {chip.hwirq}-{'edge' if chip.edge else 'fasteoi'}"

    # What drivers do

    def request(self, vcpu: Vcpu, name: str, handler: Handler) -> None:
        """``request_irq()``; raises OSError when no vector is left."""
        if not self.handlers:
            self._start(vcpu)
        self.actions.append(name)
        self.handlers.append(handler)

    def _start(self, vcpu: Vcpu) -> None:
        self._assign(self.affinity & self._irqs.kernel.online or self._irqs.kernel.online)
        self.activated = True
        hardware = self.hardware
        hardware.activate(vcpu)
        hardware.set_affinity(vcpu, self.affinity)
        self.started = True
        self.masked = False
        hardware.startup(vcpu)

    def free(self, vcpu: Vcpu, name: str) -> None:
        """``free_irq()``."""
        at = self.actions.index(name)
        del self.actions[at], self.handlers[at]
        if self.handlers:
            return
        hardware = self.hardware
        self.started = False
        if not self.masked:
            self.masked = True
            hardware.mask(vcpu)
        hardware.synchronize(vcpu)
        hardware.deactivate(vcpu)
        self.activated = False
        self._release()

    def _release(self) -> None:
        if self.vector:
            self._irqs.release(self.cpu, self.vector)
            self.vector = 0
        if self.prev_vector:
            self._irqs.cancel_cleanup(self)
            self.forget_previous()
        self.move_in_progress = False
        self.pending = None
        self.unsettled = False

    def forget_previous(self) -> None:
        """Nothing more comes by the old vector."""
        self._irqs.release(self.prev_cpu, self.prev_vector)
        self.prev_vector = 0
        self.cleanup_pending = False

    # What users do

    def mask(self, vcpu: Vcpu) -> None:
        """As debugfs does; OSError EOPNOTSUPP or EBUSY as there."""
        self._maskable(masked=False)
        self.masked = True
        self.hardware.mask(vcpu)

    def unmask(self, vcpu: Vcpu) -> None:
        """Likewise."""
        self._maskable(masked=True)
        self.masked = False
        self.hardware.unmask(vcpu)

    def _maskable(self, *, masked: bool) -> None:
        if not self.activated:
            raise OSError(errno.EOPNOTSUPP, "Not supported")
        if not self.started or self.masked is not masked:
            raise OSError(errno.EBUSY, "Device or resource busy")

    def set_affinity(self, vcpu: Vcpu, cpus: Iterable[int]) -> None:
        """What writing smp_affinity does: OSError EIO if it is managed, EINVAL if no CPU
        of ``cpus`` is online."""
        if self.managed:
            raise OSError(errno.EIO, "Input/output error")
        wanted = frozenset(cpus)
        if not wanted & self._irqs.kernel.online:
            raise OSError(errno.EINVAL, "Invalid argument")
        if not self.activated:
            self.affinity = wanted
            return
        if self.hardware.moves_in_interrupt or self.pending is not None:
            self._defer(wanted)
            return
        self._move(vcpu, wanted)

    def _defer(self, wanted: frozenset[int]) -> None:
        self.pending = wanted
        self.unsettled = True

    def _move(self, vcpu: Vcpu, wanted: frozenset[int]) -> None:
        try:
            self.hardware.set_affinity(vcpu, wanted)
        except BlockingIOError:
            self._defer(wanted)
            return
        self.affinity = wanted

    def assign(self, wanted: frozenset[int]) -> None:
        """``apic_set_affinity()``: a vector on one of ``wanted``, another than now only if
        it has to be. Raises BlockingIOError while the last move is not over, and OSError."""
        online = wanted & self._irqs.kernel.online
        if self.vector and self.cpu in online:
            return
        if self.move_in_progress or self.cleanup_pending:
            raise BlockingIOError
        self._assign(online)

    def _assign(self, cpus: frozenset[int]) -> None:
        irqs = self._irqs
        order = irqs.kernel.cpus if len(cpus) == len(irqs.kernel.cpus) else sorted(cpus)
        cpu, vector = irqs.vectors.allocate(order)
        if self.vector:
            self.prev_cpu, self.prev_vector = self.cpu, self.vector
            self.move_in_progress = True
            self.unsettled = True
        self.cpu, self.vector = cpu, vector
        self.effective = frozenset({cpu})
        irqs.place(self, cpu, vector)

    # Flow

    def _edge(self, vcpu: Vcpu) -> None:
        """``handle_edge_irq()`` with ``apic_ack_edge()``."""
        self.counts[vcpu.index] += 1
        vcpu.enter("apic_ack_edge")
        if self.unsettled:
            self._settle(vcpu)
        if self._by_memory:
            vcpu.enter("native_apic_mem_eoi")
        vcpu.eoi()
        for handler in self.handlers:
            handler(vcpu, self.number)

    def _settle(self, vcpu: Vcpu) -> None:
        """``irq_complete_move()`` and ``irq_move_irq()``."""
        self._arrived(vcpu)
        if self.pending is not None and self.started:
            hardware = self.hardware
            if not self.masked:
                hardware.mask(vcpu)
            self._move_pending(vcpu)
            if not self.masked:
                hardware.unmask(vcpu)

    def _arrived(self, vcpu: Vcpu) -> None:
        if self.move_in_progress and vcpu.index == self.cpu:
            self.move_in_progress = False
            self.cleanup_pending = True
            self.unsettled = self.pending is not None
            self._irqs.schedule_cleanup(vcpu, self)

    def _move_pending(self, vcpu: Vcpu) -> None:
        wanted = self.pending
        assert wanted is not None
        self.pending = None
        self._move(vcpu, wanted)
        self.unsettled = self.pending is not None or self.move_in_progress

    def _level(self, vcpu: Vcpu) -> None:
        """``handle_fasteoi_irq()`` with ``ioapic_ack_level()``."""
        self.counts[vcpu.index] += 1
        for handler in self.handlers:
            handler(vcpu, self.number)
        vcpu.enter("ioapic_ack_level")
        hardware = self.hardware
        self._arrived(vcpu)
        moves = self.pending is not None
        if moves and not self.masked:
            hardware.mask(vcpu)
        by_level = self._irqs.kernel.apic.level(vcpu, self.vector)
        if self._by_memory:
            vcpu.enter("native_apic_mem_eoi")
        vcpu.eoi()
        if not by_level:
            hardware.force_eoi(vcpu)
        if moves:
            if not hardware.in_service(vcpu):
                self._move_pending(vcpu)
            if not self.masked:
                hardware.unmask(vcpu)
