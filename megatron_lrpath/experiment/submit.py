"""`lrpath submit` of an experiment: all its plans as one graph of jobs, each training once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_lrpath.errors import UserError
from megatron_lrpath.experiment.spec import Experiment
from megatron_lrpath.experiment.table import PAGE
from megatron_lrpath.experiment.tasks import experiment_tasks
from megatron_lrpath.launch.slurm.jobs import report_job, task_jobs
from megatron_lrpath.launch.slurm.ledger import Ledger
from megatron_lrpath.launch.slurm.settings import Settings
from megatron_lrpath.launch.slurm.snapshot import Snapshot
from megatron_lrpath.launch.slurm.submit import Submission


def experiment_submission(
    experiment: Experiment,
    settings: Settings,
    paradigms: Sequence[str],
    run: str | None = None,
    extra: Sequence[str] = (),
) -> Submission:
    """The submission of an experiment; its plans must have been written (`write_plans`) before a job starts.

    Raises UserError for what could not work on the cluster, and for folders that the settings would move: the
    report looks for the results where the experiment file says.
    """
    for name, key in (("data", "set: {data.slices: …, data.valid: …}"), ("output", "output: …")):
        if getattr(settings, name):
            raise UserError(
                f"{experiment.path}: --{name} (or the settings file's) does not reach an experiment; "
                f"write `{key}` into its file"
            )
    if run:
        experiment = replace(experiment, only=(run,))
    snapshots = {point.name: Snapshot(point.plan, point.text.encode()) for point in experiment.points}
    tasks = [(snapshots[task.point], task) for task in experiment_tasks(experiment, paradigms)]
    jobs = task_jobs(tasks, settings, extra)
    jobs.append(report_job(jobs, experiment.output / "report" / PAGE, experiment.path))
    ledger = Ledger.of(str(experiment.output))
    return Submission(experiment.name, experiment.output, settings, tuple(extra), jobs, ledger)
