# SPDX-License-Identifier: GPL-2.0-or-later
"""Recording a trace around a command in a guest, and attributing what was recorded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends import Backend, Job, choose
from ..errors import GuestError, InfraError, LostMachineError, QvisError, UsageError
from ..folder import CONSOLE_LOG
from ..host import cpu_model
from ..machine.machine import Machine, Script, run_script
from ..machine.ssh import Completed
from ..progress import step
from .attribution import attribute
from .devices import regions
from .export import disk_full
from .guest import INTERRUPTS, PLACES, irqs, meanwhile
from .model import Clock
from .sources import BOOTS, READERS, BootSource, Source, open_source
from .store import EVENTS, RAW, Manifest, Provenance, Trace

__all__ = [
    "COMMAND_DEADLINE",
    "Session",
    "attribute_trace",
    "provenance",
    "record",
    "record_boot",
    "recording",
]

COMMAND_DEADLINE = 600.0  # seconds
STATUS = "qvis-status: "  # what the guest's init prints before a command's exit status
NOT_ENDED = "the recording did not end in order"
RESERVE = ".reserve"  # room for the manifest and the counts, should the disk fill up meanwhile
RESERVE_SIZE = 1 << 18  # bytes
HOST_SALT = b"qvis"  # machine-id(5) asks not to show it as it is


@dataclass
class Session:
    """A recording that goes on: what it will be known by."""

    status: int | None = None  # with what the work ended; to be set before it does
    trace: Trace | None = None  # there when the recording has ended, however it did


def record(
    machine: Machine,
    output: Path,
    command: str,
    *,
    vmlinux: Path | None = None,
    deadline: float = COMMAND_DEADLINE,
) -> tuple[Trace, Completed]:
    """Record ``machine`` while ``command`` runs in its guest: the trace and what it said.

    That the command fails is no error. Raises what :func:`recording` does, and
    :class:`~qvis.errors.GuestError` for a command that does not end within
    ``deadline`` seconds.
    """
    with recording(machine, output, command=command, vmlinux=vmlinux) as session:
        completed = machine.ssh.run(command, deadline=deadline, check=False)
        session.status = completed.status
    assert session.trace is not None  # or an error was raised
    return session.trace, completed


@contextlib.contextmanager
def recording(
    machine: Machine, output: Path, *, command: str = "", vmlinux: Path | None = None
) -> Iterator[Session]:
    """Record ``machine`` into the new folder ``output`` during the block.

    Whatever is raised in it, what was recorded is kept, the trace says why it is
    partial, and the error goes on. Raises :class:`UsageError` for an ``output`` that is there, a
    ``vmlinux`` without symbols or one that is not the guest's, and
    :class:`~qvis.errors.InfraError` where there is nothing to record with.
    """
    raw = _make(output)
    try:
        source = open_source(machine, raw, vmlinux)
        before = machine.ssh.run(PLACES).stdout
        trace = Trace(output, _manifest(machine, source, command, before))
        trace.write_manifest()
        source.start()
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise

    session = Session()
    partial: list[str] = []
    begin = time.monotonic()
    try:
        yield session
    except BaseException as problem:
        interrupted = isinstance(problem, KeyboardInterrupt)
        partial.append("interrupted" if interrupted else f"the work did not end: {problem}")
        if isinstance(problem, QvisError):
            problem.log = output
        raise
    finally:
        seconds = time.monotonic() - begin
        (output / RESERVE).unlink(missing_ok=True)
        partial += source.stop()
        manifest = dataclasses.replace(
            trace.manifest, status=session.status, seconds=seconds, partial=tuple(partial)
        )
        # Once more: a device that was bound anew has other interrupts now.
        with contextlib.suppress(GuestError, LostMachineError):
            after = machine.ssh.run(PLACES).stdout if machine.folder.alive else ""
            kept = meanwhile(before, after, manifest.regions)
            manifest = dataclasses.replace(manifest, irqs=kept)
        session.trace = _finish(Trace(output, manifest))


def record_boot(
    output: Path, command: str, *, deadline: float = COMMAND_DEADLINE, **machine: Any
) -> tuple[Trace, int]:
    """Record a machine of its own from its first instruction until it shuts down.

    Its init runs the shell text ``command``, and nothing reaches it from outside,
    so with ``icount`` each such recording has the same events. ``machine`` are
    the arguments of :func:`qvis.up`. Returns the trace and the command's exit
    status. Raises what :func:`qvis.up` does; what was recorded by then stays and
    is marked partial. :class:`UsageError` for a backend whose recorder is not there that early.
    """
    machine["backend"], kind = _boot_source(machine.get("backend", "auto"))
    raw = _make(output)
    begun: list[Trace] = []

    def started(guest: Machine) -> None:
        source.started(guest)
        manifest = Manifest(
            provenance=provenance(guest, source.reader, source.clock),
            machine=guest.name,
            command=None,
            status=None,
            started=time.time(),
            seconds=0.0,
            partial=(NOT_ENDED,),
            # What is mapped where changes while a guest sets up PCI; it is asked for again.
            regions=tuple(regions(guest.qmp)) if source.asks else (),
        )
        begun.append(Trace(output, manifest))
        begun[0].write_manifest()

    begin = time.monotonic()
    try:
        source = kind(raw, icount=bool(machine.get("icount")))
        script = Script(
            Job(command + "\n", INTERRUPTS + "\n", before=source.before),
            deadline=deadline,
            qemu_options=source.options,
            prepare=source.prepare,
            started=started,
        )
        with run_script(script, **machine) as guest:
            source.fetch()
            mapped = regions(guest.qmp)
            console = (guest.folder / CONSOLE_LOG).read_text(errors="replace")
    except BaseException as problem:
        if not begun:
            shutil.rmtree(output, ignore_errors=True)
            raise
        partial = [f"the boot did not end: {problem}", *source.stop()]
        manifest = dataclasses.replace(
            begun[0].manifest, seconds=time.monotonic() - begin, partial=tuple(partial)
        )
        _finish(Trace(output, manifest))
        if isinstance(problem, QvisError):
            problem.log = output
        raise
    partial = source.stop()
    said = console.rpartition(STATUS)[2]
    words = said.split()
    status = int(words[0]) if words and words[0].isdigit() else None
    if status is None:
        partial.append("the guest did not say with what its command ended")
    manifest = dataclasses.replace(
        begun[0].manifest,
        status=status,
        seconds=time.monotonic() - begin,
        partial=tuple(partial),
        regions=tuple(mapped),
        irqs=tuple(irqs(said, mapped)),
    )
    return _finish(Trace(output, manifest)), GuestError.exit_code if status is None else status


def _boot_source(backend: str | Backend) -> tuple[str | Backend, Callable[..., BootSource]]:
    """The backend that is to boot, and what records it."""
    if backend == "auto":
        backend = "tcg"
    chosen = choose(backend).backend if isinstance(backend, str) else backend
    reader = getattr(chosen, "reader", None)
    if reader not in BOOTS:
        raise UsageError(
            f"a boot needs a recorder that is there before it, which {chosen.name} does not have: "
            "use --backend tcg or nested"
        )
    return backend, BOOTS[reader]


def _finish(trace: Trace) -> Trace:
    """Write the manifest and attribute; on a full disk, or without a recording, say so."""
    (trace.path / RESERVE).unlink(missing_ok=True)
    trace.write_manifest()
    try:
        return attribute_trace(trace)
    except (InfraError, UsageError) as problem:
        manifest = trace.manifest
        partial = (*manifest.partial, f"events are not attributed: {problem.message}")
        trace = Trace(trace.path, dataclasses.replace(manifest, partial=partial))
        with contextlib.suppress(OSError):
            trace.write_manifest()
        return trace


def attribute_trace(trace: Trace) -> Trace:
    """Read a trace's raw folder and write its events anew; the trace with their number.

    Memory is bounded. Raises :class:`UsageError` for files that are damaged or
    not a recorder's, :class:`~qvis.errors.InfraError` when the disk is full.
    """
    manifest = trace.manifest
    if manifest.provenance.reader not in READERS:
        raise UsageError(f"nothing here reads what {manifest.provenance.reader!r} has recorded")
    raw, target = trace.path / RAW, trace.path / EVENTS
    unfinished = trace.path / f".{EVENTS}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    count = 0
    with step("attribute events") as shown, _space(trace.path):
        unfinished.mkdir()
        try:
            reading = READERS[manifest.provenance.reader](raw)
            for number, frame in enumerate(attribute(reading.frames(), manifest)):
                frame.write_parquet(unfinished / f"part-{number:06}.parquet", compression="zstd",
                                    compression_level=1)  # fmt: skip
                count += len(frame)
                shown.update(count, 0)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    done = Trace(
        trace.path,
        dataclasses.replace(
            manifest,
            events=count,
            lost=reading.lost,
            partial=tuple(dict.fromkeys([*manifest.partial, *reading.partial])),
        ),
    )
    with _space(trace.path):
        done.write_manifest()
    return done


def _make(output: Path) -> Path:
    """The new folder ``output`` with a raw folder in it."""
    try:
        output.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{output} is there already: name another place for the trace") from None
    except OSError as problem:
        raise UsageError(f"cannot make {output}: {problem.strerror}") from problem
    raw = output.absolute() / RAW
    with _space(output):
        raw.mkdir()
        (output / RESERVE).write_bytes(os.urandom(RESERVE_SIZE))  # zeros might take no room
    return raw


@contextlib.contextmanager
def _space(place: Path) -> Iterator[None]:
    """Say whose disk is full."""
    try:
        yield
    except OSError as problem:
        if not disk_full(problem):
            raise
        raise InfraError(
            f"no space left for {place}: free some, and `qvis trace attribute {place}`"
        ) from problem


def _manifest(machine: Machine, source: Source, command: str, said: str) -> Manifest:
    mapped = regions(machine.qmp)
    return Manifest(
        provenance=provenance(machine, source.reader, source.clock),
        machine=machine.name,
        command=command,
        status=None,
        started=time.time(),
        seconds=0.0,
        partial=(NOT_ENDED,),
        regions=tuple(mapped),
        irqs=tuple(irqs(said, mapped)),
    )


def provenance(machine: Machine, reader: str, clock: Clock) -> Provenance:
    """Where numbers of ``machine`` come from that ``reader`` reads and ``clock`` counts."""
    facts, spec = machine.info["provenance"], machine.spec
    return Provenance(
        reader=reader,
        clock=clock,
        backend=facts["backend"],
        accelerator=facts["accelerator"],
        qemu=facts["qemu"],
        qemu_series=facts["qemu_series"],
        linux=facts["linux"],
        linux_series=facts["linux_series"],
        host=f"{cpu_model()}, Linux {platform.release()}",
        machine=_host_name(),
        transport=str(spec.transport),
        smp=spec.smp,
        queues=spec.queues,
        memory=spec.memory,
        host_linux=facts.get("host_linux", ""),
        kvm_series=facts.get("kvm_series", ""),
    )


def _host_name() -> str:
    """The same for every trace of one host, and nothing that tells which host it is."""
    try:
        identity = Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        identity = b""
    return hashlib.sha256(HOST_SALT + (identity or platform.node().encode())).hexdigest()[:12]
