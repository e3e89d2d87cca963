"""The kernels of `--gpu-kernels`: their names, what they replace, and why one cannot be used."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet

CROSS_ENTROPY, ROTARY, ADAM, GRAD_NORM = "cross_entropy", "rotary", "adam", "grad_norm"
NONE = "none"
LIGER, LIGER_VERSIONS = "liger-kernel", ">=0.8.5,<0.9"
"""The distribution with the cross-entropy's kernel. Its parameters are not a public interface, so other
versions are not used (a test calls the kernel)."""


@dataclass(frozen=True)
class Setting:
    """The facts that determine whether a kernel can be used.

    Attributes:
        args: Megatron's arguments, parsed and not validated, including those that follow from the machine.
        fused_optimizer: Transformer Engine or Apex, whose Adam and norm Megatron then uses; empty without both.
    """

    args: Any
    fused_optimizer: str = ""


def obstacle(kernel: str, setting: Setting) -> str:
    """Return why `kernel` cannot be used, as part of a sentence; empty if it can."""
    return OBSTACLES[kernel](setting)


def _cross_entropy(setting: Setting) -> str:
    args = setting.args
    if not args.bf16:  # in fp16 its small gradients would underflow before the loss scale multiplies them
        return "the logits are not in bf16"
    if args.deterministic_mode:
        return "--deterministic-mode keeps to Megatron's unfused function"
    if args.tensor_model_parallel_size > 1:
        return "tensor-parallel ranks share the vocabulary"
    if args.cross_entropy_loss_fusion:
        return "--cross-entropy-loss-fusion asks for Megatron's"
    return liger_problem()


def _rotary(setting: Setting) -> str:
    args = setting.args
    if args.position_embedding_type != "rope":
        return "the model has no rotary embeddings"
    if args.apply_rope_fusion:
        return "Transformer Engine's is used"
    if args.rotary_interleaved or args.multi_latent_attention or args.rotary_percent != 1.0:
        return "the model does not rotate whole heads in halves"
    return "--disable-jit-fuser turns the compiler off" if args.disable_jit_fuser else ""


def _adam(setting: Setting) -> str:
    if setting.args.optimizer != "adam":
        return f"the optimizer is {setting.args.optimizer}"
    if setting.args.optimizer_cpu_offload:
        return "--optimizer-cpu-offload has an Adam of its own"
    return f"{setting.fused_optimizer}'s is used" if setting.fused_optimizer else ""


def _grad_norm(setting: Setting) -> str:
    return f"{setting.fused_optimizer}'s is used" if setting.fused_optimizer else ""


OBSTACLES = {CROSS_ENTROPY: _cross_entropy, ROTARY: _rotary, ADAM: _adam, GRAD_NORM: _grad_norm}
KERNELS = tuple(OBSTACLES)


def liger_problem() -> str:
    """Return why liger's kernel cannot be called; empty if it can. Import nothing (that takes seconds)."""
    try:
        version = metadata.version(LIGER)
    except metadata.PackageNotFoundError:
        return f"the package {LIGER} is not installed"
    if version not in SpecifierSet(LIGER_VERSIONS):
        return f"{LIGER} is {version}, and this version calls the kernel of {LIGER}{LIGER_VERSIONS}"
    return "" if importlib.util.find_spec("triton") else "the package triton is not installed"


def choose(wanted: Collection[str] | None, setting: Setting) -> tuple[frozenset[str], dict[str, str]]:
    """Return the kernels to use, and why each of the others cannot be used.

    Args:
        wanted: the kernels that the user names (`none` for no kernel); None for all that can be used.
        setting: the facts that determine it.
    """
    names = KERNELS if wanted is None else [name for name in KERNELS if name in wanted]
    why = {name: text for name in names if (text := obstacle(name, setting))}
    if wanted is not None and NONE in wanted and set(wanted) != {NONE}:
        why[NONE] = "it cannot be combined with kernels"
    return frozenset(names) - set(why), why


def summary(kernels: Collection[str], why: Mapping[str, str], is_fused: bool) -> str:
    """Return the line that a start prints: the kernels in use, and the reasons against the others."""
    used = [name for name in KERNELS if name in kernels]
    left = [f"{name}: {text}" for name, text in why.items()]
    fused = "Megatron's fused cross-entropy" if is_fused else ""
    parts = [
        ", ".join(filter(None, [*used, fused])) or NONE,
        *(["not used: " + "; ".join(left)] if left else []),
    ]
    return f"GPU kernels: {'; '.join(parts)}"
