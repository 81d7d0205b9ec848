# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine from :func:`up` to :meth:`Machine.down`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .. import backends
from ..backends import Backend, Choice, Job, Login
from ..errors import BootError, InfraError, LostMachineError, QvisError
from ..folder import (
    CONSOLE_LOG,
    INITRD,
    LAUNCH,
    MACHINE,
    MIGRATION_SOCKET,
    PROCESS_LOG,
    Folder,
    check_free,
    claim,
    running,
)
from ..guest.interrupts import Interrupts
from ..openssh import CLIENT_KEY, KNOWN_HOSTS, write_config
from ..progress import note, step
from ..spec import MachineSpec
from ..transport import Transport
from ..x86 import Platform
from . import keeper
from .boot import (
    LAUNCH_DEADLINE,
    SCRIPT_ENDED,
    SCRIPT_STAGES,
    SSH_DEADLINE,
    Boot,
    Stage,
    time_scale,
)
from .console import Console
from .end import end
from .qmp import Qmp
from .ssh import Ssh, host_alias, make_keys

__all__ = ["Machine", "Script", "run_script", "up"]

CLEANUP_DEADLINE = 10.0  # seconds
MIGRATION_DEADLINE = 60.0
SHUTDOWN_DEADLINE = 5.0
POLL = 0.02
FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\S+\s+127\.0\.0\.1\s+(\d+)\s")


class Machine:
    """A running machine.

    A context manager that ends the machine; one that :meth:`detach` was called
    on, or that :meth:`attach` found, goes on by itself.
    """

    def __init__(
        self,
        folder: Folder,
        info: dict[str, Any],
        lifeline: int | None = None,
        choice: Choice | None = None,
    ) -> None:
        self.folder = folder
        self.name = folder.name
        self.info = info
        """Specification, SSH port, boot times in seconds and provenance, as ``qvis up --json``."""
        self.spec = MachineSpec.from_json(info["spec"])
        self._lifeline = lifeline
        self._choice = choice
        self._qmp: Qmp | None = None
        self.ssh = Ssh(folder.path, info["ssh_port"])

    @classmethod
    def attach(cls, name: str) -> Machine:
        """The machine called ``name`` that somebody started.

        Raises :class:`UsageError` when there is none, and
        :class:`LostMachineError` when it has died.
        """
        folder = running(name)
        info = folder.read(MACHINE)
        assert info is not None  # running() saw it
        return cls(folder, info)

    @property
    def qmp(self) -> Qmp:
        """The QMP session of this object, opened when first used."""
        if self._qmp is None:
            self._qmp = Qmp(self.folder)
        return self._qmp

    @property
    def irqs(self) -> Interrupts:
        """The guest's interrupts and their affinity."""
        return Interrupts(self.ssh)

    @property
    def process(self) -> int:
        """The process that runs the machine; :class:`LostMachineError` when there is none."""
        keeper = self.folder.keeper
        try:
            children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        except OSError as problem:
            raise LostMachineError(f"machine {self.name!r} is gone") from problem
        if len(children) != 1:
            raise LostMachineError(f"machine {self.name!r} has no process")
        return int(children[0])

    def console(self) -> Console:
        """A session on the guest's serial console, which needs no device interrupt."""
        return Console(self.folder)

    def detach(self) -> None:
        """Let the machine go on when this process ends."""
        if self._lifeline is not None:
            try:
                os.write(self._lifeline, keeper.DETACH)
            except OSError as problem:
                raise LostMachineError(f"machine {self.name!r} died just now") from problem
            os.close(self._lifeline)
            self._lifeline = None

    def down(self) -> None:
        """End the machine and remove all that it left."""
        self.close()
        end(self.folder)

    def close(self) -> None:
        """Close this object's connections; a machine of our own ends with them."""
        self.ssh.close()
        if self._qmp:
            self._qmp.close()
            self._qmp = None
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def migrate(self, name: str | None = None) -> Machine:
        """Move the guest, live, to a new machine on this host, and return that.

        The guest keeps running; this machine is ended. The new one has the same
        specification and keys and its own name and SSH port. Raises
        :class:`InfraError` with QEMU's reason when the migration fails; the
        guest then goes on here.
        """
        choice = self._choice or backends.choose(self.info["provenance"]["backend"])
        target = _start(self.spec, name, choice, source=self.folder)
        try:
            self.qmp("migrate", uri=f"unix:{target.folder / MIGRATION_SOCKET}")
            limit = time.monotonic() + MIGRATION_DEADLINE
            self._await_migration(limit)
            target._await_guest(limit)
        except BaseException:
            target.down()
            self._resume()
            raise
        self.down()
        return target

    def _await_migration(self, limit: float) -> None:
        """Wait until the guest has left."""
        while (state := self.qmp("query-migrate"))["status"] != "completed":
            if state["status"] in {"failed", "cancelled"} or time.monotonic() > limit:
                reason = state.get("error-desc", "it took too long")
                raise InfraError(f"the guest did not move: {reason}", stage="migration")
            time.sleep(POLL)

    def _await_guest(self, limit: float) -> None:
        """Wait until the guest that came here runs."""
        if not self._wait_status({"running"}, limit - time.monotonic()):
            raise InfraError("the guest moved, but does not run", stage="migration")

    def _wait_status(self, wanted: set[str], deadline: float) -> bool:
        """Wait up to ``deadline`` seconds for one of these run states; whether it came."""
        limit = time.monotonic() + deadline
        while self.qmp("query-status")["status"] not in wanted:
            if time.monotonic() > limit:
                return False
            time.sleep(POLL)
        return True

    def _resume(self) -> None:
        """Let the guest go on here after a migration that failed, at whatever point."""
        with contextlib.suppress(QvisError):
            self.qmp("migrate_cancel")
            limit = time.monotonic() + CLEANUP_DEADLINE
            while self.qmp("query-migrate").get("status") == "cancelling":
                if time.monotonic() > limit:
                    return
                time.sleep(POLL)
            if not self.qmp("query-status")["running"]:
                self.qmp("cont")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        owned = self._lifeline is not None
        self.close()
        if owned:
            end(self.folder)


def up(
    *,
    name: str | None = None,
    transport: Transport | str = Transport.MSI,
    backend: str | Backend = "auto",
    smp: int = 2,
    memory: int = 512,
    queues: int = 2,
    icount: bool = False,
    platform: Platform | None = None,
    costs: Path | str | None = None,
) -> Machine:
    """Build what is missing, boot a guest and return it when SSH answers.

    ``memory`` is in MiB, ``queues`` counts the virtio-blk device's request
    queues, with ``icount`` the guest's time is the instructions that it executes.
    ``platform`` and ``costs`` are for the emulated backend: which interrupt hardware
    there is, and a file with what exits cost.
    ``backend`` is a name, "auto", or a backend made by hand, say one
    with another QEMU or kernel. The machine ends with the ``with`` block or
    with this process, unless it is detached. Raises :class:`UsageError` for
    what cannot be, :class:`BuildError`, :class:`InfraError`, and
    :class:`BootError` with the stage, the guest's last lines and the folder
    with its logs.
    """
    return _start(
        *_request(
            name=name, transport=transport, backend=backend, smp=smp, memory=memory,
            queues=queues, icount=icount, platform=platform, costs=costs,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Script:
    """A job for a guest that nobody logs in to, run by its init."""

    job: Job
    deadline: float  # seconds for ``run``
    qemu_options: tuple[str, ...]
    prepare: Callable[[Path], None]  # given the machine's folder, before it is started
    started: Callable[[Machine], None]  # given the machine, which has begun to boot


def run_script(script: Script, **machine: Any) -> Machine:
    """Boot a guest that runs ``script`` and shuts down, and return it, stopped, with QMP.

    Nothing from outside reaches it meanwhile, so with ``icount`` it does the
    same each time, to the instruction. ``machine`` are the arguments of
    :func:`up`, and the errors are its too.
    """
    return _start(*_request(**machine), script=script)


def _request(
    *,
    name: str | None = None,
    transport: Transport | str = Transport.MSI,
    backend: str | Backend = "auto",
    smp: int = 2,
    memory: int = 512,
    queues: int = 2,
    icount: bool = False,
    platform: Platform | None = None,
    costs: Path | str | None = None,
) -> tuple[MachineSpec, str | None, Choice]:
    """Say everything that is wrong with a request before any work is done."""
    spec = MachineSpec(
        name=name if name is not None else "new",
        transport=Transport.parse(str(transport)),
        smp=smp,
        memory=memory,
        queues=queues,
        icount=icount,
        platform=platform,
        costs=str(Path(costs).absolute()) if costs is not None else None,
    )
    if name is not None:
        check_free(name)
    if icount and backend == "auto":
        backend = "tcg"  # the only one that counts
    if (platform or costs) and backend == "auto":
        # The only one that has a choice.
        reason = "for what was asked of its hardware"
        choice = Choice(backends.choose("emulated").backend, reason)
    elif isinstance(backend, str):
        choice = backends.choose(backend)
    else:
        choice = Choice(backend, "as given")
    choice.backend.check(spec)
    note(f"backend {choice.backend.name} ({choice.reason})")
    return spec, name, choice


def _start(
    spec: MachineSpec,
    name: str | None,
    choice: Choice,
    *,
    source: Folder | None = None,
    script: Script | None = None,
) -> Machine:
    """Start a machine: boot it, have it run a script, or wait for ``source`` to migrate in."""
    backend = choice.backend
    folder, lock = claim(name)
    lifeline: int | None = None
    try:
        spec = MachineSpec.from_json({**spec.to_json(), "name": folder.name})
        try:
            launch = backend.launch(spec, folder.path, incoming=source is not None)
            _prepare(folder, backend, source, script)
            # QEMU stays when the guest has shut down, to be asked what was where.
            more = ["-no-shutdown", *script.qemu_options] if script else []
            command = [*launch.command, *more]
            folder.write(LAUNCH, {"command": command, "program": launch.program})
        except OSError as problem:
            raise InfraError(
                f"cannot prepare {folder.path}: {problem}", stage="launch"
            ) from problem
        lifeline = _start_keeper(folder, lock)
        # From here on only the keeper holds the lock: when it dies, so has the machine.
        os.close(lock)
        info = {
            "name": folder.name,
            "spec": spec.to_json(),
            "backend_reason": choice.reason,
            "provenance": launch.provenance,
            "reader": launch.reader,
            "vmlinux": str(launch.vmlinux) if launch.vmlinux else None,
        }
        return _follow(folder, spec, choice, info, lifeline, source=source, script=script)
    except BaseException as problem:
        if isinstance(problem, QvisError):
            problem.command = problem.command or (folder.read(LAUNCH) or {}).get("command")
            with contextlib.suppress(OSError):
                problem.log = problem.log or folder.keep_logs()
        if lifeline is None:
            os.close(lock)
        else:
            os.close(lifeline)
            folder.wait_dead(CLEANUP_DEADLINE)
        folder.remove()
        raise


def _prepare(
    folder: Folder, backend: Backend, source: Folder | None, script: Script | None
) -> None:
    """Put keys, and what the guest is to find, into a new machine's folder."""
    if script:
        backend.furnish(folder.path, script.job)
        script.prepare(folder.path)
    elif source:
        for file in (INITRD, CLIENT_KEY):
            shutil.copy2(source / file, folder / file)
        known = (source / KNOWN_HOSTS).read_text().split(" ", 1)[1]
        (folder / KNOWN_HOSTS).write_text(f"{host_alias(folder.path)} {known}")
    else:
        keys = make_keys(folder.path)
        backend.furnish(folder.path, Login(folder.name, keys.host_key, keys.authorized))


def _start_keeper(folder: Folder, lock: int) -> int:
    """Start the keeper, which takes the lock over; the lifeline that holds it."""
    ours, lifeline = os.pipe()
    try:
        with (folder / PROCESS_LOG).open("ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "qvis.machine.keeper", str(folder.path), str(lock)],
                stdin=ours,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                start_new_session=True,
            )
    except BaseException:
        os.close(lifeline)
        raise
    finally:
        os.close(ours)
    return lifeline


def _follow(
    folder: Folder,
    spec: MachineSpec,
    choice: Choice,
    info: dict[str, Any],
    lifeline: int,
    *,
    source: Folder | None,
    script: Script | None,
) -> Machine:
    start = time.monotonic()
    with contextlib.ExitStack() as undo, step(f"boot {spec.name}", folder / CONSOLE_LOG) as shown:
        scale = time_scale(spec, choice.backend.slowdown)
        boot = Boot(folder, scale, shown.say)
        sessions: list[Qmp] = []

        def launch(left: float) -> None:
            try:
                sessions.append(Qmp(folder, left))
            except LostMachineError as problem:
                raise boot.ended() or boot.failure(str(problem), InfraError) from problem

        boot.stage("launch", LAUNCH_DEADLINE, launch)
        qmp = sessions[0]
        undo.callback(qmp.close)
        forward = FORWARD.search(qmp.monitor("info usernet"))
        if not forward:
            raise InfraError("no port of this host leads to the guest's SSH", stage="launch")
        info["ssh_port"] = int(forward[1])
        write_config(folder.path, host_alias(folder.path), info["ssh_port"])
        machine = Machine(folder, info, lifeline, choice)
        machine._qmp = qmp
        undo.callback(machine.ssh.close)
        if script:
            script.started(machine)
            boot.follow_console(SCRIPT_STAGES)
            boot.follow_console([Stage("script", SCRIPT_ENDED, script.deadline / scale)])

            def shut_down(left: float) -> None:
                if not machine._wait_status({"shutdown"}, left):
                    raise boot.failure("the guest did not shut down after its script")

            boot.stage("shutdown", SHUTDOWN_DEADLINE * scale, shut_down)
        elif source is None:
            boot.follow_console()

            def login(left: float) -> None:
                try:
                    machine.ssh.connect(left)
                    machine.ssh.run("true", deadline=left)
                except LostMachineError as problem:
                    raise boot.ended() or boot.failure(problem.message, BootError) from problem

            boot.stage("ssh", SSH_DEADLINE * scale, login)
        info["boot"] = {"stages": boot.times, "total": time.monotonic() - start}
        folder.write(MACHINE, info)
        undo.pop_all()
    return machine
