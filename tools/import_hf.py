#!/usr/bin/env python3
"""Import a Hugging Face folder (LLaMA, Qwen2, Qwen3, Mistral) as a checkpoint that a plan can start from.

  import_hf.py models/Qwen2-1.5B --output imported/qwen2

Writes imported/qwen2 (weights for any parallel layout, tokenizer) and imported/qwen2/plan.yaml, the lines
for a plan whose runs without a parent (main path, PTFS, the first CPT version) are to start from these
weights. Only safetensors and JSON are read; code in the folder is never run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lrpath import reading
from megatron_lrpath.checkpoints.reader import CARRIED, written_items
from megatron_lrpath.console import ToolParser, run_tool
from megatron_lrpath.errors import UserError
from megatron_lrpath.export import architecture
from megatron_lrpath.export.architecture import Architecture
from megatron_lrpath.export.carried import Carried
from megatron_lrpath.export.checkpoint import CheckpointTensor, write_checkpoint
from megatron_lrpath.export.config import from_config
from megatron_lrpath.export.folder import IMPORTED_VOCABULARY
from megatron_lrpath.export.weights import (
    DTYPES,
    INDEX,
    OUTPUT,
    SINGLE,
    TYPES,
    TensorMapping,
    tensor_mappings,
)
from megatron_lrpath.files import appearing_folder, atomic_write_text
from megatron_lrpath.reading import required_object
from megatron_lrpath.runs.checkpoints import RELEASE, TRACKER, sum_files, write_manifest
from megatron_lrpath.tokenizers.files import NO_TOKENIZER
from megatron_lrpath.tokenizers.imported import FOLDER, import_tokenizer

SNIPPET = "plan.yaml"
GENERATION = "generation_config.json"
# Modules whose extra state Megatron reads (Transformer Engine's has five, the local layers four).
STATEFUL = ("self_attention.linear_proj", "self_attention.linear_qkv", "self_attention.core_attention",
            "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip
IGNORED = ("rotary_emb.inv_freq",)  # tables that older folders store


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's arguments."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="the Hugging Face folder, on this machine"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as stored)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Import the model and print the next steps; return 0."""
    model = import_folder(args.folder, args.output, DTYPES[args.dtype] if args.dtype else None)
    print(f"{args.output}: {describe(model)}")
    print(f"lines for a plan: {args.output / SNIPPET}")
    return 0


def import_folder(source: Path, target: Path, dtype: torch.dtype | None = None) -> Architecture:
    """Write `target` as a folder of Megatron checkpoints holding the model of `source`.

    Also write the tokenizer's files and `plan.yaml`, the lines that a plan needs. Only
    JSON and safetensors are read; code in the folder is never run.

    Args:
        source: a LLaMA, Qwen2, Qwen3 or Mistral folder.
        target: a folder that does not exist yet, or is empty.
        dtype: type to store, None for the stored one.

    Raises:
        UserError: the folder holds a different model, or its weights are incomplete.
    """
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target}: exists and is not empty; name another --output.")
    config, generation = required_object(source / "config.json"), source / GENERATION
    model = from_config(config)
    carried = Carried.of_folder(config, required_object(generation) if generation.is_file() else {})
    with SafetensorsFolder(source) as weights, appearing_folder(target) as folder:
        check_weights(model, weights)
        mappings: dict[CheckpointTensor, TensorMapping] = {}
        for mapping in tensor_mappings(model):
            stored = dtype or weights.dtype(mapping.pieces[0].name)
            tensor = CheckpointTensor(mapping.key, mapping.shape, stored, mapping.layer, model.layers)
            mappings[tensor] = mapping
        tokenizer = import_tokenizer(source, folder / FOLDER, target / FOLDER)

        def joined(tensor: CheckpointTensor) -> Tensor:
            """Return the tensor, joined from its pieces."""
            mapping = mappings[tensor]
            return mapping.join([weights.read(piece.name) for piece in mapping.pieces])

        common = common_state(model, next(iter(mappings)).dtype, tokenizer, carried)
        write_checkpoint(folder / RELEASE, list(mappings), joined, common, extra_states(model.layers))
        write_manifest(folder / RELEASE, 0, sum_files(folder / RELEASE, written_items(folder / RELEASE)))
        atomic_write_text(folder / SNIPPET, plan_lines(model, tokenizer, target, list(mappings)))
        atomic_write_text(folder / TRACKER, RELEASE)
    return model


def check_weights(model: Architecture, weights: SafetensorsFolder) -> None:
    """Raise UserError if the folder's tensors do not fit the model: missing, unknown or of another shape."""
    pieces = {piece.name: piece.shape for source in tensor_mappings(model) for piece in source.pieces}
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


def common_state(
    model: Architecture, dtype: torch.dtype, tokenizer: dict[str, str] | None, carried: Carried | None = None
) -> dict[str, Any]:
    """Return the content of a checkpoint, without its tensors, that Megatron and this package read."""
    arguments = architecture.to_megatron(model)
    renamed = ("disable_bias_linear", "norm_epsilon")
    args = argparse.Namespace(
        **{name: value for name, value in arguments.items() if name not in renamed},
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
        **{IMPORTED_VOCABULARY: model.vocab_size, CARRIED: (carried or Carried()).stored()},
    )
    switches = (
        "add_qkv_bias",
        "qk_layernorm",
        "group_query_attention",
        "untie_embeddings_and_output_weights",
        "use_rope_scaling",
    )
    for name in switches:
        setattr(args, name, bool(getattr(args, name, False)))
    args.num_query_groups = model.groups
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}


def extra_states(layers: int) -> list[str]:
    """Return the names of the modules' extra states."""
    return [
        f"decoder.layers.{name}._extra_state/shard_{i}_{layers}" for name in STATEFUL for i in range(layers)
    ]


def plan_lines(
    model: Architecture, tokenizer: dict[str, str] | None, target: Path, tensors: Sequence[CheckpointTensor]
) -> str:
    """Return the lines of a plan that starts from the imported model, as YAML."""
    import yaml

    sections: dict[str, Any] = {"model": architecture.to_megatron(model)}
    if tokenizer:
        sections["tokenizer"] = tokenizer
    sections["megatron"] = {"pretrained_checkpoint": str(target)}
    if any(tensor.key == OUTPUT and tensor.dtype == torch.bfloat16 for tensor in tensors):
        sections["megatron"]["bf16"] = True
    note = "# Lines for a plan whose runs without a parent start from this imported model.\n"
    return note + yaml.safe_dump(sections, sort_keys=False)


def describe(model: Architecture) -> str:
    """Return a one-line description of the architecture."""
    return ", ".join(f"{name} {value}" for name, value in asdict(model).items())


class SafetensorsFolder:
    """The weights of a Hugging Face folder, opened lazily; only safetensors, never pickles.

    Raises:
        UserError: there are none, or the index names files that are not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open_files: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            self.places = self.read_index()
        elif (folder / SINGLE).is_file():
            self.places = dict.fromkeys(self.file(SINGLE).keys(), SINGLE)
        else:
            pickles = (
                " (its .bin files are pickles, which are never loaded)" if list(folder.glob("*.bin")) else ""
            )
            raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} is there{pickles}.")

    def read_index(self) -> dict[str, str]:
        """Return the file of every tensor."""
        try:
            places = dict(reading.read_object(self.folder / INDEX)["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.folder / INDEX}: not an index of safetensors ({reading.why(error)})."
            ) from None
        for name in places.values():
            if (
                not isinstance(name, str)
                or "\0" in name
                or Path(name).name != name
                or not (self.folder / name).is_file()
            ):
                raise UserError(
                    f"{self.folder / INDEX}: names the file {name!r}, which is not in the folder."
                )
        return places

    def file(self, name: str) -> Any:
        """Return a file of the folder, opened on the first call."""
        from safetensors import SafetensorError, safe_open

        if name not in self.open_files:
            try:
                self.open_files[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.folder / name}: not a whole safetensors file ({error}).") from None
        return self.open_files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self.file(self.places[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor."""
        stored = self.file(self.places[name]).get_slice(name).get_dtype()
        known = {spelled: dtype for dtype, spelled in TYPES.items()}
        if stored not in known:
            raise UserError(f"{self.folder}: {name} is of type {stored}; imported are {', '.join(known)}.")
        return known[stored]

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor; close the mapped file, whose pages would stay in memory."""
        opened = self.file(self.places[name])
        tensor: Tensor = opened.get_tensor(name).clone()
        del opened, self.open_files[self.places[name]]
        return tensor

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.open_files.clear()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 for bad input."""
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
