"""The law of the loss as a function of the learning-rate curve, and its robust fit to logged losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from megatron_lrpath.advise.curves import F64, I64, Curve, Drops, Scale, join_drops, read_drops

NAME = "multi-power law"
PARAMETERS = ("ln L0", "ln A", "ln a", "ln B", "ln C", "ln b", "g", "d")
"""S is in units of `Scale.area` and η in units of `Scale.max_lr`, so A and B are in nats."""
POWER, SPEED, BEND = (PARAMETERS.index(name) for name in ("ln a", "ln C", "ln b"))
BOUNDS = np.array(
    [(-12, 6), (-12, 6), (-4.6, 1.4), (-12, 6), (-6, 14), (-4, 3), (-0.5, 1.5), (-0.5, 1.5)], float
)
"""Bounds of the parameters. Values outside do not describe a loss; within them all numbers are finite."""

PUBLISHED = {"ln a": -0.77, "ln B": -1.86, "ln C": -3.70, "ln b": -0.98, "g": 0.476, "d": 0.139}
"""Prior means: the law fitted to three published curves of the multi-power law's authors (25M to 400M parameters, up to
72,000 steps; `examples/reproduction/published.py`); C is for S in steps at their rate."""
PUBLISHED_LR = 3e-4
SPREAD = {"ln a": 0.2, "ln B": 1.0, "ln C": 0.3, "ln b": 0.3, "g": 0.1, "d": 0.02}
"""Prior standard deviations: one to two times the spread of the three models, and more for a and B, which depend on the
data and the batch."""


@dataclass(frozen=True)
class Expectation:
    """The prior of the parameters; an infinite standard deviation means no prior."""

    mean: F64
    spread: F64

    def drawn(self, rng: np.random.Generator) -> Expectation:
        """Draw means from the prior."""
        known = np.where(np.isinf(self.spread), 0.0, self.spread)
        return replace(self, mean=self.mean + known * rng.normal(size=len(self.mean)))


NOTHING = Expectation(np.zeros(len(PARAMETERS)), np.full(len(PARAMETERS), np.inf))


def expected(scale: Scale) -> Expectation:
    """Return the published parameters in the units of a fit; L0 and A have no prior.

    C·η^(−g)·S does not depend on the unit if rates are in their own unit, so C scales with η^(1−g) and the
    steps.
    """
    mean = np.array([PUBLISHED.get(name, 0.0) for name in PARAMETERS])
    mean[SPEED] += np.log(scale.steps) + (1 - PUBLISHED["g"]) * np.log(scale.max_lr / PUBLISHED_LR)
    return Expectation(mean, np.array([SPREAD.get(name, np.inf) for name in PARAMETERS]))


def law(parameters: F64, read: Drops) -> F64:
    """Return the losses [sets, n] in nats by several sets of parameters, [sets, parameters].

    One call for all fits of a bootstrap takes a fraction of the time of a call for each.
    """
    terms = Terms.of(parameters, read)
    return terms.floor + terms.falling - terms.annealed


def loss_and_slopes(parameters: F64, read: Drops) -> tuple[F64, F64]:
    """Return the losses [n] in nats and their derivatives [n, parameters]."""
    power, bend = np.exp(parameters[[POWER, BEND]])
    logs = np.log(read.forward)
    terms = Terms.of(parameters[None], read)
    floor, falling, annealed = terms.floor[0], terms.falling[0], terms.annealed[0]
    argument, log_base, left = terms.argument[0], terms.log_base[0], terms.left[0]
    steep = read.size * bend * left * argument / (1.0 + argument)  # d/d ln argument

    def summed(values: F64) -> F64:
        return terms.shrunk[0] * np.bincount(read.row, weights=values, minlength=len(logs))

    slopes = [
        np.full_like(logs, floor),
        falling,
        -falling * logs * power,
        -annealed,
        -summed(steep),
        -summed(read.size * bend * log_base * left),
        summed(steep * np.log(read.rate)),
        annealed * logs,
    ]
    return floor + falling - annealed, np.stack(slopes, axis=1)


@dataclass(frozen=True)
class Terms:
    """Terms of the law, loss = floor + falling − annealed (nats).

    `floor`: L0, [sets, 1]. `falling`: A·S^(−a), [sets, n]. `annealed`: the reduction by the drops of the rate,
    [sets, n], which is `shrunk` = B·S^(−d) times the sum of size·(1 − left) over the drops before a point. Of each
    drop, [sets, drops]: `argument` = C·η^(−g)·S, `log_base` = ln(1 + argument), `left` = (1 + argument)^(−b).
    """

    floor: F64
    falling: F64
    annealed: F64
    shrunk: F64
    argument: F64
    log_base: F64
    left: F64

    @classmethod
    def of(cls, parameters: F64, read: Drops) -> Terms:
        """Compute the terms for several sets of parameters, [sets, parameters]."""
        floor, scale, power, gain, speed, bend = np.exp(parameters[:, :6]).T[..., None]
        argument = speed * np.exp(-parameters[:, 6:7] * np.log(read.rate)) * read.since
        log_base = np.log1p(argument)
        left = np.exp(-bend * log_base)
        sets, n = len(parameters), len(read.forward)
        rows = (np.arange(sets)[:, None] * n + read.row).ravel()
        lowered = np.bincount(rows, weights=(read.size * (1.0 - left)).ravel(), minlength=sets * n)
        shrunk = gain * read.forward ** -parameters[:, 7:]
        return cls(
            floor=floor,
            falling=scale * read.forward**-power,
            annealed=shrunk * lowered.reshape(sets, n),
            shrunk=shrunk,
            argument=argument,
            log_base=log_base,
            left=left,
        )


def gains(parameters: F64, read: Drops) -> F64:
    """Return the reduction of the loss (nats) by the drops of the rate, [n]."""
    return -loss_and_slopes(parameters, read)[1][:, PARAMETERS.index("ln B")]


def starts(losses: F64, expectation: Expectation) -> list[F64]:
    """Return starting points for fits to these losses: with the floor close to them and far below them."""
    low, high = float(losses.min()), float(losses.max())
    begins = []
    for share, power in product((0.5, 0.8, 0.95), (-1.4, -0.4)):
        begin = expectation.mean.copy()
        begin[:2] = np.log(share * low), np.log(max(high - share * low, 1e-3) / 2)
        begin[POWER] = power
        begins.append(begin)
    return begins


EXACT = 1e-3
"""Relative deviation of noiseless losses from the law, in addition to `OFF`."""
OFF = 2e-3
"""Relative error of the law that all points of a version on a curve share: the mean error on held-out published curves
(`docs/advise.md`). The points are therefore not independent observations."""
ROBUST = 1.345
"""Huber's threshold in standard deviations; it keeps 95% of the efficiency of least squares (Huber 1964)."""
LEVEL_SPREAD = 0.1
"""Prior standard deviation of the difference between two versions' levels (nats)."""
BLOCK = 4
"""Length of the blocks of residuals that are resampled together, because neighboring residuals are
correlated."""
SIZE = len(BOUNDS)

BOOL = NDArray[np.bool_]


@dataclass(frozen=True)
class Data:
    """The points of all curves, concatenated, each array of shape [n], and the prior of the law.

    `logs`: ln of the mean loss; for a branch relative to the main path at the same steps. `over`: which
    points are relative; `main`: the main path's drops at them. `deviations`: the standard deviation from
    noise alone; `sigmas`: from noise and the law's own error, see `OFF`. `versions`: index from 0.
    `levels`: the number of versions that have a fitted level in addition to the first version's (0: all
    versions have the same level).
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
    """A fitted law; `level` [versions] is the difference of each version's loss from the first version's
    (nats).
    """

    scale: Scale
    parameters: F64
    level: F64
    cost: float
    residuals: F64

    def losses(self, rates: F64, steps: I64, versions: I64) -> F64:
        """Return the predicted losses [n] (nats) at some steps of a run with these rates."""
        return losses_of([self], read_drops(rates, steps, self.scale), versions)[0]

    @cached_property
    def levels(self) -> F64:
        """The level of each version, and the mean of all for a version that was not fitted, [versions + 1]."""
        return np.append(self.level, self.level.mean())

    @property
    def start(self) -> F64:
        """All parameters as one vector, the starting point of another fit."""
        return np.concatenate([self.parameters, self.level[1:]])


def losses_of(fits: Sequence[Fit], read: Drops, versions: I64) -> F64:
    """Return the losses [fits, n] (nats) that fits of the same versions predict for drops that were already read.

    A version that was not fitted has the mean level of the fitted ones.
    """
    levels = np.stack([fit.levels for fit in fits])
    found = law(np.stack([fit.parameters for fit in fits]), read)
    return found + levels[:, np.minimum(versions, levels.shape[1] - 1)]


def gather(
    curves: Sequence[Curve], scale: Scale, levels: int = 0, expectation: Expectation | None = None
) -> Data:
    """Combine the points of the curves; the prior is `law.expected` unless given."""
    points = [curve.points for curve in curves]
    counts = [np.bincount(part.versions)[part.versions] for part in points]  # sharing one error `OFF`
    deviations = np.concatenate([part.deviations for part in points])
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
        deviations=deviations,
        sigmas=np.sqrt(np.maximum(deviations, EXACT) ** 2 + np.concatenate(counts) * OFF**2),
        versions=np.concatenate([part.versions for part in points]),
        levels=levels,
        expectation=expected(scale) if expectation is None else expectation,
    )


def fit_law(data: Data, begins: Sequence[F64] | None = None) -> Fit:
    """Return the best of the fits from all starting points (default: `law.starts`)."""
    absolute = np.exp(data.logs[~data.over])
    found = [_descend(data, begin) for begin in begins or starts(absolute, data.expectation)]
    values, cost = min(found, key=lambda end: end[1])
    level = np.concatenate([[0.0], values[SIZE:]])
    return Fit(data.scale, values[:SIZE], level, cost, data.logs - _predict(data, values)[0])


def bootstrap(fit: Fit, data: Data, count: int, seed: int = 0) -> list[Fit]:
    """Fit `count` bootstrap samples of the losses: the fitted values plus residuals, resampled in blocks.

    The prior means are resampled each time, too, because they are as uncertain as the losses.
    """
    rng = np.random.default_rng(seed)
    smooth = data.logs - fit.residuals
    scaled = fit.residuals / data.deviations
    samples = []
    for _ in range(count):
        begins = rng.integers(0, max(1, len(scaled) - BLOCK + 1), size=len(scaled) // BLOCK + 1)
        drawn = (begins[:, None] + np.arange(BLOCK)).ravel()[: len(scaled)] % len(scaled)
        logs = smooth + scaled[drawn] * data.deviations
        other = replace(data, logs=logs, expectation=data.expectation.drawn(rng))
        samples.append(fit_law(other, [fit.start]))
    return samples


def _predict(data: Data, values: F64) -> tuple[F64, F64]:
    """Return the logs [n] predicted at the points for these values, and their derivatives [n, values]."""
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
    """Return the result of SciPy's least squares from a starting point, and its cost."""
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
