# SPDX-License-Identifier: GPL-2.0-or-later
"""What the inner host is made of: a kernel of its own, and a file system around QEMU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qvis.build import build_qemu, linux, series
from qvis.build.host import FIRMWARE, QEMU, find_host_initramfs, make_host_initramfs
from qvis.build.linux import Role


def test_the_inner_hosts_kernel_is_another_result_with_folders_of_its_own() -> None:
    guest, host = linux._recipe(Role.GUEST), linux._recipe(Role.HOST)
    assert (guest.name, host.name) == ("linux", "linux-host")
    assert set(guest.inputs) < set(host.inputs)
    assert not [one for one in linux._fragments(Role.GUEST) if one.parent.name == "host"]


def test_every_option_of_the_inner_host_has_a_reason() -> None:
    (fragment,) = (one for one in linux._fragments(Role.HOST) if one.parent.name == "host")
    blocks = fragment.read_text().split("\n\n")
    for block in blocks[1:]:
        first = block.splitlines()[0]
        assert first.startswith(("# ", "CONFIG_LOCALVERSION")), block


def test_the_series_for_kvm_changes_linux() -> None:
    assert series.names() == ["qemu", "linux", "kvm"]
    assert series.component("kvm") == "linux"


def test_the_inner_host_has_qemu_and_the_programs(tmp_path: Path) -> None:
    qemu = build_qemu()
    archive = make_host_initramfs(qemu)
    assert find_host_initramfs(qemu) == archive
    with archive.open("rb") as content:
        subprocess.run(
            ["cpio", "-idm", "--quiet", "--no-preserve-owner"],
            stdin=content, cwd=tmp_path, check=False, capture_output=True,
        )  # fmt: skip
    assert (tmp_path / QEMU).stat().st_size < qemu.binary.stat().st_size
    assert {file.name for file in (tmp_path / FIRMWARE).iterdir()} >= {"bios-microvm.bin"}
    for source in sorted((linux.guest_kernel_dir() / "host").glob("*.c")):
        assert (tmp_path / "bin" / f"qvis-{source.stem}").stat().st_mode & 0o111
    said = subprocess.run([tmp_path / "bin" / "qvis-capability"], capture_output=True, check=False)
    assert said.returncode in (0, 1)
    assert said.stdout


def test_a_program_that_does_not_compile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qvis import BuildError
    from qvis.build.initramfs import compile_program

    (tmp_path / "bad.c").write_text("int main(void) { return nothing; }\n")
    with pytest.raises(BuildError, match=r"compile bad\.c"):
        compile_program(tmp_path / "bad.c", tmp_path / "bad", tmp_path / "log")
