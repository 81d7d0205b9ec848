# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/kvm_tests: what it reads, how it judges, and a few tests on both kernels."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qvis.build import LinuxBuild, Role, series

SCRIPT = Path(__file__).parents[2] / "scripts" / "kvm_tests.py"
TIMEOUT = 900

# In the form of kvm-unit-tests' x86/unittests.cfg.
CONFIG = """
# comment
[x2apic]
file = apic.flat
smp = 2
qemu_params = -cpu qemu64,+x2apic
arch = x86_64
groups = apic

[vmexit_ipi]
file = vmexit.flat
test_args = 'ipi'
qemu_params = -machine pit=off

[clock]
file = kvmclock_test.flat
test_args = "10 `date +%s`"
check = /proc/a=Y /proc/b=0

[taskswitch]
file = taskswitch.flat
arch = i386

[slow]
file = access_test.flat
groups = nodefault

[ept]
file = vmx.flat
groups = vmx
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("kvm_tests")


def test_unit_tests_that_suit_the_host_are_taken_from_the_configuration(script: Any) -> None:
    tests = {test.name: test.command for test in script.unit_test_list(CONFIG)}
    assert list(tests) == ["x2apic", "vmexit_ipi", "clock"]
    assert " -kernel apic.flat -smp 2 -cpu qemu64,+x2apic" in tests["x2apic"]
    assert '-smp 1 -append "ipi" -machine pit=off' in tests["vmexit_ipi"]
    # The inner host's shell runs what stands there, and looks at what it is asked to.
    assert '-append "10 `date +%s`"' in tests["clock"]
    assert tests["clock"].startswith('[ "$(cat /proc/b)" = 0 ] || exit 155; [ "$(cat /proc/a)" = Y')


@pytest.mark.parametrize(
    ("suite", "status", "result"),
    [
        ("SELFTESTS", 0, "PASS"),
        ("SELFTESTS", 4, "SKIP"),
        ("SELFTESTS", 254, "FAIL"),
        ("SELFTESTS", 137, "TIMEOUT"),
        ("UNIT_TESTS", 1, "PASS"),
        ("UNIT_TESTS", 3, "FAIL"),
        ("UNIT_TESTS", 0, "FAIL"),  # a triple fault ends QEMU without a word
        ("UNIT_TESTS", 155, "SKIP"),
    ],
)
def test_each_suite_says_in_its_own_way_how_a_test_ended(
    script: Any, suite: str, status: int, result: str
) -> None:
    outcome = script.judge(script.Suite[suite], status, "", "", 1.0)
    assert outcome.result is script.Result[result]


def test_a_qemu_that_does_not_start_is_no_test_that_passed(script: Any) -> None:
    units, results = script.Suite.UNIT_TESTS, script.Result
    said = "qemu: -device pc-testdev: 'pc-testdev' is not a valid device model name"
    assert script.judge(units, 1, said, "", 1.0).result is results.REFUSED
    warned = "qemu: warning: host doesn't support requested feature"
    assert script.judge(units, 1, warned, "", 1.0).result is results.PASS


def test_parts_that_failed_are_compared_without_their_numbers(script: Any) -> None:
    units = script.Suite.UNIT_TESTS
    one, other, third = (
        script.judge(units, 3, said, "", seconds)
        for said, seconds in (
            ("PASS: a\nFAIL: took 12 cycles at 0xff\r\n", 1.0),
            ("PASS: a\nFAIL: took 99 cycles at 0x12\n", 2.0),
            ("FAIL: a\nFAIL: took 12 cycles at 0xff\n", 1.0),
        )
    )
    assert one.essence == other.essence != third.essence


def test_a_warning_of_the_hosts_kernel_is_a_difference(script: Any) -> None:
    tests = script.Suite.SELFTESTS
    quiet = script.judge(tests, 0, "", "[ 1.0] kvm: all well", 1.0)
    loud = script.judge(tests, 0, "", "[ 1.0] WARNING: CPU: 1 PID: 7 at x86.c:1", 1.0)
    assert quiet.result is loud.result
    assert quiet.essence != loud.essence


def test_an_outcome_that_the_released_kernel_never_gave_differs(script: Any) -> None:
    good, bad = (script.judge(script.Suite.SELFTESTS, status, "", "", 1.0) for status in (0, 254))
    test = script.Test(script.Suite.SELFTESTS, "name", "true")

    def verdict(released: list[Any], patched: list[Any]) -> str:
        return str(script.Comparison(test, False, released, patched).verdict)

    assert verdict([good], [good]) == "same"
    assert verdict([good], [bad]) == "differs"
    assert verdict([good, good], [bad, bad]) == "differs"
    # It may be what the series breaks only now and then.
    assert verdict([good, good], [bad, good]) == "differs"
    assert verdict([good, bad], [bad, good]) == "unstable"


def test_the_series_own_test_is_to_pass_on_the_patched_kernel_alone(script: Any) -> None:
    skip, good = (script.judge(script.Suite.SELFTESTS, status, "", "", 1.0) for status in (4, 0))
    test = script.Test(script.Suite.SELFTESTS, "name", "true")
    assert script.Comparison(test, True, [skip], [good]).verdict == "same"
    assert script.Comparison(test, True, [skip], [skip]).verdict == "differs"
    assert script.Comparison(test, True, [good], [good]).verdict == "differs"


def test_both_kernels_pass_a_few_selftests(tmp_path: Path) -> None:
    patches = series.read("kvm")
    if not (LinuxBuild.find((), Role.HOST) and LinuxBuild.find(patches, Role.HOST)):
        pytest.skip("the inner host's kernels are not built (qvis build, qvis build --unpatched)")
    result = tmp_path / "result.json"
    # Delivery by irqfd and ours, and the two means that both build on: memory and APICs.
    names = ["x86_64/virtio_vis_test", "x86_64/xapic_state_test", "x86_64/set_boot_cpu_id"]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--only", *names, "--json", result],
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ends = {
        test["test"]["name"]: (test["released"][0]["result"], test["patched"][0]["result"])
        for test in json.loads(result.read_text())["tests"]
    }
    assert ends == dict.fromkeys(names, ("pass", "pass")) | {names[0]: ("skip", "pass")}
