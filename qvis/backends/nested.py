# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM on any machine: an inner host in QEMU's translator, and the guest inside that.

The translator emulates AMD's SVM with nested paging, so the inner host's Linux runs
a real KVM, ours with the series "kvm" in it. The guest is the same as on every other
backend: the same QEMU command line, kernel and initramfs. What it needs lies in the
inner host's file system, whose init starts the inner QEMU.

From the inner host these come out: its console; the guest's console, as a virtio
console; QMP of the inner QEMU and SSH of both, forwarded by the outer QEMU's user
network; and a virtio port for traces. The guest reaches none of them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..build import Artifacts, Entry, Host, build_host, pack
from ..build.host import FIRMWARE, FOLDER, QEMU
from ..errors import InfraError, UsageError
from ..folder import (
    CONSOLE_LOG,
    CONSOLE_SOCKET,
    HOST_CONSOLE_LOG,
    HOST_CONSOLE_SOCKET,
    HOST_QMP,
    INITRD,
    TRACE_SOCKET,
    qmp_sockets,
)
from ..spec import MachineSpec
from . import Job, Launch, Login, Probe
from .kvm import check_platform, kvm_accelerator
from .qemu import (
    Accelerator,
    QemuBackend,
    Site,
    command_line,
    guest_entries,
    login_entries,
)
from .tcg import REPEATABLE, REPEATABLE_CPU, REPEATABLE_KERNEL, clock, host_tsc_khz

__all__ = ["HOST_SSH_PORT", "TRACE_PORT", "Nested"]

HOST_SSH_PORT = 2222  # of the inner host; 22 there is the guest's
FIRST_QMP_PORT = 4400  # guest-kernel/host/init connects to it as well
TRACE_PORT = "qvis.trace"  # the virtio port's name in the inner host
COMMAND = "qemu.sh"  # in the machine's folder, until it is packed
HOST_MEMORY = 512  # MiB beside the guest's: its kernel, its files, QEMU (180), and recordings
MEMINFO = Path("/proc/meminfo")

# As the guest's (backends/qemu.py), and:
#   kvm.halt_poll_ns=0      a vCPU that polls takes the emulator's time from the others
#   kvm.tsc_tolerance_ppm   The kernel measures the TSC's rate, which it was told, once more, and
#                           not well on a busy host (tsc_refine_calibration_work takes up to 1%).
#                           Where KVM, which keeps the rate of its start, finds another by then,
#                           vCPUs have none (set_tsc_khz) and their timers never fire.
HOST_COMMAND_LINE = (
    "console=ttyS0 reboot=t panic=-1 loglevel=6 kvm.halt_poll_ns=0 kvm.tsc_tolerance_ppm=20000"
)


class Nested(QemuBackend):
    """A guest under KVM in an inner host under QEMU's translator."""

    name = "nested"
    slowdown = 12.0
    reader = "kvm-nested"

    def __init__(self, artifacts: Artifacts | None = None) -> None:
        super().__init__(artifacts)
        self._host: Host | None = None

    def host(self) -> Host:
        """What the inner host is made of, built now if it is not there yet."""
        if self._host is None:
            self._host = build_host(self.artifacts())
        return self._host

    def probe(self) -> Probe:
        self.host()
        return Probe(True, "needs nothing of the host; its exits are KVM's, its times are not")

    def check_platform(self, spec: MachineSpec) -> None:
        check_platform(spec.platform)

    def check(self, spec: MachineSpec) -> None:
        super().check(spec)
        needed, free = spec.memory + HOST_MEMORY, _available()
        if needed > free:
            raise InfraError(
                f"the inner host needs {needed} MiB for a guest with {spec.memory}, and this host "
                f"has {free} left: choose a smaller --memory",
                stage="launch",
            )

    def accelerator(self, spec: MachineSpec) -> Accelerator:
        return kvm_accelerator(spec.platform)

    def launch(
        self,
        spec: MachineSpec,
        folder: Path,
        *,
        incoming: bool = False,
        options: Sequence[str] = (),
    ) -> Launch:
        if incoming:
            raise UsageError(
                "a guest in an inner host cannot be migrated: the two QEMUs would have to be in one"
            )
        artifacts, host = self.artifacts(), self.host()
        ports = {name: FIRST_QMP_PORT + number for number, name in enumerate(qmp_sockets(folder))}
        inner = self.accelerator(spec)
        site = Site(
            binary=f"/{QEMU}",
            firmware=f"/{FIRMWARE}",
            image="bzImage",
            console="serial,path=/dev/hvc0",
            monitors={
                name: f"socket,host=0.0.0.0,port={port},server=on,wait=off"
                for name, port in ports.items()
            },
            # The guest's network ends in the inner QEMU: it can reach nothing of the host's.
            network="restrict=on,hostfwd=tcp::22-:22",
        )
        words = [*command_line(spec, site, inner), *options]
        (folder / COMMAND).write_text(f"exec {shlex.join(words)}\n")
        outer = _outer(spec)
        provenance = {
            **self.provenance(f"{inner.description} in {outer.description}"),
            "kvm_series": host.linux.series,
            "host_linux": host.linux.version,
        }
        return Launch(
            self._outer_command(spec, folder, outer, ports),
            "the inner host's QEMU",
            provenance,
            self.reader,
            artifacts.linux.vmlinux,
            nested=True,
        )

    def _outer_command(
        self, spec: MachineSpec, folder: Path, accelerator: Accelerator, ports: dict[str, int]
    ) -> list[str]:
        """The command line of the QEMU that the inner host is in."""
        artifacts, host = self.artifacts(), self.host()
        forwards = ["hostfwd=tcp:127.0.0.1:0-:22", f"hostfwd=tcp:127.0.0.1:0-:{HOST_SSH_PORT}"]
        for name, socket in qmp_sockets(folder).items():
            # QEMU wants an absolute path, and takes a dash for its end.
            forwards.append(f"hostfwd=unix:/proc/self/cwd/{socket.name}-:{ports[name]}")
        # A notification that another thread takes comes at a moment that no count tells.
        at_once = ",ioeventfd=off" if spec.icount else ""
        sockets = (
            ("host-console", HOST_CONSOLE_SOCKET, f",logfile={HOST_CONSOLE_LOG}"),
            ("console", CONSOLE_SOCKET, f",logfile={CONSOLE_LOG}"),
            ("trace", TRACE_SOCKET, ""),
            ("host-qmp", HOST_QMP, ""),
        )
        command = [
            str(artifacts.qemu.binary),
            *("-L", str(artifacts.qemu.firmware)),
            *("-name", f"qvis-{spec.name}-host"),
            *("-M", "q35", "-accel", accelerator.accel, "-cpu", accelerator.cpu),
            *accelerator.options,
            *("-smp", str(_host_cpus(spec))),
            *("-m", f"{spec.memory + HOST_MEMORY}M"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-D", "/dev/null"),
            *("-kernel", str(host.linux.image), "-initrd", INITRD),
            *("-append", f"{HOST_COMMAND_LINE} {accelerator.kernel_options}"),
        ]
        for name, path, more in sockets:
            command += ["-chardev", f"socket,id={name},path={path},server=on,wait=off{more}"]
        command += [
            *("-serial", "chardev:host-console"),
            *("-mon", "chardev=host-qmp,mode=control"),
            *("-device", f"virtio-serial-pci,max_ports=2{at_once}"),
            *("-device", "virtconsole,nr=0,chardev=console"),
            *("-device", f"virtserialport,nr=1,chardev=trace,name={TRACE_PORT}"),
            *("-netdev", ",".join(["user", "id=net0", *forwards])),
            *("-device", f"virtio-net-pci,netdev=net0,romfile={at_once}"),
        ]
        if not spec.icount:
            command += [
                *("-object", "rng-random,id=rng0,filename=/dev/urandom"),
                *("-device", "virtio-rng-pci,rng=rng0"),
            ]
        return command

    def furnish(self, folder: Path, purpose: Login | Job) -> None:
        artifacts = self.artifacts()
        guest = artifacts.initramfs.read_bytes() + pack(guest_entries(folder, purpose))
        entries = [
            Entry.file(f"{FOLDER}/command", (folder / COMMAND).read_bytes()),
            Entry.file(f"{FOLDER}/bzImage", artifacts.linux.image.read_bytes()),
            Entry.file(f"{FOLDER}/{INITRD}", guest),
        ]
        login = purpose.login if isinstance(purpose, Job) else purpose
        if login:
            entries += login_entries(folder, login)
        if isinstance(purpose, Job):
            entries.append(Entry.file(f"{FOLDER}/before", purpose.before.encode()))
        (folder / COMMAND).unlink()
        (folder / INITRD).write_bytes(self.host().initramfs.read_bytes() + pack(entries))


def _outer(spec: MachineSpec) -> Accelerator:
    """What runs the inner host's vCPUs.

    With ``icount`` the inner host and all in it execute the same instructions each time.
    """
    if spec.icount:
        return Accelerator(
            "tcg,thread=single", REPEATABLE_CPU, f"{clock(1_000_000)} {REPEATABLE_KERNEL}",
            REPEATABLE,
        )  # fmt: skip
    kernel = f"{clock(host_tsc_khz())} random.trust_cpu=on"
    return Accelerator("tcg,thread=multi", "max", kernel)


def _host_cpus(spec: MachineSpec) -> int:
    """One for each vCPU, and one for QEMU's own threads, which then interrupt none.

    Where instructions are counted a single one: several take turns at moments that differ from
    run to run.
    """
    return 1 if spec.icount else spec.smp + 1


def _available() -> int:
    """Memory of this host that can be had, in MiB."""
    for line in MEMINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) // 1024
    raise InfraError(f"{MEMINFO} does not say what memory is available", stage="launch")
