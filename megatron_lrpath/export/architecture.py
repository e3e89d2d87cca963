"""The architecture of a LLaMA-like model: read it from Megatron's arguments, and convert it to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.models import ROPE_FACTOR, trained_rope_factor

LLAMA, QWEN2, QWEN3, MISTRAL = "llama", "qwen2", "qwen3", "mistral"  # `model_type` in a config.json
CLASSES = {
    LLAMA: "LlamaForCausalLM",
    QWEN2: "Qwen2ForCausalLM",
    QWEN3: "Qwen3ForCausalLM",
    MISTRAL: "MistralForCausalLM",
}

# Megatron arguments and the only values that a model of `CLASSES` can have.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "softmax_type": (None, "vanilla"),
}
# Arguments that make a model unsupported if they are set.
_FOREIGN = (
    "num_experts", "multi_latent_attention", "rotary_interleaved", "rotary_seq_len_interpolation_factor",
    "qk_l2_norm", "apply_layernorm_1p", "layernorm_zero_centered_gamma", "window_size",
    "mtp_num_layers", "apply_query_key_layer_scaling", "apply_residual_connection_post_layernorm", "use_mup",
    "no_rope_freq", "attention_output_gate", "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json", "hybrid_layer_pattern", "spec",
    "hybrid_override_pattern", "glu_linear_offset", "activation_func_clamp_value",
    "experimental_attention_variant",
)  # fmt: skip

LARGEST = 2**24  # maximum of a size
MOST_LAYERS = 4096
# The arguments of a checkpoint that describe the model, by type.
_STORED_SIZES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "max_position_embeddings",
)  # fmt: skip
_STORED_NUMBERS = ("rotary_base", "layernorm_epsilon", "init_method_std")
_STORED_SWITCHES = (
    "add_qkv_bias", "add_bias_linear", "untie_embeddings_and_output_weights", "group_query_attention",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """The fields that determine the shapes and the computation of a model.

    Attributes:
        kind: `llama`; `qwen2` for biases in QKV only; `qwen3` for norms of queries and keys; `mistral`, which has the
            same computation as a LLaMA without biases.
        vocab_size: rows of the embedding that are tokens, without padding.
        rope_factor: LLaMA 3's scaling factor; None without.
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
        """Return whether queries, keys and values have biases."""
        return self.linear_bias or self.kind == QWEN2

    @property
    def qk_norm(self) -> bool:
        """Return whether each head's queries and keys are normalized."""
        return self.kind == QWEN3


def from_megatron(args: Any, vocab_size: int, imported: str = "") -> Architecture:
    """Return the architecture for a checkpoint's stored arguments.

    Args:
        args: the arguments.
        vocab_size: rows of the embedding that are tokens.
        imported: the kind that an import stored, to choose between kinds with the same computation.

    Raises:
        UserError: the model is not one of `CLASSES`, because of the named arguments; or an argument is missing or not
            a valid size.
    """
    _check_arguments(args)
    wrong = [
        f"{name} is {getattr(args, name)!r}"
        for name, allowed in _REQUIRED.items()
        if getattr(args, name, allowed[0]) not in allowed
    ]
    wrong += [f"{name} is {getattr(args, name)!r}" for name in _FOREIGN if getattr(args, name, None)]
    kind = _kind(args, imported)
    heads, hidden = args.num_attention_heads, args.hidden_size
    if kind == QWEN2 and args.kv_channels * heads != hidden:
        wrong.append(f"kv_channels is {args.kv_channels}, where Qwen2 has {hidden // heads}")
    if kind == QWEN3:
        biases = [name for name in ("add_bias_linear", "add_qkv_bias") if getattr(args, name)]
        wrong += [f"{name} is True with qk_layernorm, where Qwen3 has no biases" for name in biases]
    if wrong:
        raise UserError(
            f"this model has no Hugging Face class that is exported here ({', '.join(CLASSES.values())}): "
            f"{'; '.join(wrong)}."
        )
    return Architecture(
        kind=kind,
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
        rope_factor=trained_rope_factor(args),
        init_std=args.init_method_std,
    )


def _kind(args: Any, imported: str) -> str:
    """Return the kind that the arguments imply, if any."""
    if getattr(args, "qk_layernorm", False):
        return QWEN3
    if args.add_qkv_bias and not args.add_bias_linear:
        return QWEN2
    plain = not (args.add_bias_linear or getattr(args, "use_rope_scaling", False))
    return MISTRAL if imported == MISTRAL and plain else LLAMA


def to_megatron(model: Architecture) -> dict[str, Any]:
    """Return the Megatron arguments of the model, as in a plan's `model`; the inverse of `from_megatron`."""
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
        "qk_layernorm": model.qk_norm,
        "untie_embeddings_and_output_weights": not model.tied,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": model.init_std,
    }
    return {name: value for name, value in arguments.items() if value is not None and value is not False}


def _check_arguments(args: Any) -> None:
    """Refuse invalid arguments in a checkpoint from an untrusted source; raise UserError."""
    grouped, stretched = (
        getattr(args, "group_query_attention", None),
        getattr(args, "use_rope_scaling", False),
    )
    sizes = (*_STORED_SIZES, *(["num_query_groups"] if grouped else []))
    factors = ["rope_scaling_factor", *([ROPE_FACTOR] if hasattr(args, ROPE_FACTOR) else [])]
    numbers = (*_STORED_NUMBERS, *(factors if stretched else []))
    most = {"num_layers": MOST_LAYERS}
    values: dict[str, Any] = {
        name: getattr(args, name, None) for name in (*sizes, *numbers, *_STORED_SWITCHES)
    }
    wrong = [name for name in sizes if not is_size(values[name], most.get(name, LARGEST))]
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
    """Return a value for a message; Python refuses to convert an integer with thousands of digits."""
    return "too large" if isinstance(value, int) and abs(value) >= 2**63 else f"{value!r:.40}"


def is_size(value: Any, most: int) -> bool:
    """Return whether a value is an integer from 1 to `most`."""
    return type(value) is int and 0 < value <= most
