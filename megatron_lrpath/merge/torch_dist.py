"""The weighted mean of torch_dist checkpoints, tensor by tensor: at most one tensor of each in memory."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_lrpath.checkpoints.reader import TRAINING_STATE, written_items
from megatron_lrpath.errors import UserError
from megatron_lrpath.export.checkpoint import CheckpointReader
from megatron_lrpath.files import appearing_folder, atomic_write_text
from megatron_lrpath.runs.checkpoints import (
    TRACKER,
    checkpoint_complete,
    checkpoint_folder,
    complete_steps,
    sum_files,
    write_manifest,
)

FILES = ("common.pt", "metadata.json")
"""Files that Megatron reads in addition to the tensors; the last one marks a checkpoint as complete."""


class _MergingPlanner(DefaultSavePlanner):
    """A planner that computes each tensor just before it is written; other entries come from the last
    checkpoint.
    """

    def __init__(self, readers: Sequence[CheckpointReader], weights: Sequence[float]) -> None:
        super().__init__(flatten_state_dict=False)
        self.readers, self.weights = readers, weights

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        key = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self.readers[-1].raw(key))
        return merged_tensor([(reader, key) for reader in self.readers], self.weights)


def merged_tensor(places: Sequence[tuple[CheckpointReader, str]], weights: Sequence[float]) -> torch.Tensor:
    """Return Σ weight·tensor, summed in double precision (single for 16-bit tensors), in the tensors' data
    type.
    """
    total, dtype = None, torch.float32
    for (reader, key), weight in zip(places, weights, strict=True):
        tensor = reader.tensor(key)
        dtype = tensor.dtype
        if not dtype.is_floating_point:
            total = tensor  # counters and the like: the last checkpoint's
            continue
        part = tensor.to(torch.float64 if dtype.itemsize > 2 else torch.float32).mul_(weight)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(dtype)


def merge_checkpoints(
    root: Path, steps: Sequence[int], weights: Sequence[float], target: Path, step: int
) -> Path:
    """Write the weighted mean of `root`'s checkpoints as the checkpoint of `step` under `target`; return its
    folder.

    The result has the model and Megatron's arguments, but no optimizer and no random state. It is written
    atomically.

    Raises:
        UserError: a checkpoint is missing or is of another model, or the target already exists.
    """
    for one in steps:
        if not checkpoint_complete(root, one):
            have = ", ".join(map(str, complete_steps(root))) or "none"
            raise UserError(f"{root}: no complete checkpoint of step {one}; there are {have}")
    folder = checkpoint_folder(target, step)
    if folder.exists():
        if not (target / TRACKER).exists():  # killed in between: the checkpoint is complete
            atomic_write_text(target / TRACKER, str(step))
            return folder
        raise UserError(f"{folder}: a checkpoint exists already; remove it or choose another path")
    readers = [CheckpointReader(checkpoint_folder(root, one)) for one in steps]
    state = _wanted(readers, root, steps)
    for reader in readers:
        reader.verify(fingerprint=False)
    try:
        with appearing_folder(folder) as partial, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended
            planner = _MergingPlanner(readers, weights)
            dcp.save(state, storage_writer=dcp.FileSystemWriter(partial), planner=planner, no_dist=True)
            for name in FILES:
                if (source := readers[-1].folder / name).is_file():
                    readers[-1].reader.verify([name])
                    shutil.copyfile(source, partial / name)
            write_manifest(partial, step, sum_files(partial, written_items(partial)))
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise UserError(f"{root}: the checkpoints could not be merged: {reason}") from None
    atomic_write_text(target / TRACKER, str(step))
    return folder


def _wanted(readers: Sequence[CheckpointReader], root: Path, steps: Sequence[int]) -> dict[str, Any]:
    """Return the structure to write: tensors without data, and a placeholder for every other entry."""

    def tensors(reader: CheckpointReader) -> dict[str, Any]:
        return {
            name: (entry.size, entry.properties.dtype)
            for name, entry in reader.entries.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(TRAINING_STATE)
        }

    wanted = tensors(readers[-1])
    for reader, step in zip(readers, steps, strict=True):
        if tensors(reader) != wanted:
            raise UserError(
                f"{root}: the checkpoint of step {step} is of another model than that of {steps[-1]}"
            )
    empty = {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in wanted.items()}
    return {
        name: empty.get(name, name) for name in readers[-1].entries if not name.startswith(TRAINING_STATE)
    }
