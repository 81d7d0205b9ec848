# SPDX-License-Identifier: GPL-2.0-or-later
"""Building QEMU: one target, the devices of ``qvis.mak``, TCG, KVM and plugins."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InfraError
from ..process import run
from ..progress import Step, step
from . import cache
from .objects import RECORD, qemu_objects
from .recipe import Recipe, build, cpus, find, manifest, prepare
from .series import Patch
from .tree import Tree

__all__ = ["FIRMWARE_PATH", "Configuration", "QemuBuild", "ninja", "run_qtest"]

BINARY = "qemu-system-x86_64"
CONFIGURE_DEADLINE = 600.0  # seconds
BUILD_DEADLINE = 3600.0  # seconds
START_DEADLINE = 60.0  # seconds
QTEST_DEADLINE = 300.0  # seconds

# Where distributions put what the tarball may lack.
FIRMWARE_PATH = (Path("/usr/share/qemu"), Path("/usr/share/seabios"))
FIRMWARE = (
    "bios-microvm.bin",
    "qboot.rom",  # microvm's other firmware, made to be quick
    "bios-256k.bin",  # q35's
    "pvh.bin",  # starts an uncompressed kernel
    "linuxboot_dma.bin",  # starts a bzImage
    "kvmvapic.bin",  # q35 loads it under KVM without a TPR shadow
)


@dataclass(frozen=True)
class Configuration:
    """One of the ways in which a tree is configured."""

    options: tuple[str, ...]
    devices: Path  # a .mak file
    compiler: str = cache.COMPILER


OPTIONS = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--without-default-devices",
    "--with-devices-x86_64=qvis",
    "--with-pkgversion=qvis",  # or the state of our git tree would be asked for
    "--enable-tcg",
    "--enable-kvm",
    "--enable-slirp",  # -netdev user, for SSH without privileges
    "--enable-plugins",  # the tracer
    # In binary, with a thread that writes them: what QEMU's own part in an interrupt is
    # read from. As text, as usual: qtests look for events there.
    "--enable-trace-backends=log,simple",
    "--enable-fdt=system",
    "--enable-vhost-kernel",  # irqfd, and with it interrupts that never see QEMU
    "--enable-vhost-net",
    "--enable-vhost-user",
    "--disable-install-blobs",
    f"--firmwarepath={':'.join(map(str, FIRMWARE_PATH))}",  # for qtests, which name no folder
    "--disable-docs",
    "--disable-tools",
    "--disable-guest-agent",
    "--disable-debug-info",  # symbols stay; DWARF would cost a fifth of the build
    "--disable-werror",  # compilers newer than this QEMU
    "--disable-download",
)

NORMAL = Configuration(OPTIONS, Path(__file__).with_name("qvis.mak"))

# Named by meson.build even when none of it is to be installed, and left out of
# the distribution's tarball. An empty file will do, since nothing uses it.
PLACEHOLDERS = (
    *(
        f"pc-bios/edk2-{name}.fd.bz2"
        for name in (
            "aarch64-code", "arm-code", "arm-vars", "i386-code", "i386-secure-code", "i386-vars",
            "loongarch64-code", "loongarch64-vars", "riscv-code", "riscv-vars", "x86_64-code",
            "x86_64-secure-code",
        )
    ),
    *(
        f"pc-bios/dtb/{name}.dtb"
        for name in (
            "bamboo", "canyonlands", "pegasos1", "pegasos2", "petalogix-ml605",
            "petalogix-s3adsp1800",
        )
    ),
)  # fmt: skip


@dataclass(frozen=True)
class QemuBuild:
    """A QEMU that was built, and what goes with it."""

    binary: Path  # qemu-system-x86_64, with symbols
    firmware: Path  # the folder for -L
    include: Path  # the folder to compile plugins with: holds qemu/qemu-plugin.h
    version: str
    series: str  # a name for the patches that are in it
    key: str  # a name for everything that went into it

    @classmethod
    def make(cls, patches: Sequence[Patch]) -> QemuBuild:
        """QEMU with these patches, built if it never was."""
        return cls._of(build(_recipe(), patches))

    @classmethod
    def find(cls, patches: Sequence[Patch]) -> QemuBuild | None:
        """QEMU with these patches, if it was ever built."""
        result = find(_recipe(), patches)
        return cls._of(result) if result else None

    @classmethod
    def _of(cls, result: Path) -> QemuBuild:
        facts = manifest(result)
        return cls(
            binary=result / BINARY,
            firmware=result / "firmware",
            include=result / "include",
            version=facts["version"],
            series=facts["series"],
            key=facts["key"],
        )


def run_qtest(name: str, patches: Sequence[Patch]) -> None:
    """Build and run the test program ``tests/qtest/<name>`` of a QEMU with these patches.

    Raises :class:`BuildError` with the end of its TAP output when a test fails.
    """
    recipe = _recipe()
    with cache.lock("qemu"):
        tree = prepare(recipe, patches)
        log = cache.log_file("qemu")
        with (
            step(f"qtest {name}", log) as progress,
            tree.building(patches, recipe.configuration) as folder,
        ):
            ninja(NORMAL, tree, folder, progress, BINARY, f"tests/qtest/{name}")
            run(
                [folder / "tests" / "qtest" / name, "--tap"],
                env={"QTEST_QEMU_BINARY": str(folder / BINARY)},
                cwd=folder,
                stage=f"qtest {name}",
                log=log,
                deadline=QTEST_DEADLINE,
            )


def _recipe() -> Recipe:
    return Recipe(
        component="qemu",
        configuration="\n".join(NORMAL.options),
        inputs=(RECORD, NORMAL.devices.read_text(), *FIRMWARE),
        compile=_compile,
    )


def _compile(tree: Tree, folder: Path, result: Path, progress: Step) -> None:
    ninja(NORMAL, tree, folder, progress, BINARY)
    # A device whose parent is not built in aborts any start; so start it.
    run(
        [folder / BINARY, "-machine", "help"],
        stage="start qemu", log=cache.log_file("qemu"), deadline=START_DEADLINE,
    )  # fmt: skip
    shutil.copy2(folder / BINARY, result)
    (result / "include" / "qemu").mkdir(parents=True)
    # Of this very tree: QEMU 10.2 added to the interface without raising its version.
    header = next(tree.src.glob("include/**/qemu-plugin.h"))
    shutil.copy(header, result / "include" / "qemu")
    (result / "firmware").mkdir()
    for name in FIRMWARE:
        shutil.copy(_firmware(tree, name), result / "firmware")
    qemu_objects(folder, tree.src, BINARY).save(result)


def ninja(
    configuration: Configuration, tree: Tree, folder: Path, progress: Step, *targets: str
) -> None:
    """Build the targets, after configuring the folder if that was not done yet."""
    log = cache.log_file("qemu")
    _add_missing(tree, configuration.devices)
    configured = folder / "qvis-python"
    # Also when the environment that it was configured from is gone, since meson is there.
    if not configured.exists() or not Path(configured.read_text()).exists():
        shutil.rmtree(folder)
        folder.mkdir()
        run(
            [tree.src / "configure", f"--python={sys.executable}", *configuration.options],
            cwd=folder,
            env={"CC": configuration.compiler},  # the one that results are named by
            stage="configure qemu",
            log=log,
            deadline=CONFIGURE_DEADLINE,
        )
        configured.write_text(sys.executable)

    def follow(line: str) -> None:
        if match := re.match(r"\[(\d+)/(\d+)\]", line):
            progress.update(int(match[1]), int(match[2]))

    run(
        ["ninja", f"-j{cpus()}", *targets],
        cwd=folder, stage="build qemu", log=log, deadline=BUILD_DEADLINE, on_line=follow,
    )  # fmt: skip


def _add_missing(tree: Tree, devices: Path) -> None:
    """Put into the tree what the build wants to find there, and git need not know."""
    copy = tree.src / "configs" / "devices" / "x86_64-softmmu" / devices.name
    # Only where it differs: a newer time stamp would configure everything again.
    if not copy.exists() or copy.read_bytes() != devices.read_bytes():
        shutil.copyfile(devices, copy)
    for name in PLACEHOLDERS:
        if not (tree.src / name).exists():
            (tree.src / name).touch()


def _firmware(tree: Tree, name: str) -> Path:
    """A file that QEMU loads into a guest, of its tree or of the distribution."""
    for place in (tree.src / "pc-bios", *FIRMWARE_PATH):
        if (place / name).is_file():
            return place / name
    raise InfraError(
        f"no {name} in {', '.join(map(str, FIRMWARE_PATH))}: "
        "install the packages seabios and qemu-system-data",
        stage="build qemu",
    )
