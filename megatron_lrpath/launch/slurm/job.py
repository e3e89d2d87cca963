"""What a batch script runs on the first node of its allocation: one start of one job of a plan."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.process import ENTRY_MODULE, new_log
from megatron_lrpath.launch.slurm import queue as commands
from megatron_lrpath.launch.slurm.jobs import Spec
from megatron_lrpath.launch.slurm.ledger import (
    COMPLETE,
    FAILED,
    MARK,
    REQUEUE,
    SAVED,
    Attempt,
    Entry,
    Ledger,
    current,
    dependents,
    judge,
    note_attempt,
    read_attempts,
)
from megatron_lrpath.launch.slurm.steps import Failure, Place, Steps, why
from megatron_lrpath.locks import FolderLock, LockHeldError
from megatron_lrpath.plan import PARADIGMS, Plan, load_plan
from megatron_lrpath.runs.checkpoints import checkpoint_complete, latest_step
from megatron_lrpath.runs.folder import RunFolder, read_json_object
from megatron_lrpath.runs.history import HistoryTail
from megatron_lrpath.runs.state import parent_available
from megatron_lrpath.runs.tasks import Task, build_tasks, link_aliases
from megatron_lrpath.training.guards.signals import SAVED_AND_STOPPED


@dataclass
class Chain:
    """The jobs that wait for job `number`, which trains `key` into `checkpoints`."""

    ledger: Ledger
    key: str
    number: int
    checkpoints: Path
    _released: set[int] = field(default_factory=set)

    def release(self) -> list[Entry]:
        """Let the branches start whose checkpoint is complete, and return them.

        Each is tried until it succeeds: while the controller does not answer nothing is lost, the next call
        tries again, and a branch starts at the latest when this job ends.
        """
        ready = [
            entry
            for entry in self.ledger.entries()
            if entry.parent == self.key
            and entry.number not in self._released
            and checkpoint_complete(self.checkpoints, entry.parent_step)
        ]
        if not ready:
            return []
        waiting = {number for number, job in commands.queue().items() if job.state == "PENDING"}
        freed = []
        for entry in ready:
            if entry.number in waiting:
                commands.forget_dependency(entry.number)
                freed.append(entry)
            self._released.add(entry.number)
        return freed

    def hold_dependents(self, reason: str) -> list[Entry]:
        """Hold what cannot start any more because this job stops; branches whose checkpoint is there go on."""
        entries = self.ledger.entries()
        spared = {
            entry.number
            for entry in entries
            if entry.parent == self.key and checkpoint_complete(self.checkpoints, entry.parent_step)
        }
        queue = commands.queue()
        held = []
        for entry in dependents([one for one in entries if one.number not in spared], self.number):
            job = queue.get(entry.number)
            if job and job.state == "PENDING":
                commands.hold(entry.number, f"{MARK}held: {self.key} (job {self.number}) stopped: {reason}")
                held.append(entry)
        return held


class Progress:
    """To be made before the start; `start` is the step that it starts from."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._before = self._signature()
        self.start = self.checkpoint()

    def checkpoint(self) -> int:
        """The newest complete checkpoint's step; the run's first step where there is none."""
        return max(latest_step(self._task.checkpoints) or 0, self._task.run.first_step)

    def last_step(self) -> int:
        """The last step that this start has logged; where it came to none, the step it started from."""
        if self._signature() == self._before:
            return self.start  # what stands in the history is an earlier start's
        tail = HistoryTail(self._task.folder)
        tail.poll()
        return max(tail.last.step, self.start) if tail.last else self.start

    def _signature(self) -> tuple[int, int, int]:
        try:
            about = RunFolder(self._task.folder).history.stat()
        except OSError:
            return (0, 0, 0)
        return about.st_ino, about.st_size, about.st_mtime_ns


LOCK_SECONDS = 120.0  # an earlier start of the job may still be ending on another node
PREFLIGHT_SECONDS = 600.0


@dataclass
class Program:
    """One start of a job with its plan (`pinned`: its file, which does not change) and its place."""

    spec: Spec
    pinned: Path
    plan: Plan
    place: Place
    task: Task
    parent: Task | None

    @classmethod
    def of(cls, spec: Spec) -> Program:
        """The program for a spec, in the job that this process runs in. UserError where its run is gone."""
        pinned = current(Path(spec.plan))
        plan = load_plan(pinned)
        tasks = {(task.run.paradigm, task.run.name): task for task in build_tasks(plan, PARADIGMS)}
        task = tasks.get((spec.paradigm, spec.run))
        parent = next((one for one in tasks.values() if task and one.key == task.parent), None)
        if task is None:
            raise UserError(f"{spec.key}: the plan that was submitted last has no such run any more")
        return cls(spec, pinned, plan, Place.here(), task, parent)

    @property
    def ledger(self) -> Ledger:
        """What was submitted for this plan."""
        return Ledger(Path(self.spec.folder))

    def carry_out(self) -> int:
        """Do the job; the exit status of the batch script."""
        return self._train() if self.spec.kind == "train" else self._evaluate()

    def _train(self) -> int:
        chain = Chain(self.ledger, self.spec.key, self.place.number, self.task.checkpoints)
        if self.task.complete:
            print(f"{self.task.key}: complete at step {self.task.run.last_step} already")
            chain.release()
            return 0
        if not parent_available(self.task, self.parent.folder if self.parent else None):
            return self._wait_held()
        link_aliases(self.task)
        lock = self._lock(self.task.folder)
        try:
            return self._attempt(chain)
        finally:
            if lock:
                lock.close()

    def _lock(self, folder: Path) -> FolderLock | None:
        """The run's lock, None where the file system has none. UserError where another process keeps it."""
        try:
            return FolderLock.acquire(folder, LOCK_SECONDS)
        except LockHeldError as error:
            raise UserError(f"{folder}: {error} is at this run; end it, then `lrpath submit` again") from None
        except OSError:
            return None

    def _wait_held(self) -> int:
        """Go back into the queue, held: the job that should have left the checkpoint ended without it."""
        reason = f"{self.task.parent} ended without its checkpoint of step {self.task.parent_step}"
        print(f"{self.task.key}: {reason}; `lrpath submit` again once that is mended")
        commands.set_comment(self.place.number, f"{MARK}held: {reason}")
        return leave(commands.requeue_held, self.place.number)

    def _attempt(self, chain: Chain) -> int:
        """One start of a training, and what follows from how it ends."""
        steps = Steps(self.spec, self.place, new_log(self.task.folder))
        steps.watch_signals()
        progress = Progress(self.task)
        words = ["--plan", str(self.pinned), "--paradigm", self.spec.paradigm, "--run", self.spec.run]
        words += ["--device", self.spec.device, *self.spec.words]
        steps.note(f"start {self.place.start + 1} of job {self.place.number}, on {self.place.nodes}")
        steps.note(f"{self.task.key} from step {progress.start} to step {self.task.run.last_step}")
        status = self._preflight(steps)
        if status == 0:
            status = steps.run(ENTRY_MODULE, words, lambda: self._look(chain, steps))
        self._look(chain, steps)
        return self._ended(steps, progress, chain, status)

    def _look(self, chain: Chain, steps: Steps) -> None:
        """Let branches start; what Slurm's commands do not manage now is tried again."""
        try:
            for entry in chain.release():
                steps.note(
                    f"checkpoint {entry.parent_step} is complete: {entry.key} (job {entry.number}) may start"
                )
        except UserError as error:
            steps.note(f"branches wait: {error}")

    def _preflight(self, steps: Steps) -> int:
        """Check the allocation, and record it; 0 or the status of the check."""
        from megatron_lrpath.launch.preflight import checkpoint_bytes

        found = steps.ranks / "preflight.json"
        status = 0
        if self.spec.preflight:
            steps.ranks.mkdir(parents=True, exist_ok=True)
            paths = [self.plan.data.slices, str(self.task.folder), self.spec.folder]
            needed = checkpoint_bytes(self.plan, self.task.run)
            words = ["--device", self.spec.device, "--needed", str(needed), "--write", str(found)]
            words += ["--", *paths]
            status = steps.run("megatron_lrpath.launch.preflight", words, lambda: None, PREFLIGHT_SECONDS)
        if status == 0:
            steps.ranks.mkdir(parents=True, exist_ok=True)
            steps.record(read_json_object(found) or {})
        return status

    def _ended(self, steps: Steps, progress: Progress, chain: Chain, status: int) -> int:
        failure: Failure | None = None
        if status == 0 and self.task.complete:
            ending = COMPLETE
        elif status == SAVED_AND_STOPPED or (steps.asked and status == 0):
            ending = SAVED
        else:
            problems = (read_json_object(steps.ranks / "preflight.json") or {}).get("problems")
            ending, failure = FAILED, Failure("; ".join(problems)) if problems else why(steps, status)
        attempt = Attempt(
            start=progress.start,
            step=progress.last_step(),
            checkpoint=progress.checkpoint(),
            ending=ending,
            cause=failure.text if failure else None,
            hopeless=self._hopeless(failure),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        file = self.ledger.attempts_file(self.place.number)
        verdict = judge(attempt, read_attempts(file))
        note_attempt(file, attempt)
        if failure:
            steps.note(f"lrpath: error: {verdict.reason or failure.text}")
        steps.note(f"{ending} at step {attempt.step} of {self.task.run.last_step}: {verdict.action}")
        if verdict.action == COMPLETE:
            return 0
        return self._again(steps) if verdict.action == REQUEUE else self._stop(chain, verdict.reason, steps)

    def _hopeless(self, failure: Failure | None) -> bool:
        """Whether another start would fail too; not where another plan has been submitted since this one began."""
        return failure is not None and failure.hopeless and current(Path(self.spec.plan)) == self.pinned

    def _again(self, steps: Steps) -> int:
        """Back into the queue, unless the job was cancelled or Slurm has put it there itself."""
        if self.ledger.cancel_mark(self.place.number).exists():
            steps.note("cancelled: not requeued")
            return 1
        if not commands.may_be_requeued(self.place.number):
            steps.note("Slurm is ending the job: not requeued from here")
            return 1
        return leave(commands.requeue, self.place.number)

    def _stop(self, chain: Chain, reason: str, steps: Steps) -> int:
        commands.set_comment(self.place.number, f"{MARK}stopped: {reason}")
        held = chain.hold_dependents(reason)
        if held:
            steps.note(f"held: {', '.join(f'{entry.key} (job {entry.number})' for entry in held)}")
        steps.note("mend the cause and call `lrpath submit` again: it goes on from the last checkpoint")
        return 1

    def _evaluate(self) -> int:
        """Evaluate the version's model."""
        if not self.task.complete:
            raise UserError(f"{self.task.key} is not trained up to step {self.task.run.last_step}")
        steps = Steps(self.spec, self.place, new_log(RunFolder(self.task.folder).evaluation_job))
        words = ["--plan", str(self.pinned), "--runs", self.task.key]
        words += ["--device", self.spec.device, *self.spec.words]
        status = steps.run("megatron_lrpath.evaluate.worker", words, lambda: None)
        return self._finish(steps, status)

    def _finish(self, steps: Steps, status: int) -> int:
        """Try a failed evaluation once more, then stop what waits for it."""
        if status == 0:
            return 0
        failure = why(steps, status)
        steps.note(f"lrpath: error: {failure.text}")
        if self.place.start == 0 and not self._hopeless(failure):
            return self._again(steps)
        return self._stop(Chain(self.ledger, self.spec.key, self.place.number, Path()), failure.text, steps)


def leave(requeue: Callable[[int], None], number: int) -> int:
    """Put this job back into the queue, upon which Slurm ends this process: at once, not after its grace time."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(SAVED_AND_STOPPED))
    requeue(number)
    time.sleep(60)
    return SAVED_AND_STOPPED


def main(words: list[str]) -> int:
    """`program.py SPEC`; a user's error is one message and status 2, and what waits for the job is held."""
    spec = Spec.read(Path(words[0]))
    place, ledger = Place.here(), Ledger(Path(spec.folder))
    if ledger.cancel_mark(place.number).exists():
        print("cancelled: nothing is started")
        return 1
    if spec.kind == "report":
        from megatron_lrpath.cli import main as lrpath

        return lrpath(["report", spec.plan])
    try:
        return Program.of(spec).carry_out()
    except UserError as error:
        print(f"lrpath: error: {error}", file=sys.stderr, flush=True)
        commands.set_comment(place.number, f"{MARK}stopped: {error}")
        Chain(ledger, spec.key, place.number, Path()).hold_dependents(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
