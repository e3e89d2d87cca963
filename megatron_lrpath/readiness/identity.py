"""Check that the output contains what the plan would train: the identity of every run with a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lrpath.data.identity import training_identity
from megatron_lrpath.data.slice import Slice, open_mix
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.readiness.arguments import given_beside
from megatron_lrpath.readiness.finding import FAILED, Finding
from megatron_lrpath.runs.lineage import changes, is_bound, read_lineage
from megatron_lrpath.runs.rewinds import require_no_rewind
from megatron_lrpath.runs.tasks import Task
from megatron_lrpath.sft.prepared import open_prepared
from megatron_lrpath.wording import listing

GO_BACK = "Restore those settings, or set another `output` in the plan to train again."
SHOWN = 4  # differences of a run that the message names


def identity_checks(
    plan: Plan,
    tasks: Sequence[Task],
    slices: Mapping[str, Slice],
    going_on: Collection[str],
    extra: Sequence[str] = (),
) -> list[Finding]:
    """Check that every run with a checkpoint was trained with the plan's current settings.

    Args:
        plan: the plan.
        tasks: the requested runs.
        slices: the available slices of the versions.
        going_on: the keys of the runs that will continue with `extra`, or whose checkpoints other runs start from.
        extra: Megatron arguments in addition to the plan's.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    problems = []
    for run in (task.run for task in tasks):
        try:
            found = run_changes(plan, run, slices, extra if run.key in going_on else None)
        except UserError as error:
            problems.append(Finding("identity", FAILED, str(error)))
            continue
        if found:
            alike.setdefault(tuple(found), []).append(run.key)
    if alike:
        told = [f"{listing(keys)} ({shortened(found)})" for found, keys in alike.items()]
        text = f"{plan.output}: trained under other settings than the plan's: {'; '.join(told)}"
        problems.append(Finding("identity", FAILED, text, GO_BACK))
    return problems


def shortened(found: Sequence[str]) -> str:
    """Return the first difference, and the number of the others."""
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def run_changes(
    plan: Plan, run: Run, slices: Mapping[str, Slice], extra: Sequence[str] | None = None
) -> list[str]:
    """Return the differences between a run's lineage and what the trainer would compare; empty without a
    checkpoint.

    What is unknown here because its file is missing counts as unchanged, and so do the arguments if
    `extra` is None.
    """
    folder = plan.folder(run)
    lineage = read_lineage(folder)
    require_no_rewind(folder, lineage)
    if lineage is None or not is_bound(folder):
        return []
    stored = lineage["identity"]
    names = [version.name for version in plan.versions[: run.version_index]] if not run.is_sft else []
    current = training_identity(
        plan,
        run,
        [slices[name] for name in names if name in slices],
        mixed(plan, run),
        chats(plan, run, stored),
        stored.get("arguments") if extra is None else given_beside(plan, run, extra),
    )
    if not Path(plan.tokenizer.model or "").is_file():
        current["tokenizer_model"] = stored.get("tokenizer_model")
    return changes(folder, lineage, plan, run, current)


def mixed(plan: Plan, run: Run) -> list[Slice]:
    """Return the slices of a branch's mix; none if one is missing."""
    try:
        return open_mix(plan.data, run.mix, verify=False) if run.mix else []
    except UserError:  # told by the checks of the data
        return []


def chats(plan: Plan, run: Run, stored: Mapping[str, Any]) -> Any:
    """Return the identity of a fine-tuning's prepared data; the recorded one if they are missing."""
    if not run.is_sft:
        return None
    try:
        return open_prepared(plan, verify=False).identity
    except UserError:  # preparing them tells
        return stored.get("sft_data")
