"""The schedule in Megatron's loop: its scheduler with the learning-rate path, and batch sizes that change.

Both follow from the consumed samples. In all checkpoints of a plan `args.global_batch_size` is the plan's
`batch.global_batch_size`; Megatron's own calculator gives the micro batches of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_lrpath.errors import UserError
from megatron_lrpath.schedule import BatchSizes, LRPath


class LRPathScheduler(OptimizerParamScheduler):
    """Sets every parameter group's rate from an `LRPath` over consumed samples.

    The position follows from the samples consumed before a step, so step `s` has position `s-1` (the
    convention of `LRPath`). Megatron's own counter counts them: a step skipped for a gradient overflow also
    consumes its samples, and a decay still completes.

    A loaded checkpoint does not affect the rate. Megatron (up to 0.19) leaves the checkpoint's `max_lr` and
    `min_lr` in the parameter groups and its scheduler reads them first, so that a branch would silently train
    at the parent's rates; here the groups keep the configuration of this run.

    Args:
        optimizer: Megatron's optimizer.
        path: the run's learning rate; positions in steps.
        sizes: the samples of each step.
        consumed_samples: samples consumed before the current step.
        start_wd, end_wd, wd_incr_steps, wd_incr_style: Megatron's weight-decay settings (`wd_incr_steps` in
        samples).
    """

    def __init__(
        self,
        optimizer: Any,
        path: LRPath,
        sizes: BatchSizes,
        consumed_samples: Callable[[], int],
        start_wd: float,
        end_wd: float,
        wd_incr_steps: int,
        wd_incr_style: str,
    ) -> None:
        self.path, self.sizes = path, sizes
        self.consumed_samples = consumed_samples
        self.group_rates = [
            {key: group[key] for key in ("max_lr", "min_lr") if key in group}
            for group in optimizer.param_groups
        ]
        self.used_lr = 0.0
        super().__init__(
            optimizer,
            init_lr=0.0,
            max_lr=path.schedule.max_lr,
            min_lr=path.schedule.min_lr,
            lr_warmup_steps=0,
            lr_decay_steps=1,
            lr_decay_style=path.schedule.style,
            start_wd=start_wd,
            end_wd=end_wd,
            wd_incr_steps=wd_incr_steps,
            wd_incr_style=wd_incr_style,
        )

    @classmethod
    def of(cls, optimizer: Any, path: LRPath, sizes: BatchSizes, args: Any) -> LRPathScheduler:
        """Return the scheduler of a run with Megatron's arguments `args`, which hold the sample counter of
        the loop.
        """
        return cls(
            optimizer,
            path=path,
            sizes=sizes,
            consumed_samples=lambda: args.consumed_train_samples,
            start_wd=args.start_weight_decay,
            end_wd=args.end_weight_decay,
            wd_incr_steps=sizes.samples_at(args.train_iters),
            wd_incr_style=args.weight_decay_incr_style,
        )

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Return the rate of `param_group` at the current position; groups with their own rates follow the
        same shape.
        """
        max_lr = param_group.get("max_lr")
        min_lr = param_group.get("min_lr")
        path = self.path
        if max_lr is not None and (max_lr, min_lr) != (path.schedule.max_lr, path.schedule.min_lr):
            path = path_with_rates(path, max_lr, path.schedule.min_lr if min_lr is None else min_lr)
        return path.lr_at(max(self.sizes.steps_at(self.num_steps), path.start))

    def step(self, increment: int) -> None:
        """Advance the rates to the next step; `increment` is the batch just consumed (samples)."""
        groups = self.optimizer.param_groups
        groups = [group for group in groups if group.get("default_config", False)] or groups
        self.used_lr = float(groups[0].get("lr") or 0.0) if groups else 0.0
        self.num_steps = self.consumed_samples()
        super().step(increment)

    def step_ended(self, skipped: bool) -> float:
        """Return the rate that the step used; after a skipped update also advance, which Megatron does not
        do.
        """
        if skipped:
            self.step(0)  # the rate belongs to the consumed samples
        return self.used_lr

    def state_dict(self) -> dict[str, Any]:
        """Return position (samples) and path; the path is stored for readers only and ignored when loading.

        The path's positions are in samples if all steps have the same number, otherwise in steps.
        """
        is_constant = len(self.sizes.changes) == 1 and not self.sizes.samples
        path = self.path.scaled(self.sizes.changes[0][1]) if is_constant else self.path
        return {"num_steps": self.num_steps, "lr_path": path.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the loaded position with this run's own rates."""
        for group, rates in zip(self.optimizer.param_groups, self.group_rates, strict=True):
            group.update(rates)
        self.step(0)


@functools.lru_cache(maxsize=64)
def path_with_rates(path: LRPath, max_lr: float, min_lr: float) -> LRPath:
    """Return `path` with other rates."""
    return path.with_rates(max_lr, min_lr)


def set_last_batch_size(args: Any, sizes: BatchSizes) -> None:
    """Let Megatron validate the last step's batch size; earlier ones may be too small for this layout."""
    args.global_batch_size = sizes.size_of(args.train_iters)


def follow_batch_sizes(args: Any, sizes: BatchSizes, is_evaluation_given: bool) -> None:
    """Give each step its batch size; call it when Megatron's global variables are set.

    Evaluations keep the first batch size if the layout allows it, unless `is_evaluation_given`.
    """
    first, copies = sizes.changes[0][1], data_parallel(args)
    args.global_batch_size = first
    if len(sizes.changes) == 1:
        return
    if not is_evaluation_given and first % (args.eval_micro_batch_size * copies) == 0:
        args.eval_global_batch_size = first
    (_, first), *later = sizes.thresholds()
    reconfigure_num_microbatches_calculator(
        args.rank,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=copies,
        step_batch_size_schedule=" ".join(f"{samples}:{size}" for samples, size in [(0, first), *later]),
    )


def require_whole_micro_batches(args: Any, sizes: BatchSizes, step: int) -> None:
    """Refuse a layout that cannot divide the batch of a step after `step`.

    Raises:
        UserError: with the size, and what must divide it.
    """
    micro, copies = args.micro_batch_size, data_parallel(args)
    for size in sizes.sizes(step, args.train_iters):
        if size % (micro * copies):
            raise UserError(
                f"a batch of {size} samples (in steps after {step:,}) cannot be divided among {copies} data-parallel "
                f"ranks in micro batches of {micro}; give fewer processes or a smaller --micro-batch-size"
            )


def data_parallel(args: Any) -> int:
    """Return the number of ranks that share a batch."""
    return int(args.data_parallel_size * args.gtp_weight_remat_size)
