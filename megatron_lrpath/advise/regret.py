"""Regret: the measured perplexity of the predicted choice over the best measured at the same cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_lrpath.advise.predict import judged_versions
from megatron_lrpath.paradigms import BRANCH, OURS
from megatron_lrpath.plan import Plan


@dataclass(frozen=True)
class Tried:
    """A measured branch: its cost in steps, and its predicted and measured loss in nats per token."""

    name: str
    steps: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class Regret:
    """The branches chosen by their predictions and the best ones by their measurements, at a relative cost up
    to `cost`.

    There is one branch for each compared version that has a measured branch. Losses are means over them.
    """

    cost: float
    chosen: tuple[Tried, ...]
    best: tuple[Tried, ...]

    @property
    def value(self) -> float:
        """The measured perplexity of the choice over that of the best, minus 1."""
        return float(np.expm1(mean_measured(self.chosen) - mean_measured(self.best)))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable data."""
        return {
            "regret": self.value,
            "relative_cost": self.cost,
            "chosen": [one.name for one in self.chosen],
            "best": [one.name for one in self.best],
        }


def mean_measured(taken: Sequence[Tried]) -> float:
    """Return the mean of the measured losses."""
    return float(np.mean([one.measured for one in taken]))


def branch_steps(plan: Plan, others: Sequence[Plan]) -> dict[str, tuple[int, int]]:
    """Return the version (from 0) and steps of every branch, by the name of its curve (see `all_curves`)."""
    named = [("", plan), *((f"{other.name}/", other) for other in others)]
    return {
        prefix + run.name: (run.version_index - 1, run.steps)
        for prefix, one in named
        for run in one.runs(OURS.name)
        if run.kind == BRANCH.name
    }


def plan_regret(plan: Plan, tried: dict[int, list[Tried]], cost: float) -> Regret | None:
    """Return the regret at a relative cost for a plan whose versions (from 0) have these measured branches.

    Versions that are not compared or have no measured branch cost what the plan gives them. The last
    version's branch costs nothing, because the main path ends at its branch point. Return None if nothing
    is measured, if no version has two branches to choose from, or if even the shortest branches cost more.
    """
    line, last = plan.timeline, len(plan.versions) - 1
    measured = [index for index in judged_versions(plan) if tried.get(index)]
    if all(len(tried[index]) < 2 for index in measured):
        return None
    fixed = sum(steps for index, steps in enumerate(line.branch_steps[:last]) if index not in measured)
    columns = [
        [Tried(one.name, 0, one.predicted, one.measured) if index == last else one for one in tried[index]]
        for index in measured
    ]
    taken = regret(columns, int(cost * sum(line.scratch_ends) + 1e-6) - line.ends[-1] - fixed)
    return Regret(cost, *taken) if taken else None


def regret(
    columns: Sequence[Sequence[Tried]], limit: int
) -> tuple[tuple[Tried, ...], tuple[Tried, ...]] | None:
    """Select one entry of each column within `limit` steps: by the lowest predicted sum, and by the lowest
    measured sum.
    """
    chosen = lowest(columns, limit, lambda one: one.predicted)
    best = lowest(columns, limit, lambda one: one.measured)
    return None if chosen is None or best is None else (chosen, best)


def lowest(
    columns: Sequence[Sequence[Tried]], limit: int, loss: Callable[[Tried], float]
) -> tuple[Tried, ...] | None:
    """Select one entry of each column within `limit` steps with the lowest sum of losses; None if there is
    none.
    """
    sums: list[tuple[int, float, tuple[Tried, ...]]] = [(0, 0.0, ())]
    for column in columns:
        longer = [
            (steps + one.steps, total + loss(one), (*taken, one))
            for steps, total, taken in sums
            for one in column
            if steps + one.steps <= limit
        ]
        sums = list(_unbeaten(sorted(longer, key=lambda entry: entry[:2])))
    return min(sums, key=lambda entry: entry[1])[2] if sums else None


def _unbeaten(
    ordered: Sequence[tuple[int, float, tuple[Tried, ...]]],
) -> Iterator[tuple[int, float, tuple[Tried, ...]]]:
    """Drop the sums, by ascending steps, that do not lower the loss."""
    least = np.inf
    for entry in ordered:
        if entry[1] < least:
            least = entry[1]
            yield entry
