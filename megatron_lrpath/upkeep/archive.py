"""Select the checkpoints of a plan that belong in its archive: the ends of versions and the branch points."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import PARADIGMS
from megatron_lrpath.plan import Plan
from megatron_lrpath.runs.archive import Archive
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.runs.storage import lying
from megatron_lrpath.runs.tasks import Task, build_tasks
from megatron_lrpath.upkeep.prune import left_alone


@dataclass(frozen=True)
class Item:
    """A checkpoint for the archive. `here`, `there`: where it is complete; `bytes`: its size here."""

    key: str
    root: Path
    step: int
    what: str
    here: bool
    there: bool
    bytes: int


def required_archive(plan: Plan) -> Archive:
    """Return the plan's archive. Raise UserError if it names none."""
    found = Archive.of(plan)
    if found is None:
        raise UserError(
            f"{plan.path}: names no archive; add a line like `archive: s3://BUCKET/FOLDER` to the plan"
        )
    return found


def items(plan: Plan, archive: Archive) -> tuple[list[Item], list[str]]:
    """Return the checkpoints for the archive, complete here or there, and reasons for skipped runs."""
    found, alone = [], []
    for task in build_tasks(plan, PARADIGMS):
        steps = complete_steps(task.checkpoints)
        if steps and (why := left_alone(plan, task)):
            alone.append(f"{task.key}: not archived: {why}")
            continue
        for step, what in belonging(plan, task).items():
            here, there = step in steps, archive.has(task.key, step)
            if here or there:
                size = lying(task.checkpoints, step) if here else 0
                found.append(Item(task.key, task.checkpoints, step, what, here, there, size))
    return found, alone


def belonging(plan: Plan, task: Task) -> dict[int, str]:
    """Return the steps of a run whose checkpoints belong in the archive, with their description."""
    run = task.run
    if run.makes_version:
        return {run.last_step: f"the model of {run.version}"}
    ends = dict(zip(plan.timeline.ends, (version.name for version in plan.versions), strict=True))
    points = dict(zip(plan.timeline.branch_points, (version.name for version in plan.versions), strict=True))
    found = {}
    for step in run.keep_steps:
        parts = [f"the branch point of {points[step]}"] if step in points else []
        parts += [f"the end of {ends[step]}"] if step in ends else []
        found[step] = " and ".join(parts) or "a branch point of other plans"
    return found
