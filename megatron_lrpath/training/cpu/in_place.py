"""On the CPU a checkpoint is written from, and loaded into, the tensors that train: no copies on the way.

Megatron gathers the optimizer's state of all data-parallel ranks in fresh buffers and copies every tensor that is a
part of a larger buffer. That serves GPUs, whose memory has to be copied anyway. On the CPU it takes longer than
writing, and an asynchronous save would stop the training for it, although its forked writers have the memory
as it was without any copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Slices:
    """A flat buffer that is there in parts only.

    Args:
        parts: one-dimensional tensors by the position at which they begin.
    """

    def __init__(self, parts: dict[int, torch.Tensor]) -> None:
        self._parts = parts

    def __getitem__(self, place: slice) -> torch.Tensor:
        return self._parts[place.start]


def parameter_state(
    original: Callable[..., Any],
    self: Any,
    use_gloo_comm: bool = True,
    empty_data: bool = False,
    return_on_all_ranks: bool = False,
) -> Any:
    """Weights and moments as they are, where one data-parallel rank has all of them.

    The original returns flat buffers of [parameters]; of these only the slices of single parameters are used.
    """
    if self.data_parallel_group.size() > 1:
        return original(self, use_gloo_comm, empty_data, return_on_all_ranks)
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, (buffer, ranges) in enumerate(zip(self.buffers, self.gbuf_ranges, strict=True)):
        states = {
            begin: self._get_main_param_and_optimizer_states(parameter)
            for parameter, (begin, _, _) in buffer.param_index_map.items()
        }
        state[index] = {
            dtype: {
                key: Slices({begin: one[key].detach().view(-1) for begin, one in states.items()})
                for key in ("param", *self.optimizer_state_keys)
            }
            for dtype in ranges
        }
    return state


def resolve_data(original: Callable[..., Any], self: Any, write_item: Any, *args: Any, **named: Any) -> Any:
    """Hand the writer tensors that it sees no need to copy: the same memory as a storage that ends with the tensor.

    A tensor that has gaps stays as it is.
    """
    data = original(self, write_item, *args, **named)
    if not isinstance(data, torch.Tensor) or data.device.type != "cpu":
        return data
    whole = data.untyped_storage().nbytes() == data.numel() * data.element_size()
    if whole or not data.numel() or not data.is_contiguous():
        return data
    memory = data.detach().view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(memory).view(data.dtype).view(data.shape)
