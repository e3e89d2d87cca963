"""Estimate the cost of the rest of a plan: steps, tokens, GPU hours and wall time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from megatron_lrpath.devices import PEAKS
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.layouts import GPUS_PER_NODE, MFU, allocate, seconds_per_step
from megatron_lrpath.plan import PARADIGMS, Plan
from megatron_lrpath.runs.folder import RunFolder, read_json_object
from megatron_lrpath.runs.state import read_state
from megatron_lrpath.runs.tasks import Task, build_tasks
from megatron_lrpath.wording import duration, hours_text, plural, short_number

USUAL_GPU = "H100"
LEAST_SECONDS = 0.01  # of a step; shorter steps are dominated by kernel launches and messages


@dataclass(frozen=True)
class Pace:
    """Seconds of a step of `tokens` on so many processes; `basis`: their source; `unit`: of a process.

    `measured` is false if they are computed for the recipe's layout.
    """

    seconds: float
    processes: int
    basis: str
    tokens: float
    unit: str = "GPU"
    measured: bool = False


@dataclass(frozen=True)
class Estimate:
    """The remaining steps and tokens, the tokens of the longest chain of runs, and the pace if known."""

    steps: int
    tokens: int
    chain: int
    pace: Pace | None

    @property
    def hours(self) -> float | None:
        """Number of processes times hours."""
        if self.pace is None:
            return None
        return self.tokens / self.pace.tokens * self.pace.seconds * self.pace.processes / 3600

    @property
    def wall(self) -> float | None:
        """Seconds until the end if all startable runs train concurrently."""
        return None if self.pace is None else self.chain / self.pace.tokens * self.pace.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable data; `pace` is None if neither a measurement nor a layout gives one."""
        pace = self.pace and {
            "seconds_per_step": self.pace.seconds,
            "processes": self.pace.processes,
            "measured": self.pace.measured,
            "basis": self.pace.basis,
        }
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "unit": self.pace and f"{self.pace.unit} hours",
            "hours": self.hours,
            "wall_seconds": self.wall,
            "pace": pace,
        }


def cost_lines(left: Estimate, now: datetime) -> list[str]:
    """Return lines on the remaining steps and tokens; hours, wall time and end; and the pace."""
    if not left.steps:
        return ["nothing is left to train"]
    lines = [f"{plural(left.steps, 'step')} left to train, {short_number(left.tokens)} tokens"]
    if left.pace is None or left.hours is None or left.wall is None:
        return [*lines, "how long that takes is known once a run has logged its first steps"]
    end = (now + timedelta(seconds=left.wall)).strftime("%Y-%m-%d %H:%M")
    hours = hours_text(left.hours, left.pace.unit)
    lines.append(f"{hours}, {duration(left.wall)} where runs go side by side; begun now, done by {end}")
    lines.append(f"at {left.pace.seconds:.3g} s a step, {left.pace.basis}")
    return lines


def estimate(plan: Plan, paradigms: Sequence[str]) -> Estimate:
    """Return the remaining training of versions as the run folders show it; fine-tunings do not count."""
    return estimate_of(plan, build_tasks(plan, paradigms, fine_tunings=False))


def estimate_of(plan: Plan, among: Sequence[Task]) -> Estimate:
    """Return the remaining part of these trainings of versions (parents first)."""
    tasks = [task for task in among if not task.complete]
    done = {task.key: _done(task) for task in tasks}
    left = {task.key: task.tokens(done[task.key], task.run.last_step) for task in tasks}
    chains: dict[str, int] = {}
    for task in tasks:  # parents before children
        before = chains.get(task.parent or "", 0)
        if task.parent in left:  # this run does not wait for the parent's steps after its start
            last = _last(tasks, task.parent)
            before -= task.tokens(min(max(done[task.parent], task.parent_step), last), last)
        chains[task.key] = max(0, before) + left[task.key]
    steps = sum(task.run.last_step - done[task.key] for task in tasks)
    return Estimate(steps, sum(left.values()), max(chains.values(), default=0), pace(plan))


def pace(plan: Plan) -> Pace | None:
    """Return the newest measured pace of the plan's runs, else the pace computed from the recipe's layout, else None.

    No pace is computed for a small model: its steps do not reach a typical share of the peak.
    """
    for task in reversed(build_tasks(plan, PARADIGMS[::-1], fine_tunings=False)):
        if not RunFolder(task.folder).history.is_file():
            continue
        from megatron_lrpath.runs.history import read_history  # here: numpy slows `lrpath plan`

        history = read_history(task.folder)
        seconds = history.usual_seconds
        starts = (read_json_object(RunFolder(task.folder).lineage) or {}).get("starts")
        last = starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
        if seconds:
            world = last.get("world_size")
            processes = world if isinstance(world, int) and not isinstance(world, bool) and world > 0 else 1
            unit = "GPU" if history.on_gpus else "process"
            count = (
                f"one {unit}" if processes == 1 else f"{processes} {unit}{'es' if unit == 'process' else 's'}"
            )
            first, end = int(history.steps[0]) - 1, int(history.steps[-1])
            tokens = task.tokens(first, end) / (end - first)
            return Pace(
                seconds, processes, f"as {task.key} was trained on {count}", tokens, unit, measured=True
            )
    try:
        gpus = allocate(plan, None, GPUS_PER_NODE, "cuda").world_size
        seconds = seconds_per_step(plan, gpus, PEAKS[USUAL_GPU])
    except UserError:
        return None
    if seconds < LEAST_SECONDS:
        return None
    basis = f"on {gpus} {USUAL_GPU} at {MFU:.0%} of their peak; nothing is measured yet"
    return Pace(seconds, gpus, basis, plan.batch.tokens)


def _done(task: Task) -> int:
    return max(task.run.first_step, read_state(task.folder, task.run).step)


def _last(tasks: Sequence[Task], key: str | None) -> int:
    return next(task.run.last_step for task in tasks if task.key == key)
