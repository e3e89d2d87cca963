"""Whether what lies in the output is what the plan would train: the runs' identities and their parents' checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lrpath.data.identity import training_identity
from megatron_lrpath.data.slice import Slice, open_mix
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.resources import given_options
from megatron_lrpath.plan import PARADIGMS, Plan, Run
from megatron_lrpath.plan.neutral import is_neutral
from megatron_lrpath.readiness.finding import FAILED, Finding, attempt
from megatron_lrpath.runs.checkpoints import checkpoint_complete, complete_steps
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.lineage import changes, is_bound, newest_step, parent_changed, read_lineage
from megatron_lrpath.runs.results import completed_step
from megatron_lrpath.runs.state import has_begun
from megatron_lrpath.runs.tasks import Task
from megatron_lrpath.sft.prepared import open_prepared
from megatron_lrpath.wording import listing, plural

GO_BACK = "Go back to those settings, or give the plan another `output` to train anew."
SHOWN = 4  # differences of a run that the message names


def identity_checks(
    plan: Plan, slices: Mapping[str, Slice], todo: Collection[str], extra: Sequence[str] = ()
) -> list[Finding]:
    """Whether every run in the output that has a checkpoint was trained with what the plan says now.

    Args:
        plan: the plan.
        slices: those of the versions that are there.
        todo: the keys of the runs that would go on, to which `extra` are given.
        extra: Megatron arguments beside the plan's.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    problems = []
    for run in planned_runs(plan):
        try:
            found = run_changes(plan, run, slices, extra if run.key in todo else None)
        except UserError as error:
            problems.append(Finding("identity", FAILED, str(error)))
            continue
        if found:
            alike.setdefault(tuple(found), []).append(run.key)
    if alike:
        told = [f"{listing(keys)} ({shortened(found)})" for found, keys in alike.items()]
        text = f"trained under other settings than these: {'; '.join(told)}"
        problems.append(Finding("identity", FAILED, f"{plan.output}: {text}", GO_BACK))
    return problems


def planned_runs(plan: Plan) -> list[Run]:
    """Every training of the plan, once."""
    runs = (run for name in PARADIGMS for run in (*plan.runs(name), *plan.sft_runs(name)))
    return [run for run in runs if run.same_as is None]


def shortened(found: Sequence[str]) -> str:
    """The first of the differences, and how many more there are."""
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def run_changes(
    plan: Plan, run: Run, slices: Mapping[str, Slice], extra: Sequence[str] | None = None
) -> list[str]:
    """What differs between a run's lineage and what the trainer would compare it with; nothing without a checkpoint.

    What cannot be known here, as its file is not there, counts as unchanged; the arguments where `extra` is None.
    """
    folder = plan.folder(run)
    lineage = read_lineage(folder)
    if lineage is None or not is_bound(folder):
        return []
    stored = lineage["identity"]
    names = [version.name for version in plan.versions[: run.version_index]] if not run.is_sft else []
    arguments = stored.get("arguments") if extra is None else given_beside(plan, run, extra)
    current = training_identity(
        plan,
        run,
        [slices[name] for name in names if name in slices],
        mixed(plan, run),
        chats(plan, run, stored),
        arguments,
    )
    if not Path(plan.tokenizer.model or "").is_file():
        current["tokenizer_model"] = stored.get("tokenizer_model")
    if "tokenizer_model" not in stored:  # an older version, or a run that only the plan describes
        current["tokenizer_model"] = None
    return changes(folder, lineage, plan, run, current)


def mixed(plan: Plan, run: Run) -> list[Slice]:
    """The slices of a branch's mix, none where they are not all there."""
    try:
        return open_mix(plan.data, run.mix, verify=False) if run.mix else []
    except UserError:  # told by the checks of the data
        return []


def chats(plan: Plan, run: Run, stored: Mapping[str, Any]) -> Any:
    """The identity of a fine-tuning's prepared data; the recorded one where they are not there."""
    if not run.is_sft:
        return None
    try:
        return open_prepared(plan, verify=False).identity
    except UserError:  # preparing them tells
        return stored.get("sft_data")


def given_beside(plan: Plan, run: Run, extra: Sequence[str]) -> dict[str, Any]:
    """The Megatron arguments beside the plan's that the run's result depends on, as the trainer reads them."""
    if all(is_neutral(name) for name in given_options(extra)):
        return {}
    # Megatron's parser takes seconds to import, and is needed only where such an argument is given.
    from megatron_lrpath.training.options.from_plan import arguments_beside

    return arguments_beside(plan, run, extra)


def parent_checks(tasks: Sequence[Task]) -> list[Finding]:
    """Whether the runs that are left to train find the checkpoints that they start from."""
    by_key = {task.key: task for task in tasks}
    checks = []
    for task in tasks:
        parent = by_key.get(task.parent or "")
        if parent is None or task.complete:
            continue
        if has_begun(task):
            same = f"the checkpoint of {parent.key} at step {task.parent_step} is the one it started from"

            def unchanged(task: Task = task, parent: Task = parent) -> None:
                parent_changed(task.folder, parent.folder, task.parent_step)

            checks.append(attempt(f"parent of {task.key}", unchanged, same))
        elif passed(parent, task.parent_step):
            checks.append(Finding(f"parent of {task.key}", FAILED, *gone(task, parent)))
    return checks


def passed(parent: Task, step: int) -> bool:
    """Whether the parent has come to `step` or further, and has no whole checkpoint of it."""
    if not is_bound(parent.folder) or checkpoint_complete(parent.checkpoints, step):
        return False
    kept = complete_steps(parent.checkpoints)
    return (completed_step(parent.folder) or 0) >= step or bool(kept and newest_step(parent.folder) > step)


def gone(task: Task, parent: Task) -> tuple[str, str]:
    """What is said of a parent's checkpoint that is not there, and how to go on."""
    kept = complete_steps(RunFolder(parent.folder).checkpoints)
    steps = f"{plural(len(kept), 'checkpoint')}: {', '.join(map(str, kept))}" if kept else "no checkpoint"
    found = (
        f"it starts from the checkpoint of {parent.key} at step {task.parent_step}, which is not in "
        f"{parent.checkpoints} ({steps})"
    )
    advice = (
        "If steps or alpha of the plan have changed, choose them so that the branch leaves at one of those steps or "
        f"a later one, or give the plan another `output`; else restore it, or remove {parent.folder} to train "
        f"{parent.key} again."
    )
    return found, advice
