"""Streams a checkpoint's weights into safetensors files, one Megatron tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_lrpath.errors import UserError
from megatron_lrpath.export.architecture import Architecture
from megatron_lrpath.export.mapping import EMBEDDING, Piece, Source, sources
from megatron_lrpath.export.reader import CheckpointReader
from megatron_lrpath.export.safetensors_files import Entry, into_shards, write_shards

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Cutter:
    """Makes Hugging Face tensors by name; keeps the Megatron tensor that it last cut from."""

    def __init__(self, reader: CheckpointReader, model: Architecture) -> None:
        self.reader = reader
        self.places: dict[str, tuple[Source, Piece]] = {
            piece.name: (source, piece) for source in sources(model) for piece in source.pieces
        }
        self.held: tuple[tuple[str, int | None], Tensor] | None = None

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name."""
        source, piece = self.places[name]
        key = (source.key, source.layer)
        if self.held is None or self.held[0] != key:
            self.held = None  # frees the last one before the next is read
            self.held = (key, self.reader.read(source.key, source.layer, source.shape))
        return piece.cut(self.held[1])


def write_weights(
    reader: CheckpointReader, model: Architecture, folder: Path, dtype: str | None, shard_bytes: int
) -> list[str]:
    """Write `folder`'s safetensors; returns their names.

    Args:
        reader: the checkpoint.
        model: its architecture.
        folder: where to.
        dtype: type to convert to, None for the stored one.
        shard_bytes: the most bytes of one file.

    Raises:
        UserError: the checkpoint lacks tensors, or has some that the architecture has no place for.
    """
    check_keys(reader, model)
    cutter = Cutter(reader, model)
    entries = [
        Entry(name, piece.shape, DTYPES[dtype] if dtype else reader.dtype(source.key))
        for name, (source, piece) in cutter.places.items()
    ]
    return write_shards(folder, into_shards(entries, shard_bytes), cutter)


def stored_dtype(reader: CheckpointReader) -> str:
    """The name of the type in which the checkpoint holds the embeddings."""
    return str(reader.dtype(EMBEDDING)).removeprefix("torch.")


def check_keys(reader: CheckpointReader, model: Architecture) -> None:
    """Stop where the checkpoint's tensors are not exactly the architecture's."""
    expected = {source.key for source in sources(model)}
    there = reader.model_keys()
    extra, missing = sorted(there - expected), sorted(expected - there)
    if extra or missing:
        words = [f"{name} is not there" for name in missing] + [f"{name} has no place" for name in extra]
        raise UserError(
            f"{reader.folder}: not the tensors of a {'tied' if model.tied else 'untied'} {model.kind} model: "
            + "; ".join(words[:6])
            + (f" and {len(words) - 6} more." if len(words) > 6 else ".")
        )
