"""The mean token loss of a model over the whole validation set, each token once, for every domain too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.training import get_args
from torch.utils.data import default_collate

from megatron_lrpath.training.forward import ForwardStep

# Micro-batches that one call of the pipeline schedule carries.
CHUNK = 64


def micro_batches(dataset: Any, samples: Sequence[int], size: int) -> Iterator[dict[str, Any]]:
    """This data-parallel rank's share of `samples` in batches of `size`.

    Every rank gets the same number of batches; what fills up the last ones is masked out.
    """
    rank, world = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    stride = size * world
    for start in range(0, len(samples), stride):
        mine = range(start + rank * size, start + (rank + 1) * size)
        yield default_collate([dataset[samples[i] if i < len(samples) else None] for i in mine])


@torch.no_grad()
def mean_loss(
    model: list[Any], dataset: Any, samples: Sequence[int], forward_step: ForwardStep
) -> tuple[float, int]:
    """Mean cross-entropy (nats a token) and the number of tokens over `samples`; equal on all ranks.

    Args:
        model: Megatron's list of model chunks.
        dataset: the validation set.
        samples: positions in it.
        forward_step: of the batches that the set consists of.
    """
    args = get_args()
    size = args.micro_batch_size
    batches = micro_batches(dataset, samples, size)
    left = math.ceil(len(samples) / (size * mpu.get_data_parallel_world_size()))
    total = torch.zeros(2, dtype=torch.float64)
    forward = get_forward_backward_func()
    while left > 0:
        count = min(CHUNK, left)
        left -= count
        reports = forward(
            forward_step_func=forward_step,
            data_iterator=[batches] * len(model) if len(model) > 1 else batches,
            model=model,
            num_microbatches=count,
            seq_length=args.seq_length,
            micro_batch_size=size,
            forward_only=True,
        )
        for report in reports:
            total += report["lm loss"].double().cpu()
    return reduced(total)


def reduced(total: torch.Tensor) -> tuple[float, int]:
    """(mean, tokens) from each rank's (loss sum, tokens), on all ranks: only the last stage has them."""
    summed = total.cuda()
    if mpu.is_pipeline_last_stage():
        torch.distributed.all_reduce(summed, group=mpu.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.broadcast(
        summed, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
    )
    loss, tokens = summed.tolist()
    return loss / max(tokens, 1.0), int(tokens)


def evaluate_model(model: list[Any], dataset: Any, packed: bool = False) -> dict[str, Any]:
    """Loss (nats a token), perplexity and tokens of the whole validation set and of each domain.

    The whole is exp of the mean over all tokens, not a mean of the domains' perplexities. `packed`: the set
    consists of packed samples.
    """
    for chunk in model:
        chunk.eval()
    # The checks of a training step (rerun on NaN) have no step to belong to here.
    get_rerun_state_machine().set_mode(RerunMode.DISABLED)
    by_domain: dict[str, list[int]] = {domain: [] for domain in dataset.domains}
    for sample in range(len(dataset)):
        by_domain[dataset.domain_of(sample)].append(sample)
    domains: dict[str, dict[str, Any]] = {}
    for domain, samples in by_domain.items():
        loss, tokens = mean_loss(model, dataset, samples, ForwardStep(packed=packed))
        domains[domain] = {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}
    tokens = sum(entry["tokens"] for entry in domains.values())
    loss = sum(entry["loss"] * entry["tokens"] for entry in domains.values()) / max(tokens, 1)
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens, "domains": domains}
