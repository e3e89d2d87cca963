"""From curves to a fitted law that may be used: how far it is off, and when there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from megatron_lrpath.advise.areas import F64, Drops, Scale
from megatron_lrpath.advise.curves import Curve
from megatron_lrpath.advise.fit import EXACT, OFF, Data, Fit, bootstrap, fit_law, gather
from megatron_lrpath.advise.law import gains
from megatron_lrpath.advise.validation import Validation, fit_path
from megatron_lrpath.errors import UserError

RESAMPLED = 100
"""Fits to resampled residuals: enough for the 2.5% and 97.5% quantiles."""
LARGEST_MISFIT = 0.02
"""Relative misfit beyond the noise above which nothing is predicted: alpha is about tenths of a percent."""
SMALLEST_GAIN = 2 * OFF
"""Relative gain of a decay below which the fit cannot tell alphas apart."""
DRIFT = 0.005
"""Relative error of a loss, per doubling of the steps, from what no law of the learning rate knows: the text of
versions to come, and how much less validation falls than training; at least so much (see `docs/advise.md`)."""
FEWEST_POINTS = 10
"""Points of the main path: its law alone has three parameters."""


@dataclass(frozen=True)
class Model:
    """A law fitted to a plan's runs.

    `samples`: the fits to resampled residuals. `misfit`: the relative deviation of the points from the law
    beyond their noise. `end_error`: the relative error of the loss at the end of a decay (root mean square);
    measured on decays that were held out one at a time where there are two or more (`held_out`).
    `path`: the law of the validation losses along the main path, for each of `fits`; empty where too few checkpoints
    were evaluated.
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
        """The fitted branches whose validation loss is known; where there are any, validation losses are predicted."""
        return tuple(curve for curve in self.data.sources if curve.validation is not None)

    @property
    def fits(self) -> tuple[Fit, ...]:
        """The fit and its samples."""
        return (self.fit, *self.samples)

    @cached_property
    def validation(self) -> Validation | None:
        """What tells validation losses, None where no fitted branch was evaluated."""
        if not self.evaluated:
            return None
        return Validation(self.fits, self.evaluated, self.data.sources[0], self.path)

    def ends_at(self, read: Drops, index: int) -> F64:
        """The final loss (nats a token) of a branch of version `index` by every fit, [1 + samples].

        Of validation where that is known of a branch; else of training, on the version's own text.
        """
        if self.validation:
            return self.validation.ends_at(read, index, self.nearest(index))
        return np.array([fit.losses_of(read, np.array([index]))[0] for fit in self.fits])

    def ends_of(self, curve: Curve) -> F64:
        """The final loss of a branch by every fit, [1 + samples], as `ends_at`."""
        return self.ends_at(curve.end(self.fit.scale), curve.version)

    def nearest(self, index: int) -> int:
        """The version nearest to `index`, the later of two, that something tells the level of the losses of."""
        told = set(self.validation.offsets if self.validation else self.data.versions.tolist())
        return min(told, key=lambda version: (abs(version - index), -version))

    @cached_property
    def drift(self) -> float:
        """`DRIFT`, or what validation has drifted by between evaluated versions where that is more."""
        if self.validation is None:
            return DRIFT
        losses = [curve.validation for curve in self.evaluated if curve.validation]
        offsets = self.validation.offsets
        drifts = [
            abs(float(offsets[one][0] - offsets[other][0])) / self._doublings(one, other)
            for one, other in pairwise(sorted(offsets))
        ]
        return max([DRIFT, *(drift / float(np.mean(losses)) for drift in drifts)])

    def unknown(self, index: int) -> float:
        """The relative deviation of version `index`'s loss from what the law cannot know, see `drift`."""
        return self.drift * self._doublings(self.nearest(index), index)

    def _doublings(self, one: int, other: int) -> float:
        """How often the steps double from the end of a version to that of another."""
        ends = self.data.sources[0].ends
        return abs(float(np.log2(ends[other] / ends[one])))


def build_model(curves: Sequence[Curve], scale: Scale, resampled: int = RESAMPLED) -> Model:
    """Fit the law to the curves; the main path comes first in them.

    Raises UserError where they do not support it: no decay yet, too few steps, a misfit that is too large.
    """
    _check_curves(curves)
    quiet = [curves[0], *(curve.beside(curves[0]) for curve in curves[1:])]
    fit, data = fit_with_levels(gather(quiet, scale))
    errors = held_out_errors(fit, data)
    left = misfit(fit, data)
    model = Model(
        fit=fit,
        samples=(),
        data=data,
        misfit=left,
        end_error=_rms(errors) if len(errors) else max(left, _rms(end_errors(quiet, fit))),
        held_out=len(errors) > 0,
    )
    _check_model(model)
    checkpoints = curves[0].checkpoints
    known = checkpoints is not None and checkpoints.tell and bool(model.evaluated)
    path = fit_path(checkpoints, scale, resampled) if checkpoints and known else ()
    return replace(model, samples=tuple(bootstrap(fit, data, resampled)), path=path)


def fit_with_levels(data: Data) -> tuple[Fit, Data]:
    """The law, with a level for each version's text where that explains more than chance would.

    The text of a new version may be easier or harder than the first one's; a level each costs a parameter, so
    it has to lower the Bayesian information criterion (Schwarz 1978).
    """
    plain = fit_law(data)
    later = int(data.versions.max())
    if not later:
        return plain, data
    levels = replace(data, levels=later)
    levelled = fit_law(levels, [plain.start])
    gained = 2 * (plain.cost - levelled.cost)
    return (levelled, levels) if gained > later * np.log(len(data.logs)) else (plain, data)


def held_out_errors(fit: Fit, data: Data) -> F64:
    """The relative error at the end of each complete decay by a fit without it; empty with fewer than two."""
    decays = [curve for curve in data.sources if curve.decays and curve.complete]
    if len(decays) < 2:
        return np.zeros(0)
    errors = []
    for curve in decays:
        others = [other for other in data.sources if other is not curve]
        without = fit_law(gather(others, data.scale, data.levels), [fit.start])
        errors.append(end_error(curve, without))
    return np.array(errors)


def end_errors(curves: Sequence[Curve], fit: Fit) -> F64:
    """The relative error of the law at the end of each decay."""
    return np.array([end_error(curve, fit) for curve in curves if curve.decays])


def end_error(curve: Curve, fit: Fit) -> float:
    """How far the law is off at the curve's end, relative, beyond the noise of the measured loss there."""
    steps = curve.logged[curve.tail]
    versions = np.searchsorted(curve.ends, steps)
    predicted = fit.losses(curve.rates, steps, versions).mean()
    if curve.main is not None:
        predicted /= fit.losses(curve.main.rates, steps, versions).mean()
    measured = curve.losses[curve.tail].mean() / curve.baseline[curve.tail].mean()
    error = float(predicted / measured - 1)
    return float(np.sqrt(max(0.0, error**2 - curve.noise**2 / len(steps))))


def misfit(fit: Fit, data: Data) -> float:
    """The relative deviation of the points from the law, beyond what their noise explains."""
    weights = 1 / np.maximum(data.deviations, EXACT) ** 2
    beyond = np.average(fit.residuals**2 - data.deviations**2, weights=weights)
    return float(np.sqrt(max(0.0, beyond)))


def _gain(model: Model) -> float:
    """The most that the decays have lowered the loss by, relative, as the law has it."""
    fit, data = model.fit, model.data
    lowered = gains(fit.parameters, data.read) / fit.losses_of(data.read, data.versions)
    return float(lowered.max())


def _rms(values: F64) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else float("inf")


def _check_curves(curves: Sequence[Curve]) -> None:
    if not curves or curves[0].kind != "main":
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
            "no branch has decayed to half of the maximum rate yet, so nothing tells what a decay gains. Train "
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
    if _gain(model) < SMALLEST_GAIN:
        raise UserError(
            "in the losses logged so far a decay lowers nothing, so the fit cannot tell alphas apart. Look at the "
            "branches (`lrpath report`), and train a longer one."
        )
