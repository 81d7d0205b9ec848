# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest

from qvis import UsageError
from qvis.cpus import format_cpus, parse_cpus


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0", {0}), ("0-3", {0, 1, 2, 3}), ("0-1,5", {0, 1, 5}), (" 7 ,3-3\n", {3, 7})],
)
def test_lists_are_read(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus
    assert parse_cpus(format_cpus(cpus)) == cpus


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1-", "0,,1", "0-99999999"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="bad CPU list"):
        parse_cpus(text)


def test_ranges_are_the_shortest() -> None:
    assert format_cpus([5, 3, 0, 1, 2]) == "0-3,5"
    assert format_cpus([]) == ""
