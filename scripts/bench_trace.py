# SPDX-License-Identifier: GPL-2.0-or-later
"""What tracing costs, for ``scripts/bench --trace``.

All ratios are of runs that were interleaved in one go on one machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import qvis
from qvis.backends.tcg import Tcg
from qvis.build import Entry, build_all, pack
from qvis.build.plugin import glib_flags
from qvis.build.tree import open_tree
from qvis.folder import CONSOLE_LOG, INITRD
from qvis.machine.machine import Machine
from qvis.spec import MachineSpec
from qvis.trace.record import attribute_trace, record, record_boot
from qvis.trace.simpletrace import HEADER, MAPPING, NAME, RECORD, TYPE_SIZE
from qvis.trace.sources import COUNTS, QEMU_TRACE, TcgSource
from qvis.trace.store import RAW, Trace
from qvis.trace.symbols import Symbols
from qvis.trace.tcg import RECORD_TYPE
from qvis.transport import COMPARED

REQUESTS = 10_000
SMALL = 2_000_000  # events
LARGE = 10_000_000
EXECLOG_LIMIT = 30.0  # how many times our own boot execlog may take before it is ended
DONE = "qvis-stage: done"


def tracing(runs: int) -> dict[str, Any]:
    """All of it."""
    return {
        "recording": recording(runs),
        "boot": boots(runs),
        "reading": reading(),
        "icount": repeats(),
    }


def recording(runs: int) -> dict[str, Any]:
    """The same requests in the same guest, recorded and not, one after the other."""
    result: dict[str, Any] = {}
    for transport in COMPARED:
        with qvis.up(backend="tcg", transport=transport, smp=2, queues=2) as vm:
            work(vm)
            off, on = [], []
            for _ in range(runs):
                off.append(work(vm))
                with recorded(vm):
                    work(vm)  # translated code is made anew; that is not what is measured
                    on.append(work(vm))
                work(vm)
            result[transport] = {
                "requests": REQUESTS,
                "off_s": off,
                "on_s": on,
                "ratio_of_medians": statistics.median(on) / statistics.median(off),
            }
    return result


def work(vm: Machine) -> float:
    """Seconds of wall time for requests that interrupt once each."""
    start = time.monotonic()
    vm.ssh.run(f"qvis-load /dev/vda 1 {REQUESTS}")
    return time.monotonic() - start


@contextlib.contextmanager
def recorded(vm: Machine) -> Iterator[None]:
    """What a recording does to a guest, without the reading afterwards."""
    with tempfile.TemporaryDirectory() as raw:
        symbols = Symbols.read(Path(vm.info["vmlinux"]))
        source = TcgSource(vm, Path(raw), symbols, 0)
        source.start()
        try:
            yield
        finally:
            partial = source.stop()
        assert not partial, partial


def boots(runs: int) -> dict[str, Any]:
    """From launching QEMU to a script in the guest: no plugin, ours asleep, ours, execlog."""
    plain = "tcg without plugin"
    kinds: dict[str, Callable[[Path], list[str]]] = {
        plain: lambda folder: [],
        "tracer asleep": tracer_options,
        "tracer recording": tracer_recording,
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(runs):
        for name, options in kinds.items():
            times[name].append(boot(options, 120))
    ours = statistics.median(times["tracer recording"])
    limit = EXECLOG_LIMIT * ours
    with tempfile.TemporaryDirectory() as scratch:
        execlog = build_execlog(Path(scratch))
        theirs = boot(
            lambda folder: ["-plugin", str(execlog), "-d", "plugin", "-D", "/dev/null"], limit
        )
    base = statistics.median(times[plain])
    return {
        "seconds": times,
        "ratio_to_no_plugin": {name: statistics.median(t) / base for name, t in times.items()},
        "execlog_s": theirs,
        "execlog_ended_at_limit": theirs >= limit,
        "execlog_to_tracer": theirs / ours,
    }


def tracer_options(folder: Path) -> list[str]:
    """As every machine has it."""
    return list(Tcg().accelerator(MachineSpec("bench")).options)


def tracer_recording(folder: Path) -> list[str]:
    """The same, at work from the first instruction on."""
    from qvis.trace.sources import prepare

    raw = folder / RAW
    raw.mkdir()
    prepare(folder, raw, Symbols.read(build_all().linux.vmlinux))
    return tracer_options(folder)


def build_execlog(folder: Path) -> Path:
    """QEMU's own plugin that logs every instruction, of the tree that QEMU was built from."""
    source = open_tree("qemu").src / "contrib" / "plugins" / "execlog.c"
    library = folder / "libexeclog.so"
    include = build_all().qemu.include / "qemu"
    subprocess.run(
        ["gcc", "-O2", "-shared", "-fPIC", "-I", include, "-o", library, source, *glib_flags()],
        check=True,
    )
    return library


def boot(options: Callable[[Path], list[str]], limit: float) -> float:
    """Seconds until the guest's script was done, or ``limit``."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        backend = Tcg()
        script = [Entry.file("etc/qvis-run", b"true\n"), Entry.file("etc/qvis-report", b"true\n")]
        (folder / INITRD).write_bytes(backend.artifacts().initramfs.read_bytes() + pack(script))
        command = backend.launch(MachineSpec("bench"), folder).command
        at = command.index("-plugin")
        command[at : at + 2] = options(folder)
        start = time.monotonic()
        child = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
        try:
            while time.monotonic() < start + limit:
                log = folder / CONSOLE_LOG
                if log.exists() and DONE in log.read_text(errors="replace"):
                    break
                time.sleep(0.01)
            return min(limit, time.monotonic() - start)
        finally:
            child.kill()
            child.wait()


def reading() -> dict[str, Any]:
    """Reading and attributing: a recorded trace, repeated until it is large, on one core."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with qvis.up(backend="tcg", transport="intx", smp=2, queues=2) as vm:
            trace, _ = record(vm, folder / "small.trace", "qvis-load /dev/vda 1 2000")
        result: dict[str, Any] = {}
        for events in (SMALL, LARGE):
            place = folder / f"{events}.trace"
            size = repeat(trace, place, events)
            code = (
                "import json, sys, time; sys.path.insert(0, 'scripts'); import bench_trace; "
                f"print(json.dumps(bench_trace.attribute_one({str(place)!r})))"
            )
            done = subprocess.run(
                ["taskset", "-c", "0", sys.executable, "-c", code],
                env={**os.environ, "POLARS_MAX_THREADS": "1"},
                cwd=Path(__file__).parent.parent, check=True, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            result[f"{events}"] = {"raw_bytes": size, **json.loads(done.stdout)}
            shutil.rmtree(place)
        return result


def repeat(trace: Trace, place: Path, events: int) -> int:
    """A trace of ``events`` events or a little more: the raw one again and again; its bytes."""
    raw = place / RAW
    raw.mkdir(parents=True)
    for name in ("manifest.json", f"{RAW}/layout.json"):
        shutil.copy(trace.path / name, place / name)
    counts = json.loads((trace.path / RAW / COUNTS).read_text())
    times = events // sum(counts["recorded"]) + 1
    files = {path: np.fromfile(path, dtype=RECORD_TYPE) for path in
             sorted((trace.path / RAW).glob("vcpu-*.bin"))}  # fmt: skip
    starts = [records["time"][1] for records in files.values()]
    ends = [records["time"][-1] for records in files.values()]
    span = max(ends) - min(starts) + np.uint64(1000)
    for path, records in files.items():
        with (raw / path.name).open("wb") as out:
            records[:1].tofile(out)
            for _ in range(times):
                records[1:].tofile(out)
                records["time"][1:] += span
    repeat_qemu(trace.path / RAW / QEMU_TRACE, raw / QEMU_TRACE, times, span)
    counts = {name: [count * times for count in values] for name, values in counts.items()}
    (raw / COUNTS).write_text(json.dumps(counts))
    return sum(file.stat().st_size for file in raw.iterdir())


def repeat_qemu(source: Path, target: Path, times: int, span: np.uint64) -> None:
    """The same of QEMU's own trace events: the names once, and then the events."""
    data = np.frombuffer(source.read_bytes(), dtype=np.uint8)
    names, events, at = [data[: HEADER.size]], [], HEADER.size
    while at < len(data):
        if data[at] == MAPPING:
            _, length = NAME.unpack_from(data, at + TYPE_SIZE)
            end = at + TYPE_SIZE + NAME.size + length
            names.append(data[at:end])
        else:
            _, _, length, _ = RECORD.unpack_from(data, at + TYPE_SIZE)
            end = at + TYPE_SIZE + length
            events.append(data[at:end])
        at = end
    lengths = np.array([len(event) for event in events])
    stamps = (np.cumsum(lengths) - lengths + TYPE_SIZE + 8)[:, None] + np.arange(8)
    block = np.concatenate(events)
    with target.open("wb") as out:
        np.concatenate(names).tofile(out)
        for _ in range(times):
            block.tofile(out)
            moved = block[stamps].copy().view("<u8") + span
            block[stamps] = moved.view(np.uint8)


def attribute_one(place: str) -> dict[str, Any]:
    """Attribute a trace; in a process of its own, whose largest memory is the answer's."""
    start = time.monotonic()
    trace = attribute_trace(Trace.open(Path(place)))
    seconds = time.monotonic() - start
    return {
        "events": trace.manifest.events,
        "seconds": seconds,
        "events_per_s": trace.manifest.events / seconds,
        "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def repeats() -> dict[str, Any]:
    """Two whole boots of guests that count instructions: what is in their traces."""
    frames = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(2):
            trace, _ = record_boot(
                Path(scratch) / str(number), "qvis-load /sys/block/vda/serial 0 500",
                transport="msi", smp=4, queues=4, icount=True,
            )  # fmt: skip
            frames.append(trace.events().drop("time").collect())
    order = [frame.filter(frame["clock"].is_not_null()).sort("vcpu", "clock", maintain_order=True)
             for frame in frames]  # fmt: skip
    return {
        "events": [len(frame) for frame in frames],
        "same_to_the_instruction": order[0].equals(order[1]),
    }
