# SPDX-License-Identifier: GPL-2.0-or-later
"""What the verbs share: tables, JSON, and words after a ``--``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["print_json", "print_table", "strip_dashes"]

WIDE = 1000  # columns; a table that is piped is not to be folded


def print_json(data: Any) -> None:
    """``data`` for a program to read."""
    print(json.dumps(data, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """``rows`` under ``columns``, as wide as the terminal or, piped, as need be."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDE, highlight=False, markup=False).print(table)


def strip_dashes(words: list[str]) -> list[str]:
    """``words`` without the ``--`` that sets them off."""
    return words[1:] if words[:1] == ["--"] else words
