# SPDX-License-Identifier: GPL-2.0-or-later
"""All that runs in the guest above its kernel: init, logins, processes, and their files.

Init does what guest-kernel/init does, with the same lines on the console in the same order.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from . import (
    programs,
    programs_files,
    programs_load,
    programs_sed,
    programs_system,
    programs_text,
    shell,
    shell_builtins,
)
from .files import Directory, Link, OpenFile, Regular, Room, Steps, Tree
from .options import BANNER, Program, guarded
from .processes import Interrupted, Job, Outlet, Process, Signal, fork
from .root import make_root
from .shell import Shell
from .terminal import Terminal

if TYPE_CHECKING:
    from .kernel import Kernel

__all__ = ["SerialPort", "Userland"]

SERIAL = 0x3F8
CYCLES_PER_NS = 2
LOUD = ("Linux version", "Kernel command line", "virtio")
FIRST_PID = 60  # those before are the kernel's threads
MOST_PIDS = 32768
MOST_PROCESSES = 2000  # as of a guest of 512 MiB (kernel/fork.c, max_threads)
LOOK_AGAIN = 50_000_000  # ns, while no packets arrive
LARGEST = 8 << 20  # bytes that a program may hold at once
ECHO_MAX = 65536  # bytes on their way to the port; echoes of more are lost
MOST_ROOM = 128 << 20  # bytes in files, however large the guest
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class SerialPort(Outlet):
    """The first serial port: each byte is an access to it."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(lambda data: None, terminal=True)
        self._kernel = kernel
        self._echoes = 0

    def write(self, process: Process, data: bytes) -> Steps[None]:
        """By the processor that the writer runs on."""
        outp = process.vcpu.outp
        for byte in data:
            outp(SERIAL, 1, byte)
        return
        yield

    def put(self, data: bytes) -> None:
        """An echo: by the first processor."""
        vcpu = self._kernel.machine.vcpus[0]
        if self._echoes >= ECHO_MAX:
            return
        self._echoes += len(data)

        def send() -> None:
            self._echoes -= len(data)
            for byte in data:
                vcpu.outp(SERIAL, 1, byte)

        vcpu.call(send)


class Userland:
    """The guest's user space, which :meth:`start` begins when the kernel has booted."""

    def __init__(self, kernel: Kernel, hostname: str = "qvis") -> None:
        self.kernel = kernel
        self.hostname = hostname
        self.programs: dict[str, Program] = {
            **programs.PROGRAMS, **programs_text.PROGRAMS, **programs_sed.PROGRAMS,
            **programs_files.PROGRAMS, **programs_system.PROGRAMS, **programs_load.PROGRAMS,
            "sh": shell.program, "ash": shell.program, "busybox": guarded(_busybox),
        }  # fmt: skip
        self.builtins = shell_builtins.BUILTINS
        self.largest = LARGEST
        self.kernel_threads = range(2, FIRST_PID - 10)
        self.faults: list[Exception] = []
        """What programs here fell over, which is a mistake in them."""
        self.on_lost: list[Callable[[], None]] = []
        """Told that every connection to the guest is gone: it starts over."""
        self._begin()
        kernel.on_log.append(self._logged)
        kernel.machine.on_event.append(self._told)

    def _told(self, event: str, data: dict[str, object]) -> None:
        if event == "RESET":
            self.reset()

    def _logged(self, line: str) -> None:
        """What the kernel says loud enough is on the console as well (loglevel=6)."""
        if line.partition("] ")[2].startswith(LOUD):
            data = line.encode() + b"\r\n"
            vcpu = self.kernel.running
            if vcpu is None:
                self.console.outlet.put(data)
                return
            for byte in data:
                vcpu.outp(SERIAL, 1, byte)

    def _begin(self) -> None:
        self.processes: dict[int, Process] = {}
        self._next = 1
        self.random = random.Random(self.hostname)
        self.started = int(time.time())
        self.console = Terminal("/dev/ttyS0", SerialPort(self.kernel))
        self.network = False
        self.room = Room(min(MOST_ROOM, self.kernel.machine.config.memory << 19))
        self.tree = Tree(make_root(self))
        self.init = Process(self, None, "init", {}, Job())
        self._next = FIRST_PID

    def reset(self) -> None:
        """The machine was reset: nothing is left, and nobody is logged in."""
        for lost in list(self.on_lost):
            lost()
        self._begin()

    @property
    def nanoseconds(self) -> int:
        """Since the machine was switched on."""
        return self.kernel.machine.events.now // CYCLES_PER_NS

    @property
    def time(self) -> float:
        """Seconds since 1970."""
        return self.started + self.nanoseconds / 1e9

    # Processes

    def number(self, process: Process) -> int:
        """A process ID for ``process``. Raises OSError when there are too many."""
        if len(self.processes) >= MOST_PROCESSES:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        while self._next in self.processes:
            self._next = self._next + 1 if self._next < MOST_PIDS else FIRST_PID
        number, self._next = self._next, self._next + 1
        if self._next >= MOST_PIDS:
            self._next = FIRST_PID
        self.processes[number] = process
        return number

    def forget(self, process: Process) -> None:
        """It has ended."""
        self.processes.pop(process.pid, None)

    def which(self, name: str, path: str = PATH) -> str:
        """Where the program ``name`` is; empty if nowhere."""
        for folder in path.split(":") if "/" not in name else [""]:
            full = f"{folder}/{name}" if folder else name
            try:
                if not isinstance(self.tree.find(full), Directory):
                    return full
            except OSError:
                continue
        return ""

    # Files

    def create(self, path: str, start: str) -> Regular:
        """A new empty file; raises OSError."""
        folder, name = self.tree.parent(path, start)
        node = Regular(folder.room)
        folder.add(name, node)
        return node

    def below(self, process: Process, names: list[str]) -> Iterator[str]:
        """The files under ``names``, for those who go through all of them."""
        waiting = list(reversed(names))
        while waiting:
            name = waiting.pop()
            try:
                node = process.find(name)
            except OSError:
                yield name
                continue
            if not isinstance(node, Directory):
                yield name
                continue
            inner = []
            for entry in node.names():
                child = node.get(entry)
                if child is not None and not isinstance(child, Link):
                    inner.append(f"{name.rstrip('/')}/{entry}")
            waiting += reversed(inner)

    def terminal_name(self, file: OpenFile) -> str:
        """Its name in /dev; empty if it is none."""
        return file.name if isinstance(file, Terminal) else ""

    # Init and logins

    def start(self) -> None:
        """Begin, as the kernel starts /init."""
        init = self.init
        files: dict[int, OpenFile] = dict.fromkeys(range(3), self.console)
        init.files = {number: file.hold() for number, file in files.items()}
        init.environment = lambda: {"PATH": "/bin:/sbin", "HOME": "/root", "TERM": "linux"}
        fork(init, self._init(init))

    def _init(self, init: Process) -> Steps[int]:
        yield from init.out("qvis-stage: init\n")
        yield from self.set_link(init, up=True)
        if self.network:
            yield from init.out("qvis-stage: network\n")
        yield from init.out("qvis-stage: ssh\n")
        while True:
            files: dict[int, OpenFile] = dict.fromkeys(range(3), self.console)
            process = Process(self, init, "sh", files, Job())
            process.folder = "/"
            fork(process, self._interactive(process, "/bin/sh", self.console))
            yield from init.wait_for(process)
            init.children.clear()

    def _interactive(self, process: Process, name: str, terminal: Terminal) -> Steps[int]:
        """A login shell on a terminal."""
        shell_ = Shell(process, name)
        shell_.interactive = True
        terminal.interrupt = lambda: process.job.throw(Interrupted())
        yield from process.error(
            f"\n\n{BANNER} built-in shell (ash)\nEnter 'help' for a list of built-in commands.\n"
        )
        return (yield from shell_.main(shell.session(shell_, process.descriptor(0))))

    def set_link(self, process: Process, *, up: bool) -> Steps[None]:
        """``ifconfig eth0 up`` or ``down``."""
        for device in self.kernel.devices.values():
            if device.driver == "virtio_net" and device.driving is not None:
                if up:
                    device.driving.open(process.vcpu)  # type: ignore[attr-defined]
                self.network = up
        return
        yield

    @property
    def reachable(self) -> bool:
        """Whether packets from outside arrive: the card is up and its cable is in."""
        return self.network and any(
            device.driver == "virtio_net" and getattr(device.driving, "carrier", False)
            for device in self.kernel.devices.values()
        )

    def login(
        self,
        command: str | None,
        files: dict[int, OpenFile],
        ended: Callable[[Process], None],
        terminal: Terminal | None = None,
        environment: dict[str, str] | None = None,
    ) -> Process:
        """What sshd starts: ``command``, or a shell; ``ended`` is told when that is over.

        It does not begin before the guest can be reached.
        """
        job = Job()
        process = Process(self, self.init, "sh", files, job)
        process.folder = "/root"
        values = {
            "USER": "root", "LOGNAME": "root", "HOME": "/root", "SHELL": "/bin/sh", "PATH": PATH,
            **(environment or {}),
        }  # fmt: skip
        process.environment = lambda: values
        process.on_end = ended
        fork(process, self._login(process, command, terminal))
        return process

    def _login(
        self, process: Process, command: str | None, terminal: Terminal | None
    ) -> Steps[int]:
        while not self.reachable:  # what asked for it is not there before
            yield from process.sleep(LOOK_AGAIN)
        if command is not None:
            if terminal is not None:
                terminal.interrupt = lambda: process.kill(Signal.INT)
            return (yield from shell.program(process, ["-c", command]))
        if terminal is None:
            shell_ = Shell(process, "-sh")
            shell_.script = "-sh"
            return (yield from shell_.main(shell.session(shell_, process.descriptor(0))))
        return (yield from self._interactive(process, "-sh", terminal))


def _busybox(process: Process, arguments: list[str]) -> Steps[int]:
    """[function [arguments]...]"""
    applets = sorted(set(process.userland.programs) - {"busybox", "qvis-load"})
    if not arguments or arguments[0] in ("--help", "--list"):
        text = "\n".join(applets) + "\n"
        yield from process.out(text if arguments[:1] == ["--list"] else f"{BANNER}\n{text}")
        return 0
    name, *rest = arguments
    program = process.userland.programs.get(name) if name in applets else None
    if program is None:
        yield from process.error(f"{name}: applet not found")
        return 127
    process.name = name
    return (yield from program(process, rest))
