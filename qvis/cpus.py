# SPDX-License-Identifier: GPL-2.0-or-later
"""Sets of CPUs as Linux writes them: ``0-3,8`` (Documentation/admin-guide/cputopology.rst)."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import UsageError

__all__ = ["format_cpus", "parse_cpus"]


def parse_cpus(text: str) -> frozenset[int]:
    """The CPUs that a list such as ``0-3,8`` names; :class:`UsageError` if it is none."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise UsageError(f"bad CPU list {text!r}: write it as 0-3,8") from None
        if low > high or high > 65535:
            raise UsageError(f"bad CPU list {text!r}: {part} is no range of CPUs")
        cpus.update(range(low, high + 1))
    return frozenset(cpus)


def format_cpus(cpus: Iterable[int]) -> str:
    """The shortest list of ranges that names ``cpus``."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
