"""What each version would end at and what all would cost, for every alpha and every decay."""

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
"""Shapes that are predicted beside the plan's own: fitted to one of them, the law knows the others. It does not know
multi-step's long stretches at a low rate, and makes their loss too good by over a percent (`docs/advise.md`)."""
POSITIONS = 1000
"""Places that a decay's rates are read at; longer ones are drawn straight in between."""
CONFIDENT = 1.96


@dataclass(frozen=True)
class Decay:
    """How a branch decays: its shape and where it ends, as a share of max_lr."""

    shape: str
    floor: float

    def schedule(self, plan: Plan) -> Schedule:
        """The plan's schedule with this decay."""
        schedule = with_branch_shape(plan.schedule, self.shape)
        return replace(schedule, min_lr=self.floor * schedule.max_lr)


@dataclass(frozen=True)
class Prediction:
    """The loss (nats a token) that one version's branch ends at, see `Model.ends_at`, with its 95% interval."""

    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Candidate:
    """One alpha for all versions with one decay.

    `versions`: a prediction for each, None where its branch would leave the main path in its warm-up. `cost`:
    steps of all runs over those of pre-training from scratch. `gap`: how far the perplexity (of the mean loss of the
    judged versions) lies above that of the best that may be chosen, relative; its interval is that of the resampled
    fits, see `GAIN_SPREAD`.
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
        """Whether a plan with this alpha is sound for every version."""
        return None not in self.versions


def own_decay(plan: Plan) -> Decay:
    """How the plan's branches decay."""
    schedule = plan.schedule
    shape = STYLES[schedule.style].branch_shape(schedule)
    return Decay(shape.name, schedule.min_lr / schedule.max_lr)


def judged_versions(plan: Plan) -> list[int]:
    """The versions (from 0) that alpha is judged by: all but the first, as in the paper's tables."""
    return list(range(1, len(plan.versions))) or [0]


def relative_cost(plan: Plan, alpha: float) -> float:
    """Steps of the main path and all branches at this alpha over those of pre-training from scratch."""
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
    """Every alpha with every decay, compared with the best of those whose decay is eligible."""
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
    """The 95% intervals of gaps [n, 1 + samples]: the samples' quantiles, widened by what `GAIN_SPREAD` says."""
    middle, samples = gaps[:, 0], gaps[:, 1:]
    low, high = np.quantile(samples, (0.025, 0.975), axis=1) if samples.size else (middle, middle)
    own = CONFIDENT * (GAIN_SPREAD if model.evaluated else 0.0) * middle
    return middle - np.hypot(middle - low, own), middle + np.hypot(high - middle, own)


def ends_at(plan: Plan, model: Model, decay: Decay, alpha: float, index: int) -> F64 | None:
    """The version's final loss by the fit and by each sample, shape [1 + samples]; None where impossible."""
    steps, last = round(alpha * plan.versions[index].steps), plan.timeline.ends[index]
    point = last - steps
    if steps < 1 or point < max(1, plan.schedule.warmup):
        return None
    rates = np.concatenate([main_rates(plan, point), _branch(decay.schedule(plan), steps)])
    read = read_drops(rates, np.array([last]), model.fit.scale)
    return model.ends_at(read, index)


@lru_cache(maxsize=256)
def _branch(schedule: Schedule, steps: int) -> F64:
    """The rates of a branch of so many steps; where it leaves the main path does not matter."""
    return rates_of(LRPath(schedule, "branch", 0, steps), 0, steps, POSITIONS)


def interval(model: Model, index: int, losses: F64) -> Prediction:
    """The fit's loss between the quantiles of the samples, widened by the law's own error and what it cannot know."""
    loss = float(losses[0])
    low, high = np.quantile(losses[1:], (0.025, 0.975)) if len(losses) > 1 else (loss, loss)
    own = CONFIDENT * loss * np.hypot(model.end_error, model.unknown(index))
    below, above = np.hypot(max(loss - low, 0.0), own), np.hypot(max(high - loss, 0.0), own)
    return Prediction(loss, loss - float(below), loss + float(above))
