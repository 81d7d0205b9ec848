# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests that KVM's developers have: which there are, and how each says how it ended.

Two suites: ``tools/testing/selftests/kvm`` of Linux, and kvm-unit-tests, which are small
kernels for QEMU. See ``kvm_tests.py``, which runs them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

from qvis.build import cache, series
from qvis.build.recipe import Recipe, build, cpus
from qvis.build.tree import Tree
from qvis.process import run
from qvis.progress import Step

__all__ = [
    "KEPT",
    "LEFT_OUT",
    "PLACE",
    "Outcome",
    "Result",
    "Suite",
    "Test",
    "judge",
    "own_tests",
    "selftest_list",
    "selftests",
    "unit_test_list",
]

BUILD_DEADLINE = 1800.0  # seconds
TEST_DEADLINE = 120.0  # seconds; ended by the inner host
KEPT = 12  # last lines of a test that did not pass
SELFTESTS = "tools/testing/selftests/kvm"
PLACE = "tests"  # in the archive

# Fewer rounds of what takes minutes in emulation.
ARGUMENTS = {"dirty_log_test": "-i 3", "memslot_modification_stress_test": "-i 200"}
# Seconds: a minute on a processor that has nothing else to do.
DEADLINES = {"x86_64/virtio_vis_test": 600.0}
LEFT_OUT = {
    "access_tracking_perf_test": "measures time",
    "demand_paging_test": "measures time",
    "dirty_log_perf_test": "measures time",
    "hardware_disable_test": "makes 512 guests with a thread for each CPU",
    "kvm_page_table_test": "measures time",
    "max_guest_memory_test": "fills all memory",
    "memslot_perf_test": "measures time",
    "rseq_test": "wants restartable sequences, which the inner host has not",
    "x86_64/nx_huge_pages_test": "is started by a script that changes the host",
}


class Suite(StrEnum):
    """Where a test comes from; they say by different exit statuses how they ended."""

    SELFTESTS = "selftests"
    UNIT_TESTS = "kvm-unit-tests"


class Result(StrEnum):
    """How a test ended."""

    PASS = "pass"
    SKIP = "skip"
    FAIL = "fail"
    REFUSED = "refused"  # QEMU did not start it
    TIMEOUT = "timeout"
    CRASH = "crash"  # the host panicked or hung


@dataclass(frozen=True)
class Test:
    """A test: a command for the inner host's shell."""

    suite: Suite
    name: str
    command: str
    deadline: float = TEST_DEADLINE


@dataclass(frozen=True)
class Outcome:
    """What came of a test on one kernel."""

    result: Result
    failures: tuple[str, ...] = ()  # its parts that failed, without numbers
    warnings: tuple[str, ...] = ()  # of the host's kernel meanwhile
    seconds: float = 0.0  # of this machine, emulation included
    last: tuple[str, ...] = ()  # lines of output, when it did not pass

    @property
    def essence(self) -> tuple[Any, ...]:
        """What is compared."""
        parts = () if self.result is Result.TIMEOUT else self.failures
        return (self.result, parts, self.warnings)


def selftests(patches: Sequence[series.Patch]) -> Path:
    """The folder with the selftests of Linux with these patches, built if they never were."""
    return build(
        Recipe(
            component="linux",
            configuration="",
            inputs=(Path(__file__).read_text(),),
            compile=_compile,
            variant="selftests",
        ),
        patches,
    )


def _compile(tree: Tree, folder: Path, result: Path, progress: Step) -> None:
    log = cache.log_file("linux")
    output = folder / "kvm"
    output.mkdir(exist_ok=True)
    progress.say("headers")
    make = ["make", "-C", str(tree.src), f"O={folder}"]
    run([*make, "headers"], stage="headers", log=log, deadline=BUILD_DEADLINE)
    progress.say("selftests")
    run(
        ["make", f"-j{cpus()}", "-C", str(tree.src / SELFTESTS), f"OUTPUT={output}",
         f"KHDR_INCLUDES=-isystem {folder}/usr/include"],
        stage="build selftests", log=log, deadline=BUILD_DEADLINE,
    )  # fmt: skip
    for program in output.rglob("*"):
        if program.is_file() and not program.suffix and program.stat().st_mode & 0o100:
            to = result / PLACE / program.relative_to(output)
            to.parent.mkdir(parents=True, exist_ok=True)
            run(["strip", "-o", to, program], stage="strip", log=log, deadline=BUILD_DEADLINE)


def selftest_list(folder: Path) -> list[Test]:
    """All selftests in ``folder`` that are run."""
    found = sorted(path for path in (folder / PLACE).rglob("*") if path.is_file())
    names = [str(path.relative_to(folder / PLACE)) for path in found]
    return [
        Test(
            Suite.SELFTESTS,
            name,
            f"exec ./{name} {ARGUMENTS.get(name, '')}".rstrip(),
            DEADLINES.get(name, TEST_DEADLINE),
        )
        for name in names
        if name not in LEFT_OUT
    ]


def own_tests(patches: Sequence[series.Patch]) -> set[str]:
    """The selftests that the patches bring or change."""
    found = set()
    for file in (file for patch in patches for file in patch.changes):
        if match := re.fullmatch(rf"{SELFTESTS}/(.*_test)\.c", file):
            found.add(match[1])
    return found


def unit_test_list(config: str) -> list[Test]:
    """The tests of an x86/unittests.cfg that suit this host.

    Those for 32 bits, for VMX and for a PMU, which the emulated processor has not, and those
    that upstream runs only when asked to, are left out.
    """
    tests = []
    for section in re.split(r"^\[", config, flags=re.MULTILINE)[1:]:
        name, _, body = section.partition("]")
        facts = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", body, re.MULTILINE))
        groups = facts.get("groups", "").split()
        if facts.get("arch") == "i386" or {"nodefault", "vmx", "pmu"} & set(groups):
            continue
        arguments = facts.get("test_args", "").strip("'\"")
        command = (
            "exec /qvis/qemu -L /qvis/firmware -M q35,accel=kvm -no-reboot -nodefaults"
            " -display none -vga none -serial stdio -global kvm-pit.lost_tick_policy=discard"
            " -device pc-testdev -device isa-debug-exit,iobase=0xf4,iosize=0x4"
            f" -kernel {facts['file']} -smp {facts.get('smp', '1')}"
        )
        if arguments:
            # In double quotes, since some contain a command to run.
            command += f' -append "{arguments}"'
        command += f" {facts.get('qemu_params', '')}"
        for check in facts.get("check", "").split():
            path, _, wanted = check.partition("=")
            command = f'[ "$(cat {path})" = {wanted} ] || exit 155; {command}'
        tests.append(Test(Suite.UNIT_TESTS, name, command.rstrip()))
    return tests


def judge(suite: Suite, status: int, output: str, console: str, seconds: float) -> Outcome:
    """What a test's exit status and output say, and what the host's kernel said meanwhile."""
    lines = output.replace("\r", "").strip().splitlines()
    complaints = [line for line in lines if re.match(r"\S*qemu\S*: (?!.*warning:)", line)]
    if status == 137:
        result = Result.TIMEOUT
    elif suite is Suite.SELFTESTS:
        result = {0: Result.PASS, 4: Result.SKIP}.get(status, Result.FAIL)  # kselftest.h
    elif status == 1 and complaints:
        result = Result.REFUSED
    else:
        # isa-debug-exit makes a status of twice what is written, and one.
        result = {1: Result.PASS, 155: Result.SKIP}.get(status, Result.FAIL)
    failed = [line for line in lines if re.match(r"\s*(FAIL\b|not ok )", line)]
    failed += [where for line, where in pairwise(lines) if "Test Assertion Failure" in line]
    warned = re.findall(r"(?:WARNING: |BUG: |general protection).*", console)
    return Outcome(
        result,
        failures=tuple(_without_numbers(line) for line in failed),
        warnings=tuple(_without_numbers(line) for line in warned),
        seconds=round(seconds, 1),
        last=() if result is Result.PASS else tuple(lines[-KEPT:]),
    )


def _without_numbers(line: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "N", line.strip())
