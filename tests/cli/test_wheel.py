# SPDX-License-Identifier: GPL-2.0-or-later
"""A wheel installed outside the checkout carries all it needs and boots a guest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of an environment that has qvis from a wheel."""
    place = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place, ROOT],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (wheel,) = place.glob("qvis-*.whl")
    environment = place / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site = environment / "lib" / version / "site-packages"
    # What qvis depends on comes from here; qvis itself must not, so it is left out.
    ours = Path(sysconfig.get_path("purelib"))
    for package in ours.iterdir():
        if "qvis" not in package.name:
            (site / package.name).symlink_to(package)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--ignore-installed",
         "--prefix", environment, wheel],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return environment / "bin"


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [installed / "python", "-m", "qvis", *words],
        capture_output=True, text=True, timeout=300, check=False, cwd="/", env=environment,
    )  # fmt: skip


def test_wheel_is_what_runs(installed: Path) -> None:
    code = "import qvis; print(qvis.__file__)"
    where = subprocess.run([installed / "python", "-c", code], capture_output=True, text=True,
                           check=True, cwd="/").stdout  # fmt: skip
    assert where.startswith(str(installed.parent))


def test_wheel_carries_the_series(installed: Path) -> None:
    from_wheel = run(installed, "patches", "list")
    assert from_wheel.returncode == 0, from_wheel.stderr
    here = subprocess.run(["qvis", "patches", "list"], capture_output=True, text=True, check=True)
    assert from_wheel.stdout == here.stdout


def test_wheel_boots_a_guest(
    installed: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    up = run(installed, "up", "--backend", "tcg", "--transport", "msi", "--name", "wheel")
    assert up.returncode == 0, up.stderr
    try:
        assert cli("exec", "wheel", "--", "hostname").stdout == "wheel\n"
    finally:
        assert run(installed, "down", "wheel").returncode == 0


# What every Debian has; no compiler, no QEMU, no OpenSSH, no busybox.
ESSENTIAL = ("setpriv", "sh", "env")


@pytest.fixture
def bare(installed: Path, tmp_path: Path, state: Path) -> Callable[..., str]:
    """Runs a command of the environment where there is nothing else, and wants it to work."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ESSENTIAL:
        found = shutil.which(name)
        assert found
        (programs / name).symlink_to(found)
    environment = {
        "PATH": str(programs),
        "HOME": str(tmp_path),
        "QVIS_CACHE": str(tmp_path / "cache"),
        "QVIS_STATE": str(state),
    }

    def run(*words: str) -> str:
        done = subprocess.run(
            [installed / "python", "-m", *words],
            capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
            env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_wheel_has_a_machine_where_there_is_nothing(bare: Callable[..., str]) -> None:
    said = bare("qvis", "up", "--backend", "emulated", "--name", "bare", "--transport", "vis")
    assert "bare is up: vis" in said
    assert bare("qvis", "exec", "bare", "--", "hostname") == "bare\n"
    assert "MMIO-VIS" in bare("qvis", "irq", "bare")
    bare("qvis", "down", "bare")


def test_wheel_compares_where_there_is_nothing(bare: Callable[..., str]) -> None:
    said = bare("qvis", "compare", "--backend", "emulated", "--runs", "1", "-o", "found")
    assert "exits per interrupt" in said or "device exits" in said


def test_readmes_test_passes_where_there_is_nothing(
    bare: Callable[..., str], tmp_path: Path
) -> None:
    example = re.search(r"```python\n(@pytest\.mark\.qvis.*?)```", README.read_text(), re.DOTALL)
    assert example
    (tmp_path / "test_example.py").write_text(f"import pytest\n\n\n{example[1]}")
    said = bare("pytest", "-q", "--qvis-backend", "emulated", "test_example.py")
    assert "1 passed" in said
