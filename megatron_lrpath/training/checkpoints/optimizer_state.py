"""The optimizer state in a checkpoint, written and read with each parameter's state on one rank.

The format is Megatron's `fully_reshardable`: a tensor of the parameter's shape for the fp32 weights and
each moment, which any layout can load. Megatron gathers all of them in the host memory of every
data-parallel rank, for saving and for loading. Here the rank with a parameter's first element writes it,
and the other ranks with a part send theirs from device to device; a rank loads a parameter only if
it holds a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

WEIGHTS = "param"  # Megatron's name for the fp32 weights among the tensors of a parameter
PREFIX = "optimizer.state"
GATHERED_BY_MEGATRON = "distrib_optim_fully_reshardable_mem_efficient"
Parts = dict[int, slice]


def sharded_param_state(
    original: Callable[..., Any],
    self: Any,
    model_sharded_state_dict: Any,
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
    **named: Any,
) -> Any:
    """Return the tensors of the optimizer state that this rank writes or reads, by the number of the
    parameter.

    Megatron's own function is used for optimizers that keep their state in other precisions or on the
    host, and with `--distrib-optim-fully-reshardable-mem-efficient`. All ranks of the group call this
    together.
    """
    described = _described(model_sharded_state_dict)
    if not _is_ours(self, described, metadata or {}):
        return original(self, model_sharded_state_dict, is_loading, metadata, **named)
    state: dict[int, dict[str, Any]] = {}
    for number, (buffer, parameter) in enumerate(_parameters(self)):
        item = described[id(parameter)]
        parts = parts_of(buffer, parameter)
        tensors = (_room if is_loading else _written)(self, parameter, item, parts)
        main = (
            0 if self.data_parallel_group.rank() == min(parts) else 1
        ) + self.distributed_optimizer_instance_id
        state[number] = {key: _renamed(item, key, tensor, main) for key, tensor in tensors.items()}
    return state


def parts_of(buffer: Any, parameter: Any) -> Parts:
    """Return the elements of a parameter that each data-parallel rank holds; ranks without elements are
    omitted.

    A padded bucket of parameters is split into equal parts for the ranks, across parameter boundaries.
    """
    start, end, bucket = buffer.param_index_map[parameter]
    offset = buffer.buckets[bucket].offset
    share = buffer.buckets[bucket].grad_data.numel() // buffer.data_parallel_group.size()
    start, end = start - offset, end - offset
    ranks = range(start // share, (end - 1) // share + 1)
    return {
        rank: slice(max(start, rank * share) - start, min(end, (rank + 1) * share) - start) for rank in ranks
    }


def _described(model: Any) -> dict[int, Any]:
    """Return how each parameter of the model is stored, by its identity."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values  # after the choice of the device
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    return {id(item.data): item for item in nested_values(extract_sharded_tensors_and_factories(model)[0])}


def _parameters(optimizer: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (buffer, parameter) in Megatron's order, which numbers them in a state."""
    for buffer in optimizer.buffers:
        for parameter in buffer.param_index_map:
            yield buffer, parameter


def _is_ours(optimizer: Any, described: dict[int, Any], metadata: dict[str, Any]) -> bool:
    """Return whether this module supports the optimizer; the answer is the same on all ranks."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer  # after the choice of the device

    items = [described.get(id(parameter)) for _, parameter in _parameters(optimizer)]
    return not (
        metadata.get(GATHERED_BY_MEGATRON)
        or optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        or isinstance(optimizer.optimizer, HybridDeviceOptimizer)
        or any(item is None or not isinstance(item.replica_id, tuple) for item in items)
    )


def _states(optimizer: Any, parameter: Any) -> dict[str, torch.Tensor]:
    """Return this rank's part of a parameter's fp32 weights and moments, flat, on its device."""
    states = optimizer._get_main_param_and_optimizer_states(parameter)
    return {
        key: states[key].detach().view(-1).to(torch.float32)
        for key in (WEIGHTS, *optimizer.optimizer_state_keys)
    }


def _written(optimizer: Any, parameter: Any, item: Any, parts: Parts) -> dict[str, torch.Tensor]:
    """Return the part of a parameter that this rank writes: all of it on the rank with the first element,
    else nothing.

    A parameter on a single rank is not copied here; the writer takes it from the device. Replicas on other
    tensor-parallel ranks, pipeline stages and optimizer instances are not written.
    """
    rank = optimizer.data_parallel_group.rank()
    if rank not in parts or optimizer.distributed_optimizer_instance_id or any(item.replica_id[:-1]):
        return {}
    pieces = _states(optimizer, parameter)
    if len(parts) > 1:
        group = optimizer.data_parallel_group
        pieces = {key: _joined(piece, parts, group) for key, piece in pieces.items()}
    return {key: whole.view(item.data.shape) for key, whole in pieces.items()} if rank == min(parts) else {}


def _joined(piece: torch.Tensor, parts: Parts, group: Any) -> torch.Tensor:
    """Gather the parts of a tensor in the host memory of the first rank that has one; the others send theirs.

    At most one part in addition to its own is on a device at a time.
    """
    rank, owner = group.rank(), min(parts)
    if rank != owner:
        _exchange(torch.distributed.isend, piece.contiguous(), owner, group)
        return piece
    whole = torch.empty(max(part.stop for part in parts.values()), dtype=piece.dtype)
    whole[parts[owner]] = piece.cpu()
    for other in sorted(parts.keys() - {owner}):
        received = piece.new_empty(parts[other].stop - parts[other].start)
        _exchange(torch.distributed.irecv, received, other, group)
        whole[parts[other]] = received.cpu()
    return whole


def _exchange(operation: Callable[..., Any], tensor: torch.Tensor, peer: int, group: Any) -> None:
    """Send to, or receive from, a rank of the group; as a batch, because NCCL then needs no separate
    connection.
    """
    rank = torch.distributed.get_global_rank(group, peer)
    for work in torch.distributed.batch_isend_irecv(
        [torch.distributed.P2POp(operation, tensor, rank, group)]
    ):
        work.wait()


def _room(optimizer: Any, parameter: Any, item: Any, parts: Parts) -> dict[str, torch.Tensor]:
    """Return the tensors into which a parameter's state is loaded, if this rank holds a part of it.

    On the CPU they are the training tensors, if the rank holds the whole parameter.
    """
    if optimizer.data_parallel_group.rank() not in parts:
        return {}
    if len(parts) == 1 and item.data.device.type == "cpu":
        return {key: state.view(item.data.shape) for key, state in _states(optimizer, parameter).items()}
    keys = (WEIGHTS, *optimizer.optimizer_state_keys)
    return {key: torch.zeros(item.data.shape, dtype=torch.float32, device="cpu") for key in keys}


def _renamed(item: Any, key: str, tensor: torch.Tensor, replica: int) -> Any:
    """Return the description of a weight for a tensor of its optimizer state; replica 0 is written."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory  # after the device's choice

    changed: dict[str, Any] = {
        "key": f"{PREFIX}.{key}.{item.key}",
        "data": tensor,
        "replica_id": (*item.replica_id[:-1], replica),
    }
    if not isinstance(item, ShardedTensorFactory):
        changed["dtype"] = tensor.dtype
    described = replace(item, **changed)
    described.validate_metadata_integrity()
    return described
