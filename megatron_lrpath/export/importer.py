"""The way back: a Hugging Face folder as a Megatron checkpoint that a plan's runs can start from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lrpath.errors import UserError
from megatron_lrpath.export import architecture
from megatron_lrpath.export.architecture import Architecture
from megatron_lrpath.export.checkpoint import Slot, write_checkpoint
from megatron_lrpath.export.folder import IMPORTED_VOCABULARY, appearing_folder
from megatron_lrpath.export.safetensors_files import SafetensorsFolder
from megatron_lrpath.export.weights import OUTPUT, Source, sources
from megatron_lrpath.files import atomic_write_text
from megatron_lrpath.runs.checkpoints import TRACKER
from megatron_lrpath.tokenizers.files import HUGGING_FACE, MODEL_FILE, NO_TOKENIZER, ORIGIN, copy_files
from megatron_lrpath.training.checkpoints.parent import RELEASE

SNIPPET = "plan.yaml"
TOKENIZER = "tokenizer"
# Modules whose extra state Megatron reads (Transformer Engine's has five, the local layers four).
STATEFUL = ("self_attention.linear_proj", "self_attention.linear_qkv", "self_attention.core_attention",
            "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip
IGNORED = ("rotary_emb.inv_freq",)  # tables that older folders store


def import_folder(source: Path, target: Path, dtype: torch.dtype | None = None) -> Architecture:
    """Write `target` as a folder of Megatron checkpoints holding the model of `source`.

    Beside the weights there are the tokenizer's files and `plan.yaml`, the lines that a plan needs. Only
    JSON and
    safetensors are read; code in the folder is never run.

    Args:
        source: a LLaMA or Qwen2 folder.
        target: a folder that does not exist yet, or is empty.
        dtype: type to store, None for the stored one.

    Raises:
        UserError: the model is another, or its weights are not whole.
    """
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target}: exists and is not empty; name another --output.")
    model = architecture.from_config(read_config(source / "config.json"))
    with SafetensorsFolder(source) as weights, appearing_folder(target) as folder:
        check_weights(model, weights)
        by_slot = dict(slots(model, weights, dtype))
        tokenizer = import_tokenizer(source, folder, target)
        common = common_state(model, next(iter(by_slot)).dtype, tokenizer)
        write_checkpoint(
            folder / RELEASE,
            list(by_slot),
            lambda slot: joined(by_slot[slot], weights),
            common,
            extra_states(model.layers),
        )
        atomic_write_text(folder / SNIPPET, plan_lines(model, tokenizer, target, by_slot))
        atomic_write_text(folder / TRACKER, RELEASE)
    return model


def slots(
    model: Architecture, weights: SafetensorsFolder, dtype: torch.dtype | None
) -> Iterator[tuple[Slot, Source]]:
    """Every tensor of the checkpoint and what it is put together from."""
    for source in sources(model):
        stored = dtype or weights.dtype(source.pieces[0].name)
        yield Slot(source.key, source.shape, stored, source.layer, model.layers), source


def joined(source: Source, weights: SafetensorsFolder) -> Tensor:
    """One Megatron tensor from its pieces."""
    return source.join([weights.read(piece.name) for piece in source.pieces])


def check_weights(model: Architecture, weights: SafetensorsFolder) -> None:
    """Stop where the folder's tensors are not the model's: missing, unknown or of another shape."""
    pieces = {piece.name: piece.shape for source in sources(model) for piece in source.pieces}
    optional = {"lm_head.weight"} if model.tied else set()
    unknown = [name for name in weights.places if name not in pieces and name not in optional]
    wrong = [f"{name} is not there" for name in pieces if name not in weights.places]
    wrong += [f"{name} is unknown" for name in unknown if not name.endswith(IGNORED)]
    wrong += [
        f"{name} has the shape {list(weights.shape(name))}, by config.json {list(shape)}"
        for name, shape in pieces.items()
        if name in weights.places and weights.shape(name) != shape
    ]
    if wrong:
        raise UserError(f"{weights.folder}: not the weights of its config.json: {'; '.join(wrong[:6])}.")


def common_state(model: Architecture, dtype: torch.dtype, tokenizer: dict[str, str] | None) -> dict[str, Any]:
    """What Megatron and this package read of a checkpoint besides its tensors."""
    arguments = architecture.to_megatron(model)
    args = argparse.Namespace(
        **{
            name: value
            for name, value in arguments.items()
            if name not in ("disable_bias_linear", "norm_epsilon")
        },
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=model.linear_bias,
        add_position_embedding=True,
        params_dtype=dtype,
        padded_vocab_size=model.vocab_size,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        consumed_train_samples=0,
        tokenizer_type=tokenizer["type"] if tokenizer else NO_TOKENIZER,
        tokenizer_model=tokenizer["model"] if tokenizer else None,
        special_tokens=None,
        **{IMPORTED_VOCABULARY: model.vocab_size},
    )
    for name in (
        "add_qkv_bias",
        "group_query_attention",
        "untie_embeddings_and_output_weights",
        "use_rope_scaling",
    ):
        setattr(args, name, bool(getattr(args, name, False)))
    args.num_query_groups = model.groups
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}


def extra_states(layers: int) -> list[str]:
    """The names of the modules' extra states."""
    return [
        f"decoder.layers.{name}._extra_state/shard_{i}_{layers}" for name in STATEFUL for i in range(layers)
    ]


def import_tokenizer(source: Path, folder: Path, target: Path) -> dict[str, str] | None:
    """Copy the tokenizer's files; returns a plan's `tokenizer` section, None where there are none."""
    place = folder / TOKENIZER
    place.mkdir()
    copy_files(source, place)
    config = (
        read_config(place / "tokenizer_config.json") if (place / "tokenizer_config.json").is_file() else {}
    )
    own = config.get(ORIGIN)
    if own and (place / MODEL_FILE).is_file():
        return {"type": str(own), "model": str(target / TOKENIZER / MODEL_FILE)}
    if any(place.iterdir()):
        return {"type": HUGGING_FACE, "model": str(target / TOKENIZER)}
    place.rmdir()
    return None


def plan_lines(
    model: Architecture, tokenizer: dict[str, str] | None, target: Path, by_slot: dict[Slot, Source]
) -> str:
    """The lines of a plan that starts from the imported model, as YAML."""
    import yaml

    sections: dict[str, Any] = {"model": architecture.to_megatron(model)}
    if tokenizer:
        sections["tokenizer"] = tokenizer
    sections["megatron"] = {"pretrained_checkpoint": str(target)}
    if any(slot.key == OUTPUT and slot.dtype == torch.bfloat16 for slot in by_slot):
        sections["megatron"]["bf16"] = True
    note = "# Lines for a plan whose runs without a parent start from this imported model.\n"
    return note + yaml.safe_dump(sections, sort_keys=False)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object.")
    return value


def describe(model: Architecture) -> str:
    """The architecture in a line."""
    return ", ".join(f"{name} {value}" for name, value in asdict(model).items())
