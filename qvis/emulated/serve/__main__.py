# SPDX-License-Identifier: GPL-2.0-or-later
"""One emulated machine as a process: ``python -m qvis.emulated.serve SPEC``.

SPEC is a :class:`~qvis.spec.MachineSpec` in JSON; the working directory is the machine's
folder, with the guest's host key and authorized keys in it. One thread runs the machine and
answers on QMP and the console; SSH has threads that only move bytes.

Work takes as long as it takes Python. Where the guest sleeps the host's clock passes too, so
that ``sleep 1`` is a second to whoever waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from ...folder import AUTHORIZED_KEYS, CONSOLE_LOG, CONSOLE_SOCKET, HOST_KEY, qmp_sockets
from ...spec import MachineSpec
from ..config import Config
from ..costs import FREQUENCY, Costs
from ..guest.kernel import Kernel
from ..guest.userland import Userland
from ..machine import Machine
from .console import ConsoleServer
from .qmp import QmpServer
from .ssh import SshServer

__all__ = ["main"]

SLICE = 0.005  # seconds that the machine runs before sockets get their turn
LEAP = FREQUENCY // 1000  # cycles: what is nearer than that, 1 ms, is not waited for


def main(arguments: list[str]) -> int:
    """Be the machine until it is told to end or its guest shuts down."""
    spec = MachineSpec.from_json(json.loads(arguments[0]))
    asyncio.run(_serve(spec, Path.cwd()))
    return 0


async def _serve(spec: MachineSpec, folder: Path) -> None:
    loop = asyncio.get_running_loop()
    machine = Machine(Config.of(spec), Costs.load(Path(spec.costs) if spec.costs else None))
    kernel = Kernel(machine)
    machine.guest = kernel
    userland = Userland(kernel, spec.name)
    loop.add_signal_handler(signal.SIGTERM, machine.shutdown, "host-signal")
    async with contextlib.AsyncExitStack() as closing:
        ssh = SshServer(
            (folder / HOST_KEY).read_bytes(),
            (folder / AUTHORIZED_KEYS).read_bytes(),
            userland,
            lambda what: _hand_over(loop, what),
        )
        closing.callback(ssh.close)
        console = ConsoleServer(userland, folder / CONSOLE_SOCKET, folder / CONSOLE_LOG)
        closing.push_async_callback(console.close)
        await console.start()
        monitors = QmpServer(
            machine,
            qmp_sockets(folder),
            name=f"qvis-{spec.name}",
            ssh_port=lambda: ssh.port,
            console=folder / CONSOLE_SOCKET,
        )
        closing.push_async_callback(monitors.close)
        monitors.answers.actions["reboot"] = "shutdown"  # as -no-reboot, which QEMU is given here
        await monitors.start()
        kernel.boot(userland.start)
        await _Clock(machine, kernel).run(lambda: [*kernel.failures, *userland.faults])


def _hand_over(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(what)


class _Clock:
    """Has a machine run, and its time pass while it waits."""

    def __init__(self, machine: Machine, kernel: Kernel) -> None:
        self._machine = machine
        self._kernel = kernel
        self._wake = asyncio.Event()
        self._since = 0.0  # when it began to wait, by the host's clock
        machine.on_event.append(lambda name, data: self._wake.set())

    async def run(self, faults: Callable[[], list[Exception]]) -> None:
        """Until the machine has shut down. What went wrong in the model goes to the log."""
        machine, told = self._machine, 0
        while machine.status != "shutdown":
            # Nobody waits for what a boot waits for, however long a table of costs makes that.
            leap = LEAP if self._kernel.booted else None
            more = machine.run_slice(SLICE, leap)
            for fault in faults()[told:]:
                traceback.print_exception(fault)
                told += 1
            if more:
                await asyncio.sleep(0)
            elif machine.status != "shutdown":
                await self._wait()

    async def _wait(self) -> None:
        """For what is next, or for somebody outside."""
        events = self._machine.events
        running = self._machine.status == "running"
        gap = (events.next - events.now) / FREQUENCY if running and events.next else None
        self._since = time.monotonic()
        self._wake.clear()
        events.on_new = self._new
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), gap)
        if events.on_new is not None:
            self._pass()

    def _new(self) -> None:
        """Something from outside: it comes now, and not when we last looked."""
        self._pass()
        self._wake.set()

    def _pass(self) -> None:
        events = self._machine.events
        events.on_new = None
        if self._machine.status == "running":
            events.wait(int((time.monotonic() - self._since) * FREQUENCY))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
