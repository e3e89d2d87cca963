"""Fit the law to curves, check that it is usable, and estimate the error of its training and validation
losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from megatron_lrpath.advise.curves import F64, JITTER, Checkpoints, Curve, Drops, Scale, enough, read_drops
from megatron_lrpath.advise.fit import EXACT, OFF, Data, Fit, bootstrap, fit_law, gains, gather, losses_of
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import MAIN

GAIN_SPREAD = 0.15
"""Prior standard deviation of a decay's gain in validation relative to its gain in training."""


def fit_path(path: Checkpoints, scale: Scale, samples: int) -> tuple[Fit, ...]:
    """Fit the law to the main path's validation losses and to `samples` copies of them with random errors."""
    data = gather([path], scale)
    rng = np.random.default_rng(0)
    fits = [fit_law(data)]
    for _ in range(samples):
        logs = data.logs + rng.normal(0, JITTER, len(data.logs))
        other = replace(data, logs=logs, expectation=data.expectation.drawn(rng))
        fits.append(fit_law(other, [fits[0].start]))
    return tuple(fits)


def _ends(fits: Sequence[Fit], read: Drops, version: int = 0) -> F64:
    """Return the loss of every fit at a step, [fits], on a version's text, or without a version on the validation
    text up to its level.
    """
    return losses_of(fits, read, np.array([version]))[:, 0]


RESAMPLED = 100
"""Number of fits to resampled residuals: enough for the 2.5% and 97.5% quantiles."""
LARGEST_MISFIT = 0.02
"""Maximum relative misfit beyond the noise; alphas differ by tenths of a percent."""
SMALLEST_GAIN = 2 * OFF
"""Minimum relative gain of a decay; below it the fit cannot distinguish alphas."""
DRIFT = 0.005
"""Minimum relative error of a loss per doubling of the steps that no law of the rate explains: the text of later
versions, and the difference between validation and training (see `docs/advise.md`)."""
FEWEST_POINTS = 10
"""Minimum number of points of the main path, whose law has three parameters."""


@dataclass(frozen=True)
class Model:
    """A law fitted to a plan's runs.

    `samples`: the fits to resampled residuals. `misfit`: the relative deviation of the points from the law
    beyond their noise. `end_error`: the relative error (root mean square) of the loss at the end of a
    decay; if there are two or more decays it is measured on decays that were held out one at a time
    (`held_out`). `path`: the law of the main path's validation losses, one for each of `fits`; empty if
    too few checkpoints were evaluated. With `path`, a branch ends at the main path's validation loss minus
    `share` times the reduction of the training loss by its decay. Without it, the branch ends at its
    training loss. The mean offset of the evaluated branches is added, see `offsets`.
    """

    fit: Fit
    samples: tuple[Fit, ...]
    data: Data
    misfit: float
    end_error: float
    held_out: bool
    path: tuple[Fit, ...] = ()

    @cached_property
    def evaluated(self) -> tuple[Curve, ...]:
        """The fitted branches with a validation loss; if there are any, validation losses are predicted."""
        return tuple(curve for curve in self.data.sources if curve.validation is not None)

    @property
    def fits(self) -> tuple[Fit, ...]:
        """The fit and its samples."""
        return (self.fit, *self.samples)

    def ends_at(self, read: Drops, index: int) -> F64:
        """Return the final loss (nats per token) of a branch of version `index` by every fit, [1 + samples].

        It is the validation loss if a branch was evaluated; otherwise the training loss on the version's
        own text.
        """
        if self.evaluated:
            return self._bare(read, index) + self.offsets[self.nearest(index)]
        return _ends(self.fits, read, index)

    def ends_of(self, curve: Curve) -> F64:
        """Return the final loss of a branch by every fit, [1 + samples]; see `ends_at`."""
        return self.ends_at(curve.end(self.fit.scale), curve.version)

    @cached_property
    def offsets(self) -> dict[int, F64]:
        """The offset (nats) of evaluated branches from the prediction of every fit, [1 + samples], by
        version.

        The training loss falls faster than the validation loss, so each version has its own offset.
        """
        found: dict[int, list[F64]] = {}
        for curve in self.evaluated:
            bare = self._bare(curve.end(self.fit.scale), curve.version)
            found.setdefault(curve.version, []).append((curve.validation or 0.0) - bare)
        return {version: np.mean(offsets, axis=0) for version, offsets in found.items()}

    @cached_property
    def share(self) -> F64:
        """The reduction of the validation loss by a decay, relative to that of the training loss, by every
        fit, [1 + samples].

        It is a weighted mean of the evaluated branches' ratio and 1, whose standard deviation is
        `GAIN_SPREAD`. The precision of a branch is limited by that of the main path at its end (`OFF`, and
        the spread of its samples). The branches share the main path, so together they are no more precise
        than the most precise one. A decay without a gain has no weight.
        """
        shares, weights = [], []
        for curve in self.evaluated:
            level, trained = self._main_ends[curve.version]
            gain = np.maximum(trained - _ends(self.fits, curve.end(self.fit.scale)), 1e-6 * level)
            shares.append((level - (curve.validation or 0.0)) / gain)
            weights.append(gain**2 / ((OFF * level) ** 2 + np.var(level)))
        measured, sure = np.average(shares, axis=0, weights=weights), np.max(weights, axis=0)
        return (sure * measured + GAIN_SPREAD**-2) / (sure + GAIN_SPREAD**-2)

    def _bare(self, read: Drops, index: int) -> F64:
        """Return the validation losses of `ends_at` before the offset of the evaluated branches is added."""
        ends = _ends(self.fits, read)
        if not self.path:
            return ends
        level, trained = self._main_ends[index]
        return level - self.share * (trained - ends)

    @cached_property
    def _main_ends(self) -> list[tuple[F64, F64]]:
        """Return the validation and training loss of the main path at each version's end by every fit,
        whether reached or not.
        """
        main, scale = self.data.sources[0], self.fit.scale
        more = np.full(max(0, int(main.ends[-1]) - len(main.rates)), scale.max_lr)
        rates = np.concatenate([main.rates, more])
        reads = [read_drops(rates, np.array([last]), scale) for last in main.ends]
        return [(_ends(self.path, read), _ends(self.fits, read)) for read in reads]

    def nearest(self, index: int) -> int:
        """Return the version nearest to `index` whose level is known, the later of two."""
        known = set(self.offsets or self.data.versions.tolist())
        return min(known, key=lambda version: (abs(version - index), -version))

    @cached_property
    def drift(self) -> float:
        """`DRIFT`, or the drift of the validation loss between evaluated versions if that is larger."""
        losses = [curve.validation for curve in self.evaluated if curve.validation]
        drifts = [
            abs(float(self.offsets[one][0] - self.offsets[other][0])) / self._doublings(one, other)
            for one, other in pairwise(sorted(self.offsets))
        ]
        return max([DRIFT, *(drift / float(np.mean(losses)) for drift in drifts)])

    def unknown(self, index: int) -> float:
        """Return the relative uncertainty of version `index`'s loss that no law of the rate explains, see
        `drift`.
        """
        return self.drift * self._doublings(self.nearest(index), index)

    def _doublings(self, one: int, other: int) -> float:
        """Return the number of times that the steps double between the ends of two versions."""
        ends = self.data.sources[0].ends
        return abs(float(np.log2(ends[other] / ends[one])))


def build_model(curves: Sequence[Curve], scale: Scale, resampled: int = RESAMPLED) -> Model:
    """Fit the law to the curves; the first curve is the main path.

    Raise UserError if the curves do not support a fit: no decay yet, too few steps, or a misfit that is
    too large.
    """
    _check_curves(curves)
    quiet = [curves[0], *(curve.beside(curves[0]) for curve in curves[1:])]
    fit, data = fit_with_levels(gather(quiet, scale))
    decays = [curve for curve in quiet if curve.decays and curve.complete]
    errors = []  # at the end of each decay by a fit without it; one is enough for none
    for held in decays if len(decays) > 1 else ():
        others = [curve for curve in quiet if curve is not held]
        errors.append(end_error(held, fit_law(gather(others, scale, data.levels), [fit.start])))
    left, fitted = misfit(fit, data), _rms([end_error(one, fit) for one in quiet if one.decays])
    model = Model(
        fit=fit,
        samples=(),
        data=data,
        misfit=left,
        end_error=_rms(errors) if errors else max(left, fitted),
        held_out=bool(errors),
    )
    _check_model(model)
    checkpoints = curves[0].checkpoints
    known = checkpoints is not None and enough(checkpoints.logged.tolist()) and bool(model.evaluated)
    path = fit_path(checkpoints, scale, resampled) if checkpoints and known else ()
    return replace(model, samples=tuple(bootstrap(fit, data, resampled)), path=path)


def fit_with_levels(data: Data) -> tuple[Fit, Data]:
    """Fit the law, with a level for each version's text if the Bayesian information criterion prefers that.

    The text of a new version can be easier or harder than the first one's. Each level is one more
    parameter, so it has to lower the criterion (Schwarz 1978).
    """
    plain = fit_law(data)
    later = int(data.versions.max())
    if not later:
        return plain, data
    levels = replace(data, levels=later)
    levelled = fit_law(levels, [plain.start])
    gained = 2 * (plain.cost - levelled.cost)
    return (levelled, levels) if gained > later * np.log(len(data.logs)) else (plain, data)


def end_error(curve: Curve, fit: Fit) -> float:
    """Return the relative error of the law at the end of the curve, beyond the noise of the measured loss."""
    steps = curve.logged[curve.tail]
    versions = np.searchsorted(curve.ends, steps)
    predicted = fit.losses(curve.rates, steps, versions).mean()
    if curve.main is not None:
        predicted /= fit.losses(curve.main.rates, steps, versions).mean()
    measured = curve.losses[curve.tail].mean() / curve.baseline[curve.tail].mean()
    error = float(predicted / measured - 1)
    return float(np.sqrt(max(0.0, error**2 - curve.noise**2 / len(steps))))


def misfit(fit: Fit, data: Data) -> float:
    """Return the relative deviation of the points from the law that their noise does not explain."""
    weights = 1 / np.maximum(data.deviations, EXACT) ** 2
    beyond = np.average(fit.residuals**2 - data.deviations**2, weights=weights)
    return float(np.sqrt(max(0.0, beyond)))


def _rms(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.array(values) ** 2))) if values else float("inf")


def _check_curves(curves: Sequence[Curve]) -> None:
    if not curves or curves[0].kind != MAIN.name:
        raise UserError(
            "the main path has not logged enough steps to predict anything. Train it beyond its warm-up "
            "(`lrpath run PLAN --paradigm ours`) and call again."
        )
    if len(curves[0].points.logs) < FEWEST_POINTS:
        raise UserError(
            f"the main path has logged {len(curves[0].logged)} steps after its beginning, too few to fit a law of "
            "the loss to. Train it further (`lrpath run PLAN --paradigm ours`)."
        )
    if not any(curve.decays for curve in curves):
        raise UserError(
            "no branch has decayed to half of the maximum rate yet, so the gain of a decay is unknown. Train "
            "the first one (`lrpath run PLAN --paradigm ours --run branch-V1`): one constant and one decayed "
            "curve are enough."
        )


def _check_model(model: Model) -> None:
    if model.misfit > LARGEST_MISFIT or model.end_error > LARGEST_MISFIT:
        raise UserError(
            f"the best fit is off by {model.misfit:.1%} of the loss beyond the noise, and by {model.end_error:.1%} "
            "at the ends of decays: too much to choose alpha by, which is about tenths of a percent. Look at the "
            "losses (`lrpath report`) for jumps; longer runs and further branches help."
        )
    fit, data = model.fit, model.data
    lowered = gains(fit.parameters, data.read) / losses_of([fit], data.read, data.versions)[0]
    if float(lowered.max()) < SMALLEST_GAIN:
        raise UserError(
            "decays have not lowered the loss in the logged steps, so the fit cannot compare alphas. Check the "
            "branches (`lrpath report`), and train a longer one."
        )
