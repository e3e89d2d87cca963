"""A batch size that changes at the beginning of a version, in Megatron's arguments and in its count of micro batches.

`args.global_batch_size` is the plan's `batch.global_batch_size` in all checkpoints of a plan. How many micro batches a
step has follows from the consumed samples, by Megatron's own calculator.
"""

from __future__ import annotations

from typing import Any

from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator

from megatron_lrpath.errors import UserError
from megatron_lrpath.schedule import BatchSizes


def before_validation(args: Any, sizes: BatchSizes) -> None:
    """Let Megatron validate the batch size of the run's last step; the first ones may be too small for this layout."""
    args.global_batch_size = sizes.size_of(args.train_iters)


def follow(args: Any, sizes: BatchSizes, is_evaluation_given: bool) -> None:
    """Give each step its batch size; call it when Megatron's global variables are set.

    Evaluations keep the first batch size where the layout allows it, unless `is_evaluation_given`.
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
    """Refuse a layout that the batch of a step after `step` cannot be divided among.

    Raises:
        UserError: the size, and what has to divide it.
    """
    micro, copies = args.micro_batch_size, data_parallel(args)
    for size in sizes.sizes(step, args.train_iters):
        if size % (micro * copies):
            raise UserError(
                f"a batch of {size} samples (in steps after {step:,}) cannot be divided among {copies} data-parallel "
                f"ranks in micro batches of {micro}; give fewer processes or a smaller --micro-batch-size"
            )


def data_parallel(args: Any) -> int:
    """The number of ranks that a batch is divided among."""
    return int(args.data_parallel_size * args.gtp_weight_remat_size)
