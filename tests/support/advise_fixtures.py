"""Made-up run trees whose losses follow a known law, for the tests of the advice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_lrpath.advise.curves import F64, rates_of, read_drops
from megatron_lrpath.advise.fit import loss_and_slopes
from megatron_lrpath.advise.read import main_rates, scale_of
from megatron_lrpath.plan import Plan, Run
from tests.support.plan_text import plan_with, versions

LEVELS = (0.0, 0.02, -0.03, 0.04)
TRUTH = np.array([np.log(2.6), np.log(0.6), np.log(0.5), np.log(0.2), 3.0, -0.8, 0.4, 0.15])
"""Parameters of the law in the units of `small_plan`, as far from the expected ones as a model's may be."""


def small_plan(
    folder: Path, steps: int = 400, alpha: float = 0.6, name: str = "small", count: int = 4
) -> Plan:
    """Return a plan of `count` versions with its output in `folder`."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    return plan_with(
        place, name=name, alpha=alpha, versions=versions(count, steps), output=str(folder / f"runs-{name}")
    )


def full_rates(plan: Plan, run: Run) -> F64:
    """Return the rate of every step from the first to the run's last."""
    begin = main_rates(plan, run.first_step)
    return np.concatenate([begin, rates_of(run.path, run.first_step, run.last_step)])


def true_losses(plan: Plan, run: Run, parameters: F64 = TRUTH) -> F64:
    """Return the losses of the run's own steps by the law, plus a level for each version."""
    steps = np.arange(run.first_step + 1, run.last_step + 1)
    read = read_drops(full_rates(plan, run), np.maximum(steps, 2), scale_of(plan))  # step 1 has the rate 0
    levels = np.resize(LEVELS, len(plan.versions))
    return loss_and_slopes(parameters, read)[0] + levels[np.searchsorted(plan.timeline.ends, steps)]


def write_losses(
    plan: Plan, parameters: F64 = TRUTH, noise: float = 0.005, shared: float = 0.02, seed: int = 0
) -> None:
    """Write histories of the main path and every branch; `shared` is the noise of the common batches."""
    rng = np.random.default_rng(seed)
    batches = rng.normal(0, shared, plan.timeline.ends[-1] + 1)
    for run in plan.runs("ours"):
        steps = np.arange(run.first_step + 1, run.last_step + 1)
        noisy = np.exp(batches[steps] + rng.normal(0, noise, len(steps)))
        write_history(plan, run, true_losses(plan, run, parameters) * noisy)


def write_history(plan: Plan, run: Run, losses: F64) -> None:
    """Write a run's history with these losses, from its first step on."""
    rates = full_rates(plan, run)
    folder = plan.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": step, "lr": float(rates[step - 1]), "loss": float(loss)}
        for step, loss in enumerate(losses, start=run.first_step + 1)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
