# SPDX-License-Identifier: GPL-2.0-or-later
"""What one boot costs: time until SSH, the guest's memory, QEMU's memory."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LostMachineError
from ..host import cpu_model
from ..machine.machine import Machine

__all__ = ["BootSample", "host", "sample"]


@dataclass(frozen=True)
class BootSample:
    """One machine right after its boot. Times are in seconds, memory is in KiB."""

    boot_s: float  # from launching QEMU to an SSH login, the host's clock
    kernel_s: float  # of these, from the kernel's first line to its init
    guest_uptime_at_ssh_s: float  # the guest's clock
    guest_used_kib: int  # MemTotal - MemAvailable
    guest_slab_kib: int
    qemu_pss_kib: int  # QEMU's resident memory, shared pages in proportion


def sample(machine: Machine) -> BootSample:
    """Boot stages and memory of a machine of this host.

    Raises :class:`LostMachineError` when QEMU is gone.
    """
    stages = machine.info["boot"]["stages"]
    meminfo = machine.ssh.run("cat /proc/meminfo").stdout
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", meminfo, re.M)}
    try:
        rollup = Path(f"/proc/{machine.process}/smaps_rollup").read_text()
    except OSError as problem:
        raise LostMachineError(f"machine {machine.name!r} has no QEMU: {problem}") from problem
    pss = re.search(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)
    return BootSample(
        boot_s=machine.info["boot"]["total"],
        kernel_s=stages["kernel"],
        guest_uptime_at_ssh_s=float(machine.ssh.run("cat /proc/uptime").stdout.split()[0]),
        guest_used_kib=kib["MemTotal"] - kib["MemAvailable"],
        guest_slab_kib=kib["Slab"],
        qemu_pss_kib=int(pss[1]) if pss else 0,
    )


def host() -> dict[str, Any]:
    """The machine that numbers come from."""
    return {
        "cpus": os.cpu_count(),
        "model": cpu_model(),
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
        "clock": "host seconds (CLOCK_MONOTONIC)",
    }
