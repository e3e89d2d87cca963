"""Model recipes as data: the Megatron arguments of 203m … 3.1b, qwen-1.2b and tiny, and the size of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_lrpath.errors import UserError

USUAL_VOCABULARY = 100_000
"""Assumed size of a vocabulary that neither the plan nor the tokenizer gives; for predictions of sizes."""

ROPE_FACTOR = "lrpath_rope_scaling_factor"
"""Argument of a checkpoint that stores the factor of stretched rotary positions that its model was built with."""
MEGATRONS_ROPE_FACTOR = 8.0
"""Factor of every model that Megatron 0.19 builds, regardless of --rope-scaling-factor."""

# LLaMA's architecture as Megatron's arguments. The FFN width and the untied embeddings are not in the paper;
# with these values the parameter counts match the names (see `parameter_count`).
_LLAMA: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.02,
}


@dataclass(frozen=True)
class Recipe:
    """A model: Megatron's `arguments`, the paper's maximum learning rate for it, and its source."""

    arguments: dict[str, Any]
    max_lr: float
    about: str


@dataclass(frozen=True)
class ModelSpec:
    """The model section of a plan: the name of a recipe, or none, and arguments that override it."""

    recipe: str | None
    overrides: dict[str, Any] = field(default_factory=dict)


def _llama(layers: int, hidden: int, heads: int, max_lr: float, about: str, **others: Any) -> Recipe:
    """Return a recipe of this width and depth; the FFN is four times as wide unless `others` sets it."""
    sizes = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": 4 * hidden,
        "num_attention_heads": heads,
    }
    return Recipe(sizes | _LLAMA | others, max_lr, about)


RECIPES: dict[str, Recipe] = {
    "tiny": _llama(
        4, 128, 4, 3e-3, "for CPUs and tests, with a vocabulary of about 4,000 tokens", ffn_hidden_size=352
    ),
    "203m": _llama(24, 512, 8, 1e-3, "Table 9, 203M"),
    "406m": _llama(12, 1024, 16, 6e-4, "Table 9, 406M"),
    "608m": _llama(24, 1024, 16, 6e-4, "Table 9, 608M"),
    "1.2b": _llama(24, 1536, 16, 3e-4, "Table 9, 1.2B"),
    "2.1b": _llama(48, 1536, 16, 3e-4, "Table 9, 2.1B"),
    # Table 9 has a hidden size of 8,192 here, which would be a model of 44.6B parameters: with 2,048 the
    # FFN is 8,192 wide and the count matches the name.
    "3.1b": _llama(40, 2048, 32, 3e-4, "Table 9, 3.1B, hidden size 2,048 (the 8,192 printed is the FFN's)"),
    "qwen-1.2b": _llama(24, 1536, 16, 3e-4, "Table 5, Qwen-1.2B: biases in QKV", add_qkv_bias=True),
}


def resolve_model(spec: ModelSpec) -> dict[str, Any]:
    """Return the model's Megatron arguments: the recipe's, with the overrides applied.

    Raise UserError for an unknown recipe, or if there is no recipe and the size is not given.
    """
    if spec.recipe is not None and spec.recipe not in RECIPES:
        raise UserError(f"there is no recipe {spec.recipe!r}; there are {', '.join(RECIPES)}")
    base = RECIPES[spec.recipe].arguments if spec.recipe else {}
    arguments = base | spec.overrides
    needed = ("num_layers", "hidden_size", "num_attention_heads")
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise UserError(
            f"a model without a recipe requires {', '.join(missing)}; or begin with `recipe: tiny`"
        )
    return arguments


_NUMBER = re.compile(r"-?[0-9.].*")


def megatron_flags(arguments: dict[str, Any]) -> list[str]:
    """Convert `{"num_layers": 4, "swiglu": True, "split": ["99", "1"]}` to `--num-layers 4 --swiglu --split
    99 1`.

    True is a flag, False and None omit the argument, a list gives several values. Text that begins with a
    dash is joined with `=`, so that it is not parsed as another argument.
    """
    flags: list[str] = []
    for name, value in arguments.items():
        option = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            flags.append(option)
        elif isinstance(value, list | tuple):
            flags += [option, *(_text(item) for item in value)]
        elif _text(value).startswith("-") and not _NUMBER.fullmatch(_text(value)):
            flags.append(f"{option}={_text(value)}")
        else:
            flags += [option, _text(value)]
    return flags


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


UNEVEN_STAGES = (
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout",
)  # fmt: skip
"""Arguments with which pipeline stages have different numbers of layers."""


def shape_problems(arguments: Mapping[str, Any], seq_length: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield each contradiction of a model's sizes, its ranks and the sequence length (tokens).

    Megatron reports them only when a process starts, or builds no model. The first item names the arguments that
    are to blame, the most likely one first.

    Args:
        arguments: Megatron's arguments by destination; values that are no whole numbers are not checked.
        seq_length: tokens of a sample.
    """

    def whole(name: str) -> int | None:
        value = arguments.get(name, "")
        return int(value) if str(value).isdecimal() else None

    hidden, heads, layers = whole("hidden_size"), whole("num_attention_heads"), whole("num_layers")
    groups = whole("num_query_groups") if arguments.get("group_query_attention") else None
    positions = whole("max_position_embeddings")
    if hidden and heads and hidden % heads and not whole("kv_channels"):
        yield (
            ("num_attention_heads", "hidden_size"),
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; change one of them, or give "
            "kv_channels, the size of a head",
        )
    if heads and groups and heads % groups:
        yield (
            ("num_query_groups", "num_attention_heads"),
            f"num_attention_heads {heads} is not a multiple of num_query_groups {groups}; every group has as many "
            "heads",
        )
    ranks = whole("tensor_model_parallel_size") or 1
    if heads and heads % ranks:
        yield (
            ("tensor_model_parallel_size",),
            f"{ranks} ranks do not divide num_attention_heads {heads}; every rank has as many heads",
        )
    if groups and groups % ranks and ranks % groups:
        yield (
            ("tensor_model_parallel_size",),
            f"{ranks} ranks neither divide num_query_groups {groups} nor are a multiple of it",
        )
    stages = whole("pipeline_model_parallel_size") or 1
    if layers and layers % stages and not any(arguments.get(name) for name in UNEVEN_STAGES):
        yield (
            ("pipeline_model_parallel_size",),
            f"{stages} stages do not divide num_layers {layers}; give each stage as many layers, or the layout of "
            "uneven stages (--pipeline-model-parallel-layout)",
        )
    experts, owners = whole("num_experts"), whole("expert_model_parallel_size") or 1
    if experts and experts % owners:
        yield (
            ("expert_model_parallel_size",),
            f"{owners} ranks do not divide num_experts {experts}; every rank has as many experts",
        )
    parts = whole("context_parallel_size") or 1
    if parts > 1 and seq_length % (2 * parts):
        yield (
            ("context_parallel_size",),
            f"batch.seq_length {seq_length} is not a multiple of {2 * parts}; each of {parts} ranks has two parts of a "
            "sample",
        )
    if positions and positions < seq_length:
        yield (
            ("max_position_embeddings",),
            f"{positions} positions are fewer than batch.seq_length {seq_length}; give at least {seq_length}, or leave "
            "it out",
        )


def parameter_count(arguments: dict[str, Any], vocab_size: int) -> int:
    """Return the number of parameters of Megatron's dense GPT model with these arguments, the vocabulary
    unpadded.

    Embeddings V·h (twice if untied); for each layer QKV and output projection, the MLP (three matrices
    with a gated activation, two without) and two norms; one final norm; biases if the arguments enable
    them. Raise UserError for mixture-of-experts and multi-latent attention, which this formula does not
    cover.
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


def trained_rope_factor(args: Any) -> float | None:
    """Return the factor of the stretched rotary positions that a checkpoint's model was trained with.

    It is the argument's in imported weights, which no Megatron has trained, and where this package has stored the
    factor. Elsewhere Megatron has ignored the argument.

    Args:
        args: the checkpoint's stored arguments, checked.

    Returns:
        None for a model without stretched positions.
    """
    if not getattr(args, "use_rope_scaling", False):
        return None
    if not getattr(args, "consumed_train_samples", 0):
        return float(args.rope_scaling_factor)
    return float(getattr(args, ROPE_FACTOR, MEGATRONS_ROPE_FACTOR))
