"""The export of a run: made if it is missing or the checkpoint has changed."""

from __future__ import annotations

from pathlib import Path

from megatron_lrpath.console import say
from megatron_lrpath.errors import UserError
from megatron_lrpath.export.card import origin_of
from megatron_lrpath.export.folder import RECORD, Wishes, export_checkpoint
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.reading import read_object
from megatron_lrpath.runs.checkpoints import checkpoint_folder
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.results import model_fingerprint
from megatron_lrpath.training.checkpoints.parent import require_checkpoint
from megatron_lrpath.training.context import ParentCheckpoint


def recorded_checkpoint(folder: Path) -> str | None:
    """Return the fingerprint of the checkpoint that an exported model was made from; None if it is not
    recorded.
    """
    try:
        found = read_object(folder / RECORD).get("checkpoint")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def is_export_of(exported: Path, run: Path, step: int) -> bool:
    """Return whether `exported` is the model of the checkpoint of `step` of the run in the folder `run`."""
    wanted = model_fingerprint(run, step)
    return wanted is not None and recorded_checkpoint(exported) == wanted


def fresh_export(plan: Plan, run: Run, step: int, target: Path, again: str = "") -> Path:
    """Return the model of a run's `step` as a Hugging Face folder in `target`; export it if it does not
    exist.

    Args:
        plan: the plan of the run.
        run: the run.
        step: of the checkpoint.
        target: the folder; an export of an older checkpoint is replaced.
        again: the command that replaces a folder without a record of its checkpoint; if empty, the folder is replaced.

    Raises:
        UserError: the checkpoint cannot be exported, or the folder is not known to be an export of a checkpoint.
    """
    checkpoints = RunFolder(plan.folder(run)).checkpoints
    if is_export_of(target, plan.folder(run), step):
        return target
    found = recorded_checkpoint(target)
    require_checkpoint(ParentCheckpoint(checkpoints, step))
    is_there = (target / "config.json").is_file()
    if is_there and found is None and again:
        raise UserError(
            f"{target}: an exported model that does not say which checkpoint it is of (an earlier version made it, "
            f"or another tool); replace it: {again}"
        )
    say(
        f"{run.key}: exporting step {step:,}{' again, because the checkpoint has changed' if found else ''} …"
    )
    export_checkpoint(
        checkpoint_folder(checkpoints, step), target, origin_of(plan, run, step), Wishes(force=True)
    )
    return target
