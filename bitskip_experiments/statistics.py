"""Means over seeds and what may be said of differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves all above.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    error: float | None  # standard error; None for one seed
    count: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval by Student's t; None for one seed."""
        if self.error is None:
            return None
        half = _T[min(self.count - 1, len(_T)) - 1] * self.error
        return self.value - half, self.value + half


def mean(values: Sequence[float]) -> Mean:
    """Mean and standard error of one figure per seed; not empty."""
    if len(values) < 2:
        return Mean(values[0], None, 1)
    spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.inf
    return Mean(statistics.fmean(values), spread / math.sqrt(len(values)), len(values))


def contrast(plus: Sequence[dict[int, float]], minus: Sequence[dict[int, float]]) -> Mean:
    """Sum of some variants less that of others, paired: taken at each seed that all have.

    Each item is seed -> figure. Raises ValueError if there is no common seed.
    """
    common = set.intersection(*(set(item) for item in (*plus, *minus)))
    if not common:
        raise ValueError("no seed that all of them have")
    return mean(
        [
            sum(item[seed] for item in plus) - sum(item[seed] for item in minus)
            for seed in sorted(common)
        ]
    )
