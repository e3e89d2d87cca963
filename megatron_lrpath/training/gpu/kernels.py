"""The kernels of `--gpu-kernels`: fewer passes over memory than Megatron's unfused functions.

Cross-entropy, rotary embeddings, and, if neither Transformer Engine's nor Apex's are installed, Adam and the
norm of the gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lrpath.training.gpu.measures import ADAM, CROSS_ENTROPY, GRAD_NORM, ROTARY
from megatron_lrpath.training.session import Session

LONGEST_BLOCK = 1 << 15  # logits that a program of liger's kernel reads at a time, as in liger
IGNORED = -100  # a target without a loss, as in torch


class CrossEntropy(torch.autograd.Function):
    """Token losses (fp32, nats) of [rows, vocabulary] logits in bf16; the gradient overwrites the logits.

    The kernel is liger's. Its own function rounds the losses to the logits' type and waits for the GPU three
    times. The kernel reads the logits twice and overwrites them with softmax minus one-hot; the backward pass
    multiplies that by the gradient of the losses in place. Every row is one program with a fixed order of
    sums: the bits repeat.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """Return the losses [rows]; `target` [rows] has numbers below the vocabulary's size, or -100."""
        import triton  # comes with torch on a GPU
        from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

        rows, columns = logits.shape
        losses = torch.zeros(rows, dtype=torch.float32, device=logits.device)
        liger_cross_entropy_kernel[(rows,)](
            X_ptr=logits,
            X_stride=logits.stride(0),
            Y_ptr=target,
            Y_stride=target.stride(0),
            weight_ptr=None,
            loss_ptr=losses,
            z_loss_ptr=None,
            loss_stride=losses.stride(0),
            token_accuracy_ptr=None,
            token_accuracy_stride=0,
            predicted_tokens_ptr=None,
            predicted_tokens_stride=0,
            n_cols=columns,
            n_non_ignore=rows,
            sum_non_ignore_weight=rows,
            weight_sum=0.0,
            ignore_index=IGNORED,
            lse_square_scale=0.0,
            label_smoothing=0.0,
            reduction="none",
            softcap=None,
            RETURN_Z_LOSS=False,
            RETURN_TOKEN_ACCURACY=False,
            RETURN_PREDICTED_TOKENS=False,
            BLOCK_SIZE=min(LONGEST_BLOCK, triton.next_power_of_2(columns)),
            HAS_WEIGHT=False,
            HAS_SOFTCAPPING=False,
            HAS_GRADIENTS=ctx.needs_input_grad[0],
            num_warps=warps(logits.device),
        )
        ctx.save_for_backward(logits.detach())
        return losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return (softmax - one-hot) · grad, in the logits' type and memory."""
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_loss[:, None]), None


@functools.cache
def warps(device: torch.device) -> int:
    """Return the number of warps of a program: liger's for bf16, by the GPU's generation."""
    return 8 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10 else 32


def cross_entropy(
    session: Session,
    original: Callable[..., Tensor],
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: Any = None,
    **unknown: Any,
) -> Tensor:
    """Use liger's kernel if it is chosen and this rank has the whole vocabulary, else Megatron's function."""
    is_whole = tp_group is not None and tp_group.size() == 1 and not (label_smoothing or unknown)
    if CROSS_ENTROPY not in session.kernels or not is_whole or vocab_parallel_logits.dtype != torch.bfloat16:
        return original(vocab_parallel_logits, target, label_smoothing, tp_group, **unknown)
    losses = CrossEntropy.apply(vocab_parallel_logits.flatten(0, -2), target.flatten())
    return losses.view(target.shape)


def rotate(states: Tensor, freqs: Tensor, mscale: float) -> Tensor:
    """Rotate two halves: (a, b) -> (a·cos - b·sin, b·cos + a·sin), in fp32, rounded once.

    Args:
        states: [s, b, heads, d].
        freqs: [s, 1, 1, d/2] angles in fp32.
        mscale: factor of cos and sin.
    """
    first, second = states.float().chunk(2, -1)
    cos, sin = freqs.cos() * mscale, freqs.sin() * mscale
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(states.dtype)


def rotate_back(grad: Tensor, freqs: Tensor, mscale: float) -> Tensor:
    """Return the gradient of `rotate`: a rotation by the negative angles."""
    return rotate(grad, -freqs, mscale)


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile `function` to one kernel. It is elementwise, so that its bits do not depend on the tiling."""
    return torch.compile(function)


class Rotary(torch.autograd.Function):
    """`rotate`, compiled, in both directions."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, freqs: Tensor, mscale: float) -> Tensor:
        """Rotate the states."""
        ctx.save_for_backward(freqs)
        ctx.mscale = mscale
        return compiled(rotate)(states, freqs, mscale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Rotate back."""
        (freqs,) = ctx.saved_tensors
        return compiled(rotate_back)(grad, freqs, ctx.mscale), None, None


def rotary(
    session: Session,
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
    """Use this module's kernel if it is chosen and the whole head is rotated in halves, else Megatron's."""
    special = (
        config.rotary_interleaved or config.multi_latent_attention or any(options) or any(named.values())
    )
    is_partial = cu_seqlens is not None or freqs.size(-1) != t.size(-1)
    if ROTARY not in session.kernels or special or is_partial:
        return original(t, freqs, config, cu_seqlens, mscale, cp_group, *options, **named)
    return Rotary.apply(t, freqs[..., : freqs.size(-1) // 2], mscale)


STEP = "step"


def init_group(
    session: Session,
    original: Callable[..., Any],
    self: Any,
    group: dict[str, Any],
    *lists: Any,
    **named: Any,
) -> Any:
    """Select torch's fused kernel for Adam's update, which Megatron does not select.

    This is done at each step, because a loaded checkpoint has the stored groups. The fused kernel needs the
    step counts on the GPU; loading and `make_state` leave them on the CPU.
    """
    if ADAM in session.kernels and not group.get("differentiable"):
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            step = self.state[parameter].get(STEP) if parameter in self.state else None
            if isinstance(step, Tensor) and step.device != parameter.device:
                self.state[parameter][STEP] = step.to(parameter.device, torch.float32)
    return original(self, group, *lists, **named)


def l2_norm(
    session: Session,
    original: Callable[..., Any],
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: list[list[Tensor]],
    *args: Any,
    **named: Any,
) -> Any:
    """Compute the norm of all gradients, which stays on the GPU; Megatron fetches the norm of each tensor.

    Return it as a tensor of one number, and None for the norms of single tensors.
    """
    from megatron.core.utils import local_multi_tensor_l2_norm  # after the choice of the device

    if (
        GRAD_NORM not in session.kernels
        or original is not local_multi_tensor_l2_norm
        or args not in ((), (False,))
    ):
        return original(chunk_size, noop_flag, tensor_lists, *args, **named)
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None
