"""Read the loss curves and evaluations of a plan's runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from megatron_lrpath.advise.curves import F64, SHORTEST, Checkpoints, Curve, Scale, rates_of
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import OURS
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.runs.folder import RunFolder, read_json_object
from megatron_lrpath.runs.history import read_history
from megatron_lrpath.runs.results import loss_of, main_path_evaluations

SKIPPED = 0.1
"""Fraction of the first version excluded at the beginning (or twice the warm-up), where no law holds."""
FEWEST = 3 * SHORTEST
"""Minimum number of a curve's own steps."""


def scale_of(plan: Plan) -> Scale:
    """Return the units of a fit to this plan's runs."""
    schedule, first = plan.schedule, plan.timeline.ends[0]
    return Scale(schedule.max_lr, schedule.max_lr * (first - schedule.warmup / 2), schedule.warmup)


def main_rates(plan: Plan, last: int) -> F64:
    """Return the main path's rate in the steps 1 to `last`, even beyond the end of the plan."""
    path = plan.main.path
    rates = np.full(last, plan.schedule.max_lr)
    warm = min(last, path.warmup)
    rates[:warm] = rates_of(path, 0, warm)
    return rates


def read_curves(plan: Plan) -> list[Curve]:
    """Return the curves of the main path and of the trained branches, in that order, up to their last logged
    step.

    Raise UserError if the logged rates of a run are not the plan's.
    """
    found = [read_curve(plan, run) for run in plan.runs(OURS.name)]
    return [curve for curve in found if curve is not None]


def read_curve(plan: Plan, run: Run) -> Curve | None:
    """Return the curve of one run; None if it has not logged enough steps beyond the excluded beginning."""
    history = read_history(plan.folder(run))
    losses = history["loss"]
    begin = max(beginning(plan), run.first_step)
    usable = np.isfinite(losses) & (losses > 0) & (history.steps > begin)
    bad = history.steps[~(np.isfinite(losses) & (losses > 0))]
    if len(bad) > 0.02 * len(history):
        raise UserError(
            f"{RunFolder(plan.folder(run)).history}: {len(bad)} of {len(history)} steps have no finite loss (the "
            f"first is step {bad[0]}). A law of the loss cannot be fitted to a run that diverged; lower the rate."
        )
    if int(usable.sum()) < FEWEST:
        return None
    last = int(history.steps[-1])
    if run.makes_version:
        own = rates_of(run.path, run.first_step, max(last, run.last_step))
        rates = np.concatenate([main_rates(plan, run.first_step), own])
    else:
        rates = main_rates(plan, last)
    _check_rates(plan, run, history["lr"], rates[history.steps - 1])
    curve = Curve(
        name=run.name,
        kind=run.kind,
        version=run.version_index - 1,
        rates=rates,
        logged=history.steps[usable],
        losses=losses[usable],
        ends=np.array(plan.timeline.ends, dtype=np.int64),
    )
    if not run.makes_version:
        return replace(curve, checkpoints=read_checkpoints(plan, curve))
    found = _evaluation(plan, run)
    measured = last == run.last_step == found.get("step")
    return replace(curve, validation=loss_of(found) if measured else None)


def beginning(plan: Plan) -> int:
    """Return the number of steps excluded at the beginning of every curve, see `SKIPPED`."""
    return max(2 * plan.schedule.warmup, round(SKIPPED * plan.timeline.ends[0]))


def read_checkpoints(plan: Plan, main: Curve) -> Checkpoints | None:
    """Return the main path's evaluated checkpoints (`lrpath eval --main-path`) after the excluded beginning,
    or None.

    Checkpoints that were evaluated on another validation set than the branches are excluded.
    """
    branches = [_evaluation(plan, run) for run in plan.runs(OURS.name)]
    texts = {one["validation"] for one in branches if "validation" in one}
    losses = {
        step: one["loss"]
        for step, one in main_path_evaluations(plan.folder(plan.main)).items()
        if beginning(plan) < step <= len(main.rates)
        and (not texts or one.get("validation") in {None, *texts})
    }
    if not losses:
        return None
    return Checkpoints(
        name=f"{main.name}, evaluated",
        kind=main.kind,
        version=main.version,
        rates=main.rates,
        logged=np.array(list(losses), dtype=np.int64),
        losses=np.array(list(losses.values()), dtype=np.float64),
        ends=main.ends,
    )


def _evaluation(plan: Plan, run: Run) -> dict[str, Any]:
    """Return the evaluation of a run's model; {} if there is none."""
    return read_json_object(RunFolder(plan.folder(run)).evaluation) or {}


def _check_rates(plan: Plan, run: Run, logged: F64, planned: F64) -> None:
    known = np.isfinite(logged)
    off = np.abs(logged - planned)[known] > 1e-3 * plan.schedule.max_lr
    if off.any():
        raise UserError(
            f"{plan.folder(run)}: trained at other learning rates than those of {plan.path}, in {int(off.sum())} "
            f"of {int(known.sum())} logged steps. Use the plan that it was trained with (`lrpath report` compares "
            "them)."
        )
