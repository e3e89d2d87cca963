"""Exchanges between tensor-parallel ranks around a product whose weight they share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Copied(torch.autograd.Function):
    """The same input on all ranks; its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, group: Any) -> torch.Tensor:
        """Return the input unchanged."""
        ctx.group = group
        return inputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Return the gradient, summed over the ranks."""
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Summed(torch.autograd.Function):
    """The sum of the ranks' outputs; each has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, group: Any) -> torch.Tensor:
        """Return the output, summed over the ranks."""
        outputs = outputs.contiguous()
        dist.all_reduce(outputs, group=group)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Return the gradient unchanged."""
        return grad, None
