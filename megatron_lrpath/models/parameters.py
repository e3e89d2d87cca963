"""The number of parameters of a model, as a formula of its Megatron arguments."""

from __future__ import annotations

from typing import Any

from megatron_lrpath.errors import UserError


def parameter_count(arguments: dict[str, Any], vocab_size: int) -> int:
    """Parameters of Megatron's dense GPT model with these arguments, the vocabulary unpadded.

    Embeddings V·h (twice when untied); a layer: QKV and output projection, the MLP (three matrices with a
    gated activation, two without), two norms; one norm at the end; biases where the arguments ask for them.
    Raises UserError for mixture-of-experts and multi-latent attention, which this formula does not cover.
    """
    for name in ("num_experts", "multi_latent_attention"):
        if arguments.get(name):
            raise UserError(f"the parameters of a model with {name} are not counted; leave the argument out")
    hidden = int(arguments["hidden_size"])
    norm = hidden * (1 if arguments.get("normalization", "LayerNorm") == "RMSNorm" else 2)
    layer = _attention(arguments) + _mlp(arguments) + 2 * norm
    tables = 2 if arguments.get("untie_embeddings_and_output_weights") else 1
    positions = 0
    if arguments.get("position_embedding_type", "learned_absolute") == "learned_absolute":
        positions = int(arguments.get("max_position_embeddings", 0)) * hidden
    return tables * vocab_size * hidden + positions + int(arguments["num_layers"]) * layer + norm


def _attention(arguments: dict[str, Any]) -> int:
    hidden, heads = int(arguments["hidden_size"]), int(arguments["num_attention_heads"])
    channels = int(arguments.get("kv_channels") or hidden // heads)
    groups = int(arguments.get("num_query_groups", 1)) if arguments.get("group_query_attention") else heads
    query, key_value = heads * channels, 2 * groups * channels
    biased = not arguments.get("disable_bias_linear")
    weights = hidden * (query + key_value) + query * hidden
    biases = (query + key_value) * (biased or bool(arguments.get("add_qkv_bias"))) + hidden * biased
    scales = 1 if arguments.get("normalization", "LayerNorm") == "RMSNorm" else 2
    head_norms = 2 * scales * channels if arguments.get("qk_layernorm") else 0
    return weights + biases + head_norms


def _mlp(arguments: dict[str, Any]) -> int:
    hidden = int(arguments["hidden_size"])
    gated = bool(arguments.get("swiglu") or arguments.get("quick_geglu"))
    # Megatron's own default width is 4h, with SwiGLU 8h/3 rounded down to a multiple of 64.
    default = int(4 * hidden * 2 / 3 / 64) * 64 if arguments.get("swiglu") else 4 * hidden
    width = int(arguments.get("ffn_hidden_size") or default)
    inner = (2 if gated else 1) * width
    biases = 0 if arguments.get("disable_bias_linear") else inner + hidden
    return hidden * inner + width * hidden + biases
