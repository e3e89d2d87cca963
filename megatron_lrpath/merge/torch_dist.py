"""The weighted mean of torch_dist checkpoints, tensor by tensor: never more than one in memory from each."""

from __future__ import annotations

import io
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_text, current_umask
from megatron_lrpath.runs.checkpoints import TRACKER, checkpoint_complete, checkpoint_folder, complete_steps

LEFT_OUT = ("optimizer", "rng_state")
"""Keys that begin so are not merged: a merged model is evaluated or exported, not trained on."""
FILES = ("common.pt", "metadata.json")
"""Files beside the tensors that Megatron reads; the last is what makes a checkpoint complete."""


class Reader(dcp.FileSystemReader):
    """Reads the metadata of a checkpoint once."""

    _known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._known is None:
            self._known = super().read_metadata(*args, **kwargs)
        return self._known

    def tensor(self, key: str) -> torch.Tensor:
        """One whole tensor."""
        entry = self.read_metadata().state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        dcp.load(state, storage_reader=self, no_dist=True)
        return state[key]

    def raw(self, key: str) -> bytes:
        """The bytes of an entry that is no tensor, as they are."""
        planner = _RawLoader()
        dcp.load({key: io.BytesIO()}, storage_reader=self, planner=planner, no_dist=True)
        return planner.found[key]


class _RawLoader(DefaultLoadPlanner):
    """Keeps bytes without unpickling them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)
        self.found: dict[str, bytes] = {}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.found[read_item.dest_index.fqn] = value.getvalue()


class _MergingPlanner(DefaultSavePlanner):
    """Makes each tensor when it is about to be written; entries that are no tensors come from the last."""

    def __init__(self, readers: Sequence[Reader], weights: Sequence[float]) -> None:
        super().__init__(flatten_state_dict=False)
        self.readers, self.weights = readers, weights

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        key = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self.readers[-1].raw(key))
        return merged_tensor([(reader, key) for reader in self.readers], self.weights)


def merged_tensor(places: Sequence[tuple[Reader, str]], weights: Sequence[float]) -> torch.Tensor:
    """Σ weight·tensor, summed in double precision (single for 16-bit tensors), in the tensors' own type."""
    total, dtype = None, torch.float32
    for (reader, key), weight in zip(places, weights, strict=True):
        tensor = reader.tensor(key)
        dtype = tensor.dtype
        if not dtype.is_floating_point:
            total = tensor  # counters and the like: the last one's
            continue
        part = tensor.to(torch.float64 if dtype.itemsize > 2 else torch.float32).mul_(weight)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(dtype)


def merge_checkpoints(
    root: Path, steps: Sequence[int], weights: Sequence[float], target: Path, step: int
) -> Path:
    """Write the weighted mean of `root`'s checkpoints as the checkpoint of `step` under `target`.

    It holds the model and Megatron's arguments, neither optimizer nor random state. It appears whole or not
    at all. Returns its folder.

    Raises:
        UserError: a checkpoint is missing, is of another model, or something lies at the target already.
    """
    for one in steps:
        if not checkpoint_complete(root, one):
            have = ", ".join(map(str, complete_steps(root))) or "none"
            raise UserError(f"{root}: no complete checkpoint of step {one}; there are {have}")
    folder = checkpoint_folder(target, step)
    if folder.exists():
        raise UserError(f"{folder}: there is a checkpoint already; remove it or choose another place")
    readers = [Reader(checkpoint_folder(root, one)) for one in steps]
    state = _wanted(readers, root, steps)
    target.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=target))
    try:
        planner = _MergingPlanner(readers, weights)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
            dcp.save(state, storage_writer=dcp.FileSystemWriter(partial), planner=planner, no_dist=True)
        for name in FILES:
            if (source := checkpoint_folder(root, steps[-1]) / name).is_file():
                shutil.copyfile(source, partial / name)
        partial.chmod(0o777 & ~current_umask())
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, CheckpointException):
            reason = next(iter(error.failures.values()))[0]
            raise UserError(f"{root}: the checkpoints could not be merged: {reason}") from None
        raise
    atomic_write_text(target / TRACKER, str(step))
    return folder


def _wanted(readers: Sequence[Reader], root: Path, steps: Sequence[int]) -> dict[str, Any]:
    """What is written: tensors without data, and a stand-in for everything else."""
    tables = [_model_entries(reader) for reader in readers]
    for table, step in zip(tables, steps, strict=True):
        if _sizes(table) != _sizes(tables[-1]):
            raise UserError(
                f"{root}: the checkpoint of step {step} is of another model than that of {steps[-1]}"
            )
    return {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        if isinstance(entry, TensorStorageMetadata)
        else key
        for key, entry in tables[-1].items()
    }


def _model_entries(reader: Reader) -> dict[str, Any]:
    entries = reader.read_metadata().state_dict_metadata
    return {key: entry for key, entry in entries.items() if not key.startswith(LEFT_OUT)}


def _sizes(entries: dict[str, Any]) -> dict[str, Any]:
    return {
        key: (entry.size, entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
