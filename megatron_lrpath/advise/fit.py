"""Fits the law to logged losses: robust, on logarithms, from several starts; and again to resampled residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from megatron_lrpath.advise.areas import F64, I64, Drops, Scale, join_drops, read_drops
from megatron_lrpath.advise.curves import Curve, Points
from megatron_lrpath.advise.law import BOUNDS, Expectation, expected, loss_and_slopes, starts

EXACT = 1e-3
"""Relative deviation that even losses without noise have from the law, besides `OFF`."""
OFF = 2e-3
"""What the law is off by all along a curve, relative: as it was, in the mean, on the published curves that were held
out (`docs/advise.md`). All points of a version on a curve share it, so that together they tell no more than that."""
ROBUST = 1.345
"""Deviations up to which a residual is squared: keeps 95% of the least squares' precision (Huber 1964)."""
LEVEL_SPREAD = 0.1
"""Nats that a version's text may well be easier or harder by than the first's."""
BLOCK = 4
"""Neighbouring residuals that are resampled together, because what a law misses is alike in neighbours."""
SIZE = len(BOUNDS)

BOOL = NDArray[np.bool_]


@dataclass(frozen=True)
class Data:
    """The points of all curves, one after the other, each of shape [n], and what is expected of the law.

    `logs`: ln of the mean loss, of a branch over that of the main path in the same steps; `over`: which points are
    so; `main`: the main path read where they are. `deviations`: what noise alone makes a point deviate by; `sigmas`:
    what noise and the law's own error do, see `OFF`.
    `versions`: index from 0. `levels`: of how many versions the fit has a level beside the first's (0: all are alike).
    """

    sources: tuple[Curve, ...]
    scale: Scale
    read: Drops
    main: Drops
    over: BOOL
    logs: F64
    deviations: F64
    sigmas: F64
    versions: I64
    levels: int
    expectation: Expectation


@dataclass(frozen=True)
class Fit:
    """A fitted law; `level` [versions] is how far each version's loss lies above the first's (nats)."""

    scale: Scale
    parameters: F64
    level: F64
    cost: float
    residuals: F64

    def losses(self, rates: F64, steps: I64, versions: I64) -> F64:
        """The predicted losses [n] (nats) at some steps of a run with these rates.

        A version beyond those that have been seen has the mean level of them.
        """
        return self.losses_of(read_drops(rates, steps, self.scale), versions)

    def losses_of(self, read: Drops, versions: I64) -> F64:
        """The predicted losses [n] where the curve has been read already."""
        known = np.append(self.level, self.level.mean())
        return loss_and_slopes(self.parameters, read)[0] + known[np.minimum(versions, len(self.level))]

    @property
    def start(self) -> F64:
        """All parameters as one vector, for another fit to begin at."""
        return np.concatenate([self.parameters, self.level[1:]])


def gather(
    curves: Sequence[Curve], scale: Scale, levels: int = 0, expectation: Expectation | None = None
) -> Data:
    """The curves' points as one set; what is expected of the law is what `law.expected` says, unless given."""
    points = [curve.points for curve in curves]
    over = np.concatenate([np.full(len(curve.points.logs), curve.main is not None) for curve in curves])
    mains = [
        read_drops(curve.main.rates, curve.points.steps, scale) for curve in curves if curve.main is not None
    ]
    return Data(
        sources=tuple(curves),
        scale=scale,
        read=join_drops([read_drops(curve.rates, curve.points.steps, scale) for curve in curves]),
        main=join_drops(mains),
        over=over,
        logs=np.concatenate([part.logs for part in points]),
        deviations=np.concatenate([part.deviations for part in points]),
        sigmas=np.concatenate([_sigmas(part) for part in points]),
        versions=np.concatenate([part.versions for part in points]),
        levels=levels,
        expectation=expected(scale) if expectation is None else expectation,
    )


def _sigmas(points: Points) -> F64:
    """The deviation of each point that gives a stretch of n the weight of one error `OFF`, beside their noise."""
    count = np.bincount(points.versions)[points.versions]
    return np.sqrt(np.maximum(points.deviations, EXACT) ** 2 + count * OFF**2)


def fit_law(data: Data, begins: Sequence[F64] | None = None) -> Fit:
    """The best of the fits from all starts (default: `law.starts`)."""
    absolute = np.exp(data.logs[~data.over])
    found = [_descend(data, begin) for begin in begins or starts(absolute, data.expectation)]
    values, cost = min(found, key=lambda end: end[1])
    level = np.concatenate([[0.0], values[SIZE:]])
    return Fit(data.scale, values[:SIZE], level, cost, data.logs - _predict(data, values)[0])


def bootstrap(fit: Fit, data: Data, count: int, seed: int = 0) -> list[Fit]:
    """Fits to `count` sets of losses that might as well have been: the fit plus its residuals, drawn in blocks.

    What is expected of the parameters is drawn anew each time, too: it is as unknown as the losses.
    """
    rng = np.random.default_rng(seed)
    smooth = data.logs - fit.residuals
    scaled = fit.residuals / data.deviations
    samples = []
    for _ in range(count):
        begins = rng.integers(0, max(1, len(scaled) - BLOCK + 1), size=len(scaled) // BLOCK + 1)
        drawn = (begins[:, None] + np.arange(BLOCK)).ravel()[: len(scaled)] % len(scaled)
        logs = smooth + scaled[drawn] * data.deviations
        samples.append(
            fit_law(replace(data, logs=logs, expectation=data.expectation.drawn(rng)), [fit.start])
        )
    return samples


def _predict(data: Data, values: F64) -> tuple[F64, F64]:
    """The logs [n] that a fit's values make of the points, and their derivatives [n, values]."""
    later = (data.versions[:, None] == np.arange(1, data.levels + 1)[None, :]).astype(np.float64)

    def logs(read: Drops, levels: F64) -> tuple[F64, F64]:
        losses, slopes = loss_and_slopes(values[:SIZE], read)
        losses = np.maximum(losses + levels @ values[SIZE:], 1e-3)
        return np.log(losses), np.hstack([slopes, levels]) / losses[:, None]

    value, slopes = logs(data.read, later)
    main_value, main_slopes = logs(data.main, later[data.over])
    value[data.over] -= main_value
    slopes[data.over] -= main_slopes
    return value, slopes


def _descend(data: Data, begin: F64) -> tuple[F64, float]:
    """Where SciPy's least squares come to from a start, and the cost there."""
    mean = np.append(data.expectation.mean, np.zeros(data.levels))
    spread = np.append(data.expectation.spread, np.full(data.levels, LEVEL_SPREAD))
    bounds = np.vstack([BOUNDS, np.tile((-5.0, 5.0), (data.levels, 1))]).T

    def residuals(values: F64) -> F64:
        return np.concatenate(
            [(_predict(data, values)[0] - data.logs) / data.sigmas, (values - mean) / spread]
        )

    def slopes(values: F64) -> F64:
        return np.vstack([_predict(data, values)[1] / data.sigmas[:, None], np.diag(1 / spread)])

    padded = np.append(begin, np.zeros(max(0, len(mean) - len(begin))))[: len(mean)]
    found = least_squares(
        residuals, np.clip(padded, bounds[0] + 1e-9, bounds[1] - 1e-9), slopes, bounds=bounds,
        loss="huber", f_scale=ROBUST, x_scale="jac", max_nfev=300,
    )  # fmt: skip
    return np.asarray(found.x), float(found.cost)
