"""Read a checkpoint's folder safely, without patches: load only data, and verify the bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future

from megatron_lrpath.checkpoints import objects
from megatron_lrpath.checkpoints.metadata import read_metadata_file
from megatron_lrpath.checkpoints.pickle_data import NotDataError
from megatron_lrpath.console import warn
from megatron_lrpath.errors import UserError, cause
from megatron_lrpath.runs import checkpoints as disk
from megatron_lrpath.runs.checkpoints import METADATA, FileSum, ManifestError
from megatron_lrpath.wording import clauses

BACKEND = "metadata.json"
COMMON, OLD_COMMON = "common_state/shard_0_1", "common.pt"
"""Megatron's names for the non-tensors, arguments included: an object, before version 0.19 a file."""
CARRIED = "lrpath_hugging_face"  # the argument that stores what an export restores of an imported folder
TRAINING_STATE = ("optimizer", "rng_state")
"""Prefixes of the names that are read only by a training, not by an evaluation or a merge."""
LISTED = 5  # maximum number of damaged parts in a message
Places = Mapping[MetadataIndex, Any]  # the location of each item: torch's `_StorageInfo`


class SafeReader(FileSystemReader):
    """Torch's reader of a checkpoint's folder, restricted to data.

    Args:
        folder: the folder of one step.
        verify: compare the bytes read with the manifest, if there is one; false if the caller has verified them.

    Raises:
        UserError: the manifest is damaged, or the size of a file differs from the manifest.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        super().__init__(folder)
        self.folder = folder
        self.sums = manifest_sums(folder) if verify else None
        self._verified: set[Any] = set()

    def verify(self, names: Collection[str]) -> None:
        """Compare whole files with the manifest, each once.

        Raises:
            UserError: a file's bytes differ from the manifest; the message lists the files.
        """
        new = sorted(set(names) - self._verified)
        if self.sums is not None and new:
            refuse_damage(self.folder, wrong_files(self.folder, self.sums, new))
        self._verified.update(new)

    def verify_items(self, items: Places) -> None:
        """Compare items with the manifest, each once; if it has no sums of items, compare their files.

        Raises:
            UserError: an item's bytes differ from the manifest; the message lists the items.
        """
        new = {index: place for index, place in items.items() if index not in self._verified}
        if self.sums is not None and new:
            summed = {
                index: place for index, place in new.items() if has_items(self.sums, place.relative_path)
            }
            self.verify({place.relative_path for index, place in new.items() if index not in summed})
            refuse_damage(self.folder, wrong_items(self.folder, self.sums, summed))
        self._verified.update(new)

    def verify_fingerprint(self, items: Places) -> None:
        """Verify what the checkpoint's fingerprint reads; `items`: all items. Raise as `verify_items`."""
        self.verify({METADATA, BACKEND})
        if self.sums is not None:
            self.verify_items(fingerprinted(self.sums, items))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checkpoint's metadata. Raise UserError if it is damaged."""
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        self.verify([path.name])
        return own_metadata(path, self.load_id)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Pass the requested tensors and objects to the planner. Raise UserError if an item is damaged."""
        return read_data(self, plan, planner, self.verify_items)


def manifest_sums(folder: Path) -> Mapping[str, FileSum] | None:
    """Return the manifest's sums if all file sizes match; warn and return None without a manifest.

    Raises:
        UserError: the manifest is damaged, files are missing, or a size differs from the manifest.
    """
    if not (folder / disk.MANIFEST).exists():
        warn(f"{folder}: it has no {disk.MANIFEST}, so it is read unverified.")
        return None
    try:
        sums = disk.read_manifest(folder)
    except ManifestError as error:
        refuse_damage(folder, [str(error)])
        raise
    refuse_damage(folder, disk.wrong_sizes(folder, sums))
    return sums


def wrong_files(folder: Path, sums: Mapping[str, FileSum], names: Iterable[str]) -> list[str]:
    """Return a text for each file that differs from the manifest or is not in it."""
    ordered = sorted(names)
    missing = [f"{name} is not in {disk.MANIFEST}" for name in ordered if name not in sums]
    return missing + disk.wrong_content(folder, sums, [name for name in ordered if name in sums])


def has_items(sums: Mapping[str, FileSum], name: str) -> bool:
    """Return whether the manifest has the sums of a file's items; older manifests have only sums of files."""
    return name in sums and bool(sums[name].items)


def wrong_items(folder: Path, sums: Mapping[str, FileSum], items: Places) -> list[str]:
    """Return a text for each item that differs from the manifest; all are of files that `has_items`."""
    return [
        problem
        for name, places in by_file(items).items()
        for problem in disk.wrong_items(folder / name, sums[name], places)
    ]


def fingerprinted(sums: Mapping[str, FileSum], items: Places) -> dict[MetadataIndex, Any]:
    """Return the items, of files that `has_items`, that the checkpoint's fingerprint reads a part of."""
    blocks = {name: disk.fingerprint_blocks(one.bytes) for name, one in sums.items() if one.items}
    return {
        index: place
        for index, place in items.items()
        if any(
            place.offset < block.stop and block.start < place.offset + place.length
            for block in blocks.get(place.relative_path, ())
        )
    }


def by_file(items: Places) -> dict[str, dict[tuple[int, int], str]]:
    """Return the items of each file: the name of each item by its (offset, length) in bytes."""
    found: dict[str, dict[tuple[int, int], str]] = {}
    for index, place in items.items():
        found.setdefault(place.relative_path, {})[place.offset, place.length] = index.fqn
    return found


def written_items(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Return (offset, length) of each file's items, for a checkpoint that this process has just written."""
    return {
        name: list(places)
        for name, places in by_file(read_metadata_file(folder / METADATA).storage_data).items()
    }


def model_problems(folder: Path, rank: int, world: int) -> list[str]:
    """Return a text for each problem in this rank's share of the data that an evaluation reads.

    These are all items except `TRAINING_STATE`, and the part of it that the fingerprint reads.

    Args:
        folder: the folder of one step, with a manifest; the caller has compared all sizes.
        rank, world: each rank takes the items of the files that it would write at this number of ranks, and all
            ranks verify the metadata.
    """
    try:
        sums = disk.read_manifest(folder)
        if METADATA not in sums:  # of another format than torch's
            return wrong_files(folder, sums, disk.share_of(rank, world, sums))
        if problems := wrong_files(folder, sums, {METADATA, BACKEND, OLD_COMMON} & sums.keys()):
            return problems
        stored = read_metadata_file(folder / METADATA).storage_data
    except (ManifestError, UserError) as error:
        return [str(error)]
    wanted = {index: place for index, place in stored.items() if not index.fqn.startswith(TRAINING_STATE)}
    wanted |= fingerprinted(sums, stored)
    mine = set(disk.share_of(rank, world, {place.relative_path for place in wanted.values()}))
    whole = {name for name in mine if not has_items(sums, name)}
    items = {index: place for index, place in wanted.items() if place.relative_path in mine - whole}
    return wrong_files(folder, sums, whole) + wrong_items(folder, sums, items)


def refuse_damage(folder: Path, problems: list[str]) -> None:
    """Raise UserError if there are problems."""
    if problems:
        raise UserError(
            f"{folder}: the checkpoint is damaged: {clauses(problems, LISTED)}. Restore it from a backup, or take the "
            "checkpoint of another step."
        )


def own_metadata(path: Path, load_id: str) -> Metadata:
    """Return the metadata in the file at `path` as a copy: what callers replace in it is not shared."""
    metadata = read_metadata_file(path)
    owner = replace(metadata.storage_meta or StorageMeta(), load_id=load_id)
    return replace(metadata, storage_meta=owner, state_dict_metadata=dict(metadata.state_dict_metadata))


def read_data(
    reader: FileSystemReader, plan: LoadPlan, planner: LoadPlanner, verify: Callable[[Places], None]
) -> Future[None]:
    """Read as torch's `FileSystemReader.read_data`, but accept only pieces that are data.

    Args:
        reader: the reader of the folder, with the storage data.
        plan: the items to read.
        planner: receives tensors and objects; an object's bytes are safe for any loader.
        verify: called with the items of each file before they are read.

    Raises:
        UserError: a piece is missing or damaged, or contains more than data.
    """
    wanted: dict[str, list[ReadItem]] = {}
    for item in plan.items:
        wanted.setdefault(_place(reader, item.storage_index).relative_path, []).append(item)
    for name, items in wanted.items():
        verify({item.storage_index: _place(reader, item.storage_index) for item in items})
        path = Path(reader.path) / name
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for item in items:
                place = _place(reader, item.storage_index)
                if place.offset + place.length > size:
                    raise unreadable(path, item.storage_index.fqn, "the file is cut short")
                _read_piece(path, item, _create_file_view(file, place.offset, place.length), planner)
    done: Future[None] = Future()
    done.set_result(None)
    return done


def unreadable(path: Path, name: str, why: str) -> UserError:
    """Return the error for an entry of a checkpoint that cannot be used."""
    return UserError(f"{path}: {name} cannot be read ({why}); restore the checkpoint or take another step.")


def _place(reader: FileSystemReader, index: MetadataIndex) -> Any:
    """Return the place of a piece. Raise UserError if the checkpoint does not have it."""
    place = reader.storage_data.get(index)
    if place is None:
        raise unreadable(Path(reader.path), index.fqn, "the checkpoint does not hold all of it")
    return place


def _read_piece(path: Path, item: ReadItem, stream: Any, planner: LoadPlanner) -> None:
    """Read an object or a piece of a tensor."""
    name = item.storage_index.fqn
    if item.type == LoadItemType.BYTE_IO:
        planner.load_bytes(item, io.BytesIO(objects.checked_bytes(name, stream.read(-1))))
        return
    try:
        tensor = objects.load(stream, tensor=True)
    except NotDataError as error:
        raise unreadable(path, name, str(error)) from None
    within = isinstance(tensor, Tensor) and tensor.dim() == len(item.lengths)
    if not within or any(
        start + length > end
        for start, length, end in zip(item.storage_offsets, item.lengths, tensor.shape, strict=True)
    ):
        raise unreadable(path, name, "its shape differs from the metadata")
    target = planner.resolve_tensor(item).detach()
    target.copy_(narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths))
    planner.commit_tensor(item, target)


def object_bytes(reader: FileSystemReader, name: str) -> bytes:
    """Return the bytes of an object of the checkpoint, safe for any loader.

    Raises:
        UserError: the checkpoint has no object of this name, or it is damaged or contains more than data.
    """
    index = MetadataIndex(name)
    place = _place(reader, index)
    path = Path(reader.path) / place.relative_path
    if isinstance(reader, SafeReader):
        reader.verify_items({index: place})
    try:
        with path.open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({cause(error)}).") from None
    return objects.checked_bytes(name, content)


def load_common(folder: Path, reader: SafeReader | None = None) -> dict[str, Any]:
    """Return the content of a checkpoint without its tensors: counters, and the arguments of the save.

    Args:
        folder: the folder of one step.
        reader: an open reader of the folder; without it, the files are not verified.

    Raises:
        UserError: it is missing or damaged, or contains more than data.
    """
    old = folder / OLD_COMMON
    try:
        if old.is_file():
            if reader is not None:
                reader.verify([OLD_COMMON])
            with old.open("rb") as stream:
                loaded = objects.load(stream)
        else:
            if reader is None:
                reader = SafeReader(folder, verify=False)
            if not reader.storage_data:
                reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
            loaded = objects.load(io.BytesIO(object_bytes(reader, COMMON)))[0]
        if not isinstance(loaded, dict):
            raise NotDataError(f"it holds {type(loaded).__name__}")
    except (NotDataError, OSError, IndexError, TypeError) as error:
        raise UserError(
            f"{folder}: the checkpoint's arguments cannot be read ({error}); restore it or take another step."
        ) from None
    return loaded
