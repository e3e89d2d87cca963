"""The law of the loss as a function of the learning-rate curve, its derivatives, and what is expected of it.

L = L0 + A·S^(−a) − B·S^(−d)·Σ_k (η_{k−1}−η_k)·G(η_k^(−g)·S_k),  G(x) = 1 − (C·x+1)^(−b)

S is the sum of all rates so far, the warm-up's too, S_k that since drop k. With d = 0 it is the multi-power law
(arXiv 2503.12811): there a drop of the rate gains as much late in a path as early. In its authors' own
curves it gains less the longer the path (`docs/advise.md`); d is for that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from megatron_lrpath.advise.areas import F64, Drops, Scale

NAME = "multi-power law"
PARAMETERS = ("ln L0", "ln A", "ln a", "ln B", "ln C", "ln b", "g", "d")
"""S is in units of `Scale.area` and η of `Scale.max_lr`, so that A and B are in nats."""
POWER, SPEED = PARAMETERS.index("ln a"), PARAMETERS.index("ln C")
BOUNDS = np.array(
    [(-12, 6), (-12, 6), (-4.6, 1.4), (-12, 6), (-6, 14), (-4, 3), (-0.5, 1.5), (-0.5, 1.5)], float
)
"""Beyond these a fit has nothing to do with a loss; numbers stay finite within them."""

PUBLISHED = {"ln a": -0.77, "ln B": -1.86, "ln C": -3.70, "ln b": -0.98, "g": 0.476, "d": 0.139}
"""Means of the law fitted to the curves of three models (25M to 400M parameters, up to 72,000 steps) that the
multi-power law's authors have published (`examples/reproduction/published.py`); C is for S in steps at their rate."""
PUBLISHED_LR = 3e-4
SPREAD = {"ln a": 0.2, "ln B": 1.0, "ln C": 0.3, "ln b": 0.3, "g": 0.1, "d": 0.02}
"""By how much another model may well differ, as a standard deviation: as much as the three do among themselves or
twice that, and for a and B, which depend on the data and the batch, more."""


@dataclass(frozen=True)
class Expectation:
    """What is expected of the parameters before any loss is seen; a spread of infinity: nothing."""

    mean: F64
    spread: F64

    def drawn(self, rng: np.random.Generator) -> Expectation:
        """Another that might as well have been expected."""
        known = np.where(np.isinf(self.spread), 0.0, self.spread)
        return replace(self, mean=self.mean + known * rng.normal(size=len(self.mean)))


NOTHING = Expectation(np.zeros(len(PARAMETERS)), np.full(len(PARAMETERS), np.inf))


def expected(scale: Scale) -> Expectation:
    """The published parameters in the units of a fit; nothing is expected of L0 and A.

    C·η^(−g)·S with rates in their own unit is the same number in every run, so C grows with η^(1−g) and the steps.
    """
    mean = np.array([PUBLISHED.get(name, 0.0) for name in PARAMETERS])
    mean[SPEED] += np.log(scale.steps) + (1 - PUBLISHED["g"]) * np.log(scale.max_lr / PUBLISHED_LR)
    return Expectation(mean, np.array([SPREAD.get(name, np.inf) for name in PARAMETERS]))


def loss_and_slopes(parameters: F64, read: Drops) -> tuple[F64, F64]:
    """Losses [n] in nats and their derivatives [n, parameters]."""
    floor, scale, power = np.exp(parameters[:3])
    gain, speed, bend = np.exp(parameters[3:6])
    g, d = parameters[6:]
    logs = np.log(read.forward)
    falling = scale * read.forward**-power
    shrunk = gain * read.forward**-d
    rates = np.log(read.rate)
    argument = speed * np.exp(-g * rates) * read.since
    log_base = np.log1p(argument)
    left = np.exp(-bend * log_base)
    steep = read.size * bend * left * argument / (1.0 + argument)  # d/d ln argument

    def summed(values: F64) -> F64:
        return shrunk * np.bincount(read.row, weights=values, minlength=len(logs))

    annealed = summed(read.size * (1.0 - left))
    slopes = [
        np.full_like(logs, floor),
        falling,
        -falling * logs * power,
        -annealed,
        -summed(steep),
        -summed(read.size * bend * log_base * left),
        summed(steep * rates),
        annealed * logs,
    ]
    return floor + falling - annealed, np.stack(slopes, axis=1)


def gains(parameters: F64, read: Drops) -> F64:
    """How much (nats) the drops of the rate have lowered the loss by, [n]."""
    return -loss_and_slopes(parameters, read)[1][:, PARAMETERS.index("ln B")]


def starts(losses: F64, expectation: Expectation) -> list[F64]:
    """Where fits to losses like these may begin: the floor near and far below them."""
    low, high = float(losses.min()), float(losses.max())
    begins = []
    for share, power in product((0.5, 0.8, 0.95), (-1.4, -0.4)):
        begin = expectation.mean.copy()
        begin[:2] = np.log(share * low), np.log(max(high - share * low, 1e-3) / 2)
        begin[POWER] = power
        begins.append(begin)
    return begins
