"""Reads the checkpoint that a run will probably start from while Python imports torch and Megatron.

Those seconds leave the disk idle. What is read is summed, so that the verification of the start, which comes when
they are over, finds most of its work done, and the load after it finds the files in memory.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import load_plan
from megatron_lrpath.runs import checkpoints as disk
from megatron_lrpath.runs.checkpoints import (
    FileSum,
    ManifestError,
    read_manifest,
    share_of,
    sum_file,
    wrong_sizes,
)
from megatron_lrpath.runs.folder import RunFolder

Sums = dict[Path, "Future[FileSum]"]
_sums: Sums = {}


def begin(said: argparse.Namespace) -> None:
    """Read this rank's share of the checkpoint that the run `said` names will probably start from, if there is one.

    Whatever is wrong, with the plan or the checkpoint, is left to those who say so later.
    """
    if None in (said.plan, said.paradigm, said.run):
        return
    try:
        folder = likely_start(said.plan, said.paradigm, said.run)
        sums = read_manifest(folder) if folder is not None else {}
    except (UserError, ManifestError, OSError):
        return
    if folder is None or wrong_sizes(folder, sums):
        return
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    mine: Sums = {folder / name: Future() for name in share_of(rank, world, sums)}
    _sums.update(mine)
    # No reason to keep a process that ends for another reason alive.
    threading.Thread(target=read, args=(mine,), name="read ahead", daemon=True).start()


def likely_start(path: Path, paradigm: str, name: str) -> Path | None:
    """The run's newest complete checkpoint, or before the first one its parent's; None where it has neither.

    Raises:
        UserError: the plan cannot be used, or does not have the run.
    """
    plan = load_plan(path)
    run = plan.carried_out(paradigm, name)
    root = RunFolder(plan.folder(run)).checkpoints
    step = disk.latest_step(root)
    if step is None and run.parent is not None:
        root, step = RunFolder(plan.folder(plan.parent_of(run))).checkpoints, run.parent.step
    return None if step is None else disk.checkpoint_folder(root, step)


def read(sums: Sums) -> None:
    """Read and sum the files in their order."""
    for path, future in sums.items():
        try:
            future.set_result(sum_file(path))
        except Exception as error:  # of any kind: somebody waits for the future
            future.set_exception(error)


def confirmed(folder: Path, expected: Mapping[str, FileSum], names: Iterable[str]) -> set[str]:
    """Those of `names` that were read ahead and are as expected; waits for what is still being read.

    About the others nothing is said: they may have been replaced since.
    """
    futures = {name: _sums[folder / name] for name in names if folder / name in _sums}
    return {
        name
        for name, future in futures.items()
        if not future.exception() and future.result() == expected[name]
    }
