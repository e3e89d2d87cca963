"""Write safetensors files tensor by tensor, with at most one tensor in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_lrpath.files import atomic_open, atomic_write_json

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
