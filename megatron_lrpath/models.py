"""Model recipes as data: the Megatron arguments of 203m … 3.1b, qwen-1.2b and tiny, and the size of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from megatron_lrpath.errors import UserError

USUAL_VOCABULARY = 100_000
"""Tokens of a vocabulary whose size neither the plan nor the tokenizer says; for predictions of sizes."""

# LLaMA's architecture as Megatron's arguments. The FFN width and the untied embeddings are not in the paper; they
# are the ones under which the parameter counts fit the names (see `parameter_count`).
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
    """A model: Megatron's `arguments`, the paper's maximum learning rate for it, and where it comes from."""

    arguments: dict[str, Any]
    max_lr: float
    about: str


@dataclass(frozen=True)
class ModelSpec:
    """What a plan says about the model: a recipe's name, or none, and arguments on top of it."""

    recipe: str | None
    overrides: dict[str, Any] = field(default_factory=dict)


def _llama(layers: int, hidden: int, heads: int, max_lr: float, about: str, **others: Any) -> Recipe:
    """A recipe of this width and depth, its FFN four times as wide unless `others` says otherwise."""
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
    # Table 9 prints a hidden size of 8,192 here, which would be a model of 44.6B parameters: with 2,048 the
    # FFN is 8,192 wide and the count fits the name.
    "3.1b": _llama(40, 2048, 32, 3e-4, "Table 9, 3.1B, hidden size 2,048 (the 8,192 printed is the FFN's)"),
    "qwen-1.2b": _llama(24, 1536, 16, 3e-4, "Table 5, Qwen-1.2B: biases in QKV", add_qkv_bias=True),
}


def resolve_model(spec: ModelSpec) -> dict[str, Any]:
    """The model's Megatron arguments: the recipe's, with the overrides on top.

    Raises UserError for an unknown recipe, or when there is no recipe and the size is not given.
    """
    if spec.recipe is not None and spec.recipe not in RECIPES:
        raise UserError(f"there is no recipe {spec.recipe!r}; there are {', '.join(RECIPES)}")
    base = RECIPES[spec.recipe].arguments if spec.recipe else {}
    arguments = base | spec.overrides
    needed = ("num_layers", "hidden_size", "num_attention_heads")
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise UserError(f"a model without a recipe needs {', '.join(missing)}; or begin with `recipe: tiny`")
    return arguments


_NUMBER = re.compile(r"-?[0-9.].*")


def megatron_flags(arguments: dict[str, Any]) -> list[str]:
    """`{"num_layers": 4, "swiglu": True, "split": ["99", "1"]}` as `--num-layers 4 --swiglu --split 99 1`.

    true is a flag, false and None leave the argument out, a list gives several values. Text that begins with
    a dash is joined with `=`, so that it is not read as another argument.
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
