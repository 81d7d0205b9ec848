# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own translator: works everywhere, and says nothing about time."""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import time

from ..build import build_plugin
from ..folder import TRACE_CONTROL
from ..spec import MachineSpec
from . import Probe
from .qemu import KERNEL_HZ, Accelerator, QemuBackend

__all__ = ["REPEATABLE", "REPEATABLE_CPU", "REPEATABLE_KERNEL", "Tcg", "clock", "host_tsc_khz"]

RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx,32; or rax,rdx; ret
SAMPLE = 0.02  # seconds; gives the rate to a few parts in ten thousand

# Nothing that a guest sees may come from the host: time counts instructions, and
# neither the date nor random numbers differ from run to run.
REPEATABLE = ("-icount", "shift=0,sleep=off", "-rtc", "base=2020-01-01,clock=vm", "-seed", "1")
REPEATABLE_CPU = "max,rdrand=off,rdseed=off"
REPEATABLE_KERNEL = "nokaslr norandmaps random.trust_cpu=off"


class Tcg(QemuBackend):
    """One host thread a vCPU, every CPU feature that TCG has."""

    name = "tcg"
    slowdown = 6.0
    reader = "tcg-plugin"

    def probe(self) -> Probe:
        self.artifacts()
        return Probe(True, "needs nothing of the host; its times say nothing about hardware")

    def accelerator(self, spec: MachineSpec) -> Accelerator:
        """With the tracer in it, which sleeps until `qvis trace` wakes it.

        The guest is told its TSC's rate, which it could only measure badly:
        the microvm has no other clock to calibrate it by but a PIT, whose readings
        are useless as soon as the host is busy. Without -icount TCG's TSC is the
        host's (cpus_get_elapsed_ticks), with it nanoseconds of virtual time.
        """
        plugin = build_plugin(self.artifacts().qemu)
        tracer = ("-plugin", f"file={plugin},control={TRACE_CONTROL}")
        if spec.icount:
            return Accelerator(
                "tcg,thread=single", REPEATABLE_CPU, f"{clock(1_000_000)} {REPEATABLE_KERNEL}",
                (*tracer, *REPEATABLE),
            )  # fmt: skip
        return Accelerator("tcg,thread=multi", "max", clock(host_tsc_khz()), tracer)


def clock(khz: int) -> str:
    """What tells a kernel the rate of its TSC, in kHz, which it then need not measure."""
    return f"tsc_early_khz={khz} tsc=reliable lpj={khz * 1000 // KERNEL_HZ} no_timer_check"


@functools.cache
def host_tsc_khz() -> int:
    """The rate of what QEMU takes for the host's ticks (cpu_get_host_ticks), in kHz."""
    if platform.machine() not in ("x86_64", "AMD64"):
        # QEMU falls back on nanoseconds for hosts whose counter it does not read.
        return 1_000_000
    with mmap.mmap(
        -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    ) as page:
        page.write(RDTSC)
        anchor = ctypes.c_char.from_buffer(page)
        ticks = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
        start, first = time.monotonic_ns(), ticks()
        time.sleep(SAMPLE)
        last, end = ticks(), time.monotonic_ns()
        del anchor, ticks
    return int((last - first) * 1_000_000 // (end - start))
