"""A LLaMA-like model's architecture: read off Megatron's arguments or a `config.json`, written as either."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lrpath.errors import UserError

LLAMA, QWEN2 = "llama", "qwen2"
CLASSES = {LLAMA: "LlamaForCausalLM", QWEN2: "Qwen2ForCausalLM"}

# LLaMA 3's stretching of RoPE as Megatron computes it; only the factor is an argument there.
ROPE_STRETCH = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Megatron arguments and the only values under which a model is a LLaMA or a Qwen2.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "softmax_type": (None, "vanilla"),
}
# Arguments that make another model whenever they are set.
_FOREIGN = (
    "num_experts", "multi_latent_attention", "rotary_interleaved", "rotary_seq_len_interpolation_factor",
    "qk_layernorm", "qk_l2_norm", "apply_layernorm_1p", "layernorm_zero_centered_gamma", "window_size",
    "mtp_num_layers", "apply_query_key_layer_scaling", "apply_residual_connection_post_layernorm", "use_mup",
    "no_rope_freq", "attention_output_gate", "heterogeneous_layers_config_path", "hybrid_layer_pattern",
    "hybrid_override_pattern", "glu_linear_offset", "activation_func_clamp_value",
    "experimental_attention_variant",
)  # fmt: skip
LARGEST = 2**24  # of a size in a `config.json`
MOST = {"num_hidden_layers": 4096}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

# What a checkpoint's arguments say of the model, by type.
_STORED_SIZES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "max_position_embeddings",
)  # fmt: skip
_STORED_NUMBERS = ("rotary_base", "layernorm_epsilon", "init_method_std")
_STORED_SWITCHES = (
    "add_qkv_bias", "add_bias_linear", "untie_embeddings_and_output_weights", "group_query_attention",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """What decides the shapes and the computation of the model.

    Attributes:
        kind: `llama`, or `qwen2` for biases in QKV alone.
        vocab_size: rows of the embedding that stand for tokens, without padding.
        rope_factor: LLaMA 3's stretching factor, None without.
        linear_bias: biases in every linear layer (LLaMA's `attention_bias` and `mlp_bias`).
        init_std: standard deviation of the initial weights.
    """

    kind: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_epsilon: float
    tied: bool
    linear_bias: bool = False
    rope_factor: float | None = None
    init_std: float = 0.02

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.linear_bias or self.kind == QWEN2


def from_megatron(args: Any, vocab_size: int) -> Architecture:
    """The architecture that a checkpoint's stored arguments describe.

    Raises:
        UserError: the model is neither a LLaMA nor a Qwen2, which arguments make it another; or an argument is
            missing or no size of a model.
    """
    _check_arguments(args)
    wrong = [
        f"{name} is {getattr(args, name)!r}"
        for name, allowed in _REQUIRED.items()
        if getattr(args, name, allowed[0]) not in allowed
    ]
    wrong += [f"{name} is {getattr(args, name)!r}" for name in _FOREIGN if getattr(args, name, None)]
    heads, hidden = args.num_attention_heads, args.hidden_size
    qwen = bool(args.add_qkv_bias) and not args.add_bias_linear
    if qwen and args.kv_channels * heads != hidden:
        wrong.append(f"kv_channels is {args.kv_channels}, where Qwen2 has {hidden // heads}")
    if wrong:
        raise UserError(
            f"this model has no Hugging Face class that is exported here (LLaMA, Qwen2): {'; '.join(wrong)}."
        )
    return Architecture(
        kind=QWEN2 if qwen else LLAMA,
        layers=args.num_layers,
        hidden=hidden,
        ffn=args.ffn_hidden_size,
        heads=heads,
        groups=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels,
        vocab_size=vocab_size,
        max_positions=args.max_position_embeddings,
        rope_theta=float(args.rotary_base),
        norm_epsilon=args.layernorm_epsilon,
        tied=not args.untie_embeddings_and_output_weights,
        linear_bias=bool(args.add_bias_linear),
        rope_factor=float(args.rope_scaling_factor) if getattr(args, "use_rope_scaling", False) else None,
        init_std=args.init_method_std,
    )


def to_megatron(model: Architecture) -> dict[str, Any]:
    """The model as Megatron arguments, as they stand in a plan's `model`; the opposite of `from_megatron`."""
    arguments: dict[str, Any] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "group_query_attention": model.groups != model.heads,
        "num_query_groups": model.groups if model.groups != model.heads else None,
        "kv_channels": model.head_dim,
        "max_position_embeddings": model.max_positions,
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_epsilon,
        "position_embedding_type": "rope",
        "rotary_base": int(model.rope_theta) if model.rope_theta.is_integer() else model.rope_theta,
        "use_rope_scaling": model.rope_factor is not None,
        "rope_scaling_factor": model.rope_factor,
        "disable_bias_linear": not model.linear_bias,
        "add_qkv_bias": model.kind == QWEN2,
        "untie_embeddings_and_output_weights": not model.tied,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": model.init_std,
    }
    return {name: value for name, value in arguments.items() if value is not None and value is not False}


def to_config(model: Architecture, dtype: str, tokens: dict[str, int]) -> dict[str, Any]:
    """The model as the content of `config.json`.

    Args:
        model: the architecture.
        dtype: of the weights: float32, bfloat16 or float16.
        tokens: `bos_token_id`, `eos_token_id` and `pad_token_id` where there are such tokens.
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
        # Both spellings: transformers 4 reads rope_theta and rope_scaling, 5 takes them over.
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
    if model.kind == QWEN2:
        return config | {"use_sliding_window": False}
    return config | {
        "head_dim": model.head_dim,
        "attention_bias": model.linear_bias,
        "mlp_bias": model.linear_bias,
    }


def from_config(config: dict[str, Any]) -> Architecture:
    """The architecture that a `config.json` describes.

    Raises:
        UserError: another kind of model, or a setting that Megatron's dense GPT does not have.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise UserError(f"config.json: model_type {kind!r}; imported are {', '.join(CLASSES)}.")
    missing = [name for name in _SIZES if not _is_size(config.get(name), MOST.get(name, LARGEST))]
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    missing += [
        name for name in optional if config.get(name) is not None and not _is_size(config[name], LARGEST)
    ]
    if missing:
        raise UserError(
            f"config.json: {', '.join(missing)} must be positive whole numbers (at most {LARGEST:,}; "
            f"{MOST['num_hidden_layers']:,} layers)."
        )
    wrong = foreign_settings(config)
    if wrong:
        raise UserError(f"config.json: not supported by Megatron's dense GPT: {'; '.join(wrong)}.")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    theta, factor = rope_of(config)
    return Architecture(
        kind=kind,
        layers=config["num_hidden_layers"],
        hidden=hidden,
        ffn=config["intermediate_size"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        max_positions=config.get("max_position_embeddings") or 2048,
        rope_theta=theta,
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        linear_bias=bool(config.get("attention_bias", False)),
        rope_factor=factor,
        init_std=_number(config, "initializer_range", 0.02),
    )


def _check_arguments(args: Any) -> None:
    """Refuse arguments of a checkpoint, which may be a stranger's, that no model can have; raises UserError."""
    grouped, stretched = (
        getattr(args, "group_query_attention", None),
        getattr(args, "use_rope_scaling", False),
    )
    sizes = (*_STORED_SIZES, *(["num_query_groups"] if grouped else []))
    numbers = (*_STORED_NUMBERS, *(["rope_scaling_factor"] if stretched else []))
    most = {"num_layers": MOST["num_hidden_layers"]}
    values: dict[str, Any] = {
        name: getattr(args, name, None) for name in (*sizes, *numbers, *_STORED_SWITCHES)
    }
    wrong = [name for name in sizes if not _is_size(values[name], most.get(name, LARGEST))]
    wrong += [
        name for name in numbers if type(values[name]) not in (int, float) or not 0 <= values[name] < 1e18
    ]
    wrong += [name for name in _STORED_SWITCHES if type(values[name]) is not bool]
    if wrong:
        raise UserError(
            "the checkpoint's arguments are those of no model that is exported: "
            f"{', '.join(f'{name} is {_shown(values[name])}' for name in wrong)}. Restore it, or take another step."
        )


def _shown(value: Any) -> str:
    """A value for a message; Python refuses to write a number of thousands of digits."""
    return "too large" if isinstance(value, int) and abs(value) >= 2**63 else f"{value!r:.40}"


def _is_size(value: Any, most: int) -> bool:
    """Whether a value is a whole number from 1 to `most`."""
    return type(value) is int and 0 < value <= most


def _number(settings: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number of a `config.json`; raises UserError."""
    value = settings.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise UserError(f"config.json: {name} must be a number.")
    return float(value)


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object of a `config.json`, {} where there is none; raises UserError."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"config.json: {name} must be an object.")
    return value


def foreign_settings(config: dict[str, Any]) -> list[str]:
    """What of a `config.json` has no counterpart, in words."""
    activation = config.get("hidden_act", "silu")
    one_bias = bool(config.get("attention_bias")) != bool(config.get("mlp_bias"))
    settings = {
        f"hidden_act {activation!r}": activation != "silu",
        "attention_bias without mlp_bias, or the reverse": config["model_type"] == LLAMA and one_bias,
        "use_sliding_window": config.get("use_sliding_window"),
        "quantized weights": config.get("quantization_config"),
    }
    return [text for text, is_set in settings.items() if is_set]


def rope_of(config: dict[str, Any]) -> tuple[float, float | None]:
    """RoPE's base and LLaMA 3's factor (None without), from transformers 4's or 5's spelling."""
    rope = _section(config, "rope_parameters")
    theta = _number(rope, "rope_theta", 0.0) or _number(config, "rope_theta", 0.0) or 10000.0
    scaling = _section(config, "rope_scaling") or rope
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: partial_rotary_factor {scaling['partial_rotary_factor']} is not supported."
        )
    if kind == "default":
        return theta, None
    if kind == "llama3" and all(scaling.get(name) == value for name, value in ROPE_STRETCH.items()):
        return theta, _number(scaling, "factor", 1.0)
    raise UserError(
        f"config.json: RoPE scaled as {scaling} is not supported; only LLaMA 3's with {ROPE_STRETCH} is."
    )
