"""A loss or gradient norm that is not finite: which step, rank and samples, and where to go on from."""

from __future__ import annotations

import math
from typing import Any

from megatron_lrpath.errors import TrainingStoppedError
from megatron_lrpath.training.checkpoints.saves import current_saves


def stop_for_numbers(loss: float, norm: float, micro_batches: list[float]) -> None:
    """Stop before the update. All ranks call this in the same step.

    Args:
        loss: of the whole batch.
        norm: of the gradient, as far as this rank knows.
        micro_batches: the losses of this rank's micro-batches, in their order; empty on ranks without a loss.

    Raises:
        TrainingStoppedError: always.
    """
    import torch.distributed as dist
    from megatron.training import get_args
    from megatron.training.async_utils import maybe_finalize_async_save

    args = get_args()
    bad = [index for index, value in enumerate(micro_batches) if not math.isfinite(value)]
    ours = (own_samples(args, bad), [micro_batches[index] for index in bad], norm)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, ours)
    maybe_finalize_async_save(blocking=True)
    raise TrainingStoppedError(message(args, loss, everybody))


def message(args: Any, loss: float, everybody: list[tuple[list[str], list[float], float]]) -> str:
    """What happened, where the batch can be seen, and how to go on."""
    step = args.curr_iteration + 1
    culprits = [
        f"{value} on rank {rank} in {samples}"
        for rank, (places, values, _) in enumerate(everybody)
        for samples, value in zip(places, values, strict=True)
    ]
    if culprits:
        what = f"the loss is not finite: {'; '.join(culprits)}"
    else:
        ranks = [rank for rank, (_, _, norm) in enumerate(everybody) if not math.isfinite(norm)]
        where = "on every rank" if len(ranks) == len(everybody) else f"on ranks {', '.join(map(str, ranks))}"
        what = f"the gradient norm is {everybody[ranks[0]][2]} {where}, the loss {loss:.4f}"
    first = args.consumed_train_samples
    saves = current_saves()
    newest = f"step {saves.steps[-1]} in {saves.root}" if saves and saves.steps else "none"
    return (
        f"step {step}: {what}. Stopped before the update; the batch is samples {first} to "
        f"{first + args.global_batch_size - 1} (`lrpath samples RUN --step {step}` prints them). Last good "
        f"checkpoint: {newest}; called again, the training goes on from there."
    )


def own_samples(args: Any, micro_batches: list[int]) -> list[str]:
    """The samples of this rank's micro-batches, which Megatron deals to the data-parallel ranks in turn."""
    from megatron.core import mpu

    size, ranks = args.micro_batch_size, mpu.get_data_parallel_world_size()
    begin = args.consumed_train_samples + mpu.get_data_parallel_rank() * size
    firsts = [begin + index * size * ranks for index in micro_batches]
    return [f"samples {first} to {first + size - 1}" if size > 1 else f"sample {first}" for first in firsts]
