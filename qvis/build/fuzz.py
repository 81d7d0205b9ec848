# SPDX-License-Identifier: GPL-2.0-or-later
"""Building QEMU as a fuzzer: clang's libFuzzer, AddressSanitizer, UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..progress import Step
from .qemu import FIRMWARE_PATH, Configuration, ninja
from .recipe import Recipe, build, manifest
from .series import Patch
from .tree import Tree

__all__ = ["FuzzBuild"]

BINARY = "qemu-fuzz-x86_64"

OPTIONS = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--without-default-devices",
    "--with-devices-x86_64=fuzz",
    "--with-pkgversion=qvis",
    "--disable-tcg",  # no guest code runs: a third of the build
    "--enable-kvm",  # not used, but some accelerator has to be there
    "--enable-fuzzing",
    "--enable-asan",
    "--enable-ubsan",
    "--enable-fdt=system",
    "--disable-install-blobs",
    f"--firmwarepath={':'.join(map(str, FIRMWARE_PATH))}",
    "--disable-docs",
    "--disable-tools",
    "--disable-guest-agent",
    "--disable-debug-info",
    # Lines, to see where it crashed. Comparisons are not traced: most of them are
    # UBSan's own, which takes a third of the time, and inputs begin with seeds anyway.
    "--extra-cflags=-gline-tables-only -fno-sanitize-coverage=trace-cmp",
    "--disable-werror",
    "--disable-download",
)

CONFIGURATION = Configuration(OPTIONS, Path(__file__).with_name("fuzz.mak"), compiler="clang")


@dataclass(frozen=True)
class FuzzBuild:
    """A QEMU that takes inputs from libFuzzer."""

    binary: Path  # qemu-fuzz-x86_64
    version: str
    series: str  # a name for the patches that are in it
    key: str  # a name for everything that went into it

    @classmethod
    def make(cls, patches: Sequence[Patch]) -> FuzzBuild:
        """The fuzzer of QEMU with these patches, built if it never was."""
        result = build(_recipe(), patches)
        facts = manifest(result)
        return cls(result / BINARY, facts["version"], facts["series"], facts["key"])


def _recipe() -> Recipe:
    return Recipe(
        component="qemu",
        configuration="\n".join(OPTIONS),
        inputs=(CONFIGURATION.devices.read_text(),),
        compile=_compile,
        variant="fuzz",
        compiler=CONFIGURATION.compiler,
    )


def _compile(tree: Tree, folder: Path, result: Path, progress: Step) -> None:
    ninja(CONFIGURATION, tree, folder, progress, BINARY)
    shutil.copy2(folder / BINARY, result)
