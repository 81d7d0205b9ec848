# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM, if it really works: a /dev/kvm that opens proves nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path

from ..errors import UsageError
from ..paths import cache_dir
from ..spec import MachineSpec
from . import Probe
from .qemu import KERNEL_COMMAND_LINE, Accelerator, QemuBackend

__all__ = ["Kvm"]

DEVICE = Path("/dev/kvm")
KVM_GET_API_VERSION = 0xAE00  # _IO(KVMIO, 0x00), Documentation/virt/kvm/api.rst 4.1
KVM_CREATE_VM = 0xAE01  # _IO(KVMIO, 0x01), 4.2
API_VERSION = 12  # the only one there has been since Linux 2.6.22

BOOT_DEADLINE = 10.0  # seconds; a working KVM reaches init in well under one
REACHED_INIT = b"qvis-stage: init"


class Kvm(QemuBackend):
    """The host's KVM with its own CPU model."""

    name = "kvm"
    slowdown = 1.0
    reader = "kvm-tracepoints"

    def check(self, spec: MachineSpec) -> None:
        super().check(spec)
        if spec.icount:
            raise UsageError("KVM cannot count instructions: --icount needs --backend tcg")

    def accelerator(self, spec: MachineSpec) -> Accelerator:
        return Accelerator("kvm", "host")

    def probe(self) -> Probe:
        """Open, create a VM, then boot our own kernel to its init, with a deadline.

        The boot is what counts: a paravirtual KVM without VMX or SVM does all
        the rest and then never gets a stock kernel out of its 16-bit code. Its
        outcome is remembered for this boot of the host and these builds.
        """
        refusal = _refusal_without_boot()
        if refusal:
            return Probe(False, refusal)
        artifacts = self.artifacts()
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        identity = [host, artifacts.qemu.key, artifacts.linux.key]
        memory = cache_dir() / "kvm-probe.json"
        try:
            remembered = json.loads(memory.read_text())
            if remembered["identity"] == identity:
                return Probe(remembered["works"], remembered["reason"])
        except (OSError, ValueError, KeyError):
            pass
        probe = self._boot()
        with tempfile.NamedTemporaryFile("w", dir=memory.parent, delete=False) as file:
            json.dump({"identity": identity, "works": probe.works, "reason": probe.reason}, file)
        Path(file.name).rename(memory)
        return probe

    def _boot(self) -> Probe:
        artifacts = self.artifacts()
        command = [
            *("setpriv", "--pdeathsig", "KILL", "--"),
            str(artifacts.qemu.binary),
            *("-L", str(artifacts.qemu.firmware)),
            *("-M", "microvm", "-accel", "kvm", "-cpu", "host", "-m", "256M"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-serial", "stdio"),
            *("-kernel", str(artifacts.linux.image), "-initrd", str(artifacts.initramfs)),
            *("-append", KERNEL_COMMAND_LINE),
        ]
        output = bytearray()
        end = time.monotonic() + BOOT_DEADLINE
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert child.stdout is not None
        try:
            while REACHED_INIT not in output:
                left = end - time.monotonic()
                if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
                    return Probe(
                        False,
                        f"{DEVICE} opens, but a guest on it did not reach its init "
                        f"within {BOOT_DEADLINE:.0f} s",
                    )
                chunk = os.read(child.stdout.fileno(), 65536)
                if not chunk:
                    lines = output.decode(errors="replace").strip().splitlines()
                    last = lines[-1].strip() if lines else "without a word"
                    return Probe(False, f"{DEVICE} opens, but a guest on it died: {last}")
                output += chunk
            return Probe(True, "a guest booted on it")
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


def _refusal_without_boot() -> str | None:
    """Why the device cannot even make an empty VM; None when it can."""
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"no {DEVICE}: the host's CPU or firmware offers none, or kvm is not loaded"
    except PermissionError:
        return f"no permission to open {DEVICE}: join the group that owns it (usually kvm)"
    except OSError as problem:
        return f"cannot open {DEVICE}: {problem.strerror}"
    try:
        version = fcntl.ioctl(device, KVM_GET_API_VERSION)
        if version != API_VERSION:
            return f"{DEVICE} speaks API version {version}, not {API_VERSION}"
        os.close(fcntl.ioctl(device, KVM_CREATE_VM, 0))
    except OSError as problem:
        name = errno.errorcode.get(problem.errno or 0, "?")
        return f"{DEVICE} opens, but makes no VM ({name}: {problem.strerror})"
    finally:
        os.close(device)
    return None
