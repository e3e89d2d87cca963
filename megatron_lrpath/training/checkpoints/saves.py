"""The saves of a run: which are kept, and the handling of failures."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from megatron_lrpath.console import warn
from megatron_lrpath.errors import TrainingStoppedError
from megatron_lrpath.runs import checkpoints as disk

FALLBACKS = 2  # newest checkpoints that retention leaves: one more than is needed while all is well


class SaveFailedError(Exception):
    """A checkpoint could not be written; raised on all ranks. The text gives the reason."""


class Saves:
    """The checkpoints of this process's run.

    Args:
        root: the run's checkpoint folder.
        keep: steps whose checkpoints are never removed.
        branch_points: the subset that other runs start from.
        retain_interval: of the other checkpoints except the newest two, only multiples of this are kept; None: all.
        existing: steps whose checkpoints existed at the start.
        earlier: the `retain_interval` of earlier starts; checkpoints that one of them kept are not removed now.
    """

    def __init__(
        self,
        root: Path,
        keep: frozenset[int],
        branch_points: frozenset[int],
        retain_interval: int | None,
        existing: Iterable[int],
        earlier: Iterable[int | None] = (),
    ) -> None:
        self.root = root
        self.keep = keep
        self.branch_points = branch_points
        self.retain_interval = retain_interval
        self.steps = sorted(existing)
        self.under_way: list[int] = []
        self.failed_last = False
        intervals = list(earlier)
        left = [step for step in self.steps if not any(retained(step, interval) for interval in intervals)]
        self._removable = left[-FALLBACKS:]

    def is_due(self, step: int, interval: int | None, last_step: int) -> bool:
        """Return whether `step` must be saved and Megatron does not: it saves multiples of its interval and
        the last step.
        """
        regular = interval and step % interval == 0
        return step in self.keep and not regular and step < last_step

    def begin(self, step: int) -> bool:
        """Record the start of a save; return False if that step is saved already or is being saved."""
        if step in self.steps or step in self.under_way:
            return False
        self.under_way.append(step)
        return True

    def committed(self, step: int) -> None:
        """Record that the checkpoint of `step` is complete; remove those that retention does not keep."""
        self.under_way = [other for other in self.under_way if other != step]
        self.failed_last = False
        self.steps.append(step)
        self._removable.append(step)
        old, self._removable = self._removable[:-FALLBACKS], self._removable[-FALLBACKS:]
        if self.retain_interval is None or not on_rank_0():
            return
        going = [old_step for old_step in old if not self.is_kept(old_step)]
        threading.Thread(target=self._remove, args=(going,), name="retention").start()

    def is_kept(self, step: int) -> bool:
        """Return whether retention always keeps `step`."""
        return step in self.keep or retained(step, self.retain_interval)

    def failed(self, step: int, reason: str) -> None:
        """Print that the checkpoint of `step` could not be saved, and continue.

        Raises:
            TrainingStoppedError: other runs start from that checkpoint, which would be lost if the training continued.
        """
        self.under_way = [other for other in self.under_way if other != step]
        self.failed_last = True
        if on_rank_0():
            self.discard(step)
        newest = f"the newest one is of step {self.steps[-1]}" if self.steps else "there is none yet"
        message = f"{self.root}: the checkpoint of step {step} could not be saved: {reason}; {newest}."
        if step in self.branch_points:
            raise TrainingStoppedError(
                f"{message} Other runs start from step {step}, so the training stops here. Make room "
                "and call again."
            )
        if on_rank_0():
            warn(f"{message} The training continues and tries again at its next save.")

    def discard(self, step: int) -> None:
        """Remove the files of a failed save, and the empty folder that Megatron created for it."""
        folder = disk.checkpoint_folder(self.root, step)
        shutil.rmtree(disk.saving_folder(folder), ignore_errors=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            try:
                disk.remove(self.root, step)
            except OSError as error:
                warn(f"{self.root}: step {step}: {error}")


def retained(step: int, interval: int | None) -> bool:
    """Return whether `--save-retain-interval` keeps a step; with None or 0 all are kept."""
    return not interval or step % interval == 0


def on_rank_0() -> bool:
    """Return whether this is rank 0."""
    return int(os.environ.get("RANK", "0")) == 0
