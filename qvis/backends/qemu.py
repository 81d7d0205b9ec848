# SPDX-License-Identifier: GPL-2.0-or-later
"""What the backends that run QEMU share: the microvm and its command line."""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..build import Artifacts, Entry, build_all, pack
from ..errors import InfraError, UsageError
from ..folder import CONSOLE_LOG, CONSOLE_SOCKET, INITRD, MIGRATION_SOCKET, qmp_sockets
from ..spec import MachineSpec
from . import Job, Launch, Login, Probe

__all__ = [
    "KERNEL_COMMAND_LINE",
    "KERNEL_HZ",
    "Accelerator",
    "QemuBackend",
    "Site",
    "command_line",
    "guest_entries",
    "login_entries",
]

# Why each is there:
#   reboot=t, panic=-1   a shutdown or a panic ends QEMU at once (with -no-reboot)
#   loglevel=6           notices and worse: enough to see why a boot failed
#   virtio_blk.managed_irqs=0  leaves the queues' interrupts to the administrator;
#                        a kernel without our series ignores it
KERNEL_COMMAND_LINE = (
    "console=ttyS0 reboot=t panic=-1 loglevel=6 random.trust_cpu=on virtio_blk.managed_irqs=0"
)
KERNEL_HZ = 100  # CONFIG_HZ in guest-kernel/
MAX_CPUS = 255  # microvm's APIC IDs are 8 bits wide without an interrupt remapper
DISK_SIZE = 1 << 30  # bytes; null-co, so it costs nothing


@dataclass(frozen=True)
class Accelerator:
    """What QEMU is told of what runs the vCPUs."""

    accel: str  # for -accel
    cpu: str  # for -cpu
    kernel_options: str = ""  # for the guest's command line
    options: tuple[str, ...] = ()
    iothread: bool = False  # for the disk

    @property
    def description(self) -> str:
        """What numbers have to say of it."""
        count = "icount" in "".join(self.options)
        return f"{self.accel},icount" if count else self.accel


@dataclass(frozen=True)
class Site:
    """Where a QEMU runs: how its files are called there, and who reaches it how."""

    binary: str
    firmware: str  # the folder for -L
    image: str
    console: str  # a -chardev without its identity, for the guest's serial port
    monitors: Mapping[str, str]  # likewise for QMP, by identity
    network: str  # the options of -netdev user

    @classmethod
    def here(cls, artifacts: Artifacts, folder: Path) -> Site:
        """On this machine, with ``folder`` as its working directory."""
        return cls(
            binary=str(artifacts.qemu.binary),
            firmware=str(artifacts.qemu.firmware),
            image=str(artifacts.linux.image),
            console=f"socket,path={CONSOLE_SOCKET},server=on,wait=off,logfile={CONSOLE_LOG}",
            monitors={
                name: f"socket,path={path.name},server=on,wait=off"
                for name, path in qmp_sockets(folder).items()
            },
            network="hostfwd=tcp:127.0.0.1:0-:22",
        )


class QemuBackend(ABC):
    """A machine in the QEMU that qvis built; subclasses choose the accelerator."""

    name: str
    slowdown: float
    reader: str

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

    def check(self, spec: MachineSpec) -> None:
        if spec.smp > MAX_CPUS:
            raise UsageError(f"--smp must be at most {MAX_CPUS} in QEMU's microvm, not {spec.smp}")
        if spec.costs is not None:
            raise UsageError(f"--costs is for --backend emulated: {self.name} models nothing")
        self.check_platform(spec)

    def check_platform(self, spec: MachineSpec) -> None:
        """Raise :class:`UsageError` for interrupt hardware that the accelerator does not have."""
        if spec.platform is not None:
            raise UsageError(
                "--irqchip, --apic, --apicv and --pv-eoi are for --backend kvm, nested and "
                f"emulated: {self.name} has what it has"
            )

    def furnish(self, folder: Path, purpose: Login | Job) -> None:
        # The kernel unpacks archives that follow each other
        # (Documentation/driver-api/early-userspace/buffer-format.rst).
        entries = guest_entries(folder, purpose)
        (folder / INITRD).write_bytes(self.artifacts().initramfs.read_bytes() + pack(entries))

    def launch(
        self,
        spec: MachineSpec,
        folder: Path,
        *,
        incoming: bool = False,
        options: Sequence[str] = (),
    ) -> Launch:
        artifacts = self.artifacts()
        accelerator = self.accelerator(spec)
        command = command_line(spec, Site.here(artifacts, folder), accelerator)
        if incoming:
            command += ["-incoming", f"unix:{MIGRATION_SOCKET}"]
        command += options
        provenance = self.provenance(accelerator.description)
        return Launch(command, "QEMU", provenance, self.reader, artifacts.linux.vmlinux)

    def provenance(self, accelerator: str) -> dict[str, Any]:
        """Where a machine's numbers come from; ``accelerator`` is its description."""
        artifacts = self.artifacts()
        return {
            "backend": self.name,
            "accelerator": accelerator,
            "qemu": artifacts.qemu.version,
            "qemu_series": artifacts.qemu.series,
            "linux": artifacts.linux.version,
            "linux_series": artifacts.linux.series,
        }


def guest_entries(folder: Path, purpose: Login | Job) -> list[Entry]:
    """What a guest is to find in its file system, beside what all have."""
    if isinstance(purpose, Login):
        return login_entries(folder, purpose)
    return [
        Entry.file("etc/qvis-run", purpose.run.encode()),
        Entry.file("etc/qvis-report", purpose.report.encode()),
    ]


def login_entries(folder: Path, login: Login) -> list[Entry]:
    """What dropbear needs for this login."""
    return [
        Entry.file("etc/hostname", f"{login.hostname}\n".encode()),
        Entry.file("etc/dropbear/host_key", _for_dropbear(folder, login.host_key), 0o600),
        Entry.file("root/.ssh/authorized_keys", login.authorized, 0o600),
    ]


def _for_dropbear(folder: Path, host_key: bytes) -> bytes:
    """The key in dropbear's own container, which its own tool makes."""
    openssh = folder / "host_key.openssh"
    dropbear = folder / "host_key.dropbear"
    openssh.touch(mode=0o600)
    openssh.write_bytes(host_key)
    try:
        subprocess.run(
            ["dropbearconvert", "openssh", "dropbear", openssh, dropbear],
            check=True,
            capture_output=True,
            timeout=30,
        )
        return dropbear.read_bytes()
    except (OSError, subprocess.SubprocessError) as problem:
        raise InfraError(f"cannot make the guest's host key: {problem}", stage="keys") from problem
    finally:
        openssh.unlink(missing_ok=True)
        dropbear.unlink(missing_ok=True)


def command_line(spec: MachineSpec, site: Site, accelerator: Accelerator) -> list[str]:
    """The command line of the QEMU that runs the guest at ``site``."""
    transport = spec.transport
    machine = {"acpi": "on", "rtc": "on", **transport.machine_options()}
    options = "".join(f",{key}={value}" for key, value in machine.items())
    command = [
        site.binary,
        *("-L", site.firmware),
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
        *("-kernel", site.image),
        *("-initrd", INITRD),
        *("-append", f"{KERNEL_COMMAND_LINE} {accelerator.kernel_options}".strip()),
        *("-chardev", _chardev("console", site.console)),
        *("-serial", "chardev:console"),
        *("-global", "virtio-mmio.force-legacy=false"),
    ]  # fmt: skip
    # What another thread completes comes at a moment that no instruction count tells,
    # except inside an inner host, all of whose threads are counted together.
    at_once = spec.icount and not accelerator.iothread
    for setting in transport.properties(spec.queues, at_once=at_once):
        command += ["-global", setting]
    for name, monitor in site.monitors.items():
        command += ["-chardev", _chardev(name, monitor)]
        command += ["-mon", f"chardev={name},mode=control"]
    # Reading an empty disk's serial number is a request that virtio-blk completes at once
    # (VIRTIO_BLK_T_GET_ID).
    size = 0 if at_once else DISK_SIZE
    disk = f"{transport.device('blk')},drive=disk0,num-queues={spec.queues},id=blk0"
    if accelerator.iothread:
        # Completions then reach KVM from a thread that does nothing else, by irqfd.
        command += ["-object", "iothread,id=io0"]
        disk += ",iothread=io0"
    command += [
        *("-blockdev", f"driver=null-co,node-name=disk0,size={size},read-zeroes=on"),
        *("-device", disk),
        *("-netdev", f"user,id=net0,{site.network}"),
        *("-device", f"{transport.device('net')},netdev=net0,id=nic0"),
    ]
    if not spec.icount:
        # What comes from the host is never the same.
        command += [
            *("-object", "rng-random,id=rng0,filename=/dev/urandom"),
            *("-device", f"{transport.device('rng')},rng=rng0,id=random0"),
        ]
    return command


def _chardev(name: str, what: str) -> str:
    kind, _, options = what.partition(",")
    return f"{kind},id={name},{options}"
