"""Write checkpoints on the CPU directly from the training tensors, without copies.

Megatron copies every tensor that is part of a larger buffer. On GPUs the memory must be copied anyway. On
the CPU the copy takes longer than the write, and it delays the training during an asynchronous save,
although the forked writers share the memory as it was at the fork.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def resolve_data(original: Callable[..., Any], self: Any, write_item: Any, *args: Any, **named: Any) -> Any:
    """Give the writer a tensor that it need not copy: the same memory as a storage that ends with the tensor.

    A tensor with gaps is returned unchanged.
    """
    data = original(self, write_item, *args, **named)
    if not isinstance(data, torch.Tensor) or data.device.type != "cpu":
        return data
    whole = data.untyped_storage().nbytes() == data.numel() * data.element_size()
    if whole or not data.numel() or not data.is_contiguous():
        return data
    memory = data.detach().view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(memory).view(data.dtype).view(data.shape)
