"""Start a main path in another output from a plan's checkpoint: links to its files, and its lineage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Run
from megatron_lrpath.runs.checkpoints import checkpoint_folder, saving_folder, write_tracker
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.lineage import read_lineage
from megatron_lrpath.runs.results import completed_step, write_result
from megatron_lrpath.sealed import write_sealed


def fork_main(source: Path, step: int, folder: Path, run: Run) -> None:
    """Let `folder`, another plan's main path `run`, begin with the checkpoint of `step` in `source`.

    The two plans agree up to that step, which the trainer verifies by the lineage. A repeated call completes
    an interrupted one; a folder with a lineage is unchanged.

    Raises:
        UserError: the lineage in `source` is missing or cannot be read.
    """
    own = RunFolder(folder)
    if own.lineage.exists():
        return
    lineage = read_lineage(source)
    if lineage is None:
        raise UserError(
            f"{source}: the main path's lineage is missing; restore it, or train the main path again"
        )
    own.checkpoints.mkdir(parents=True, exist_ok=True)
    take_over(
        checkpoint_folder(RunFolder(source).checkpoints, step), checkpoint_folder(own.checkpoints, step)
    )
    write_tracker(own.checkpoints, step)
    if run.last_step == step and completed_step(folder) is None:
        write_result(folder, run, step)
    write_sealed(own.lineage, lineage)


def take_over(checkpoint: Path, place: Path) -> None:
    """Create hard links to a checkpoint's files: they take no disk space and stay if the original is removed.

    Use a symbolic link to the folder if the file system has no hard links, or differs from the plan's.
    """
    if place.exists():
        return
    unfinished = saving_folder(place)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, unfinished, copy_function=os.link)
        unfinished.rename(place)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        place.unlink(missing_ok=True)  # a broken link
        place.symlink_to(
            os.path.relpath(checkpoint.resolve(), place.parent.resolve()), target_is_directory=True
        )
