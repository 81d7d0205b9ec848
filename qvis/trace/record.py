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

from ..build.cache import space_checked
from ..errors import GuestError, LostMachineError, UsageError
from ..machine.machine import Machine
from ..machine.ssh import Completed
from ..progress import step
from .attribution import attribute
from .devices import regions
from .guest import irqs, kernel_moved
from .sources import READERS, Source, TcgSource
from .store import EVENTS, RAW, Manifest, Provenance, Trace
from .symbols import Symbols

__all__ = ["COMMAND_DEADLINE", "attribute_trace", "record"]

COMMAND_DEADLINE = 600.0  # seconds
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
        known = {irq.irq: irq for irq in (*manifest.irqs, *irqs(machine.ssh, manifest.regions))}
        manifest = dataclasses.replace(manifest, irqs=tuple(known.values()))
    trace = Trace(output, manifest)
    trace.write_manifest()
    trace = attribute_trace(trace)
    if failure:
        raise failure
    return trace, completed


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
        provenance=_provenance(machine, source),
        machine=machine.name,
        command=work if isinstance(work, str) else "",
        status=None,
        started=time.time(),
        seconds=0.0,
        partial=(NOT_ENDED,),
        regions=tuple(mapped),
        irqs=tuple(irqs(machine.ssh, mapped)),
    )


def _provenance(machine: Machine, source: Source) -> Provenance:
    facts, spec = machine.info["provenance"], machine.spec
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return Provenance(
        reader=source.reader,
        clock=source.clock,
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
