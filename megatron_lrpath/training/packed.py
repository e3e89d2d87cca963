"""Batches of packed samples: every rank reads its own, and no example attends to another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_lrpath.errors import UserError

_packed = False


def set_packed(packed: bool) -> None:
    """Say whether this process's batches are packed samples."""
    global _packed
    _packed = packed


def is_packed() -> bool:
    """Whether batches are packed samples."""
    return _packed


def refuse_unsupported(args: Any) -> None:
    """Stop at a layout that packed samples do not have.

    Raises:
        UserError: context parallelism.
    """
    if args.context_parallel_size != 1:
        raise UserError(
            "--context-parallel-size: packed samples are not split over ranks; leave it out for sft runs"
        )


def packed_batch(data_iterator: Iterator[dict[str, Tensor]] | None) -> dict[str, Tensor | None]:
    """The next micro-batch, [micro_batch, seq] tensors and the mask that keeps examples apart.

    Every stage of the pipeline needs the mask, so every rank reads the batch from its own iterator: all of them
    have the same data, and the same order on the ranks of one model.
    """
    assert data_iterator is not None
    sample = next(data_iterator)
    names = ("tokens", "labels", "loss_mask", "position_ids")
    batch: dict[str, Tensor | None] = {name: sample[name].cuda(non_blocking=True) for name in names}
    batch["attention_mask"] = apart(sample["segments"].cuda(non_blocking=True))
    return batch


def apart(segments: Tensor) -> Tensor:
    """Megatron's mask (True: may not attend), [batch, 1, seq, seq]: back to the beginning of the own segment.

    Args:
        segments: [batch, seq] numbers, equal within an example.
    """
    length = segments.size(1)
    same = segments.unsqueeze(1) == segments.unsqueeze(2)
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return ~(same & earlier).unsqueeze(1)
