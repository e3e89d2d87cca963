"""Check that the remaining runs find the checkpoints that they start from."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan
from megatron_lrpath.readiness.finding import FAILED, INFO, Finding
from megatron_lrpath.runs.archive import Archive, fetch_missing
from megatron_lrpath.runs.checkpoints import checkpoint_complete, complete_steps, latest_step
from megatron_lrpath.runs.lineage import require_same_parent
from megatron_lrpath.runs.results import completed_step
from megatron_lrpath.runs.state import has_begun
from megatron_lrpath.runs.tasks import Task
from megatron_lrpath.wording import plural


def parent_checks(plan: Plan, todo: Sequence[Task], tasks: Sequence[Task]) -> list[Finding]:
    """Return what prevents a run of `todo` from starting: a changed parent, or one that passed the step
    without keeping it.

    A checkpoint in the plan's archive is fetched at the start, see `fetch_parents`.
    """
    by_key = {task.key: task for task in tasks}
    checks = []
    for task in todo:
        parent = by_key.get(task.parent or "")
        if parent is None:
            continue
        name = f"parent of {task.key}"
        if has_begun(task):
            try:
                require_same_parent(task.folder, parent.folder, task.parent_step)
            except UserError as error:
                checks.append(Finding(name, FAILED, str(error)))
        elif has_passed(parent, task.parent_step):
            checks.append(archived(plan, task, parent) or Finding(name, FAILED, *gone(task, parent)))
    return checks


def archived(plan: Plan, task: Task, parent: Task) -> Finding | None:
    """That the parent's checkpoint is in the archive, or why that is not known; None where it is not there."""
    name = f"parent of {task.key}"
    try:
        archive = Archive.of(plan)
        if archive is None or not archive.has(parent.key, task.parent_step):
            return None
    except UserError as error:
        found, advice = gone(task, parent)
        return Finding(name, FAILED, f"{found}, and nobody knows whether the archive has it: {error}", advice)
    return Finding(
        name,
        INFO,
        f"the checkpoint of {parent.key} at step {task.parent_step} is in {plan.archive} alone; "
        "it is fetched before the training starts",
    )


def fetch_parents(plan: Plan, todo: Sequence[Task], tasks: Sequence[Task]) -> None:
    """Fetch the parents' checkpoints that runs of `todo` start from and only the archive has.

    Raises:
        UserError: the archive does not answer, or its copy is damaged; a repeated call resumes it.
    """
    by_key = {task.key: task for task in tasks}
    starts = [(task, by_key[task.parent]) for task in todo if task.parent in by_key and not has_begun(task)]
    fetch_missing(
        plan,
        [(parent.run, task.parent_step) for task, parent in starts if has_passed(parent, task.parent_step)],
    )


def has_passed(parent: Task, step: int) -> bool:
    """Return whether the parent has reached `step` without keeping a complete checkpoint of it."""
    if checkpoint_complete(parent.checkpoints, step):
        return False
    return (completed_step(parent.folder) or 0) >= step or (latest_step(parent.checkpoints) or 0) > step


def gone(task: Task, parent: Task) -> tuple[str, str]:
    """Return the message about a missing parent's checkpoint, and what to do."""
    kept = complete_steps(parent.checkpoints)
    steps = f"{plural(len(kept), 'checkpoint')}: {', '.join(map(str, kept))}" if kept else "no checkpoint"
    found = (
        f"it starts from the checkpoint of {parent.key} at step {task.parent_step}, which is not in "
        f"{parent.checkpoints} ({steps})"
    )
    advice = (
        "Restore it; or, where steps or alpha of the plan have changed, choose them so that the run leaves at one of "
        f"those steps or a later one; or remove {parent.folder} to train {parent.key} again."
    )
    return found, advice
