# SPDX-License-Identifier: GPL-2.0-or-later
"""The series' test of the plugin callback for device accesses, as check-tcg would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qvis.build import build_qemu, series
from qvis.build.plugin import glib_flags
from qvis.build.tree import open_tree

NEW = ("tests/tcg/plugins/io.c", "tests/tcg/x86_64/system/io-target.c",
       "tests/tcg/x86_64/system/validate-io.py")  # fmt: skip
DEADLINE = 60  # seconds


def run(*words: str | os.PathLike[str], cwd: Path) -> None:
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the series adds, its plugin and its program."""
    folder = tmp_path_factory.mktemp("tcg")
    base = open_tree("qemu").src / "tests" / "tcg"
    (patch,) = (p for p in series.read("qemu") if NEW[0].encode() in p.content)
    (folder / "test.patch").write_bytes(patch.content)
    run("git", "apply", *(f"--include={name}" for name in NEW), "test.patch", cwd=folder)
    plugin, target, _ = NEW
    qemu = build_qemu()
    # Each as tests/tcg/plugins/meson.build and tests/tcg/x86_64/Makefile.softmmu-target do.
    run("gcc", "-shared", "-fPIC", "-I", qemu.include / "qemu", "-o", "libio.so", plugin,
        *glib_flags(), cwd=folder)  # fmt: skip
    minilib, system = base / "minilib", base / "x86_64" / "system"
    flags = ("-nostdlib", "-O0", "-fno-stack-protector", "-fno-pie", "-ffreestanding",
             "-I", minilib)  # fmt: skip
    for source in (system / "boot.S", minilib / "printf.c", folder / target):
        run("gcc", *flags, "-c", source, "-o", f"{source.stem}.o", cwd=folder)
    run("gcc", *flags, "-static", "-no-pie", f"-Wl,-T{system / 'kernel.ld'}",
        "-Wl,-melf_x86_64,--build-id=none", "boot.o", "printf.o", "io-target.o", "-lgcc",
        "-o", "io-target", cwd=folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("accelerator", ["tcg,thread=single", "tcg,thread=multi"])
@pytest.mark.parametrize("icount", [(), ("-icount", "shift=0")], ids=["", "icount"])
def test_the_callback_sees_what_the_program_did(
    built: Path, accelerator: str, icount: tuple[str, ...]
) -> None:
    if icount and "multi" in accelerator:
        pytest.skip("-icount runs vCPUs on one thread")
    qemu = build_qemu()
    subprocess.run(
        [qemu.binary, "-M", "q35", "-accel", accelerator, *icount, "-L", qemu.firmware,
         "-nodefaults", "-display", "none", "-chardev", "file,path=output,id=output",
         "-device", "isa-debugcon,chardev=output",
         "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-plugin", "./libio.so",
         "-d", "plugin", "-D", "seen", "-kernel", "io-target"],
        cwd=built, timeout=DEADLINE, check=False,  # its status is what the program wrote
    )  # fmt: skip
    printed = (built / "output").read_text()
    assert printed.count("load") == 3, printed
    run(sys.executable, NEW[2], "output", "seen", cwd=built)
    # It can fail: with a line less, it does.
    seen = (built / "seen").read_text()
    (built / "less").write_text(seen.replace("memory 0xfee00080 4 store 0x20\n", ""))
    with pytest.raises(AssertionError):
        run(sys.executable, NEW[2], "output", "less", cwd=built)
