"""What tensor-parallel ranks exchange around a product whose weight they share out."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Copied(torch.autograd.Function):
    """The same input on all ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, group: Any) -> torch.Tensor:
        """As it is."""
        ctx.group = group
        return inputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Summed over the ranks."""
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Summed(torch.autograd.Function):
    """The sum of the ranks' outputs; each has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, group: Any) -> torch.Tensor:
        """Summed over the ranks."""
        outputs = outputs.contiguous()
        dist.all_reduce(outputs, group=group)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """As it is."""
        return grad, None
