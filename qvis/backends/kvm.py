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
from ..x86 import Apic, Irqchip, Platform
from . import Probe
from .qemu import KERNEL_COMMAND_LINE, Accelerator, QemuBackend

__all__ = ["Kvm", "check_platform", "kvm_accelerator", "vis_in_kvm"]

DEVICE = Path("/dev/kvm")
KVM_GET_API_VERSION = 0xAE00  # _IO(KVMIO, 0x00), Documentation/virt/kvm/api.rst 4.1
KVM_CHECK_EXTENSION = 0xAE03  # _IO(KVMIO, 0x03), 4.4
KVM_CAP_VIRTIO_VIS = 5000  # of the series "kvm", until Linux gives it a number
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
            raise UsageError(
                "KVM cannot count instructions: --icount needs --backend tcg, or --backend nested, "
                "which counts those of the inner host as well"
            )

    def check_platform(self, spec: MachineSpec) -> None:
        check_platform(spec.platform)

    def accelerator(self, spec: MachineSpec) -> Accelerator:
        return kvm_accelerator(spec.platform)

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


def vis_in_kvm() -> bool:
    """Whether this host's KVM has the series "kvm"."""
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(device, KVM_CHECK_EXTENSION, KVM_CAP_VIRTIO_VIS) > 0
    except OSError:
        return False
    finally:
        os.close(device)


def check_platform(platform: Platform | None) -> None:
    """Raise :class:`UsageError` for what QEMU cannot ask of KVM."""
    if platform is None:
        return
    if platform.apicv:
        raise UsageError(
            "--apicv is for --backend emulated: KVM uses what the processor has (the parameter "
            "enable_apicv of kvm_intel, avic of kvm_amd), and QEMU cannot ask for it"
        )
    if platform.irqchip is Irqchip.OFF:
        # apic_get_class() in target/i386/cpu-apic.c
        raise UsageError(
            "--irqchip off is for --backend emulated: QEMU has no local APIC that works with KVM "
            "from user space; on and split can be had"
        )


def kvm_accelerator(platform: Platform | None) -> Accelerator:
    """KVM with the processor as it is, but for what ``platform`` says."""
    accel, cpu = "kvm", "host"
    if platform is not None:
        accel += f",kernel-irqchip={platform.irqchip}"
        cpu += f",x2apic={'on' if platform.apic is Apic.X2APIC else 'off'}"
        if platform.pv_eoi is not None:
            cpu += f",kvm-pv-eoi={'on' if platform.pv_eoi else 'off'}"
    return Accelerator(accel, cpu, iothread=True)


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
