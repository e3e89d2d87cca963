"""The loss curves that a plan's runs have left behind, thinned to points that a law can be fitted to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_lrpath.advise.areas import F64, I64, Scale, rates_of
from megatron_lrpath.errors import UserError
from megatron_lrpath.evaluate.targets import EVALUATION, read_json
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.report.history import read_history

POINTS = 60
"""Points that a version's steps become at most, on each curve."""
SHORTEST = 4
"""Steps that a point is the mean of at least: a single batch's loss says little."""
SKIPPED = 0.1
"""Share of the first version that is left out at the beginning (or the warm-up twice): there no law holds."""
DECAYED = 0.5
"""A branch tells what a decay does once its rate is down to this share of the maximum."""
FEWEST = 3 * SHORTEST
"""Steps of its own that a curve needs to be read at all."""


@dataclass(frozen=True)
class Points:
    """Of shape [n] each: middle step, ln of the mean loss, its deviation from noise alone, version (from 0)."""

    steps: I64
    logs: F64
    deviations: F64
    versions: I64


@dataclass(frozen=True)
class Curve:
    """One training as if it had been one from the first step on, with the losses of the run itself.

    `rates` [last step]: the rate of every step, ancestors' first. `logged`, `losses` [rows]: the run's own
    steps and their losses (nats a token), ascending, finite. `ends` [versions]: each version's last step.
    `validation`: the loss on the validation set at the run's end (nats a token), None where it was not evaluated.
    `main`: of a branch, the main path where it has logged the same steps, so on the same batches. Then the curve is
    read as its losses over the main path's: a batch that is hard for one model is hard for the other.
    """

    name: str
    kind: str
    version: int
    rates: F64
    logged: I64
    losses: F64
    ends: I64
    validation: float | None = None
    main: Curve | None = None

    @cached_property
    def baseline(self) -> F64:
        """What the losses are read over [rows]: the main path's in the same steps, or 1."""
        if self.main is None:
            return np.ones(len(self.losses))
        return self.main.losses[np.searchsorted(self.main.logged, self.logged)]

    @cached_property
    def points(self) -> Points:
        """Means over stretches of steps, none of them over two versions; relative to the main path's, see `main`."""
        versions = np.searchsorted(self.ends, self.logged)
        groups = []
        for version in np.unique(versions):
            rows = np.flatnonzero(versions == version)
            groups += np.array_split(rows, max(1, min(POINTS, len(rows) // SHORTEST)))
        return Points(
            steps=np.array([self.logged[rows[len(rows) // 2]] for rows in groups], dtype=np.int64),
            logs=np.log([self.losses[rows].mean() / self.baseline[rows].mean() for rows in groups]),
            deviations=self.noise / np.sqrt([len(rows) for rows in groups]),
            versions=np.array([versions[rows[0]] for rows in groups], dtype=np.int64),
        )

    @cached_property
    def noise(self) -> float:
        """The deviation of one step's ln loss (see `main`), from what neighbouring steps differ by."""
        return float(np.std(np.diff(np.log(self.losses / self.baseline))) / np.sqrt(2))

    @property
    def decays(self) -> bool:
        """Whether the logged part holds a decay that went far enough to tell anything."""
        return bool(self.rates[int(self.logged[-1]) - 1] <= DECAYED * self.rates.max())

    @property
    def complete(self) -> bool:
        """Whether the run is logged to its end."""
        return int(self.logged[-1]) == len(self.rates)

    @property
    def tail(self) -> slice:
        """The rows of the last tenth of the run's steps, at least five: its final loss is their mean."""
        return slice(-max(5, len(self.logged) // 10), None)

    def beside(self, main: Curve) -> Curve:
        """The branch read over the main path, where that has logged all of its steps and leaves less noise."""
        if not np.isin(self.logged, main.logged).all():
            return self
        relative = replace(self, main=main)
        return relative if relative.noise < self.noise else self

    def upto(self, last: int) -> Curve:
        """The curve as it was at step `last`."""
        inside = self.logged <= last
        return replace(self, rates=self.rates[:last], logged=self.logged[inside], losses=self.losses[inside])


def version_ends(plan: Plan) -> I64:
    """The last step of each version."""
    return np.array(plan.timeline.ends, dtype=np.int64)


def scale_of(plan: Plan) -> Scale:
    """The units of a fit to this plan's runs."""
    schedule, first = plan.schedule, plan.timeline.ends[0]
    return Scale(schedule.max_lr, schedule.max_lr * (first - schedule.warmup / 2), schedule.warmup)


def main_rates(plan: Plan, last: int) -> F64:
    """The main path's rate in the steps 1 to `last`, wherever the plan ends it."""
    path = plan.run("ours", "main").path
    rates = np.full(last, plan.schedule.max_lr)
    warm = min(last, path.warmup)
    rates[:warm] = rates_of(path, 0, warm)
    return rates


def read_curves(plan: Plan) -> list[Curve]:
    """The main path and the branches that have been trained, in that order, as far as each has come.

    Raises UserError for runs whose logged rates are not the plan's.
    """
    found = [read_curve(plan, run) for run in plan.runs("ours")]
    return [curve for curve in found if curve is not None]


def read_curve(plan: Plan, run: Run) -> Curve | None:
    """One run's curve; None before it has logged enough steps beyond the beginning."""
    history = read_history(Path(plan.folder(run)) / "history.jsonl")
    losses = history["loss"]
    begin = max(2 * plan.schedule.warmup, round(SKIPPED * plan.timeline.ends[0]), run.first_step)
    usable = np.isfinite(losses) & (losses > 0) & (history.steps > begin)
    _check_losses(plan, run, history.steps, losses)
    if int(usable.sum()) < FEWEST:
        return None
    last = int(history.steps[-1])
    rates = np.concatenate([main_rates(plan, run.first_step), rates_of(run.path, run.first_step, last)])
    if run.kind == "main":
        rates = main_rates(plan, last)
    _check_rates(plan, run, history["lr"], rates[history.steps - 1])
    if run.kind == "branch" and last < run.last_step:
        rates = np.concatenate([rates, rates_of(run.path, last, run.last_step)])
    return Curve(
        name=run.name,
        kind=run.kind,
        version=run.version_index - 1,
        rates=rates,
        logged=history.steps[usable],
        losses=losses[usable],
        ends=version_ends(plan),
        validation=read_validation(plan, run) if last == run.last_step else None,
    )


def read_validation(plan: Plan, run: Run) -> float | None:
    """The validation loss that `lrpath eval` has measured of a run's model; None where it has not, or of no use."""
    found = read_json(plan.folder(run) / EVALUATION) or {}
    loss = found.get("loss")
    if found.get("step") != run.last_step or not isinstance(loss, int | float) or not 0 < loss < np.inf:
        return None
    return float(loss)


def _check_losses(plan: Plan, run: Run, steps: I64, losses: F64) -> None:
    bad = steps[~(np.isfinite(losses) & (losses > 0))]
    if len(bad) > 0.02 * len(steps):
        raise UserError(
            f"{plan.folder(run) / 'history.jsonl'}: {len(bad)} of {len(steps)} steps have no finite loss (the "
            f"first is step {bad[0]}). A law of the loss cannot be fitted to a run that diverged; lower the rate."
        )


def _check_rates(plan: Plan, run: Run, logged: F64, planned: F64) -> None:
    known = np.isfinite(logged)
    off = np.abs(logged - planned)[known] > 1e-3 * plan.schedule.max_lr
    if off.any():
        raise UserError(
            f"{plan.folder(run)}: trained at other learning rates than those of {plan.path}, in {int(off.sum())} "
            f"of {int(known.sum())} logged steps. Use the plan that it was trained with (`lrpath report` compares "
            "them)."
        )
