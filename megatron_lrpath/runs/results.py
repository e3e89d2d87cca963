"""The definitions of runs that produce a model, of complete and of evaluated runs, and the errors about
missing results.
"""

from __future__ import annotations

import fcntl
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import PARADIGMS, Plan, Run
from megatron_lrpath.runs.checkpoints import complete_steps, present_fingerprint
from megatron_lrpath.runs.folder import RunFolder, read_json_object, report_sources
from megatron_lrpath.runs.history import last_loss
from megatron_lrpath.sealed import json_digest, write_sealed


@dataclass(frozen=True)
class Target:
    """A checkpoint to evaluate: the run's last, or for the main path the one of step `at`."""

    run: Run
    at: int | None = None

    @property
    def step(self) -> int:
        """The folder of the checkpoint."""
        return self.run.last_step if self.at is None else self.at

    @property
    def name(self) -> str:
        """`paradigm/run`, or `paradigm/run@step`."""
        return self.run.key if self.at is None else f"{self.run.key}@{self.at}"

    @classmethod
    def named(cls, plan: Plan, name: str) -> Target:
        """Return the target with this name."""
        paradigm, _, rest = name.partition("/")
        run, _, step = rest.partition("@")
        return cls(plan.run(paradigm, run), int(step) if step else None)


def version_runs(plan: Plan, paradigms: Iterable[str]) -> list[Run]:
    """Return the runs whose end is a version's model (all but the main path), each training once."""
    return _each_once(plan, (run for name in paradigms for run in plan.runs(name) if run.makes_version))


def model_runs(plan: Plan, paradigms: Iterable[str]) -> list[Run]:
    """Return the runs that end with a usable model: `version_runs`, then their fine-tunings, each training
    once.
    """
    names = list(paradigms)
    tuned = (run for name in names for run in plan.sft_runs(name))
    return version_runs(plan, names) + _each_once(plan, tuned)


def _each_once(plan: Plan, runs: Iterable[Run]) -> list[Run]:
    """Return the runs that train the models of `runs`, without duplicates."""
    return list({run.carried_out_as: plan.carried_out(run) for run in runs}.values())


def write_result(folder: Path, run: Run, step: int) -> None:
    """Record that the run is complete up to `step`, whose checkpoint is in the folder."""
    result = {
        "run": run.name,
        "paradigm": run.paradigm,
        "version": run.version,
        "step": step,
        "loss": last_loss(folder),
        "checkpoint": present_fingerprint(RunFolder(folder).checkpoints, step),
    }
    write_sealed(RunFolder(folder).result, result)


def completed_step(folder: Path) -> int | None:
    """Return the step up to which the run in `folder` was completed; None if it never was."""
    step = (read_json_object(RunFolder(folder).result) or {}).get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def is_complete(folder: Path, run: Run) -> bool:
    """Return whether the run with files in `folder` has reached its last step.

    A main path is also complete if it has continued beyond, for versions that the plan no longer has.
    """
    step = completed_step(folder)
    return step is not None and (step == run.last_step if run.makes_version else step >= run.last_step)


def is_fresh(folder: Path, step: int, evaluation: Mapping[str, Any]) -> bool:
    """Return whether an evaluation is of the current model of `step`: same step, same checkpoint.

    The fingerprint in the evaluation is compared with the one recorded at the end of the training, or else
    with that of the checkpoint if it still exists. An evaluation without a fingerprint, from an earlier
    version of this package, is valid if the training recorded none either.
    """
    if evaluation.get("step") != step:
        return False
    evaluated, trained = evaluation.get("checkpoint"), recorded_fingerprint(folder, step)
    if trained is None and evaluated is not None:
        trained = present_fingerprint(RunFolder(folder).checkpoints, step)
    return trained is None or evaluated == trained


def recorded_fingerprint(folder: Path, step: int) -> str | None:
    """Return the fingerprint of the run's last checkpoint as the training recorded it; None if `step` is not its
    last.
    """
    result = read_json_object(RunFolder(folder).result) or {}
    found = result.get("checkpoint") if result.get("step") == step else None
    return found if isinstance(found, str) else None


def model_fingerprint(folder: Path, step: int) -> str | None:
    """Return the fingerprint of the model of `step`, whose checkpoint may have left the disk; None if it is unknown."""
    found = present_fingerprint(RunFolder(folder).checkpoints, step)
    return recorded_fingerprint(folder, step) if found is None else found


def fresh_evaluation(folder: Path, step: int) -> dict[str, Any] | None:
    """Return the evaluation of the current model of `step`; None if there is none."""
    evaluation = read_json_object(RunFolder(folder).evaluation)
    return evaluation if evaluation and is_fresh(folder, step, evaluation) else None


def needs_evaluation(plan: Plan, run: Run) -> bool:
    """Return whether the run is complete and its current model lacks an evaluation on a validation set."""
    folder = plan.folder(run)
    return is_complete(folder, run) and bool(missing_sets(plan, folder, run.last_step))


FIRST_SET = ""  # the first validation set, among the names of the others


def missing_sets(plan: Plan, folder: Path, step: int) -> list[str]:
    """Return the validation sets without an evaluation of the current model of `step`; the first set is
    `FIRST_SET`.
    """
    found = fresh_evaluation(folder, step)
    if found is None:
        return [FIRST_SET, *plan.data.more_sets]
    measured = found.get("sets")
    return [name for name in plan.data.more_sets if not isinstance(measured, dict) or name not in measured]


def evaluation_of(plan: Plan, target: Target) -> dict[str, Any] | None:
    """Return the written evaluation of a target; None if there is none."""
    folder = plan.folder(target.run)
    if target.at is not None:
        return main_path_evaluations(folder).get(target.at)
    return read_json_object(RunFolder(folder).evaluation)


def add_evaluation(plan: Plan, target: Target, evaluation: dict[str, Any]) -> None:
    """Write an evaluation (`step`, `loss`, …) into the run's folder; main-path evaluations are stored by
    step.

    Concurrent evaluations of the main path do not overwrite each other's results.
    """
    folder = RunFolder(plan.folder(target.run))
    if target.at is None:
        write_sealed(folder.evaluation, evaluation)
    else:
        add_main_path_evaluation(folder.path, evaluation)


def add_main_path_evaluation(folder: Path, evaluation: dict[str, Any]) -> None:
    """Add the evaluation of one of the main path's checkpoints."""
    path = RunFolder(folder).evaluations
    with RunFolder(folder).evaluations_lock.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        problems: list[str] = []
        read_json_object(path, problems)
        if problems:
            raise UserError(f"{path}: {problems[0]}; restore it, or remove it and evaluate again.")
        write_sealed(path, main_path_evaluations(folder) | {evaluation["step"]: evaluation})


def main_path_evaluations(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the evaluations of the main path's checkpoints with a usable loss, by step, ascending."""
    found = read_json_object(RunFolder(folder).evaluations) or {}
    # a step has at most 18 digits
    steps = [step for step in found if step.isdecimal() and len(step) <= 18 and loss_of(found[step])]
    return {int(step): found[step] for step in sorted(steps, key=int)}


def loss_of(evaluation: Any) -> float | None:
    """Return the loss (nats per token) of an evaluation; None if it has no usable loss."""
    loss = evaluation.get("loss") if isinstance(evaluation, dict) else None
    return loss if isinstance(loss, float) and 0 < loss < math.inf else None


def evaluation_digests(plan: Plan) -> dict[str, str]:
    """Return the digests of the evaluations of a plan's models, by `paradigm/run`."""
    found = {
        run.key: read_json_object(RunFolder(plan.folder(run)).evaluation)
        for run in model_runs(plan, PARADIGMS)
    }
    return {key: json_digest(evaluation) for key, evaluation in found.items() if evaluation}


def write_report_sources(report: Path, digests: Mapping[str, str]) -> None:
    """Record the evaluations that the report was made from in its folder: run -> digest."""
    write_sealed(report_sources(report), {"evaluations": dict(digests)})


def report_is_fresh(report: Path, runs: Iterable[Path]) -> bool:
    """Return whether the report in `report` shows the current evaluation of each of the folders `runs`."""
    used = (read_json_object(report_sources(report)) or {}).get("evaluations")
    found = [read_json_object(RunFolder(folder).evaluation) for folder in runs]
    known = {one for one in used.values() if isinstance(one, str)} if isinstance(used, dict) else set()
    return all(one is not None and json_digest(one) in known for one in found)


def main_path_targets(plan: Plan, validation: str, again: bool = False) -> list[Target]:
    """Return the main path's complete checkpoints without an evaluation on the slice with this fingerprint,
    or all.

    Raises:
        UserError: it has no checkpoint, or its evaluations cannot be read.
    """
    run = plan.main
    folder = RunFolder(plan.folder(run))
    steps = complete_steps(folder.checkpoints)
    if not steps:
        raise UserError(
            f"{folder.checkpoints}: the main path has no checkpoint yet; train it first "
            "(lrpath run PLAN --paradigm ours --run main)."
        )
    problems: list[str] = []
    read_json_object(folder.evaluations, problems)
    if problems:
        raise UserError(f"{folder.evaluations}: cannot be read; restore it, or remove it and evaluate again.")
    known = {} if again else main_path_evaluations(folder.path)

    def is_known(step: int) -> bool:
        found = known.get(step, {})
        checkpoint = found.get("checkpoint")
        same = checkpoint is None or checkpoint == present_fingerprint(folder.checkpoints, step)
        return same and found.get("validation") == validation

    return [Target(run, step) for step in steps if not is_known(step)]


def nothing_there(plan: Plan, what: str, command: str = "run") -> UserError:
    """Return the error of a command that needs results that a plan's runs lack, or have elsewhere."""
    first = f"First: lrpath {command} {shlex.quote(str(plan.path))}"
    return UserError(f"{plan.output}: {what}. {lies_elsewhere(plan.path, plan.output) or first}")


def lies_elsewhere(plan: Path, name: str | Path) -> str:
    """Return a sentence on where a folder named in the file `plan` is, and what to do; empty if it exists
    here.

    It is also empty if the folder is not found. Relative names are resolved against the working directory;
    the search covers the folders above the plan's file.
    """
    relative = Path(name)
    if relative.is_absolute() or relative.exists():
        return ""
    for folder in plan.resolve().parents:
        if (folder / relative).exists():
            rule = "relative paths in a plan start at the folder of the call"
            return f"{folder / relative} exists: {rule}, so call it in {folder}."
    return ""
