# SPDX-License-Identifier: GPL-2.0-or-later
"""Building the TCG plugin, against the very QEMU that is to load it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ..errors import InfraError
from ..process import run
from . import cache
from .qemu import QemuBuild

__all__ = ["build_plugin", "glib_flags"]

SOURCES = Path(__file__).parent.parent / "tcgplugin"
LIBRARY = "libtracer.so"
DEADLINE = 60.0  # seconds

# Functions of the plugin interface that not every QEMU has. QEMU_PLUGIN_VERSION
# does not tell: 10.2 brought the second without raising it, and the others are our series'.
PROBES = {
    "QVIS_HAVE_IO_CALLBACK": "qemu_plugin_register_vcpu_io_cb",
    "QVIS_HAVE_DISCON_CALLBACK": "qemu_plugin_register_vcpu_discon_cb",
    "QVIS_HAVE_CUT_CALLBACK": "qemu_plugin_register_vcpu_tb_cut_cb",
}


def build_plugin(qemu: QemuBuild) -> Path:
    """The plugin for ``qemu``, compiled if it never was.

    Raises :class:`~qvis.errors.BuildError` when it does not compile.
    """
    header = qemu.include / "qemu" / "qemu-plugin.h"
    inputs = [header, *sorted(SOURCES.glob("*.[ch]")), Path(__file__)]
    name = cache.key(cache.compiler(), *(path.read_bytes() for path in inputs))
    if found := cache.find("tcgplugin", name):
        return found / LIBRARY
    with cache.lock("tcgplugin"):
        if found := cache.find("tcgplugin", name):
            return found / LIBRARY
        with cache.create("tcgplugin", name) as result:
            _compile(qemu.include, result / LIBRARY)
        return cache.result("tcgplugin", name) / LIBRARY


def _compile(include: Path, library: Path) -> None:
    glib = glib_flags()
    defines = [f"-D{name}" for name, function in PROBES.items() if _has(include, glib, function)]
    run(
        [cache.COMPILER, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter",
         "-Werror", "-shared", "-fPIC", *defines, "-I", include, "-o", library,
         *SOURCES.glob("*.c"), *glib],
        stage="compile the TCG plugin",
        log=cache.log_file("tcgplugin"),
        deadline=DEADLINE,
    )  # fmt: skip


def _has(include: Path, glib: list[str], function: str) -> bool:
    """Whether the plugin interface declares ``function``: compiling a use of it tells."""
    use = f"#include <qemu/qemu-plugin.h>\nvoid *use(void) {{ return (void *){function}; }}\n"
    done = subprocess.run(
        [cache.COMPILER, "-fsyntax-only", "-x", "c", "-I", include, *glib, "-"],
        input=use, text=True, capture_output=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    return done.returncode == 0


def glib_flags() -> list[str]:
    """What a compiler has to be told for glib, which the plugin interface uses."""
    try:
        done = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "glib-2.0"],
            text=True, capture_output=True, timeout=DEADLINE, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as problem:
        raise InfraError(
            f"pkg-config does not find glib-2.0 ({problem}): install libglib2.0-dev",
            stage="compile the TCG plugin",
        ) from problem
    return done.stdout.split()
