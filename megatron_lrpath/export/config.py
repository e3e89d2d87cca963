"""Convert a model's `config.json` from and to an architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.export.architecture import (
    CLASSES,
    LARGEST,
    LLAMA,
    MISTRAL,
    MOST_LAYERS,
    QWEN2,
    QWEN3,
    Architecture,
    is_size,
)

# LLaMA 3's scaling of RoPE as Megatron computes it; only the factor is an argument there.
ROPE_STRETCH = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
MOST = {"num_hidden_layers": MOST_LAYERS}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
# The defaults of transformers for missing settings, if the classes differ.
_DEFAULTS: dict[str, dict[str, int]] = {
    LLAMA: {"max_position_embeddings": 2048},
    QWEN2: {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    QWEN3: {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    MISTRAL: {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}


def to_config(model: Architecture, dtype: str, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `config.json` for a model.

    Args:
        model: the architecture.
        dtype: the type of the weights: float32, bfloat16 or float16.
        tokens: `bos_token_id`, `eos_token_id` and `pad_token_id`, if they exist.
    """
    config: dict[str, Any] = {
        "architectures": [CLASSES[model.kind]],
        "model_type": model.kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        # Both spellings: transformers 4 reads rope_theta and rope_scaling, 5 converts them.
        "rope_theta": model.rope_theta,
        "rope_scaling": None
        if model.rope_factor is None
        else {"rope_type": "llama3", "factor": model.rope_factor, **ROPE_STRETCH},
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tied,
        "use_cache": True,
        "torch_dtype": dtype,
        **{name: tokens.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    return config | _of_class(model)


def _of_class(model: Architecture) -> dict[str, Any]:
    """Return the settings specific to the model's class."""
    match model.kind:
        case "qwen2":
            return {"use_sliding_window": False}
        case "qwen3":
            return {"head_dim": model.head_dim, "attention_bias": False, "use_sliding_window": False}
        case "mistral":
            return {"head_dim": model.head_dim, "sliding_window": None}
    biased = model.linear_bias
    return {"head_dim": model.head_dim, "attention_bias": biased, "mlp_bias": biased}


def from_config(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a `config.json`.

    Raises:
        UserError: another kind of model, or a setting that Megatron's dense GPT does not have.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise UserError(f"config.json: model_type {kind!r}; imported are {', '.join(CLASSES)}.")
    config = {**_DEFAULTS[kind], **config}
    wrong = _mistyped(config)
    if wrong:
        raise UserError(f"config.json: {'; '.join(wrong)}.")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    wrong = foreign_settings(config) + _odd_heads(config, groups)
    if wrong:
        raise UserError(f"config.json: not supported by Megatron's dense GPT: {'; '.join(wrong)}.")
    theta, factor = rope_of(config)
    return Architecture(
        kind=kind,
        layers=config["num_hidden_layers"],
        hidden=hidden,
        ffn=config["intermediate_size"],
        heads=heads,
        groups=groups,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        max_positions=config.get("max_position_embeddings") or _DEFAULTS[kind]["max_position_embeddings"],
        rope_theta=theta,
        norm_epsilon=_positive(config, "rms_norm_eps", 1e-6),
        tied=bool(config.get("tie_word_embeddings")),
        linear_bias=kind == LLAMA and bool(config.get("attention_bias")),
        rope_factor=factor,
        init_std=_number(config, "initializer_range", 0.02),
    )


def _mistyped(config: Mapping[str, Any]) -> list[str]:
    """Describe the settings whose values have a wrong type."""
    sizes = [name for name in _SIZES if not is_size(config.get(name), MOST.get(name, LARGEST))]
    sizes += [
        name
        for name in _OPTIONAL_SIZES
        if config.get(name) is not None and not is_size(config[name], LARGEST)
    ]
    switches = [name for name in _SWITCHES if not isinstance(config.get(name), bool | None)]
    wrong = []
    if sizes:
        wrong.append(
            f"{', '.join(sizes)} must be positive whole numbers (at most {LARGEST:,}; "
            f"{MOST['num_hidden_layers']:,} layers)"
        )
    if switches:
        wrong.append(f"{', '.join(switches)} must be true or false")
    return wrong


def _odd_heads(config: Mapping[str, Any], groups: int) -> list[str]:
    """Describe the problem with the numbers of heads."""
    heads, hidden, width = config["num_attention_heads"], config["hidden_size"], config.get("head_dim")
    wrong = []
    if heads % groups:
        wrong.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    if width is None and hidden % heads:
        wrong.append(
            f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, without a head_dim"
        )
    elif (width or hidden // heads) % 2:
        wrong.append(f"heads of {width or hidden // heads} channels: RoPE turns them in pairs")
    return wrong


def _number(settings: Mapping[str, Any], name: str, default: float) -> float:
    """Return a finite number of a `config.json`; raise UserError."""
    value = settings.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise UserError(f"config.json: {name} must be a number.")
    return float(value)


def _positive(settings: Mapping[str, Any], name: str, default: float) -> float:
    """Return a positive number of a `config.json`; raise UserError."""
    value = _number(settings, name, default)
    if value <= 0:
        raise UserError(f"config.json: {name} must be a number above 0.")
    return value


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object of a `config.json`, {} if it is missing; raise UserError."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"config.json: {name} must be an object.")
    return value


def foreign_settings(config: Mapping[str, Any]) -> list[str]:
    """Describe the settings of a `config.json` without a counterpart."""
    kind, activation, layers = (
        config["model_type"],
        config.get("hidden_act", "silu"),
        config.get("layer_types"),
    )
    one_bias = bool(config.get("attention_bias")) != bool(config.get("mlp_bias"))
    settings = {
        f"hidden_act {activation!r}": activation != "silu",
        "attention_bias without mlp_bias, or the reverse": kind == LLAMA and one_bias,
        "attention_bias": kind == QWEN3 and config.get("attention_bias"),
        "use_sliding_window": config.get("use_sliding_window"),
        "layer_types other than full_attention": layers and not _all_full(layers),
        "quantized weights": config.get("quantization_config"),
    }
    return [text for text, is_set in settings.items() if is_set] + _used_window(config)


def _all_full(layers: Any) -> bool:
    """Return whether `layer_types` gives full attention for every layer."""
    return isinstance(layers, list) and all(one == "full_attention" for one in layers)


def _used_window(config: Mapping[str, Any]) -> list[str]:
    """Describe Mistral's sliding window if it is shorter than the maximum sequence."""
    window, positions = config.get("sliding_window"), config.get("max_position_embeddings")
    if config["model_type"] != MISTRAL or window is None:
        return []
    if not is_size(window, LARGEST):
        return [f"sliding_window {window!r}"]
    if window >= (positions or _DEFAULTS[MISTRAL]["max_position_embeddings"]):
        return []
    return [
        f"a sliding_window of {window:,} below max_position_embeddings (for sequences up to {window:,} the "
        f"attention is full: set max_position_embeddings to {window} in a copy of config.json to import it for these)"
    ]


def rope_of(config: Mapping[str, Any]) -> tuple[float, float | None]:
    """Return RoPE's base and LLaMA 3's factor (None without), in the format of transformers 4 or 5."""
    rope = _section(config, "rope_parameters")
    theta = _positive({**config, **rope}, "rope_theta", 10000.0)
    scaling = _section(config, "rope_scaling") or rope
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    for settings in (config, rope, scaling):
        share = _number(settings, "partial_rotary_factor", 1.0)
        if share != 1.0:
            raise UserError(f"config.json: partial_rotary_factor {share} is not supported.")
    if kind == "default":
        return theta, None
    if kind == "llama3" and all(scaling.get(name) == value for name, value in ROPE_STRETCH.items()):
        if scaling.get("factor") is None:
            raise UserError("config.json: RoPE scaled as llama3 without a factor.")
        return theta, _positive(scaling, "factor", 1.0)
    raise UserError(
        f"config.json: RoPE scaled as {scaling} is not supported; only LLaMA 3's with {ROPE_STRETCH} is."
    )
