"""The layers of models without Transformer Engine: torch's attention and a norm that knows its ranks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_lrpath.errors import UserError
from megatron_lrpath.training.attention import SDPACoreAttention
from megatron_lrpath.training.environment import has_apex_norm


class ParallelTorchNorm:
    """Builds torch's `RMSNorm` or `LayerNorm`, with weights marked for sequence parallelism.

    Under sequence parallelism each rank normalizes its share of the sequence, so the weights' gradients are
    partial sums; Megatron adds those of weights marked `sequence_parallel` over the tensor-parallel ranks.
    Its own wrapper of torch's norms refuses sequence parallelism instead.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """A norm over the last dimension, [..., hidden_size] -> [..., hidden_size]."""
        norms = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        if config.normalization not in norms or config.layernorm_zero_centered_gamma:
            raise UserError(
                f"--normalization {config.normalization} (zero-centred: "
                f"{config.layernorm_zero_centered_gamma}) needs Transformer Engine; without it "
                "RMSNorm and LayerNorm are supported."
            )
        norm = norms[config.normalization](normalized_shape=hidden_size, eps=eps)
        for weight in norm.parameters():
            weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def local_layers(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage for a `GPTModelConfig`.

    Megatron's local specification with the core attention and the norms replaced (layer norm stays Apex's
    where that is installed).
    """
    transformer = config.transformer
    layer = get_gpt_layer_local_spec(
        transformer.num_moe_experts,
        transformer.moe_grouped_gemm,
        transformer.qk_layernorm,
        transformer.multi_latent_attention,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
    )
    norm = norm_builder(transformer)
    replace_norms(layer, norm)
    layer.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    count = get_num_layers_to_build(transformer, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def norm_builder(transformer: TransformerConfig) -> Any:
    """Apex's fused norm for LayerNorm where it is installed, torch's elsewhere."""
    if transformer.normalization == "LayerNorm" and has_apex_norm() and torch.cuda.is_available():
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        return FusedLayerNorm
    return ParallelTorchNorm


def replace_norms(layer: ModuleSpec, norm: Any) -> None:
    """Put `norm` wherever the specification has one of Megatron's wrapped norms."""
    attention = layer.submodules.self_attention.submodules
    for owner in (layer.submodules, attention):
        for name, value in vars(owner).items():
            if value is WrappedTorchNorm or getattr(value, "__name__", "") == "FusedLayerNorm":
                setattr(owner, name, norm)
