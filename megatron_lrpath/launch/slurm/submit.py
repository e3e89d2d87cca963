"""`lrpath submit` without its command line: compare graph, results and queue, and submit what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_json, atomic_write_text
from megatron_lrpath.launch.records import has_begun
from megatron_lrpath.launch.slurm import commands
from megatron_lrpath.launch.slurm.another_plan import check_output
from megatron_lrpath.launch.slurm.jobs import Job, Wait, is_finished, plan_jobs
from megatron_lrpath.launch.slurm.ledger import MARK, Entry, Ledger
from megatron_lrpath.launch.slurm.script import Prepared, prepare
from megatron_lrpath.launch.slurm.settings import Settings
from megatron_lrpath.launch.slurm.snapshot import Snapshot
from megatron_lrpath.launch.tasks import link_aliases
from megatron_lrpath.locks import FolderLock, LockHeldError
from megatron_lrpath.training.checkpoints.on_disk import checkpoint_complete

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


@dataclass
class Submission:
    """One call of `lrpath submit`: the graph, and what is to be done about each job.

    `name` is the plan's or the experiment's, `output` the folder of its results.
    """

    name: str
    output: Path
    settings: Settings
    extra: tuple[str, ...]
    jobs: list[Job]
    ledger: Ledger
    queue: Mapping[int, commands.QueuedJob] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        snapshot: Snapshot,
        settings: Settings,
        paradigms: Sequence[str],
        run: str | None = None,
        extra: Sequence[str] = (),
    ) -> Submission:
        """The submission of a plan's paradigms. Raises UserError for what could not work on the cluster."""
        plan = snapshot.plan
        jobs = plan_jobs(snapshot, paradigms, settings, run, extra)
        return cls(plan.name, Path(plan.output), settings, tuple(extra), jobs, Ledger.of(plan.output))

    def prepared(self, job: Job) -> Prepared:
        """The job's options, script and data."""
        return prepare(self.name, job, self.settings, self.ledger.folder, self.extra)

    def decide(self) -> list[Decision]:
        """What is to be done about each job of the graph, by results, ledger and queue."""
        newest = self.ledger.newest()
        decisions: dict[str, Decision] = {}
        for job in self.jobs:
            entry = newest.get(job.key)
            alive = entry.number if entry and entry.number in self.queue else None
            if is_finished(job, self.jobs):
                action = DONE
            elif entry is None or alive is None:
                action = SUBMIT
            elif job.kind == "train" and job.task and entry.target < job.task.run.last_step:
                action = EXTEND
            else:
                action = REPLACE if self._is_stale(job, entry, decisions) else QUEUED
            decisions[job.key] = Decision(job, action, alive)
        return list(decisions.values())

    def _is_stale(self, job: Job, entry: Entry, decisions: Mapping[str, Decision]) -> bool:
        """Whether a waiting job waits for what will not come, or would run with too little."""
        queued = self.queue[entry.number]
        if queued.state != "PENDING":
            return False
        if never_starts(queued):
            return True
        for wait in job.waits:
            decision = decisions.get(wait.key)
            if decision and decision.action in (SUBMIT, REPLACE) and not self._is_there(wait):
                return True
        return False

    def _is_there(self, wait: Wait) -> bool:
        """Whether what is waited for is there already."""
        job = next(job for job in self.jobs if job.key == wait.key)
        if wait.step is None or job.task is None:
            return is_finished(job, self.jobs)
        return checkpoint_complete(job.task.checkpoints, wait.step)

    def look(self) -> list[Decision]:
        """Read the queue, where anything was ever submitted, and decide. UserError as of `check_outputs`."""
        self.queue = commands.queue() if self.ledger.entries() else {}
        self.check_outputs()
        return self.decide()

    @property
    def snapshots(self) -> list[Snapshot]:
        """The plans, each once."""
        return list({str(job.snapshot.latest): job.snapshot for job in self.jobs}.values())

    def check_outputs(self) -> None:
        """Raises UserError where the output, or that of one of an experiment's plans, is another plan's."""
        queued = [entry.key for entry in self.ledger.newest().values() if self._may_start(entry)]
        keys = dict.fromkeys(key.removeprefix("eval/") for key in queued)
        for snapshot in self.snapshots:
            place = Path(snapshot.plan.output).relative_to(self.output).as_posix()
            start = "" if place == "." else f"{place}/"
            own = [key.removeprefix(start) for key in keys if key.startswith(start)]
            check_output(snapshot, [key for key in own if key.count("/") == 1])

    def _may_start(self, entry: Entry) -> bool:
        queued = self.queue.get(entry.number)
        return queued is not None and not (queued.state == "PENDING" and never_starts(queued))

    def carry_out(self) -> list[tuple[Decision, int | None]]:
        """Submit what is missing; each job with its number (None: nothing in the queue).

        Raises UserError, before anything is written, where data are missing or the output is another plan's.
        """
        check_data(self.jobs)
        with only_one(self.ledger.folder):
            self.queue = commands.queue()
            self.check_outputs()
            for snapshot in self.snapshots:
                snapshot.write()
            for job in self.jobs:
                if job.task:
                    link_aliases(job.task)
            self._end_unrecorded()
            decisions = self.decide()
            commands.cancel([one.old for one in decisions if one.action == REPLACE and one.old])
            numbers: dict[str, int | None] = {}
            for decision in decisions:
                numbers[decision.job.key] = decision.old
                if decision.is_new:
                    numbers[decision.job.key] = self._submit(decision, numbers)
        return [(decision, numbers[decision.job.key]) for decision in decisions]

    def _end_unrecorded(self) -> None:
        """End jobs of ours that the ledger does not know: a submission was killed before it could note them."""
        known = {entry.number for entry in self.ledger.entries()}
        scripts = os.path.abspath(self.ledger.folder / "scripts") + os.sep
        ours = [job.number for job in self.queue.values() if job.script.startswith(scripts)]
        commands.cancel([number for number in ours if number not in known])

    def _submit(self, decision: Decision, numbers: Mapping[str, int | None]) -> int:
        job = decision.job
        prepared = self.prepared(job)
        atomic_write_json(prepared.spec_file, prepared.spec)
        atomic_write_text(prepared.script_file, prepared.script)
        (prepared.script_file.parents[1] / "logs").mkdir(exist_ok=True)
        dependency = self.dependency(decision, numbers)
        entry = Entry(
            key=job.key,
            number=commands.submit([*prepared.options, *dependency.words], prepared.script_file),
            script=str(prepared.script_file),
            depends=dependency.numbers,
            parent=dependency.parent.key if dependency.parent else None,
            parent_step=(dependency.parent.step or 0) if dependency.parent else 0,
            target=job.task.run.last_step if job.kind == "train" and job.task else 0,
            submitted=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.ledger.add(entry)
        return entry.number

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


@dataclass(frozen=True)
class Dependency:
    """A dependency of Slurm's: its type, the jobs, and the checkpoint that is really meant, if it is one."""

    kind: str = "afterok"
    numbers: tuple[int, ...] = ()
    parent: Wait | None = None

    @property
    def words(self) -> list[str]:
        """As an option of sbatch."""
        return [f"--dependency={self.kind}:{':'.join(map(str, self.numbers))}"] if self.numbers else []


def never_starts(queued: commands.QueuedJob) -> bool:
    """Whether a waiting job waits for what is gone, or was held for a reason."""
    return queued.reason == "DependencyNeverSatisfied" or queued.comment.startswith(MARK)


def check_data(jobs: Sequence[Job]) -> None:
    """Stop before anything is submitted where a slice is missing: the job would find out days later."""
    missing: dict[str, Path] = {}
    for job in jobs:
        count = job.task.run.version_index if job.task else 0
        data = job.plan.data
        files = [f"{data.slices}/{version.name}.slice" for version in job.plan.versions[:count]]
        for file in (*files, f"{data.valid}.slice"):
            if not Path(file).is_file():
                missing[file] = job.plan.path
    if missing:
        (file, plan), more = next(iter(missing.items())), len(missing) - 1
        raise UserError(
            f"{plan}: no slice {file}{f' (and {more} more)' if more else ''}. "
            "Draw it with tools/slice_versions.py, or say where the data are (--data)."
        )


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the lock of the ledger's folder, where the file system has locks. UserError when another holds it."""
    try:
        lock = FolderLock.acquire(folder, patience=30)
    except LockHeldError as error:
        raise UserError(f"{folder}: {error} is submitting this plan now; wait for it") from None
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.close()
