"""The graph of jobs that a plan comes to: one for every training, an evaluation of each version, one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lrpath.evaluate.targets import is_trained, needs_evaluation
from megatron_lrpath.launch.layouts import Allocation, Layout, allocate, allocate_evaluation
from megatron_lrpath.launch.records import is_done
from megatron_lrpath.launch.slurm.settings import Settings
from megatron_lrpath.launch.tasks import Task, build_tasks, with_ancestors
from megatron_lrpath.plan import Plan

REPORT = "report"


@dataclass(frozen=True)
class Wait:
    """What a job waits for: the end of job `key`, or the checkpoint of its training at `step` while it goes on."""

    key: str
    step: int | None = None


@dataclass(frozen=True)
class Job:
    """A node of the graph. `kind`: train, eval or report; `task` is the training, also of an evaluation."""

    key: str
    kind: str
    allocation: Allocation
    waits: tuple[Wait, ...] = ()
    task: Task | None = None

    @property
    def name(self) -> str:
        """The key as part of a file name and of Slurm's job name."""
        return self.key.replace("/", ".")


def build_jobs(
    plan: Plan,
    paradigms: Sequence[str],
    settings: Settings,
    run: str | None = None,
    extra: Sequence[str] = (),
) -> list[Job]:
    """The jobs of the paradigms (with `run`: of that run and its ancestors), each after what it waits for.

    `extra` are Megatron arguments for every training. Raises UserError where the nodes do not fit the plan.
    """
    tasks = build_tasks(plan, paradigms)
    if run is not None:
        tasks = with_ancestors(tasks, plan, run)
    training = allocate(plan, settings.nodes, settings.per_node, settings.device, extra)
    evaluation = allocate_evaluation(plan, settings.per_node, settings.device, extra)
    jobs = [Job(task.key, "train", training, _waits(task, tasks), task) for task in _main_first(tasks)]
    evaluations = [
        Job(f"eval/{task.key}", "eval", evaluation, (Wait(task.key),), task)
        for task in tasks
        if task.run.kind != "main"
    ]
    waits = tuple(Wait(job.key) for job in evaluations)
    single = Allocation(1, 1, Layout(1, 1), ())
    return [*jobs, *evaluations, Job(REPORT, "report", single, waits)]


def _main_first(tasks: Sequence[Task]) -> list[Task]:
    """Main paths before all others: with equal priorities the queue then never lets an update delay the next."""
    return sorted(tasks, key=lambda task: task.run.kind != "main")


def _waits(task: Task, tasks: Sequence[Task]) -> tuple[Wait, ...]:
    parent = next((other for other in tasks if other.key == task.parent), None)
    if parent is None:
        return ()
    return (Wait(parent.key, task.parent_step if task.parent_step < parent.run.last_step else None),)


def is_finished(plan: Plan, job: Job, jobs: Sequence[Job]) -> bool:
    """Whether the job's result is there, so that nothing has to be submitted for it."""
    if job.task is None:
        return _report_is_fresh(plan, jobs)
    if job.kind == "train":
        return is_done(job.task)
    return is_trained(plan, job.task.run) and not needs_evaluation(plan, job.task.run)


def _report_is_fresh(plan: Plan, jobs: Sequence[Job]) -> bool:
    """Whether the report is younger than every evaluation, and no evaluation is missing."""
    page = Path(plan.output) / "report" / "index.html"
    files = [job.task.folder / "eval.json" for job in jobs if job.kind == "eval" and job.task]
    if not page.is_file() or not all(file.is_file() for file in files):
        return False
    return all(file.stat().st_mtime <= page.stat().st_mtime for file in files)
