"""Stream a checkpoint's weights into safetensors files, with the mapping from Megatron's tensors.

At most one tensor of a file is in memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_lrpath.errors import UserError
from megatron_lrpath.export.architecture import Architecture
from megatron_lrpath.export.checkpoint import CheckpointReader
from megatron_lrpath.files import atomic_open, atomic_write_json
from megatron_lrpath.wording import clauses

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"

Cut = Callable[[Tensor], Tensor]
Join = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor: name, shape, and how it is cut from the Megatron tensor."""

    name: str
    shape: tuple[int, ...]
    cut: Cut


@dataclass(frozen=True)
class TensorMapping:
    """One Megatron tensor (of one layer, if `layer` is not None) and the Hugging Face tensors in it.

    `key` is its name in the checkpoint, without the layer number; `shape` is that of the used part:
    embeddings without padding rows. `join` is the inverse of the cuts.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    join: Join


def tensor_mappings(model: Architecture) -> Iterator[TensorMapping]:
    """Yield every tensor of the model, in the order of its computation."""
    table = (model.vocab_size, model.hidden)
    yield whole(EMBEDDING, None, table, "model.embed_tokens.weight")
    for layer in range(model.layers):
        yield from layer_mappings(model, layer)
    yield whole(FINAL_NORM, None, (model.hidden,), "model.norm.weight")
    if not model.tied:
        yield whole(OUTPUT, None, table, "lm_head.weight")


def layer_mappings(model: Architecture, layer: int) -> Iterator[TensorMapping]:
    """Yield the tensors of one layer."""
    ours, theirs = "decoder.layers.", f"model.layers.{layer}."
    attention, mlp = f"{ours}self_attention.", f"{ours}mlp."
    hidden, context = model.hidden, model.heads * model.head_dim
    norm = (hidden,)
    kinds = ("weight", "bias") if model.linear_bias else ("weight",)
    yield whole(f"{attention}linear_qkv.layer_norm_weight", layer, norm, f"{theirs}input_layernorm.weight")
    for what in ("weight", "bias") if model.qkv_bias else ("weight",):
        yield qkv(model, layer, f"{attention}linear_qkv.{what}", f"{theirs}self_attn.", what)
    if model.qk_norm:
        for name in ("q", "k"):
            ours_norm, theirs_norm = (
                f"{attention}{name}_layernorm.weight",
                f"{theirs}self_attn.{name}_norm.weight",
            )
            yield whole(ours_norm, layer, (model.head_dim,), theirs_norm)
    for what, shape in zip(kinds, ((hidden, context), norm), strict=False):
        yield whole(f"{attention}linear_proj.{what}", layer, shape, f"{theirs}self_attn.o_proj.{what}")
    yield whole(f"{mlp}linear_fc1.layer_norm_weight", layer, norm, f"{theirs}post_attention_layernorm.weight")
    for what in kinds:
        yield gated(model, layer, f"{mlp}linear_fc1.{what}", f"{theirs}mlp.", what)
    for what, shape in zip(kinds, ((hidden, model.ffn), norm), strict=False):
        yield whole(f"{mlp}linear_fc2.{what}", layer, shape, f"{theirs}mlp.down_proj.{what}")


def whole(key: str, layer: int | None, shape: tuple[int, ...], name: str) -> TensorMapping:
    """Return a tensor that is the same on both sides."""
    return TensorMapping(
        key, layer, shape, (Piece(name, shape, lambda tensor: tensor),), lambda pieces: pieces[0]
    )


def qkv(model: Architecture, layer: int, key: str, owner: str, what: str) -> TensorMapping:
    """Map queries, keys, values: Megatron stores each group's queries, then its key, then its value together."""
    groups, width = model.groups, model.head_dim
    queries = model.heads // groups
    tail = (model.hidden,) if what == "weight" else ()
    rows = {"q_proj": model.heads * width, "k_proj": groups * width, "v_proj": groups * width}
    parts = {
        "q_proj": slice(0, queries),
        "k_proj": slice(queries, queries + 1),
        "v_proj": slice(queries + 1, None),
    }

    def cut(part: slice) -> Cut:
        return lambda tensor: tensor.view(groups, queries + 2, width, *tail)[:, part].reshape(-1, *tail)

    def join(pieces: list[Tensor]) -> Tensor:
        return torch.cat([piece.view(groups, -1, width, *tail) for piece in pieces], dim=1).reshape(-1, *tail)

    pieces = tuple(Piece(f"{owner}{name}.{what}", (rows[name], *tail), cut(parts[name])) for name in rows)
    return TensorMapping(key, layer, (sum(rows.values()), *tail), pieces, join)


def gated(model: Architecture, layer: int, key: str, owner: str, what: str) -> TensorMapping:
    """Map the gate (the input of SiLU) and the up projection, which are concatenated."""
    tail = (model.hidden,) if what == "weight" else ()
    half = model.ffn
    names = (f"{owner}gate_proj.{what}", f"{owner}up_proj.{what}")
    gate = Piece(names[0], (half, *tail), lambda tensor: tensor[:half])
    up = Piece(names[1], (half, *tail), lambda tensor: tensor[half:])
    return TensorMapping(key, layer, (2 * half, *tail), (gate, up), torch.cat)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Cutter:
    """Creates Hugging Face tensors by name; caches the last Megatron tensor."""

    def __init__(self, reader: CheckpointReader, model: Architecture) -> None:
        self.reader = reader
        self.places: dict[str, tuple[TensorMapping, Piece]] = {
            piece.name: (mapping, piece) for mapping in tensor_mappings(model) for piece in mapping.pieces
        }
        self.held: tuple[tuple[str, int | None], Tensor] | None = None

    def __call__(self, name: str) -> Tensor:
        """Return the tensor with this name."""
        mapping, piece = self.places[name]
        key = (mapping.key, mapping.layer)
        if self.held is None or self.held[0] != key:
            self.held = None  # frees the last tensor before the next is read
            self.held = (key, self.reader.read(mapping.key, mapping.layer, mapping.shape))
        return piece.cut(self.held[1])


def write_weights(
    reader: CheckpointReader, model: Architecture, folder: Path, dtype: str | None, shard_bytes: int
) -> list[str]:
    """Write `folder`'s safetensors; return their names.

    `dtype` is the target type, None for the stored one; `shard_bytes` is the maximum size of one file in
    bytes.

    Raises:
        UserError: the checkpoint lacks tensors, or has tensors that the architecture does not.
    """
    expected, there = {mapping.key for mapping in tensor_mappings(model)}, reader.model_keys()
    problems = [f"{name} is not there" for name in sorted(expected - there)]
    problems += [f"{name} has no place" for name in sorted(there - expected)]
    if problems:
        raise UserError(
            f"{reader.folder}: not the tensors of a {'tied' if model.tied else 'untied'} {model.kind} model: "
            f"{clauses(problems, 6)}."
        )
    cutter = Cutter(reader, model)
    entries = [
        FileTensor(name, piece.shape, DTYPES[dtype] if dtype else reader.dtype(mapping.key))
        for name, (mapping, piece) in cutter.places.items()
    ]
    return write_shards(folder, into_shards(entries, shard_bytes), cutter)


# The format's names of the types (https://github.com/huggingface/safetensors, "Format").
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class FileTensor:
    """A tensor to write, whose shape and type are known before its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The size of the values in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def into_shards(entries: Iterable[FileTensor], limit: int) -> list[list[FileTensor]]:
    """Split the tensors in order into shards of at most `limit` bytes, unless a single tensor is larger."""
    shards: list[list[FileTensor]] = []
    size = 0
    for entry in entries:
        if not shards or size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def write_shards(
    folder: Path, shards: Sequence[Sequence[FileTensor]], value: Callable[[str], Tensor]
) -> list[str]:
    """Write the shards, and an index if there are several; return the files' names.

    Args:
        folder: the target folder.
        shards: the tensors of each file, in order.
        value: returns a tensor for its name; called once for each, in order.
    """
    count = len(shards)
    names = (
        [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        with atomic_open(folder / name) as stream:
            write_one(stream, shard, value)
    if count > 1:
        places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.nbytes for shard in shards for entry in shard)
        atomic_write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return names


def write_one(stream: BinaryIO, entries: Sequence[FileTensor], value: Callable[[str], Tensor]) -> None:
    """Write one file: length of the header, header (padded to 8 bytes), values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    for entry in entries:
        tensor = value(entry.name).to(entry.dtype).contiguous()
        if tuple(tensor.shape) != entry.shape:
            raise ValueError(f"{entry.name} has the shape {tuple(tensor.shape)}, announced was {entry.shape}")
        stream.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
