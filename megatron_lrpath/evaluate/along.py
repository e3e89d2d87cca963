"""Evaluations along the main path: of its checkpoints, by step, in one file in its folder; without torch."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.evaluate.targets import Target, loss_of, read_json
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.plan import Plan
from megatron_lrpath.training.checkpoints.on_disk import CHECKPOINTS, complete_steps

ALONG = "evals.json"
"""By step what `EVALUATION` says of a version."""
LONGEST = 18
"""Digits of a step."""


def along(folder: Path | str) -> dict[int, dict[str, Any]]:
    """The evaluations of the main path in `folder` that say a loss, by step, ascending."""
    found = read_json(Path(folder) / ALONG) or {}
    steps = [step for step in found if step.isdecimal() and len(step) <= LONGEST and loss_of(found[step])]
    return {int(step): found[step] for step in sorted(steps, key=int)}


def add_along(folder: Path | str, evaluation: dict[str, Any]) -> None:
    """Note one of the step that it says; calls side by side lose nothing of each other's."""
    path = Path(folder) / ALONG
    with path.with_name(f".{ALONG}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        atomic_write_json(path, along(folder) | {evaluation["step"]: evaluation})


def main_path_targets(plan: Plan, validation: str, again: bool = False) -> list[Target]:
    """The main path's complete checkpoints that have not been evaluated on the slice of this fingerprint, or all.

    Raises:
        UserError: it has no checkpoint, or what is known of them cannot be read.
    """
    run = plan.run("ours", "main")
    folder = Path(plan.folder(run))
    steps = complete_steps(folder / CHECKPOINTS)
    if not steps:
        raise UserError(
            f"{folder / CHECKPOINTS}: the main path has no checkpoint yet; train it first "
            "(lrpath run PLAN --paradigm ours --run main)."
        )
    if (folder / ALONG).exists() and read_json(folder / ALONG) is None:
        raise UserError(f"{folder / ALONG}: cannot be read; restore it, or remove it and evaluate again.")
    known = {} if again else along(folder)
    return [Target(run, step) for step in steps if known.get(step, {}).get("validation") != validation]
