"""Preview a version's branch without training: merge main-path checkpoints with the weights of its decay
(WSM).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_text
from megatron_lrpath.paradigms import BRANCH, OURS
from megatron_lrpath.plan import Plan, Run, load_plan
from megatron_lrpath.plan.file.source import plain, read_source
from megatron_lrpath.runs.archive import fetch_missing
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.results import write_result
from megatron_lrpath.schedule import LRPath, Schedule
from megatron_lrpath.schedule.styles import with_branch_shape
from megatron_lrpath.sealed import write_sealed


def decay_shares(path: LRPath, steps: Sequence[int]) -> list[float]:
    """Return w_1 … w_k: the mean rate of a decay between successive checkpoints, divided by the rate at its
    start.

    Args:
        path: the decay, positions in steps; it begins at the first checkpoint.
        steps: the checkpoints' steps, ascending, the first and k others.

    A merge scales the update between two checkpoints by the relative rate that the decay would have had
    there. At the main path's constant rate this equals the decayed run's updates to first order.
    """
    top = path.begins_at
    return [
        math.fsum(path.lr_at(position) for position in range(before, after)) / (after - before) / top
        for before, after in itertools.pairwise(steps)
    ]


def merge_weights(shares: Sequence[float]) -> list[float]:
    """Return c_0 = 1 − w_1, c_j = w_j − w_{j+1}, c_k = w_k, which sum to 1.

    Raise ValueError unless 1 ≥ w_1 ≥ … ≥ w_k ≥ 0.
    """
    bounded = [1.0, *shares, 0.0]
    if not shares or any(after > before + 1e-12 for before, after in itertools.pairwise(bounded)):
        raise ValueError(f"the shares of a decay must fall from 1 to 0, unlike {list(shares)}")
    return [before - after for before, after in itertools.pairwise(bounded)]


@dataclass(frozen=True)
class Preview:
    """The merge to perform: the main path's checkpoints `steps` with `weights`, to approximate the end of
    `run`.
    """

    plan: Plan
    run: Run
    name: str
    steps: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def folder(self) -> Path:
        """The folder of the preview's plan and checkpoint."""
        return Path(self.plan.output) / "merged" / self.name


def plan_preview(
    plan: Plan, version: str, shape: str | None, floor: float | None, first: int | None
) -> Preview:
    """Select the checkpoints and their weights.

    Args:
        version: the version whose branch is previewed.
        shape, floor: the decay; default: the plan's schedule (floor: fraction of max_lr).
        first: the step at which the decay begins; default: the branch point.

    Raises:
        UserError: no such version, or neither the main path nor the plan's archive has checkpoints at the start and the
            end of the decay.
    """
    run = plan.run(OURS.name, BRANCH.run_name(version))
    root = RunFolder(plan.folder(plan.main)).checkpoints
    begin = run.first_step if first is None else first
    fetch_missing(plan, [(plan.main, begin), (plan.main, run.last_step)])
    steps = tuple(step for step in complete_steps(root) if begin <= step <= run.last_step)
    for wanted in (begin, run.last_step):
        if wanted not in steps:
            raise UserError(
                f"{root}: a merge for {version} needs the main path's checkpoint of step {wanted}; there are "
                f"{', '.join(map(str, complete_steps(root))) or 'none'}. The main path passes the end of a "
                "version once the next one is in the plan; a smaller `save_interval` under `megatron` keeps more."
            )
    if len(steps) < 2:
        raise UserError(f"{root}: a decay from step {begin} to {run.last_step} has no checkpoints to merge")
    _require_one_rate(plan, version, steps)
    path = LRPath(_schedule(plan, run, shape, floor), "branch", begin, run.last_step, peak=run.path.peak)
    end = "" if floor is None else f"-to{floor:g}"
    name = f"{version}-{shape or plan.schedule.style}-from{begin}{end}"
    return Preview(plan, run, name, steps, tuple(merge_weights(decay_shares(path, steps))))


def write_preview(preview: Preview) -> Path:
    """Merge the checkpoints, and write a plan for `lrpath eval` next to the result; return the plan's path."""
    # imports torch, which a refusal does not need
    from megatron_lrpath.merge.torch_dist import merge_checkpoints

    mapping = plain(read_source(preview.plan.path).root)
    mapping |= {"name": f"{preview.plan.name}-{preview.name}"[:100], "output": str(preview.folder / "runs")}
    path = preview.folder / "plan.yaml"
    atomic_write_text(path, yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True))
    folder = RunFolder(load_plan(path).folder(preview.run))
    root = RunFolder(preview.plan.folder(preview.plan.main)).checkpoints
    last = preview.run.last_step
    merge_checkpoints(root, preview.steps, preview.weights, folder.checkpoints, last)
    merged = dict(zip(map(str, preview.steps), preview.weights, strict=True))
    write_sealed(folder.merged, {"from": str(root), "weights": merged})
    write_result(folder.path, preview.run, last)
    return path


def _require_one_rate(plan: Plan, version: str, steps: Sequence[int]) -> None:
    """Raise UserError if the main path's rate changes between the checkpoints: the weights assume a constant
    rate.
    """
    corners = {place for place in plan.main.path.corners if steps[0] < place < steps[-1]}
    places = {*steps[:-1], *corners, steps[-1] - 1}
    if len({plan.main.path.lr_at(place) for place in places}) > 1:
        raise UserError(
            f"{plan.path}: the main path's rate changes between steps {steps[0]} and {steps[-1]}, where a merge for "
            f"{version} takes it as constant; train the branch instead"
        )


def _schedule(plan: Plan, run: Run, shape: str | None, floor: float | None) -> Schedule:
    schedule = plan.schedule if shape is None else with_branch_shape(plan.schedule, shape)
    return schedule if floor is None else replace(schedule, min_lr=floor * run.path.begins_at)
