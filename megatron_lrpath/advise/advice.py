"""Build the advice for a plan: the fit, the predictions, the choice, and the check against measured branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megatron_lrpath.advise.by_version import Allocation, allocate
from megatron_lrpath.advise.curves import Curve, read_drops
from megatron_lrpath.advise.fit import NAME, PARAMETERS, losses_of
from megatron_lrpath.advise.model import Model, build_model
from megatron_lrpath.advise.predict import (
    ALPHAS,
    DECAYS,
    Candidate,
    Decay,
    interval,
    judged_versions,
    own_decay,
    predict,
)
from megatron_lrpath.advise.read import read_curves, scale_of
from megatron_lrpath.advise.regret import Regret, Tried, branch_steps, plan_regret
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import BRANCH, MAIN
from megatron_lrpath.plan import Plan, differences, run_identity
from megatron_lrpath.plan.wording import main_rate_text, step_tokens_text

WITHIN = 0.0075
"""Default tolerance: relative excess perplexity over the best that is accepted."""

DOUBTFUL = 0.025
"""Width of the interval of the chosen gap above which the advice includes a warning."""


@dataclass(frozen=True)
class HeldOut:
    """The predicted and the measured loss of a finished branch that was excluded from the fit.

    Losses are validation losses if both this branch and a fitted branch were evaluated. Otherwise they are
    training losses, averaged over the last steps.
    """

    run: str
    predicted: float
    low: float
    high: float
    measured: float

    @property
    def error(self) -> float:
        """The relative error: predicted over measured, minus 1."""
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool:
        """Return whether the measured loss is in the predicted interval."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True)
class Advice:
    """The result of `lrpath advise`.

    `candidates`: every combination of one alpha for all versions and a decay. `choices`: the candidates
    that can be chosen. `chosen`: the recommended candidate, or None if no candidate meets the target;
    `target` describes the criterion. `allocation`: the recommended alpha for each version, or None if no
    allocation meets the target. `checks`: the held-out branches. `regret`: the excess perplexity of the
    choice among the measured branches; None if no branch is held out.
    """

    plan: Plan
    model: Model
    candidates: tuple[Candidate, ...]
    choices: tuple[Candidate, ...]
    chosen: Candidate | None
    allocation: Allocation | None
    target: str
    checks: tuple[HeldOut, ...]
    regret: Regret | None

    @property
    def own(self) -> list[Candidate]:
        """The candidates with the plan's own decay."""
        return [one for one in self.candidates if one.decay == own_decay(self.plan)]

    @property
    def best(self) -> Candidate:
        """The choice with the lowest predicted loss."""
        return min(self.choices, key=lambda one: one.loss)

    @property
    def doubt(self) -> str | None:
        """A warning if the resampled fits disagree about the alpha chosen for all versions; otherwise None."""
        one = self.chosen
        if one is None or one.gap_high - one.gap_low <= DOUBTFUL:
            return None
        return (
            "The losses so far do not separate the alphas: the 95% interval of the gap of one alpha for all versions "
            f"is {one.gap_low:.1%} to {one.gap_high:.1%}. A branch at another alpha, or of another version, would "
            "narrow it most."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the advice as JSON-serializable data."""
        fit = self.model.fit
        return {
            "plan": self.plan.name,
            "law": {
                "name": NAME,
                "parameters": dict(zip(PARAMETERS, fit.parameters.tolist(), strict=True)),
                "levels": fit.level.tolist(),
            },
            "curves": [curve.name for curve in self.model.data.sources],
            "misfit": self.model.misfit,
            "losses_of": "validation" if self.model.evaluated else "training",
            "main_path_evaluated": bool(self.model.path),
            "end_error": self.model.end_error,
            "held_out": self.model.held_out,
            "judged_versions": [self.plan.versions[index].name for index in judged_versions(self.plan)],
            "candidates": [_candidate(self.plan, one) for one in self.candidates],
            "target": self.target,
            "doubt": self.doubt,
            "chosen": self.allocation.to_dict() if self.allocation else None,
            "one_alpha": _candidate(self.plan, self.chosen) if self.chosen else None,
            "checks": [
                asdict(check) | {"error": check.error, "inside": check.inside} for check in self.checks
            ],
            "regret": self.regret.to_dict() if self.regret else None,
        }


def advise(
    plan: Plan,
    others: Sequence[Plan] = (),
    within: float | None = None,
    budget: float | None = None,
    floors: Sequence[float] = (),
    any_decay: bool = False,
    fit_on: str | None = None,
    limits: Mapping[str, float] | None = None,
    allow_long: bool = False,
) -> Advice:
    """Fit, predict and choose.

    Args:
        plan: the plan to advise on; its own runs are fitted.
        others: plans with further branches off the same main path.
        within: choose the lowest cost whose perplexity exceeds the best by at most this fraction.
        budget: choose the lowest loss whose relative cost is at most this.
        floors: final rates of further decays, as fractions of max_lr, in addition to the plan's own.
        any_decay: choose among all decays, not only the plan's own. Predictions for a shape that was not fitted
            are less precise.
        fit_on: fit only the runs trained by the end of this version; predict the others and compare.
        limits: by version, the maximum excess of its perplexity over its own best, see `allocate`.
        allow_long: allow branches that begin before their version's data, see `allocate`.

    Raises:
        UserError: the losses logged so far support no prediction, or no alpha meets the target.
    """
    if plan.main.path.main is not None:
        raise UserError(
            f"{plan.path}: the main path's rate changes ({main_rate_text(plan)}), and the law does not hold across "
            "maximum rates; lrpath advise takes plans whose main path stays at schedule.max_lr"
        )
    if len(plan.batch_sizes.changes) > 1:
        raise UserError(
            f"{plan.path}: a step has {step_tokens_text(plan)} tokens, and the law counts steps of one size; lrpath "
            "advise takes plans with one global_batch_size"
        )
    curves = all_curves(plan, others)
    used = upto_version(plan, curves, fit_on) if fit_on else curves
    model = build_model(used, scale_of(plan))
    own = own_decay(plan)
    shapes = [Decay(shape, floor) for floor in (own.floor, *floors) for shape in DECAYS]
    decays = dict.fromkeys([own, *shapes])
    alphas = sorted({*ALPHAS, plan.alpha})
    candidates = tuple(predict(plan, model, decays, alphas, lambda decay: any_decay or decay == own))
    choices = tuple(one for one in candidates if one.possible and (any_decay or one.decay == own))
    if not choices:
        raise UserError(
            f"{plan.path}: no alpha from 0.1 to 1 keeps the branches out of the warm-up; lengthen v1"
        )
    chosen, target = choose(choices, within, budget)
    nearness = WITHIN if within is None and budget is None else within
    allocation = allocate(plan, model, ALPHAS, nearness, budget, limits or {}, allow_long)
    names = {curve.name for curve in used}
    checks = tuple(
        held_out_end(curve, model) for curve in curves if curve.name not in names and curve.complete
    )
    taken = allocation or chosen
    missed = (
        regret_of(plan, others, curves, model, taken.cost if budget is None else budget)
        if taken and checks
        else None
    )
    return Advice(plan, model, candidates, choices, chosen, allocation, target, checks, missed)


def regret_of(
    plan: Plan, others: Sequence[Plan], curves: Sequence[Curve], model: Model, cost: float
) -> Regret | None:
    """Return the regret of the finished branches, with any decay, at a relative cost; see `plan_regret`.

    If the fit predicts validation losses, branches that are not evaluated are excluded.
    """
    tried: dict[int, list[Tried]] = {}
    steps = branch_steps(plan, others)
    for curve in curves:
        if curve.name in steps and curve.complete and (curve.validation is not None or not model.evaluated):
            found, (version, length) = held_out_end(curve, model), steps[curve.name]
            tried.setdefault(version, []).append(Tried(curve.name, length, found.predicted, found.measured))
    return plan_regret(plan, tried, cost)


def all_curves(plan: Plan, others: Sequence[Plan]) -> list[Curve]:
    """Return the plan's curves, and the branches of other plans that leave the same main path."""
    curves = read_curves(plan)
    for other in others:
        if len(other.versions) > len(plan.versions):
            raise UserError(
                f"{other.path}: has more versions than {plan.path}. Ask for advice on it, and name the other --with."
            )
        ours, theirs = (run_identity(one, one.main) for one in (plan, other))
        shorter, longer = sorted((ours, theirs), key=lambda identity: len(identity["versions"]))
        found = differences(shorter, longer)
        if found:
            raise UserError(
                f"{other.path}: its main path is not that of {plan.path}: {'; '.join(found)}. Only branches off one "
                "main path can be fitted together."
            )
        branches = [curve for curve in read_curves(other) if curve.kind == BRANCH.name]
        have = {(curve.version, curve.rates.tobytes()) for curve in curves}
        new = [curve for curve in branches if (curve.version, curve.rates.tobytes()) not in have]
        curves += [replace(curve, name=f"{other.name}/{curve.name}") for curve in new]
    return curves


def upto_version(plan: Plan, curves: Sequence[Curve], name: str) -> list[Curve]:
    """Return the curves as they were at the end of version `name`."""
    names = [version.name for version in plan.versions]
    if name not in names:
        raise UserError(f"{plan.path}: no version {name!r}; it has {', '.join(names)}")
    index = names.index(name)
    last = plan.timeline.ends[index]
    begun = [
        curve
        for curve in curves
        if (int(curve.logged[0]) <= last if curve.kind == MAIN.name else curve.version <= index)
    ]
    return [curve.upto(last) if curve.kind == MAIN.name else curve for curve in begun]


def choose(
    candidates: Sequence[Candidate], within: float | None, budget: float | None
) -> tuple[Candidate | None, str]:
    """Return the candidate that meets the targets, and a description of the targets."""
    possible = [one for one in candidates if budget is None or one.cost <= budget + 1e-9]
    limit = "" if budget is None else f"a cost of at most {budget:.3g}"
    if limit and within is None:
        return min(possible, key=lambda one: one.loss, default=None), f"the lowest loss at {limit}"
    within = WITHIN if within is None else within
    target = f"a perplexity within {within:.2%} of the best" + (f", at {limit}" if limit else "")
    near = [one for one in possible if one.gap <= within + 1e-12]
    return min(near, key=lambda one: (one.cost, one.loss), default=None), f"the least cost for {target}"


def held_out_end(curve: Curve, model: Model) -> HeldOut:
    """Compare the predicted and the measured loss of a finished branch."""
    if curve.validation is not None and model.evaluated:
        measured, found = curve.validation, model.ends_of(curve)
    else:
        steps = curve.logged[curve.tail]
        measured = float(curve.losses[curve.tail].mean())
        read = read_drops(curve.rates, steps, model.fit.scale)
        versions = np.searchsorted(curve.ends, steps)
        found = losses_of(model.fits, read, versions).mean(axis=1)
    predicted = interval(model, curve.version, found)
    return HeldOut(curve.name, predicted.loss, predicted.low, predicted.high, measured)


def _candidate(plan: Plan, one: Candidate) -> dict[str, Any]:
    losses = {
        version.name: asdict(prediction) if prediction else None
        for version, prediction in zip(plan.versions, one.versions, strict=True)
    }
    return {
        "alpha": one.alpha,
        "decay": one.decay.shape,
        "min_lr_share": one.decay.floor,
        "relative_cost": one.cost,
        "possible": one.possible,
        "loss": one.loss,
        "gap": one.gap,
        "gap_interval": [one.gap_low, one.gap_high],
        "versions": losses,
    }
