"""One forward step of a GPT model in Megatron's loop: the batch (packed samples, too), the model, the masked
loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers
from torch import Tensor

from megatron_lrpath.training.guards.guard import Guard
from megatron_lrpath.training.guards.standstill import Standstill

Batch = dict[str, Tensor | None]
KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def packed_batch(data_iterator: Iterator[dict[str, Tensor]] | None) -> Batch:
    """Return the next micro-batch, [micro_batch, seq] tensors and the mask that separates examples.

    Every pipeline stage needs the mask, so every rank reads the batch from its own iterator: all of them
    have the same data, in the same order on the ranks of one model.
    """
    assert data_iterator is not None
    sample = next(data_iterator)
    batch: Batch = {key: sample[key].cuda(non_blocking=True) for key in KEYS[:-1]}
    batch["attention_mask"] = apart(sample["segments"].cuda(non_blocking=True))
    return batch


def apart(segments: Tensor) -> Tensor:
    """Return Megatron's mask (True: no attention), [batch, 1, seq, seq]: attention back to the beginning of
    the own segment.

    Args:
        segments: [batch, seq] numbers, equal within an example.
    """
    length = segments.size(1)
    same = segments.unsqueeze(1) == segments.unsqueeze(2)
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return ~(same & earlier).unsqueeze(1)


def get_batch(data_iterator: Iterator[dict[str, Tensor]] | None, vp_stage: int | None) -> Batch:
    """Return the next micro-batch on this rank: [micro_batch, seq / context_parallel_size] tensors.

    Tensor-parallel rank 0 reads it and broadcasts it; a middle stage of the pipeline needs none.
    """
    args = get_args()
    first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    if not (first or last):
        return dict.fromkeys(KEYS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if tp_rank == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in KEYS}
    if mpu.get_tensor_model_parallel_world_size() > 1:
        batch = broadcast(batch, args, tp_rank, first, last)
    wanted: Batch = {key: batch.get(key) for key in KEYS}
    return get_batch_on_this_cp_rank(wanted, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


def broadcast(batch: Batch, args: Any, tp_rank: int, first: bool, last: bool) -> Batch:
    """Broadcast the batch of tensor-parallel rank 0 to every rank of its group."""
    received: Batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    return received


class ForwardStep:
    """Megatron's forward-step function for language modeling.

    Args:
        guard: records the loss of each micro-batch; None in evaluations.
        packed: whether batches are packed samples.
        standstill: the clock of the training's steps; None in evaluations.
    """

    def __init__(
        self, guard: Guard | None = None, packed: bool = False, standstill: Standstill | None = None
    ) -> None:
        self.guard = guard
        self.packed = packed
        self.standstill = standstill

    def __call__(self, data_iterator: Iterator[dict[str, Tensor]] | None, model: Any) -> tuple[Tensor, Any]:
        """Return the model's output for the next micro-batch, and the function that computes the loss from
        it.
        """
        if self.standstill is not None and torch.is_grad_enabled():
            self.standstill.step_begins()
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        if self.packed:
            batch = packed_batch(data_iterator)
        else:
            batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
        timers("batch-generator").stop()
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
        # Only the last pipeline stage calls it, and that stage has a mask.
        return output, partial(self.loss, cast(Tensor, batch["loss_mask"]))

    def loss(self, loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the sum of the unmasked token losses, their number, and both for the log.

        Args:
            loss_mask: [micro_batch, seq], 1 if a token counts.
            losses: [micro_batch, seq] cross-entropies in nats.
        """
        mask = loss_mask.view(-1).float()
        loss = torch.sum(losses.view(-1).float() * mask)
        tokens = mask.sum().detach().to(torch.int)
        if get_args().check_for_nan_in_loss_and_grad:
            # Megatron's rerun machine stops the run on NaN or infinity before the update.
            for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
                get_rerun_state_machine().validate_result(
                    result=loss,
                    rejection_func=rejected,
                    message=f"found {name} in local forward loss calculation",
                    tolerance=0.0,
                    fatal=True,
                )
        if self.guard is not None:
            self.guard.note(loss, tokens)
        report = {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}
        return loss, tokens, report
