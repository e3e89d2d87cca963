"""From curves to a law that may be used: which one, how far it is off, and when there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from megatron_lrpath.advise.areas import F64, Scale
from megatron_lrpath.advise.curves import FEWEST, Curve
from megatron_lrpath.advise.fit import Data, Fit, bootstrap, fit_law, fit_tissue, gather, read_all
from megatron_lrpath.advise.laws import MultiPower, Tissue
from megatron_lrpath.errors import UserError

RESAMPLED = 40
"""Fits to resampled residuals: enough for the 2.5% and 97.5% quantiles to one figure."""
ENOUGH_DECAYS = 3
"""Decays from which on the multi-power law is tried, too: its authors fit its seven parameters to 3 runs."""
MUST_BEAT = 0.8
"""Seven parameters have to predict held-out decays this much better than four to be preferred."""
LARGEST_MISFIT = 0.02
"""Relative misfit beyond the noise above which nothing is predicted: alpha is about tenths of a percent."""
SMALLEST_GAIN = 0.001
"""Relative gain of a decay below which the fit cannot tell alphas apart."""
FEWEST_POINTS = 10
"""Points of the main path: its law alone has three parameters."""


@dataclass(frozen=True)
class Model:
    """A law fitted to a plan's runs.

    `samples`: the fits to resampled residuals. `misfit`: the relative deviation of the points from the law
    beyond their noise. `end_error`: the relative error of the loss at the end of a decay (root mean square);
    measured on decays that were held out one at a time where there are two or more (`held_out`).
    `extrapolation`: the relative error of the main path's loss where it goes on to twice its steps.
    """

    fit: Fit
    samples: tuple[Fit, ...]
    data: Data
    misfit: float
    end_error: float
    held_out: bool
    extrapolation: float

    def doublings(self, step: int) -> float:
        """How often the steps that the main path has logged would have to double to come to `step`."""
        return max(0.0, float(np.log2(step / self.data.sources[0].logged[-1])))

    @cached_property
    def evaluated(self) -> tuple[Curve, ...]:
        """The fitted branches whose validation loss is known; where there are any, validation losses are predicted."""
        return tuple(curve for curve in self.data.sources if curve.validation is not None)

    def ends_at(self, fit: Fit, read: Any, index: int) -> float:
        """The final loss (nats a token) of a branch of version `index` by a fit, where its law has read the curve.

        Of validation where that is known of a branch: the text is the same for all versions, so they have no level
        of their own, and the law is right but for a constant that the evaluated branches tell.
        """
        if not self.evaluated:
            return float(fit.losses_of(read, np.array([index]))[0])
        return float(fit.losses_of(read, np.array([0]))[0]) + self.offset(fit)

    def offset(self, fit: Fit) -> float:
        """By how much (nats) the validation loss lies above a fit's, in the mean over the evaluated branches."""
        found = [curve.validation - end_of(curve, fit) for curve in self.evaluated if curve.validation]
        return float(np.mean(found))

    @property
    def seen(self) -> int:
        """How many versions there are losses of."""
        return int(self.data.versions.max()) + 1

    @property
    def level_spread(self) -> float:
        """How much the versions' levels differ (nats): what is not known of one without losses."""
        return 0.0 if self.evaluated else float(np.std(self.fit.level))


def build_model(curves: Sequence[Curve], scale: Scale, resampled: int = RESAMPLED) -> Model:
    """Fit the law that the curves support; the main path comes first in them.

    Raises UserError where they support none: no decay yet, too few steps, a misfit that is too large.
    """
    _check_curves(curves)
    first = choose_levels(curves, scale)
    quiet = share_noise(curves, first)
    data = gather(quiet, scale, levels=len(first.level) - 1)
    fits = fit_tissue(data)
    errors = held_out_errors(quiet, fits[0], data)
    if len(errors) >= ENOUGH_DECAYS:
        other = fit_law(MultiPower(), data)
        others = held_out_errors(quiet, other, data)
        if _rms(others) < MUST_BEAT * _rms(errors):
            fits, errors = [other], others
    left = misfit(fits[0], data)
    model = Model(
        fit=fits[0],
        samples=(),
        data=data,
        misfit=left,
        end_error=_rms(errors) if len(errors) else max(left, _rms(end_errors(quiet, fits[0]))),
        held_out=len(errors) > 0,
        extrapolation=extrapolation_error(curves[0], fits[0], scale),
    )
    _check_model(model)
    return replace(model, samples=tuple(bootstrap(fits, data, resampled)))


def choose_levels(curves: Sequence[Curve], scale: Scale) -> Fit:
    """Tissue et al.'s law, with a level for each version's text where that explains more than chance would.

    The text of a new version may be easier or harder than the first one's; a level each costs a parameter, so
    it has to lower the Bayesian information criterion (Schwarz 1978).
    """
    data = gather(curves, scale)
    plain = fit_tissue(data)[0]
    later = int(data.versions.max())
    if not later:
        return plain
    levelled = fit_tissue(replace(data, levels=later))[0]
    count = len(data.logs)
    gained = count * 2 * np.log(_spread(plain, data) / _spread(levelled, data))
    return levelled if gained > later * np.log(count) else plain


def share_noise(curves: Sequence[Curve], fit: Fit) -> list[Curve]:
    """The branches without the noise that they share with the main path: the same batches in the same steps.

    A batch that is hard for one model is hard for the other. So what the main path's loss deviates by from
    the law is taken off the branch's, step by step, where that leaves less noise.
    """
    main = curves[0]
    expected = fit.losses(main.rates, main.logged, np.searchsorted(main.ends, main.logged))
    off = np.zeros(max(len(curve.rates) for curve in curves) + 1)
    off[main.logged] = np.log(main.losses) - np.log(expected)
    quiet = [main]
    for curve in curves[1:]:
        less = replace(curve, losses=curve.losses * np.exp(-off[curve.logged]))
        quiet.append(less if less.noise < curve.noise else curve)
    return quiet


def held_out_errors(curves: Sequence[Curve], fit: Fit, data: Data) -> F64:
    """The relative error at the end of each complete decay by a fit without it; empty with fewer than two."""
    decays = [curve for curve in curves if curve.decays and curve.complete]
    if len(decays) < 2:
        return np.zeros(0)
    errors = []
    for curve in decays:
        others = [other for other in curves if other is not curve]
        without = fit_law(fit.law, gather(others, data.scale, data.levels), [fit.start])
        errors.append(end_error(curve, without))
    return np.array(errors)


def end_errors(curves: Sequence[Curve], fit: Fit) -> F64:
    """The relative error of the law at the end of each decay."""
    return np.array([end_error(curve, fit) for curve in curves if curve.decays])


def end_error(curve: Curve, fit: Fit) -> float:
    """How far the law is off at the curve's end, relative, beyond the noise of the measured loss there."""
    steps = curve.logged[curve.tail]
    predicted = fit.losses(curve.rates, steps, np.searchsorted(curve.ends, steps))
    error = float(predicted.mean() / curve.losses[curve.tail].mean() - 1)
    return float(np.sqrt(max(0.0, error**2 - curve.noise**2 / len(steps))))


def end_of(curve: Curve, fit: Fit) -> float:
    """A fit's loss in the last step of a curve, on the text of the first version."""
    return float(fit.losses(curve.rates, np.array([len(curve.rates)]), np.array([0]))[0])


def extrapolation_error(main: Curve, fit: Fit, scale: Scale) -> float:
    """How far a fit to the first half of the main path is off at its end, relative; 1 where a half is too short.

    A few hundred steps hardly tell the floor of the loss from a small power, and a text that gets harder looks
    like the floor: what the fit says of steps to come is less sure than its resampled residuals make it look. Here
    the losses speak alone, without what is expected of the power.
    """
    half = main.upto(int(main.logged[-1]) // 2)
    if len(half.logged) < FEWEST or len(half.points.logs) < FEWEST_POINTS:
        return 1.0
    alone = replace(gather([half], scale), power=None)
    return end_error(main, fit_law(fit.law, alone, [fit.parameters]))


def misfit(fit: Fit, data: Data) -> float:
    """The relative deviation of the points from the law, beyond what their noise explains."""
    return float(np.sqrt(max(0.0, _spread(fit, data) ** 2 - data.noise**2)))


def _gain(model: Model) -> float:
    """The most that the decays have lowered the loss by, relative, as the law has it."""
    fit = model.fit
    slope = -fit.law.value(fit.parameters, read_all(fit.law, model.data))[1][:, 3]
    factor = fit.parameters[3] if isinstance(fit.law, Tissue) else 1.0  # C itself there, ln B here
    lowered = factor * slope / np.exp(model.data.logs)
    return float(lowered.max())


def _spread(fit: Fit, data: Data) -> float:
    return float(np.sqrt(np.mean(data.weights * fit.residuals**2)))


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
            f"the main path has logged {len(curves[0].logged)} steps after its beginning, too few to fit a "
            f"law of "
            "the loss to. Train it further (`lrpath run PLAN --paradigm ours`)."
        )
    if not any(curve.decays for curve in curves):
        raise UserError(
            "no branch has decayed to half of the maximum rate yet, so nothing tells what a decay gains. "
            "Train the "
            "first one (`lrpath run PLAN --paradigm ours --run branch-V1`): one constant and one decayed "
            "curve are "
            "enough."
        )


def _check_model(model: Model) -> None:
    if model.misfit > LARGEST_MISFIT or model.end_error > LARGEST_MISFIT:
        raise UserError(
            f"the best fit ({model.fit.law.name}) is off by {model.misfit:.1%} of the loss beyond the "
            f"noise, and by "
            f"{model.end_error:.1%} at the ends of decays: too much to choose alpha by, which is about "
            f"tenths of a "
            "percent. Look at the losses (`lrpath report`) for jumps; longer runs and further branches help."
        )
    if _gain(model) < SMALLEST_GAIN:
        raise UserError(
            "in the losses logged so far a decay lowers nothing, so the fit cannot tell alphas apart. Look "
            "at the "
            "branches (`lrpath report`), and train a longer one."
        )
