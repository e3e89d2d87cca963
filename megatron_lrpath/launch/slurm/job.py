"""The program of a batch script on the first node of its allocation: one start of one job of a plan."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from megatron_lrpath.console import say_error
from megatron_lrpath.errors import UserError
from megatron_lrpath.exits import BAD_INPUT, SAVED_AND_STOPPED, leave_at_once
from megatron_lrpath.launch.process import new_log, only_one
from megatron_lrpath.launch.slurm import queue as commands
from megatron_lrpath.launch.slurm.compare import never_starts
from megatron_lrpath.launch.slurm.jobs import REPORT, Spec, rank_command, report_command
from megatron_lrpath.launch.slurm.ledger import (
    COMPLETE,
    FAILED,
    MARK,
    REQUEUE,
    SAVED,
    Attempt,
    Ledger,
    SubmittedJob,
    conclude,
    current,
    dependents,
    note_attempt,
    read_attempts,
)
from megatron_lrpath.launch.slurm.notify import DONE, HELD, notify
from megatron_lrpath.launch.slurm.notify import FAILED as FOR_GOOD
from megatron_lrpath.launch.slurm.steps import Place, Steps, cause
from megatron_lrpath.launch.slurm.stop import BY_USR2, StopRequest
from megatron_lrpath.plan import PARADIGMS, Plan, load_plan
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.checkpoints import checkpoint_complete, latest_step
from megatron_lrpath.runs.folder import RunFolder, read_json_object
from megatron_lrpath.runs.history import HistoryTail
from megatron_lrpath.runs.state import parent_available
from megatron_lrpath.runs.storage import checkpoint_bytes
from megatron_lrpath.runs.tasks import Task, build_tasks, link_aliases

LOCK_SECONDS = 120.0  # an earlier start of the job may still be ending on another node
PREFLIGHT_SECONDS = 600.0
EARLY_SECONDS = 90  # Slurm's signal arrives up to 60 s early
PREFLIGHT = "megatron_lrpath.launch.preflight"


@dataclass
class Chain:
    """The jobs that wait for job `number`, which trains `key` into `checkpoints`."""

    ledger: Ledger
    key: str
    number: int
    checkpoints: Path
    _released: set[int] = field(default_factory=set)

    def release(self) -> list[SubmittedJob]:
        """Release the branches whose checkpoint is complete, and return them.

        Each release is retried until it succeeds: if the controller does not answer, the next call
        retries, and a branch starts at the latest when this job ends.
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

    def hold_dependents(self, reason: str) -> list[SubmittedJob]:
        """Hold the jobs that cannot start because this job stops; branches whose checkpoint exists continue.

        The report does not wait for held jobs: it lists what is missing.
        """
        entries = self.ledger.entries()
        spared = {
            entry.number
            for entry in entries
            if entry.parent == self.key and checkpoint_complete(self.checkpoints, entry.parent_step)
        }
        queue = commands.queue()
        waiting = {number for number, job in queue.items() if job.state == "PENDING"}
        concerned = dependents([entry for entry in entries if entry.number not in spared], self.number)
        held = [entry for entry in concerned if entry.number in waiting and entry.key != REPORT]
        for entry in held:
            commands.hold(entry.number, f"{MARK}held: {self.key} (job {self.number}) stopped: {reason}")
        numbers = {entry.number for entry in held}
        for entry in entries:
            if entry.key == REPORT and entry.number in waiting and numbers.intersection(entry.depends):
                coming = [one for one in entry.depends if one in queue and one not in numbers]
                commands.wait_for([one for one in coming if not never_starts(queue[one])], entry.number)
        return held


@dataclass(frozen=True)
class JobStart:
    """A start of a job: its spec, the last submitted plan (`pinned`: its file), its folder and run.

    `parent` is the training that its run starts from.
    """

    spec: Spec
    pinned: Path
    plan: Plan
    place: Place
    task: Task
    parent: Task | None
    asked: StopRequest

    @classmethod
    def of(cls, spec: Spec, asked: StopRequest) -> JobStart:
        """Return the start of a spec in the job of this process. Raise UserError if the plan no longer has
        its run.
        """
        pinned = current(Path(spec.plan))
        plan = load_plan(pinned)
        tasks = {(task.run.paradigm, task.run.name): task for task in build_tasks(plan, PARADIGMS)}
        task = tasks.get((spec.paradigm, spec.run))
        if task is None:
            raise UserError(f"{spec.key}: the plan that was submitted last has no such run any more")
        parent = next((other for other in tasks.values() if other.key == task.parent), None)
        return cls(spec, pinned, plan, Place.here(), task, parent, asked)

    @property
    def ledger(self) -> Ledger:
        """The submission of this plan."""
        return Ledger(Path(self.spec.folder))

    def steps(self, folder: Path) -> Steps:
        """Return the sruns of this start, which log into `folder`."""
        return Steps(self.spec, self.place, new_log(folder), RunFolder(folder).error, self.asked)

    def met_its_limit(self) -> bool:
        """Return whether the job was asked to stop because of its time limit; False if Slurm does not answer."""
        left = commands.seconds_left(self.place.number)
        if left is None:
            return False
        at_request = left + (time.monotonic() - self.asked.when if self.asked.received else 0.0)
        return at_request <= self.spec.signal_seconds + EARLY_SECONDS

    def is_hopeless(self, found: failure.Failure | None) -> bool:
        """Return whether another start would fail, too; False if another plan has been submitted since this
        start.
        """
        if found is None or found.calling_again_helps is not False:
            return False
        return current(Path(self.spec.plan)) == self.pinned

    def again(self, steps: Steps) -> int:
        """Requeue the job, unless it was cancelled or Slurm has requeued it itself."""
        if self.ledger.cancel_mark(self.place.number).exists():
            steps.note("cancelled: not requeued")
            return 1
        if not commands.may_be_requeued(self.place.number):
            steps.note("Slurm is ending the job: not requeued from here")
            return 1
        mark = self.ledger.requeue_mark(self.place.number)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        return leave("requeue", self.place.number)

    def stop(self, steps: Steps, chain: Chain, reason: str) -> int:
        """Stop permanently: record the reason, and hold the jobs that wait for this one."""
        commands.set_comment(self.place.number, f"{MARK}stopped: {reason}")
        held = chain.hold_dependents(reason)
        if held:
            steps.note(f"held: {', '.join(f'{entry.key} (job {entry.number})' for entry in held)}")
        steps.note("fix the cause and call `lrpath submit` again: it continues from the last checkpoint")
        notify(self.spec.notify, FOR_GOOD, self.spec.key, reason)
        return 1


def train(start: JobStart) -> int:
    """Train the run, unless it is complete or its parent's checkpoint is missing; return the batch script's
    exit status.
    """
    chain = Chain(start.ledger, start.spec.key, start.place.number, start.task.checkpoints)
    if start.task.complete:
        print(f"{start.task.key}: complete at step {start.task.run.last_step} already")
        chain.release()
        return 0
    if not parent_available(start.task, start.parent.folder if start.parent else None):
        reason = f"{start.task.parent} ended without its checkpoint of step {start.task.parent_step}"
        print(f"{start.task.key}: {reason}; `lrpath submit` again once that is fixed")
        commands.set_comment(start.place.number, f"{MARK}held: {reason}")
        notify(start.spec.notify, HELD, start.spec.key, reason)
        return leave("requeuehold", start.place.number)
    link_aliases(start.task)
    doing = "is already training this run; stop it, then `lrpath submit` again"
    with only_one(start.task.folder, doing, LOCK_SECONDS, without_locks=True):
        return TrainingStart(start, chain).carry_out()


class TrainingStart:
    """A start of a training, created before it: its sruns, its progress, and the jobs that wait for it."""

    def __init__(self, start: JobStart, chain: Chain) -> None:
        self.start = start
        self.chain = chain
        self.steps = start.steps(start.task.folder)
        self._history_before = self._history_state()
        self.first = self.checkpoint()  # the step that it starts from

    def checkpoint(self) -> int:
        """Return the newest complete checkpoint's step; the run's first step if there is none."""
        return max(latest_step(self.start.task.checkpoints) or 0, self.start.task.run.first_step)

    def last_step(self) -> int:
        """Return the last step that this start has logged, or the step that it started from."""
        if self._history_state() == self._history_before:
            return self.first  # the history has only rows of earlier starts
        tail = HistoryTail(self.start.task.folder)
        tail.poll()
        return max(tail.last.step, self.first) if tail.last else self.first

    def _history_state(self) -> tuple[int, int, int]:
        try:
            about = RunFolder(self.start.task.folder).history.stat()
        except OSError:
            return (0, 0, 0)
        return about.st_ino, about.st_size, about.st_mtime_ns

    def carry_out(self) -> int:
        """Check the allocation, train, and handle the end of the training; return the batch script's exit
        status.
        """
        start, steps = self.start, self.steps
        spec, last_step = start.spec, start.task.run.last_step
        steps.note(f"start {start.place.start + 1} of job {start.place.number}, on {start.place.nodes}")
        steps.note(f"{start.task.key} from step {self.first} to step {last_step}")
        status = self.preflight()
        if status == 0:
            status = steps.run(*rank_command(spec, str(start.pinned), start.task.key), self.look)
        self.look()
        return self.conclude(status)

    def look(self) -> None:
        """Release branches; failures of Slurm's commands are retried later."""
        try:
            for entry in self.chain.release():
                done = f"checkpoint {entry.parent_step} is complete"
                self.steps.note(f"{done}: {entry.key} (job {entry.number}) may start")
        except UserError as error:
            self.steps.note(f"branches wait: {error}")

    def preflight(self) -> int:
        """Check the allocation and record it; return 0 or the status of the check."""
        start, steps, spec = self.start, self.steps, self.start.spec
        found = steps.ranks / "preflight.json"
        status = 0
        steps.ranks.mkdir(parents=True, exist_ok=True)
        if spec.preflight:
            needed = checkpoint_bytes(start.plan, start.task.run)
            argv = ["--device", spec.device, "--needed", str(needed), "--write", str(found)]
            if not start.task.run.is_sft:  # a fine-tuning needs only the checkpoint that it starts from
                argv += ["--plan", str(start.pinned), "--arguments", json.dumps(spec.arguments)]
            argv += ["--", start.plan.data.slices, str(start.task.folder), spec.folder]
            status = steps.run(PREFLIGHT, argv, lambda: None, PREFLIGHT_SECONDS)
        if status == 0:
            steps.record(read_json_object(found) or {})
        return status

    def conclude(self, status: int) -> int:
        """Record the end of this start, and requeue or stop; return the batch script's exit status."""
        start, steps = self.start, self.steps
        ending, found = self.judge(status)
        attempt = Attempt(
            start=self.first,
            step=self.last_step(),
            checkpoint=self.checkpoint(),
            ending=ending,
            cause=found.message if found else None,
            hopeless=start.is_hopeless(found),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            at_limit=ending == SAVED and start.met_its_limit(),
        )
        file = start.ledger.attempts_file(start.place.number)
        conclusion = conclude(attempt, read_attempts(file))
        note_attempt(file, replace(attempt, stopped=conclusion.reason))
        if conclusion.reason and not found:
            found = failure.here(failure.STOPPED, conclusion.reason)
        if found:
            reason = conclusion.reason or found.message
            failure.replace(steps.error_file, replace(found, message=reason))
            steps.note(f"lrpath: error: {reason}")
        steps.note(f"{attempt.said(start.task.run.last_step)}: {conclusion.action}")
        if conclusion.action == COMPLETE:
            return 0
        if conclusion.action == REQUEUE:
            return start.again(steps)
        return start.stop(steps, self.chain, conclusion.reason)

    def judge(self, status: int) -> tuple[str, failure.Failure | None]:
        """Return how this start ended (complete, saved or failed) and why it failed, from srun's status.

        Effects of the request to stop are not failures: a process that the signal ended during its start, or
        ranks that miss a rank that has left.
        """
        steps, asked = self.steps, bool(self.start.asked.received)
        if self.start.task.complete and status in (0, SAVED_AND_STOPPED):
            return COMPLETE, None
        if status == SAVED_AND_STOPPED or status in BY_USR2 or (asked and status == 0):
            return SAVED, None
        found = cause(steps, status)
        if asked and self.last_step() == self.first and found.may_follow_from_a_stop:
            return SAVED, None
        return FAILED, found


def evaluate(start: JobStart) -> int:
    """Evaluate the version's model, with one retry after a failure; return the batch script's exit status."""
    task, spec = start.task, start.spec
    if not task.complete:
        raise UserError(f"{task.key} is not trained up to step {task.run.last_step}")
    steps = start.steps(RunFolder(task.folder).evaluation_job)
    status = steps.run(*rank_command(spec, str(start.pinned), task.key), lambda: None)
    if status == 0:
        return 0
    if status == SAVED_AND_STOPPED or status in BY_USR2:
        return start.again(steps)
    found = cause(steps, status)
    failure.replace(steps.error_file, found)
    steps.note(f"lrpath: error: {found.message}")
    if start.place.start == 0 and not start.is_hopeless(found):
        return start.again(steps)
    return start.stop(steps, Chain(start.ledger, spec.key, start.place.number, Path()), found.message)


def report(spec: Spec) -> int:
    """Write the report; return the batch script's exit status."""
    status = subprocess.call(report_command(spec.plan))
    if status == 0:
        notify(spec.notify, DONE, spec.key, f"the report of {spec.plan} is written")
    else:
        notify(spec.notify, FOR_GOOD, spec.key, f"no report of {spec.plan}: status {status}")
    return status


def leave(how: str, number: int) -> int:
    """Requeue this job; Slurm then ends this process immediately, without the grace period.

    `how` is scontrol's `requeue` or `requeuehold`.
    """
    signal.signal(signal.SIGTERM, lambda *_: leave_at_once(SAVED_AND_STOPPED))
    commands.call("scontrol", how, str(number))
    time.sleep(60)
    return SAVED_AND_STOPPED


def main(argv: list[str]) -> int:
    """Run `job.py SPEC`; report a user's error in one message with status 2, and hold the jobs that wait for
    this one.
    """
    try:
        spec = Spec.read(Path(argv[0]))
    except UserError as error:
        say_error(error)
        return BAD_INPUT
    place, ledger = Place.here(), Ledger(Path(spec.folder))
    ledger.requeue_mark(place.number).unlink(missing_ok=True)
    if ledger.cancel_mark(place.number).exists():
        print("cancelled: nothing is started")
        return 1
    asked = StopRequest(ledger.signals_file(place.number, place.start))
    if spec.kind == REPORT:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a report has nothing to save, and ends soon
        return report(spec)
    asked.watch()
    try:
        start = JobStart.of(spec, asked)
        return train(start) if spec.kind == "train" else evaluate(start)
    except UserError as error:
        print(f"lrpath: error: {error}", file=sys.stderr, flush=True)
        commands.set_comment(place.number, f"{MARK}stopped: {error}")
        Chain(ledger, spec.key, place.number, Path()).hold_dependents(str(error))
        notify(spec.notify, FOR_GOOD, spec.key, str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
