"""From curves to a fitted law that may be used, for training and validation losses, with its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from megatron_lrpath.advise.curves import F64, JITTER, Checkpoints, Curve, Drops, Scale, enough, read_drops
from megatron_lrpath.advise.fit import EXACT, OFF, Data, Fit, bootstrap, fit_law, gains, gather
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import MAIN

GAIN_SPREAD = 0.15
"""Share of a decay's gain in training, as a standard deviation, that its gain in validation may differ by."""


def fit_path(path: Checkpoints, scale: Scale, samples: int) -> tuple[Fit, ...]:
    """The law fitted to the main path's validation losses, and `samples` times to others that might have been."""
    data = gather([path], scale)
    rng = np.random.default_rng(0)
    fits = [fit_law(data)]
    for _ in range(samples):
        logs = data.logs + rng.normal(0, JITTER, len(data.logs))
        other = replace(data, logs=logs, expectation=data.expectation.drawn(rng))
        fits.append(fit_law(other, [fits[0].start]))
    return tuple(fits)


def _losses(fits: Sequence[Fit], read: Drops, version: int = 0) -> F64:
    """The losses of every fit, [fits], on a version's text; on the validation text, but for its level, without one."""
    return np.array([fit.losses_of(read, np.array([version]))[0] for fit in fits])


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
    `path`: the law of the main path's validation losses, for each of `fits`; empty where too few checkpoints were
    evaluated. With it a branch ends at the main path's validation loss minus `share` of what the decay gains in
    training. Without it the branch ends at its training loss. What the evaluated branches lie above that is added,
    see `offsets`.
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

    def ends_at(self, read: Drops, index: int) -> F64:
        """The final loss (nats a token) of a branch of version `index` by every fit, [1 + samples].

        Of validation where that is known of a branch; else of training, on the version's own text.
        """
        if self.evaluated:
            return self._bare(read, index) + self.offsets[self.nearest(index)]
        return _losses(self.fits, read, index)

    def ends_of(self, curve: Curve) -> F64:
        """The final loss of a branch by every fit, [1 + samples], as `ends_at`."""
        return self.ends_at(curve.end(self.fit.scale), curve.version)

    @cached_property
    def offsets(self) -> dict[int, F64]:
        """By version with evaluated branches: how much (nats) they lie above what is made of every fit, [1 + samples].

        The training loss falls faster than validation, so each version's own branches tell.
        """
        found: dict[int, list[F64]] = {}
        for curve in self.evaluated:
            bare = self._bare(curve.end(self.fit.scale), curve.version)
            found.setdefault(curve.version, []).append((curve.validation or 0.0) - bare)
        return {version: np.mean(offsets, axis=0) for version, offsets in found.items()}

    @cached_property
    def share(self) -> F64:
        """The share of a decay's gain in training that it gains in validation by every fit, [1 + samples].

        Between what the evaluated branches tell, in the mean, and 1, which is as sure as `GAIN_SPREAD` says. A branch
        is as sure as the main path is known at its end (`OFF`, and what its samples differ by), and all together are
        no surer than the surest: the main path is the same. A decay that gains nothing tells nothing.
        """
        shares, weights = [], []
        for curve in self.evaluated:
            level, trained = self._main_ends[curve.version]
            gain = np.maximum(trained - _losses(self.fits, curve.end(self.fit.scale)), 1e-6 * level)
            shares.append((level - (curve.validation or 0.0)) / gain)
            weights.append(gain**2 / ((OFF * level) ** 2 + np.var(level)))
        measured, sure = np.average(shares, axis=0, weights=weights), np.max(weights, axis=0)
        return (sure * measured + GAIN_SPREAD**-2) / (sure + GAIN_SPREAD**-2)

    def _bare(self, read: Drops, index: int) -> F64:
        """The validation losses of `ends_at` before the evaluated branches have told the level."""
        ends = _losses(self.fits, read)
        if not self.path:
            return ends
        level, trained = self._main_ends[index]
        return level - self.share * (trained - ends)

    @cached_property
    def _main_ends(self) -> list[tuple[F64, F64]]:
        """Validation and training loss by every fit of the main path at each version's end, reached or not."""
        main, scale = self.data.sources[0], self.fit.scale
        more = np.full(max(0, int(main.ends[-1]) - len(main.rates)), scale.max_lr)
        rates = np.concatenate([main.rates, more])
        reads = [read_drops(rates, np.array([last]), scale) for last in main.ends]
        return [(_losses(self.path, read), _losses(self.fits, read)) for read in reads]

    def nearest(self, index: int) -> int:
        """The version nearest to `index`, the later of two, that something tells the level of the losses of."""
        known = set(self.offsets or self.data.versions.tolist())
        return min(known, key=lambda version: (abs(version - index), -version))

    @cached_property
    def drift(self) -> float:
        """`DRIFT`, or what validation has drifted by between evaluated versions where that is more."""
        losses = [curve.validation for curve in self.evaluated if curve.validation]
        drifts = [
            abs(float(self.offsets[one][0] - self.offsets[other][0])) / self._doublings(one, other)
            for one, other in pairwise(sorted(self.offsets))
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
    fit, data = model.fit, model.data
    lowered = gains(fit.parameters, data.read) / fit.losses_of(data.read, data.versions)
    if float(lowered.max()) < SMALLEST_GAIN:
        raise UserError(
            "in the losses logged so far a decay lowers nothing, so the fit cannot tell alphas apart. Look at the "
            "branches (`lrpath report`), and train a longer one."
        )
