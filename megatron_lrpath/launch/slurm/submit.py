"""Submits a plan's jobs, cancels them and tells their state: graph, results, ledger and queue compared."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import PlanError, UserError
from megatron_lrpath.files import atomic_write_json, atomic_write_text
from megatron_lrpath.launch.process import only_one
from megatron_lrpath.launch.slurm import queue as commands
from megatron_lrpath.launch.slurm.jobs import Job, JobFiles, Wait, is_finished, job_files, plan_jobs
from megatron_lrpath.launch.slurm.ledger import (
    MARK,
    SIGNALS,
    Ledger,
    SubmittedJob,
    SubmittedPlan,
    dependents,
    read_attempts,
)
from megatron_lrpath.launch.slurm.settings import Settings
from megatron_lrpath.plan import PARADIGMS, Plan, differences, load_plan, run_identity
from megatron_lrpath.runs.checkpoints import checkpoint_complete
from megatron_lrpath.runs.lineage import plan_changes, read_lineage
from megatron_lrpath.runs.state import has_begun
from megatron_lrpath.runs.tasks import build_tasks, link_aliases

SHOWN = 3  # differences that the message names


def check_output(submitted: SubmittedPlan, alive: Collection[str]) -> None:
    """Raises UserError where a training in the plan's output would not be this plan's.

    `alive` are the trainings (`paradigm/run`) that have a job waiting or running, an evaluation's too. A plan
    with more versions, in other folders or with another layout is the same (see `plan.identity`); a changed one
    is taken as long as nothing of what was changed has begun or is in the queue.
    """
    for key, state, changes in chain(_begun(submitted.plan), _queued(submitted, alive)):
        more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        end = f", or end its jobs first (lrpath cancel {submitted.latest})" if state != "was trained" else ""
        raise UserError(
            f"{submitted.plan.output} is another plan's output: {key} {state} there under other settings "
            f"({'; '.join(changes[:SHOWN])}{more}). Nothing was submitted. Give {submitted.plan.path} an output of "
            f"its own (--output, LRPATH_OUTPUT, or `output` in the plan){end}."
        )


Conflict = tuple[
    str, str, list[str]
]  # a training of another plan: its key, what there is of it, what differs


def _begun(plan: Plan) -> Iterator[Conflict]:
    """Trainings in the output that were started under another plan; they would refuse to go on."""
    for paradigm in PARADIGMS:
        for run in (*plan.runs(paradigm), *plan.sft_runs(paradigm)):
            lineage = read_lineage(plan.folder(run)) if run.same_as is None else None
            if lineage and (changes := plan_changes(plan.folder(run), lineage, plan, run)):
                yield f"{paradigm}/{run.name}", "was trained", changes


def _queued(submitted: SubmittedPlan, alive: Collection[str]) -> Iterator[Conflict]:
    """Trainings with a job that would be others under this plan than under the one submitted last."""
    try:
        before = load_plan(submitted.latest) if alive and submitted.latest.is_file() else None
    except PlanError:
        return  # nothing that a job could read
    if before is None:
        return
    # a path alone, which --data may have moved; where a training has begun it counts
    tokenizer = replace(submitted.plan.tokenizer, model=before.tokenizer.model)
    plan = replace(submitted.plan, tokenizer=tokenizer)
    for key in alive:
        paradigm, name = key.split("/")
        try:
            old, new = (run_identity(one, one.run(paradigm, name)) for one in (before, plan))
            changes = differences(old, new)
        except UserError as error:  # one of them has no such run
            changes = [str(error)]
        if changes:
            yield key, "has a job", changes


DONE, QUEUED, SUBMIT, REPLACE, EXTEND = "done", "queued", "submit", "replace", "extend"


@dataclass(frozen=True)
class Decision:
    """What becomes of a job: done, queued (kept), submit, replace (`old` is ended), extend (after `old`)."""

    job: Job
    action: str
    old: int | None = None

    @property
    def is_new(self) -> bool:
        """Whether sbatch is called for it."""
        return self.action in (SUBMIT, REPLACE, EXTEND)


@dataclass(frozen=True)
class Dependency:
    """A dependency of Slurm's: its type, the jobs, and the checkpoint that is really meant, if it is one."""

    kind: str = "afterok"
    numbers: tuple[int, ...] = ()
    parent: Wait | None = None


@dataclass(frozen=True)
class Submission:
    """One call of `lrpath submit`: the graph of jobs, and where they are noted.

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
        """The submission of a plan's paradigms. Raises UserError for what could not work on the cluster."""
        plan = submitted.plan
        jobs = plan_jobs(submitted, paradigms, settings, run, extra)
        return cls(plan.name, Path(plan.output), settings, tuple(extra), jobs, Ledger.of(plan.output))

    @property
    def plans(self) -> list[SubmittedPlan]:
        """The plans, each once."""
        return list({str(job.submitted.latest): job.submitted for job in self.jobs}.values())

    def files(self, job: Job) -> JobFiles:
        """The job's options, script and data."""
        return job_files(self.name, job, self.settings, self.ledger.folder, self.extra)

    def look(self) -> list[Decision]:
        """Read the queue, where anything was ever submitted, and decide. UserError as of `check_outputs`."""
        newest = self.ledger.newest()
        cluster = Comparison(self, commands.queue() if newest else {}, newest)
        cluster.check_outputs()
        return cluster.decide()

    def carry_out(self) -> list[tuple[Decision, int | None]]:
        """Submit what is missing; each job with its number (None: nothing in the queue).

        Raises UserError, before anything is written, where data are missing or the output is another plan's.
        """
        check_data(self.jobs)
        doing = "is submitting this plan now; wait for it"
        with only_one(self.ledger.folder, doing, patience=30, without_locks=True):
            cluster = Comparison(self, commands.queue(), self.ledger.newest())
            cluster.check_outputs()
            for submitted in self.plans:
                submitted.write()
            for job in self.jobs:
                if job.task:
                    link_aliases(job.task)
            cluster.end_unrecorded()
            decisions = cluster.decide()
            commands.cancel([one.old for one in decisions if one.action == REPLACE and one.old])
            numbers: dict[str, int | None] = {}
            for decision in decisions:
                numbers[decision.job.key] = decision.old
                if decision.is_new:
                    numbers[decision.job.key] = self._submit(decision, cluster.dependency(decision, numbers))
        return [(decision, numbers[decision.job.key]) for decision in decisions]

    def _submit(self, decision: Decision, dependency: Dependency) -> int:
        job, files, parent = decision.job, self.files(decision.job), dependency.parent
        waited = ":".join(map(str, dependency.numbers))
        options = [*files.options, *([f"--dependency={dependency.kind}:{waited}"] if waited else [])]
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
            target=job.task.run.last_step if job.kind == "train" and job.task else 0,
            submitted=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.ledger.add(entry)
        return entry.number


@dataclass(frozen=True)
class Comparison:
    """A submission beside what is in the queue now, and what was submitted last for each job."""

    submission: Submission
    queue: Mapping[int, commands.QueuedJob]
    newest: Mapping[str, SubmittedJob]

    def decide(self) -> list[Decision]:
        """What is to be done about each job of the graph, by results, ledger and queue."""
        decisions: dict[str, Decision] = {}
        for job in self.submission.jobs:
            entry = self.newest.get(job.key)
            alive = entry.number if entry and entry.number in self.queue else None
            if is_finished(job, self.submission.jobs):
                action = DONE
            elif entry is None or alive is None:
                action = SUBMIT
            elif job.kind == "train" and job.task and entry.target < job.task.run.last_step:
                action = EXTEND
            else:
                action = REPLACE if self._is_stale(job, entry, decisions) else QUEUED
            decisions[job.key] = Decision(job, action, alive)
        return list(decisions.values())

    def _is_stale(self, job: Job, entry: SubmittedJob, decisions: Mapping[str, Decision]) -> bool:
        """Whether a waiting job waits for what will not come, or would run with too little."""
        if self.queue[entry.number].state != "PENDING":
            return False
        new = {key for key, decision in decisions.items() if decision.action in (SUBMIT, REPLACE)}
        return never_starts(self.queue[entry.number]) or any(
            wait.key in new and not self._is_there(wait) for wait in job.waits
        )

    def _is_there(self, wait: Wait) -> bool:
        """Whether what is waited for is there already."""
        job = next(job for job in self.submission.jobs if job.key == wait.key)
        if wait.step is None or job.task is None:
            return is_finished(job, self.submission.jobs)
        return checkpoint_complete(job.task.checkpoints, wait.step)

    def check_outputs(self) -> None:
        """Raises UserError where the output, or that of one of an experiment's plans, is another plan's."""
        alive = [key for key, entry in self.newest.items() if entry.number in self.queue]
        starting = [key for key in alive if not never_starts(self.queue[self.newest[key].number])]
        keys = dict.fromkeys(key.removeprefix("eval/") for key in starting)
        for submitted in self.submission.plans:
            place = Path(submitted.plan.output).relative_to(self.submission.output).as_posix()
            start = "" if place == "." else f"{place}/"
            own = [key.removeprefix(start) for key in keys if key.startswith(start)]
            check_output(submitted, [key for key in own if key.count("/") == 1])

    def end_unrecorded(self) -> None:
        """End jobs of ours that the ledger does not know: a submission was killed before it could note them."""
        ledger = self.submission.ledger
        known = {entry.number for entry in ledger.entries()}
        scripts = os.path.abspath(ledger.folder / "scripts") + os.sep
        ours = [job.number for job in self.queue.values() if job.script.startswith(scripts)]
        commands.cancel([number for number in ours if number not in known])

    def dependency(self, decision: Decision, numbers: Mapping[str, int | None]) -> Dependency:
        """What the job waits for, as numbers of jobs that are in the queue now.

        A branch waits for the main path's checkpoint, which Slurm cannot express: it is submitted to start
        after the end of the main path's job, however that ends, and that job lifts the dependency as soon as
        the checkpoint is complete. So a branch is never forgotten, whatever happens to the main path's job.
        """
        job = decision.job
        if decision.action == EXTEND and decision.old:
            return Dependency("afterok", (decision.old,))
        if job.task and job.kind == "train" and has_begun(job.task):
            return Dependency()
        waits = [wait for wait in job.waits if not self._is_there(wait)]
        waited = tuple(number for wait in waits if (number := numbers.get(wait.key)))
        middle = next((wait for wait in waits if wait.step is not None), None)
        if middle:
            return Dependency("afterany", waited, middle)
        return Dependency("afterok", waited)


def never_starts(queued: commands.QueuedJob) -> bool:
    """Whether it is a waiting job, and waits for what is gone or was held for a reason."""
    gone = queued.reason == "DependencyNeverSatisfied"
    return queued.state == "PENDING" and (gone or queued.comment.startswith(MARK))


def check_data(jobs: Sequence[Job]) -> None:
    """Stop before anything is submitted where a slice is missing: the job would find out days later."""
    missing: dict[str, Path] = {}
    for job in jobs:
        count = job.task.run.version_index if job.task else 0
        data = job.plan.data
        files = [f"{data.slices}/{version.name}.slice" for version in job.plan.versions[:count]]
        for file in (*files, *(f"{path}.slice" for path in (data.valid, *data.more_valid))):
            if not Path(file).is_file():
                missing[file] = job.plan.path
    if missing:
        (file, plan), more = next(iter(missing.items())), len(missing) - 1
        raise UserError(
            f"{plan}: no slice {file}{f' (and {more} more)' if more else ''}. "
            "Draw it with tools/slice_versions.py, or say where the data are (--data)."
        )


def cancel(ledger: Ledger, keys: Collection[str], now: bool) -> list[tuple[SubmittedJob, str]]:
    """End the jobs of the trainings `keys`, with their evaluations and what waits for them, and say how.

    With all jobs the report's goes too. Raises UserError where Slurm's commands fail.
    """
    entries = ledger.entries()
    queue = commands.queue() if entries else {}
    chosen = [entry for entry in entries if entry.key.removeprefix("eval/") in keys]
    waiting = [other for entry in chosen for other in dependents(entries, entry.number)]
    numbers = {entry.number for entry in [*chosen, *waiting] if entry.number in queue}
    alive = [entry for entry in entries if entry.number in numbers]
    for entry in alive:  # before anything ends: a job that ends by itself must not come back
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
    """The trainings of a plan's paradigms, or of one run. Raises UserError for an unknown run."""
    if run is None:
        return {task.key for task in build_tasks(plan, paradigms)}
    if len(paradigms) == 1:
        return {plan.run(paradigms[0], run).carried_out_as}
    runs = [one for paradigm in paradigms for one in plan.runs(paradigm) if one.name == run]
    if not runs:
        raise UserError(f"--run {run}: there is no such run; `lrpath plan {plan.path}` lists them")
    return {one.carried_out_as for one in runs}


def add_jobs(output: str, rows: list[dict[str, Any]]) -> None:
    """Give each row of a run its `job`: None, or number, state, reason, time_used, nodes, starts, comment.

    `output` is the folder of the plan's (or experiment's) results. What was never submitted is left as it is.
    Where squeue does not answer, the state is `unknown`. A run whose job is running is running, whatever its
    lock file says here: locks may not reach other nodes.
    """
    ledger = Ledger.of(output)
    newest = ledger.newest()
    if not newest:
        return
    try:
        queue: dict[int, commands.QueuedJob] | None = commands.queue()
    except UserError:
        queue = None
    for row in rows:
        entry = newest.get(row["key"])
        row["job"] = None
        if entry is None:
            continue
        job = (queue or {}).get(entry.number)
        starts = len(read_attempts(ledger.attempts_file(entry.number)))
        row["job"] = {
            "number": entry.number,
            "state": job.state.lower() if job else ("unknown" if queue is None else "ended"),
            "reason": job.reason if job and job.state == "PENDING" else "",
            "comment": job.comment.removeprefix(MARK) if job and job.comment.startswith(MARK) else "",
            "time_used": job.time_used if job else "",
            "nodes": job.nodes if job else "",
            "starts": starts + bool(job and job.state == "RUNNING"),
        }
        if job and job.state == "RUNNING":
            row["state"] = "running"
            row["waiting_for"] = row["cause"] = row["log"] = None
            pace = row["seconds_per_step"]
            row["seconds_left"] = (row["last_step"] - row["step"]) * pace if pace else None
        elif row["job"]["comment"] and not row["cause"]:
            row["cause"] = row["job"]["comment"]


def job_text(job: dict[str, Any] | None) -> str:
    """The job for a table: `4711 running 1:02:03`, `4712 pending (Dependency)`, `4713 running, start 3`."""
    if job is None or job["state"] == "ended":
        return ""
    reason = f" ({job['reason']})" if job["reason"] and job["reason"] != "None" else ""
    again = f", start {job['starts']}" if job["starts"] > 1 else ""
    used = f" {job['time_used']}" if job["state"] == "running" else ""
    return f"{job['number']} {job['state']}{used}{reason}{again}"
