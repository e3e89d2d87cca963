"""The model beyond Megatron's own: layers without Transformer Engine (torch's attention, a norm for sequence
parallelism), and the argument of the model that Megatron leaves out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_lrpath.errors import UserError
from megatron_lrpath.models import ROPE_FACTOR
from megatron_lrpath.training.machine import APEX_NORM, importable

SHORT = 512
"""Tokens up to which torch's fused attention on the CPU is faster in fp32 than in bf16 (backwards: half)."""


class SDPACoreAttention(MegatronModule):
    """Causal attention on this tensor-parallel rank's heads, without a mask or an s×s matrix in memory.

    A given mask ([b, 1, s, s], True where a query must not attend) is applied unchanged: packed samples
    have one, a byte for every pair of positions, which separates their examples. Rotary positions continue
    over the whole sample; attention depends only on their differences, so each example is treated as if it
    were alone.

    Replaces Megatron's `DotProductAttention` in a layer spec; torch handles grouped queries
    (`enable_gqa`). Unsupported settings are refused at construction, never ignored.

    Raises:
        UserError: sliding windows, attention sinks or context parallelism are requested.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        refuse_unsupported(config, attn_mask_type)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        self.hidden_per_rank = config.kv_channels * config.num_attention_heads // groups.tp.size()
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        # --apply-query-key-layer-scaling divides the scores by the layer number before the softmax and multiplies
        # them by it in the softmax, against overflow in fp16: here the scores are in fp32 anyway.
        self.grouped = config.num_query_groups not in (None, config.num_attention_heads)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend: query [s, b, heads, d], key and value [s, b, groups, d] -> context [s, b, heads·d]."""
        if packed_seq_params is not None or attention_bias is not None:
            raise UserError(
                "packed sequences and attention biases need Transformer Engine's attention: install "
                "`megatron-lrpath[gpu]`, or train without them."
            )
        dropout = self.dropout if self.training else 0.0
        if dropout and not self.config.sequence_parallel:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = self.attend(query, key, value, dropout, attention_mask)
        else:
            context = self.attend(query, key, value, dropout, attention_mask)
        return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), self.hidden_per_rank)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the attention, [s, b, heads, d] -> [b, heads, s, d]."""
        if mask is not None and self.grouped:
            # With a mask, torch's fused kernels need as many keys as queries.
            repeats = query.size(2) // key.size(2)
            key, value = (states.repeat_interleave(repeats, dim=2) for states in (key, value))
        kind = query.dtype
        if kind == torch.bfloat16 and query.device.type == "cpu" and query.size(0) <= SHORT:
            query, key, value = query.float(), key.float(), value.float()
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=None if mask is None else ~mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.grouped and mask is None,
        )
        return context.to(kind)


def refuse_unsupported(config: TransformerConfig, attn_mask_type: AttnMaskType) -> None:
    """Refuse a configuration with attention that this module does not compute."""
    unsupported = {
        "--context-parallel-size": config.context_parallel_size != 1,
        "--window-size": config.window_size is not None,
        "--softmax-type": config.softmax_type != "vanilla",
        "--qk-clip": config.qk_clip,
        "--log-max-attention-logit": config.log_max_attention_logit,
        f"an attention mask of type {attn_mask_type.name}": attn_mask_type != AttnMaskType.causal,
    }
    found = [name for name, wrong in unsupported.items() if wrong]
    if found:
        raise UserError(
            f"{', '.join(found)}: not supported without Transformer Engine (the core attention is torch's "
            "causal scaled_dot_product_attention). Install `megatron-lrpath[gpu]` or drop the option."
        )


class ParallelTorchNorm:
    """Builds torch's `RMSNorm` or `LayerNorm`, with weights marked for sequence parallelism.

    Under sequence parallelism each rank normalizes its share of the sequence, so the weights' gradients
    are partial sums; Megatron adds those of weights marked `sequence_parallel` over the tensor-parallel
    ranks. Its own wrapper of torch's norms refuses sequence parallelism.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """Return a norm over the last dimension, [..., hidden_size] -> [..., hidden_size]."""
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


def take_rope_factor(model: Any, args: Any) -> None:
    """Set --rope-scaling-factor in a `GPTModelConfig`: Megatron 0.19's `gpt_config_from_args` leaves it out,
    so that every model would be built with the default. A value that a script has set stays.

    Checkpoints store the factor in the argument `ROPE_FACTOR`, see `trained_rope_factor`.
    """
    default = getattr(type(model), "rope_scaling_factor", None)
    if default is None:
        return
    if model.rope_scaling_factor == default:
        model.rope_scaling_factor = args.rope_scaling_factor
    setattr(args, ROPE_FACTOR, model.rope_scaling_factor)


def local_layers(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage for a `GPTModelConfig`.

    It is Megatron's local specification with the core attention and the norms replaced (layer norm stays
    Apex's if that is installed).
    """
    transformer = config.transformer
    options = {"normalization": transformer.normalization, "qk_l2_norm": transformer.qk_l2_norm}
    if transformer.num_moe_experts is None:
        layer = get_gpt_layer_local_spec(
            qk_layernorm=transformer.qk_layernorm,
            multi_latent_attention=transformer.multi_latent_attention,
            **options,
        )
        layers = [layer] * get_num_layers_to_build(transformer, vp_stage)
    else:  # dense layers and layers of experts, in the order of --moe-layer-freq
        block = get_gpt_decoder_block_spec(
            transformer, use_transformer_engine=False, vp_stage=vp_stage, **options
        )
        layers = block.layer_specs
    norm: Any = ParallelTorchNorm
    if transformer.normalization == "LayerNorm" and importable(APEX_NORM) and torch.cuda.is_available():
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm  # needs Apex

        norm = FusedLayerNorm
    for layer in layers:
        attention = layer.submodules.self_attention.submodules
        for owner in (layer.submodules, attention):
            for name, value in vars(owner).items():
                if value is WrappedTorchNorm or getattr(value, "__name__", "") == "FusedLayerNorm":
                    setattr(owner, name, norm)
        attention.core_attention = SDPACoreAttention
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
