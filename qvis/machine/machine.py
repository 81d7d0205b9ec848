# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine from :func:`up` to :meth:`Machine.down`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .. import backends
from ..backends import Backend, Choice, Job, Login
from ..backends.kvm import Kvm
from ..errors import InfraError, LostMachineError, QvisError, UsageError
from ..folder import (
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
from ..openssh import CLIENT_KEY, KNOWN_HOSTS
from ..progress import note
from ..spec import MachineSpec
from ..transport import Transport
from ..x86 import Platform
from . import keeper
from .console import Console
from .end import end
from .follow import Follower
from .qmp import Qmp
from .ssh import Ssh, host_alias, make_keys

__all__ = ["Machine", "Script", "run_script", "up"]

CLEANUP_DEADLINE = 10.0  # seconds
MIGRATION_DEADLINE = 60.0
POLL = 0.02
DISK = "blk0"  # as QEMU and the emulated machine call it


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
        port = info.get("host_ssh_port")
        self.host = Ssh(folder.path, port) if port is not None else None
        """The inner host that the guest is in; None where there is none."""

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

    @property
    def vis_in_kvm(self) -> bool:
        """Whether KVM itself delivers the disk's interrupts from storage.

        Otherwise, where there is storage at all, QEMU does, or KVM by routes that copy it.
        """
        with contextlib.suppress(UsageError):  # what a QEMU says that lacks the property
            disk = f"/machine/peripheral/{DISK}"
            bus = str(self.qmp("qom-get", path=disk, property="parent_bus"))
            transport = bus.rpartition("/")[0]
            return bool(self.qmp("qom-get", path=transport, property="vis-in-kvm"))
        return False

    def adopt(self, qmp: Qmp) -> None:
        """Use this session from now on."""
        self._qmp = qmp

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
        self.close_connections()
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def close_connections(self) -> None:
        """Close them, and leave the machine as it is."""
        self.ssh.close()
        if self.host:
            self.host.close()
        if self._qmp:
            self._qmp.close()
            self._qmp = None

    def migrate(self, name: str | None = None) -> Machine:
        """Move the guest, live, to a new machine on this host, and return that.

        The guest keeps running; this machine is ended. The new one has the same
        specification and keys and its own name and SSH port. Raises
        :class:`InfraError` with QEMU's reason when the migration fails; the
        guest then goes on here.
        """
        if self.host:
            raise UsageError("a guest in an inner host cannot be migrated out of it")
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
        if not self.wait_status({"running"}, limit - time.monotonic()):
            raise InfraError("the guest moved, but does not run", stage="migration")

    def wait_status(self, wanted: set[str], deadline: float) -> bool:
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
    ``platform`` is which interrupt hardware there is, for backends that have a choice: KVM, here
    or nested, and the emulated one, for which ``costs`` is a file with what exits cost.
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
        choice = _with_hardware(spec)
    elif isinstance(backend, str):
        choice = backends.choose(backend)
    else:
        choice = Choice(backend, "as given")
    choice.backend.check(spec)
    note(f"backend {choice.backend.name} ({choice.reason})")
    return spec, name, choice


def _with_hardware(spec: MachineSpec) -> Choice:
    """The backend for what was asked of its hardware: KVM where it works and has it."""
    try:
        Kvm().check(spec)
        return backends.choose("kvm")
    except (InfraError, UsageError) as refusal:
        reason = f"not kvm: {refusal.message}; emulated: for what was asked of its hardware"
        return Choice(backends.choose("emulated").backend, reason)


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
            # QEMU stays when the guest has shut down, to be asked what was where.
            options = ["-no-shutdown", *script.qemu_options] if script else []
            launch = backend.launch(spec, folder.path, incoming=source is not None, options=options)
            _prepare(folder, backend, source, script)
            folder.write(LAUNCH, {"command": launch.command, "program": launch.program})
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
        follower = Follower(
            folder, spec, backend.slowdown, launch.nested, info,
            lambda info: Machine(folder, info, lifeline, choice),
        )  # fmt: skip
        return follower.follow(migrated=source is not None, script=script)
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
        keys = make_keys(folder.path)
        login = Login(folder.name, keys.host_key, keys.authorized)
        backend.furnish(folder.path, replace(script.job, login=login))
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
