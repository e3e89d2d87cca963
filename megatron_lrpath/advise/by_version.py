"""Choose an alpha for each version: how to spend a budget of steps on the branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_lrpath.advise.curves import F64
from megatron_lrpath.advise.model import Model
from megatron_lrpath.advise.predict import Prediction, ends_at, interval, judged_versions, own_decay
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import BRANCH, OURS
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.spec import Version
from megatron_lrpath.runs.checkpoints import complete_steps, has_begun
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.wording import listing, nearest

FIRST_LIMIT = 0.01
"""Default limit on the excess perplexity of a version that is not judged, relative to its own best."""
LONG_ALPHAS = tuple(round(0.1 * number, 1) for number in range(11, 31))
"""The alphas above 1 that are offered if branches can begin before their version's data."""
RESOLUTION = 2000
"""Steps are compared in units of this part of the total, which bounds the number of sums for any version length."""


@dataclass(frozen=True)
class Option:
    """One alpha for one version: its steps, and its final loss (nats per token) by the fit and by each
    sample.

    `own`: whether it is the plan's alpha.
    """

    alpha: float
    steps: int
    losses: F64
    own: bool = False

    @property
    def loss(self) -> float:
        """The loss predicted by the fit."""
        return float(self.losses[0])


@dataclass(frozen=True)
class Allocation:
    """An alpha for each version of a plan.

    `steps`: the steps of each version's branch. `cost`: the steps of the main path up to the last branch
    point plus those of all branches, relative to pre-training from scratch; the last version's branch adds
    nothing, because the main path ends at its branch point. `loss`: the mean over the judged versions.
    `loss_of_plan`: the same for the plan's own alphas, or None if they are impossible. `kept`: the names
    of the trained versions, whose alphas do not change. `applies`: False if all versions are trained, so
    that the advice is for a new plan of the same versions. `changes`: the alphas that differ from the
    plan's.
    """

    alphas: dict[str, float]
    predictions: dict[str, Prediction]
    steps: dict[str, int]
    cost: float
    loss: float
    loss_of_plan: float | None
    kept: tuple[str, ...]
    applies: bool
    changes: dict[str, float]

    @property
    def due_next(self) -> int:
        """The steps of the last version's branch, which add to the cost when a further version is appended."""
        return [*self.steps.values()][-1]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable data; losses are in nats per token, as [low, middle, high] of the 95%
        interval.
        """
        losses = {name: [one.low, one.loss, one.high] for name, one in self.predictions.items()}
        return {
            "alphas": self.alphas,
            "relative_cost": self.cost,
            "losses": losses,
            "loss": self.loss,
            "loss_of_plan": self.loss_of_plan,
            "steps_due_with_next_version": self.due_next,
            "kept": list(self.kept),
            "applies": self.applies,
            "changes": self.changes,
        }


def allocate(
    plan: Plan,
    model: Model,
    alphas: Sequence[float],
    within: float | None,
    budget: float | None,
    limits: Mapping[str, float],
    allow_long: bool = False,
) -> Allocation | None:
    """Return the alphas with the lowest mean loss within `budget`, or the cheapest ones near the lowest mean loss.

    Both the losses and the steps of the judged versions add up. The function keeps the Pareto-optimal sums version
    by version, which is exact up to a fraction 1/`RESOLUTION` of the steps for each version.

    Args:
        plan: its own decay is predicted.
        model: the fitted law.
        alphas: the alphas to choose from, in addition to the plan's own.
        within: the maximum relative excess perplexity of the judged versions' mean over the lowest.
        budget: the largest relative cost; if `within` is given, too, both must be met.
        limits: by version, the maximum relative excess perplexity over its own best.
        allow_long: offer `LONG_ALPHAS`, too, except for the first version and for branch points before that of the
            version before: when a version is appended, the main path has reached that step and no further.

    Returns:
        The allocation, or None if no alphas meet the targets.

    Raises:
        UserError: a limit names a version that the plan does not have, or a version has no possible alpha.
    """
    check_names(plan, limits)
    trained = trained_versions(plan)
    applies = len(trained) < len(plan.versions)
    kept = trained if applies else ()
    there = complete_steps(RunFolder(plan.folder(plan.main)).checkpoints) if applies else []
    names = [version.name for version in plan.versions]
    columns = []
    for index, name in enumerate(names):
        offered = (*alphas, *LONG_ALPHAS) if allow_long and index else alphas
        found = options(plan, model, index, () if name in kept else offered, there)
        columns.append(near_best(found, limit_of(plan, index, limits)))
    best = best_sum(plan, cheapest_sums(plan, columns), within, budget)
    if best is None:
        return None
    chosen = {name: column[pick] for name, column, pick in zip(names, columns, best[2], strict=True)}
    return Allocation(
        alphas={name: one.alpha for name, one in chosen.items()},
        predictions={
            name: interval(model, index, one.losses) for index, (name, one) in enumerate(chosen.items())
        },
        steps={name: one.steps for name, one in chosen.items()},
        cost=exact_cost(plan, [one.steps for one in chosen.values()]),
        loss=best[1] / len(judged_versions(plan)),
        loss_of_plan=loss_of_plan(plan, model),
        kept=kept,
        applies=applies,
        changes={
            v.name: chosen[v.name].alpha for v in plan.versions if chosen[v.name].alpha != own_alpha(plan, v)
        },
    )


def limit_of(plan: Plan, index: int, limits: Mapping[str, float]) -> float | None:
    """Return the limit on the excess perplexity of version `index` over its own best: the given limit, or
    `FIRST_LIMIT` if the version is not judged.
    """
    return limits.get(plan.versions[index].name, None if index in judged_versions(plan) else FIRST_LIMIT)


def own_alpha(plan: Plan, version: Version) -> float:
    """Return the alpha of a version in the plan."""
    return version.alpha or plan.alpha


def cost_of(plan: Plan, steps: int) -> float:
    """Return the relative cost, given the steps of all branches but the last. The last branch is free: the
    main path is shorter by as many steps.
    """
    return (plan.timeline.ends[-1] + steps) / sum(plan.timeline.scratch_ends)


def exact_cost(plan: Plan, steps: Sequence[int]) -> float:
    """Return the relative cost of the main path up to the last branch point and of branches with these steps."""
    ends = plan.timeline.ends
    last = max(end - own for end, own in zip(ends, steps, strict=True))
    return (last + sum(steps)) / sum(plan.timeline.scratch_ends)


def check_names(plan: Plan, limits: Mapping[str, float]) -> None:
    """Raise UserError if a limit names a version that the plan does not have."""
    names = [version.name for version in plan.versions]
    for name in limits:
        if name not in names:
            raise UserError(
                f"--max-loss {name}=…: {plan.path} has no version {name!r}{nearest(name, names)}; "
                f"it has {listing(names)}"
            )


def trained_versions(plan: Plan) -> tuple[str, ...]:
    """Return the versions whose branch has a checkpoint or a result, so that its alpha is fixed."""
    found = []
    for run in plan.runs(OURS.name):
        folder = RunFolder(plan.folder(run))
        if run.kind == BRANCH.name and (folder.result.exists() or has_begun(folder.checkpoints)):
            found.append(run.version)
    return tuple(found)


def options(
    plan: Plan, model: Model, index: int, alphas: Sequence[float], there: Sequence[int]
) -> list[Option]:
    """Return the alphas that version `index` can have: the plan's own, and those of `alphas` that are
    possible.

    A branch is impossible if it would leave the main path during warm-up, or at a step that the main path
    has passed without keeping a checkpoint. `there`: the steps of the main path's checkpoints.
    """
    version = plan.versions[index]
    own, passed = own_alpha(plan, version), max(there, default=0)
    found = []
    for alpha in sorted({*alphas, own}):
        steps = round(alpha * version.steps)
        point = plan.timeline.ends[index] - steps
        if alphas and point < passed and point not in there:
            continue
        losses = ends_at(plan, model, own_decay(plan), alpha, index)
        if losses is not None:
            found.append(Option(alpha, steps, losses, alpha == own))
    if not found:
        raise UserError(
            f"{plan.path}: no alpha is possible for version {version.name}: its branch would begin in the main path's "
            f"warm-up, or at a step before step {passed} whose checkpoint is not kept"
        )
    return found


def near_best(found: Sequence[Option], limit: float | None) -> list[Option]:
    """Return the options whose perplexity is within `limit` of the best option; all options if there is no
    limit.
    """
    if limit is None:
        return list(found)
    best = min(one.loss for one in found)
    return [one for one in found if one.loss <= best + np.log1p(limit) + 1e-12]


type Sum = tuple[int, float, tuple[int, ...]]
"""Steps of all branches but the last, losses of the judged versions, and the option taken for each version."""


def cheapest_sums(plan: Plan, columns: Sequence[Sequence[Option]]) -> list[Sum]:
    """Return the Pareto-optimal sums over all versions in steps and loss, by ascending steps."""
    judged, last = judged_versions(plan), len(columns) - 1
    part = max(1, sum(plan.timeline.scratch_ends) // RESOLUTION)
    sums: list[Sum] = [(0, 0.0, ())]
    for index, column in enumerate(columns):
        longer = [
            (
                steps + (0 if index == last else one.steps),
                total + (one.loss if index in judged else 0.0),
                (*picks, number),
            )
            for steps, total, picks in sums
            for number, one in enumerate(column)
            if not index or follows(plan, index, one, columns[index - 1][picks[-1]])
        ]
        # The choices depend on the last pick where the next version's branches may begin before its data.
        bound = index < last and any(not one.own and one.alpha > 1 for one in columns[index + 1])
        groups: dict[int, list[Sum]] = {}
        for entry in longer:
            groups.setdefault(entry[2][-1] if bound else 0, []).append(entry)
        sums = [entry for group in groups.values() for entry in unbeaten(group, part)]
    return sums


def follows(plan: Plan, index: int, one: Option, before: Option) -> bool:
    """Return whether the branch of version `index` leaves the main path no earlier than the branch of the
    version before.

    This always holds for branches that begin within their version's data. The plan's own alphas are
    accepted as they are.
    """
    return one.own or one.alpha <= 1 or one.steps <= plan.versions[index].steps + before.steps


def unbeaten(sums: Sequence[Sum], part: int) -> list[Sum]:
    """Return, for each interval of `part` steps, the sum with the lowest loss; drop sums that do not lower
    the loss.
    """
    best: dict[int, Sum] = {}
    for one in sums:
        place = one[0] // part
        if place not in best or (one[1], one[0]) < (best[place][1], best[place][0]):
            best[place] = one
    ordered = [best[place] for place in sorted(best)]
    lowest = np.minimum.accumulate([one[1] for one in ordered])
    return [
        ordered[0],
        *(one for (before, _), one in zip(pairwise(lowest), ordered[1:], strict=True) if one[1] < before),
    ]


def best_sum(plan: Plan, sums: Sequence[Sum], within: float | None, budget: float | None) -> Sum | None:
    """Return the sum that meets the targets: the lowest loss, or with `within` the fewest steps; None if no
    sum does.
    """
    floor = min(total for _, total, _ in sums)
    tolerance = np.inf if within is None else np.log1p(within) * len(judged_versions(plan))
    meeting = [
        one
        for one in sums
        if (budget is None or cost_of(plan, one[0]) <= budget + 1e-9) and one[1] <= floor + tolerance + 1e-12
    ]
    return min(
        meeting, key=lambda one: (one[1], one[0]) if within is None else (one[0], one[1]), default=None
    )


def loss_of_plan(plan: Plan, model: Model) -> float | None:
    """Return the mean loss of the judged versions at the plan's own alphas; None if one of them is
    impossible.
    """
    ends = [
        ends_at(plan, model, own_decay(plan), own_alpha(plan, plan.versions[index]), index)
        for index in judged_versions(plan)
    ]
    losses = [float(end[0]) for end in ends if end is not None]
    return float(np.mean(losses)) if len(losses) == len(ends) else None
