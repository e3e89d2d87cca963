"""On the CPU a checkpoint is written from the tensors that train: no copies on the way.

Megatron copies every tensor that is a part of a larger buffer. That serves GPUs, whose memory has to be copied
anyway. On the CPU it takes longer than writing, and an asynchronous save would stop the training for it, although its
forked writers have the memory as it was without any copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
