"""Errors of the kernels of --gpu-kernels: `python -m tests.support.kernel_errors cpu|cuda` prints JSON.

The reference is fp32. On the CPU liger's kernel needs Triton's interpreter (TRITON_INTERPRET=1), and rotary
embeddings are not compiled.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lrpath.training.gpu import kernels
from megatron_lrpath.training.gpu.measures import CROSS_ENTROPY, ROTARY
from megatron_lrpath.training.session import Session

# tokens, samples, vocabulary: one block of logits a row, and several
SIZES = {"cpu": ((3, 2, 300), (2, 1, 33_000)), "cuda": ((2048, 2, 100_096), (64, 1, 512))}


class Alone:
    """A tensor-parallel group of one rank."""

    @staticmethod
    def size() -> int:
        """Return 1."""
        return 1


def megatrons(*_: Any, **__: Any) -> Tensor:
    """Fail, in place of Megatron's function, which must not be called."""
    raise SystemExit("Megatron's function was called")


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return the largest relative error of an element."""
    return float(((found.float() - wanted).abs() / wanted.abs().clamp(min=1e-30)).max())


def cross_entropy(sequence: int, batch: int, vocabulary: int, device: str) -> dict[str, Any]:
    """Return errors of losses and gradients of bf16 logits against fp32; the first token is masked."""
    session = Session("cuda", kernels=frozenset({CROSS_ENTROPY}))
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(sequence, batch, vocabulary, generator=generator)).bfloat16().to(device)
    target = torch.randint(0, vocabulary, (sequence, batch), generator=generator).to(device)
    scale = torch.rand(sequence, batch, generator=generator).to(device)
    scale[0, 0] = 0.0
    exact = logits.float().requires_grad_()
    wanted = F.cross_entropy(exact.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    wanted.backward(scale)
    with torch.no_grad():
        given = logits.clone()
        evaluated = kernels.cross_entropy(session, megatrons, given, target, 0.0, Alone)
    gradients = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        ours = leaf * 1
        losses = kernels.cross_entropy(session, megatrons, ours, target, 0.0, Alone)
        losses.backward(scale)
        gradients.append(leaf.grad)
    assert exact.grad is not None
    return {
        "unchanged": torch.equal(given, logits),
        "in_place": not torch.equal(ours, logits),
        "type": str(losses.dtype),
        "evaluated": float((evaluated - wanted).abs().max()),
        "loss": float((losses - wanted).abs().max()),
        "gradient": relative(gradients[0], exact.grad),
        "masked": float(gradients[0][0, 0].abs().max()),
        "repeats": torch.equal(*gradients),
    }


def rotary(device: str) -> dict[str, Any]:
    """Return whether the compiled rotation and its gradient are close to those in fp64."""
    session = Session("cuda", kernels=frozenset({ROTARY}))
    config = Namespace(rotary_interleaved=False, multi_latent_attention=False)
    generator = torch.Generator().manual_seed(1)
    angles = 20 * torch.rand(2048, 1, 1, 32, generator=generator).to(device)
    mixed = torch.randn(2048, 2, 4, 3 * 64, generator=generator).bfloat16().to(device)
    states = mixed[..., 64:128].detach().requires_grad_()  # as queries and keys are parts of one tensor
    upstream = torch.randn(2048, 2, 4, 64, generator=generator).bfloat16().to(device)
    found = kernels.rotary(session, megatrons, states, torch.cat((angles, angles), -1), config)
    found.backward(upstream)
    exact = states.detach().double().requires_grad_()
    wanted = kernels.rotate(exact, angles.double(), 1.0)
    wanted.backward(upstream.double())
    assert states.grad is not None
    assert exact.grad is not None
    within = {"rtol": 2**-8, "atol": 1e-5}
    return {
        "close": torch.allclose(found.double(), wanted, **within),
        "gradient": torch.allclose(states.grad.double(), exact.grad, **within),
    }


def main(device: str) -> None:
    """Print the errors."""
    found: dict[str, Any] = {"cross_entropy": [cross_entropy(*size, device) for size in SIZES[device]]}
    if device == "cuda":
        found["rotary"] = rotary(device)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
