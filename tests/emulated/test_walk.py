# SPDX-License-Identifier: GPL-2.0-or-later
"""The walk from PIC to MSI in the documentation does what it says."""

from __future__ import annotations

import doctest
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "interrupts.md"


def test_the_walk_from_pic_to_msi_prints_what_the_page_says() -> None:
    results = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert results.attempted > 50
    assert results.failed == 0
