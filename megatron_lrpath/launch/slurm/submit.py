"""Submit a plan's jobs, and cancel them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

from megatron_lrpath.errors import PlanError, UserError
from megatron_lrpath.files import atomic_write_json, atomic_write_text
from megatron_lrpath.launch.process import only_one
from megatron_lrpath.launch.slurm import queue as commands
from megatron_lrpath.launch.slurm.compare import REPLACE, Comparison, Decision, Dependency
from megatron_lrpath.launch.slurm.jobs import Job, JobFiles, job_files, plan_jobs
from megatron_lrpath.launch.slurm.ledger import (
    SIGNALS,
    Ledger,
    SubmittedJob,
    SubmittedPlan,
    dependents,
)
from megatron_lrpath.launch.slurm.settings import Settings
from megatron_lrpath.plan import PARADIGMS, Plan, differences, load_plan, run_identity
from megatron_lrpath.runs.lineage import changes as run_changes
from megatron_lrpath.runs.lineage import read_lineage
from megatron_lrpath.runs.tasks import build_tasks, link_aliases, unknown_run
from megatron_lrpath.wording import clauses

SHOWN = 3  # number of differences in the message


def check_output(submitted: SubmittedPlan, alive: Collection[str]) -> None:
    """Raise UserError if a training in the plan's output belongs to another plan.

    `alive` are the trainings (`paradigm/run`) with a pending or running job, including evaluations. A plan
    with more versions, in other folders or with another layout is the same (see `plan.identity`); a
    changed plan is accepted if no changed run has begun or is in the queue.
    """
    for key, state, changes in chain(_begun(submitted.plan), _queued(submitted, alive)):
        end = f", or end its jobs first (lrpath cancel {submitted.latest})" if state != "was trained" else ""
        raise UserError(
            f"{submitted.plan.output} is another plan's output: {key} {state} there under other settings "
            f"({clauses(changes, SHOWN)}). Nothing was submitted. Give {submitted.plan.path} an output of "
            f"its own (--output, LRPATH_OUTPUT, or `output` in the plan){end}."
        )


Conflict = tuple[str, str, list[str]]  # a training of another plan: its key, its state, the differences


def _begun(plan: Plan) -> Iterator[Conflict]:
    """Yield the trainings in the output that were started under another plan; they refuse to continue."""
    for paradigm in PARADIGMS:
        for run in (*plan.runs(paradigm), *plan.sft_runs(paradigm)):
            lineage = read_lineage(plan.folder(run)) if run.same_as is None else None
            if lineage and (changes := run_changes(plan.folder(run), lineage, plan, run)):
                yield f"{paradigm}/{run.name}", "was trained", changes


def _queued(submitted: SubmittedPlan, alive: Collection[str]) -> Iterator[Conflict]:
    """Yield the trainings with a job whose identity differs between this plan and the one submitted last."""
    try:
        before = load_plan(submitted.latest) if alive and submitted.latest.is_file() else None
    except PlanError:
        return  # no job can read this plan
    if before is None:
        return
    # ignore the path, which --data may have moved; it counts if the training has begun
    tokenizer = replace(submitted.plan.tokenizer, model=before.tokenizer.model)
    plan = replace(submitted.plan, tokenizer=tokenizer)
    for key in alive:
        paradigm, name = key.split("/")
        try:
            old, new = (run_identity(one, one.run(paradigm, name)) for one in (before, plan))
            changes = differences(old, new)
        except UserError as error:  # one of the plans has no such run
            changes = [str(error)]
        if changes:
            yield key, "has a job", changes


@dataclass(frozen=True)
class Submission:
    """One call of `lrpath submit`: the graph of jobs and their ledger.

    `name` is the plan's or the experiment's, `output` the folder of its results.
    """

    name: str
    output: Path
    settings: Settings
    extra: tuple[str, ...]
    jobs: list[Job]
    ledger: Ledger

    @classmethod
    def of(
        cls,
        submitted: SubmittedPlan,
        settings: Settings,
        paradigms: Sequence[str],
        run: str | None = None,
        extra: Sequence[str] = (),
    ) -> Submission:
        """Return the submission of a plan's paradigms. Raise UserError for anything that could not work on
        the cluster.
        """
        plan = submitted.plan
        jobs = plan_jobs(submitted, paradigms, settings, run, extra)
        return cls(plan.name, Path(plan.output), settings, tuple(extra), jobs, Ledger.of(plan.output))

    @property
    def plans(self) -> list[SubmittedPlan]:
        """The plans, without duplicates."""
        return list({str(job.submitted.latest): job.submitted for job in self.jobs}.values())

    def files(self, job: Job) -> JobFiles:
        """Return the job's options, script and data."""
        return job_files(self.name, job, self.settings, self.ledger.folder, self.extra)

    def look(self) -> list[Decision]:
        """Read the queue, if there was any submission, and decide. Raise UserError as `check_outputs`."""
        entries = self.ledger.entries()
        cluster = Comparison(self.jobs, self.ledger, commands.queue() if entries else {}, entries)
        self.check_outputs(cluster)
        return cluster.decide()

    def check_outputs(self, cluster: Comparison) -> None:
        """Raise UserError if the output, or that of one of an experiment's plans, belongs to another plan."""
        keys = dict.fromkeys(key.removeprefix("eval/") for key in cluster.starting())
        for submitted in self.plans:
            place = Path(submitted.plan.output).relative_to(self.output).as_posix()
            start = "" if place == "." else f"{place}/"
            own = [key.removeprefix(start) for key in keys if key.startswith(start)]
            check_output(submitted, [key for key in own if key.count("/") == 1])

    def carry_out(self) -> list[tuple[Decision, int | None]]:
        """Submit the missing jobs; return each job with its number (None: nothing in the queue).

        Raise UserError, before anything is written, if the output belongs to another plan.
        """
        doing = "is submitting this plan now; wait for it"
        with only_one(self.ledger.folder, doing, patience=30, without_locks=True):
            queue = commands.queue()
            self.take_up(Comparison(self.jobs, self.ledger, queue, self.ledger.entries()))
            cluster = Comparison(self.jobs, self.ledger, queue, self.ledger.entries())
            self.check_outputs(cluster)
            for submitted in self.plans:
                submitted.write()
            for job in self.jobs:
                if job.task:
                    link_aliases(job.task)
            decisions = cluster.decide()
            commands.cancel([one.old for one in decisions if one.action == REPLACE and one.old])
            numbers: dict[str, int | None] = {}
            for decision in decisions:
                numbers[decision.job.key] = decision.old
                if decision.is_new:
                    numbers[decision.job.key] = self._submit(decision, cluster.dependency(decision, numbers))
        return [(decision, numbers[decision.job.key]) for decision in decisions]

    def take_up(self, cluster: Comparison) -> None:
        """Record the jobs that a user submitted by hand, and end those of an interrupted submission.

        Such a submission could neither record its jobs nor the ones that wait for them.
        """
        keys = {job.name: job for job in self.jobs}
        lost = []
        for queued in cluster.unrecorded():
            job = keys.get(Path(queued.script).stem.rpartition("-")[0])
            if job and queued.by_hand:
                self.ledger.add(SubmittedJob(job.key, queued.number, queued.script, target=job.target))
            else:
                lost.append(queued.number)
        commands.cancel(lost)

    def _submit(self, decision: Decision, dependency: Dependency) -> int:
        job, files, parent = decision.job, self.files(decision.job), dependency.parent
        options = [*files.options, *([f"--dependency={dependency.text}"] if dependency.text else [])]
        atomic_write_json(files.spec_file, files.spec)
        atomic_write_text(files.script_file, files.script)
        for name in ("logs", SIGNALS):
            (self.ledger.folder / name).mkdir(exist_ok=True)
        entry = SubmittedJob(
            key=job.key,
            number=commands.submit(options, files.script_file),
            script=str(files.script_file),
            depends=dependency.numbers,
            parent=parent.key if parent else None,
            parent_step=(parent.step or 0) if parent else 0,
            target=job.target,
            submitted=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.ledger.add(entry)
        return entry.number


def cancel(ledger: Ledger, keys: Collection[str], now: bool) -> list[tuple[SubmittedJob, str]]:
    """End the jobs of the trainings `keys`, their evaluations and the jobs that wait for them; return each
    job with what happens to it. Unless `now`, running trainings save first.

    If all jobs end, the report's also ends. Raise UserError if Slurm's commands fail.
    """
    entries = ledger.entries()
    queue = commands.queue() if entries else {}
    chosen = [entry for entry in entries if entry.key.removeprefix("eval/") in keys]
    waiting = [other for entry in chosen for other in dependents(entries, entry.number)]
    numbers = {entry.number for entry in [*chosen, *waiting] if entry.number in queue}
    alive = [entry for entry in entries if entry.number in numbers]
    for entry in alive:  # before any job ends: a job that ends by itself must not be requeued
        mark = ledger.cancel_mark(entry.number)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    trains = {entry.number for entry in alive if entry.target and queue[entry.number].state == "RUNNING"}
    saving = set() if now else trains
    commands.cancel([entry.number for entry in alive if entry.number not in saving])
    for number in saving:
        commands.ask_to_save(number)
    return [(entry, "saves and ends" if entry.number in saving else "ended") for entry in alive]


def plan_keys(plan: Plan, paradigms: Sequence[str], run: str | None) -> set[str]:
    """Return the trainings of a plan's paradigms, or of one run. Raise UserError for an unknown run."""
    if run is None:
        return {task.key for task in build_tasks(plan, paradigms)}
    if len(paradigms) == 1:
        return {plan.run(paradigms[0], run).carried_out_as}
    runs = [one for paradigm in paradigms for one in plan.runs(paradigm) if one.name == run]
    if not runs:
        raise unknown_run(plan.path, run, [one.name for paradigm in paradigms for one in plan.runs(paradigm)])
    return {one.carried_out_as for one in runs}
