# SPDX-License-Identifier: GPL-2.0-or-later
"""Sources, patch series and what is built from them.

:func:`build_all` is the way in. What was built before from the same inputs is
returned at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..host import FUZZ_PACKAGES, ensure_packages, missing_packages
from . import series
from .fuzz import FuzzBuild
from .host import find_host_initramfs, make_host_initramfs
from .initramfs import Entry, find_initramfs, make_initramfs, pack
from .linux import LinuxBuild, Role
from .plugin import build_plugin
from .qemu import QemuBuild, run_qtest

__all__ = [
    "Artifacts",
    "Entry",
    "FuzzBuild",
    "Host",
    "LinuxBuild",
    "QemuBuild",
    "build_all",
    "build_fuzz",
    "build_host",
    "build_host_linux",
    "build_initramfs",
    "build_linux",
    "build_plugin",
    "build_qemu",
    "built",
    "built_host",
    "pack",
    "qtest",
]


@dataclass(frozen=True)
class Artifacts:
    """All that a machine is made of."""

    qemu: QemuBuild
    linux: LinuxBuild
    initramfs: Path  # an uncompressed cpio archive, to which others can be appended
    host_linux: LinuxBuild | None = None  # of the inner host; without, what qvis builds


@dataclass(frozen=True)
class Host:
    """All that an inner host is made of."""

    linux: LinuxBuild
    initramfs: Path  # likewise, with QEMU in it


def build_all() -> Artifacts:
    """Make whatever is not there yet; packages that are missing are installed first.

    Raises :class:`~qvis.errors.BuildError` when a patch does not apply or a
    build fails, and :class:`~qvis.errors.InfraError` when this host lacks
    something that cannot be had.
    """
    return Artifacts(build_qemu(), build_linux(), build_initramfs())


def built() -> Artifacts | None:
    """What :func:`build_all` would return, if nothing had to be made for it."""
    if missing_packages():
        return None
    qemu = QemuBuild.find(series.read("qemu"))
    linux = LinuxBuild.find(series.read("linux"))
    initramfs = find_initramfs()
    return Artifacts(qemu, linux, initramfs) if qemu and linux and initramfs else None


def build_qemu(*, patched: bool = True) -> QemuBuild:
    """QEMU with our series, or as its authors released it."""
    ensure_packages()
    return QemuBuild.make(series.read("qemu") if patched else ())


def build_fuzz() -> FuzzBuild:
    """QEMU with our series as a fuzzer; needs packages that nothing else does."""
    ensure_packages(FUZZ_PACKAGES)
    return FuzzBuild.make(series.read("qemu"))


def build_linux(*, patched: bool = True) -> LinuxBuild:
    """The guest's Linux with our series, or as its authors released it."""
    ensure_packages()
    return LinuxBuild.make(series.read("linux") if patched else ())


def build_host_linux(*, patched: bool = True) -> LinuxBuild:
    """The inner host's Linux with the series "kvm", or as its authors released it."""
    ensure_packages()
    return LinuxBuild.make(series.read("kvm") if patched else (), Role.HOST)


def build_host(artifacts: Artifacts) -> Host:
    """The inner host that runs these artifacts' QEMU; only the nested backend needs it."""
    return Host(artifacts.host_linux or build_host_linux(), make_host_initramfs(artifacts.qemu))


def built_host() -> Host | None:
    """What :func:`build_host` would return for :func:`built`, if nothing had to be made for it."""
    artifacts = built()
    linux = LinuxBuild.find(series.read("kvm"), Role.HOST)
    initramfs = find_host_initramfs(artifacts.qemu) if artifacts else None
    return Host(linux, initramfs) if linux and initramfs else None


def build_initramfs() -> Path:
    """The guest's file system, without the keys that a machine appends."""
    ensure_packages()
    return make_initramfs()


def qtest(name: str) -> None:
    """Build and run the test program ``tests/qtest/<name>`` of QEMU with our series.

    Raises :class:`~qvis.errors.BuildError` with the end of its output (TAP)
    when a test fails.
    """
    ensure_packages()
    run_qtest(name, series.read("qemu"))
