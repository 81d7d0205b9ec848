# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis doctor``"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from ..errors import InfraError, QvisError
from ._output import print_json

# A cold build's sources, trees and objects, measured: 5.4 GiB.
NEEDED_SPACE = 8 << 30  # bytes
BUILT = ("kvm", "tcg")  # backends whose probe would build, or boot, what is built
NEEDED_MEMORY = 2 << 30  # bytes: linking QEMU and a small guest


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    NOTE = "note"  # a run works, with less
    MISSING = "missing"  # a run fails


@dataclass(frozen=True)
class Finding:
    """One check and, where something is missing, the remedy."""

    check: str
    verdict: Verdict
    text: str
    remedy: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python, _packages, _space, _memory, _series, _builds, _backends, _vis, _tracing,
    ]  # fmt: skip
    findings = []
    for check in checks:
        try:
            findings += list(check())
        except QvisError as problem:
            name = check.__name__.removeprefix("_")
            findings.append(Finding(name, Verdict.MISSING, str(problem)))
    if args.json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.verdict:<8} {finding.check}: {finding.text}")
            if finding.remedy:
                print(f"         remedy: {finding.remedy}")
    failed = any(finding.verdict is Verdict.MISSING for finding in findings)
    return InfraError.exit_code if failed else 0


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    # An older one would not have come this far: pyproject.toml asks for 3.11.
    yield Finding("python", Verdict.OK, f"{version} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    from ..host import PACKAGES, install_command, missing_packages

    missing = missing_packages()
    if not missing:
        yield Finding("packages", Verdict.OK, f"all {len(PACKAGES)} that a run uses are there")
    for package in missing:
        remedy = shlex.join(install_command([package]))
        yield Finding(package.name, Verdict.MISSING, package.purpose, remedy)


def _space() -> Iterator[Finding]:
    from ..paths import cache_dir, state_dir

    for name, folder in (("cache", cache_dir()), ("state", state_dir())):
        if not os.access(folder, os.W_OK):
            remedy = f"set QVIS_{name.upper()} to a folder of yours"
            yield Finding(name, Verdict.MISSING, f"{folder} cannot be written", remedy)
            continue
        free = shutil.disk_usage(folder).free
        text = f"{folder}, {free / (1 << 30):.1f} GiB free"
        built = any((folder / "results").glob("*")) if name == "cache" else True
        if free < (NEEDED_SPACE if not built else 1 << 30):
            remedy = f"free some, or set QVIS_{name.upper()} to a larger disk"
            yield Finding(name, Verdict.MISSING, f"{text}: too little", remedy)
        else:
            yield Finding(name, Verdict.OK, text)


def _memory() -> Iterator[Finding]:
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    available = int(fields["MemAvailable"].split()[0]) * 1024
    text = f"{available / (1 << 30):.1f} GiB available"
    if available < NEEDED_MEMORY:
        yield Finding("memory", Verdict.NOTE, f"{text}: builds may be killed", "end other programs")
    else:
        yield Finding("memory", Verdict.OK, text)


def _series() -> Iterator[Finding]:
    from ..build import series

    for name in series.names():
        patches = series.read(name)
        yield Finding(f"{name} series", Verdict.OK, f"{len(patches)} patches")


def _builds() -> Iterator[Finding]:
    from ..build import built, built_host

    if built():
        yield Finding("builds", Verdict.OK, "QEMU, Linux and the initramfs are built")
    else:
        text = "not all of QEMU, Linux and the initramfs is built"
        yield Finding("builds", Verdict.NOTE, text, "`qvis build`; `qvis up` does it too")
    if built_host():
        yield Finding("inner host", Verdict.OK, "its Linux and its file system are built")
    else:
        remedy = "`qvis build`; `qvis up --backend nested` does it too"
        yield Finding("inner host", Verdict.NOTE, "it is not built, only nested needs it", remedy)


def _backends() -> Iterator[Finding]:
    from ..backends import available
    from ..build import built, built_host

    for name, backend in sorted(available().items()):
        if (name in BUILT and not built()) or (name == "nested" and not built_host()):
            text = "tried when all that it is made of is built"
            yield Finding(f"backend {name}", Verdict.NOTE, text, "qvis build")
            continue
        probe = backend.probe()
        verdict = Verdict.OK if probe.works else Verdict.NOTE
        yield Finding(f"backend {name}", verdict, probe.reason)


def _vis() -> Iterator[Finding]:
    from ..backends.kvm import vis_in_kvm
    from ..build import series

    for name, inside in (("kvm", vis_in_kvm()), ("nested", bool(series.read("kvm")))):
        text = "inside KVM" if inside else "by cached routes: this KVM has no series kvm"
        yield Finding(f"VIS on {name}", Verdict.OK if inside else Verdict.NOTE, text)


def _tracing() -> Iterator[Finding]:
    from ..build import build_plugin, built
    from ..trace import tracefs

    if artifacts := built():
        build_plugin(artifacts.qemu)
        yield Finding("tracing on tcg", Verdict.OK, "QEMU's plugin is compiled")
    refusal = tracefs.probe()
    verdict = Verdict.NOTE if refusal else Verdict.OK
    yield Finding("tracing on kvm", verdict, refusal or "tracefs has KVM's tracepoints")
