# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM's own tests on KVM as it was released and on KVM with our series: do they end alike?

    scripts/kvm_tests [--only NAME ...] [--kvm-unit-tests DIR] [--json FILE]

Boots the inner host of the nested backend in QEMU's translator, once with each kernel, and
runs the selftests of Linux (tools/testing/selftests/kvm) there and, from a folder in which
kvm-unit-tests were built, those as well. Prints a table on standard output and what it is
doing on standard error. docs/kvm-tests.md says what is compared.

Exit status: 0 all ended alike, 1 some did not, 130 interrupted, else as `qvis`.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kvm_suites import (
    KEPT,
    LEFT_OUT,
    PLACE,
    Outcome,
    Result,
    Suite,
    Test,
    judge,
    own_tests,
    selftest_list,
    selftests,
    unit_test_list,
)

from qvis.backends.tcg import clock, host_tsc_khz
from qvis.build import Entry, QemuBuild, build_host_linux, build_qemu, pack, series
from qvis.build.initramfs import userland
from qvis.build.qemu import FIRMWARE_PATH
from qvis.cli import report
from qvis.errors import BootError, BuildError, QvisError, UsageError
from qvis.process import tail
from qvis.progress import Step, step

VCPUS = 2
MEMORY = 4096  # MiB
COMMAND_LINE = "console=ttyS0 reboot=t panic=-1 loglevel=6 kvm.halt_poll_ns=0"
BOOT_DEADLINE = 120.0  # seconds, of an emulated machine on a busy host
SLACK = 60.0  # seconds after which an inner host that has not done so hangs
POLL = 0.2
RETRIES = 2  # of the tests that ended in different ways
# No program asks for it: the C library opens it when a thread is cancelled.
LIBGCC = "/lib/x86_64-linux-gnu/libgcc_s.so.1"

INIT = f"""#!/bin/sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
mount -t debugfs debug /sys/kernel/debug
echo 1 >/proc/sys/vm/overcommit_memory  # for guests with more memory than they touch
stty -F /dev/hvc0 raw -echo
exec </dev/null >/dev/hvc0 2>&1
t() {{
    echo "qvis-test: begin $1"
    timeout -s KILL "$2" sh -c "$3" >/tmp/out 2>&1
    status=$?
    tail -c 65536 /tmp/out
    echo
    echo "qvis-test: end $1 $status"
}}
cd /{PLACE}
. ./run
echo "qvis-test: done"
sleep 1
reboot -f
"""


# --- the host that runs them ---


def archive(tests: Path, units: Path | None, qemu: QemuBuild) -> bytes:
    """The inner host's file system but for the list of tests."""
    programs = {
        f"{PLACE}/{path.relative_to(tests / PLACE)}": path
        for path in (tests / PLACE).rglob("*")
        if path.is_file()
    }
    programs[LIBGCC.lstrip("/")] = Path(LIBGCC)
    more = [Entry.file("init", INIT.encode(), 0o755), Entry.folder(PLACE)]
    if units:
        programs["qvis/qemu"] = qemu.binary
        firmware = [*qemu.firmware.iterdir(), *(_multiboot())]
        more += [Entry.folder("qvis/firmware")]
        more += [Entry.file(f"qvis/firmware/{file.name}", file.read_bytes()) for file in firmware]
        flats = sorted((units / "x86").glob("*.flat"))
        more += [Entry.file(f"{PLACE}/{flat.name}", flat.read_bytes()) for flat in flats]
    return pack([*userland(programs), *more])


def _multiboot() -> list[Path]:
    """What QEMU starts kernels with that are no Linux."""
    places = [(folder / "multiboot_dma.bin") for folder in FIRMWARE_PATH]
    if found := [place for place in places if place.exists()]:
        return found[:1]
    raise BuildError(f"no multiboot_dma.bin in {', '.join(map(str, FIRMWARE_PATH))}")


def script(tests: Iterable[Test]) -> bytes:
    """The list of tests as the inner host's init reads it."""
    lines = [shlex.join(["t", test.name, f"{test.deadline:.0f}", test.command]) for test in tests]
    return pack([Entry.file(f"{PLACE}/run", "\n".join([*lines, ""]).encode())])


class Host:
    """The inner host with one kernel, in a folder of its own."""

    def __init__(self, linux: Path, qemu: QemuBuild, base: bytes, folder: Path) -> None:
        self._linux = linux
        self._qemu = qemu
        self._base = base
        self._folder = folder

    def run(self, tests: Sequence[Test], progress: Step) -> dict[str, Outcome]:
        """Run the tests in order; a host that ends or hangs is booted again for the rest."""
        outcomes: dict[str, Outcome] = {}
        while rest := [test for test in tests if test.name not in outcomes]:
            with self._booted(rest):
                for test, outcome in self._follow(rest):
                    outcomes[test.name] = outcome
                    took = f"{outcome.seconds:.0f} s"
                    progress.say(
                        f"{len(outcomes)}/{len(tests)} {test.name}: {outcome.result} ({took})"
                    )
        return outcomes

    @contextmanager
    def _booted(self, tests: Sequence[Test]) -> Iterator[None]:
        self._folder.mkdir(exist_ok=True)
        self._console, self._output = (self._folder / name for name in ("console.log", "out.log"))
        for log in (self._console, self._output):
            log.write_bytes(b"")
        initrd = self._folder / "initrd"
        initrd.write_bytes(self._base + script(tests))
        command: list[str | Path] = [
            self._qemu.binary, "-L", self._qemu.firmware,
            "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max",
            "-smp", str(VCPUS), "-m", str(MEMORY),
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-kernel", self._linux, "-initrd", initrd,
            # Told, since a busy machine measures none, and KVM then has no rate for its guests.
            "-append", f"{COMMAND_LINE} {clock(host_tsc_khz())}",
            "-serial", f"file:{self._console}",
            "-chardev", f"file,id=out,path={self._output}",
            "-device", "virtio-serial-pci", "-device", "virtconsole,chardev=out",
        ]  # fmt: skip
        with (self._folder / "qemu.log").open("wb") as said:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *map(str, command)],
                stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            yield
        finally:
            self._process.kill()
            self._process.wait()

    def _follow(self, tests: Sequence[Test]) -> Iterator[tuple[Test, Outcome]]:
        """Each test with what came of it, as it ends; stops early when the host is gone."""
        offset = 0
        for number, test in enumerate(tests):
            began = time.monotonic()
            deadline = began + test.deadline + SLACK + (0 if number else BOOT_DEADLINE)
            heard = self._console.stat().st_size
            end = re.compile(rf"^qvis-test: end {re.escape(test.name)} (\d+)\r?$", re.MULTILINE)
            while True:
                gone = self._process.poll() is not None or time.monotonic() > deadline
                text = self._output.read_bytes()[offset:].decode(errors="replace")
                if match := end.search(text):
                    break
                if gone:
                    if "qvis-test: begin" not in text:
                        raise BootError(
                            "the inner host did not get to its tests", stage="boot",
                            log=self._console, tail=tail(self._console),
                        )  # fmt: skip
                    yield test, self._crashed(time.monotonic() - began)
                    return
                time.sleep(POLL)
            offset += len(text[: match.end()].encode(errors="replace"))
            said = self._console.read_bytes()[heard:].decode(errors="replace")
            output = text[: match.start()].rpartition(f"qvis-test: begin {test.name}")[2]
            seconds = time.monotonic() - began
            yield test, judge(test.suite, int(match[1]), output, said, seconds)

    def _crashed(self, seconds: float) -> Outcome:
        return Outcome(Result.CRASH, seconds=seconds, last=tuple(tail(self._console, KEPT)))


# --- the comparison ---


@dataclass
class Comparison:
    """One test on both kernels, each time that it was run."""

    test: Test
    own: bool  # the series' own, which can do nothing on the released kernel
    released: list[Outcome]
    patched: list[Outcome]

    @property
    def verdict(self) -> str:
        """``same``, ``differs``, or ``unstable`` when the released kernel gives all outcomes."""
        if self.own:
            good = all(one.result is Result.SKIP for one in self.released)
            good = good and all(one.result is Result.PASS for one in self.patched)
            return "same" if good else "differs"
        if self.released[0].essence == self.patched[0].essence:
            return "same"
        known = {one.essence for one in self.released}
        return "unstable" if {one.essence for one in self.patched} <= known else "differs"


def compare(tests: Sequence[Test], own: set[str], hosts: Sequence[Host]) -> list[Comparison]:
    """Run all on both hosts, the released kernel's first; what differs again on both."""
    found: dict[str, Comparison] = {}
    waiting = list(tests)
    for _ in range(1 + RETRIES):
        sides = []
        for host, kernel in zip(hosts, ("released", "patched"), strict=True):
            with step(f"{len(waiting)} tests on the {kernel} kernel") as progress:
                sides.append(host.run(waiting, progress))
        for test in waiting:
            entry = found.setdefault(test.name, Comparison(test, test.name in own, [], []))
            entry.released.append(sides[0][test.name])
            entry.patched.append(sides[1][test.name])
        waiting = [test for test in tests if found[test.name].verdict == "differs"]
        if not waiting:
            break
    return list(found.values())


def table(comparisons: Sequence[Comparison]) -> str:
    """A line for each test, and the sums."""
    width = max(len(one.test.name) for one in comparisons)
    lines = [f"{'test':<{width}}  {'released':<9} {'patched':<9} verdict"]
    for one in comparisons:
        ends = [
            "/".join(dict.fromkeys(way.result for way in side))
            for side in (one.released, one.patched)
        ]
        lines.append(f"{one.test.name:<{width}}  {ends[0]:<9} {ends[1]:<9} {one.verdict}")
    for suite in Suite:
        of = [one for one in comparisons if one.test.suite is suite]
        if of:
            sums = [
                ", ".join(
                    f"{count} {result}"
                    for result in Result
                    if (count := sum(getattr(one, side)[0].result is result for one in of))
                )
                for side in ("released", "patched")
            ]
            verdicts = [one.verdict for one in of]
            lines += [
                f"{suite}: {len(of)} tests",
                f"  released: {sums[0]}",
                f"  patched:  {sums[1]}",
                f"  {verdicts.count('same')} ended alike, {verdicts.count('unstable')} unstable, "
                f"{verdicts.count('differs')} differ",
            ]
    return "\n".join(lines)


def main() -> int:
    """See the module."""
    signal.signal(signal.SIGTERM, _interrupted)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the tests, these")
    parser.add_argument(
        "--kvm-unit-tests", type=Path, metavar="DIR", help="where kvm-unit-tests were built"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    args = parser.parse_args()
    try:
        return _main(args.only, args.kvm_unit_tests, args.json)
    except QvisError as problem:
        report(problem)
        return problem.exit_code
    except KeyboardInterrupt:
        return 130


def _main(only: Sequence[str] | None, units: Path | None, file: Path | None) -> int:
    patches = series.read("kvm")
    qemu = build_qemu()
    kernels = [build_host_linux(patched=False), build_host_linux()]
    built = selftests(patches)
    tests = selftest_list(built)
    if units:
        if not list((units / "x86").glob("*.flat")):
            raise UsageError(f"{units} has no x86/*.flat: run ./configure and make there")
        tests += unit_test_list((units / "x86" / "unittests.cfg").read_text())
    else:
        print("kvm-unit-tests: skipped (no --kvm-unit-tests)", file=sys.stderr)
    if only:
        if unknown := set(only) - {test.name for test in tests}:
            raise UsageError(f"no such test: {', '.join(sorted(unknown))}")
        tests = [test for test in tests if test.name in only]
    folder = Path(tempfile.mkdtemp(prefix="qvis-kvm-tests-"))
    try:
        base = archive(built, units, qemu)
        hosts = [
            Host(kernel.image, qemu, base, folder / name)
            for kernel, name in zip(kernels, ("released", "patched"), strict=True)
        ]
        comparisons = compare(tests, own_tests(patches), hosts)
    finally:
        shutil.rmtree(folder)
    print(table(comparisons))
    if file:
        facts = {
            "linux": kernels[0].version,
            "kvm_series": kernels[1].series,
            "qemu": f"{qemu.version} ({qemu.series})",
            "left_out": LEFT_OUT,
            "tests": [{**asdict(one), "verdict": one.verdict} for one in comparisons],
        }
        file.write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(one.verdict == "differs" for one in comparisons))


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
