# SPDX-License-Identifier: GPL-2.0-or-later
"""Two series of numbers against each other: how far apart, and could it be chance.

No shape is assumed of what is measured, since times and memory of a machine
have none: medians, a permutation test of the means, and an effect size that counts pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from scipy.stats import permutation_test  # type: ignore[import-untyped]

__all__ = ["Pair", "compare"]

RESAMPLES = 20_000  # all ways to deal out 8 + 8 runs are 12,870: up to there the test is exact
SEED = 1  # beyond that it draws; the same numbers always give the same p

# The least |delta| of each word, by Romano, Kromrey, Coraggio and Skowronek,
# "Appropriate statistics for ordinal level data" (Florida Association of
# Institutional Research, 2006), who set Cohen's d of 0.2, 0.5 and 0.8 over into delta.
EFFECTS = ((0.474, "large"), (0.33, "medium"), (0.147, "small"), (0.0, "negligible"))


@dataclass(frozen=True)
class Pair:
    """How transport ``b`` differs from transport ``a`` in one metric."""

    metric: str
    a: str
    b: str
    runs: tuple[int, int]  # how many numbers each has
    medians: tuple[float, float]
    difference: float  # median of b less median of a, in the metric's unit
    ratio: float | None  # median of b over that of a; None where that is zero
    p: float  # chance of means at least this far apart if the transport made no difference
    least_p: float  # what p cannot fall below with so few runs
    delta: float  # Cliff's: -1 (all of b below all of a) to 1 (all above)
    effect: str  # negligible, small, medium or large


def compare(metric: str, a: tuple[str, Sequence[float]], b: tuple[str, Sequence[float]]) -> Pair:
    """Test the second named series, neither of them empty, against the first."""
    ours, theirs = np.asarray(a[1], float), np.asarray(b[1], float)
    medians = float(np.median(ours)), float(np.median(theirs))
    delta = float(np.sign(theirs[:, None] - ours[None, :]).mean())
    return Pair(
        metric=metric,
        a=a[0],
        b=b[0],
        runs=(ours.size, theirs.size),
        medians=medians,
        difference=medians[1] - medians[0],
        ratio=medians[1] / medians[0] if medians[0] else None,
        p=_p(ours, theirs),
        least_p=_least_p(ours.size, theirs.size),
        delta=delta,
        effect=next(word for least, word in EFFECTS if abs(delta) >= least),
    )


def _p(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    if min(a.size, b.size) < 2:
        return 1.0  # a single run shows nothing, and scipy wants two
    if np.ptp(np.concatenate([a, b])) == 0:
        return 1.0

    def statistic(x: Any, y: Any, axis: int) -> Any:
        # Not of medians: half of the ways to deal out two constants have the same ones.
        return np.mean(y, axis=axis) - np.mean(x, axis=axis)

    test = permutation_test(
        (a, b), statistic, n_resamples=RESAMPLES, vectorized=True, rng=np.random.default_rng(SEED)
    )
    return float(test.pvalue)


def _least_p(a: int, b: int) -> float:
    """When no other way to deal out the runs is as extreme; two sides count twice."""
    if min(a, b) < 2:
        return 1.0
    return 2 / min(comb(a + b, a), RESAMPLES + 1)
