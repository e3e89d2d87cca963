"""What the rest of a plan costs: steps, tokens, GPU hours and wall time, at the measured pace if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lrpath.devices import PEAKS
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.layouts import GPUS_PER_NODE, MFU, allocate, seconds_per_step
from megatron_lrpath.plan import PARADIGMS, Plan
from megatron_lrpath.runs.folder import RunFolder, read_json_object
from megatron_lrpath.runs.history import read_history
from megatron_lrpath.runs.state import read_state
from megatron_lrpath.runs.tasks import Task, build_tasks

USUAL_GPU = "H100"


@dataclass(frozen=True)
class Pace:
    """Seconds of a step on that many processes; `basis` says where they are from."""

    seconds: float
    processes: int
    basis: str


@dataclass(frozen=True)
class Estimate:
    """Steps and tokens that are left, the steps of the longest chain of runs, and the pace if there is any."""

    steps: int
    tokens: int
    chain: int
    pace: Pace | None

    @property
    def hours(self) -> float | None:
        """Processes times hours."""
        return None if self.pace is None else self.steps * self.pace.seconds * self.pace.processes / 3600

    @property
    def wall(self) -> float | None:
        """Seconds until the end where every run that can run does."""
        return None if self.pace is None else self.chain * self.pace.seconds


def estimate(plan: Plan, paradigms: Sequence[str]) -> Estimate:
    """What of the plan's versions is left to train, as the run folders show."""
    tasks = [task for task in build_tasks(plan, paradigms, fine_tunings=False) if not task.complete]
    left = {task.key: task.run.last_step - _done(task) for task in tasks}
    chains: dict[str, int] = {}
    for task in tasks:  # parents before children
        before = chains.get(task.parent or "", 0)
        if task.parent in left:  # what the parent does after this run's start, this run does not wait for
            before -= max(0, min(left[task.parent], _last(tasks, task.parent) - task.parent_step))
        chains[task.key] = max(0, before) + left[task.key]
    steps = sum(left.values())
    return Estimate(steps, plan.tokens(steps), max(chains.values(), default=0), pace(plan))


def pace(plan: Plan) -> Pace | None:
    """The newest measured pace of the plan's runs; else what the recipe's layout promises; None for neither."""
    for task in reversed(build_tasks(plan, PARADIGMS[::-1], fine_tunings=False)):
        seconds = read_history(task.folder).usual_seconds
        starts = (read_json_object(RunFolder(task.folder).lineage) or {}).get("starts")
        last = starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
        if seconds:
            world = last.get("world_size")
            return Pace(seconds, world if isinstance(world, int) else 1, f"as {task.key} was trained")
    try:
        gpus = allocate(plan, None, GPUS_PER_NODE, "cuda").world_size
        seconds = seconds_per_step(plan, gpus, PEAKS[USUAL_GPU])
    except UserError:
        return None
    return Pace(seconds, gpus, f"on {gpus} {USUAL_GPU} at {MFU:.0%} of their peak; nothing is measured yet")


def _done(task: Task) -> int:
    return max(task.run.first_step, read_state(task.folder, task.run).step)


def _last(tasks: Sequence[Task], key: str | None) -> int:
    return next(task.run.last_step for task in tasks if task.key == key)
