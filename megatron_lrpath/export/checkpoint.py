"""Read and write Megatron's `torch_dist` checkpoints tensor by tensor, in one process and without a model."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, save
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_lrpath.checkpoints.reader import BACKEND as BACKEND_FILE
from megatron_lrpath.checkpoints.reader import COMMON, SafeReader, load_common, object_bytes
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.runs.checkpoints import METADATA

# The model's own tensors; optimizer and random state are not read.
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.", "mtp.")
LAYERS = "decoder.layers."
# Parts of a checkpoint that an export or a merge reads.
READ = (*MODEL_PREFIXES, COMMON)
# Tensors that Megatron pads to a round number of rows.
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


class CheckpointReader:
    """One `torch_dist` checkpoint folder (`…/iter_0000100`), saved at any parallel layout.

    Raises:
        UserError: there is no readable `torch_dist` checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / METADATA).is_file() or not (folder / BACKEND_FILE).is_file():
            raise UserError(
                f"{folder}: not a whole torch_dist checkpoint (it has no .metadata or metadata.json). Name "
                "the folder of one step, or train with --ckpt-format torch_dist."
            )
        self.reader = SafeReader(folder)
        self.metadata: Metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def verify(self, fingerprint: bool) -> None:
        """Compare everything that is read of the model with the manifest, before anything is written.

        Args:
            fingerprint: also verify what the checkpoint's fingerprint reads.

        Raises:
            UserError: an item is damaged; the message lists the items.
        """
        places = self.metadata.storage_data or {}
        self.reader.verify_items({index: one for index, one in places.items() if index.fqn.startswith(READ)})
        if fingerprint:
            self.reader.verify_fingerprint(places)

    @property
    def entries(self) -> dict[str, Any]:
        """The checkpoint's metadata of each tensor and object, by name."""
        return self.metadata.state_dict_metadata

    @cached_property
    def args(self) -> Any:
        """The Megatron arguments at the time of the save."""
        try:
            return load_common(self.folder, self.reader)["args"]
        except KeyError:
            raise UserError(f"{self.folder}: the checkpoint does not name its model.") from None

    def model_keys(self) -> set[str]:
        """Return the names of the model's tensors: `decoder.layers.3.mlp.…` as `decoder.layers.mlp.…`."""
        names = (
            name
            for name, entry in self.entries.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(MODEL_PREFIXES)
        )
        return {re.sub(rf"^{re.escape(LAYERS)}\d+\.", LAYERS, name) for name in names}

    def dtype(self, key: str) -> torch.dtype:
        """Return the type in which a tensor is stored."""
        return self.find(key, 0)[1].properties.dtype

    def find(self, key: str, layer: int | None) -> tuple[str, TensorStorageMetadata]:
        """Return a tensor's name and entry: layers are stacked under one name, or have a number in theirs."""
        numbered = f"{LAYERS}{layer}.{key.removeprefix(LAYERS)}" if key.startswith(LAYERS) else key
        for name in (key, numbered):
            entry = self.entries.get(name)
            if isinstance(entry, TensorStorageMetadata):
                return name, entry
        raise UserError(f"{self.folder}: the checkpoint has no tensor {key}; it is of another model.")

    def read(self, key: str, layer: int | None, shape: Sequence[int]) -> Tensor:
        """Return a tensor, of one layer if `layer` is given, with the first `shape[0]` rows.

        Raises:
            UserError: the tensor is missing or smaller, has a different shape, or its file is damaged.
        """
        name, entry = self.find(key, layer)
        stacked = layer is not None and name == key
        lead = (layer,) if stacked and layer is not None else ()
        wanted = torch.Size((*(1 for _ in lead), *shape))
        offsets = torch.Size((*lead, *(0 for _ in shape)))
        size = tuple(entry.size)
        open_ended = name in PADDED or stacked  # further rows of the embeddings are padding
        enough = len(size) == len(wanted) and size[0] >= offsets[0] + wanted[0]
        if not enough or size[1:] != tuple(wanted)[1:] or (size[0] > wanted[0] and not open_ended):
            raise UserError(
                f"{self.folder}: {name} has the shape {list(size)}, which does not hold {list(wanted)}: is "
                "it of another model, or the tokenizer of another vocabulary?"
            )
        return self._stretch(name, entry, ChunkStorageMetadata(offsets, wanted)).view(tuple(shape))

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor by its name in the checkpoint. Raise as `read`."""
        entry = self.entries[name]
        return self._stretch(name, entry, ChunkStorageMetadata(torch.Size([0] * len(entry.size)), entry.size))

    def raw(self, name: str) -> bytes:
        """Return the unchanged bytes of an entry that is not a tensor. Raise as `object_bytes`."""
        return object_bytes(self.reader, name)

    def _stretch(self, name: str, entry: TensorStorageMetadata, stretch: ChunkStorageMetadata) -> Tensor:
        """Return a part of a tensor, combined from the pieces that were saved."""
        items = create_read_items_for_chunk_list(name, entry, [stretch])
        if sum(math.prod(item.lengths) for item in items) != math.prod(stretch.sizes):
            raise UserError(
                f"{self.folder}: the checkpoint holds only parts of {name}; restore it or take another step."
            )
        stored = sum(self.reader.storage_data[item.storage_index].length for item in items)
        if math.prod(stretch.sizes) * entry.properties.dtype.itemsize > stored:
            raise UserError(f"{self.folder}: {name} is larger by its metadata than by its files; restore it.")
        into = _Into(torch.empty(stretch.sizes, dtype=entry.properties.dtype))
        self._read_items(name, items, into)
        return into.target

    def _read_items(self, name: str, items: list[ReadItem], into: _Into) -> None:
        try:
            self.reader.read_data(LoadPlan(items), into)  # type: ignore[arg-type]
        except (OSError, RuntimeError, AssertionError) as error:
            raise UserError(
                f"{self.folder}: {name} cannot be read ({error}); restore the checkpoint or take another "
                "step."
            ) from None


class _Into:
    """The part of a load planner that a storage reader calls: the destination of each piece of a tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        """Return the part of the target that the piece fills."""
        part = self.target
        for dimension, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            part = part.narrow(dimension, start, length)
        return part

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the part is a view of the target."""


BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor to write: a whole one, or one layer's share in a tensor of all layers.

    Attributes:
        key: its name in the checkpoint.
        shape: the shape of what is written, without the layers' axis.
        dtype: its type.
        layer, layers: its place on the layers' axis (None outside of the layers) and the axis's length.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: int | None
    layers: int

    def write_item(self) -> WriteItem:
        """Return the tensor's entry in a save plan."""
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
    """Computes each tensor when it is written, so that a single tensor is in memory at a time."""

    def __init__(
        self, tensors: Sequence[CheckpointTensor], value: Callable[[CheckpointTensor], Tensor]
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self.tensors = {tensor.write_item().index: tensor for tensor in tensors}
        self.value = value

    def create_local_plan(self) -> SavePlan:
        """Return the plan: entries of the tensors, and of the state dict's own content."""
        plan = super().create_local_plan()
        self.plan = SavePlan([*(tensor.write_item() for tensor in self.tensors.values()), *plan.items])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return a tensor, computed now; or an object of the state dict."""
        announced = self.tensors.get(write_item.index)
        if announced is None:
            return super().resolve_data(write_item)
        assert write_item.tensor_data is not None
        sizes = write_item.tensor_data.chunk.sizes
        return self.value(announced).to(announced.dtype).reshape(sizes).contiguous()


def write_checkpoint(
    folder: Path,
    tensors: Sequence[CheckpointTensor],
    value: Callable[[CheckpointTensor], Tensor],
    common: dict[str, Any],
    objects: list[str],
) -> None:
    """Write a checkpoint that Megatron loads at any parallel layout.

    Args:
        folder: the folder of one step; created if missing.
        tensors: every tensor.
        value: returns a tensor's values; called once for each.
        common: the content of the checkpoint without its tensors: arguments, iteration.
        objects: names of the modules' empty extra states, which Megatron expects.
    """
    state: dict[str, Any] = {name: [None] for name in objects} | {COMMON: [common]}
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no process group is in use
        save(
            state,
            storage_writer=FileSystemWriter(folder, single_file_per_rank=True, thread_count=1),
            planner=StreamingPlanner(tensors, value),
            no_dist=True,
        )
    # Last, as in Megatron: its presence shows that the rest is complete.
    atomic_write_json(folder / BACKEND_FILE, BACKEND)
