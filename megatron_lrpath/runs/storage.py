"""The disk space of checkpoints: predicted from a plan, and measured."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.models import USUAL_VOCABULARY, parameter_count, resolve_model
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.plan.spec import SAVE_INTERVAL
from megatron_lrpath.runs.checkpoints import checkpoint_folder, steps_found

STATE_BYTES = 12  # per parameter: the optimizer's copy in fp32 and Adam's two moments
NEWEST = 2  # checkpoints of a run that retention keeps, in addition to those that other runs start from


@dataclass(frozen=True)
class CheckpointSize:
    """The approximate size of one checkpoint in bytes: the model's weights and the optimizer state."""

    weights: int
    state: int

    @property
    def total(self) -> int:
        """The total."""
        return self.weights + self.state


@dataclass(frozen=True)
class Kept:
    """The checkpoints of a run that are kept: named steps, and the number of the newest ones in addition."""

    steps: tuple[int, ...]
    newest: int

    @property
    def count(self) -> int:
        """The maximum number at any time."""
        return len(self.steps) + self.newest


def checkpoint_size(plan: Plan, vocabulary: int | None = None) -> CheckpointSize:
    """Return the size of one checkpoint of the plan's model.

    A parameter takes 2 bytes (bf16, fp16) or 4 in the model's weights, and `STATE_BYTES` in the optimizer
    state. `vocabulary` is used if the plan takes it from the tokenizer.

    Raises:
        UserError: the parameters of this model cannot be counted.
    """
    words = plan.tokenizer.vocab_size or vocabulary or USUAL_VOCABULARY
    parameters = parameter_count(resolve_model(plan.model), words)
    small = plan.megatron.get("bf16") or plan.megatron.get("fp16")
    return CheckpointSize(parameters * (2 if small else 4), parameters * STATE_BYTES)


def kept(plan: Plan, run: Run) -> Kept:
    """Return the checkpoints of a run that are kept under the plan's `save_interval` and
    `save_retain_interval`.

    These are the ones that other runs start from, the last one, those that `save_retain_interval` keeps,
    and the newest two.
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
    """Return the approximate disk space of a run's checkpoints in bytes. Raise UserError as
    `checkpoint_size`.
    """
    return kept(plan, run).count * checkpoint_size(plan).total


@dataclass(frozen=True)
class Storage:
    """The final disk space of a paradigm's checkpoints in bytes: one checkpoint, kept ones by version, the
    newest in addition.
    """

    one: CheckpointSize
    by_version: dict[str, int]
    newest: int

    @property
    def total(self) -> int:
        """The total."""
        return sum(self.by_version.values()) + self.newest


def predicted(plan: Plan, paradigm: str) -> Storage | None:
    """Return the disk space of a paradigm's checkpoints; None if the model's parameters cannot be counted.

    A checkpoint of the main path counts for the version of its last step.
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
    """Return the version of step `step` of the main path."""
    ends = zip(plan.timeline.ends, plan.versions, strict=True)
    return next((version.name for end, version in ends if step <= end), plan.versions[-1].name)


def lying(root: Path, step: int) -> int:
    """Return the size in bytes of one checkpoint under `root`; 0 if it is gone."""
    return folder_bytes(checkpoint_folder(root, step))


def lying_in_all(root: Path) -> int:
    """Return the size in bytes of all checkpoints under `root`, complete or not."""
    return sum(lying(root, step) for step in steps_found(root))


def folder_bytes(folder: Path) -> int:
    """Return the size in bytes of all files under `folder`; files removed meanwhile are ignored."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total
