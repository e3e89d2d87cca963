"""What a run has saved, what it keeps of that, and what becomes of a save that fails."""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_lrpath.console import warn
from megatron_lrpath.errors import TrainingStoppedError
from megatron_lrpath.runs import checkpoints as disk
from megatron_lrpath.training.checkpoints.parent import is_pretrained
from megatron_lrpath.training.context import get_context
from megatron_lrpath.training.guards import signals


def keep_steps() -> frozenset[int]:
    """Steps whose checkpoints this run must leave behind (branch points, version ends)."""
    context = get_context()
    return context.keep_steps if context else frozenset()


def must_save(args: Any, iteration: int) -> bool:
    """Whether `iteration` is to be kept and nothing else of Megatron saves it.

    Megatron itself saves at multiples of the interval and at the last step.
    """
    regular = args.save_interval and iteration % args.save_interval == 0
    return bool(args.save) and iteration in keep_steps() and not regular and iteration < args.train_iters


def wrap_checkpoint_and_decide_exit(original: Callable[..., bool]) -> Callable[..., bool]:
    """Save at the steps to keep, decide as Megatron does, save and stop where a signal asks for it."""

    @functools.wraps(original)
    def checkpoint_and_decide_exit(
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        iteration: int,
        num_floating_point_operations_so_far: Any,
        checkpointing_context: Any,
        train_data_iterator: Any,
    ) -> bool:
        from megatron.training import get_args
        from megatron.training.training import save_checkpoint_and_time

        state = (iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far)

        def save() -> None:
            save_checkpoint_and_time(*state, checkpointing_context, train_data_iterator=train_data_iterator)

        if must_save(get_args(), iteration):
            save()
        if original(
            model,
            optimizer,
            opt_param_scheduler,
            iteration,
            num_floating_point_operations_so_far,
            checkpointing_context,
            train_data_iterator,
        ):
            return True
        if signals.stopping():
            save()
        return signals.stopping()

    return checkpoint_and_decide_exit


FALLBACKS = 2  # newest checkpoints that retention leaves: one more than is needed while all is well


class SaveFailedError(Exception):
    """A checkpoint could not be written; raised on all ranks alike. The text says why."""


class Saves:
    """The checkpoints of this process's run.

    Args:
        root: the run's checkpoint folder.
        keep: steps whose checkpoints are never removed.
        branch_points: those of them that other runs start from.
        retain_interval: of the others, besides the newest two, only multiples of this are kept; None: all.
        existing: steps whose checkpoints were there at the start.
        earlier: the `retain_interval` of earlier starts; what one of them kept is not removed now.
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
        told = list(earlier)
        left = [step for step in self.steps if not any(retained(step, interval) for interval in told)]
        self._removable = left[-FALLBACKS:]

    def begin(self, step: int) -> bool:
        """Note that a save begins; False where that step is saved already or is just being saved."""
        if step in self.steps or step in self.under_way:
            return False
        self.under_way.append(step)
        return True

    def committed(self, step: int) -> None:
        """Note that the checkpoint of `step` counts now; remove what retention does not keep."""
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
        """Whether retention leaves `step` alone for ever."""
        return step in self.keep or retained(step, self.retain_interval)

    def failed(self, step: int, reason: str) -> None:
        """Say that the checkpoint of `step` could not be saved, and go on.

        Raises:
            TrainingStoppedError: others start from that checkpoint, so that going on would lose it for good.
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
            warn(f"{message} The training goes on and tries again at its next save.")

    def discard(self, step: int) -> None:
        """Remove what a failed save has written, and the empty folder that Megatron made for it."""
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
    """Whether `--save-retain-interval` keeps a step; None or 0: it was not given, all are kept."""
    return not interval or step % interval == 0


_current: Saves | None = None


def current_saves() -> Saves | None:
    """The process's run's saves, None where Megatron saves on its own terms."""
    return _current


def set_saves(saves: Saves | None) -> None:
    """Make `saves` the process's."""
    global _current
    _current = saves


def on_rank_0() -> bool:
    """Whether this is rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def wrap_save_checkpoint(original: Callable[..., None]) -> Callable[..., None]:
    """Save a step once; a save that fails is a warning, and the training goes on."""

    @functools.wraps(original)
    def save_checkpoint(iteration: int, *args: Any, **named: Any) -> None:
        saves = current_saves()
        if saves is None:
            return original(iteration, *args, **named)
        if saves.begin(iteration):
            try:
                original(iteration, *args, **named)
            except SaveFailedError as error:
                saves.failed(iteration, str(error))

    return save_checkpoint


def wrap_maybe_finalize_async_save(original: Callable[..., None]) -> Callable[..., None]:
    """Finish asynchronous saves; one that failed is a warning, and the training goes on."""

    @functools.wraps(original)
    def maybe_finalize_async_save(blocking: bool = False, terminate: bool = False) -> None:
        saves = current_saves()
        while True:
            try:
                return original(blocking=blocking, terminate=terminate)
            except SaveFailedError as error:
                assert saves is not None
                saves.failed(saves.under_way[0], str(error))

    return maybe_finalize_async_save


def wrap_ensure_directory(original: Callable[..., None]) -> Callable[..., None]:
    """Leave the folder of a checkpoint to its commit, which gives it its name when all of it is written."""

    @functools.wraps(original)
    def ensure_directory_exists(filename: str, check_parent: bool = True) -> None:
        if check_parent or current_saves() is None:  # the folder itself is a distributed checkpoint's
            original(filename, check_parent)

    return ensure_directory_exists


def wrap_tracker_filename(original: Callable[[str], str]) -> Callable[[str], str]:
    """Let Megatron neither write the tracker (in place) nor read it: the manifests say what is newest.

    Of weights to start from, which a run only reads, the tracker names the checkpoint.
    """

    @functools.wraps(original)
    def get_checkpoint_tracker_filename(checkpoints_path: str) -> str:
        given = current_saves() is None or is_pretrained(checkpoints_path)
        return original(checkpoints_path) if given else os.devnull

    return get_checkpoint_tracker_filename


def wrap_wandb_save(original: Callable[..., None]) -> Callable[..., None]:
    """Weights & Biases gets the real tracker's name."""

    @functools.wraps(original)
    def on_save_checkpoint_success(
        checkpoint_path: str, tracker_filename: str, save_dir: str, iteration: int
    ) -> None:
        tracker = tracker_filename if current_saves() is None else str(Path(save_dir) / disk.TRACKER)
        original(checkpoint_path, tracker, save_dir, iteration)

    return on_save_checkpoint_success
