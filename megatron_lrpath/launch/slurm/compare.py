"""Decide what to do about each job of the graph, by comparing results, ledger and queue."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_lrpath.launch.slurm import queue as commands
from megatron_lrpath.launch.slurm.jobs import REPORT, Job, Wait, is_finished
from megatron_lrpath.launch.slurm.ledger import MARK, Ledger, SubmittedJob
from megatron_lrpath.runs.checkpoints import checkpoint_complete
from megatron_lrpath.runs.state import has_begun

DONE, QUEUED, SUBMIT, REPLACE, EXTEND = "done", "queued", "submit", "replace", "extend"


@dataclass(frozen=True)
class Decision:
    """The decision about a job: done, queued (kept), submit, replace (`old` is ended), extend (after `old`).

    `ending` are jobs with its key that are about to end (cancelled, still saving): a new job starts after
    them.
    """

    job: Job
    action: str
    old: int | None = None
    ending: tuple[int, ...] = ()

    @property
    def is_new(self) -> bool:
        """Return whether sbatch is called for it."""
        return self.action in (SUBMIT, REPLACE, EXTEND)


@dataclass(frozen=True)
class Dependency:
    """A dependency in Slurm: its type, the jobs, and the awaited checkpoint, if any.

    `ending` are jobs with the same key that must have ended, in any way.
    """

    kind: str = "afterok"
    numbers: tuple[int, ...] = ()
    parent: Wait | None = None
    ending: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """Return the value of sbatch's `--dependency`; "" without a dependency."""
        parts = [("afterany", self.ending), (self.kind, self.numbers)]
        return ",".join(f"{kind}:{':'.join(map(str, numbers))}" for kind, numbers in parts if numbers)


@dataclass(frozen=True)
class Comparison:
    """The jobs of a submission, with the current queue and the earlier submissions of each."""

    jobs: Sequence[Job]
    ledger: Ledger
    queue: Mapping[int, commands.QueuedJob]
    entries: Sequence[SubmittedJob]

    @property
    def newest(self) -> dict[str, SubmittedJob]:
        """Return the last entry of every key."""
        return {entry.key: entry for entry in self.entries}

    def decide(self) -> list[Decision]:
        """Decide about each job of the graph from results, ledger and queue."""
        decisions: dict[str, Decision] = {}
        newest = self.newest
        for job in self.jobs:
            entry = newest.get(job.key)
            ending = tuple(one.number for one in self.entries if one.key == job.key and self.ends(one.number))
            alive = entry.number if entry and entry.number in self.queue else None
            if is_finished(job, self.jobs):
                action, alive = DONE, None if alive in ending else alive
            elif entry is None or alive is None or alive in ending:
                action, alive = SUBMIT, None
            elif job.kind == "train" and job.task and entry.target < job.task.run.last_step:
                action = EXTEND
            else:
                action = REPLACE if self._is_stale(job, entry, decisions) else QUEUED
            decisions[job.key] = Decision(job, action, alive, ending)
        return list(decisions.values())

    def ends(self, number: int) -> bool:
        """Return whether the job is in the queue and about to leave it: cancelled, or finished without a
        requeue.
        """
        queued = self.queue.get(number)
        if queued is None:
            return False
        over = queued.state == "COMPLETING" and not self.ledger.requeue_mark(number).exists()
        return over or self.ledger.cancel_mark(number).exists()

    def starting(self) -> list[str]:
        """Return the keys whose newest job is pending or running, and is neither about to end nor held for a
        reason.
        """
        return [
            key
            for key, entry in self.newest.items()
            if entry.number in self.queue
            and not self.ends(entry.number)
            and not never_starts(self.queue[entry.number])
        ]

    def _is_stale(self, job: Job, entry: SubmittedJob, decisions: Mapping[str, Decision]) -> bool:
        """Return whether a pending job has a dependency that cannot be met, or would run with insufficient
        resources.
        """
        if self.queue[entry.number].state != "PENDING":
            return False
        new = {key for key, decision in decisions.items() if decision.action in (SUBMIT, REPLACE)}
        return never_starts(self.queue[entry.number]) or any(
            wait.key in new and not self._is_there(wait) for wait in job.waits
        )

    def _is_there(self, wait: Wait) -> bool:
        """Return whether the awaited result already exists."""
        job = next(job for job in self.jobs if job.key == wait.key)
        if wait.step is None or job.task is None:
            return is_finished(job, self.jobs)
        return checkpoint_complete(job.task.checkpoints, wait.step)

    def unrecorded(self) -> list[commands.QueuedJob]:
        """Return this plan's jobs in the queue that are missing in the ledger."""
        known = {entry.number for entry in self.entries}
        scripts = os.path.abspath(self.ledger.folder / "scripts") + os.sep
        return [
            job for job in self.queue.values() if job.script.startswith(scripts) and job.number not in known
        ]

    def dependency(self, decision: Decision, numbers: Mapping[str, int | None]) -> Dependency:
        """Return the job's dependency, as numbers of jobs that are in the queue now.

        A branch waits for the main path's checkpoint, which Slurm cannot express. Its job is submitted to
        start after the end of the main path's job, in any way, and that job removes the dependency when
        the checkpoint is complete. So a branch always starts, even if the main path's job fails. The
        report waits for the ends of the evaluations, in any way, and lists what is missing.
        """
        job, ending = decision.job, decision.ending
        if decision.action == EXTEND and decision.old:
            return Dependency("afterok", (decision.old,), ending=ending)
        if job.task and job.kind == "train" and has_begun(job.task):
            return Dependency(ending=ending)
        waits = [wait for wait in job.waits if not self._is_there(wait)]
        waited = tuple(number for wait in waits if (number := numbers.get(wait.key)))
        middle = next((wait for wait in waits if wait.step is not None), None)
        if middle:
            return Dependency("afterany", waited, middle, ending)
        return Dependency("afterany" if job.kind == REPORT else "afterok", waited, ending=ending)


def never_starts(queued: commands.QueuedJob) -> bool:
    """Return whether a pending job waits for a job that is gone or was held for a reason."""
    gone = queued.reason == "DependencyNeverSatisfied"
    return queued.state == "PENDING" and (gone or queued.comment.startswith(MARK))
