"""The next command for a plan, which other commands print as their last line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.paradigms import PARADIGMS
from megatron_lrpath.runs.folder import OutputFolder, report_page

if TYPE_CHECKING:
    from megatron_lrpath.experiment.load import Experiment
    from megatron_lrpath.plan import Plan


def next_for(plan: Plan, paradigms: Sequence[str] | None = None) -> str:
    """Return the next command for a plan, from the present content of its output.

    Train what is not complete, evaluate, report; then export, or add a version. `paradigms` None: the paradigms
    that the plan trains.
    """
    from megatron_lrpath.runs.results import model_runs, needs_evaluation, report_is_fresh
    from megatron_lrpath.runs.tasks import build_tasks, named_paradigms

    named = named_paradigms(plan)
    chosen = named if paradigms is None else tuple(paradigms)
    words = [] if chosen == named else ["--paradigm", chosen[0] if len(chosen) == 1 else "all"]
    rest = shlex.join([str(plan.path), *words])
    if not all(task.complete for task in build_tasks(plan, chosen)):
        return training(plan.output, rest)
    runs = model_runs(plan, chosen)
    if any(needs_evaluation(plan, run) for run in runs):
        return f"lrpath eval {rest}"
    report = OutputFolder(Path(plan.output)).report
    if not report_page(report).is_file() or not report_is_fresh(report, [plan.folder(run) for run in runs]):
        return f"lrpath report {rest}"
    return after_report(plan.path, chosen)


def next_for_experiment(experiment: Experiment) -> str:
    """Return the next command for an experiment: train and evaluate what is missing, then print the table."""
    from megatron_lrpath.experiment.run import experiment_tasks
    from megatron_lrpath.experiment.table import make_table

    path = shlex.quote(str(experiment.path))
    table = make_table(experiment)
    done = all(task.complete for task in experiment_tasks(experiment)) and table.known == table.wanted
    return f"lrpath report {path}" if done else training(experiment.output, path)


def training(output: str | Path, rest: str) -> str:
    """Return the command to train; `rest`: plan and options. Use Slurm if the output has Slurm jobs."""
    if OutputFolder(Path(output)).slurm.is_dir():
        return f"lrpath submit {rest}"
    return f"lrpath run {rest}   (on a cluster: lrpath submit {rest})"


def after_report(path: Path, paradigms: Sequence[str]) -> str:
    """Return the next command for a plan whose report is complete."""
    words = ["--paradigm", paradigms[0]] if len(paradigms) == 1 and paradigms[0] != PARADIGMS[0] else []
    plan = shlex.quote(str(path))
    return (
        f"lrpath export {shlex.join([str(path), *words])}, or new data: lrpath update {plan} --source PREFIX"
    )


def next_of_status(status: Mapping[str, Any], path: Path, otherwise: str) -> str:
    """Return the command that follows a plan's runs if some are running or queued, else `otherwise`."""
    rows = [*status["runs"], *status["jobs"]]
    queued = [job for row in rows if (job := row.get("job")) and job["state"] not in ("ended", "unknown")]
    if queued or any(row["state"] == "running" for row in rows):
        return f"lrpath status {shlex.quote(str(path))} --watch"
    return otherwise
