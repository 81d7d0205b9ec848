# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors and what they show of themselves."""

from __future__ import annotations

import traceback

from qvis.errors import BootError


def test_a_traceback_shows_the_last_lines_of_the_log() -> None:
    problem = BootError("no sign of it", stage="kernel", tail=["first", "last"])
    text = "".join(traceback.format_exception(problem))
    assert "kernel: no sign of it\nthe last lines:\n  first\n  last\n" in text


def test_an_error_without_a_log_has_no_last_lines() -> None:
    assert "the last lines" not in "".join(traceback.format_exception(BootError("no sign of it")))
