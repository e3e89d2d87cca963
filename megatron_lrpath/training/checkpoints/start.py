"""Choose the checkpoint that a run starts from: the newest complete one, found by rank 0 and verified by all
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_lrpath.console import warn
from megatron_lrpath.errors import UserError
from megatron_lrpath.runs import checkpoints as disk
from megatron_lrpath.runs.checkpoints import ManifestError, require_checkpoint
from megatron_lrpath.training.checkpoints.ahead import ReadAhead
from megatron_lrpath.training.context import ParentCheckpoint
from megatron_lrpath.training.guards.peers import Ranks

Problems = list[str]


@dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
        folder: checkpoint folder to load from; None for random weights.
        step: the step from which training continues, 0 for random weights.
        weights_of: the step to load, if a new training begins with its weights at step 0.
        existing: steps of the run's existing checkpoints.
    """

    folder: str | None
    step: int
    existing: list[int] = field(default_factory=list)
    weights_of: int | None = None

    @property
    def loaded(self) -> int:
        """The step of the checkpoint that is loaded."""
        return self.step if self.weights_of is None else self.weights_of

    def apply(self, args: Any) -> None:
        """Make Megatron load that checkpoint completely (or all its weights), and no other."""
        args.finetune = args.no_load_optim = args.no_load_rng = self.weights_of is not None
        args.load = self.folder
        args.ckpt_step = self.loaded if self.folder is not None else None
        args.exit_on_missing_checkpoint = self.folder is not None


def agree_on_start(
    own: Path,
    parent: ParentCheckpoint | None,
    ranks: Ranks,
    ahead: ReadAhead,
    take_lock: Callable[[], None],
    check: str = "checksums",
) -> Start:
    """Return the run's start, the same on all ranks; rank 0 locks the run and removes leftovers of a killed
    process.

    Args:
        own: the run's checkpoint folder.
        parent: the checkpoint that a branch or continual run starts from.
        ahead: the files that this rank has read ahead.
        take_lock: takes the run's lock; called on rank 0.
        check: `checksums` reads every file before it is loaded, `sizes` compares only their sizes.

    Raises:
        UserError: another process trains this run, the parent's checkpoint is missing, or every checkpoint is damaged.
    """
    if ranks.rank:
        return follow(ranks, ahead)
    try:
        take_lock()
        disk.sweep(own)
        start = choose(own, parent, lambda root, step: damage(root, step, check, ranks, ahead))
    except UserError as error:
        ranks.share({"refused": str(error)})
        raise
    ranks.share({"start": asdict(start)})
    return start


def follow(ranks: Ranks, ahead: ReadAhead) -> Start:
    """Verify this rank's share of each candidate, until rank 0 has chosen."""
    while True:
        order = ranks.share()
        if "refused" in order:
            raise UserError(order["refused"])
        if "start" in order:
            return Start(**order["start"])
        folder = Path(order["read"])
        ranks.collect(content_problems(folder, ranks, ahead))


def choose(own: Path, parent: ParentCheckpoint | None, damage_of: Callable[[Path, int], Problems]) -> Start:
    """Return the newest complete checkpoint of the run; without one the parent's, or random weights.

    Newer damaged checkpoints are set aside, with a warning. A parent's checkpoint is never changed.
    """
    for step in reversed(disk.steps_found(own)):
        problems = damage_of(own, step)
        if not problems:
            disk.write_tracker(own, step)
            return Start(str(own), step, disk.complete_steps(own))
        aside = disk.set_aside(own, step)
        warn(
            f"{own}: the checkpoint of step {step} is damaged: {'; '.join(problems)}. Set aside as "
            f"{aside.name}; the run continues from the one before it."
        )
    if found := disk.damaged_found(own):
        raise UserError(
            f"{own}: no whole checkpoint is left, only damaged ones: {', '.join(found)}. Restore one from a "
            f"backup (without the ending {disk.DAMAGED}), or move this folder away to train the run again."
        )
    if parent is None:
        return Start(None, 0)
    require_checkpoint(parent.folder, parent.step)
    if problems := damage_of(parent.folder, parent.step):
        raise UserError(
            f"{parent.folder}: the checkpoint of step {parent.step}, from which this run starts, is damaged: "
            f"{'; '.join(problems)}. Restore it from a backup, or train the parent again."
        )
    if parent.weights_only:
        return Start(str(parent.folder), 0, weights_of=parent.step)
    return Start(str(parent.folder), parent.step)


def damage(root: Path, step: int, check: str, ranks: Ranks, ahead: ReadAhead) -> Problems:
    """Return the problems of a checkpoint; with checksums all ranks read their share of it.

    A checkpoint without a manifest (from plain Megatron) is only checked for completeness.
    """
    folder = disk.checkpoint_folder(root, step)
    if not (folder / disk.MANIFEST).exists():
        return [] if disk.checkpoint_complete(root, step) else ["it was never finished"]
    try:
        sums = disk.read_manifest(folder)
    except ManifestError as error:
        return [str(error)]
    problems = disk.wrong_sizes(folder, sums)
    if problems or check != "checksums":
        return problems
    ranks.share({"read": str(folder)})
    answers = ranks.collect(content_problems(folder, ranks, ahead))
    return [problem for answer in answers for problem in answer]


def content_problems(folder: Path, ranks: Ranks, ahead: ReadAhead) -> Problems:
    """Return the problems of this rank's share of a checkpoint's files."""
    try:
        sums = disk.read_manifest(folder)
    except ManifestError as error:
        return [f"rank {ranks.rank}: {error}"]
    share = disk.share_of(ranks.rank, ranks.world, sums)
    return disk.wrong_content(folder, sums, sorted(set(share) - ahead.confirmed(folder, sums, share)))
