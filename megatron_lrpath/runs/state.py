"""The state of a run as shown by `lrpath status`, the report and the launchers, read from its folder only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from megatron_lrpath.locks import is_held
from megatron_lrpath.plan import Run
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.checkpoints import checkpoint_complete, complete_steps
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.history import HistoryTail, LoggedStep
from megatron_lrpath.runs.results import completed_step, is_complete
from megatron_lrpath.runs.tasks import Task

FRESH_SECONDS = 30.0  # without a lock file (started by hand) a run with a newer history counts as running


def has_begun(task: Task) -> bool:
    """Return whether the task would resume from a checkpoint of its own."""
    return bool(complete_steps(task.checkpoints))


def parent_available(task: Task, parent_folder: Path | None) -> bool:
    """Return whether the task can start: its own checkpoint exists, or the parent's at the branch point."""
    if parent_folder is None or has_begun(task):
        return True
    return checkpoint_complete(RunFolder(parent_folder).checkpoints, task.parent_step)


@dataclass(frozen=True)
class RunState:
    """The progress of a run.

    `state`: done, running, interrupted, extended (complete up to `step`, but the plan got longer),
    waiting, or not started. `complete` is `results.is_complete`. `step` is the last logged step, the first
    step if there is none, and the last step of a run that is done. `logged` is the last line of the
    history, without numbers if there is none. `beyond` is the step that a main path has reached beyond its
    plan; None for other runs. For an interrupted run, `cause` is the content of its failure file, None
    without one, and `log` the newest log.
    """

    run: Run
    state: str
    complete: bool
    step: int
    logged: LoggedStep
    seconds_per_step: float | None
    checkpoints: list[int]
    waiting_for: str | None = None
    cause: str | None = None
    log: Path | None = None
    beyond: int | None = None

    @property
    def progress(self) -> str:
        """`complete`, `not started`, or the current step."""
        if self.complete:
            return "complete"
        if self.step <= self.run.first_step:
            return "not started"
        return f"at step {self.step:,} of {self.run.last_step:,}"


def read_state(folder: Path, run: Run, parent: Task | None = None) -> RunState:
    """Return the state of the run with files in `folder`; nothing is written.

    `parent` is the task whose checkpoint the run starts from; without it a run is never `waiting`.
    """
    tail = HistoryTail(folder)
    tail.poll()
    last, finished, complete = tail.last, completed_step(folder), is_complete(folder, run)
    step = last.step if last else finished or run.first_step
    checkpoints = complete_steps(RunFolder(folder).checkpoints)
    waiting_for = cause = log = None
    if is_live(folder, tail.seconds_per_step or 0.0):
        state = "running"
    elif complete:
        state, step = "done", run.last_step
    elif finished is not None:
        state = "extended"
    elif last or latest_log(folder) or any(one > run.first_step for one in checkpoints):
        found = failure.read(RunFolder(folder).error)
        state, cause, log = "interrupted", found.message if found else None, latest_log(folder)
    elif parent and run.parent and not checkpoint_complete(parent.checkpoints, run.parent.step):
        state, waiting_for = "waiting", f"{parent.key} at step {run.parent.step}"
    else:
        state = "not started"
    return RunState(
        run=run,
        state=state,
        complete=complete,
        step=step,
        logged=last or LoggedStep(run.first_step),
        seconds_per_step=tail.seconds_per_step,
        checkpoints=checkpoints,
        waiting_for=waiting_for,
        cause=cause,
        log=log,
        beyond=finished if complete and finished != run.last_step else None,
    )


def is_live(folder: Path, seconds_per_step: float = 0.0) -> bool:
    """Return whether a process trains in `folder`: it holds the lock, or writes the history without one."""
    if RunFolder(folder).lock.exists():
        return is_held(folder)
    try:
        age = time.time() - RunFolder(folder).history.stat().st_mtime
    except OSError:
        return False
    return age < max(FRESH_SECONDS, 5 * seconds_per_step) and completed_step(folder) is None


def latest_log(folder: Path) -> Path | None:
    """Return the newest log of the run by its name, which is the time of its start."""
    return max(RunFolder(folder).logs.glob("*.log"), default=None)
