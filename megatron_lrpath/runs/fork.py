"""A main path in another output that goes on from a kept checkpoint: the checkpoint is linked, the lineage copied."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Run
from megatron_lrpath.runs.checkpoints import checkpoint_folder, write_tracker
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.lineage import read_lineage
from megatron_lrpath.runs.results import completed_step, write_result
from megatron_lrpath.sealed import write_sealed


def fork_main(source: Path, step: int, folder: Path, run: Run) -> None:
    """Let `folder`, the main path `run` of another plan, begin with the checkpoint of `step` of the one in `source`.

    The two plans agree up to that step, which the trainer verifies by the lineage. A call that was interrupted is
    completed by the next one; a folder with a lineage is left as it is.

    Raises:
        UserError: the lineage in `source` is missing or cannot be read.
    """
    own = RunFolder(folder)
    if own.lineage.exists():
        return
    lineage = read_lineage(source)
    if lineage is None:
        raise UserError(
            f"{source}: the main path's lineage is missing; restore it, or train the main path anew"
        )
    own.checkpoints.mkdir(parents=True, exist_ok=True)
    link = checkpoint_folder(own.checkpoints, step)
    if not link.is_symlink():
        target = checkpoint_folder(RunFolder(source).checkpoints.resolve(), step)
        link.symlink_to(os.path.relpath(target, own.checkpoints.resolve()), target_is_directory=True)
    write_tracker(own.checkpoints, step)
    if run.last_step == step and completed_step(folder) is None:
        write_result(folder, run, step)
    write_sealed(own.lineage, lineage)
