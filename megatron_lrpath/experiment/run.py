"""Run an experiment: its trainings as tasks without duplicates, on this machine or as Slurm jobs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_lrpath.console import say_next
from megatron_lrpath.errors import UserError
from megatron_lrpath.experiment.load import Experiment, Point, training_key
from megatron_lrpath.experiment.table import PAGE
from megatron_lrpath.files import atomic_write_text
from megatron_lrpath.launch.display import open_display
from megatron_lrpath.launch.graph import width
from megatron_lrpath.launch.local import (
    CommandFor,
    Options,
    alone,
    call,
    default_command,
    evaluation_argv,
    starter_of,
)
from megatron_lrpath.launch.resources import Share, micro_batch_arguments, share_out
from megatron_lrpath.launch.runner import Runner
from megatron_lrpath.launch.slurm.jobs import report_job, task_jobs
from megatron_lrpath.launch.slurm.ledger import Ledger, SubmittedPlan
from megatron_lrpath.launch.slurm.settings import Settings
from megatron_lrpath.launch.slurm.submit import Submission
from megatron_lrpath.readiness import Request
from megatron_lrpath.runs.folder import OutputFolder
from megatron_lrpath.runs.tasks import Task, build_tasks, unknown_run, with_ancestors


@dataclass(frozen=True)
class PointTask(Task):
    """A task of one of an experiment's plans, `plan_path`; its key begins with the point's name."""

    point: str = ""
    plan_path: Path = Path()

    @property
    def key(self) -> str:
        """`<point>/<paradigm>/<run>`, unique in an experiment."""
        return f"{self.point}/{super().key}"


def write_plans(experiment: Experiment) -> None:
    """Write the plan file of every point, unless it exists."""
    for point in experiment.points:
        path = point.plan.path
        if not path.is_file() or path.read_text(encoding="utf-8") != point.text:
            atomic_write_text(path, point.text)


def experiment_tasks(experiment: Experiment, paradigms: Sequence[str] = ()) -> list[PointTask]:
    """Return every training of the experiment once, parents before children.

    The first point that needs a training runs it in its own folder; in the folders of the others it is an
    alias (a relative link, created by `runs.tasks.link_aliases`). Every task's `command` is that of its
    own point's plan, `plan_path`. Plans must have been written (`write_plans`) before a task starts.

    Raise UserError if the experiment has none of the paradigms (none given: all that it has).
    """
    if paradigms and not set(paradigms) & set(experiment.paradigms):
        raise UserError(
            f"{experiment.path}: the experiment is of {', '.join(experiment.paradigms)} alone; it has no "
            f"{' or '.join(paradigms)}"
        )
    return shared_tasks([experiment], paradigms)


def shared_tasks(experiments: Sequence[Experiment], paradigms: Sequence[str] = ()) -> list[PointTask]:
    """Return the same for several experiments (from `load.load_together`), without duplicates between them."""
    tasks: dict[str, PointTask] = {}
    for experiment in experiments:
        chosen = [name for name in experiment.paradigms if not paradigms or name in paradigms]
        for point in experiment.points:
            name = point.name if len(experiments) == 1 else f"{experiment.name}/{point.name}"
            owners: dict[str, str] = {}
            for task in point_tasks(experiment, point, chosen):
                same = training_key(point.plan, task.run)
                if same in tasks:  # an alias of the existing training
                    first = tasks[same]
                    tasks[same] = replace(first, aliases=(*first.aliases, task.folder, *task.aliases))
                else:
                    own = {**vars(task), "parent": owners[task.parent] if task.parent else None}
                    tasks[same] = PointTask(**own, point=name, plan_path=point.plan.path)
                owners[task.key] = tasks[same].key
    return list(tasks.values())


def chosen_keys(experiment: Experiment, paradigms: Sequence[str], run: str | None) -> set[str]:
    """Return the keys of the experiment's trainings, or of all runs called `run`. Raise UserError if there
    are none.
    """
    tasks = experiment_tasks(experiment, paradigms)
    keys = {task.key for task in tasks if run in (None, task.run.name)}
    if not keys:
        raise unknown_run(experiment.path, str(run), [task.run.name for task in tasks])
    return keys


def point_tasks(experiment: Experiment, point: Point, paradigms: Sequence[str]) -> list[Task]:
    """Return the tasks of one point's plan alone."""
    tasks = build_tasks(point.plan, paradigms, fine_tunings=False)  # `lrpath sft` on the point's own plan
    if not experiment.only:
        return tasks
    wanted = {task.key for name in experiment.only for task in with_ancestors(tasks, point.plan, name)}
    return [task for task in tasks if task.key in wanted]


def experiment_request(experiment: Experiment, request: Request) -> Request:
    """Return the checks to perform for every point's plan."""
    paradigms = tuple(name for name in experiment.paradigms if name in request.paradigms)
    return replace(request, paradigms=paradigms, runs=request.runs or experiment.only, fine_tunings=None)


def carry_out_experiment(
    experiment: Experiment, options: Options, command_for: CommandFor | None = None
) -> int:
    """Train the remaining runs, then evaluate; return the exit status of `launch.local.carry_out`."""
    if options.run:
        experiment = replace(experiment, only=(options.run,))
    tasks = experiment_tasks(experiment, options.paradigms)
    plan = experiment.points[0].plan
    share = share_out(plan, width(tasks), options.device, options.nproc, options.jobs, options.extra)
    options = replace(
        options, extra=(*options.extra, *micro_batch_arguments(plan, share.nproc, options.extra))
    )

    def work() -> int:
        write_plans(experiment)
        todo = [task for task in tasks if not task.complete]
        steps = sum(task.run.steps for task in todo)
        plans = {task.key: task.plan_path for task in tasks}
        command = command_for or default_command(lambda task: plans[task.key], options, share)
        with open_display() as display:
            display.event(
                f"{experiment.name}: {len(experiment.points)} plans, {len(tasks)} trainings, {len(todo)} to do, "
                f"{steps} steps; {share.jobs} at a time, {share.nproc} processes each, {share.device}"
            )
            starter = starter_of(share, options)
            Runner(experiment.name, tasks, share, command, display, options.grace, starter).run()
        status = _evaluate(experiment, share, options) if options.evaluate else 0
        if status == 0:
            say_next(f"lrpath report {shlex.quote(str(experiment.path))}")
        return status

    return alone(experiment.output, work)


def _evaluate(experiment: Experiment, share: Share, options: Options) -> int:
    """Evaluate the points one after another; shared models are evaluated with the first point."""
    paradigms = [name for name in experiment.paradigms if name in options.paradigms]
    for point in experiment.points:
        for paradigm in paradigms:
            tasks = point_tasks(experiment, point, [paradigm])
            alone = replace(options, paradigms=(paradigm,), run=None)
            command = evaluation_argv(point.plan, tasks, share, alone)
            if command and (status := call(command, options.grace, starter_of(share, options))):
                return status
    return 0


def experiment_submission(
    experiment: Experiment,
    settings: Settings,
    paradigms: Sequence[str],
    run: str | None = None,
    extra: Sequence[str] = (),
) -> Submission:
    """Return the submission of an experiment; its plans must have been written (`write_plans`) before a job
    starts.

    Raise UserError for anything that could not work on the cluster, and for folders that the settings
    would move, because the report reads the results from the folders in the experiment file.
    """
    for name, key in (("data", "set: {data.slices: …, data.valid: …}"), ("output", "output: …")):
        if getattr(settings, name):
            raise UserError(
                f"{experiment.path}: --{name} (or the settings file's) does not reach an experiment; "
                f"write `{key}` into its file"
            )
    if run:
        experiment = replace(experiment, only=(run,))
    submitted = {point.name: SubmittedPlan(point.plan, point.text.encode()) for point in experiment.points}
    tasks = [(submitted[task.point], task) for task in experiment_tasks(experiment, paradigms)]
    jobs = task_jobs(tasks, settings, extra)
    jobs.append(report_job(jobs, OutputFolder(experiment.output).report / PAGE, experiment.path))
    ledger = Ledger.of(str(experiment.output))
    return Submission(experiment.name, experiment.output, settings, tuple(extra), jobs, ledger)
