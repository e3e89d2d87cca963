"""Whether a checkpoint fits on the disk, known before a byte of it is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SPARE_SHARE = 0.02  # of the checkpoint, for what is beside the tensors
SPARE_BYTES = 2**20


def free_bytes(folder: Path) -> int:
    """What a user may still write on the disk of `folder` (a quota is not visible here)."""
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize


def local_bytes(sharded_state_dict: Any) -> int:
    """How many bytes of tensors this rank adds to a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    total = 0
    for value in nested_values(sharded_state_dict):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and is_main_replica(value.replica_id):
            data = value.data
            total += 0 if data is None else data.numel() * data.element_size()
    return total


def needed_bytes(tensor_bytes: int) -> int:
    """What a checkpoint with so many bytes of tensors takes."""
    return int(tensor_bytes * (1 + SPARE_SHARE)) + SPARE_BYTES


def shortage(folder: Path, tensor_bytes: int) -> str | None:
    """Why a checkpoint does not fit on the disk of `folder`, None if it does."""
    needed, free = needed_bytes(tensor_bytes), free_bytes(folder)
    if free >= needed:
        return None
    return f"it needs {in_words(needed)} and {in_words(free)} are free on the disk of {folder}"


def in_words(size: float) -> str:
    """A size for people: `1.3 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
