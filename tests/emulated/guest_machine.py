# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines with the guest model on them, for tests."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from qvis.emulated.config import Config, DeviceSpec
from qvis.emulated.guest.irq import IrqDesc
from qvis.emulated.guest.kernel import Kernel
from qvis.emulated.guest.tasks import Task
from qvis.emulated.machine import Machine
from qvis.transport import Transport

__all__ = ["Steps", "booted", "irq_of", "run"]

Steps = Generator[Any, Any, Any]
DEVICES = (
    DeviceSpec("blk", "blk0", 4),
    DeviceSpec("net", "nic0"),
    DeviceSpec("rng", "rng0"),
    DeviceSpec("console", "con0"),
)
EVENTS = 2_000_000  # more than any test needs: one that never ends fails


def booted(transport: Transport = Transport.VIS, **config: Any) -> Kernel:
    """A guest that has booted, on 4 vCPUs with a disk of 4 queues and one of each other device."""
    config.setdefault("smp", 4)
    config.setdefault("devices", DEVICES)
    machine = Machine(Config(transport=transport, **config))
    kernel = machine.guest = Kernel(machine)
    ready: list[bool] = []
    kernel.boot(lambda: ready.append(True))
    machine.events.run(EVENTS)
    assert ready == [True]
    assert kernel.failures == []
    return kernel


def run(kernel: Kernel, *works: Callable[[Task], Steps], cpus: tuple[int, ...] = (0,)) -> list[Any]:
    """What each of ``works`` returns, each a task of its own on one of ``cpus`` in turn."""
    found: dict[int, Any] = {}

    def body(number: int, work: Callable[[Task], Steps]) -> Generator[Any, Any, int]:
        task = kernel.current
        assert task is not None
        found[number] = yield from work(task)
        return 0

    for number, work in enumerate(works):
        kernel.spawn(body(number, work), cpus[number % len(cpus)])
    done = kernel.machine.events.run(EVENTS)
    assert done < EVENTS, "it does not end"
    assert kernel.failures == []
    return [found[number] for number in range(len(works))]


def irq_of(kernel: Kernel, action: str) -> IrqDesc:
    """The interrupt that was requested as ``action``, or the line of its device."""
    for desc in kernel.irqs.descs.values():
        if action in desc.actions or action.split("-")[0] in desc.actions:
            return desc
    raise AssertionError(action)
