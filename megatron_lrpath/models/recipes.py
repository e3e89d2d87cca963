"""The recipes 203m … 3.1b, qwen-1.2b and tiny: what the paper trains, as Megatron arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_lrpath.errors import UserError

# LLaMA's architecture in Megatron's words. The FFN width and the untied embeddings are not in the paper; they
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

_NEEDED = ("num_layers", "hidden_size", "num_attention_heads")


def resolve_model(spec: ModelSpec) -> dict[str, Any]:
    """The model's Megatron arguments: the recipe's, with the overrides on top.

    Raises UserError for an unknown recipe, or when there is no recipe and the size is not given.
    """
    if spec.recipe is not None and spec.recipe not in RECIPES:
        raise UserError(f"there is no recipe {spec.recipe!r}; there are {', '.join(RECIPES)}")
    base = RECIPES[spec.recipe].arguments if spec.recipe else {}
    arguments = base | spec.overrides
    missing = [name for name in _NEEDED if name not in arguments]
    if missing:
        raise UserError(f"a model without a recipe needs {', '.join(missing)}; or begin with `recipe: tiny`")
    return arguments
