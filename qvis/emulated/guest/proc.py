# SPDX-License-Identifier: GPL-2.0-or-later
"""/proc, as far as people and programs look at it (proc(5); fs/proc, kernel/irq/proc.c)."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...cpus import format_cpus, parse_cpus
from ...errors import UsageError
from .bringup import COMMAND_LINE
from .files import Directory, Link, Node, Text, fail
from .irq import IrqDesc
from .kernel import VERSION
from .virtio_pci import PciParent

if TYPE_CHECKING:
    from .kernel import Kernel
    from .processes import Process
    from .userland import Userland

__all__ = ["cpu_list", "cpu_mask", "make_proc", "read_cpu_list", "resources"]

KERNEL_KIB = 21_204  # of the memory, what a kernel like the recorded one keeps for itself
USED_KIB = 21_124  # of the rest, what its own structures and the initramfs take
CACHED_KIB, SLAB_KIB, RECLAIMABLE_KIB = 7_060, 4_704, 924
MHZ = 2000
HERTZ = 100
STATISTICS = {
    "NMI": "Non-maskable interrupts", "LOC": "Local timer interrupts",
    "SPU": "Spurious interrupts", "PMI": "Performance monitoring interrupts",
    "IWI": "IRQ work interrupts", "RTR": "APIC ICR read retries",
    "RES": "Rescheduling interrupts", "CAL": "Function call interrupts",
    "TLB": "TLB shootdowns",
}  # fmt: skip
MOUNTS = """rootfs / rootfs rw 0 0
proc /proc proc rw,relatime 0 0
dev /dev devtmpfs rw,relatime,mode=755 0 0
sys /sys sysfs rw,relatime 0 0
tmp /tmp tmpfs rw,relatime 0 0
debug /sys/kernel/debug debugfs rw,relatime 0 0
"""


# Sets of CPUs as text


def cpu_list(cpus: frozenset[int]) -> str:
    """ "0-3,5", and nothing for none."""
    return format_cpus(cpus) if cpus else ""


def cpu_mask(cpus: frozenset[int], count: int) -> str:
    """As hexadecimal words of 32 CPUs, with as many digits as ``count`` CPUs take."""
    value = sum(1 << cpu for cpu in cpus)
    digits = f"{value:0{(count + 3) // 4}x}"
    groups = []
    while digits:
        groups.append(digits[-8:])
        digits = digits[:-8]
    return ",".join(reversed(groups))


def read_cpu_list(text: str, count: int) -> frozenset[int]:
    """What cpulist_parse() makes of it; raises EINVAL, ERANGE."""
    text = text.strip()
    if not text:
        return frozenset()
    if any(len(digits) > 9 for digits in re.findall(r"\d+", text)):
        raise fail(errno.ERANGE)
    if any(int(digits) >= count for digits in re.findall(r"\d+", text)):
        if re.fullmatch(r"[\d,\- ]+", text):
            raise fail(errno.ERANGE)
        raise fail(errno.EINVAL)
    try:
        return parse_cpus(text)
    except UsageError:
        raise fail(errno.EINVAL) from None


def _read_cpu_mask(text: str, count: int) -> frozenset[int]:
    text = text.strip()
    if not re.fullmatch(r"[0-9a-fA-F]{1,8}(,[0-9a-fA-F]{1,8})*", text) and not (
        re.fullmatch(r"[0-9a-fA-F]{1,1024}", text)
    ):
        raise fail(errno.EINVAL)
    value = 0
    for group in text.split(","):
        value = value << (32 if "," in text else 4 * len(group)) | int(group, 16)
    if value >> count:
        raise fail(errno.EOVERFLOW)
    return frozenset(n for n in range(count) if value >> n & 1)


# Interrupts


def _interrupts(kernel: Kernel) -> str:
    cpus = sorted(kernel.online)
    descs = kernel.irqs.descs
    width = max(3, len(str(max(descs, default=0))))
    lines = [" " * (width + 8) + "".join(f"CPU{cpu:<8}" for cpu in cpus)]
    for number in sorted(descs):
        desc = descs[number]
        counts = desc.counts
        if not desc.actions and not any(counts):
            continue
        shown = "".join(f"{counts[cpu]:10} " for cpu in cpus)
        flow = "edge" if desc.hardware.edge else "fasteoi"
        lines.append(
            f"{number:{width}}: {shown} {desc.hardware.name:>8} {desc.hardware.hwirq:{width}}"
            f"-{flow:<8}  {', '.join(desc.actions)}"
        )
    none = [0] * len(kernel.cpus)
    for name, words in STATISTICS.items():
        of = kernel.statistics.get(name, none)
        lines.append(
            f"{name:>{width}}: " + "".join(f"{of[cpu]:10} " for cpu in cpus) + f"  {words}"
        )
    lines.append(f"{'ERR':>{width}}: {sum(kernel.statistics.get('ERR', none)):10}")
    lines.append(f"{'MIS':>{width}}: {0:10}")
    return "\n".join(lines) + "\n"


def _irq(kernel: Kernel, desc: IrqDesc) -> Directory:
    count = len(kernel.cpus)

    def setter(parse: Callable[[str, int], frozenset[int]]) -> Callable[[Process, str], None]:
        def store(process: Process, text: str) -> None:
            desc.set_affinity(process.vcpu, parse(text, count))

        return store

    def asked() -> frozenset[int]:
        return desc.pending if desc.pending is not None else desc.affinity

    def spurious(process: Process) -> str:
        return f"count {sum(desc.counts) % 100000}\nunhandled 0\nlast_unhandled 0 ms\n"

    entries: dict[str, Node] = {
        "smp_affinity": Text(lambda p: cpu_mask(asked(), count) + "\n", setter(_read_cpu_mask), 0),
        "smp_affinity_list": Text(lambda p: cpu_list(asked()) + "\n", setter(read_cpu_list), 0),
        "effective_affinity": Text(lambda p: cpu_mask(desc.effective, count) + "\n", size=0),
        "effective_affinity_list": Text(lambda p: cpu_list(desc.effective) + "\n", size=0),
        "affinity_hint": Text(lambda p: cpu_mask(frozenset(), count) + "\n", size=0),
        "node": Text(lambda p: "0\n", size=0),
        "spurious": Text(spurious, size=0),
    }
    for action in desc.actions:
        entries[action] = Directory.of({})
    return Directory.of(entries)


def _irqs(kernel: Kernel) -> Directory:
    """Those that have been requested once, as register_irq_proc() makes them."""
    descs = kernel.irqs.descs
    default = Text(lambda p: cpu_mask(frozenset(kernel.cpus), len(kernel.cpus)) + "\n", size=0)

    def names() -> list[str]:
        return ["default_smp_affinity", *(str(n) for n, d in descs.items() if d.actions)]

    def get(name: str) -> Node | None:
        if name == "default_smp_affinity":
            return default
        desc = descs.get(int(name)) if re.fullmatch(r"[1-9]\d{0,8}", name) else None
        return _irq(kernel, desc) if desc is not None and desc.actions else None

    return Directory(names, get)


# The machine


def _cpuinfo(kernel: Kernel) -> str:
    flags = "fpu msr apic cx8 sep cmov clflush mmx fxsr sse sse2 ht syscall nx lm cpuid x2apic "
    flags += "tsc_deadline_timer hypervisor arat"
    found = []
    count = len(kernel.online)
    for cpu in sorted(kernel.online):
        apic = kernel.machine.vcpus[cpu].apic.id
        found.append(
            f"processor\t: {cpu}\nvendor_id\t: qvis\ncpu family\t: 6\nmodel\t\t: 6\n"
            f"model name\t: qvis emulated processor\nstepping\t: 1\ncpu MHz\t\t: {MHZ}.000\n"
            f"physical id\t: 0\nsiblings\t: {count}\ncore id\t\t: {cpu}\ncpu cores\t: {count}\n"
            f"apicid\t\t: {apic}\ninitial apicid\t: {apic}\nfpu\t\t: yes\nflags\t\t: {flags}\n"
            f"bogomips\t: {2 * MHZ}.00\nclflush size\t: 64\ncache_alignment\t: 64\n"
            "address sizes\t: 40 bits physical, 48 bits virtual\npower management:\n\n"
        )
    return "".join(found)


def _meminfo(userland: Userland) -> str:
    """Of a guest of this size; but for what lies in /tmp it never changes."""
    total = userland.kernel.machine.config.memory * 1024 - KERNEL_KIB
    files = (userland.room.size - userland.room.free) >> 10
    free = max(0, total - USED_KIB - files)
    values = {
        "MemTotal": total, "MemFree": free, "MemAvailable": max(0, free - 3748), "Buffers": 0,
        "Cached": CACHED_KIB + files, "SwapCached": 0, "SwapTotal": 0, "SwapFree": 0, "Dirty": 0,
        "Shmem": CACHED_KIB + files, "KReclaimable": RECLAIMABLE_KIB, "Slab": SLAB_KIB,
        "SReclaimable": RECLAIMABLE_KIB, "SUnreclaim": SLAB_KIB - RECLAIMABLE_KIB,
    }  # fmt: skip
    return "".join(f"{name + ':':<16}{value:8} kB\n" for name, value in values.items())


def _iomem(kernel: Kernel) -> str:
    top = kernel.machine.config.memory << 20
    rows = [
        (0x0, 0xFFF, 0, "Reserved"),
        (0x1000, 0x9FBFF, 0, "System RAM"),
        (0x9FC00, 0x9FFFF, 0, "Reserved"),
        (0xF0000, 0xFFFFF, 0, "Reserved"),
        (0x100000, top - 1, 0, "System RAM"),
        (0x1000000, 0x15FFFFF, 1, "Kernel code"),
        (0x1800000, 0x18B627F, 1, "Kernel data"),
    ]
    bridge = False
    for parent in kernel.parents.values():
        if isinstance(parent, PciParent):
            bridge = True
            for start, size, _flags in resources(parent):
                if size:
                    rows.append((start, start + size - 1, 1, parent.name))
        else:
            start, end = parent.attached.start, parent.attached.end - 1
            rows.append((start, end, 0, parent.name))
            if parent.bound:
                rows.append((start, end, 1, f"{parent.name} {parent.name}"))
    if bridge:
        rows += [
            (0xC0000000, 0xDFFFFFFF, 0, "PCI Bus 0000:00"),
            (0xFEC00000, 0xFEC003FF, 0, "IOAPIC 0"),
            (0xFEC10000, 0xFEC103FF, 0, "IOAPIC 1"),
            (0xE0000000, 0xEFFFFFFF, 0, "PCI ECAM 0000 [bus 00-ff]"),
            (0xC000000000, 0xFFFFFFFFFF, 0, "PCI Bus 0000:00"),
        ]
    rows.sort(key=lambda row: (row[0], row[2]))
    return "".join(f"{'  ' * depth}{a:08x}-{b:08x} : {name}\n" for a, b, depth, name in rows)


def resources(parent: PciParent) -> list[tuple[int, int, int]]:
    """Start, size and flags (include/linux/ioport.h) of each of a function's six BARs."""
    found = [(0, 0, 0)] * 6
    for index, start in parent.function.bars.items():
        size = parent.function.sizes.get(index, 0)
        found[index] = (start, size, 0x14220C if start >> 32 else 0x40200)
    return found


def _stat(userland: Userland) -> str:
    kernel = userland.kernel
    ticks = userland.nanoseconds * HERTZ // 1_000_000_000
    count = len(kernel.online)
    lines = [f"cpu  0 0 0 {ticks * count} 0 0 0 0 0 0"]
    lines += [f"cpu{cpu} 0 0 0 {ticks} 0 0 0 0 0 0" for cpu in sorted(kernel.online)]
    total = sum(sum(desc.counts) for desc in kernel.irqs.descs.values())
    lines += [f"intr {total}", "ctxt 0", f"btime {userland.started}"]
    lines += [f"processes {len(userland.processes)}", "procs_running 1", "procs_blocked 0"]
    return "\n".join(lines) + "\n"


def _uptime(userland: Userland) -> str:
    seconds = userland.nanoseconds / 1e9
    return f"{seconds:.2f} {seconds * len(userland.kernel.online):.2f}\n"


def _partitions(kernel: Kernel) -> str:
    rows = [
        f" 254 {16 * number:8} {disk.size >> 10:10} {name}\n"
        for number, (name, disk) in enumerate(kernel.disks.items())
    ]
    return "major minor  #blocks  name\n\n" + "".join(rows)


def _process(process: Process) -> Directory:
    state = "R (running)" if process.status is None else "Z (zombie)"
    parent = process.parent.pid if process.parent else 0
    entries: dict[str, Node] = {
        "comm": Text(lambda p: process.name + "\n", size=0),
        "cmdline": Text(lambda p: process.name + "\0", size=0),
        "status": Text(
            lambda p: (
                f"Name:\t{process.name}\nState:\t{state}\nPid:\t{process.pid}\n"
                f"PPid:\t{parent}\nCpus_allowed_list:\t"
                f"{cpu_list(process.cpus or process.kernel.online)}\n"
            ),
            size=0,
        ),
        "cwd": Link(process.folder),
    }
    return Directory.of(entries)


def make_proc(userland: Userland) -> Directory:
    """The whole of it."""
    kernel = userland.kernel

    def load(process: Process) -> str:
        return f"0.00 0.00 0.00 1/{len(userland.processes)} {process.pid}\n"

    def name_of_host(process: Process, text: str) -> None:
        userland.hostname = text.strip()[:64]

    system = {
        "hostname": Text(lambda p: userland.hostname + "\n", name_of_host, 0),
        "osrelease": Text(lambda p: VERSION + "\n", size=0),
        "ostype": Text(lambda p: "Linux\n", size=0),
        "pid_max": Text(lambda p: "32768\n", size=0),
    }
    files: dict[str, Node] = {
        "interrupts": Text(lambda p: _interrupts(kernel), size=0),
        "cpuinfo": Text(lambda p: _cpuinfo(kernel), size=0),
        "meminfo": Text(lambda p: _meminfo(userland), size=0),
        "uptime": Text(lambda p: _uptime(userland), size=0),
        "version": Text(
            lambda p: f"Linux version {VERSION} (qvis@qvis) #1 SMP 1970-01-01\n", size=0
        ),
        "cmdline": Text(lambda p: f"{COMMAND_LINE}\n", size=0),
        "iomem": Text(lambda p: _iomem(kernel), size=0),
        "loadavg": Text(load, size=0),
        "stat": Text(lambda p: _stat(userland), size=0),
        "mounts": Text(lambda p: MOUNTS, size=0),
        "partitions": Text(lambda p: _partitions(kernel), size=0),
        "filesystems": Text(lambda p: "nodev\tsysfs\nnodev\ttmpfs\nnodev\tproc\n", size=0),
        "irq": _irqs(kernel),
        "sys": Directory.of({"kernel": Directory.of(system)}),
    }

    def names() -> list[str]:
        return [*files, *(str(pid) for pid in userland.processes), "self"]

    def get(name: str) -> Node | None:
        if name == "self":
            return Link(str(userland.init.pid))
        process = userland.processes.get(int(name)) if re.fullmatch(r"\d{1,9}", name) else None
        return _process(process) if process is not None else files.get(name)

    return Directory(names, get)
