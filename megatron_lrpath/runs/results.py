"""Which runs make a model, what they reached, and their evaluations: `result.json`, `eval.json`, `evals.json`."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.runs.checkpoints import CHECKPOINTS, complete_steps

EVALUATION = "eval.json"
RESULT = "result.json"


@dataclass(frozen=True)
class Target:
    """A checkpoint to evaluate: the run's last, or along the main path that of step `at`."""

    run: Run
    at: int | None = None

    @property
    def step(self) -> int:
        """The checkpoint's."""
        return self.run.last_step if self.at is None else self.at

    @property
    def name(self) -> str:
        """`paradigm/run`, or `paradigm/run@step`."""
        name = f"{self.run.paradigm}/{self.run.name}"
        return name if self.at is None else f"{name}@{self.at}"

    @classmethod
    def named(cls, plan: Plan, name: str) -> Target:
        """The one of that name."""
        paradigm, _, rest = name.partition("/")
        run, _, step = rest.partition("@")
        return cls(plan.run(paradigm, run), int(step) if step else None)


def version_runs(plan: Plan, paradigms: Iterable[str]) -> list[Run]:
    """The runs whose end is a version's model (all but the main path), each training once."""
    runs: dict[Path, Run] = {}
    for paradigm in paradigms:
        for run in plan.runs(paradigm):
            if run.makes_version:
                carried_out = plan.run(*run.same_as) if run.same_as else run
                runs.setdefault(plan.folder(carried_out), carried_out)
    return list(runs.values())


def model_runs(plan: Plan, paradigms: Iterable[str]) -> list[Run]:
    """The runs that end with a model to use: `version_runs`, then their fine-tunings, each training once."""
    names = list(paradigms)
    runs = {plan.folder(run): run for run in version_runs(plan, names)}
    for paradigm in names:
        for run in plan.sft_runs(paradigm):
            carried_out = plan.run(*run.same_as) if run.same_as else run
            runs.setdefault(plan.folder(carried_out), carried_out)
    return list(runs.values())


def is_trained(plan: Plan, run: Run) -> bool:
    """Whether the run has reached its end."""
    result = read_json(plan.folder(run) / RESULT)
    return result is not None and result.get("step") == run.last_step


def needs_evaluation(plan: Plan, run: Run) -> bool:
    """Whether the run is trained and its evaluation is missing or of an earlier training."""
    folder = plan.folder(run)
    evaluation = read_json(folder / EVALUATION)
    if evaluation is None or evaluation.get("step") != run.last_step:
        return is_trained(plan, run)
    fresh = (folder / EVALUATION).stat().st_mtime >= (folder / RESULT).stat().st_mtime
    return is_trained(plan, run) and not fresh


def loss_of(evaluation: Any) -> float | None:
    """The loss (nats a token) that an evaluation says, None where it says none that is of use."""
    loss = evaluation.get("loss") if isinstance(evaluation, dict) else None
    return loss if isinstance(loss, float) and 0 < loss < math.inf else None


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none or it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


ALONG = "evals.json"
"""By step what `EVALUATION` says of a version."""
LONGEST = 18
"""Digits of a step."""


def along(folder: Path | str) -> dict[int, dict[str, Any]]:
    """The evaluations of the main path in `folder` that say a loss, by step, ascending."""
    found = read_json(Path(folder) / ALONG) or {}
    steps = [step for step in found if step.isdecimal() and len(step) <= LONGEST and loss_of(found[step])]
    return {int(step): found[step] for step in sorted(steps, key=int)}


def add_along(folder: Path | str, evaluation: dict[str, Any]) -> None:
    """Note one of the step that it says; calls side by side lose nothing of each other's."""
    path = Path(folder) / ALONG
    with path.with_name(f".{ALONG}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        atomic_write_json(path, along(folder) | {evaluation["step"]: evaluation})


def main_path_targets(plan: Plan, validation: str, again: bool = False) -> list[Target]:
    """The main path's complete checkpoints that have not been evaluated on the slice of this fingerprint, or all.

    Raises:
        UserError: it has no checkpoint, or what is known of them cannot be read.
    """
    run = plan.main
    folder = Path(plan.folder(run))
    steps = complete_steps(folder / CHECKPOINTS)
    if not steps:
        raise UserError(
            f"{folder / CHECKPOINTS}: the main path has no checkpoint yet; train it first "
            "(lrpath run PLAN --paradigm ours --run main)."
        )
    if (folder / ALONG).exists() and read_json(folder / ALONG) is None:
        raise UserError(f"{folder / ALONG}: cannot be read; restore it, or remove it and evaluate again.")
    known = {} if again else along(folder)
    return [Target(run, step) for step in steps if known.get(step, {}).get("validation") != validation]
