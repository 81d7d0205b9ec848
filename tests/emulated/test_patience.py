# SPDX-License-Identifier: GPL-2.0-or-later
"""Patterns that backtrack end, and those that do not are left alone."""

from __future__ import annotations

import signal
import threading

import pytest

from qvis.emulated.guest.patience import Pattern, patience


@pytest.mark.timeout(20)
def test_a_pattern_that_would_take_for_ever_is_given_up() -> None:
    with pytest.raises(OSError, match="Cannot allocate memory"):
        Pattern("(a+)+$").search("a" * 60 + "!")
    assert not 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 1  # that of the test run is longer


def test_a_pattern_that_ends_finds_what_it_should() -> None:
    pattern = Pattern("(b)(c)?")
    assert pattern.groups == 2
    assert [m.start() for m in pattern.finditer("abcb")] == [1, 3]
    assert pattern.sub(lambda match: "x", "abcb", count=1) == "axb"
    assert pattern.fullmatch("bc")
    assert not pattern.match("abc")


def test_the_handler_of_others_comes_back() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with patience(), patience():
        pass
    assert signal.getsignal(signal.SIGALRM) is before


def test_other_threads_have_no_limit_and_no_error() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(bool(Pattern("a").search("a"))))
    thread.start()
    thread.join()
    assert found == [True]
