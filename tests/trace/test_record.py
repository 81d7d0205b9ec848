# SPDX-License-Identifier: GPL-2.0-or-later
"""Recording real guests on TCG: every access, each interrupt whole, and whatever goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import qvis
from qvis.backends.qemu import Accelerator
from qvis.backends.tcg import Tcg
from qvis.build import built
from qvis.build.cache import COMPILER
from qvis.build.plugin import SOURCES, build_plugin, glib_flags
from qvis.build.qemu import QemuBuild
from qvis.guest import load
from qvis.machine.machine import Machine
from qvis.machine.qmp import Qmp
from qvis.spec import MachineSpec
from qvis.trace import simpletrace, sources, tcg
from qvis.trace.model import Cause, Kind
from qvis.trace.record import attribute_trace, record, record_boot, recording
from qvis.trace.stats import Stats
from qvis.trace.store import Trace
from qvis.trace.symbols import FUNCTIONS, Symbols
from tests.conftest import gone

Cli = Callable[..., subprocess.CompletedProcess[str]]
MMIO_EVENTS = ("virtio_mmio_read", "virtio_mmio_write_offset")
QUEUE_NOTIFY, DOORBELL = 0x50, 0xC4
HANDLERS = [name for name, role in FUNCTIONS.items() if role == "handler"]


@pytest.fixture
def tcg_vm(vm: Machine) -> Machine:
    if vm.info["provenance"]["backend"] != "tcg":
        pytest.skip("the tracer in QEMU is for TCG")
    return vm


@pytest.fixture(scope="module")
def guest() -> Iterator[Machine]:
    """A guest to which nothing happens that a recording does not do."""
    with qvis.up(backend="tcg", transport="msi", smp=4, queues=4) as machine:
        yield machine


def devices(trace: Trace) -> pl.DataFrame:
    """The trace's events, with names as text."""
    return trace.events().collect().with_columns(pl.col(pl.Categorical).cast(pl.String))


# What is recorded


def window(raw: Path, before: tcg.Counts, after: tcg.Counts) -> np.ndarray[Any, Any]:
    """The records that the tracer counted between these two."""
    parts = []
    for vcpu, end in enumerate(after.recorded):
        file = raw / f"vcpu-{vcpu:04}.bin"
        start = before.recorded[vcpu] if vcpu < len(before.recorded) else 0
        if end > start:  # the first record is the header
            records = np.fromfile(file, dtype=tcg.RECORD_TYPE, offset=(1 + start) * 40)
            parts.append(records[: end - start])
    return np.concatenate(parts)


def seen_by_both(vm: Machine, folder: Path, work: Callable[[], object]) -> tuple[Any, Any]:
    """Accesses to virtio-mmio's registers during ``work``: the tracer's, and QEMU's own events.

    Both are switched and counted while the guest is paused, so that they cover the same.
    """
    with recording(vm, folder, command="both") as session:
        vm.qmp("stop")
        try:
            for name in MMIO_EVENTS:
                vm.qmp("trace-event-set-state", name=name, enable=True)
            before = tcg.CountsReader(vm.folder.path)()
            vm.qmp("cont")
            work()
            vm.qmp("stop")
            after = tcg.CountsReader(vm.folder.path)()
        finally:
            for name in MMIO_EVENTS:
                vm.qmp("trace-event-set-state", name=name, enable=False)
            vm.qmp("cont")
        records = window(folder / "raw", before, after)
    assert session.trace
    assert session.trace.manifest.lost == 0

    regions = [r for r in session.trace.manifest.regions if r.map == "virtio-mmio"]
    tracer: Counter[tuple[int, ...]] = Counter()
    for each in records[(records["kind"] == tcg.ACCESS) & (records["flags"] & tcg.PORT == 0)]:
        region = next((r for r in regions if r.start <= each["a"] < r.end), None)
        if region:
            offset, value = int(each["a"]) - region.start, int(each["b"])
            tracer[(offset, value) if each["flags"] & tcg.STORE else (offset,)] += 1

    qemu: Counter[tuple[int, ...]] = Counter()
    for several in simpletrace.read(folder / "raw" / "qemu.trace", []):
        for events in several:
            if events.name in MMIO_EVENTS:
                qemu.update(map(tuple, events.arguments.tolist()))
    return tracer, qemu


def rebind(vm: Machine, driver: str = "virtio_blk", device: str = "virtio0") -> None:
    folder = f"/sys/bus/virtio/drivers/{driver}"
    vm.ssh.run(f"echo {device} > {folder}/unbind && echo {device} > {folder}/bind")


def test_tracer_and_qemu_count_the_same_accesses(tcg_vm: Machine, tmp_path: Path) -> None:
    """Register by register and value by value, with two vCPUs at work."""

    def work() -> None:
        tcg_vm.ssh.run("qvis-load /dev/vda 0 150 & qvis-load /dev/vda 3 150; wait")
        rebind(tcg_vm)

    tracer, qemu = seen_by_both(tcg_vm, tmp_path / "t", work)
    # What an eventfd takes does not get as far as the device's own function.
    notified = {key: count for key, count in tracer.items() if key[0] == QUEUE_NOTIFY}
    assert {key: count for key, count in tracer.items() if key not in notified} == qemu
    if tcg_vm.spec.transport is qvis.Transport.PCI:
        assert not tracer  # it has no such device
    else:
        assert notified[(QUEUE_NOTIFY, 0)] >= 150
        assert notified[(QUEUE_NOTIFY, 3)] == 150  # no other device has so many queues
        assert qemu[(0x70,)] > 0  # reads, too
        assert sum(qemu.values()) > 60


@pytest.mark.parametrize("kind", ["msi", "intx", "vis"])
def test_notifications_are_counted_likewise(tmp_path: Path, kind: str) -> None:
    """All accesses, since no eventfd takes the notifications here."""
    with qvis.up(backend=OtherTracer(), transport=kind, smp=2, queues=2) as vm:
        tracer, qemu = seen_by_both(
            vm, tmp_path / "t", lambda: vm.ssh.run("qvis-load /dev/vda 1 100")
        )
    assert tracer == qemu
    assert qemu[(QUEUE_NOTIFY, 1)] >= 100
    # The window may begin or end between a vCPU's read and its acknowledgement.
    assert abs(qemu[(0x60,)] - qemu[(0x64, 1)]) <= vm.spec.smp
    assert (qemu[(0x60,)] >= 100) == (kind == "intx")


def test_next_to_nothing_is_of_unknown_cause(tcg_vm: Machine, tmp_path: Path) -> None:
    """Load, masks, moves, and a driver that leaves and comes back."""
    transport = tcg_vm.spec.transport
    with recording(tcg_vm, tmp_path / "t") as session:
        tcg_vm.ssh.run("qvis-load /dev/vda 1 200")
        for vector in tcg_vm.irqs.vectors():
            if vector.driver == "virtio_blk" and vector.source != "config":
                for cpu in (3, 2):
                    tcg_vm.ssh.run(f"echo {cpu} > /proc/irq/{vector.irq}/smp_affinity_list")
                    load.run(tcg_vm.ssh, vector.queue or 0, 2)
        rebind(tcg_vm)
        tcg_vm.ssh.run("qvis-load /dev/vda 1 10")
    assert session.trace
    stats = Stats.of(session.trace)
    unknown = [t for t in stats.touched if t.cause in (None, Cause.OTHER)]
    assert stats.other <= 0.01, unknown
    assert session.trace.manifest.partial == ()
    causes = Counter[str]()
    for touch in stats.touched:
        if touch.device in ("blk0", "IOAPIC", "IOAPIC2") and touch.cause:
            causes[touch.cause] += touch.count
    assert causes["notify"] >= 210
    assert causes["set-up"] > 20
    # Over VIS all of that is memory; over MSI Linux does not mask to move.
    if not transport.storage:
        assert causes["route change"] >= (8 if transport.vector_per_queue else 2)
    if transport in (qvis.Transport.PCI, qvis.Transport.INTX):
        assert causes["mask"] > 0
        assert causes["unmask"] > 0


def test_doorbells_are_counted_likewise(tmp_path: Path) -> None:
    """Each names its vector; a device that reads entries live has none."""
    counted = {}
    for kind in (qvis.Transport.VIS, qvis.Transport.VIS_DOORBELL):
        with qvis.up(backend=OtherTracer(), transport=kind, smp=2, queues=2) as vm:
            vector = next(v for v in vm.irqs.vectors() if v.queue == 1)
            vm.irqs.set_affinity(vector.irq, [1])
            load.run(vm.ssh, 1, 1)  # what has never fired is no copy

            def work(vm: Machine = vm, irq: int = vector.irq) -> None:
                for cpu in (0, 1, 0):
                    vm.ssh.run(f"echo {cpu} > /proc/irq/{irq}/smp_affinity_list")
                    load.run(vm.ssh, 1, 5)

            tracer, qemu = seen_by_both(vm, tmp_path / kind, work)
        assert tracer == qemu
        counted[kind] = {key: count for key, count in tracer.items() if key[0] == DOORBELL}
    assert counted[qvis.Transport.VIS] == {}
    assert counted[qvis.Transport.VIS_DOORBELL] == {(DOORBELL, 2): 3}


def blk_counts(vm: Machine) -> dict[int, int]:
    return {v.irq: sum(v.counts.values()) for v in vm.irqs.vectors() if v.driver == "virtio_blk"}


def test_every_interrupt_is_whole(tcg_vm: Machine, tmp_path: Path) -> None:
    """As many as the guest counted; raised, delivered, handled and ended, on one vCPU."""
    line = not tcg_vm.spec.transport.vector_per_queue
    before = blk_counts(tcg_vm)
    with recording(tcg_vm, tmp_path / "t") as session:
        tcg_vm.ssh.run("qvis-load /dev/vda 1 100; qvis-load /dev/vda 2 100")
    after = blk_counts(tcg_vm)
    assert session.trace
    events = devices(session.trace)
    counted = {irq: after[irq] - before[irq] for irq in after if after[irq] != before[irq]}
    mine = events.filter(pl.col("irq").is_in(list(counted)))
    delivered = mine.filter(kind="deliver")
    assert dict(delivered.group_by("irq").len().iter_rows()) == counted
    assert sum(counted.values()) == 200
    assert delivered["device"].unique().to_list() == ["blk0"]
    sources = {"req.1", "req.2"} if not line else {""}
    assert set(delivered["source"]) == sources

    touched = mine.filter(kind="access").group_by("device", "register", "write").len()
    found = {(device, register): count for device, register, _, count in touched.iter_rows()}
    eois = found.pop(("LAPIC", "EOI"))
    assert eois == 200
    if line:
        assert found.pop(("blk0", "InterruptStatus")) == 200
        assert found.pop(("blk0", "InterruptACK")) == 200
        # Linux looks whether it was level-triggered before it ends it (ioapic_ack_level).
        assert {device for device, _ in found} <= {"LAPIC"}
        assert {register[:3] for _, register in found} <= {"TMR"}
    else:
        assert not found
    ends = mine.filter(kind="eoi")
    assert len(ends) == (200 if line else 0)
    assert set(ends["device"]) == ({"IOAPIC"} if line else set())

    for (number,), rows in mine.group_by("interrupt"):
        assert number is not None
        kinds = Counter(rows["kind"])
        assert kinds["raise"] == kinds["deliver"] == 1, rows

        def at(what: pl.Expr, rows: pl.DataFrame = rows) -> int:
            return int(rows.filter(what)["time"].min() or 0)  # type: ignore[arg-type]

        raised, taken = at(pl.col("kind") == "raise"), at(pl.col("kind") == "deliver")
        handled = at(pl.col("function").is_in(HANDLERS))
        ended = at((pl.col("register") == "EOI") & pl.col("write"))
        # An edge is ended before its handler runs (handle_edge_irq), a level after.
        order = [raised, taken, handled, ended] if line else [raised, taken, ended, handled]
        assert order == sorted(order) and order[0] > 0, rows
        assert rows["vcpu"].drop_nulls().n_unique() == 1
        clocks = rows.filter(pl.col("clock").is_not_null()).sort("time")["clock"]
        assert clocks.is_sorted()
    assert events["time"].is_sorted()


def test_functions_are_all_that_the_kernel_has(guest: Machine, tmp_path: Path) -> None:
    trace, _ = record(guest, tmp_path / "t", "qvis-load /dev/vda 1 5")
    listing = subprocess.run(
        ["nm", guest.info["vmlinux"]], capture_output=True, text=True, check=True
    ).stdout
    known = {line.split()[2] for line in listing.splitlines()}
    layout = json.loads((trace.path / "raw" / "layout.json").read_text())
    assert sorted(layout["functions"]) == sorted(known & set(FUNCTIONS))
    entries = {f"asm_{name}" for name in layout["system_entries"].values()}
    assert entries == {name for name in known if name.startswith("asm_sysvec_")}
    called = Counter(devices(trace).filter(kind="function")["function"])
    assert called["vring_interrupt"] >= 5
    assert set(called) <= set(layout["functions"])


# More vCPUs, other tracers


class OtherTracer(Tcg):
    """A TCG backend with another tracer, QEMU or kernel options.

    Without eventfds: QEMU tells of no access to them.
    """

    def __init__(self, plugin: Path | None = None, options: str = "", **more: Any) -> None:
        super().__init__(**more)
        self._plugin, self._options = plugin, options

    def accelerator(self, spec: MachineSpec) -> Accelerator:
        usual = super().accelerator(spec)
        options = (*usual.options, "-global", "virtio-mmio.ioeventfd=off")
        if self._plugin:
            ours = str(build_plugin(self.artifacts().qemu))
            options = tuple(word.replace(ours, str(self._plugin)) for word in options)
        kernel = f"{usual.kernel_options} {self._options}"
        return dataclasses.replace(usual, options=options, kernel_options=kernel)


def test_more_than_64_vcpus(tmp_path: Path) -> None:
    """80, two of them at work: the first and one that is brought up late."""
    backend = OtherTracer(options="maxcpus=2")
    with qvis.up(backend=backend, transport="msi", smp=80, queues=2, memory=1024) as vm:
        vm.ssh.run("echo 1 > /sys/devices/system/cpu/cpu70/online")
        irq = next(v.irq for v in vm.irqs.vectors() if v.queue == 1)
        vm.irqs.set_affinity(irq, [70])
        trace, _ = record(vm, tmp_path / "t", "taskset 400000000000000000 qvis-load /dev/vda 70 20 "
                          "|| qvis-load /dev/vda 1 20")  # fmt: skip
    events = devices(trace)
    assert trace.manifest.partial == ()
    on_70 = events.filter((pl.col("vcpu") == 70) & (pl.col("irq") == irq))
    assert len(on_70.filter(kind="deliver")) == 20
    assert len(on_70.filter(kind="raise")) == 20
    assert (trace.path / "raw" / "vcpu-0070.bin").exists()


def test_tracer_for_a_qemu_that_does_not_tell(tmp_path: Path) -> None:
    """Compiled as for a QEMU without any of the callbacks: it asks of every memory access."""
    artifacts = built()
    if artifacts is None:
        pytest.skip("QEMU is not built")
    plugin = tmp_path / "libold.so"
    subprocess.run(
        [COMPILER, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror",
         "-shared", "-fPIC", "-I", artifacts.qemu.include, "-o", plugin, *SOURCES.glob("*.c"),
         *glib_flags()],
        check=True, timeout=60,
    )  # fmt: skip
    with qvis.up(backend=OtherTracer(plugin), transport="msi", smp=2, queues=2) as vm:
        tracer, qemu = seen_by_both(
            vm, tmp_path / "t", lambda: vm.ssh.run("qvis-load /dev/vda 1 100")
        )
    assert tracer == qemu
    assert qemu[(QUEUE_NOTIFY, 1)] >= 100
    partial = Trace.open(tmp_path / "t").manifest.partial
    assert partial == (
        "this QEMU does not tell plugins of accesses to I/O ports",
        "this QEMU does not tell plugins of interrupts being taken",
    )


def test_qemu_as_released(tmp_path: Path) -> None:
    """It has a callback for interrupts and none for accesses."""
    artifacts, plain = built(), QemuBuild.find(())
    if artifacts is None or plain is None:
        pytest.skip("QEMU as released is not built: `qvis build --unpatched` does")
    backend = OtherTracer(artifacts=dataclasses.replace(artifacts, qemu=plain))
    with qvis.up(backend=backend, transport="intx", smp=2, queues=2) as vm:
        tracer, qemu = seen_by_both(
            vm, tmp_path / "t", lambda: vm.ssh.run("qvis-load /dev/vda 1 50")
        )
    assert tracer == qemu
    assert qemu[(0x60,)] >= 50
    trace = Trace.open(tmp_path / "t")
    assert trace.manifest.partial == ("this QEMU does not tell plugins of accesses to I/O ports",)
    events = devices(trace)
    assert len(events.filter(kind="deliver", device="blk0")) >= 50
    assert "port" not in set(events["space"])


# From the first instruction on

BOOT_COMMAND = "qvis-load /dev/vda 1 5; grep -c virtio /proc/interrupts; exit 7"


def test_boots_that_count_instructions_repeat_to_the_event(
    cli: Cli, tmp_path: Path, state: Path
) -> None:
    """Two boots at once on four vCPUs, one by the command line, differ in nothing but time."""
    done: list[subprocess.CompletedProcess[str]] = []
    words = ("trace", "--boot", "--icount", "--smp", "4", "--queues", "4", "--transport", "msi",
             "-o", str(tmp_path / "one"), "--", "sh", "-c", BOOT_COMMAND)  # fmt: skip
    other = threading.Thread(target=lambda: done.append(cli(*words)))
    other.start()
    trace, status = record_boot(
        tmp_path / "a, b",
        f"sh -c '{BOOT_COMMAND}'",
        transport="msi", smp=4, queues=4, icount=True, backend="tcg",
    )  # fmt: skip
    other.join()
    assert (done[0].returncode, status) == (7, 7), done[0].stderr
    assert "Traceback" not in done[0].stderr
    assert len(done[0].stderr.splitlines()) < 30
    first, second = devices(Trace.open(tmp_path / "one")), devices(trace)
    assert trace.manifest.partial == ()
    assert trace.manifest.command is None
    assert len(second) > 5000
    assert second["vcpu"].drop_nulls().n_unique() == 4
    assert len(second.filter(kind="raise")) > 0  # QEMU's own events, too
    # Those of QEMU's own threads have no place among instructions but their time.
    for kind in Kind:
        mine, others = (frame.filter(kind=kind).drop("time") for frame in (first, second))
        assert len(mine) == len(others), kind
        for column in mine.columns:
            same = mine[column].eq_missing(others[column])
            assert same.all(), (kind, column, (~same).arg_max())
    assert first.drop("time").equals(second.drop("time"))


# What goes wrong


def test_output_that_is_there(guest: Machine, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "precious").touch()
    with pytest.raises(qvis.UsageError, match="is there already"):
        record(guest, tmp_path / "t", "true")
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["precious"]


def other_build(real: Path, tmp_path: Path) -> Path:
    """The same kernel with another build ID."""
    build_id = bytes.fromhex(Symbols.read(real).build_id)
    path = tmp_path / "vmlinux-other"
    path.write_bytes(real.read_bytes().replace(build_id, build_id[::-1]))
    return path


def stripped(real: Path, tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux-stripped"
    subprocess.run(["strip", "-o", path, real], check=True)
    return path


def no_elf(real: Path, tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux-text"
    path.write_text("vmlinux\n" * 100)
    return path


def cut_short(real: Path, tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux-cut"
    path.write_bytes(real.read_bytes()[:100_000])
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (other_build, "the vmlinux does not match the running guest: build ID"),
        (stripped, "has no symbols: it was stripped"),
        (no_elf, "is no ELF file"),
        (cut_short, "is no ELF file|has no symbols"),
        (lambda real, tmp_path: tmp_path / "absent", "cannot read .*absent: No such file"),
        (lambda real, tmp_path: tmp_path, "cannot read .*: Is a directory"),
        (lambda real, tmp_path: Path("/bin/true"), "has no symbol"),
    ],
    ids=["another", "stripped", "text", "cut short", "absent", "folder", "program"],
)
def test_vmlinux_that_will_not_do(
    guest: Machine, tmp_path: Path, make: Callable[[Path, Path], Path], says: str
) -> None:
    image = make(Path(guest.info["vmlinux"]), tmp_path)
    with pytest.raises(qvis.UsageError, match=says):
        record(guest, tmp_path / "t", "true", vmlinux=image)
    assert not (tmp_path / "t").exists()


def test_command_that_fails(guest: Machine, tmp_path: Path) -> None:
    trace, completed = record(guest, tmp_path / "t", "echo out; echo err >&2; exit 3")
    assert (completed.status, completed.stdout, completed.stderr) == (3, "out\n", "err\n")
    assert trace.manifest.status == 3
    assert trace.manifest.partial == ()
    assert Trace.open(tmp_path / "t").manifest == trace.manifest


def test_command_that_never_ends(guest: Machine, tmp_path: Path) -> None:
    with pytest.raises(qvis.GuestError, match="did not end within 1 s") as caught:
        record(guest, tmp_path / "t", "qvis-load /dev/vda 1 50; sleep 30", deadline=1)
    assert caught.value.log == tmp_path / "t"
    trace = Trace.open(tmp_path / "t")
    assert trace.manifest.status is None
    assert len(trace.manifest.partial) == 1
    assert "did not end within 1 s" in trace.manifest.partial[0]
    assert len(devices(trace).filter(register="QueueNotify", device="blk0")) == 50


def test_place_with_a_difficult_name(guest: Machine, tmp_path: Path) -> None:
    """QEMU's monitor and its options have rules of their own for spaces, quotes and commas."""
    trace, _ = record(guest, tmp_path / """a "b", c\\d 'é""", "qvis-load /dev/vda 1 20")
    assert trace.manifest.partial == ()
    assert len(devices(trace).filter(kind="raise", device="blk0")) == 20


def test_path_that_is_too_long(guest: Machine, tmp_path: Path) -> None:
    output = tmp_path.joinpath(*["x" * 200] * 6)
    with pytest.raises(qvis.UsageError, match="too long"):
        record(guest, output, "true")
    assert not output.exists()
    assert record(guest, tmp_path / "t", "true")[0].manifest.partial == ()


def test_one_recording_at_a_time(guest: Machine, cli: Cli, tmp_path: Path) -> None:
    with recording(guest, tmp_path / "t") as session:
        guest.ssh.run("qvis-load /dev/vda 1 20")
        with pytest.raises(qvis.UsageError, match="is being recorded already"):
            record(guest, tmp_path / "u", "true")
        done = cli("trace", guest.name, "-o", str(tmp_path / "u"), "--", "true")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "is being recorded already" in done.stderr
        guest.ssh.run("qvis-load /dev/vda 1 20")
    assert session.trace
    assert session.trace.manifest.partial == ()
    assert len(devices(session.trace).filter(register="QueueNotify", device="blk0")) == 40
    assert not (tmp_path / "u").exists()


def test_guest_that_is_paused(
    guest: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No vCPU is there to answer; and what was asked for is not done later."""
    with monkeypatch.context() as patched:
        patched.setattr(tcg, "ANSWER_DEADLINE", 0.5)
        patched.setattr(sources, "NUDGE_DEADLINE", 0.3)
        with recording(guest, tmp_path / "t") as session:
            guest.qmp("stop")
            resume = threading.Timer(5, _cont, [guest])  # long after both
            resume.start()
        resume.join()
    assert session.trace
    assert any("did not answer" in reason for reason in session.trace.manifest.partial)
    assert idle(guest, 5)
    assert record(guest, tmp_path / "u", "true")[0].manifest.partial == ()


def _cont(vm: Machine) -> None:
    with Qmp(vm.folder) as qmp:
        qmp("cont")


def state_of(vm: Machine) -> int:
    control = np.memmap(vm.folder / "trace.control", dtype=tcg.CONTROL_TYPE, mode="r", shape=(1,))
    return int(control[0]["state"])


def idle(vm: Machine, wait: float) -> bool:
    """Whether the tracer stops recording within ``wait`` seconds, the guest having little to do."""
    end = time.monotonic() + wait
    while state_of(vm) != tcg.IDLE:
        if time.monotonic() > end:
            return False
        vm.ssh.run("true")
        time.sleep(0.05)
    return True


def start_recorder(vm: Machine, output: Path, *, lease: float) -> subprocess.Popen[str]:
    """`qvis trace` of a command that takes long, once it records."""
    program = (
        f"import sys; import qvis.trace.tcg as tcg; tcg.LEASE = {lease}\n"
        "from qvis.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["trace", vm.name, "-o", str(output), "--", "sleep", "60"]
    recorder = subprocess.Popen(
        [sys.executable, "-c", program, *words], stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 20
    while state_of(vm) != tcg.RECORDING:
        assert recorder.poll() is None, recorder.communicate()
        assert time.monotonic() < end, "it does not begin"
        time.sleep(0.02)
    vm.ssh.run("qvis-load /dev/vda 1 30")
    return recorder


def test_recorder_that_is_killed(guest: Machine, tmp_path: Path) -> None:
    """The tracer goes on until its lease has passed, and not for longer."""
    recorder = start_recorder(guest, tmp_path / "t", lease=1.5)
    recorder.kill()
    recorder.communicate()
    killed = time.monotonic()
    assert idle(guest, 10)
    assert 0.3 < time.monotonic() - killed < 4
    trace = Trace.open(tmp_path / "t")
    assert trace.manifest.partial == ("the recording did not end in order",)
    trace = attribute_trace(trace)
    assert "the recorder was killed" in trace.manifest.partial[1]
    assert len(devices(trace).filter(register="QueueNotify", device="blk0")) == 30
    assert record(guest, tmp_path / "u", "true")[0].manifest.partial == ()


def test_recording_after_one_that_was_killed(guest: Machine, tmp_path: Path) -> None:
    """At once, while the tracer still records the first: each has its own events."""
    recorder = start_recorder(guest, tmp_path / "t", lease=30)
    recorder.kill()
    recorder.communicate()
    assert state_of(guest) == tcg.RECORDING
    trace, _ = record(guest, tmp_path / "u", "qvis-load /dev/vda 2 25")
    assert trace.manifest.partial == ()
    assert len(devices(trace).filter(register="QueueNotify", device="blk0")) == 25
    assert state_of(guest) == tcg.IDLE


def test_ctrl_c(guest: Machine, tmp_path: Path) -> None:
    recorder = start_recorder(guest, tmp_path / "t", lease=10)
    recorder.send_signal(signal.SIGINT)
    _, said = recorder.communicate(timeout=20)
    assert recorder.returncode == 130
    assert "Traceback" not in said
    trace = Trace.open(tmp_path / "t")
    assert trace.manifest.partial == ("interrupted",)
    assert len(devices(trace).filter(register="QueueNotify", device="blk0")) == 30
    assert state_of(guest) == tcg.IDLE


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_full_disk(guest: Machine, tmp_path: Path) -> None:
    """Room for two vCPUs' first events: the others' are dropped, and counted."""
    with small_disk(tmp_path / "small", "3M") as disk:
        load_all = "for n in 0 1 2 3; do qvis-load /dev/vda $n 100; done"
        trace, completed = record(guest, disk / "t", load_all)
        assert completed.status == 0
        partial = trace.manifest.partial
        assert any("could not write: No space left on device" in reason for reason in partial)
        assert trace.manifest.lost >= 100
        assert any(f"{trace.manifest.lost} events were dropped" in reason for reason in partial)
        events = devices(trace)
        assert 0 < len(events.filter(register="QueueNotify", device="blk0")) < 400
    assert load.run(guest.ssh, 1, 10).completed == 10
    assert record(guest, tmp_path / "u", "true")[0].manifest.partial == ()


def test_disk_without_any_room(guest: Machine, tmp_path: Path) -> None:
    """The trace says so, and can be read where there is room."""
    with small_disk(tmp_path / "small", "1M") as disk:
        with recording(guest, disk / "t") as session:
            with contextlib.suppress(OSError), (disk / "filler").open("wb") as filler:
                while True:
                    filler.write(bytes(4096))
                    filler.flush()
            guest.ssh.run("qvis-load /dev/vda 1 10")
        kept = Trace.open(disk / "t")
        assert kept == session.trace
        reasons = kept.manifest.partial
        assert any("could not write: No space left on device" in reason for reason in reasons)
        shutil.copytree(disk / "t", tmp_path / "copy")
    again = attribute_trace(Trace.open(tmp_path / "copy"))
    assert again.manifest.lost >= 10
    assert again.events().select(pl.len()).collect().item() == again.manifest.events
    assert record(guest, tmp_path / "u", "true")[0].manifest.partial == ()


def test_machine_that_is_killed(boot: Callable[..., Machine], tmp_path: Path) -> None:
    vm = boot(transport="msi", smp=1, queues=1)
    if vm.info["provenance"]["backend"] != "tcg":
        pytest.skip("the tracer in QEMU is for TCG")
    begin = time.monotonic()
    with pytest.raises(qvis.LostMachineError), recording(vm, tmp_path / "t"):
        vm.ssh.run("qvis-load /dev/vda 0 60")
        os.kill(vm.process, signal.SIGKILL)
        vm.ssh.run("true")
    assert time.monotonic() - begin < 10
    trace = Trace.open(tmp_path / "t")
    assert len(trace.manifest.partial) >= 2
    assert "the work did not end" in trace.manifest.partial[0]
    assert trace.manifest.partial[1].startswith("the machine died")
    events = devices(trace)
    assert len(events.filter(register="QueueNotify", device="blk0")) == 60
    assert len(events.filter(kind="deliver", device="blk0")) == 60
    assert events["time"].min() > 0  # type: ignore[operator]


def test_an_emulated_machine_that_is_killed(tmp_path: Path) -> None:
    with qvis.up(backend="emulated", transport="msi", smp=1, queues=1) as vm:
        begin = time.monotonic()
        with pytest.raises(qvis.LostMachineError), recording(vm, tmp_path / "t"):
            vm.ssh.run("qvis-load /dev/vda 0 60")
            os.kill(vm.process, signal.SIGKILL)
            vm.ssh.run("true")
        assert time.monotonic() - begin < 10
    manifest = Trace.open(tmp_path / "t").manifest
    assert "the work did not end" in manifest.partial[0]
    assert any("machine died" in reason for reason in manifest.partial)


def test_machine_that_is_ended(boot: Callable[..., Machine], cli: Cli, tmp_path: Path) -> None:
    """By `qvis down` in the middle of a recording: its folder goes, the trace does not."""
    vm = boot(transport="msi", smp=1, queues=1)
    if vm.info["provenance"]["backend"] != "tcg":
        pytest.skip("the tracer in QEMU is for TCG")
    begin = time.monotonic()
    with recording(vm, tmp_path / "t") as session:
        vm.ssh.run("qvis-load /dev/vda 0 60")
        assert cli("down", vm.name).returncode == 0
    assert time.monotonic() - begin < 10
    assert gone(str(vm.folder.path))
    assert session.trace
    assert any(text.startswith("the machine died") for text in session.trace.manifest.partial)
    assert len(devices(session.trace).filter(register="QueueNotify", device="blk0")) == 60


def test_machine_that_moves_away(boot: Callable[..., Machine], tmp_path: Path) -> None:
    """A migration ends the recording; the guest goes on and can be recorded where it is."""
    vm = boot(transport="msi", smp=1, queues=1)
    if vm.info["provenance"]["backend"] != "tcg":
        pytest.skip("the tracer in QEMU is for TCG")
    begin = time.monotonic()
    with recording(vm, tmp_path / "t") as session:
        vm.ssh.run("qvis-load /dev/vda 0 60")
        target = vm.migrate()
    try:
        assert time.monotonic() - begin < 20
        assert session.trace
        assert any(text.startswith("the machine died") for text in session.trace.manifest.partial)
        assert len(devices(session.trace).filter(register="QueueNotify", device="blk0")) == 60
        trace, _ = record(target, tmp_path / "u", "qvis-load /dev/vda 0 20")
        assert trace.manifest.partial == ()
        assert len(devices(trace).filter(kind="deliver", device="blk0")) == 20
    finally:
        target.down()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("sleep 1000", "no sign of 'qvis-stage: done'"),
        ("echo c > /proc/sysrq-trigger", "the guest panicked: sysrq triggered crash"),
    ],
)
def test_boot_that_does_not_end_is_kept(tmp_path: Path, command: str, reason: str) -> None:
    with pytest.raises(qvis.BootError, match=reason) as caught:
        record_boot(tmp_path / "t", command, backend="tcg", smp=1, queues=1, deadline=3)
    assert caught.value.log == tmp_path / "t"
    trace = Trace.open(tmp_path / "t")
    assert any(reason in why for why in trace.manifest.partial)
    assert trace.events().filter(pl.col("register") == "MagicValue").collect().height > 0


def test_events_that_are_not_there_are_not_taken_for_none(guest: Machine, tmp_path: Path) -> None:
    trace, _ = record(guest, tmp_path / "t", "true")
    for part in (tmp_path / "t" / "events").iterdir():
        part.unlink()
    with pytest.raises(qvis.UsageError, match="0 of its"):
        trace.events()
    (tmp_path / "t" / "events").rmdir()
    with pytest.raises(qvis.UsageError, match="qvis trace attribute"):
        trace.events()
    assert attribute_trace(trace).events().collect().height == trace.manifest.events
