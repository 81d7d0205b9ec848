# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis patches``, from the command line to the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvis.cli import main

from .conftest import HEADER_PATCH, Toy, line_patch

ONE = ("0001-one.patch", line_patch("one", 10, "int first;"))
HEADER = ("0002-header.patch", HEADER_PATCH)
UGLY = ("0002-ugly.patch", line_patch("ugly", 20, "int UGLY;"))
STALE = ("0002-stale.patch", line_patch("stale", 10, "int again;"))


def test_list(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    toy.series(ONE, HEADER)
    assert main(["patches", "list", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["number"], first["subject"]) == (1, "one")
    assert second["changes"] == {"common.h": [1, 1]}
    assert first["sha"] != second["sha"]
    assert main(["patches", "list"]) == 0
    assert "+1 -1" in capsys.readouterr().out


def test_check_is_content_with_a_good_series(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    toy.series(ONE, HEADER)
    assert main(["patches", "check", "toy"]) == 0
    assert "toy: 2 patches are fine" in capsys.readouterr().out


def test_check_passes_on_what_checkpatch_says(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    toy.series(ONE, UGLY)
    assert main(["patches", "check", "toy"]) == 121
    told = capsys.readouterr()
    assert "0002-ugly.patch:" in told.out
    assert "WARNING: ugly" in told.out
    assert "0001-one.patch" not in told.out + told.err


def test_check_names_the_patch_that_does_not_apply(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.series(ONE, STALE)
    assert main(["patches", "check"]) == 121
    first = next(line for line in capsys.readouterr().err.splitlines() if "does not apply" in line)
    assert first == "qvis: series: 0002-stale.patch does not apply to toy 1.0: main.c:8"


def test_apply_then_refresh(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.series(ONE, HEADER)
    mine = str(tmp_path / "mine")
    assert main(["patches", "apply", "toy", mine]) == 0
    assert main(["patches", "refresh", "toy", mine]) == 0
    assert "2 patches in" in capsys.readouterr().out
    assert main(["patches", "apply", "toy", mine]) == 2


def test_unknown_component_is_bad_usage(toy: Toy) -> None:
    assert main(["patches", "check", "hurd"]) == 2
