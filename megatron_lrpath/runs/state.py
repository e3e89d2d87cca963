"""What a run's folder says about it: how far it has come, whether it is complete, whether it is running."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.locks import LOCK_NAME, is_held
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.checkpoints import checkpoint_complete, complete_steps
from megatron_lrpath.runs.tasks import Task

TAIL_BYTES = 64 * 1024
FRESH_SECONDS = 30.0  # without a lock file (started by hand) a run with a younger history is taken as running


@dataclass(frozen=True)
class LoggedStep:
    """One line of `history.jsonl`; numbers that it does not hold are None. `seconds` is per step."""

    step: int
    lr: float | None = None
    loss: float | None = None
    seconds: float | None = None
    mfu: float | None = None


class HistoryTail:
    """Follows a `history.jsonl` from its last lines on, while another process writes it."""

    def __init__(self, path: Path, window: int = 50) -> None:
        self.path = path
        self.last: LoggedStep | None = None
        self._times: deque[float] = deque(maxlen=window)
        self._offset: int | None = None
        self._inode = 0
        self._rest = b""

    @property
    def seconds_per_step(self) -> float | None:
        """The median over the last lines, None while no line says it."""
        return statistics.median(self._times) if self._times else None

    def poll(self) -> list[LoggedStep]:
        """The lines that have come since the last call (at first, and after a cut: the file's last ones)."""
        rows = [row for line in self._new_lines() if (row := parse_line(line))]
        for row in rows:
            self.last = row
            if row.seconds:
                self._times.append(row.seconds)
        return rows

    def _new_lines(self) -> list[bytes]:
        try:
            with self.path.open("rb") as stream:
                about = os.fstat(stream.fileno())
                if self._offset is None or about.st_size < self._offset or about.st_ino != self._inode:
                    # at first, or when a resumed run has cut the file back
                    self._offset, self._rest = max(0, about.st_size - TAIL_BYTES), b""
                    self._inode = about.st_ino
                stream.seek(self._offset)
                data = stream.read()
        except OSError:
            return []
        self._offset += len(data)
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()  # a line that is still being written
        return lines


def parse_line(line: bytes) -> LoggedStep | None:
    """One line of a history; None where it is damaged or only a part (as the first of a tail may be)."""
    row = _object(line)
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return None
    return LoggedStep(step, *(_number(row.get(field)) for field in ("lr", "loss", "seconds", "mfu")))


def completed_step(folder: Path) -> int | None:
    """The step up to which the run in `folder` was completed, None while it never was."""
    try:
        step = _object((folder / "result.json").read_bytes()).get("step")
    except OSError:
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def is_done(task: Task) -> bool:
    """Whether the task is complete up to its last step; an appended version makes a main path longer."""
    step = completed_step(task.folder)
    return step is not None and step >= task.run.last_step


def has_begun(task: Task) -> bool:
    """Whether the task goes on from a checkpoint of its own when it is started."""
    return bool(complete_steps(task.checkpoints))


def parent_available(task: Task, parent_folder: Path | None) -> bool:
    """Whether what the task starts from is there: its own checkpoint or the parent's at the branch point."""
    if parent_folder is None or has_begun(task):
        return True
    return checkpoint_complete(parent_folder / "checkpoints", task.parent_step)


@dataclass(frozen=True)
class RunState:
    """One row of `lrpath status`.

    `state`: done, running, interrupted, extended (complete up to `step`, the plan got longer), waiting, or
    not started. `step` is the last logged one, the first step where there is none. Of an interrupted run
    `cause` is what its failure file says, None without one, and `log` the newest log.
    """

    state: str
    step: int
    lr: float | None
    loss: float | None
    seconds_per_step: float | None
    checkpoints: list[int]
    waiting_for: str | None = None
    cause: str | None = None
    mfu: float | None = None
    log: Path | None = None


def read_state(task: Task, parent: Task | None) -> RunState:
    """The state of `task` as its folder tells it; nothing is written."""
    tail = HistoryTail(task.folder / "history.jsonl")
    tail.poll()
    last = tail.last
    finished = completed_step(task.folder)
    step = last.step if last else finished or task.run.first_step
    checkpoints = complete_steps(task.checkpoints)
    waiting_for = cause = log = None
    if is_live(task.folder, tail.seconds_per_step or 0.0):
        state = "running"
    elif is_done(task):
        state, step = "done", task.run.last_step
    elif finished is not None:
        state = "extended"
    elif last or checkpoints or latest_log(task.folder):
        state, cause = "interrupted", _last_cause(task.folder)
        log = latest_log(task.folder)
    elif parent and not parent_available(task, parent.folder):
        state, waiting_for = "waiting", f"{parent.key} at step {task.parent_step}"
    else:
        state = "not started"
    return RunState(
        state=state,
        step=step,
        lr=last.lr if last else None,
        loss=last.loss if last else None,
        seconds_per_step=tail.seconds_per_step,
        checkpoints=checkpoints,
        waiting_for=waiting_for,
        cause=cause,
        mfu=last.mfu if last else None,
        log=log,
    )


def is_live(folder: Path, seconds_per_step: float = 0.0) -> bool:
    """Whether a process trains in `folder`: it holds the lock, or goes on writing the history without one."""
    if (folder / LOCK_NAME).exists():
        return is_held(folder)
    try:
        age = time.time() - (folder / "history.jsonl").stat().st_mtime
    except OSError:
        return False
    return age < max(FRESH_SECONDS, 5 * seconds_per_step) and completed_step(folder) is None


def latest_log(folder: Path) -> Path | None:
    """The newest log of the run, by its name, which is the time of its start."""
    return max((folder / "logs").glob("*.log"), default=None)


def _last_cause(folder: Path) -> str | None:
    found = failure.read(folder / failure.ERROR)
    return found.message if found else None


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
