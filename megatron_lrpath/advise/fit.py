"""Fits a law to logged losses: robust, on logarithms, from many starts; and again to resampled residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize

from megatron_lrpath.advise.areas import F64, I64, Scale
from megatron_lrpath.advise.curves import Curve
from megatron_lrpath.advise.laws import MEMORIES, POWER, POWER_SPREAD, Law, Tissue

HUBER = 1e-3
"""Log residuals are squared up to here (Tissue et al.); where the noise is larger, up to 1.345 of its
deviations,
which keeps 95% of the least squares' precision (Huber 1964)."""
BLOCK = 4
"""Neighbouring residuals that are resampled together, because what a law misses is alike in neighbours."""

HOPELESS = 8.0
"""A λ whose cost (half a sum of squares over the noise) is so much above the best's is not tried again."""


@dataclass(frozen=True)
class Data:
    """The points of all curves, one after the other, each of shape [n].

    `logs`: ln of the mean loss; `weights`: steps behind a point over their mean; `versions`: index from 0.
    `noise` is the deviation of a point with weight 1, from what neighbouring steps differ by. `levels`: of
    how
    many versions the fit has a level beside the first's (0: all versions are alike). `power`: what the law's
    power is expected to be, None for no expectation.
    """

    sources: tuple[Curve, ...]
    scale: Scale
    logs: F64
    weights: F64
    versions: I64
    noise: float
    levels: int
    power: float | None = POWER


@dataclass(frozen=True)
class Fit:
    """A fitted law; `level` [versions] is how far each version's loss lies above the first's (nats)."""

    law: Law
    scale: Scale
    parameters: F64
    level: F64
    cost: float
    residuals: F64

    def losses(self, rates: F64, steps: I64, versions: I64) -> F64:
        """The predicted losses [n] (nats) at some steps of a run with these rates.

        A version beyond those that have been seen has the mean level of them.
        """
        return self.losses_of(self.law.read(rates, steps, self.scale), versions)

    def losses_of(self, read: Any, versions: I64) -> F64:
        """The predicted losses [n] where the law has read the curve already."""
        known = np.append(self.level, self.level.mean())
        return self.law.value(self.parameters, read)[0] + known[np.minimum(versions, len(self.level))]

    @property
    def start(self) -> F64:
        """All parameters as one vector, for another fit to begin at."""
        return np.concatenate([self.parameters, self.level[1:]])


def gather(curves: Sequence[Curve], scale: Scale, levels: int = 0) -> Data:
    """The curves' points as one set."""
    counts = np.concatenate([curve.points.counts for curve in curves])
    weights = counts / counts.mean()
    variances = np.concatenate([curve.noise**2 / curve.points.counts for curve in curves])
    return Data(
        sources=tuple(curves),
        scale=scale,
        logs=np.concatenate([curve.points.logs for curve in curves]),
        weights=weights,
        versions=np.concatenate([curve.points.versions for curve in curves]),
        noise=float(np.sqrt(np.average(variances, weights=weights))),
        levels=levels,
    )


def read_all(law: Law, data: Data) -> Any:
    """What the law needs of every curve at its points."""
    return law.stack([law.read(curve.rates, curve.points.steps, data.scale) for curve in data.sources])


def fit_law(law: Law, data: Data, starts: Sequence[F64] | None = None, read: Any = None) -> Fit:
    """The best of the fits from all starts (default: the law's own grid); `read` saves reading the curves."""
    read = read_all(law, data) if read is None else read
    found = [_descend(law, read, data, start) for start in starts or law.starts(np.exp(data.logs))]
    values, cost = min(found, key=lambda end: end[1])
    size = len(law.bounds)
    level = np.concatenate([[0.0], values[size:]])
    losses = law.value(values[:size], read)[0] + (level[data.versions] if data.levels else 0.0)
    return Fit(law, data.scale, values[:size], level, cost, data.logs - np.log(np.maximum(losses, 1e-3)))


def fit_tissue(data: Data) -> list[Fit]:
    """Tissue et al.'s law with every λ, the best first: for how many steps a drop acts depends on the run."""
    first = fit_law(Tissue(), data)
    fits = [first]
    for memory in MEMORIES:
        if memory != Tissue().memory:
            stronger = first.start
            stronger[3] = max(4 * stronger[3], 0.1)
            fits.append(fit_law(Tissue(memory), data, [first.start, stronger]))
    return sorted(fits, key=lambda fit: fit.cost)


def bootstrap(fits: Sequence[Fit], data: Data, count: int, seed: int = 0) -> list[Fit]:
    """The best fits to `count` sets of losses that might as well have been: the first fit plus its residuals.

    The residuals are drawn in blocks; of several fits (Tissue et al.'s law with every λ) each set of losses
    chooses anew, so that not knowing λ is part of the result.
    """
    rng = np.random.default_rng(seed)
    fits = [fit for fit in fits if fit.cost <= fits[0].cost + HOPELESS]
    reads = [read_all(fit.law, data) for fit in fits]
    smooth = data.logs - fits[0].residuals
    scaled = fits[0].residuals * np.sqrt(data.weights)
    samples = []
    for _ in range(count):
        begins = rng.integers(0, max(1, len(scaled) - BLOCK + 1), size=len(scaled) // BLOCK + 1)
        drawn = (begins[:, None] + np.arange(BLOCK)).ravel()[: len(scaled)] % len(scaled)
        power = POWER * np.exp(rng.normal(0.0, POWER_SPREAD))  # as unknown as the losses
        other = replace(data, logs=smooth + scaled[drawn] / np.sqrt(data.weights), power=power)
        tried = [fit_law(fit.law, other, [fit.start], read) for fit, read in zip(fits, reads, strict=True)]
        samples.append(min(tried, key=lambda fit: fit.cost))
    return samples


def _descend(law: Law, read: Any, data: Data, begin: F64) -> tuple[F64, float]:
    size, free = len(law.bounds), data.levels
    bend = max(HUBER, 1.345 * data.noise)
    later = [data.versions == version for version in range(1, free + 1)]

    def cost(values: F64) -> tuple[float, F64]:
        losses, slopes = law.value(values[:size], read)
        if free:
            losses = losses + np.concatenate([[0.0], values[size:]])[data.versions]
        safe = np.maximum(losses, 1e-3)
        errors = data.logs - np.log(safe)
        pull = -data.weights * np.clip(errors, -bend, bend) / safe
        far = bend * (np.abs(errors) - 0.5 * bend)
        total = data.weights * np.where(np.abs(errors) <= bend, 0.5 * errors**2, far)
        gradient = np.concatenate([pull @ slopes, [pull[mask].sum() for mask in later]]) / bend**2
        surprise = 0.0
        if data.power is not None:
            surprise = np.log(values[2] / data.power) / POWER_SPREAD
            gradient[2] += surprise / (
                POWER_SPREAD * values[2]
            )  # the power is the third parameter of both laws
        return float(total.sum()) / bend**2 + 0.5 * surprise**2, gradient

    bounds = np.array([*law.bounds, *[(-5.0, 5.0)] * free])
    padded = np.concatenate([begin, np.zeros(max(0, len(bounds) - len(begin)))])[: len(bounds)]
    options = {"maxiter": 300, "ftol": 1e-9, "gtol": 1e-7}
    found = minimize(
        cost, np.clip(padded, *bounds.T), jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )
    return np.asarray(found.x), float(found.fun)
