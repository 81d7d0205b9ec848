# SPDX-License-Identifier: GPL-2.0-or-later
"""Times and sizes that a user of qvis meets, as JSON on standard output.

    scripts/bench [--runs N] [--patch] [--cold] [--trace]
    scripts/bench --emulated [--runs N]

Always: `qvis up` with everything built and `qvis exec`, and boot time and
memory of each transport, interleaved in one run. ``--patch`` adds what a
one-line change in a patch costs until the new guest is up, for QEMU and for
Linux; ``--cold`` the way from empty caches (sources too, unless QVIS_SOURCES
names a folder that has them) to a guest; ``--trace`` what tracing costs, with
TCG. ``--emulated`` is about the emulated machine and nothing else: `qvis up` until SSH
answered, and how many interrupts a second of the host's it delivers (see
``bench_emulated.py``). Times are the host's, in seconds; on
TCG they say nothing about hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import qvis
from qvis.experiments.boot import host, sample
from qvis.paths import patches_dir
from qvis.transport import COMPARED

SHAPE = ("--smp", "4", "--queues", "4")
# A patch of the driver or the device, and a comment in it.
DRIVER = re.compile(r"^\+\+\+ b/(drivers/virtio|hw/virtio)/virtio[_-]mmio\.c$", re.MULTILINE)
COMMENT = re.compile(r"^\+(\s+\*\s+\S.*|.*/\*\s.*\*/)$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--patch", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--emulated", action="store_true")
    args = parser.parse_args()

    results: dict[str, Any] = {"host": host()}
    if args.emulated:
        from bench_emulated import BENCHES

        results["up_s"], results["exec_s"] = commands(args.runs, "emulated")
        results |= {name: bench() for name, bench in BENCHES.items()}
        print(json.dumps(results, indent=2))
        return
    if args.cold:
        results["cold_up_s"] = cold()
    results["transports"] = transports(args.runs, args.backend)
    results["warm_up_s"], results["exec_s"] = commands(args.runs, args.backend)
    if args.patch:
        results["patch_change_to_guest_s"] = {
            component: patch_change(component, args.backend) for component in ("qemu", "linux")
        }
    if args.trace:
        from bench_trace import tracing

        results["tracing"] = tracing(args.runs)
    print(json.dumps(results, indent=2))


def transports(runs: int, backend: str) -> dict[str, Any]:
    """Boot time and memory, one boot of each transport a round."""
    raw: dict[str, list[dict[str, float]]] = {transport: [] for transport in COMPARED}
    provenance: dict[str, Any] = {}
    for _ in range(runs):
        for transport in COMPARED:
            with qvis.up(backend=backend, transport=transport, smp=4, queues=4) as vm:
                raw[transport].append(asdict(sample(vm)))
                provenance = vm.info["provenance"]
    return {
        "provenance": provenance,
        "raw": raw,
        "median": {
            transport: {key: statistics.median(s[key] for s in samples) for key in samples[0]}
            for transport, samples in raw.items()
        },
    }


def commands(runs: int, backend: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`qvis up` and, in that machine, `qvis exec` after the first."""
    ups, executions = [], []
    for _ in range(runs):
        ups.append(timed("qvis", "up", "--backend", backend, *SHAPE, "--name", "bench"))
        try:
            timed("qvis", "exec", "bench", "--", "true")
            executions += [timed("qvis", "exec", "bench", "--", "true") for _ in range(10)]
        finally:
            timed("qvis", "down", "bench")
    return summary(ups), summary(executions)


def patch_change(component: str, backend: str) -> dict[str, Any]:
    """From a changed line in one patch of a component to SSH in a guest made of it."""
    timed("qvis", "build")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "patches"
        shutil.copytree(patches_dir(), copy)
        patch = change_a_line(copy / component)
        environment = {**os.environ, "QVIS_PATCHES": str(copy)}
        seconds = timed("qvis", "up", "--backend", backend, *SHAPE, "--name", "bench",
                        environment=environment)  # fmt: skip
        timed("qvis", "down", "bench")
    back = timed("qvis", "build")
    return {"patch": patch, "seconds": seconds, "build_of_the_old_one_again": back}


def change_a_line(series: Path) -> str:
    """Change a word in a comment that the last driver or device patch adds; its name."""
    for patch in sorted(series.glob("*.patch"), reverse=True):
        text = patch.read_text()
        comment = COMMENT.search(text)
        if comment and DRIVER.search(text):
            # A word that no earlier run has used, or its result would still be there.
            line = re.sub(r"[a-z]{3,}", f"{time.time_ns():x}", comment[0], count=1)
            patch.write_text(text[: comment.start()] + line + text[comment.end() :])
            return patch.name
    raise SystemExit(f"no comment to change in {series}")


def cold() -> dict[str, Any]:
    """`qvis up` with a cache of its own that is empty."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "QVIS_CACHE": scratch}
        seconds = timed("qvis", "up", *SHAPE, "--name", "bench", environment=environment)
        timed("qvis", "down", "bench")
        size = sum(file.lstat().st_size for file in Path(scratch).rglob("*") if file.is_file())
    return {"seconds": seconds, "cache_bytes": size, "sources": os.environ.get("QVIS_SOURCES")}


def timed(*command: str, environment: dict[str, str] | None = None) -> float:
    """Seconds that a command took; it must succeed."""
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.monotonic() - start


def summary(values: Sequence[float]) -> dict[str, Any]:
    """A raw series with its least, median and largest."""
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "raw": list(values),
    }


if __name__ == "__main__":
    main()
