"""The device of training: CUDA as in Megatron, or the CPU through this project's backend."""

from __future__ import annotations

import os
from typing import Any

from megatron_lrpath.errors import UserError

# Torch reads it when it is imported. Its warnings are C++ stack traces of every rank that misses another one.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

DEVICES = ("auto", "cpu", "cuda")


def choose_device(wanted: str = "auto") -> str:
    """Return the device to train on: `wanted`, or for `auto` the GPU if there is one, else the CPU.

    Raises:
        UserError: `cuda` was requested and torch sees no GPU.
    """
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError(
            "--device cuda: torch sees no GPU here. Check `nvidia-smi` and CUDA_VISIBLE_DEVICES, "
            "or train on the CPU with --device cpu."
        )
    if wanted == "auto":
        return "cuda" if available else "cpu"
    return wanted


def device_name(args: Any) -> str:
    """Return what this process trains on, with Megatron's arguments: the GPU's name, or `cpu`."""
    import torch

    # the CPU backend stands in for torch's CUDA functions
    return "cpu" if args.distributed_backend == "gloo" else torch.cuda.get_device_name()


def activate(device: str) -> None:
    """Prepare the process for `device`, before Megatron is imported; the CPU backend is imported only for the
    CPU.
    """
    if device == "cuda":
        from megatron_lrpath.training import fused_gradients  # imports torch, which others must not pay for

        fused_gradients.register()
    if device == "cpu":
        from megatron_lrpath.training.cpu import (
            backend as cpu,
        )  # imports torch, which others must not pay for

        cpu.install()
