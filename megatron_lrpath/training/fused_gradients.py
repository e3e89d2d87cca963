"""Weight gradients accumulated in fp32 inside the matrix product, in torch, like Apex's
`fused_weight_gradient_mlp_cuda`.

Megatron's own layers (including the output layer of Transformer Engine models) import a compiled module of
Apex with that name. If Apex is not installed this module replaces it, before Megatron is imported.
"""

from __future__ import annotations

import functools
import importlib.util
import sys

import torch
from torch import Tensor

NAME = "fused_weight_gradient_mlp_cuda"  # as Megatron imports it


def register() -> None:
    """Make `import fused_weight_gradient_mlp_cuda` return this module if Apex's is not installed."""
    if NAME not in sys.modules and importlib.util.find_spec(NAME) is None:
        sys.modules[NAME] = sys.modules[__name__]


def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add the gradient of a weight [out, in] to `main_grad` (fp32), in place.

    Args:
        inputs: [tokens, in], of any floating type.
        grad_output: [tokens, out], of the same type.
        main_grad: [out, in] in fp32.
    """
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), inputs)
    elif main_grad.is_cuda and accumulates(inputs.dtype):
        torch.addmm(main_grad, grad_output.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.add_(grad_output.t().matmul(inputs))


def wgrad_gemm_accum_fp16(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Do the same for a `main_grad` in 16 bits, the type of the product."""
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), inputs)
    else:
        main_grad.add_(grad_output.t().matmul(inputs))


@functools.cache
def accumulates(kind: torch.dtype) -> bool:
    """Return whether this GPU can add 16-bit products to fp32 in place; tested once with a small product.

    Older versions of torch, and some devices, do not support it.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(16, size, generator=generator).to("cuda", kind) for size in (8, 24))
    total = torch.ones(8, 24, device="cuda")
    try:
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return torch.allclose(total, 1 + left.t().float() @ right.float(), rtol=1e-2, atol=1e-2)
