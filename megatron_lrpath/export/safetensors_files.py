"""Safetensors files written and read tensor by tensor, so that no more than one tensor is in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_open, atomic_write_json

# The format's names of the types (https://github.com/huggingface/safetensors, "Format").
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class FileTensor:
    """A tensor to write: its shape and type are known before its values are."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def into_shards(entries: Iterable[FileTensor], limit: int) -> list[list[FileTensor]]:
    """Split in order, each shard at most `limit` bytes unless a single tensor is larger."""
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
    """Write the shards and, for more than one, their index; returns the files' names.

    Args:
        folder: where to.
        shards: the tensors of each file, in the order of the file.
        value: makes a tensor from its name; called once for each, in order.
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
    """One file: length of the header, header (padded to 8 bytes), values."""
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
        """The file of every tensor."""
        try:
            places = dict(json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / INDEX}: not an index of safetensors ({error}).") from None
        for name in set(places.values()):
            if not isinstance(name, str) or Path(name).name != name or not (self.folder / name).is_file():
                raise UserError(
                    f"{self.folder / INDEX}: names the file {name!r}, which is not in the folder."
                )
        return places

    def file(self, name: str) -> Any:
        """One opened file."""
        from safetensors import SafetensorError, safe_open

        if name not in self.open_files:
            try:
                self.open_files[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.folder / name}: not a whole safetensors file ({error}).") from None
        return self.open_files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self.file(self.places[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor."""
        stored = self.file(self.places[name]).get_slice(name).get_dtype()
        known = {spelled: dtype for dtype, spelled in TYPES.items()}
        if stored not in known:
            raise UserError(f"{self.folder}: {name} is of type {stored}; imported are {', '.join(known)}.")
        return known[stored]

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own: the mapped file, whose pages would stay in memory, is let go of."""
        opened = self.file(self.places[name])
        tensor: Tensor = opened.get_tensor(name).clone()
        del opened, self.open_files[self.places[name]]
        return tensor

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.open_files.clear()
