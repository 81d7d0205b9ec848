# SPDX-License-Identifier: GPL-2.0-or-later
"""qvis-load (guest-kernel/load.c) and taskset: what runs on a CPU of one's choice."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable

from ...cpus import format_cpus, parse_cpus
from ...errors import UsageError
from .files import Directory, Node, Steps, fail
from .nodes import DiskNode, SerialFile
from .options import MisuseError, Program, guarded, options
from .processes import OPERATION_CYCLES, Process, Signal, fork, run
from .shell import start

__all__ = ["PROGRAMS"]

BLOCK = 4096
NUMBER_MAX = (1 << 63) - 1


class _LoadError(Exception):
    """Ends the load program with ``status`` after the words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def _number(text: str, name: str) -> int:
    match = re.fullmatch(r"\s*([-+]?\d{1,19})", text)
    if not match or not 0 <= int(match[1]) <= NUMBER_MAX:
        raise _LoadError(2, f"{name} must be a number, not '{text}'")
    return int(match[1])


def _online(process: Process, cpu: int) -> int:
    if cpu not in process.kernel.online:
        raise _LoadError(2, f"cannot run on CPU {cpu}: {os.strerror(errno.EINVAL)}")
    return cpu


def on_cpu(process: Process, cpu: int | None, steps: Callable[[Process], Steps[int]]) -> Steps[int]:
    """Have ``steps`` done by a process with a task on ``cpu``; what it ended with."""
    child = Process(process.userland, process, process.name, process.files, process.job)
    child.cpus = process.cpus
    fork(child, steps(child), cpu)
    try:
        return (yield from process.wait_for(child))
    finally:
        child.kill(Signal.KILL)


def _load(process: Process, arguments: list[str]) -> Steps[int]:
    """DEVICE CPU COUNT"""
    if len(arguments) != 3:
        yield from process.error("usage: qvis-load DEVICE CPU COUNT")
        return 2
    try:
        cpu = _online(process, _number(arguments[1], "CPU"))
        count = _number(arguments[2], "COUNT")
    except _LoadError as problem:
        yield from process.error(f"qvis-load: {problem}")
        return problem.status
    return (yield from on_cpu(process, cpu, lambda p: _pinned(p, arguments[0], cpu, count)))


def _pinned(process: Process, name: str, cpu: int, count: int) -> Steps[int]:
    kernel = process.kernel
    try:
        try:
            node = process.find(name)
            reader = _reader(process, node)
        except OSError as problem:
            raise _LoadError(2, f"cannot open {name}: {problem.strerror}") from None
        before = kernel.now(process.vcpu)
        try:
            yield from reader(count)
        except OSError as problem:
            raise _LoadError(1, f"cannot read {name}: {problem.strerror}") from None
        took = kernel.now(process.vcpu) - before
    except _LoadError as problem:
        yield from process.error(f"qvis-load: {problem}")
        return problem.status
    said = f'"device": "{name}", "cpu": {cpu}, "completed": {count}, "guest_ns": {took}'
    yield from process.out(f"{{{said}}}\n")
    return 0


def _reader(process: Process, node: Node) -> Callable[[int], Steps[None]]:
    """What reads so many times from ``node``."""
    task = process.job.task
    assert task is not None
    if isinstance(node, DiskNode):
        disk = node.disk()
        blocks = disk.size // BLOCK
        if not blocks:
            raise fail(errno.EINVAL)

        def of_disk(count: int) -> Steps[None]:
            for number in range(count):
                yield from disk.read(task, number % blocks * BLOCK)

        return of_disk
    if isinstance(node, SerialFile):
        of = node.disk()

        def of_serial(count: int) -> Steps[None]:
            for _ in range(count):
                yield from of.serial(task)

        return of_serial
    file = node.open(process, os.O_RDONLY)

    def of_file(count: int) -> Steps[None]:
        for _ in range(count):
            if not isinstance(node, Directory):
                file.seek(0)
            process.vcpu.spend(OPERATION_CYCLES)
            yield from process.read(file, BLOCK)

    return of_file


def _taskset(process: Process, arguments: list[str]) -> Steps[int]:
    """[-ap] [-c] [MASK] PROG ARGS | PID"""
    chosen, rest = options(arguments, "apc", first=True)
    online = process.kernel.online
    if not rest:
        raise MisuseError
    if "p" in chosen:
        pid = rest[-1]
        target = process.userland.processes.get(int(pid)) if re.fullmatch(r"\d{1,9}", pid) else None
        if target is None:
            yield from process.error(
                f"taskset: can't get pid {pid}'s affinity: {os.strerror(errno.ESRCH)}"
            )
            return 1
        for word in ("current", "new"):
            cpus = target.cpus if target.cpus is not None else online
            shown = format_cpus(cpus) if "c" in chosen else f"{sum(1 << cpu for cpu in cpus):x}"
            form = "list" if "c" in chosen else "mask"
            yield from process.out(f"pid {pid}'s {word} affinity {form}: {shown}\n")
            if len(rest) < 2 or word == "new":
                break
            target.cpus = _cpus(rest[0], "c" in chosen)
        return 0
    if len(rest) < 2:
        raise MisuseError
    cpus = _cpus(rest[0], "c" in chosen) & online
    if not cpus:
        yield from process.error(
            f"taskset: can't set pid 0's affinity: {os.strerror(errno.EINVAL)}"
        )
        return 1

    def work(child: Process) -> Steps[int]:
        child.cpus = cpus
        try:
            inner, steps = start(child, rest[1:], child.files)
        except OSError as problem:
            yield from child.error(f"taskset: can't execute '{rest[1]}': {problem.strerror}")
            return 127 if problem.errno == errno.ENOENT else 126
        return (yield from run(inner, steps))

    return (yield from on_cpu(process, min(cpus), work))


def _cpus(text: str, listed: bool) -> frozenset[int]:
    try:
        if listed:
            return parse_cpus(text)
        mask = int(text, 16)
    except (UsageError, ValueError):
        raise MisuseError(f"bad mask '{text}'") from None
    return frozenset(n for n in range(mask.bit_length()) if mask >> n & 1)


PROGRAMS: dict[str, Program] = {"qvis-load": guarded(_load), "taskset": guarded(_taskset)}
