"""Choose the next run and predict the total time: pure functions of tasks and their progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_lrpath.runs.tasks import Task


@dataclass(frozen=True)
class Advance:
    """The progress of a task: the current `step`, whether it is complete, whether a process trains it now.

    `startup` is the remaining time (seconds) until its process trains; `seconds` is the time of a step.
    """

    step: float
    done: bool = False
    running: bool = False
    startup: float = 0.0
    seconds: float = 1.0

    def seconds_to(self, marks: Sequence[int]) -> float:
        """Return the seconds until a running task reaches the next of `marks`."""
        target = min((mark for mark in marks if mark > self.step), default=self.step)
        return self.startup + (target - self.step) * max(self.seconds, 1e-9)

    def after(self, stretch: float, last_step: int) -> Advance:
        """Return the progress after `stretch` seconds; complete at `last_step` (up to rounding)."""
        step = self.step + max(0.0, stretch - self.startup) / max(self.seconds, 1e-9)
        if abs(step - round(step)) < 1e-6:
            step = float(round(step))
        done, startup = step >= last_step, max(0.0, self.startup - stretch)
        return replace(self, step=step, startup=startup, done=done, running=not done)


def chains(tasks: Sequence[Task], advances: Mapping[str, Advance]) -> dict[str, float]:
    """Return for every task the steps to the end of the longest chain of runs that depend on it."""
    lengths: dict[str, float] = {}
    for task in reversed(tasks):  # children come after their parents, so their chains are known and passed up
        now = advances[task.key]
        own = 0.0 if now.done else max(0.0, task.run.last_step - now.step)
        lengths[task.key] = length = max(own, lengths.get(task.key, 0.0))
        parent = advances.get(task.parent or "")
        if parent and task.parent:
            until = 0.0 if parent.done else max(0.0, task.parent_step - parent.step)
            lengths[task.parent] = max(until + length, lengths.get(task.parent, 0.0))
    return lengths


def next_task(
    tasks: Sequence[Task], advances: Mapping[str, Advance], available: Callable[[Task], bool]
) -> Task | None:
    """Return the startable task with the longest chain of dependent runs; None if no task can start.

    `available(task)` returns whether the checkpoint that the task starts from exists; a task without a
    parent can always start.
    """
    lengths = chains(tasks, advances)
    idle = [task for task in tasks if not advances[task.key].done and not advances[task.key].running]
    ready = [task for task in idle if task.parent is None or available(task)]
    return max(ready, key=lambda task: lengths[task.key], default=None)


def seconds_left(tasks: Sequence[Task], advances: Mapping[str, Advance], jobs: int) -> float:
    """Return the time until every task is complete with `jobs` concurrent runs."""
    return play(tasks, advances, jobs)[0]


def width(tasks: Sequence[Task]) -> int:
    """Return the maximum number of concurrent tasks if all of them start from the beginning."""
    return play(tasks, {task.key: Advance(task.run.first_step) for task in tasks}, len(tasks))[1]


def play(tasks: Sequence[Task], advances: Mapping[str, Advance], jobs: int) -> tuple[float, int]:
    """Simulate the schedule: return its time in seconds, and the maximum number of concurrent tasks."""
    state = dict(advances)
    ends = {task.key: task.run.last_step for task in tasks}
    # the steps at which a run is complete or one of its children may start
    marks = {task.key: [task.run.last_step] for task in tasks}
    for child in tasks:
        if child.parent in marks:
            marks[child.parent].append(child.parent_step)

    def available(task: Task) -> bool:
        parent = state.get(task.parent or "")
        return parent is None or parent.done or parent.step >= task.parent_step

    elapsed, most = 0.0, 0
    while True:
        while sum(now.running for now in state.values()) < jobs:
            task = next_task(tasks, state, available)
            if task is None:
                break
            state[task.key] = replace(state[task.key], running=True)
        running = [key for key, now in state.items() if now.running]
        if not running:
            return elapsed, most
        most = max(most, len(running))
        stretch = min(state[key].seconds_to(marks[key]) for key in running)
        elapsed += stretch
        for key in running:
            state[key] = state[key].after(stretch, ends[key])
