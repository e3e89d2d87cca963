"""Uncertainty of differences: intervals, p-values, Holm's correction, and the seeds that would settle one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import nct
from scipy.stats import t as student

LEVEL = 0.05
POWER = 0.8
"""Probability that as many seeds as `seeds_to_settle` excludes zero, if the difference is as measured."""
MOST = 99
"""Most seeds with which a difference is worth settling."""


@dataclass(frozen=True)
class Difference:
    """Losses (nats a token) of one model less those of another, by seed.

    `paired`: judged by the differences within seeds (Student's t). Two trainings that share a main path or a first
    version are paired, because they share most of their noise. Two that share only the seed are not: they have
    little noise in common, and Welch's t has more degrees of freedom.
    """

    above: tuple[float, ...]
    below: tuple[float, ...]
    paired: bool

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.above)

    @property
    def values(self) -> list[float]:
        """Differences within each seed, in nats."""
        return [one - other for one, other in zip(self.above, self.below, strict=True)]

    @property
    def mean(self) -> float:
        """Mean difference in nats."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation of the difference of two trainings, in nats; infinite for a single seed."""
        if self.seeds < 2:
            return math.inf
        if self.paired:
            return statistics.stdev(self.values)
        return math.hypot(statistics.stdev(self.above), statistics.stdev(self.below))

    @property
    def freedom(self) -> float:
        """Degrees of freedom: the seeds less one, or Welch's."""
        less = self.seeds - 1
        if self.paired:
            return less
        one, other = statistics.variance(self.above), statistics.variance(self.below)
        return less * (one + other) ** 2 / (one**2 + other**2) if one + other else less

    @property
    def half(self) -> float:
        """Half the width of the 95% interval of the mean, in nats; infinite for a single seed."""
        if self.seeds < 2:
            return math.inf
        quantile = float(student.ppf(1 - LEVEL / 2, self.freedom))
        return quantile * self.deviation / math.sqrt(self.seeds)

    @property
    def p(self) -> float:
        """Probability of a mean at least as large if there is no difference; 1 for a single seed."""
        if self.seeds < 2:
            return 1.0
        if self.deviation == 0:
            return 0.0 if self.mean else 1.0
        ratio = abs(self.mean) * math.sqrt(self.seeds) / self.deviation
        return float(2 * student.sf(ratio, self.freedom))

    def seeds_to_settle(self) -> int | None:
        """Return the number of seeds that would exclude zero with probability `POWER`; None above `MOST`."""
        if self.seeds < 2 or not self.mean:
            return None
        for seeds in range(self.seeds + 1, MOST + 1):
            freedom = (seeds - 1) * (1 if self.paired else 2)
            needed = float(student.ppf(1 - LEVEL / 2, freedom))
            if nct.sf(needed, freedom, abs(self.mean) * math.sqrt(seeds) / self.deviation) >= POWER:
                return seeds
        return None


def holm(chances: Sequence[float]) -> list[bool]:
    """Return for each p-value whether it is below 5% when corrected for their number (Holm 1979)."""
    order = sorted(range(len(chances)), key=lambda index: chances[index])
    kept = [False] * len(chances)
    for rank, index in enumerate(order):
        if chances[index] > LEVEL / (len(chances) - rank):
            break
        kept[index] = True
    return kept


def in_percent(nats: float) -> float:
    """Return a difference of losses as a share of the perplexity, in percent."""
    return 100 * math.expm1(nats)


def difference_said(difference: Difference) -> str:
    """Return `+3.45% [+2.41, +4.50]`: the mean in percent of the perplexity with its 95% interval."""
    if not difference.seeds:
        return "–"
    mean = f"{in_percent(difference.mean):+.2f}%"
    if difference.seeds < 2:
        return mean
    low, high = (in_percent(difference.mean + side * difference.half) for side in (-1, 1))
    return f"{mean} [{low:+.2f}, {high:+.2f}]"
