"""The machine of a training: its device and libraries, and the Megatron flags that follow from them.

CUDA is used as in Megatron, the CPU through this project's backend.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan.needs import ENGINE, GPU, installed

# Torch reads it when it is imported. Its warnings are C++ stack traces of every rank that misses another.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

DEVICES = ("auto", "cpu", "cuda")
MASK = "create_attention_mask_in_dataloader"


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

    # the CPU backend replaces torch's CUDA functions
    return "cpu" if args.distributed_backend == "gloo" else torch.cuda.get_device_name()


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Import modules that live as long as the process: no garbage collection walks their objects, now or later.

    Collections over all of torch and Megatron take a second of an import, and in a forked process copy its pages.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # objects that outlive the interpreter are reported as leaked by triton


def activate(device: str) -> None:
    """Prepare the process for `device`, before Megatron is imported; the CPU backend is imported only for the
    CPU.
    """
    if device == "cuda":
        from megatron_lrpath.training import fused_gradients  # imports torch, unneeded by others

        fused_gradients.register()
    if device == "cpu":
        from megatron_lrpath.training.cpu import (
            backend as cpu,
        )  # imports torch, which other processes do not need

        cpu.install()


TRANSFORMER_ENGINE = "transformer_engine.pytorch"  # it may be built for another CUDA than this machine's
APEX_FUSIONS = "fused_weight_gradient_mlp_cuda"  # Apex's compiled gradient accumulation
APEX_NORM = "apex.normalization.fused_layer_norm"
OPTIMIZERS = {"Transformer Engine": "transformer_engine.pytorch.optimizers", "Apex": "apex.optimizers"}


@functools.cache
def importable(module: str) -> bool:
    """Return whether `module` is installed and can be imported."""
    try:
        if importlib.util.find_spec(module) is None:
            return False
        importlib.import_module(module)
    except Exception:
        return False
    return True


def available(device: str, packed: bool = False) -> frozenset[str]:
    """Return which requirements of arguments (`plan/needs.py`) are met; packages are imported to be sure.

    Packed samples do not use Transformer Engine, whose attention would not separate their examples.
    """
    found = {name for name in installed(device) if name in (GPU, ENGINE) or importable(name)}
    if packed or not importable(TRANSFORMER_ENGINE):
        found -= {ENGINE}
    return frozenset(found)


def flags(device: str, packed: bool = False) -> dict[str, Any]:
    """Return Megatron arguments (by destination) that follow from the device and the libraries, not from the
    user.

    Each follows from what its consumer needs. The layers are Transformer Engine's if it works, else the
    local ones, whose kernels for rotary embeddings and softmax come from Transformer Engine and Apex. The
    core attention is causal by itself (packed samples have their own mask), so that no loader makes a
    mask. The persistent norm is Apex's. Gradients are accumulated inside the matrix product by Transformer
    Engine's layers, and by Megatron's own (the output layer) through Apex or this project's replacement,
    on every GPU.
    """
    found: dict[str, Any] = {MASK: False}
    if device == "cpu":
        found |= {
            "distributed_backend": "gloo",
            "use_cpu_initialization": True,
            "disable_jit_fuser": True,
            "bias_gelu_fusion": False,
            "bias_dropout_fusion": False,
            "gradient_accumulation_fusion": False,
        }
    if ENGINE not in available(device, packed):
        found |= {"transformer_impl": "local", "apply_rope_fusion": False, "masked_softmax_fusion": False}
        if device == "cpu" or not importable(APEX_NORM):
            found["no_persist_layer_norm"] = True
    return found


def fused_optimizer() -> str:
    """Return the library whose Adam, gradient norm and clipping Megatron uses; empty for torch's."""
    return next((name for name, module in OPTIMIZERS.items() if importable(module)), "")


def device_number(rank: int) -> int:
    """Return the GPU of a rank on this node: its local rank, modulo the visible GPUs.

    With Slurm's --gpus-per-task=1 every task sees one GPU, with the index 0.
    """
    import torch

    return rank % max(1, torch.cuda.device_count())
