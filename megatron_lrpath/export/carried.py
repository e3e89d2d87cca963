"""Settings of an imported folder outside the model, kept in every checkpoint and restored by an export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_lrpath.checkpoints.reader import CARRIED
from megatron_lrpath.errors import UserError

LARGEST = 2**20  # bytes as JSON, which every checkpoint stores in addition
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Settings that an export writes itself, or that are useless in another folder.
_OWN = frozenset((
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "attention_dropout",
    "tie_word_embeddings", "use_cache", "torch_dtype", "dtype", "head_dim", "attention_bias", "mlp_bias",
    "use_sliding_window", "sliding_window", "layer_types", "quantization_config", "transformers_version",
))  # fmt: skip
_CODE = ("auto_map", "custom_pipelines", "custom_generate")  # names of programs


@dataclass(frozen=True)
class Carried:
    """The settings that an import keeps for an export.

    Attributes:
        kind: the `model_type` of the folder; empty for a model that was not imported.
        config: the settings of `config.json` outside the architecture, including the end tokens.
        generation: the content of `generation_config.json`.
    """

    kind: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_folder(cls, config: Mapping[str, Any], generation: Mapping[str, Any]) -> Carried:
        """Select the settings of the two files that are kept.

        Raises:
            UserError: a token is not an id, or the settings are too large.
        """
        both = (("config.json", config), ("generation_config.json", generation))
        wrong = [
            f"{file}: {name} must be the id of a token or a list of ids"
            for file, settings in both
            for name in TOKENS
            if not _is_ids(settings.get(name))
        ]
        if wrong:
            raise UserError("; ".join(wrong) + ".")
        made = cls(
            str(config["model_type"]), _without(config, _OWN), _without(generation, {"transformers_version"})
        )
        if len(json.dumps(asdict(made))) > LARGEST:
            raise UserError(
                f"config.json and generation_config.json: more than {LARGEST:,} bytes outside the architecture; remove "
                "what is not needed from a copy of the folder."
            )
        return made

    @classmethod
    def of_arguments(cls, args: Any) -> Carried:
        """Read the settings in a checkpoint's stored arguments; empty for a model that was not imported."""
        stored = getattr(args, CARRIED, None)
        return cls(**stored) if isinstance(stored, dict) else cls()

    def stored(self) -> dict[str, Any]:
        """Return the settings in the form stored in a checkpoint's arguments."""
        return asdict(self)

    def within(self, rows: int) -> tuple[Carried, list[str]]:
        """Remove special tokens without a row in the embeddings; return a note for the user if there are any."""
        lost = sorted({one for one in _ids(self.config) + _ids(self.generation) if one >= rows})
        if not lost:
            return self, []
        kept = Carried(self.kind, _without_ids(self.config, lost), _without_ids(self.generation, lost))
        named = ", ".join(map(str, lost))
        return kept, [
            f"the imported configuration names the tokens {named}, which the {rows:,} rows of the embeddings do not "
            "hold; they are left out (--vocab-size N keeps more rows)."
        ]

    def tokens(self, of_tokenizer: Mapping[str, int]) -> dict[str, Any]:
        """Return the special tokens of the configuration; missing ones are taken from the tokenizer."""
        return {**of_tokenizer, **_named(self.config)}

    def generation_config(self, of_tokenizer: Mapping[str, int], stop: int | None) -> dict[str, Any]:
        """Return the content of `generation_config.json`.

        Args:
            of_tokenizer: the tokenizer's special tokens.
            stop: the token that ends an answer of a model fine-tuned here; it comes first.
        """
        tokens = {**self.tokens(of_tokenizer), **_named(self.generation)}
        ends = as_list(tokens.get("eos_token_id"))
        if ends and not self.generation:
            tokens.setdefault("pad_token_id", ends[0])
        if stop is not None:
            ends = list(dict.fromkeys([stop, *ends]))
            tokens["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        return {**self.generation, **tokens} if self.generation else {**tokens, "do_sample": False}


def as_list(value: int | list[int] | None) -> list[int]:
    """Return the ids of a setting that has one, several or none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens that settings name."""
    return {name: settings[name] for name in TOKENS if settings.get(name) is not None}


def _ids(settings: Mapping[str, Any]) -> list[int]:
    """Return all special tokens that settings name."""
    return [one for value in _named(settings).values() for one in as_list(value)]


def _without_ids(settings: Mapping[str, Any], lost: Sequence[int]) -> dict[str, Any]:
    """Return the settings without these ids among the special tokens."""
    left: dict[str, Any] = {}
    for name, value in _named(settings).items():
        kept = [one for one in as_list(value) if one not in lost]
        left[name] = kept or None if isinstance(value, list) else next(iter(kept), None)
    return {**settings, **left}


def _is_ids(value: Any) -> bool:
    """Return whether a value can name special tokens."""
    return value is None or (value != [] and all(type(one) is int for one in as_list(value)))


def _without(settings: Mapping[str, Any], own: frozenset[str] | set[str]) -> dict[str, Any]:
    """Return the settings except those of an export, names of programs, and a library's own notes."""
    return {
        name: value
        for name, value in settings.items()
        if name not in own and name not in _CODE and not name.startswith("_")
    }
