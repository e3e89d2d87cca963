"""Compare the losses of starts of a run from the same checkpoint with other libraries, layouts or devices.

A trial has a separate output below `OUTPUT/compare-starts`: the plan, the checkpoint's files as hard links,
the lineage. The run itself is only read.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_text
from megatron_lrpath.plan import Plan, Run, load_plan
from megatron_lrpath.runs import checkpoints as disk
from megatron_lrpath.runs.archive import fetch_missing
from megatron_lrpath.runs.breaks import new_break, standing
from megatron_lrpath.runs.folder import OutputFolder, RunFolder
from megatron_lrpath.runs.history import read_history
from megatron_lrpath.runs.lineage import read_lineage
from megatron_lrpath.runs.overridden import OverriddenPlan
from megatron_lrpath.sealed import write_sealed

OWN = "run itself"


@dataclass(frozen=True)
class Start:
    """The losses (nats per token) of a start by step, and its entry in the lineage (empty without one)."""

    name: str
    losses: Mapping[int, float]
    entry: Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """Losses of `name` minus those of another start, over `steps` common steps.

    `first` is the difference of the first step, which begins with the same weights and batch; `largest` the
    largest absolute difference; `mean` their mean and `error` its standard error; `equal` the number of steps
    with equal bits.
    """

    name: str
    steps: int
    first: float
    largest: float
    mean: float
    error: float
    equal: int
    environment: tuple[str, ...]


def folder_of(plan: Plan, run: Run, step: int) -> Path:
    """Return the folder of the trials of a run from a step."""
    return OutputFolder(Path(plan.output)).compare_starts / f"{run.name}-{step}"


def prepare(plan: Plan, run: Run, step: int, name: str) -> tuple[Plan, Run]:
    """Make the trial `name` of the run from the checkpoint of `step` again; return its plan and the run in it.

    Raises:
        UserError: the run has no such checkpoint, or the trial is being trained.
    """
    source = RunFolder(plan.folder(run))
    fetch_missing(plan, [(run, step)])
    if not disk.checkpoint_complete(source.checkpoints, step):
        steps = disk.complete_steps(source.checkpoints)
        have = f"it has steps {', '.join(map(str, steps))}" if steps else "it has no complete checkpoint"
        raise UserError(f"--step {step}: {source.checkpoints} has no checkpoint of this step; {have}")
    if (lineage := read_lineage(source.path)) is None:
        raise UserError(f"{source.path}: has no lineage; train it with this package first")
    trial = folder_of(plan, run, step) / name
    if trial.exists():
        shutil.rmtree(trial)
    made = OverriddenPlan.of(plan.path, (), str(trial.absolute()))
    copy = made.plan
    target = RunFolder(copy.folder(run))
    linked = disk.checkpoint_folder(target.checkpoints, step)
    linked.mkdir(parents=True)
    for file in disk.checkpoint_folder(source.checkpoints, step).iterdir():
        os.link(file, linked / file.name)
    write_sealed(target.lineage, lineage | {"starts": standing_at(lineage, step), "rewinds": []})
    atomic_write_text(made.path, made.content.decode())
    loaded = load_plan(made.path)
    return loaded, loaded.run(run.paradigm, run.name)


def standing_at(lineage: Mapping[str, Any], step: int) -> list[Mapping[str, Any]]:
    """Return the starts that trained the remaining steps up to `step`."""
    return [start for start in standing(lineage["starts"]) if start["step"] < step or not step]


def remove_checkpoints(plan: Plan, run: Run) -> None:
    """Remove the trial's checkpoints, which no run continues from."""
    shutil.rmtree(RunFolder(plan.folder(run)).checkpoints, ignore_errors=True)


def starts_of(plan: Plan, run: Run, step: int, last: int | None = None) -> list[Start]:
    """Return the run and its trials from `step`, oldest first, with the losses after it up to `last`."""
    places = [(OWN, plan.folder(run))]
    trials = folder_of(plan, run, step)
    found = sorted(trials.iterdir(), key=lambda path: path.stat().st_mtime) if trials.is_dir() else []
    places += [(trial.name, trial / run.paradigm / run.name) for trial in found]
    starts = []
    for name, folder in places:
        history, lineage = read_history(folder), read_lineage(folder) or {"starts": []}
        losses = {
            int(one): float(loss)
            for one, loss in zip(history.steps, history["loss"], strict=True)
            if one > step and (last is None or one <= last) and math.isfinite(loss)
        }
        before = [start for start in standing(lineage["starts"]) if start["step"] <= step]
        if losses:
            starts.append(Start(name, losses, before[-1] if before else {}))
    return starts


def differences(starts: list[Start]) -> list[Difference]:
    """Return the difference of each start from the first one, over their common steps."""
    return [found for other in starts[1:] if (found := difference(starts[0], other)) is not None]


def difference(first: Start, other: Start) -> Difference | None:
    """Return the difference of one start from the first one; None without common steps."""
    steps = sorted(first.losses.keys() & other.losses.keys())
    if not steps:
        return None
    deltas = [other.losses[step] - first.losses[step] for step in steps]
    mean = math.fsum(deltas) / len(deltas)
    spread = math.fsum((one - mean) ** 2 for one in deltas) / max(1, len(deltas) - 1)
    return Difference(
        name=other.name,
        steps=len(steps),
        first=deltas[0],
        largest=max(map(abs, deltas)),
        mean=mean,
        error=math.sqrt(spread / len(deltas)),
        equal=sum(one == 0 for one in deltas),
        environment=tuple(new_break([{**first.entry, "step": 0}], {**other.entry, "step": 1})),
    )
