# SPDX-License-Identifier: GPL-2.0-or-later
"""A wheel installed outside the checkout carries all it needs and boots a guest."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
