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
from megatron_lrpath.runs.checkpoints import FileSum, ManifestError
from megatron_lrpath.runs.folder import RunFolder


class ReadAhead:
    """The files that this rank reads before they are needed, each with the sum that its thread works out."""

    def __init__(self) -> None:
        self._sums: dict[Path, Future[FileSum]] = {}

    def begin(self, args: argparse.Namespace) -> None:
        """Read this rank's share of the checkpoint that the run `args` names will probably start from.

        Errors of the plan or the checkpoint are ignored here; the normal start reports them.
        """
        if None in (args.plan, args.paradigm, args.run):
            return
        try:
            folder = likely_start(args.plan, args.paradigm, args.run)
            sums = disk.read_manifest(folder) if folder is not None else {}
        except (UserError, ManifestError, OSError):
            return
        if folder is None or disk.wrong_sizes(folder, sums):
            return
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._sums = {folder / name: Future() for name in disk.share_of(rank, world, sums)}
        # A daemon: no reason to keep a process that ends for another reason alive.
        threading.Thread(target=self._read, name="read ahead", daemon=True).start()

    def _read(self) -> None:
        """Read and sum the files in their order."""
        for path, future in self._sums.items():
            try:
                future.set_result(disk.sum_file(path))
            except Exception as error:  # of any kind: the start waits for the future
                future.set_exception(error)

    def confirmed(self, folder: Path, expected: Mapping[str, FileSum], names: Iterable[str]) -> set[str]:
        """Those of `names` that were read ahead and are as expected; waits for what is still being read.

        The others may have been replaced since, and are left to the caller.
        """
        futures = {name: self._sums[folder / name] for name in names if folder / name in self._sums}
        return {
            name
            for name, future in futures.items()
            if not future.exception() and future.result() == expected[name]
        }


def likely_start(path: Path, paradigm: str, name: str) -> Path | None:
    """The run's newest complete checkpoint, or before the first one its parent's; None where it has neither.

    Raises:
        UserError: the plan cannot be used, or does not have the run.
    """
    plan = load_plan(path)
    run = plan.carried_out(plan.run(paradigm, name))
    root = RunFolder(plan.folder(run)).checkpoints
    step = disk.latest_step(root)
    if step is None and run.parent is not None:
        root, step = RunFolder(plan.folder(plan.parent_of(run))).checkpoints, run.parent.step
    return None if step is None else disk.checkpoint_folder(root, step)
