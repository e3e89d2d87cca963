"""Carries out tasks on this machine: starts what can start, follows it, stops all at the first failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_lrpath.errors import FULL, refusal
from megatron_lrpath.launch.display import Display, RunLine, Snapshot, clock
from megatron_lrpath.launch.graph import Advance, next_task, seconds_left
from megatron_lrpath.launch.process import RunProcess, stop_all
from megatron_lrpath.launch.resources import Share
from megatron_lrpath.locks import LockHeldError, describe_owner, is_held
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.runs.failure import find_cause
from megatron_lrpath.runs.history import HistoryTail
from megatron_lrpath.runs.state import parent_available
from megatron_lrpath.runs.tasks import Task, link_aliases

GRACE_SECONDS = 40.0  # torchrun itself gives its workers 30
POLL_SECONDS = 0.1  # between looks at the processes
LOOK_SECONDS = 1.0  # between looks at the checkpoints, and between updates of the display
STARTUP_SECONDS = 15.0  # guess before the first run of this call has logged a step


class RunFailedError(Exception):
    """A run did not come to its end; the text says which, why, and where its log lies."""


@dataclass
class Active:
    """A run under way in this call, from step `start` on; `begun` is False until its process logs a step."""

    process: RunProcess
    tail: HistoryTail
    start: int
    begun: bool = False


@dataclass
class Runner:
    """Carries out `tasks` (parents before children).

    `command_for(task)` is the command of one run; what it writes into the run's folder (history,
    checkpoints, result) is all that is known of its progress. `grace` is in seconds.
    """

    name: str
    tasks: Sequence[Task]
    share: Share
    command_for: Callable[[Task], Sequence[str]]
    display: Display
    grace: float = GRACE_SECONDS
    _active: dict[str, Active] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)
    _pace: dict[str, float] = field(default_factory=dict)
    _startups: list[float] = field(default_factory=list)
    _refused: set[str] = field(default_factory=set)
    _finish: float = 0.0
    _left_until: float = 0.0

    def run(self) -> list[Task]:
        """Carry out what is left to do and return the tasks that this call completed.

        Raises `RunFailedError` at the first failure. However it ends, no process of a run is left.
        """
        self._look()
        before = set(self._done)
        try:
            next_look = 0.0
            while len(self._done) < len(self.tasks):
                ended = self._follow()
                if ended or time.monotonic() >= next_look:
                    self._start_ready()
                    self.display.update(self.snapshot())
                    next_look = time.monotonic() + LOOK_SECONDS
                time.sleep(POLL_SECONDS)
        finally:
            if self._active:
                try:
                    self.display.event(f"ending {', '.join(self._active)}")
                finally:  # also where nothing can be printed
                    stop_all([active.process for active in self._active.values()], self.grace)
        return [task for task in self.tasks if task.key not in before]

    def snapshot(self) -> Snapshot:
        """How far everything has come."""
        total = sum(task.run.last_step - task.run.first_step for task in self.tasks)
        done = sum(self._steps[task.key] - task.run.first_step for task in self.tasks)
        lines = [self._line(active) for active in self._active.values()]
        return Snapshot(self.name, done, total, self._time_left(), lines)

    def _time_left(self) -> float | None:
        """Seconds until all is done, None while no step has been timed. Worked out anew every few seconds."""
        now = time.monotonic()
        if self._pace and now >= self._left_until:
            self._finish = now + seconds_left(self.tasks, self._advances(), self.share.jobs)
            # a plan of hundreds of runs takes a while to play through
            self._left_until = now + max(2.0, 50 * (time.monotonic() - now))
        return max(0.0, self._finish - now) if self._pace else None

    def _look(self) -> None:
        """Read from the folders what earlier calls have done."""
        for task in self.tasks:
            link_aliases(task)
            tail = HistoryTail(task.folder)
            tail.poll()
            if task.complete:
                self._done.add(task.key)
                self._steps[task.key] = task.run.last_step
            else:
                kept = complete_steps(task.checkpoints)
                self._steps[task.key] = _within(task, kept[-1] if kept else task.run.first_step)
            if tail.seconds_per_step:
                self._pace[task.key] = tail.seconds_per_step

    def _start_ready(self) -> None:
        while len(self._active) < self.share.jobs:
            task = next_task(self.tasks, self._advances(), self._available)
            if task is None:
                break
            try:
                self._start(task)
            except OSError as error:
                if error.errno not in FULL or not self._active:
                    raise
                self._say_full(task, error)
                break
        if not self._active and len(self._done) < len(self.tasks):
            raise RunFailedError(self._why_stuck())

    def _say_full(self, task: Task, error: OSError) -> None:
        """A full disk keeps a run from starting, and those that train go on: say so once."""
        if task.key not in self._refused:
            self._refused.add(task.key)
            self.display.event(f"{task.key}: waits for room on the disk ({refusal(error)})")

    def _start(self, task: Task) -> None:
        if is_held(task.folder):
            self.display.event(f"{task.key}: waiting for {describe_owner(task.folder)} to let go of it")
        taken = {active.process.slot for active in self._active.values()}
        slot = next(number for number in range(self.share.jobs) if number not in taken)
        tail = HistoryTail(task.folder)
        tail.poll()
        try:
            command, variables = self.command_for(task), self.share.environment(slot)
            # patient, since an earlier call that was killed may still be ending its runs
            process = RunProcess.start(task, command, variables, self.grace, slot, patience=self.grace)
        except LockHeldError as error:
            raise RunFailedError(f"{task.key} is already being trained by {error}") from None
        self._active[task.key] = Active(process, tail, self._steps[task.key])
        where = f" from step {self._steps[task.key]}" if self._steps[task.key] else ""
        self.display.event(f"{task.key}: started{where}, to step {task.run.last_step}")

    def _follow(self) -> bool:
        """Read what the active runs have logged, and take leave of those that have ended: whether any has."""
        ended = False
        for key, active in list(self._active.items()):
            status = active.process.poll()  # before the history: what it logged last is then read
            if active.tail.poll() and active.tail.last and active.tail.last.step > active.start:
                if not active.begun:
                    self._startups.append(time.monotonic() - active.process.started)
                active.begun = True
                self._steps[key] = _within(active.process.task, active.tail.last.step)
                self._pace[key] = active.tail.seconds_per_step or self._pace.get(key, 1.0)
            if status is not None:
                del self._active[key]
                self._ended(active, status)
                ended = True
        return ended

    def _ended(self, active: Active, status: int) -> None:
        task = active.process.task
        took = clock(time.monotonic() - active.process.started)
        if status == 0 and task.complete:
            self._done.add(task.key)
            self._steps[task.key] = task.run.last_step
            loss = f", loss {active.tail.last.loss:.4f}" if active.tail.last and active.tail.last.loss else ""
            self.display.event(f"{task.key}: complete at step {task.run.last_step} in {took}{loss}")
            return
        at = f"at step {self._steps[task.key]} of {task.run.last_step}"
        if status == 0:
            cause: str | None = "its process ended before the run was complete"
        elif status < 0:
            cause = f"its supervising process was killed by signal {-status}"
        else:
            cause = find_cause(active.process.log)
        raise RunFailedError(
            f"{task.key} failed {at}: {cause or f'exit status {status}'}\n"
            f"  log: {active.process.log}\n"
            "  call the same command again to go on from the last checkpoints"
        )

    def _why_stuck(self) -> str:
        task = next(task for task in self.tasks if task.key not in self._done)
        parent = next(other for other in self.tasks if other.key == task.parent)
        kept = ", ".join(map(str, complete_steps(parent.checkpoints))) or "none"
        return (
            f"{task.key} starts from the checkpoint of {task.parent} at step {task.parent_step}, "
            f"which is not there (complete ones in {parent.checkpoints}: {kept}). If the plan's versions "
            "or alpha have changed, give it a new output; "
            f"else remove {parent.folder} to train {task.parent} again"
        )

    def _available(self, task: Task) -> bool:
        parent = next((other for other in self.tasks if other.key == task.parent), None)
        return parent_available(task, parent.folder if parent else None)

    def _advances(self) -> dict[str, Advance]:
        """The tasks as the scheduler sees them; the pace of a run not begun is the mean of those known."""
        pace = sum(self._pace.values()) / len(self._pace) if self._pace else 1.0
        startup = sum(self._startups) / len(self._startups) if self._startups else STARTUP_SECONDS
        advances = {}
        for task in self.tasks:
            active = self._active.get(task.key)
            waited = time.monotonic() - active.process.started if active else 0.0
            advances[task.key] = Advance(
                step=self._steps[task.key],
                done=task.key in self._done,
                running=active is not None,
                startup=0.0 if active and active.begun else max(0.0, startup - waited),
                seconds=self._pace.get(task.key, pace),
            )
        return advances

    def _line(self, active: Active) -> RunLine:
        task, last = active.process.task, active.tail.last
        return RunLine(
            key=task.key,
            step=self._steps[task.key],
            first_step=task.run.first_step,
            last_step=task.run.last_step,
            loss=last.loss if last else None,
            lr=last.lr if last else None,
            seconds_per_step=active.tail.seconds_per_step,
            training=active.begun,
        )


def _within(task: Task, step: int) -> int:
    """`step`, kept inside the run's first and last step."""
    return min(max(step, task.run.first_step), task.run.last_step)
