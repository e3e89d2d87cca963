"""The graph of jobs that plans come to: one for every training, an evaluation of each version, one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_lrpath.data.mix_slices import check_mixes
from megatron_lrpath.errors import UserError
from megatron_lrpath.evaluate.targets import is_trained, needs_evaluation
from megatron_lrpath.launch.layouts import Allocation, Layout, allocate, allocate_evaluation
from megatron_lrpath.launch.records import is_done
from megatron_lrpath.launch.slurm.settings import Settings
from megatron_lrpath.launch.slurm.snapshot import Snapshot
from megatron_lrpath.launch.tasks import Task, build_tasks, with_ancestors
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.sft import prepared_record, sft_megatron

REPORT = "report"


@dataclass(frozen=True)
class Wait:
    """What a job waits for: the end of job `key`, or the checkpoint of its training at `step` while it goes on."""

    key: str
    step: int | None = None


@dataclass(frozen=True)
class Job:
    """A node of the graph. `kind`: train, eval or report.

    `snapshot` is the plan that it belongs to, `task` the training, also of an evaluation; `page` is where the
    report lies in the end, `subject` the file that it is made for (a plan's copy, or an experiment).
    """

    key: str
    kind: str
    allocation: Allocation
    snapshot: Snapshot
    waits: tuple[Wait, ...] = ()
    task: Task | None = None
    page: Path = Path()
    subject: Path = Path()

    @property
    def plan(self) -> Plan:
        """The plan that it belongs to."""
        return self.snapshot.plan

    @property
    def name(self) -> str:
        """The key as part of a file name and of Slurm's job name."""
        return self.key.replace("/", ".")


def plan_jobs(
    snapshot: Snapshot,
    paradigms: Sequence[str],
    settings: Settings,
    run: str | None = None,
    extra: Sequence[str] = (),
) -> list[Job]:
    """The jobs of a plan's paradigms (with `run`: of that run and its ancestors), each after what it waits for.

    `extra` are Megatron arguments for every training. Raises UserError where the nodes do not fit the plan.
    """
    plan = snapshot.plan
    if plan.sft is not None and prepared_record(plan) is None:
        raise UserError(
            f"{plan.sft.place}: the data of the fine-tuning are not prepared yet; do it here, once: "
            f"lrpath sft {plan.path} --prepare --output {plan.output}"
        )
    tasks = build_tasks(plan, paradigms)
    if run is not None:
        tasks = with_ancestors(tasks, plan, run)
    jobs = task_jobs([(snapshot, task) for task in tasks], settings, extra)
    page = Path(plan.output) / "report" / "index.html"
    return [*jobs, report_job(jobs, page, snapshot.latest)]


def task_jobs(
    tasks: Sequence[tuple[Snapshot, Task]], settings: Settings, extra: Sequence[str] = ()
) -> list[Job]:
    """A job for every training, main paths first, then one for the evaluation of every version.

    With equal priorities the queue then never lets an update delay the next.
    Raises UserError where the nodes do not fit a plan.
    """
    for snapshot, task in tasks:
        check_mixes(snapshot.plan, [task.run])
    ordered = sorted(tasks, key=lambda pair: pair[1].run.kind != "main")
    every = [task for _, task in tasks]
    jobs = []
    for snapshot, task in ordered:
        place = training_place(snapshot.plan, task, settings, extra)
        jobs.append(Job(task.key, "train", place, snapshot, _waits(task, every), task))
    for snapshot, task in tasks:
        if task.run.kind != "main":
            sized = plan_of(snapshot.plan, task)
            place = allocate_evaluation(sized, settings.per_node, settings.device, extra)
            jobs.append(Job(f"eval/{task.key}", "eval", place, snapshot, (Wait(task.key),), task))
    return jobs


def training_place(plan: Plan, task: Task, settings: Settings, extra: Sequence[str]) -> Allocation:
    """Where a training runs; a fine-tuning, whose batch is its own, on as many of the nodes as share it out.

    Raises UserError where no number of nodes fits.
    """
    most = allocate(plan, settings.nodes, settings.per_node, settings.device, extra)
    if task.run.kind != "sft":
        return most
    sized = plan_of(plan, task)
    for nodes in range(most.nodes, 1, -1):
        try:
            return allocate(sized, nodes, settings.per_node, settings.device, extra)
        except UserError:
            continue
    return allocate(sized, 1, settings.per_node, settings.device, extra)


def plan_of(plan: Plan, task: Task) -> Plan:
    """The plan with the batch and the Megatron arguments that this training has."""
    if task.run.kind != "sft":
        return plan
    return replace(plan, batch=plan.batch_of(task.run), megatron=sft_megatron(plan))


def report_job(jobs: Sequence[Job], page: Path, subject: Path) -> Job:
    """The job that writes the report after all evaluations among `jobs`."""
    waits = tuple(Wait(job.key) for job in jobs if job.kind == "eval")
    single = Allocation(1, 1, Layout(1, 1), ())
    return Job(REPORT, "report", single, jobs[0].snapshot, waits, page=page, subject=subject)


def _waits(task: Task, tasks: Sequence[Task]) -> tuple[Wait, ...]:
    parent = next((other for other in tasks if other.key == task.parent), None)
    if parent is None:
        return ()
    return (Wait(parent.key, task.parent_step if task.parent_step < parent.run.last_step else None),)


def is_finished(job: Job, jobs: Sequence[Job]) -> bool:
    """Whether the job's result is there, so that nothing has to be submitted for it."""
    if job.task is None:
        return _report_is_fresh(job.page, jobs)
    if job.kind == "train":
        return is_done(job.task)
    return is_trained(job.plan, job.task.run) and not needs_evaluation(job.plan, job.task.run)


def _report_is_fresh(page: Path, jobs: Sequence[Job]) -> bool:
    """Whether the report is younger than every evaluation, and no evaluation is missing."""
    files = [job.task.folder / "eval.json" for job in jobs if job.kind == "eval" and job.task]
    if not page.is_file() or not all(file.is_file() for file in files):
        return False
    return all(file.stat().st_mtime <= page.stat().st_mtime for file in files)
