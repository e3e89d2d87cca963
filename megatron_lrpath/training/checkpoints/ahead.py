"""Read the checkpoint that a run will probably start from while Python imports torch and Megatron.

The disk is idle during these seconds. The data is summed while it is read, so that the verification at the
start is mostly done and the load finds the files in the page cache.
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
    """The files that this rank reads ahead, each with the checksum that its thread computes."""

    def __init__(self) -> None:
        self._sums: dict[Path, Future[FileSum]] = {}

    def begin(self, args: argparse.Namespace) -> None:
        """Read this rank's share of the checkpoint that the run in `args` will probably start from.

        Errors are ignored here; the normal start reports them.
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
        # A daemon, so that it does not keep an ending process alive.
        threading.Thread(target=self._read, name="read ahead", daemon=True).start()

    def _read(self) -> None:
        """Read and sum the files in order."""
        for path, future in self._sums.items():
            try:
                future.set_result(disk.sum_file(path))
            except Exception as error:  # of any kind: the start waits for the future
                future.set_exception(error)

    def confirmed(self, folder: Path, expected: Mapping[str, FileSum], names: Iterable[str]) -> set[str]:
        """Return the files of `names` that were read ahead and match; wait for files that are still being
        read.

        Other files may have been replaced since and must be verified by the caller.
        """
        futures = {name: self._sums[folder / name] for name in names if folder / name in self._sums}
        return {
            name
            for name, future in futures.items()
            if not future.exception() and future.result() == expected[name]
        }


def likely_start(path: Path, paradigm: str, name: str) -> Path | None:
    """Return the run's newest complete checkpoint, or its parent's before the first one; None if there is
    neither.

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
