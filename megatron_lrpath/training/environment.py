"""Megatron's fusion flags by what is installed; and what Megatron calls at start where there is no GPU."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import queue
import secrets
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

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


def wrap_get_write_results_queue(original: Callable[..., Any]) -> Callable[..., Any]:
    """A plain queue for synchronous saves; one of a forked process for those that another process writes.

    That process listens at an abstract address: a socket in a temporary folder would outlive a killed training.
    """
    local: queue.Queue[Any] = queue.Queue()

    @functools.cache
    def between_processes() -> Any:
        manager = SyncManager(f"\0lrpath-{secrets.token_hex(16)}", ctx=multiprocessing.get_context("fork"))
        manager.start()
        return manager.Queue()

    @functools.wraps(original)
    def get_write_results_queue(*_: Any, **__: Any) -> Any:
        from megatron.training import get_args

        return between_processes() if get_args().async_save else local

    return get_write_results_queue


def wrap_compile_helpers(original: Callable[..., None]) -> Callable[..., None]:
    """Compile Megatron's dataset helpers only where they are not compiled yet."""

    def compile_helpers(*args: Any, **named: Any) -> None:
        if not importable("megatron.core.datasets.helpers_cpp"):
            original(*args, **named)

    return compile_helpers


def wrap_initialize_megatron(original: Callable[..., Any]) -> Callable[..., Any]:
    """Initialize without a GPU."""

    @functools.wraps(original)
    def initialize_megatron(allow_no_cuda: bool = False, *args: Any, **kwargs: Any) -> Any:
        return original(True, *args, **kwargs)

    return initialize_megatron


def wrap_set_jit_fusion_options(original: Callable[..., None]) -> Callable[..., None]:
    """No kernels to warm up."""

    def set_jit_fusion_options(*_: Any, **__: Any) -> None:
        """Fusions are off on the CPU."""

    return set_jit_fusion_options
