# SPDX-License-Identifier: GPL-2.0-or-later
"""Recording a trace around a command in a guest, and attributing what was recorded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..build import build_all
from ..build.cache import space_checked
from ..errors import GuestError, LostMachineError, QvisError, UsageError
from ..folder import CONSOLE_LOG
from ..machine.machine import Machine, Script, run_script
from ..machine.ssh import Completed
from ..progress import step
from .attribution import attribute
from .devices import regions
from .guest import INTERRUPTS, irqs, kernel_moved
from .model import Clock
from .sources import READERS, Source, TcgSource, prepare, qemu_options, read_counts, save_counts
from .store import EVENTS, RAW, Manifest, Provenance, Trace
from .symbols import Symbols

__all__ = ["COMMAND_DEADLINE", "attribute_trace", "record", "record_boot"]

COMMAND_DEADLINE = 600.0  # seconds
STATUS = "qvis-status: "  # what the guest's init prints before a command's exit status
NOT_ENDED = "the recording did not end in order"
HOST_SALT = b"qvis"  # machine-id(5) asks not to show it as it is


def record(
    machine: Machine,
    output: Path,
    work: str | Callable[[], None],
    *,
    vmlinux: Path | None = None,
    deadline: float = COMMAND_DEADLINE,
) -> tuple[Trace, Completed | None]:
    """Record ``machine`` into the new folder ``output`` during ``work``.

    That is a command in the guest, or something to call. What the command said
    comes back with the trace; that it fails is no error. Whatever else goes
    wrong from here on, what was recorded is kept and the trace says why it is
    partial; then the error is raised: :class:`GuestError` for a command that
    does not end within ``deadline`` seconds, :class:`LostMachineError` for a
    machine that dies. Before anything is recorded, :class:`UsageError` for an
    ``output`` that is there, or a ``vmlinux`` that is not the guest's.
    """
    symbols = Symbols.read(vmlinux or Path(machine.info["vmlinux"]))
    moved = kernel_moved(machine.ssh, symbols)
    raw = _make(output)
    try:
        source = TcgSource(machine, raw, symbols, moved)
        trace = Trace(output, _manifest(machine, source, work))
        trace.write_manifest()
        source.start()
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise

    partial: list[str] = []
    completed: Completed | None = None
    failure: BaseException | None = None
    begin = time.monotonic()
    try:
        if callable(work):
            work()
        else:
            completed = machine.ssh.run(work, deadline=deadline, check=False)
    except KeyboardInterrupt as problem:
        partial.append("interrupted")
        failure = problem
    except (GuestError, LostMachineError) as problem:
        partial.append(f"the work did not end: {problem.message}")
        failure = problem
    except BaseException as problem:
        partial.append(f"the work failed: {problem!r}")
        failure = problem
    seconds = time.monotonic() - begin
    partial += source.stop()
    manifest = dataclasses.replace(
        trace.manifest,
        status=completed.status if completed else None,
        seconds=seconds,
        partial=tuple(partial),
    )
    # Once more: a device that was bound anew has other interrupts now.
    with contextlib.suppress(GuestError, LostMachineError):
        now = irqs(machine.ssh.run(INTERRUPTS).stdout, manifest.regions)
        known = {irq.irq: irq for irq in (*manifest.irqs, *now)}
        manifest = dataclasses.replace(manifest, irqs=tuple(known.values()))
    trace = Trace(output, manifest)
    trace.write_manifest()
    trace = attribute_trace(trace)
    if failure:
        if isinstance(failure, QvisError):
            failure.log = output
        raise failure
    return trace, completed


def record_boot(
    output: Path, command: str, *, deadline: float = COMMAND_DEADLINE, **machine: Any
) -> tuple[Trace, int]:
    """Record a machine of its own from its first instruction until it shuts down.

    Its init runs the shell text ``command``, and nothing reaches it from outside,
    so with ``icount`` each such recording has the same events. ``machine`` are
    the arguments of :func:`qvis.up`. Returns the trace and the command's exit
    status. Raises what :func:`qvis.up` does; the trace, if there is one by then,
    stays and is marked partial.
    """
    symbols = Symbols.read(build_all().linux.vmlinux)
    raw = _make(output)
    script = Script(
        run=command + "\n",
        report=INTERRUPTS + "\n",
        deadline=deadline,
        qemu_options=qemu_options(raw),
        prepare=lambda folder: prepare(folder, raw, symbols),
    )
    started = time.time()
    try:
        with run_script(script, **machine) as guest:
            mapped = regions(guest.qmp)
            counts = read_counts(guest.folder.path)
            console = (guest.folder / CONSOLE_LOG).read_text(errors="replace")
            source = TcgSource.reader, TcgSource.clock
            from_machine = _provenance(guest, *source)
            name, seconds = guest.name, sum(guest.info["boot"]["stages"].values())
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    partial = save_counts(raw, counts)
    said = console.rpartition(STATUS)[2]
    status = int(said.split()[0])
    manifest = Manifest(
        provenance=from_machine,
        machine=name,
        command=None,
        status=status,
        started=started,
        seconds=seconds,
        partial=tuple(partial),
        regions=tuple(mapped),
        irqs=tuple(irqs(said, mapped)),
    )
    trace = Trace(output, manifest)
    trace.write_manifest()
    return attribute_trace(trace), status


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
    partial = list(manifest.partial)
    count = 0
    with step("attribute events") as shown, space_checked():
        unfinished.mkdir()
        try:
            frames, lost = READERS[manifest.provenance.reader](raw, partial)
            for number, frame in enumerate(attribute(frames, manifest)):
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
            lost=lost,
            partial=tuple(dict.fromkeys(partial)),
        ),
    )
    with space_checked():
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
    raw.mkdir()
    return raw


def _manifest(machine: Machine, source: Source, work: str | Callable[[], None]) -> Manifest:
    mapped = regions(machine.qmp)
    return Manifest(
        provenance=_provenance(machine, source.reader, source.clock),
        machine=machine.name,
        command=work if isinstance(work, str) else "",
        status=None,
        started=time.time(),
        seconds=0.0,
        partial=(NOT_ENDED,),
        regions=tuple(mapped),
        irqs=tuple(irqs(machine.ssh.run(INTERRUPTS).stdout, mapped)),
    )


def _provenance(machine: Machine, reader: str, clock: Clock) -> Provenance:
    facts, spec = machine.info["provenance"], machine.spec
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return Provenance(
        reader=reader,
        clock=clock,
        backend=facts["backend"],
        accelerator=facts["accelerator"],
        qemu=facts["qemu"],
        qemu_series=facts["qemu_series"],
        linux=facts["linux"],
        linux_series=facts["linux_series"],
        host=f"{model[1] if model else platform.machine()}, Linux {platform.release()}",
        machine=_host_name(),
        transport=str(spec.transport),
        smp=spec.smp,
        queues=spec.queues,
    )


def _host_name() -> str:
    """The same for every trace of one host, and nothing that tells which host it is."""
    try:
        identity = Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        identity = b""
    return hashlib.sha256(HOST_SALT + (identity or platform.node().encode())).hexdigest()[:12]
