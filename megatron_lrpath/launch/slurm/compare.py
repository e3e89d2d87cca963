"""What is to be done about each job of the graph: results, ledger and queue compared."""

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
    """What becomes of a job: done, queued (kept), submit, replace (`old` is ended), extend (after `old`).

    `ending` are jobs of its key that are about to end (cancelled, still saving): a new one starts after them.
    """

    job: Job
    action: str
    old: int | None = None
    ending: tuple[int, ...] = ()

    @property
    def is_new(self) -> bool:
        """Whether sbatch is called for it."""
        return self.action in (SUBMIT, REPLACE, EXTEND)


@dataclass(frozen=True)
class Dependency:
    """A dependency of Slurm's: its type, the jobs, and the checkpoint that is really meant, if it is one.

    `ending` are jobs of the same key that must be gone, however they end.
    """

    kind: str = "afterok"
    numbers: tuple[int, ...] = ()
    parent: Wait | None = None
    ending: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """As sbatch's `--dependency` takes it; "" where it waits for nothing."""
        parts = [("afterany", self.ending), (self.kind, self.numbers)]
        return ",".join(f"{kind}:{':'.join(map(str, numbers))}" for kind, numbers in parts if numbers)


@dataclass(frozen=True)
class Comparison:
    """The jobs of a submission beside what is in the queue now, and what was submitted for each of them."""

    jobs: Sequence[Job]
    ledger: Ledger
    queue: Mapping[int, commands.QueuedJob]
    entries: Sequence[SubmittedJob]

    @property
    def newest(self) -> dict[str, SubmittedJob]:
        """The last entry of every key."""
        return {entry.key: entry for entry in self.entries}

    def decide(self) -> list[Decision]:
        """What is to be done about each job of the graph, by results, ledger and queue."""
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
        """Whether the job is in the queue and about to leave it: cancelled, or over and not coming back."""
        queued = self.queue.get(number)
        if queued is None:
            return False
        over = queued.state == "COMPLETING" and not self.ledger.requeue_mark(number).exists()
        return over or self.ledger.cancel_mark(number).exists()

    def starting(self) -> list[str]:
        """The keys whose newest job waits or runs, and is not about to end or held for a reason."""
        return [
            key
            for key, entry in self.newest.items()
            if entry.number in self.queue
            and not self.ends(entry.number)
            and not never_starts(self.queue[entry.number])
        ]

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
        job = next(job for job in self.jobs if job.key == wait.key)
        if wait.step is None or job.task is None:
            return is_finished(job, self.jobs)
        return checkpoint_complete(job.task.checkpoints, wait.step)

    def unrecorded(self) -> list[commands.QueuedJob]:
        """Jobs of ours in the queue that the ledger does not know."""
        known = {entry.number for entry in self.entries}
        scripts = os.path.abspath(self.ledger.folder / "scripts") + os.sep
        return [
            job for job in self.queue.values() if job.script.startswith(scripts) and job.number not in known
        ]

    def dependency(self, decision: Decision, numbers: Mapping[str, int | None]) -> Dependency:
        """What the job waits for, as numbers of jobs that are in the queue now.

        A branch waits for the main path's checkpoint, which Slurm cannot express: it is submitted to start
        after the end of the main path's job, however that ends, and that job lifts the dependency as soon as
        the checkpoint is complete. So a branch is never forgotten, whatever happens to the main path's job.
        The report waits for the evaluations' ends, however they end: it says what is missing.
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
    """Whether it is a waiting job, and waits for what is gone or was held for a reason."""
    gone = queued.reason == "DependencyNeverSatisfied"
    return queued.state == "PENDING" and (gone or queued.comment.startswith(MARK))
