# SPDX-License-Identifier: GPL-2.0-or-later
"""What virtio over PCI costs against virtio over MMIO: code, memory, time, attack surface.

A talk at KVM Forum 2019 ("Even Lighter: Virtio Over MMIO") counted files and
lines of both. :func:`footprint` counts again, what is really compiled into the
Linux and the QEMU at hand, and measures what the talk says follows from it:
shorter boots, less memory, a smaller attack surface.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from ..build import LinuxBuild, QemuBuild, build_linux, build_qemu
from ..build.objects import Objects, Sizes, section_sizes
from ..errors import UsageError
from ..machine.machine import up
from ..transport import COMPARED
from .boot import BootSample, host, sample
from .code import Code, count
from .surface import Surface, surface

__all__ = ["TALK", "Footprint", "Program", "TalkCount", "footprint", "median"]

SMP, QUEUES, MEMORY = 4, 4, 512  # of each guest; memory in MiB


@dataclass(frozen=True)
class TalkCount:
    """What the talk says of one program. It does not say which lines count."""

    pci_files: int
    pci_lines: int
    mmio_files: int
    mmio_lines: int


TALK = {"linux": TalkCount(161, 78_237, 1, 538), "qemu": TalkCount(24, 8_952, 1, 421)}


@dataclass(frozen=True)
class Program:
    """Linux or QEMU: where it is from, its code, and its size in bytes."""

    version: str
    series: str
    key: str  # of the build
    code: Code
    file_size: int  # of the bzImage, or of QEMU's executable
    loaded: Sizes  # sections of vmlinux or of the executable, alignment included


@dataclass(frozen=True)
class Footprint:
    """Everything that was counted and measured, with where it comes from."""

    provenance: dict[str, Any]
    programs: dict[str, Program]  # linux, qemu
    boots: dict[str, tuple[BootSample, ...]]  # by transport, in the order of the runs
    surfaces: dict[str, Surface]  # by transport
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold, with the talk's figures and the medians."""
        return {
            **asdict(self),
            "talk": {name: asdict(counted) for name, counted in TALK.items()},
            "medians": {name: asdict(median(samples)) for name, samples in self.boots.items()},
        }


def footprint(backend: str = "auto", runs: int = 3) -> Footprint:
    """Count what is compiled, and boot each transport ``runs`` times, interleaved.

    What is not built yet is built first. Raises :class:`UsageError` for less
    than one run, :class:`~qvis.errors.BuildError` when a build's record of its
    objects is damaged, and all that :func:`qvis.up` raises.
    """
    if runs < 1:
        raise UsageError(f"--runs must be 1 or more, not {runs}")
    linux, qemu = build_linux(), build_qemu()
    linked = {
        "linux": Objects.load(linux.image.parent),
        "qemu": Objects.load(qemu.binary.parent),
    }
    programs = {
        "linux": _program(linux, count("linux", linked["linux"])),
        "qemu": _program(qemu, count("qemu", linked["qemu"])),
    }
    where: dict[str, Any] = {"host": host(), "smp": SMP, "queues": QUEUES, "memory_mib": MEMORY}
    boots: dict[str, list[BootSample]] = {transport: [] for transport in COMPARED}
    surfaces: dict[str, Surface] = {}
    for _ in range(runs):
        for transport in COMPARED:
            with up(
                backend=backend, transport=transport, smp=SMP, queues=QUEUES, memory=MEMORY
            ) as machine:
                boots[transport].append(sample(machine))
                if transport not in surfaces:
                    surfaces[transport] = surface(machine, linked["qemu"])
                where |= machine.info["provenance"]
    return Footprint(
        provenance=where,
        programs=programs,
        boots={transport: tuple(samples) for transport, samples in boots.items()},
        surfaces=surfaces,
        notes=tuple(_notes(where, programs)),
    )


def median(samples: tuple[BootSample, ...]) -> BootSample:
    """Of each figure the median, so not one boot that really was."""
    rows = [asdict(one) for one in samples]
    return BootSample(**{key: statistics.median(row[key] for row in rows) for key in rows[0]})


def _program(build: LinuxBuild | QemuBuild, code: Code) -> Program:
    if isinstance(build, LinuxBuild):
        file, program = build.image, build.vmlinux
    else:
        file = program = build.binary
    return Program(
        version=build.version,
        series=build.series,
        key=build.key,
        code=code,
        file_size=file.stat().st_size,
        loaded=section_sizes(program),
    )


def _notes(where: dict[str, Any], programs: dict[str, Program]) -> list[str]:
    """What a reader has to know so that no figure says more than it does."""
    notes = [
        "Counted: sources whose object is linked into vmlinux or qemu-system-x86_64, and sources "
        "that these include. Headers are apart, and only those that nothing else includes.",
        "Lines are all lines of a file; code lines have more than blanks and comments. The talk "
        "does not say which it means, nor which files it counts.",
        "As released: the same files before our series, which gives MMIO its MSI and VIS.",
        "Sizes of components are those of their objects' sections, before the linker aligns them; "
        "one kernel and one QEMU serve all transports, so no size is a difference of two builds.",
        "A register is a field of at most 4 bytes that QEMU answers to in the region (64-bit "
        "fields are two), or a named field of configuration space. A device's own fields are the "
        "same over each transport and not counted.",
        "Every guest has microvm's virtio-mmio transports, also that with PCI: there they are "
        "empty, and are listed apart.",
    ]
    for name, program in programs.items():
        code = program.code
        notes.append(
            f"{name}: our series makes {code.series_files} files {code.series_lines.all:,} lines "
            f"longer, {code.series_lines.code:,} of them code."
        )
        notes.append(
            f"{name}: PCI code inside shared files is not counted: {len(code.users)} files beside "
            f"the components name PCI functions, and {code.functions} functions in them "
            f"({code.function_bytes:,} bytes) have such names."
        )
        if code.unclassified:
            notes.append(
                f"{name}: built for PCI by their Makefile, but in no component: "
                f"{', '.join(code.unclassified)}"
            )
    notes.append(
        "Boots: the same kernel each time, with its PCI code, so what leaving that out would save "
        "is in none of these figures. Where ranges overlap, no difference is shown."
    )
    if str(where["accelerator"]).startswith("tcg"):
        notes.append("TCG translates the guest: its times say nothing about hardware.")
    return notes
