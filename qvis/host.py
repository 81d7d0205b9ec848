# SPDX-License-Identifier: GPL-2.0-or-later
"""What this host must have, and how to get it.

Each need is probed by the file that is used, never by a package's version or
the packaging system's database: a few dozen ``stat`` calls, cheap enough for
every start, and right on a host that has the file from elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import InfraError
from .paths import cache_dir
from .process import run
from .progress import step

__all__ = [
    "FUZZ_PACKAGES",
    "Package",
    "cpu_model",
    "ensure_packages",
    "install_command",
    "missing_packages",
]

UPDATE_DEADLINE = 300.0  # seconds
INSTALL_DEADLINE = 1200.0  # seconds
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TRIPLET = f"{os.uname().machine}-linux-gnu"


def cpu_model() -> str:
    """What this host's processor calls itself."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return model[1] if model else platform.machine()


@dataclass(frozen=True)
class Package:
    """Something that has to be installed."""

    name: str  # in Debian and what descends from it
    purpose: str
    present: Callable[[], bool]


def _program(name: str) -> Callable[[], bool]:
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    return lambda: shutil.which(name, path=path) is not None


def _file(*names: str) -> Callable[[], bool]:
    """Whether one of the files exists."""
    return lambda: any(Path(name).exists() for name in names)


def _module(name: str) -> Callable[[], bool]:
    """Whether pkg-config would find the library's description."""
    folders = [folder for folder in os.environ.get("PKG_CONFIG_PATH", "").split(":") if folder]
    folders += [f"/usr{local}/{place}/pkgconfig" for local in ("", "/local")
                for place in (f"lib/{TRIPLET}", "lib64", "lib", "share")]  # fmt: skip
    return _file(*(f"{folder}/{name}.pc" for folder in folders))


def _header(name: str) -> Callable[[], bool]:
    return _file(f"/usr/include/{name}", f"/usr/include/{TRIPLET}/{name}",
                 f"/usr/local/include/{name}")  # fmt: skip


PACKAGES = (
    Package("gcc", "compiles everything", _program("gcc")),
    Package("libc6-dev", "the C library's headers", _header("stdio.h")),
    Package("make", "builds Linux", _program("make")),
    Package("flex", "builds Linux", _program("flex")),
    Package("bison", "builds Linux", _program("bison")),
    Package("bc", "builds Linux", _program("bc")),
    Package("perl", "builds Linux, checks patches", _program("perl")),
    Package("libelf-dev", "builds Linux (objtool)", _header("libelf.h")),
    Package("lz4", "builds Linux (packs the image)", _program("lz4")),
    Package("ninja-build", "builds QEMU", _program("ninja")),
    Package("pkg-config", "builds QEMU", _program("pkg-config")),
    Package("libglib2.0-dev", "builds QEMU", _module("glib-2.0")),
    Package("libslirp-dev", "builds QEMU (user networking)", _module("slirp")),
    Package("libfdt-dev", "builds QEMU (device trees)", _header("libfdt.h")),
    Package("python3-venv", "builds QEMU",
            lambda: importlib.util.find_spec("ensurepip") is not None),
    Package("git", "applies patches", _program("git")),
    Package("xz-utils", "unpacks sources", _program("xz")),
    Package("debian-archive-keyring", "verifies sources",
            _file("/usr/share/keyrings/debian-archive-keyring.gpg")),
    Package("seabios", "firmware", _file("/usr/share/seabios/bios-microvm.bin")),
    Package("qemu-system-data", "firmware", _file("/usr/share/qemu/qboot.rom")),
    Package("busybox-static", "in the guest", _program("busybox")),
    Package("dropbear-bin", "in the guest", _program("dropbear")),
    Package("openssh-client", "reaches the guest", _program("ssh")),
    Package("util-linux", "ties children to their parent", _program("setpriv")),
)  # fmt: skip


def _clang_runtime(library: str) -> Callable[[], bool]:
    """Whether the clang on the path has a library of its compiler-rt."""

    def present() -> bool:
        clang = shutil.which("clang", path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
        # Beside the compiler itself, also where that is a link to one of several versions.
        places = Path(clang).resolve().parent.parent.glob("lib/clang/*/lib") if clang else ()
        return any(next(place.glob(f"**/{library}"), None) for place in places)

    return present


FUZZ_PACKAGES = (
    Package("clang", "builds the fuzzer", _program("clang")),
    Package("libclang-rt-dev", "builds the fuzzer (libFuzzer and sanitizers)",
            _clang_runtime("libclang_rt.fuzzer*.a")),
    Package("llvm", "names the lines in what sanitizers say", _program("llvm-symbolizer")),
)  # fmt: skip
"""What only fuzzing needs."""


def missing_packages(more: Sequence[Package] = ()) -> list[Package]:
    """What is not there, of the packages that everything needs and ``more``.

    Nothing is run to find out.
    """
    return [package for package in (*PACKAGES, *more) if not package.present()]


def install_command(packages: list[Package]) -> list[str]:
    """The command line that installs these packages, with sudo where it takes that."""
    names = [package.name for package in packages]
    return [*_sudo(), "apt-get", "install", "--yes", "--no-install-recommends", *names]


def ensure_packages(more: Sequence[Package] = ()) -> None:
    """Install what is missing, if we may: as root, or with a sudo that asks nothing.

    Raises :class:`InfraError` with the command to run when we may not.
    """
    missing = missing_packages(more)
    if not missing:
        return
    command = install_command(missing)
    names = ", ".join(package.name for package in missing)
    if not shutil.which("apt-get"):
        raise InfraError(f"this host lacks what Debian has in the packages {names}", stage="host")
    if not _privileged():
        raise InfraError(
            f"packages are missing; install them with: {shlex.join(command)}",
            stage="host",
            command=command,
        )
    log = cache_dir() / "logs" / "packages.log"
    log.unlink(missing_ok=True)
    with step(f"install {names}", log):
        # Always: lists that are there may name versions which the mirror no longer has.
        _apt([*_sudo(), "apt-get", "update"], log, UPDATE_DEADLINE)
        _apt(command, log, INSTALL_DEADLINE)
    if still := missing_packages(more):
        raise InfraError(
            f"installed, but not found: {', '.join(package.name for package in still)}",
            stage="host",
            log=log,
        )


def _apt(command: list[str], log: Path, deadline: float) -> None:
    # Through env, since sudo does not hand the environment on.
    *sudo, program = command[: command.index("apt-get") + 1]
    words = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", program, "-oDPkg::Lock::Timeout=300",
             *command[command.index("apt-get") + 1 :]]  # fmt: skip
    run(words, stage="install packages", log=log, deadline=deadline, error=InfraError)


def _sudo() -> list[str]:
    return [] if os.geteuid() == 0 else ["sudo"]


def _privileged() -> bool:
    if os.geteuid() == 0:
        return True
    if not shutil.which("sudo"):
        return False
    asked = subprocess.run(["sudo", "-n", "true"], capture_output=True, timeout=30, check=False)
    return asked.returncode == 0
