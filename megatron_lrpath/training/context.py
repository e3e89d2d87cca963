"""The run of this process: its learning-rate path, parent, folder and plan.

It is kept separately from Megatron's arguments, because those are written into every checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.data.slice import Slice
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.schedule import BatchSizes, LRPath

if TYPE_CHECKING:
    from megatron_lrpath.sft.prepared import Prepared


@dataclass(frozen=True)
class ParentCheckpoint:
    """The checkpoint that a branch, a continual run or a fine-tuning starts from: a folder and a step in it.

    With `weights_only` a new training begins with the weights at step 0; otherwise it continues from the
    whole state.
    """

    folder: Path
    step: int
    weights_only: bool = False


@dataclass(frozen=True)
class RunContext:
    """One run of path switching.

    Attributes:
        kind: main, branch, scratch, continual or sft.
        path: the learning rate; positions in steps.
        sizes: the samples of each step.
        keep_steps: steps whose checkpoints must be saved and never removed.
        parent: checkpoint to start from; None for a run from random weights.
        identity: what the run's result depends on (JSON values), compared with the lineage of earlier starts.
        folder: the run's own folder; None without a plan.
        save: the run's own checkpoint folder, if it has no other; None under a plan.
        plan, run: the plan and the run in it; None without a plan.
        slices: data of the plan's versions from the first to the run's own.
        mix: the slices that a branch reads in addition, in the order of its mix.
        prepared: the data of a fine-tuning.
    """

    kind: str
    path: LRPath
    sizes: BatchSizes
    keep_steps: frozenset[int]
    parent: ParentCheckpoint | None
    identity: dict[str, Any]
    folder: Path | None = None
    save: Path | None = None
    plan: Plan | None = None
    run: Run | None = None
    slices: tuple[Slice, ...] = ()
    mix: tuple[Slice, ...] = ()
    prepared: Prepared | None = None

    @property
    def records(self) -> Path:
        """The folder of the run's lineage: the run folder, or without a plan the one next to its checkpoints."""
        place = self.folder or self.save
        assert place is not None
        return place
