"""Run tasks on this machine: start tasks that can start, follow them, stop all at the first failure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lrpath.errors import FULL, refusal
from megatron_lrpath.exits import BAD_INPUT, FAILED, SAVED_AND_STOPPED
from megatron_lrpath.launch.display import PlainDisplay, PlanProgress, RunLine
from megatron_lrpath.launch.graph import Advance, next_task, seconds_left
from megatron_lrpath.launch.process import Process, Starter, new_log, stop_all, supervised
from megatron_lrpath.launch.resources import Share
from megatron_lrpath.launch.torchrun import Ranks
from megatron_lrpath.locks import FolderLock, LockHeldError, describe_owner, is_held
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.history import HistoryTail
from megatron_lrpath.runs.state import parent_available
from megatron_lrpath.runs.tasks import Task, link_aliases
from megatron_lrpath.wording import clock

GRACE_SECONDS = 40.0  # torchrun itself gives its workers 30
POLL_SECONDS = 0.1  # between polls of the processes
LOOK_SECONDS = 1.0  # between reads of the checkpoints, and between updates of the display
STARTUP_SECONDS = 15.0  # assumed until the first run of this call has logged a step


class RunFailedError(Exception):
    """A run failed; the text has its name, the cause, and the path of its log.

    `status` is the exit status: `BAD_INPUT` if the run's process ended with it.
    """

    def __init__(self, text: str, status: int = FAILED) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class RunProcess:
    """A run's process in this call. Its supervisor inherits the folder's lock, which therefore lasts as long
    as the run.

    `first` is the step that it starts from, `slot` its index among concurrent runs.
    """

    popen: Process
    log: Path
    slot: int
    first: int
    tail: HistoryTail
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls,
        task: Task,
        command: Ranks | Sequence[str],
        environment: Mapping[str, str],
        grace: float,
        slot: int,
        first: int,
        starter: Starter,
    ) -> RunProcess:
        """Start `command` for `task`; raise `LockHeldError` if another process trains this run."""
        tail = HistoryTail(task.folder)
        tail.poll()
        # waits, because a killed earlier call may still be ending its runs
        lock = FolderLock.acquire(task.folder, patience=grace)
        try:
            log = new_log(task.folder)
            error_file = RunFolder(task.folder).error
            failure.clear(error_file)
            environment = {**environment, failure.VARIABLE: str(error_file)}
            popen = starter(command, environment, grace, log, (lock.fileno(),))
        finally:
            lock.close()
        return cls(popen, log, slot, first, tail)


@dataclass
class TaskState:
    """The progress of a task.

    Attributes:
        step: the last step that was logged, or saved in a checkpoint.
        seconds: the time of a step; None if no step was timed.
        process: its process, if there is one.
        startup: seconds from the start of its process to the first step; None until that is logged.
        waits_for_room: whether a full disk has prevented its start.
    """

    task: Task
    step: int
    done: bool = False
    seconds: float | None = None
    process: RunProcess | None = None
    startup: float | None = None
    waits_for_room: bool = False

    @classmethod
    def read(cls, task: Task) -> TaskState:
        """Read the progress of earlier calls from the run's folder."""
        link_aliases(task)
        tail = HistoryTail(task.folder)
        tail.poll()
        done, kept = task.complete, complete_steps(task.checkpoints)
        state = cls(task, task.run.last_step, done, tail.seconds_per_step)
        if not done:
            state.reach(kept[-1] if kept else 0)
        return state

    def reach(self, step: int) -> None:
        """Record that the run is at `step`, limited to its first and last step."""
        self.step = min(max(step, self.task.run.first_step), self.task.run.last_step)

    def follow(self, process: RunProcess) -> int | None:
        """Read the new log entries of its process; return the exit status, None while it runs."""
        status, tail = (
            process.popen.poll(),
            process.tail,
        )  # polled before the history is read, so that the last entries are included
        if tail.poll() and tail.last and tail.last.step > process.first:
            if self.startup is None:
                self.startup = time.monotonic() - process.started
            self.reach(tail.last.step)
            self.seconds = tail.seconds_per_step or self.seconds or 1.0
        return status

    def advance(self, seconds: float, startup: float) -> Advance:
        """Return the progress for the schedule; `seconds` per step and `startup` are defaults for missing
        measurements.
        """
        waited = time.monotonic() - self.process.started if self.process else 0.0
        return Advance(
            step=self.step,
            done=self.done,
            running=self.process is not None,
            startup=0.0 if self.startup is not None else max(0.0, startup - waited),
            seconds=self.seconds or seconds,
        )

    def line(self, tail: HistoryTail) -> RunLine:
        """Return the progress for the display."""
        run, last, pace = self.task.run, tail.last, tail.seconds_per_step
        parts = [f"loss {last.loss:.4f}"] if last and last.loss is not None else []
        parts += [f"rate {last.lr:.3e}"] if last and last.lr is not None else []
        parts += [f"{pace:.3g} s/step"] if pace else []
        numbers = "  ".join(parts) if self.startup is not None else "starting"
        return RunLine(self.task.key, self.step, run.first_step, run.last_step, numbers)


@dataclass
class Runner:
    """Runs `tasks` (parents before children).

    `command_for(task)` returns the command of one run; its progress is read from the files in the run's
    folder (history, checkpoints, result) only. `grace` is in seconds; `starter` starts a command.
    """

    name: str
    tasks: Sequence[Task]
    share: Share
    command_for: Callable[[Task], Ranks | Sequence[str]]
    display: PlainDisplay
    grace: float = GRACE_SECONDS
    starter: Starter = supervised
    states: dict[str, TaskState] = field(default_factory=dict)
    _finish: float = 0.0
    _finish_known_until: float = 0.0

    def run(self) -> None:
        """Run the remaining tasks.

        Raise `RunFailedError` at the first failure. In all cases no process of a run is left.
        """
        self.states = {task.key: TaskState.read(task) for task in self.tasks}
        try:
            next_look = 0.0
            while not all(state.done for state in self.states.values()):
                ended = self._follow()
                if ended or time.monotonic() >= next_look:
                    self._start_ready()
                    self.display.update(self._progress())
                    next_look = time.monotonic() + LOOK_SECONDS
                time.sleep(POLL_SECONDS)
        finally:
            active = self._active()
            if active:
                try:
                    self.display.event(f"ending {', '.join(active)}")
                finally:  # also if nothing can be printed
                    stop_all([process.popen for process in active.values()], self.grace)

    def _progress(self) -> PlanProgress:
        states = self.states.values()
        total = sum(task.run.last_step - task.run.first_step for task in self.tasks)
        done = sum(state.step - state.task.run.first_step for state in states)
        lines = [state.line(state.process.tail) for state in states if state.process]
        return PlanProgress(self.name, done, total, self._time_left(), lines)

    def _active(self) -> dict[str, RunProcess]:
        return {key: state.process for key, state in self.states.items() if state.process}

    def _time_left(self) -> float | None:
        """Return the seconds until all tasks are done; None if no step was timed. Recomputed every few
        seconds.
        """
        if all(state.seconds is None for state in self.states.values()):
            return None
        now = time.monotonic()
        if now >= self._finish_known_until:
            self._finish = now + seconds_left(self.tasks, self._advances(), self.share.jobs)
            # the simulation takes a while for a plan of hundreds of runs
            self._finish_known_until = now + max(2.0, 50 * (time.monotonic() - now))
        return max(0.0, self._finish - now)

    def _start_ready(self) -> None:
        def available(task: Task) -> bool:
            parent = self.states.get(task.parent or "")
            return parent_available(task, parent.task.folder if parent else None)

        while len(self._active()) < self.share.jobs:
            task = next_task(self.tasks, self._advances(), available)
            if task is None:
                break
            state = self.states[task.key]
            try:
                self._start(state)
            except OSError as error:
                if error.errno not in FULL or not self._active():
                    raise
                if not state.waits_for_room:  # running trainings continue; reported once
                    state.waits_for_room = True
                    self.display.event(f"{task.key}: waits for room on the disk ({refusal(error)})")
                break
        if not self._active() and not all(state.done for state in self.states.values()):
            raise RunFailedError(self._why_stuck())

    def _start(self, state: TaskState) -> None:
        task = state.task
        if is_held(task.folder):
            self.display.event(f"{task.key}: waiting for {describe_owner(task.folder)} to let go of it")
        taken = {process.slot for process in self._active().values()}
        slot = next(number for number in range(self.share.jobs) if number not in taken)
        command, variables = self.command_for(task), self.share.environment(slot)
        try:
            state.process = RunProcess.start(
                task, command, variables, self.grace, slot, state.step, self.starter
            )
        except LockHeldError as error:
            raise RunFailedError(f"{task.key} is already being trained by {error}") from None
        where = f" from step {state.step}" if state.step else ""
        self.display.event(f"{task.key}: started{where}, to step {task.run.last_step}")

    def _follow(self) -> bool:
        """Read the progress of the active runs and remove the ended ones; return whether any has ended."""
        ended = False
        for state in self.states.values():
            process = state.process
            status = state.follow(process) if process else None
            if process and status is not None:
                state.process = None
                self._ended(state, process, status)
                ended = True
        return ended

    def _ended(self, state: TaskState, process: RunProcess, status: int) -> None:
        task = state.task
        if status != 0 or not task.complete:
            log = process.log if process.log.exists() else "none; the process ended before it created one"
            raise RunFailedError(
                f"{task.key} failed at step {state.step} of {task.run.last_step}: {cause(task, status)}\n"
                f"  log: {log}\n"
                f"  {how_to_go_on(task, status)}",
                BAD_INPUT if status == BAD_INPUT else FAILED,
            )
        state.done, state.step = True, task.run.last_step
        took = clock(time.monotonic() - process.started)
        last = process.tail.last
        loss = f", loss {last.loss:.4f}" if last and last.loss else ""
        self.display.event(f"{task.key}: complete at step {task.run.last_step} in {took}{loss}")

    def _why_stuck(self) -> str:
        task = next(state.task for state in self.states.values() if not state.done)
        parent = next(other for other in self.tasks if other.key == task.parent)
        kept = ", ".join(map(str, complete_steps(parent.checkpoints))) or "none"
        return (
            f"{task.key} starts from the checkpoint of {task.parent} at step {task.parent_step}, "
            f"which is not there (complete ones in {parent.checkpoints}: {kept}). If the plan's versions "
            "or alpha have changed, give it a new output; "
            f"else remove {parent.folder} to train {task.parent} again"
        )

    def _advances(self) -> dict[str, Advance]:
        """Return the tasks for the schedule; a run that has not begun gets the mean of the known paces."""
        known = [state.seconds for state in self.states.values() if state.seconds is not None]
        seconds = statistics.fmean(known) if known else 1.0
        startups = [state.startup for state in self.states.values() if state.startup is not None]
        startup = statistics.fmean(startups) if startups else STARTUP_SECONDS
        return {key: state.advance(seconds, startup) for key, state in self.states.items()}


def how_to_go_on(task: Task, status: int) -> str:
    """Return what to do after a run's process ended with `status` before the run was complete."""
    found = failure.read(RunFolder(task.folder).error) if status not in (0, SAVED_AND_STOPPED) else None
    if status == BAD_INPUT or (found is not None and found.calling_again_helps is False):
        return failure.NO_USE
    return "call the same command again to continue from the last checkpoints"


def cause(task: Task, status: int) -> str:
    """Return why a run's process ended with `status` before the run was complete."""
    if status == 0:
        return "its process ended before the run was complete"
    if status < 0:
        return f"its supervising process was killed by signal {-status}"
    if status == SAVED_AND_STOPPED:
        return "a signal asked it to stop, and it has saved"
    found = failure.read(RunFolder(task.folder).error)
    return found.message if found else f"exit status {status}"
