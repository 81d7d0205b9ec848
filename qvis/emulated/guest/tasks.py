# SPDX-License-Identifier: GPL-2.0-or-later
"""What runs in the guest: tasks, what they wait for, and the timers that wake them.

A task is a generator. It yields what it waits for and is sent the value with which that
was woken; between two yields it runs on its CPU without being disturbed.

    Wait        until somebody wakes it
    Pin(cpu)    goes on on that CPU
    None        lets others run

To wake a task whose CPU is another one takes an interrupt between processors, as in Linux
(``ttwu_queue()``, kernel/sched/core.c). A CPU with nothing to do has no tick; a timer that
is due programs its local APIC for that (kernel/time/tick-sched.c).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from .apic import Vector

if TYPE_CHECKING:
    from ..vcpu import Vcpu
    from .kernel import Kernel

__all__ = ["Pin", "Scheduler", "Step", "Task", "Timers", "Wait", "Work"]

CYCLES_PER_NS = 2
CRASHED = 139  # as after a segmentation fault
YIELDED = 2_000  # cycles that a task uses at least before it lets others run


class Wait:
    """Something that tasks wait for.

    A wake-up that finds nobody waiting is kept for the first who comes, so it does not
    matter which of the two is first; several of those are one.
    """

    __slots__ = ("_tasks", "_value", "_woken")

    def __init__(self) -> None:
        self._tasks: list[Task] = []
        self._woken = False
        self._value: Any = None

    def wake(self, value: Any = None, vcpu: Vcpu | None = None) -> None:
        """Let all who wait go on with ``value``; ``vcpu``: which of the guest's does it.

        Without one it is the one whose task is running now, or the outside world.
        """
        self._value = value
        tasks = self._tasks
        if not tasks:
            self._woken = True
            return
        if len(tasks) == 1:
            task = tasks.pop()
            if task.vcpu is vcpu:  # what resume() does; most come by here
                task._waiting = None
                task._next = value
                vcpu.call(task.run)
                return
            task.resume(value, vcpu)
            return
        self._tasks = []
        for task in tasks:
            task.resume(value, vcpu)

    def taken(self, task: Task) -> bool:
        """Whether ``task`` need not wait; if it has to, it is noted."""
        if self._woken:
            self._woken = False
            return True
        self._tasks.append(task)
        return False

    def forget(self, task: Task) -> None:
        """``task`` does not wait any more."""
        if task in self._tasks:
            self._tasks.remove(task)

    @property
    def value(self) -> Any:
        """What it was woken with last."""
        return self._value


@dataclass(frozen=True)
class Pin:
    """Yielded by a task that wants to go on on ``cpu``."""

    cpu: int


Step = Wait | Pin | None
Work = Generator[Step, Any, int]


class Task:
    """A generator at work. ``status`` is its exit status, None as long as it runs."""

    __slots__ = (
        "_next",
        "_waiting",
        "ended",
        "kernel",
        "name",
        "number",
        "status",
        "vcpu",
        "work",
    )

    def __init__(self, kernel: Kernel, work: Work, cpu: int, name: str, number: int) -> None:
        self.kernel = kernel
        self.work = work
        self.name = name
        self.number = number
        """As a process ID: no other task of this kernel has it."""
        self.vcpu: Vcpu = kernel.machine.vcpus[cpu]
        self.status: int | None = None
        self.ended = Wait()
        """Woken with the exit status, once: who comes later looks at ``status`` first."""
        self._waiting: Wait | None = None
        self._next: Any = None

    @property
    def cpu(self) -> int:
        """Where it runs."""
        return self.vcpu.index

    def resume(self, value: Any, vcpu: Vcpu | None) -> None:
        """What it waited for is there."""
        self._waiting = None
        self._next = value
        self.kernel.scheduler.wake(self, vcpu)

    def kill(self, status: int = 137) -> None:
        """End it where it waits, as by a signal; a task that has ended stays what it is."""
        if self.status is not None:
            return
        if self._waiting is not None:
            self._waiting.forget(self)
            self._waiting = None
        self.status = status
        # It may yield while it is closed, or kill itself: it does not run again.
        with suppress(RuntimeError, ValueError):
            self.work.close()
        self._finish(status)

    def run(self) -> None:
        """Go on until it has to wait; on its CPU."""
        if self.status is not None:
            return
        kernel, value = self.kernel, self._next
        self._next = None
        kernel.running = vcpu = self.vcpu
        kernel.current = self
        try:
            while True:
                wanted = self.work.send(value)
                if self.status is not None:
                    return  # killed by what it did
                if wanted is None:
                    vcpu.spend(YIELDED)
                    vcpu.call(self.run)
                    return
                if isinstance(wanted, Wait):
                    if not wanted.taken(self):
                        self._waiting = wanted
                        return
                    value = wanted.value
                elif wanted.cpu == vcpu.index:
                    value = None
                else:
                    self.vcpu = kernel.machine.vcpus[wanted.cpu]
                    kernel.scheduler.wake(self, vcpu)
                    return
        except StopIteration as end:
            self._finish(end.value if end.value is not None else 0)
        except Exception as problem:  # a program that fails is no reason for its machine to end
            kernel.failures.append(problem)
            kernel.say(f"{self.name}[{self.number}]: {type(problem).__name__}: {problem}")
            self._finish(CRASHED)
        finally:
            kernel.running = None
            kernel.current = None

    def _finish(self, status: int) -> None:
        self.status = status
        self.kernel.scheduler.tasks.pop(self.number, None)
        self.ended.wake(status)


class Scheduler:
    """Which task runs where."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._woken: list[deque[Task]] = [deque() for _ in kernel.machine.vcpus]
        self.tasks: dict[int, Task] = {}
        self._numbers = 0

    def spawn(self, work: Work, cpu: int | None = None, name: str = "task") -> Task:
        """Start ``work`` on ``cpu``, by default on the CPU with the fewest tasks."""
        kernel = self._kernel
        if cpu is None:
            load = dict.fromkeys(sorted(kernel.online), 0)
            for other in self.tasks.values():
                load[other.cpu] = load.get(other.cpu, 0) + 1
            cpu = min(load, key=lambda number: (load[number], number))
        self._numbers += 1
        task = Task(kernel, work, cpu, name, self._numbers)
        self.tasks[task.number] = task
        self.wake(task, None)
        return task

    def wake(self, task: Task, vcpu: Vcpu | None) -> None:
        """Have ``task`` go on, on its CPU, told by ``vcpu`` if that is another one."""
        target = task.vcpu
        vcpu = vcpu or self._kernel.running
        if vcpu is None or vcpu is target:
            target.call(task.run)
            return
        woken = self._woken[target.index]
        woken.append(task)
        if len(woken) == 1:  # else an interrupt is on its way already
            self._kernel.apic.ipi(vcpu, target.apic.id, Vector.RESCHEDULE)

    def rescheduled(self, vcpu: Vcpu) -> None:
        """``vcpu`` was told to look for new work."""
        woken = self._woken[vcpu.index]
        while woken:
            vcpu.call(woken.popleft().run)


class Timers:
    """Timers of each CPU, by its local APIC's. Times are ns of the guest's clock."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        count = len(kernel.machine.vcpus)
        self._heaps: list[list[tuple[int, int, Callable[[Vcpu], None]]]] = [
            [] for _ in range(count)
        ]
        self._programmed: list[int | None] = [None] * count
        self._number = 0

    def add(self, vcpu: Vcpu, due: int, what: Callable[[Vcpu], None]) -> None:
        """Do ``what(vcpu)`` when it is ``due``; ``vcpu`` is running."""
        self._number += 1
        heappush(self._heaps[vcpu.index], (due, self._number, what))
        self._program(vcpu)

    def add_on(self, vcpu: Vcpu, other: Vcpu, due: int, what: Callable[[Vcpu], None]) -> None:
        """The same on another CPU, which is told so by an interrupt."""
        if other is vcpu:
            self.add(vcpu, due, what)
            return
        self._number += 1
        heappush(self._heaps[other.index], (due, self._number, what))
        self._kernel.apic.ipi(vcpu, other.apic.id, Vector.RESCHEDULE)

    def look(self, vcpu: Vcpu) -> None:
        """Program what came from other CPUs."""
        if self._heaps[vcpu.index]:
            self._program(vcpu)

    def expired(self, vcpu: Vcpu) -> None:
        """The local APIC's timer says that something is due."""
        heap = self._heaps[vcpu.index]
        self._programmed[vcpu.index] = None
        now = vcpu.clock // CYCLES_PER_NS
        while heap and heap[0][0] <= now:
            heappop(heap)[2](vcpu)
        if heap:
            self._program(vcpu)

    def _program(self, vcpu: Vcpu) -> None:
        due = self._heaps[vcpu.index][0][0]
        programmed = self._programmed[vcpu.index]
        if programmed is not None and programmed <= due:
            return
        self._programmed[vcpu.index] = due
        self._kernel.apic.timer(vcpu, due * CYCLES_PER_NS)
