"""Megatron's fusion flags by what is installed; and what Megatron calls at start where there is no GPU."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import queue
import secrets
from argparse import Namespace
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_lrpath.plan.secrets import hide_values

TRANSFORMER_ENGINE = "transformer_engine.pytorch"  # it may be built for another CUDA than this machine's
APEX_FUSIONS = "fused_weight_gradient_mlp_cuda"  # Apex's compiled gradient accumulation
APEX_NORM = "apex.normalization.fused_layer_norm"


@functools.cache
def importable(module: str) -> bool:
    """Whether `module` is installed and its import succeeds."""
    try:
        if importlib.util.find_spec(module) is None:
            return False
        importlib.import_module(module)
    except Exception:
        return False
    return True


def flags(device: str, packed: bool = False) -> dict[str, Any]:
    """Megatron arguments (by destination) that follow from the device and the libraries, not from the user.

    Without Transformer Engine: the local implementation, no rope or softmax kernels, no mask from the loader
    (the core attention is causal by itself). Without Apex: no fused gradient accumulation, no persistent
    norm. Packed samples take the same way, whose attention keeps their examples apart.
    """
    engine = device != "cpu" and not packed and importable(TRANSFORMER_ENGINE)
    found: dict[str, Any] = {}
    if device == "cpu":
        found |= {
            "distributed_backend": "gloo",
            "use_cpu_initialization": True,
            "disable_jit_fuser": True,
            "bias_gelu_fusion": False,
            "bias_dropout_fusion": False,
        }
    if not engine:
        found |= {
            "transformer_impl": "local",
            "apply_rope_fusion": False,
            "masked_softmax_fusion": False,
            "create_attention_mask_in_dataloader": False,
        }
        if device == "cpu" or not importable(APEX_NORM):
            found["no_persist_layer_norm"] = True
    if device == "cpu" or not (importable(APEX_FUSIONS) or engine):
        found["gradient_accumulation_fusion"] = False
    return found


def get_write_results_queue(original: Callable[..., Any], *_: Any, **__: Any) -> Any:
    """A plain queue for synchronous saves; one of a forked process for those that another process writes."""
    from megatron.training import get_args

    return queue_between_processes() if get_args().async_save else queue_within_process()


@functools.cache
def queue_within_process() -> queue.Queue[Any]:
    """The queue of the saves that this process writes itself."""
    return queue.Queue()


@functools.cache
def queue_between_processes() -> Any:
    """The queue of a process that listens at an abstract address: a socket in a folder would outlive a killed run."""
    manager = SyncManager(f"\0lrpath-{secrets.token_hex(16)}", ctx=multiprocessing.get_context("fork"))
    manager.start()
    return manager.Queue()


def compile_helpers(original: Callable[..., None], *args: Any, **named: Any) -> None:
    """Compile Megatron's dataset helpers only where they are not compiled yet."""
    if not importable("megatron.core.datasets.helpers_cpp"):
        original(*args, **named)


def initialize_megatron(
    original: Callable[..., Any], allow_no_cuda: bool = False, *args: Any, **kwargs: Any
) -> Any:
    """Initialize without a GPU."""
    return original(True, *args, **kwargs)


def set_jit_fusion_options(original: Callable[..., None], *_: Any, **__: Any) -> None:
    """No kernels to warm up."""


def print_args(original: Callable[..., None], title: str, args: Any) -> None:
    """Let Megatron print the arguments, without the values of secrets."""
    original(title, Namespace(**hide_values(vars(args))))
