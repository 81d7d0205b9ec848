# SPDX-License-Identifier: GPL-2.0-or-later
"""An emulated guest without sockets, and commands that are run in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from qvis.emulated.config import Config, DeviceSpec
from qvis.emulated.guest.files import OpenFile, Pipe
from qvis.emulated.guest.kernel import Kernel
from qvis.emulated.guest.processes import Outlet, Process
from qvis.emulated.guest.userland import Userland
from qvis.emulated.machine import Machine
from qvis.transport import Transport

__all__ = ["Completed", "Guest"]

DEADLINE = 20.0  # seconds of the host's clock; a test that comes near it has hung


@dataclass(frozen=True)
class Completed:
    """A command that ended, as qvis.machine.ssh has it; ``status`` None: it did not."""

    command: str
    status: int
    stdout: str
    stderr: str


class Guest:
    """A booted guest. It has what qvis.guest wants of a shell."""

    def __init__(self, transport: str = "vis", smp: int = 4, queues: int = 4) -> None:
        devices = (
            DeviceSpec("blk", "blk0", queues),
            DeviceSpec("net", "nic0"),
            DeviceSpec("rng", "random0"),
        )
        self.machine = Machine(Config(Transport(transport), smp, devices=devices))
        self.kernel = Kernel(self.machine)
        self.machine.guest = self.kernel
        self.userland = Userland(self.kernel, "vm1")
        self.console = bytearray()
        self.machine.ports.serial.output = self.console.append
        self.kernel.boot(self.userland.start)
        self.until(lambda: b"/ # " in self.console)

    def until(self, holds: Callable[[], bool]) -> None:
        """Run until ``holds()``, or nothing is left to do."""
        end = monotonic() + DEADLINE
        while not holds() and monotonic() < end:
            if not self.machine.run_slice(0.02) and not holds():
                return

    def start(
        self, command: str | None, stdin: bytes | None = b""
    ) -> tuple[Process, dict[int, bytearray], Pipe]:
        """Log in with ``command``; ``stdin`` None: it stays open."""
        said = {1: bytearray(), 2: bytearray()}

        def outlet(number: int) -> Outlet:
            def send(data: bytes) -> None:
                said[number].extend(data)
                made.sent(len(data))

            made = Outlet(send)
            return made

        pipe = Pipe()
        reader, writer = pipe.ends()
        pipe.put(stdin or b"")
        if stdin is not None:
            writer.drop()
        files: dict[int, OpenFile] = {0: reader, 1: outlet(1), 2: outlet(2)}
        process = self.userland.login(command, files, lambda process: None)
        return process, said, pipe

    def run(
        self, command: str, *, deadline: float = DEADLINE, check: bool = True, stdin: bytes = b""
    ) -> Completed:
        """Run ``command``; with ``check`` it has to succeed."""
        process, said, _ = self.start(command, stdin)
        self.until(lambda: process.status is not None)
        assert process.status is not None, f"{command!r} has not ended; it said {said}"
        done = Completed(command, process.status, said[1].decode(), said[2].decode())
        assert not check or not done.status, done
        assert not self.userland.faults, self.userland.faults
        return done
