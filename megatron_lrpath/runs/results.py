"""Which runs make a model, whether they are complete, and whether they are evaluated: the one definition of each."""

from __future__ import annotations

import fcntl
import math
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
        return self.run.key if self.at is None else f"{self.run.key}@{self.at}"

    @classmethod
    def named(cls, plan: Plan, name: str) -> Target:
        """The one of that name."""
        paradigm, _, rest = name.partition("/")
        run, _, step = rest.partition("@")
        return cls(plan.run(paradigm, run), int(step) if step else None)


def version_runs(plan: Plan, paradigms: Iterable[str]) -> list[Run]:
    """The runs whose end is a version's model (all but the main path), each training once."""
    return _each_once(plan, (run for name in paradigms for run in plan.runs(name) if run.makes_version))


def model_runs(plan: Plan, paradigms: Iterable[str]) -> list[Run]:
    """The runs that end with a model to use: `version_runs`, then their fine-tunings, each training once."""
    names = list(paradigms)
    tuned = (run for name in names for run in plan.sft_runs(name))
    return version_runs(plan, names) + _each_once(plan, tuned)


def _each_once(plan: Plan, runs: Iterable[Run]) -> list[Run]:
    """The runs as which `runs` are carried out, each once."""
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
    """The step up to which the run in `folder` was completed, None while it never was."""
    step = (read_json_object(RunFolder(folder).result) or {}).get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def is_complete(folder: Path, run: Run) -> bool:
    """Whether the run, whose files are in `folder`, has come to its last step.

    A main path is also complete where it has gone further, for versions that the plan no longer has.
    """
    step = completed_step(folder)
    return step is not None and (step == run.last_step if run.makes_version else step >= run.last_step)


def is_fresh(folder: Path, step: int, evaluation: Mapping[str, Any]) -> bool:
    """Whether an evaluation is of the model of `step` as it is now: same step, same checkpoint.

    The fingerprint in the evaluation is compared with the one that the training recorded at its end, else with
    that of the checkpoint where it is still there. An evaluation without a fingerprint, of an earlier
    version of this package, counts where the training recorded none either.
    """
    if evaluation.get("step") != step:
        return False
    result, evaluated = read_json_object(RunFolder(folder).result) or {}, evaluation.get("checkpoint")
    trained = result.get("checkpoint") if result.get("step") == step else None
    if trained is None and evaluated is not None:
        trained = present_fingerprint(RunFolder(folder).checkpoints, step)
    return trained is None or evaluated == trained


def fresh_evaluation(folder: Path, step: int) -> dict[str, Any] | None:
    """The evaluation of the model of `step` as it is now, None where there is none."""
    evaluation = read_json_object(RunFolder(folder).evaluation)
    return evaluation if evaluation and is_fresh(folder, step, evaluation) else None


def needs_evaluation(plan: Plan, run: Run) -> bool:
    """Whether the run is complete and its model not evaluated as it is now, on every validation set."""
    folder = plan.folder(run)
    return is_complete(folder, run) and bool(missing_sets(plan, folder, run.last_step))


FIRST_SET = ""  # the first validation set, among the names of the others


def missing_sets(plan: Plan, folder: Path, step: int) -> list[str]:
    """The validation sets on which the model of `step` is not evaluated as it is now, the first as `FIRST_SET`."""
    found = fresh_evaluation(folder, step)
    if found is None:
        return [FIRST_SET, *plan.data.more_sets]
    measured = found.get("sets")
    return [name for name in plan.data.more_sets if not isinstance(measured, dict) or name not in measured]


def evaluation_of(plan: Plan, target: Target) -> dict[str, Any] | None:
    """What the evaluation of a target has written, None where it has not."""
    folder = plan.folder(target.run)
    if target.at is not None:
        return main_path_evaluations(folder).get(target.at)
    return read_json_object(RunFolder(folder).evaluation)


def add_evaluation(plan: Plan, target: Target, evaluation: dict[str, Any]) -> None:
    """Write an evaluation (`step`, `loss`, …) into the run's folder; along the main path beside those of other steps.

    Processes that add evaluations of the main path at the same time lose nothing of each other's.
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
    """The evaluations of the main path's checkpoints that have a usable loss, by step, ascending."""
    found = read_json_object(RunFolder(folder).evaluations) or {}
    # a step has 18 digits at most
    steps = [step for step in found if step.isdecimal() and len(step) <= 18 and loss_of(found[step])]
    return {int(step): found[step] for step in sorted(steps, key=int)}


def loss_of(evaluation: Any) -> float | None:
    """The loss (nats per token) of an evaluation, None where it has no usable one."""
    loss = evaluation.get("loss") if isinstance(evaluation, dict) else None
    return loss if isinstance(loss, float) and 0 < loss < math.inf else None


def evaluation_digests(plan: Plan) -> dict[str, str]:
    """The digests of the evaluations that there are of a plan's models, by `paradigm/run`."""
    found = {
        run.key: read_json_object(RunFolder(plan.folder(run)).evaluation)
        for run in model_runs(plan, PARADIGMS)
    }
    return {key: json_digest(evaluation) for key, evaluation in found.items() if evaluation}


def write_report_sources(report: Path, digests: Mapping[str, str]) -> None:
    """Record in the report's folder the evaluations that it was made from: run -> digest."""
    write_sealed(report_sources(report), {"evaluations": dict(digests)})


def report_is_fresh(report: Path, runs: Iterable[Path]) -> bool:
    """Whether the report in `report` shows the present evaluation of each of the folders `runs`."""
    used = (read_json_object(report_sources(report)) or {}).get("evaluations")
    found = [read_json_object(RunFolder(folder).evaluation) for folder in runs]
    known = {one for one in used.values() if isinstance(one, str)} if isinstance(used, dict) else set()
    return all(one is not None and json_digest(one) in known for one in found)


def main_path_targets(plan: Plan, validation: str, again: bool = False) -> list[Target]:
    """The main path's complete checkpoints that have not been evaluated on the slice of this fingerprint, or all.

    Raises:
        UserError: it has no checkpoint, or what is known of them cannot be read.
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
