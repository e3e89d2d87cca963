"""What checkpoints take: predicted from a plan, and as they lie on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.models import USUAL_VOCABULARY, parameter_count, resolve_model
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.runs.checkpoints import SAVE_INTERVAL, checkpoint_folder, steps_found

STATE_BYTES = 12  # of a parameter: the optimizer's copy in fp32 and Adam's two moments
NEWEST = 2  # checkpoints of a run that retention leaves besides those that others start from


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint, roughly: the model's weights and the optimizer's state."""

    weights: int
    state: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.state


@dataclass(frozen=True)
class Kept:
    """The checkpoints of a run that stay: steps that are named, and how many of the newest besides."""

    steps: tuple[int, ...]
    newest: int

    @property
    def count(self) -> int:
        """How many there are at most at a time."""
        return len(self.steps) + self.newest


def checkpoint_size(plan: Plan, vocabulary: int | None = None) -> CheckpointSize:
    """What one checkpoint of the plan's model takes.

    A parameter takes 2 bytes (bf16, fp16) or 4 in the model's weights, and `STATE_BYTES` in the optimizer's state.
    `vocabulary` counts where the plan leaves it to the tokenizer.

    Raises:
        UserError: a model whose parameters are not counted.
    """
    words = plan.tokenizer.vocab_size or vocabulary or USUAL_VOCABULARY
    parameters = parameter_count(resolve_model(plan.model), words)
    small = plan.megatron.get("bf16") or plan.megatron.get("fp16")
    return CheckpointSize(parameters * (2 if small else 4), parameters * STATE_BYTES)


def kept(plan: Plan, run: Run) -> Kept:
    """Which checkpoints of a run stay under the plan's `save_interval` and `save_retain_interval`.

    Those that others start from, the last one, those that `save_retain_interval` keeps, and the newest two.
    """
    chosen = int(plan.megatron.get("save_interval") or 0)
    interval = chosen or SAVE_INTERVAL
    retained = int(plan.megatron.get("save_retain_interval") or chosen or SAVE_INTERVAL * run.last_step)
    steps = {*run.keep_steps, run.last_step}
    steps |= set(range(retained * (run.first_step // retained + 1), run.last_step, retained))
    passing = (run.last_step - 1) // interval - run.first_step // interval
    newest = min(NEWEST, passing) if retained > interval else 0
    return Kept(tuple(sorted(step for step in steps if step > run.first_step)), newest)


def checkpoint_bytes(plan: Plan, run: Run) -> int:
    """Disk that the checkpoints of a run will take, roughly. UserError as of `checkpoint_size`."""
    return kept(plan, run).count * checkpoint_size(plan).total


@dataclass(frozen=True)
class Storage:
    """What a paradigm's checkpoints take at the end: one, those that stay by version, the newest besides, in bytes."""

    one: CheckpointSize
    by_version: dict[str, int]
    newest: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.by_version.values()) + self.newest


def predicted(plan: Plan, paradigm: str) -> Storage | None:
    """What the checkpoints of a paradigm will take; None for a model whose parameters nobody counts.

    A checkpoint of the main path counts with the version whose text it has read last.
    """
    try:
        one = checkpoint_size(plan)
    except UserError:
        return None
    by_version = dict.fromkeys((version.name for version in plan.versions), 0)
    newest = 0
    for run in plan.runs(paradigm):
        if run.same_as:
            continue
        stays = kept(plan, run)
        newest += stays.newest
        for step in stays.steps:
            by_version[run.version if run.makes_version else version_at(plan, step)] += one.total
    return Storage(one, by_version, newest * one.total)


def version_at(plan: Plan, step: int) -> str:
    """The version that step `step` of the main path has read."""
    ends = zip(plan.timeline.ends, plan.versions, strict=True)
    return next((version.name for end, version in ends if step <= end), plan.versions[-1].name)


def lying(root: Path, step: int) -> int:
    """Bytes of the files of one checkpoint under `root`; 0 where it is gone."""
    return folder_bytes(checkpoint_folder(root, step))


def lying_in_all(root: Path) -> int:
    """Bytes of all checkpoints under `root`, complete or not."""
    return sum(lying(root, step) for step in steps_found(root))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under `folder`; what goes meanwhile does not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total
