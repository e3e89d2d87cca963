"""A checkpoint's `.metadata`: torch's objects, built from plain data that was checked."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_lrpath.checkpoints.pickle_data import MAX_BYTES, MENTION, May, Name, NotDataError, Record, parse
from megatron_lrpath.errors import UserError, cause

EXTRA_STATE = "_extra_state"
OBJECT = May.NEW | May.FIELDS
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_CHECKPOINT = "torch.distributed.checkpoint"
METADATA_NAMES = {
    **dict.fromkeys(DTYPES, MENTION),
    **{
        f"{_CHECKPOINT}.metadata.{name}": OBJECT
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorStorageMetadata",
        )
    },
    f"{_CHECKPOINT}.metadata.TensorProperties": May.NEW | May.STATE,
    f"{_CHECKPOINT}.metadata._MEM_FORMAT_ENCODING": May.CALL,
    f"{_CHECKPOINT}.filesystem._StorageInfo": OBJECT,
    # The save plans of the ranks: parsed and discarded.
    **{
        f"{_CHECKPOINT}.planner.{name}": OBJECT
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem")
    },
    f"{_CHECKPOINT}.planner.WriteItemType": May.CALL,
    f"{_CHECKPOINT}.filesystem._StoragePrefix": OBJECT,
    "torch.serialization._get_layout": May.CALL,
    "torch.Size": May.CALL,
    "pathlib.Path": May.CALL,
    "pathlib.PosixPath": May.CALL,
}  # fmt: skip
LEFT_OUT = {"all_local_plans", "mcore_data"}
"""Parts of the metadata that no load reads."""
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
MAX_DIMENSIONS = 32
MAX_PATH = 64  # parts of an entry's place in nested dicts


@functools.lru_cache(maxsize=1)  # a start reads the same metadata three times
def load_metadata(content: bytes, path: Path) -> Metadata:
    """Return a checkpoint's metadata from the content of the file at `path`.

    Raises:
        UserError: the file is damaged, or contains something that metadata never contains. Nothing was
            executed or changed.
    """
    try:
        with no_collections():
            return _Builder().metadata(parse(content, METADATA_NAMES))
    except NotDataError as error:
        raise UserError(
            f"{path}: not a checkpoint's metadata ({error}). Restore the checkpoint from a backup."
        ) from None


@contextmanager
def no_collections() -> Iterator[None]:
    """Disable Python's garbage collection during the parse of a large file, which otherwise takes half of the
    time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_metadata_file(path: Path) -> Metadata:
    """Return the metadata in a file, as `load_metadata` does; a file that is too large is refused.

    Raises:
        UserError: see `load_metadata`; or the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({cause(error)}).") from None
    return load_metadata(content, path)


class _Builder:
    """Builds each record of a file once, regardless of the number of references."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}

    def once(self, plain: Any, make: Callable[[Any], Any]) -> Any:
        """Return `make(plain)`, computed once."""
        if id(plain) not in self.made:
            self.made[id(plain)] = make(plain)
        return self.made[id(plain)]

    def metadata(self, plain: Any) -> Metadata:
        fields = of(plain, f"{_CHECKPOINT}.metadata.Metadata")
        known = {"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"}
        if unknown := sorted(set(fields) - known - LEFT_OUT):
            raise NotDataError(f"metadata has unknown fields ({', '.join(unknown)[:200]})")
        entries = typed(fields.get("state_dict_metadata"), dict)
        places = typed(fields.get("storage_data"), dict)
        planner = fields.get("planner_data")
        return Metadata(
            state_dict_metadata={typed(name, str): self.entry(name, one) for name, one in entries.items()},
            planner_data=None if planner is None else planner_data(planner),
            storage_data={self.index(index): self.place(place) for index, place in places.items()},
            storage_meta=storage_meta(fields.get("storage_meta")),
            version=optional(fields.get("version"), str),
        )

    def entry(self, name: str, plain: Any) -> Any:
        if type(plain) is Record and plain.name == f"{_CHECKPOINT}.metadata.BytesStorageMetadata":
            return BytesStorageMetadata()
        if EXTRA_STATE in name:
            raise NotDataError(f"{name[:200]} is no object")
        return self.once(plain, self.tensor)

    def tensor(self, plain: Any) -> TensorStorageMetadata:
        fields = of(plain, f"{_CHECKPOINT}.metadata.TensorStorageMetadata")
        size = self.size(fields.get("size"))
        chunks = self.once(typed(fields.get("chunks"), list), lambda all_: [self.chunk(one) for one in all_])
        for chunk in chunks:
            if len(chunk.sizes) != len(size) or any(
                start + length > end
                for start, length, end in zip(chunk.offsets, chunk.sizes, size, strict=True)
            ):
                raise NotDataError("a piece of a tensor lies outside it")
        return TensorStorageMetadata(self.once(fields.get("properties"), properties), size, list(chunks))

    def chunk(self, plain: Any) -> ChunkStorageMetadata:
        return self.once(plain, self.new_chunk)

    def new_chunk(self, plain: Any) -> ChunkStorageMetadata:
        fields = of(plain, f"{_CHECKPOINT}.metadata.ChunkStorageMetadata")
        offsets, sizes = self.size(fields.get("offsets")), self.size(fields.get("sizes"))
        if len(offsets) != len(sizes):
            raise NotDataError("a piece of a tensor has offsets of another rank than its sizes")
        return ChunkStorageMetadata(offsets, sizes)

    def size(self, plain: Any) -> torch.Size:
        return self.once(plain, new_size)

    def index(self, plain: Any) -> MetadataIndex:
        fields = of(plain, f"{_CHECKPOINT}.metadata.MetadataIndex")
        offset, hint = fields.get("offset"), fields.get("index")
        return MetadataIndex(
            typed(fields.get("fqn"), str),
            None if offset is None else self.size(offset),
            None if hint is None else whole(hint),
        )

    def place(self, plain: Any) -> _StorageInfo:
        fields = of(plain, f"{_CHECKPOINT}.filesystem._StorageInfo")
        name = typed(fields.get("relative_path"), str)
        if name != Path(name).name or name in ("", ".", "..") or "\0" in name:
            raise NotDataError(f"it points outside the checkpoint ({name[:200]})")
        if fields.get("transform_descriptors"):
            raise NotDataError("its tensors are compressed, which this version does not read")
        return _StorageInfo(name, whole(fields.get("offset")), whole(fields.get("length")))


def of(plain: Any, name: str) -> dict[str, Any]:
    """Return the fields of a record of the class `name`."""
    if type(plain) is not Record or plain.name != name or plain.args or type(plain.state) is not dict:
        raise NotDataError(f"it holds {describe(plain)} where {name.rpartition('.')[2]} belongs")
    return plain.state


def typed(plain: Any, kind: type) -> Any:
    """Return `plain` if it has exactly that type."""
    if type(plain) is not kind:
        raise NotDataError(f"it holds {describe(plain)} where {kind.__name__} belongs")
    return plain


def optional(plain: Any, kind: type) -> Any:
    """Return `plain` if it has that type or is None."""
    return None if plain is None else typed(plain, kind)


def whole(plain: Any) -> int:
    """Return a number from 0 to 2^63 − 1."""
    if not 0 <= typed(plain, int) < 2**63:
        raise NotDataError(f"it holds the number {plain} where a size belongs")
    return int(plain)


def call(plain: Any, name: str) -> tuple[Any, ...]:
    """Return the arguments of a call of `name`."""
    if type(plain) is not Record or plain.name != name or plain.state is not None:
        raise NotDataError(f"it holds {describe(plain)} where {name} belongs")
    return plain.args


def describe(plain: Any) -> str:
    """Describe a parsed value, for a message."""
    return plain.name if type(plain) is Record else type(plain).__name__


def new_size(plain: Any) -> torch.Size:
    """Return a shape with at most 2^63 − 1 elements."""
    args = call(plain, "torch.Size")
    if len(args) != 1 or type(args[0]) is not tuple or len(args[0]) > MAX_DIMENSIONS:
        raise NotDataError("it holds a shape of another form")
    numbers = [whole(number) for number in args[0]]
    if math.prod(number or 1 for number in numbers) >= 2**63:
        raise NotDataError("it holds a shape too large for any tensor")
    return torch.Size(numbers)


def properties(plain: Any) -> TensorProperties:
    """Return the properties of a tensor: dense, in one of torch's memory formats."""
    if type(plain) is not Record or plain.name != f"{_CHECKPOINT}.metadata.TensorProperties":
        raise NotDataError(f"it holds {describe(plain)} where TensorProperties belongs")
    state = plain.state
    if type(state) is not tuple or len(state) not in (5, 6) or type(state[0]) is not Name:
        raise NotDataError("a tensor has properties of another form")
    if call(state[1], "torch.serialization._get_layout") != ("torch.strided",):
        raise NotDataError("a tensor is not dense")
    form = call(state[3], f"{_CHECKPOINT}.metadata._MEM_FORMAT_ENCODING")
    if len(form) != 1 or type(form[0]) is not int or not 0 <= form[0] < len(MEMORY_FORMATS):
        raise NotDataError("a tensor has an unknown memory format")
    if state[0].text not in DTYPES:
        raise NotDataError(f"a tensor is of type {state[0].text}")
    strides = state[5] if len(state) == 6 else None
    # torch has them from 2.15 on
    known = {} if strides is None else {"strides": tuple(whole(one) for one in typed(strides, tuple))}
    has = {one.name for one in fields_of(TensorProperties)}
    return TensorProperties(
        dtype=DTYPES[state[0].text],
        layout=torch.strided,
        requires_grad=typed(state[2], bool),
        memory_format=MEMORY_FORMATS[form[0]],
        pin_memory=typed(state[4], bool),
        **{name: value for name, value in known.items() if name in has},
    )


def storage_meta(plain: Any) -> StorageMeta:
    """Return the storage metadata; the path of the save is dropped."""
    if plain is None:
        return StorageMeta()
    fields = of(plain, f"{_CHECKPOINT}.metadata.StorageMeta")
    return StorageMeta(save_id=optional(fields.get("save_id"), str))


def planner_data(plain: Any) -> dict[str, Any]:
    """Return the position of each entry in nested dicts, as in torch's planner: a tuple of keys and indices."""
    found = {}
    for name, place in typed(plain, dict).items():
        parts = typed(place, tuple)
        if len(parts) > MAX_PATH or any(type(part) not in (str, int) for part in parts):
            raise NotDataError("an entry has a place of another form")
        found[typed(name, str)] = parts
    return found
