"""Megatron flags that follow from the machine and the installed libraries, and functions that Megatron calls
at its start.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import queue
import secrets
from argparse import Namespace
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import TYPE_CHECKING, Any

from megatron_lrpath.plan.needs import ENGINE, GPU, installed
from megatron_lrpath.plan.secrets import hide_values

if TYPE_CHECKING:
    from megatron_lrpath.training.session import Session

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
    found: dict[str, Any] = {"create_attention_mask_in_dataloader": False}
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
    """Whose Adam, gradient norm and clipping Megatron uses in place of torch's; empty for torch's."""
    return next((name for name, module in OPTIMIZERS.items() if importable(module)), "")


def device_number(rank: int) -> int:
    """Return the GPU of a rank on this node: its local rank, modulo the visible GPUs.

    With Slurm's --gpus-per-task=1 every task sees one GPU, with the index 0.
    """
    import torch

    return rank % max(1, torch.cuda.device_count())


def get_write_results_queue(original: Callable[..., Any], *_: Any, **__: Any) -> Any:
    """Return a plain queue for synchronous saves, and one of a manager process for saves by another process."""
    from megatron.training import get_args

    return queue_between_processes() if get_args().async_save else queue_within_process()


@functools.cache
def queue_within_process() -> queue.Queue[Any]:
    """A queue of saves that this process writes itself."""
    return queue.Queue()


@functools.cache
def queue_between_processes() -> Any:
    """A queue of a manager process at an abstract address: a socket in a folder would outlive a killed run."""
    manager = SyncManager(f"\0lrpath-{secrets.token_hex(16)}", ctx=multiprocessing.get_context("fork"))
    manager.start()
    return manager.Queue()


def compile_helpers(original: Callable[..., None], *args: Any, **named: Any) -> None:
    """Compile Megatron's dataset helpers only if they are not compiled yet."""
    if not importable("megatron.core.datasets.helpers_cpp"):
        original(*args, **named)


def initialize_megatron(
    original: Callable[..., Any], allow_no_cuda: bool = False, *args: Any, **kwargs: Any
) -> Any:
    """Initialize without a GPU."""
    return original(True, *args, **kwargs)


def print_args(original: Callable[..., None], title: str, args: Any) -> None:
    """Print Megatron's arguments without the values of secrets."""
    original(title, Namespace(**hide_values(vars(args))))


def set_jit_fusion_options(session: Session, original: Callable[..., None], *args: Any, **named: Any) -> None:
    """Warm up Megatron's kernels with bias and dropout only for a model with both; never on the CPU."""
    from megatron.training import get_args

    settings = get_args()
    dropout = settings.hidden_dropout or settings.attention_dropout
    if session.device != "cpu" and (settings.add_bias_linear or dropout):
        original(*args, **named)
