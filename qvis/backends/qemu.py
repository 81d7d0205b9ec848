# SPDX-License-Identifier: GPL-2.0-or-later
"""What the backends that run QEMU share: the microvm and its command line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..build import Artifacts, build_all
from ..folder import CONSOLE_LOG, CONSOLE_SOCKET, INITRD, MIGRATION_SOCKET, qmp_sockets
from ..spec import MachineSpec
from . import Launch, Probe

__all__ = ["QemuBackend", "command_line"]

# Why each is there:
#   reboot=t, panic=-1   a shutdown or a panic ends QEMU at once (with -no-reboot)
#   loglevel=6           notices and worse: enough to see why a boot failed
#   virtio_blk.managed_irqs=0  leaves the queues' interrupts to the administrator;
#                        a kernel without our series ignores it
KERNEL_COMMAND_LINE = (
    "console=ttyS0 reboot=t panic=-1 loglevel=6 random.trust_cpu=on virtio_blk.managed_irqs=0"
)
KERNEL_HZ = 100  # CONFIG_HZ in guest-kernel/
DISK_SIZE = 1 << 30  # bytes; null-co, so it costs nothing


@dataclass(frozen=True)
class Accelerator:
    """What QEMU is told of what runs the vCPUs."""

    accel: str  # for -accel
    cpu: str  # for -cpu
    kernel_options: str = ""  # for the guest's command line
    options: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """What numbers have to say of it."""
        count = "icount" in "".join(self.options)
        return f"{self.accel},icount" if count else self.accel


class QemuBackend(ABC):
    """A machine in the QEMU that qvis built; subclasses choose the accelerator."""

    name: str
    slowdown: float

    def __init__(self, artifacts: Artifacts | None = None) -> None:
        """``artifacts`` are what machines are made of; without, what qvis builds."""
        self._artifacts = artifacts

    @abstractmethod
    def probe(self) -> Probe:
        """Try the accelerator for real."""

    @abstractmethod
    def accelerator(self, spec: MachineSpec) -> Accelerator:
        """What runs the vCPUs of ``spec``; :class:`UsageError` for what it cannot do."""

    def artifacts(self) -> Artifacts:
        """What the machine is made of, built now if it is not there yet."""
        if self._artifacts is None:
            self._artifacts = build_all()
        return self._artifacts

    def base_initramfs(self) -> Path:
        return self.artifacts().initramfs

    def launch(self, spec: MachineSpec, folder: Path, *, incoming: bool = False) -> Launch:
        artifacts = self.artifacts()
        accelerator = self.accelerator(spec)
        command = command_line(spec, artifacts, accelerator, qmp_sockets(folder))
        if incoming:
            command += ["-incoming", f"unix:{MIGRATION_SOCKET}"]
        provenance = {
            "backend": self.name,
            "accelerator": accelerator.description,
            "qemu": artifacts.qemu.version,
            "qemu_series": artifacts.qemu.series,
            "linux": artifacts.linux.version,
            "linux_series": artifacts.linux.series,
        }
        return Launch(command, provenance, artifacts.linux.vmlinux)


def command_line(
    spec: MachineSpec, artifacts: Artifacts, accelerator: Accelerator, sockets: Mapping[str, Path]
) -> list[str]:
    """QEMU's command line; file names in it are relative to the machine's folder."""
    transport = spec.transport
    machine = {"acpi": "on", "rtc": "on", **transport.machine_options()}
    options = "".join(f",{key}={value}" for key, value in machine.items())
    command = [
        str(artifacts.qemu.binary),
        *("-L", str(artifacts.qemu.firmware)),
        *("-name", f"qvis-{spec.name}"),
        *("-M", f"microvm{options}"),
        *("-accel", accelerator.accel),
        *("-cpu", accelerator.cpu),
        *accelerator.options,
        *("-smp", str(spec.smp)),
        *("-m", f"{spec.memory}M"),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        # QEMU prints each trace event that it records as text as well, to its log.
        *("-D", "/dev/null"),
        *("-kernel", str(artifacts.linux.image)),
        *("-initrd", INITRD),
        *("-append", f"{KERNEL_COMMAND_LINE} {accelerator.kernel_options}".strip()),
        *("-chardev", f"socket,id=console,path={CONSOLE_SOCKET},server=on,wait=off,"
          f"logfile={CONSOLE_LOG}"),
        *("-serial", "chardev:console"),
        *("-global", "virtio-mmio.force-legacy=false"),
    ]  # fmt: skip
    for setting in transport.properties(spec.queues, at_once=spec.icount):
        command += ["-global", setting]
    for name, path in sockets.items():
        command += ["-chardev", f"socket,id={name},path={path.name},server=on,wait=off"]
        command += ["-mon", f"chardev={name},mode=control"]
    # What another thread completes comes at a moment that no instruction count tells,
    # and what comes from the host is never the same. Reading an empty disk's serial
    # number is a request that virtio-blk completes at once (VIRTIO_BLK_T_GET_ID).
    size = 0 if spec.icount else DISK_SIZE
    command += [
        *("-blockdev", f"driver=null-co,node-name=disk0,size={size},read-zeroes=on"),
        *("-device", f"{transport.device('blk')},drive=disk0,num-queues={spec.queues},id=blk0"),
        *("-netdev", "user,id=net0,hostfwd=tcp:127.0.0.1:0-:22"),
        *("-device", f"{transport.device('net')},netdev=net0,id=nic0"),
    ]
    if not spec.icount:
        command += [
            *("-object", "rng-random,id=rng0,filename=/dev/urandom"),
            *("-device", f"{transport.device('rng')},rng=rng0,id=random0"),
        ]
    return command
