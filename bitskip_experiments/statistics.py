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
    values: tuple[float, ...]  # each seed's own

    @property
    def count(self) -> int:
        """Seeds."""
        return len(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval by Student's t; None for one seed."""
        if self.error is None:
            return None
        half = _T[min(self.count - 1, len(_T)) - 1] * self.error
        return self.value - half, self.value + half

    def p_value(self, other: float) -> float | None:
        """Two-sided p of the hypothesis that the mean is `other`; None for one seed."""
        if self.error is None:
            return None
        gap = abs(self.value - other)
        if not math.isfinite(gap + self.error):  # a run diverged: its mean tells nothing
            return 1.0
        if not self.error:
            return float(gap == 0)
        return student_tail(gap / self.error, self.count - 1)


def mean(values: Sequence[float]) -> Mean:
    """Mean and standard error of one figure per seed; not empty."""
    if len(values) < 2:
        return Mean(values[0], None, tuple(values))
    spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.inf
    return Mean(statistics.fmean(values), spread / math.sqrt(len(values)), tuple(values))


def geometric_mean(values: Sequence[float]) -> Mean:
    """The same of positive figures by their logarithms, as differences of losses are taken.

    The error is that of the logarithm times the mean.
    """
    if min(values) <= 0 or not all(map(math.isfinite, values)):
        return mean(values)
    logs = mean([math.log(value) for value in values])
    value = math.exp(logs.value) if len(values) > 1 else values[0]
    return Mean(value, None if logs.error is None else value * logs.error, tuple(values))


def figure_mean(path: str, values: Sequence[float]) -> Mean:
    """The mean of a figure over seeds: of perplexities geometric, of all others arithmetic."""
    return (geometric_mean if path.endswith("ppl") else mean)(values)


def student_tail(t: float, degrees: int) -> float:
    """P(|T| > t) of Student's t with whole degrees of freedom (Abramowitz and Stegun 26.7.3, 4)."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = total = 0.0
    if degrees > 1:
        term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: each may be held against 5 % by itself."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


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
