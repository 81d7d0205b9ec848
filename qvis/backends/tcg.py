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
from . import Probe
from .qemu import KERNEL_HZ, QemuBackend

__all__ = ["Tcg"]

RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx,32; or rax,rdx; ret
SAMPLE = 0.02  # seconds; gives the rate to a few parts in ten thousand


class Tcg(QemuBackend):
    """One host thread a vCPU, every CPU feature that TCG has."""

    name = "tcg"
    slowdown = 6.0
    accelerator = "tcg,thread=multi"
    cpu = "max"

    def probe(self) -> Probe:
        return Probe(True, "needs nothing of the host; its times say nothing about hardware")

    def kernel_options(self) -> str:
        """Tell the guest its TSC's rate, which it could only measure badly.

        Without -icount TCG's TSC is the host's (cpus_get_elapsed_ticks), and the
        microvm has no other clock to calibrate it by but a PIT, whose readings
        are useless as soon as the host is busy.
        """
        khz = _host_tsc_khz()
        return f"tsc_early_khz={khz} tsc=reliable lpj={khz * 1000 // KERNEL_HZ} no_timer_check"


    def accelerator_options(self) -> list[str]:
        """The tracer, which sleeps until `qvis trace` wakes it: QEMU loads plugins at its start."""
        plugin = build_plugin(self.artifacts().qemu)
        return ["-plugin", f"file={plugin},control={TRACE_CONTROL}"]


@functools.cache
def _host_tsc_khz() -> int:
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
