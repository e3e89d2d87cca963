"""Find the checkpoints that no run starts from any more, and the reasons to keep the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import PARADIGMS
from megatron_lrpath.plan import Plan
from megatron_lrpath.runs.archive import Archive
from megatron_lrpath.runs.checkpoints import (
    ManifestError,
    checkpoint_complete,
    checkpoint_folder,
    complete_steps,
    read_manifest,
    remove,
    sweep,
)
from megatron_lrpath.runs.folder import RunFolder, read_json_object
from megatron_lrpath.runs.lineage import changes
from megatron_lrpath.runs.results import completed_step
from megatron_lrpath.runs.rewinds import require_no_rewind
from megatron_lrpath.runs.storage import NEWEST, lying
from megatron_lrpath.runs.tasks import Task, build_tasks
from megatron_lrpath.wording import listing


@dataclass(frozen=True)
class Found:
    """A checkpoint of a run on disk; `reason` is why it is kept, empty if it can be removed.

    `archived`: whether the plan's archive has it.
    """

    key: str
    root: Path
    step: int
    bytes: int
    reason: str
    archived: bool = False


@dataclass(frozen=True)
class Survey:
    """All complete checkpoints of a plan's runs, and the runs that are not touched, with the reason."""

    found: tuple[Found, ...]
    alone: tuple[str, ...]

    @property
    def spare(self) -> tuple[Found, ...]:
        """The checkpoints that can be removed."""
        return tuple(one for one in self.found if not one.reason)

    @property
    def staying(self) -> tuple[Found, ...]:
        """The checkpoints that are kept."""
        return tuple(one for one in self.found if one.reason)


def survey(
    plan: Plan, keep_ends: bool = False, archive: Archive | None = None, archived: bool = False
) -> Survey:
    """Return which checkpoints of the plan's runs can be removed.

    The following are always kept: the newest two checkpoints of a run, its last one, checkpoints that an
    incomplete run starts from, those in the range of a version without a model (`advise` can choose another
    alpha for it, `merge` can preview it), and those for other plans (`also_branch_at`). A run that was trained
    under other settings than the plan's, or is in another output, is not touched, because the plan does
    not determine what starts from it.

    Args:
        plan: the plan.
        keep_ends: keep the main path's checkpoints at the ends of versions, so that it can be rewound to them.
        archive: a checkpoint that is complete there counts as an existing model.
        archived: whether archived checkpoints can be removed from the disk, except the newest two.

    Raises:
        UserError: the archive does not answer, or has a checkpoint that differs from the one on disk.
    """
    main = plan.folder(plan.main)
    require_no_rewind(main, read_json_object(RunFolder(main).lineage))
    tasks = build_tasks(plan, PARADIGMS)
    found: list[Found] = []
    alone = []
    for task in tasks:
        if not (steps := complete_steps(task.checkpoints)):
            continue
        if why := left_alone(plan, task):
            alone.append(f"{task.key}: left alone: {why}")
            continue
        there = {step for step in steps if archive is not None and archive.has(task.key, step)}
        reasons = wanted(plan, task, tasks, keep_ends, archive)
        if archived and archive is not None:
            for step in there & reasons.keys():
                require_same(archive, task, step)
                del reasons[step]
        reasons |= {step: "one of the newest two" for step in steps[-NEWEST:] if step not in reasons}
        found += [
            Found(
                task.key,
                task.checkpoints,
                step,
                lying(task.checkpoints, step),
                reasons.get(step, ""),
                step in there,
            )
            for step in steps
        ]
    return Survey(tuple(found), tuple(alone))


def require_same(archive: Archive, task: Task, step: int) -> None:
    """Refuse to remove a checkpoint whose copy in the archive differs or is damaged.

    Raises:
        UserError: with what to do.
    """
    folder = checkpoint_folder(task.checkpoints, step)
    try:
        here = read_manifest(folder)
    except ManifestError:
        here = None
    if here is None or archive.manifest(task.key, step) != here:
        raise UserError(
            f"{folder}: the archive {archive.url} has another checkpoint of this step; nothing was removed. Move that "
            f"one away in the store ({archive.place(task.key, step)}) and call `lrpath archive` again, or leave "
            "--archived out"
        )


def left_alone(plan: Plan, task: Task) -> str:
    """Return why a run is not touched; empty if the plan determines everything that starts from it."""
    if not task.folder.resolve().is_relative_to(Path(plan.output).resolve()):
        return f"it is in another output ({task.folder.resolve()}), whose plan determines what starts from it"
    lineage = read_json_object(RunFolder(task.folder).lineage)
    if lineage is None:
        return "it has no readable lineage, so that its plan is unknown"
    reached = max([completed_step(task.folder) or 0, *complete_steps(task.checkpoints)])
    if not task.run.makes_version and reached > task.run.last_step:
        return f"it has gone on to step {reached:,}, past this plan; prune with the plan that has its later versions"
    if differs := changes(task.folder, lineage, plan, task.run):
        return f"trained under other settings than the plan's ({'; '.join(differs[:2])})"
    return ""


def wanted(
    plan: Plan, task: Task, tasks: Sequence[Task], keep_ends: bool, archive: Archive | None = None
) -> dict[int, str]:
    """Return the steps of a run whose checkpoints other runs can still start from, with the reason."""
    starting: dict[int, list[str]] = {}
    for child in tasks:
        if child.parent == task.key and not has_model(child, archive):
            starting.setdefault(child.parent_step, []).append(child.key)
    reasons = {step: f"{listing(keys)} may still start from it" for step, keys in starting.items()}
    if task.run.makes_version:
        reasons.setdefault(task.run.last_step, f"the model of {task.run.version}")
        return reasons
    ends = list(zip(plan.timeline.ends, plan.versions, strict=True))
    branches = {child.run.version: child for child in tasks if child.parent == task.key}
    for end, version in ends:
        if (branch := branches.get(version.name)) is not None and not has_model(branch, archive):
            why = f"{version.name} has no model yet: another alpha may leave from it, or a merge read it"
            reasons |= {step: why for step in range(end - version.steps + 1, end + 1) if step not in reasons}
    for step in plan.also_branch_at:
        reasons.setdefault(step, "other plans branch off it (also_branch_at)")
    if keep_ends:
        for end, version in ends:
            reasons.setdefault(end, f"the end of {version.name} (--keep-ends)")
    return reasons


def has_model(task: Task, archive: Archive | None = None) -> bool:
    """Return whether a run is complete and has its last checkpoint, so that it need not start again."""
    last = task.run.last_step
    is_archived = archive is not None and archive.has(task.key, last)
    return task.complete and (checkpoint_complete(task.checkpoints, last) or is_archived)


def carry_out(found: Survey) -> None:
    """Remove the spare checkpoints, and leftovers of an interrupted removal. Only while no training runs."""
    for root in dict.fromkeys(one.root for one in found.found):
        sweep(root)
    for one in found.spare:
        remove(one.root, one.step)
