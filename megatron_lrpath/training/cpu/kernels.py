"""CPU versions of Megatron's fused GPU kernels: fewer passes over memory, the same results up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Number of logits that are converted to fp32 at a time: 2 MiB of values stay in the cache.
CHUNK = 1 << 19


class CrossEntropy(torch.autograd.Function):
    """Token losses of [rows, vocabulary] logits in fp32, computed in chunks of rows.

    Megatron's unfused function keeps an fp32 softmax of all logits; this one recomputes it in the backward
    pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """Return the losses [rows] in nats."""
        ctx.save_for_backward(logits, target)
        rows = chunk_rows(logits)
        parts = zip(logits.split(rows), target.split(rows), strict=True)
        return torch.cat([F.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in parts])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return (softmax - one-hot) · grad, in the logits' type."""
        logits, target = ctx.saved_tensors
        rows = chunk_rows(logits)
        grad = torch.empty_like(logits)
        parts = (tensor.split(rows) for tensor in (logits, target[:, None], grad_loss[:, None], grad))
        for part, wanted, scale, out in zip(*parts, strict=True):
            share = torch.softmax(part.float(), -1)
            share.scatter_add_(1, wanted, torch.full_like(scale, -1.0))
            torch.mul(share, scale, out=out)
        return grad, None


def chunk_rows(logits: Tensor) -> int:
    """Return the number of rows of [rows, vocabulary] logits in a chunk."""
    return max(1, CHUNK // logits.size(-1))


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up for [..., gate and up]; the gradient is written into one tensor instead of
    concatenating two.
    """

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        """Compute [..., 2·ffn] -> [..., ffn]."""
        gate, up = gate_and_up.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_and_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the gradient, [..., ffn] -> [..., 2·ffn]."""
        gate_and_up, activated = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, -1)
        result = torch.empty_like(gate_and_up)
        grad_gate, grad_up = result.chunk(2, -1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


class Rotary(torch.autograd.Function):
    """Rotary position embedding of two halves without copies: (a, b) -> (a·cos - b·sin, b·cos + a·sin)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate states [s, b, heads, d]; cos and sin are [s, 1, 1, d/2]."""
        ctx.save_for_backward(cos, sin)
        return rotate(states, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Rotate back."""
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, sin, -1), None, None


def rotate(states: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Rotate the pairs (a, b) of the two halves of the last dimension, forwards or backwards."""
    first, second = states.chunk(2, -1)
    result = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    to_first, to_second = result.chunk(2, -1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=sign)
    return result


def cross_entropy(
    original: Callable[..., Tensor],
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: Any = None,
    **unknown: Any,
) -> Tensor:
    """Use this module's kernel if one rank holds the whole vocabulary, else Megatron's."""
    if tp_group is None or tp_group.size() > 1 or label_smoothing or unknown:
        return original(vocab_parallel_logits, target, label_smoothing, tp_group, **unknown)
    losses = CrossEntropy.apply(vocab_parallel_logits.flatten(0, -2), target.flatten())
    return losses.view(target.shape)


def swiglu(
    original: Callable[..., Tensor], input: Tensor, bias: Tensor | None, *options: Any, **named: Any
) -> Tensor:
    """Use this module's kernel without a bias, Megatron's with one."""
    if bias is not None or any(options) or any(named.values()):
        return original(input, bias, *options, **named)
    return SwiGLU.apply(input)


def rotary(
    original: Callable[..., Tensor],
    t: Tensor,
    freqs: Tensor,
    config: Any,
    cu_seqlens: Tensor | None = None,
    mscale: float = 1.0,
    cp_group: Any = None,
    *options: Any,
    **named: Any,
) -> Tensor:
    """Use this module's kernel if the whole head is rotated in halves, else Megatron's."""
    special = (
        config.rotary_interleaved or config.multi_latent_attention or any(options) or any(named.values())
    )
    if cu_seqlens is not None or special or freqs.size(-1) != t.size(-1):
        return original(t, freqs, config, cu_seqlens, mscale, cp_group, *options, **named)
    angles = freqs[..., : freqs.size(-1) // 2]
    cos, sin = ((wave(angles) * mscale).to(t.dtype) for wave in (torch.cos, torch.sin))
    return Rotary.apply(t, cos, sin)


def all_gather(
    original: Callable[..., Any],
    output_tensor: Tensor,
    input_tensor: Tensor,
    group: Any = None,
    async_op: bool = False,
    **named: Any,
) -> Any:
    """Gather the weights of several ranks; for a single rank they are already in place."""
    if is_done(output_tensor, input_tensor, group, async_op):
        return None
    return original(output_tensor, input_tensor, group=group, async_op=async_op, **named)


def reduce_scatter(
    original: Callable[..., Any],
    output: Tensor,
    input: Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
    **named: Any,
) -> Any:
    """Sum the gradients of several ranks; for a single rank they are the sum."""
    if is_done(output, input, group, async_op):
        return None
    return original(output, input, op=op, group=group, async_op=async_op, **named)


def is_done(output: Tensor, input: Tensor, group: Any, async_op: bool) -> bool:
    """Return whether one rank holds everything in the same memory, so that there is nothing to exchange."""
    if async_op or group is None or group.size() != 1:
        return False
    return output.data_ptr() == input.data_ptr() and output.numel() == input.numel()
