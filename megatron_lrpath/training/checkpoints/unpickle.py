"""Checkpoints are data: what in them is pickled is read without letting it call anything.

Torch reads a distributed checkpoint's `.metadata` and its objects (arguments, random states) by general
unpickling, which runs whatever the file says. Here the first is read knowing a handful of classes, the
second by torch's weights-only unpickler with the classes that Megatron registers.
"""

from __future__ import annotations

import copy
import functools
import importlib
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from megatron_lrpath.errors import UserError

CHECKPOINT = "torch.distributed.checkpoint"
KNOWN = {
    f"{CHECKPOINT}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{CHECKPOINT}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
}  # fmt: skip


class MetadataUnpickler(pickle._Unpickler):
    """Reads what a checkpoint's `.metadata` is made of, and refuses everything else.

    Of the two unpicklers of Python's this is the one in Python: the one in C allocates what a number in the
    file says (a memo of 2^31 places) before it finds that the file has no more to say.

    Args:
        content: the file's.
    """

    # A bytearray is allocated by its number too, and metadata holds none.
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))

    def find_class(self, module: str, name: str) -> Any:
        """A class that metadata may hold.

        Raises:
            UnpicklingError: another name.
        """
        if module == "torch" and (name == "Size" or isinstance(vars(torch).get(name), torch.dtype)):
            return getattr(torch, name)
        if name in KNOWN.get(module, ()):
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a checkpoint")


def read_metadata(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Read `.metadata` with the unpickler above (torch's own way is left unused)."""
    path = self._get_metadata_path(kwargs.get("rank"))
    with self.fs.create_stream(path, "rb") as stream:
        metadata = load_metadata(stream.read(), Path(path))
    # Of its own for each caller, down to what is ever replaced.
    owner = copy.copy(metadata.storage_meta)
    owner.load_id = self.load_id
    return replace(metadata, storage_meta=owner, state_dict_metadata=dict(metadata.state_dict_metadata))


@functools.lru_cache(maxsize=1)  # a start asks for the same three times
def load_metadata(content: bytes, path: Path) -> Any:
    """A checkpoint's metadata from the file's content.

    Raises:
        UserError: the file is damaged, or holds what metadata never does.
    """
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    try:
        metadata = MetadataUnpickler(content).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds {type(metadata).__name__}")
        for place in (metadata.storage_data or {}).values():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"it points outside the checkpoint ({place.relative_path})")
    except Exception as error:
        raise UserError(
            f"{path}: not a checkpoint's metadata ({error}). Restore the checkpoint from a backup."
        ) from None
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def load_bytes(
    original: Callable[..., None], self: Any, read_item: Any, value: Any, *_: Any, **__: Any
) -> None:
    """Load an object of a checkpoint by torch's weights-only unpickler (torch's own way is left unused)."""
    from torch.distributed.checkpoint._traverse import set_element

    name = read_item.dest_index.fqn
    try:
        loaded = torch.load(value, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"the checkpoint's `{name}` holds more than data: {str(error)[:300]}") from None
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


@contextmanager
def load_failures(folder: Path | str | None) -> Iterator[None]:
    """Turn what is raised on all ranks for a checkpoint under `folder` that cannot be read into one message.

    Raises:
        UserError: the first cause.
    """
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        said = causes[0] if causes else "rank 0 says why"
        raise UserError(f"{folder}: a checkpoint cannot be read: {said}") from None
