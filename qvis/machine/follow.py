# SPDX-License-Identifier: GPL-2.0-or-later
"""From a process that was started to a machine that is up: every stage in its turn."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..backends.nested import HOST_SSH_PORT
from ..errors import BootError, InfraError, LostMachineError
from ..folder import CONSOLE_LOG, HOST_CONSOLE_LOG, HOST_QMP, MACHINE, Folder
from ..levels import INNER_HOST
from ..openssh import write_config
from ..progress import step
from ..spec import MachineSpec
from .boot import (
    HOST_QEMU_DEADLINE,
    HOST_SHUTDOWN,
    HOST_STAGES,
    LAUNCH_DEADLINE,
    SCRIPT_ENDED,
    SCRIPT_STAGES,
    SSH_DEADLINE,
    Boot,
    Stage,
    time_scale,
)
from .qmp import Qmp
from .ssh import host_alias

if TYPE_CHECKING:
    from .machine import Machine, Script

__all__ = ["Follower"]

SHUTDOWN_DEADLINE = 5.0  # seconds
GUEST_SSH_PORT = 22
# Of `info usernet`: the port of this host, and the one that it leads to.
FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\S+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+(\d+)\s")


class Follower:
    """A machine that starts, until it is up."""

    def __init__(
        self,
        folder: Folder,
        spec: MachineSpec,
        slowdown: float,
        nested: bool,
        info: dict[str, Any],
        make: Callable[[dict[str, Any]], Machine],
    ) -> None:
        """``info`` gets what is found out meanwhile; ``make`` is called as soon as it has
        the ports."""
        self._folder, self._spec = folder, spec
        self._nested = nested
        self._info, self._make = info, make
        self._scale = time_scale(spec, slowdown)

    def follow(self, *, migrated: bool, script: Script | None) -> Machine:
        """Every stage, up to a login or the end of a script; none where a guest migrates in."""
        start = time.monotonic()
        console = self._folder / (HOST_CONSOLE_LOG if self._nested else CONSOLE_LOG)
        with contextlib.ExitStack() as undo, step(f"boot {self._spec.name}", console) as shown:
            boot = Boot(self._folder, self._scale, shown.say)
            machine = self._launch(boot)
            undo.callback(machine.close_connections)
            if script:
                script.started(machine)
            if self._nested:
                boot.follow_console(HOST_STAGES)
            if script:
                boot.follow_console(SCRIPT_STAGES)
                deadline = script.deadline / self._scale
                boot.follow_console([Stage("script", SCRIPT_ENDED, deadline)])
                if self._nested:
                    boot.follow_console(
                        [Stage("shutdown", HOST_SHUTDOWN, SHUTDOWN_DEADLINE, INNER_HOST)]
                    )
            if self._nested:
                # Not before a script has ended: nothing from outside is to reach its machine.
                deadline = HOST_QEMU_DEADLINE * self._scale
                machine.adopt(self._session(boot, "host QEMU", deadline, None))
            if script and not self._nested:
                self._shut_down(boot, machine)
            elif not script and not migrated:
                boot.follow_console()
                self._log_in(boot, machine)
                if self._spec.transport.storage and self._info["reader"].startswith("kvm"):
                    self._info["vis_in_kvm"] = machine.vis_in_kvm
            self._info["boot"] = {"stages": boot.times, "total": time.monotonic() - start}
            self._folder.write(MACHINE, self._info)
            undo.pop_all()
        return machine

    def _launch(self, boot: Boot) -> Machine:
        """Wait for the process that was started to answer, and ask it for its ports."""
        qmp = self._session(boot, "launch", LAUNCH_DEADLINE, HOST_QMP if self._nested else None)
        try:
            self._note_ports(qmp.monitor("info usernet"))
        except BaseException:
            qmp.close()
            raise
        machine = self._make(self._info)
        if self._nested:
            qmp.close()  # that of the process; the guest's is not there yet
        else:
            machine.adopt(qmp)
        return machine

    def _note_ports(self, forwards: str) -> None:
        ports = {int(inner): int(port) for port, inner in FORWARD.findall(forwards)}
        if GUEST_SSH_PORT not in ports:
            raise InfraError("no port of this host leads to the guest's SSH", stage="launch")
        guest, host = ports[GUEST_SSH_PORT], ports.get(HOST_SSH_PORT) if self._nested else None
        self._info |= {"ssh_port": guest, "host_ssh_port": host}
        write_config(self._folder.path, host_alias(self._folder.path), guest, host)

    def _session(self, boot: Boot, stage: str, deadline: float, socket: str | None) -> Qmp:
        sessions: list[Qmp] = []

        def connect(left: float) -> None:
            try:
                sessions.append(Qmp(self._folder, left, socket))
            except LostMachineError as problem:
                raise boot.ended() or boot.failure(problem.message, InfraError) from problem

        boot.stage(stage, deadline, connect)
        return sessions[0]

    def _shut_down(self, boot: Boot, machine: Machine) -> None:
        def wait(left: float) -> None:
            if not machine.wait_status({"shutdown"}, left):
                raise boot.failure("the guest did not shut down after its script")

        boot.stage("shutdown", SHUTDOWN_DEADLINE * self._scale, wait)

    def _log_in(self, boot: Boot, machine: Machine) -> None:
        def log_in(left: float) -> None:
            try:
                machine.ssh.connect(left)
                machine.ssh.run("true", deadline=left)
            except LostMachineError as problem:
                raise boot.ended() or boot.failure(problem.message, BootError) from problem

        boot.stage("ssh", SSH_DEADLINE * self._scale, log_in)
