# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/qvis with a Python that only pretends, so that each run takes milliseconds."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

PYTHON = """\
#!/bin/sh
case "$*" in
    "-c import"*) exit ${TOO_OLD:-0} ;;
    "-m venv "*)
        echo made >>"$CALLS"
        sleep 0.3
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        printf '#!/bin/sh\\necho ran "$@"\\n' >"$3/bin/qvis"
        chmod +x "$3/bin/qvis" ;;
    "-m pip "*)
        echo "pip says this"
        exit ${PIP_STATUS:-0} ;;
esac
"""


@dataclass
class Checkout:
    root: Path
    bin: Path
    calls: Path

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "CALLS": str(self.calls),
            **variables,
        }  # fmt: skip
        return subprocess.Popen(
            [self.root / "scripts" / "qvis", *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *words: str, **variables: str) -> tuple[int, str, str]:
        child = self.start(*words, **variables)
        out, err = child.communicate(timeout=30)
        return child.returncode, out, err

    @property
    def made(self) -> int:
        """How many environments were made."""
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    # A blank in the path, since people have them.
    root = tmp_path / "a checkout"
    shutil.copytree(SCRIPTS, root / "scripts")
    (root / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "bin").mkdir()
    made = Checkout(root, tmp_path / "bin", tmp_path / "calls")
    for version in ("3", "3.11", "3.12", "3.13", "3.14"):
        made.program(f"python{version}", PYTHON)
    return made


def test_environment_is_made_once(checkout: Checkout) -> None:
    status, out, err = checkout.run("up", "two words")
    assert (status, out) == (0, "ran up two words\n")
    assert "making a Python environment" in err
    assert checkout.run("ls") == (0, "ran ls\n", "")
    assert checkout.made == 1


def test_works_through_a_link_and_from_anywhere(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "bin" / "link").symlink_to(checkout.root / "scripts" / "qvis")
    done = subprocess.run(
        [tmp_path / "bin" / "link"],
        cwd="/",
        env={**os.environ, "PATH": f"{checkout.bin}:{os.environ['PATH']}", "CALLS": "/dev/null"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "ran\n"


def test_two_at_once_make_one(checkout: Checkout) -> None:
    children = [checkout.start(str(number)) for number in range(3)]
    outputs = [child.communicate(timeout=30) for child in children]
    assert [out for out, _ in outputs] == ["ran 0\n", "ran 1\n", "ran 2\n"]
    assert checkout.made == 1
    assert sum("waiting for another process" in err for _, err in outputs) == 2


def test_changed_pyproject_is_noticed(checkout: Checkout) -> None:
    checkout.run()
    (checkout.root / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    checkout.run()
    assert checkout.made == 2


def test_moved_checkout_is_noticed(checkout: Checkout) -> None:
    checkout.run()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert checkout.run("ls")[1] == "ran ls\n"
    assert checkout.made == 2


def test_failure_shows_the_log_and_is_tried_again(checkout: Checkout) -> None:
    status, _, err = checkout.run(PIP_STATUS="1")
    assert status == 122
    assert "pip says this" in err
    assert str(checkout.root / ".venv" / "qvis-setup.log") in err
    assert checkout.run("ls")[1] == "ran ls\n"


def test_without_python_and_rights_the_command_is_told(checkout: Checkout) -> None:
    checkout.program("id", "#!/bin/sh\necho 1000\n")
    checkout.program("sudo", "#!/bin/sh\nexit 1\n")
    status, _, err = checkout.run(TOO_OLD="1")
    assert status == 122
    assert "sudo apt-get install --yes python3 python3-venv" in err
