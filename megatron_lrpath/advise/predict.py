"""Predict each version's final loss and the total cost, for every alpha and every decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_lrpath.advise.curves import F64, rates_of, read_drops
from megatron_lrpath.advise.model import GAIN_SPREAD, Model
from megatron_lrpath.advise.read import main_rates
from megatron_lrpath.plan import Plan
from megatron_lrpath.schedule import STYLES, LRPath, Schedule
from megatron_lrpath.schedule.styles import with_branch_shape

ALPHAS = tuple(round(0.05 * number, 2) for number in range(2, 21))
DECAYS = ("cosine", "linear", "minus-sqrt", "exponential")
"""Shapes predicted in addition to the plan's own: a law fitted to one of them predicts the others. Multi-step is
excluded: the law underestimates the loss of its long stages at a low rate by over a percent (`docs/advise.md`)."""
POSITIONS = 1000
"""Number of positions at which a decay's rates are read; longer decays are interpolated linearly."""
CONFIDENT = 1.96


@dataclass(frozen=True)
class Decay:
    """The decay of a branch: its shape and its final rate, as a fraction of max_lr."""

    shape: str
    floor: float

    def schedule(self, plan: Plan) -> Schedule:
        """Return the plan's schedule with this decay."""
        schedule = with_branch_shape(plan.schedule, self.shape)
        return replace(schedule, min_lr=self.floor * schedule.max_lr)


@dataclass(frozen=True)
class Prediction:
    """The predicted final loss (nats per token) of a version's branch, see `Model.ends_at`, with its 95%
    interval.
    """

    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Candidate:
    """One alpha for all versions with one decay.

    `versions`: a prediction for each, or None if its branch would leave the main path during warm-up.
    `cost`: the steps of all runs relative to pre-training from scratch. `gap`: the relative excess of the
    perplexity (of the mean loss of the judged versions) over that of the best candidate that can be
    chosen; its interval is that of the resampled fits, see `GAIN_SPREAD`.
    """

    alpha: float
    decay: Decay
    cost: float
    versions: tuple[Prediction | None, ...]
    loss: float
    gap: float = 0.0
    gap_low: float = 0.0
    gap_high: float = 0.0

    @property
    def possible(self) -> bool:
        """Return whether a plan with this alpha is valid for every version."""
        return None not in self.versions


def own_decay(plan: Plan) -> Decay:
    """Return the decay of the plan's branches."""
    schedule = plan.schedule
    shape = STYLES[schedule.style].branch_shape(schedule)
    return Decay(shape.name, schedule.min_lr / schedule.max_lr)


def judged_versions(plan: Plan) -> list[int]:
    """Return the versions (from 0) that alpha is judged by: all but the first, as in the paper's tables."""
    return list(range(1, len(plan.versions))) or [0]


def relative_cost(plan: Plan, alpha: float) -> float:
    """Return the steps of the main path and all branches at this alpha, relative to pre-training from
    scratch.
    """
    branches = [round(alpha * version.steps) for version in plan.versions]
    ends = plan.timeline.ends
    return (ends[-1] - branches[-1] + sum(branches)) / sum(plan.timeline.scratch_ends)


def predict(
    plan: Plan,
    model: Model,
    decays: Iterable[Decay],
    alphas: Sequence[float],
    eligible: Callable[[Decay], bool],
) -> list[Candidate]:
    """Predict every alpha with every decay, and compare each with the best candidate whose decay is eligible."""
    made, draws = [], []
    for decay in decays:
        for alpha in alphas:
            ends = [ends_at(plan, model, decay, alpha, index) for index in range(len(plan.versions))]
            judged = [ends[index] for index in judged_versions(plan)]
            if any(end is None for end in judged):
                continue
            versions = tuple(
                None if end is None else interval(model, index, end) for index, end in enumerate(ends)
            )
            mean = np.mean([end for end in judged if end is not None], axis=0)
            made.append(Candidate(alpha, decay, relative_cost(plan, alpha), versions, float(mean[0])))
            draws.append(mean)
    rows = np.flatnonzero([one.possible and eligible(one.decay) for one in made])
    if not len(rows):
        return []
    losses = np.array(draws)
    gaps = np.expm1(losses - losses[rows[int(np.argmin(losses[rows, 0]))]])
    low, high = gap_intervals(model, gaps)
    return [
        replace(one, gap=float(gap), gap_low=float(least), gap_high=float(most))
        for one, gap, least, most in zip(made, gaps[:, 0], low, high, strict=True)
    ]


def gap_intervals(model: Model, gaps: F64) -> tuple[F64, F64]:
    """Return the 95% intervals of gaps [n, 1 + samples]: quantiles of the samples, widened by `GAIN_SPREAD`."""
    middle, samples = gaps[:, 0], gaps[:, 1:]
    low, high = np.quantile(samples, (0.025, 0.975), axis=1) if samples.size else (middle, middle)
    own = CONFIDENT * (GAIN_SPREAD if model.evaluated else 0.0) * middle
    return middle - np.hypot(middle - low, own), middle + np.hypot(high - middle, own)


def ends_at(plan: Plan, model: Model, decay: Decay, alpha: float, index: int) -> F64 | None:
    """Return the version's final loss by the fit and each sample, shape [1 + samples]; None if the branch is
    impossible.
    """
    steps, last = round(alpha * plan.versions[index].steps), plan.timeline.ends[index]
    point = last - steps
    if steps < 1 or point < max(1, plan.schedule.warmup):
        return None
    rates = np.concatenate([main_rates(plan, point), _branch(decay.schedule(plan), steps)])
    read = read_drops(rates, np.array([last]), model.fit.scale)
    return model.ends_at(read, index)


@lru_cache(maxsize=256)
def _branch(schedule: Schedule, steps: int) -> F64:
    """Return the rates of a branch of this many steps; they do not depend on the branch point."""
    return rates_of(LRPath(schedule, "branch", 0, steps), 0, steps, POSITIONS)


def interval(model: Model, index: int, losses: F64) -> Prediction:
    """Return the fit's loss with the quantiles of the samples, widened by the law's own error and by the
    drift.
    """
    loss = float(losses[0])
    low, high = np.quantile(losses[1:], (0.025, 0.975)) if len(losses) > 1 else (loss, loss)
    own = CONFIDENT * loss * np.hypot(model.end_error, model.unknown(index))
    below, above = np.hypot(max(loss - low, 0.0), own), np.hypot(max(high - loss, 0.0), own)
    return Prediction(loss, loss - float(below), loss + float(above))
