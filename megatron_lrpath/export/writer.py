"""Writes a Megatron `torch_dist` checkpoint tensor by tensor, in one process and without a model."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, save
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_lrpath.files import atomic_write_json

BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON = "common_state/shard_0_1"


@dataclass(frozen=True)
class Slot:
    """A tensor to write, whole or the share of one layer in a tensor of all layers.

    Attributes:
        key: its name in the checkpoint.
        shape: of what is written, without the layers' axis.
        dtype: its type.
        layer, layers: its place on the layers' axis and the axis's length; None for a tensor outside of the
        layers.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: int | None
    layers: int

    def write_item(self) -> WriteItem:
        """The plan's entry for it."""
        stacked = self.layer is not None
        offsets = torch.Size(((self.layer or 0,) if stacked else ()) + (0,) * len(self.shape))
        sizes = torch.Size(((1,) if stacked else ()) + self.shape)
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=self.dtype),
            size=torch.Size(((self.layers,) if stacked else ()) + self.shape),
        )
        return WriteItem(MetadataIndex(self.key, offsets), WriteItemType.SHARD, tensor_data=data)


class StreamingPlanner(DefaultSavePlanner):
    """Asks for each tensor when it is its turn to be written, so that one is in memory at a time."""

    def __init__(self, slots: Sequence[Slot], value: Callable[[Slot], Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self.slots = {slot.write_item().index: slot for slot in slots}
        self.value = value

    def create_local_plan(self) -> SavePlan:
        """Entries of the tensors, and of what the state dict itself holds."""
        plan = super().create_local_plan()
        self.plan = SavePlan([*(slot.write_item() for slot in self.slots.values()), *plan.items])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """A tensor, made now; or an object of the state dict."""
        slot = self.slots.get(write_item.index)
        if slot is None:
            return super().resolve_data(write_item)
        tensor = self.value(slot).to(slot.dtype)
        assert write_item.tensor_data is not None
        return tensor.reshape(write_item.tensor_data.chunk.sizes).contiguous()


def write_checkpoint(
    folder: Path,
    slots: Sequence[Slot],
    value: Callable[[Slot], Tensor],
    common: dict[str, Any],
    objects: list[str],
) -> None:
    """Write a checkpoint that Megatron loads at any parallel layout.

    Args:
        folder: of the one step; made if missing.
        slots: every tensor.
        value: makes the tensor of a slot; called once for each.
        common: what the checkpoint holds besides tensors: arguments, iteration.
        objects: names of the modules' empty extra states, which Megatron looks for.
    """
    state: dict[str, Any] = {name: [None] for name in objects} | {COMMON: [common]}
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that no process group is in use
        save(
            state,
            storage_writer=FileSystemWriter(folder, single_file_per_rank=True, thread_count=1),
            planner=StreamingPlanner(slots, value),
            no_dist=True,
        )
    # Last, as Megatron does: it shows that the rest is whole.
    atomic_write_json(folder / "metadata.json", BACKEND)
