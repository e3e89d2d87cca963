"""A manifest has a checksum of each tensor and object: a reader verifies only those that it reads."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_lrpath.checkpoints import reader as door
from megatron_lrpath.checkpoints.reader import COMMON, SafeReader, model_problems, written_items
from megatron_lrpath.errors import UserError
from megatron_lrpath.export.checkpoint import CheckpointReader, CheckpointTensor, write_checkpoint
from megatron_lrpath.runs import checkpoints as disk
from megatron_lrpath.runs.checkpoints import FileSum, read_manifest, sum_file, sum_files, write_manifest
from tests.support.flips import flip

STEP = 4
WEIGHT, FIRST, LAST, RANDOM = "decoder.weight", "optimizer.first", "optimizer.last", "rng_state"
ELEMENTS = {FIRST: 50_000, WEIGHT: 2_000_000, LAST: 50_000}
# In 8 MB: the fingerprint's blocks of 64 KiB, one every half MB, cover the first moment and not the last.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a checkpoint of a weight, a moment, a random state and arguments, in one data file."""
    at = disk.checkpoint_folder(tmp_path, STEP)
    tensors = [CheckpointTensor(name, (size,), torch.float32, None, 1) for name, size in ELEMENTS.items()]
    write_checkpoint(at, tensors, lambda one: torch.arange(one.shape[0]), {"args": {"a": 1}}, [RANDOM])
    write_manifest(at, STEP, sum_files(at, written_items(at)))
    return at


def places(folder: Path) -> dict[str, tuple[Path, range]]:
    """Return the location of each item, by its name."""
    stored = door.read_metadata_file(folder / ".metadata").storage_data
    return {
        index.fqn: (folder / one.relative_path, range(one.offset, one.offset + one.length))
        for index, one in stored.items()
    }


def refused(act: Callable[[], None]) -> bool:
    """Return whether a call refuses the checkpoint for its bytes."""
    try:
        act()
    except UserError as error:
        return "holds other bytes than were written" in str(error)
    return False


def evaluation_refuses(folder: Path) -> bool:
    """Return whether one of two ranks detects damage in the items that an evaluation reads."""
    problems = [problem for rank in (0, 1) for problem in model_problems(folder, rank, 2)]
    assert all("holds other bytes than were written" in problem for problem in problems)
    return bool(problems)


@pytest.mark.parametrize(
    ("name", "read"), [(WEIGHT, True), (FIRST, False), (LAST, False), (COMMON, True), (RANDOM, False)]
)
def test_a_flip_counts_where_it_is_read(folder: Path, name: str, read: bool) -> None:
    file, item = places(folder)[name]
    flip(file, item[len(item) // 2], 3)
    assert refused(lambda: CheckpointReader(folder).verify(fingerprint=False)) is read
    for other in places(folder):
        index = MetadataIndex(other, torch.Size([0]) if other in ELEMENTS else None)
        place = door.read_metadata_file(folder / ".metadata").storage_data[index]
        assert refused(lambda i=index, p=place: SafeReader(folder).verify_items({i: p})) is (other == name)


@pytest.mark.parametrize(("name", "read"), [(WEIGHT, True), (FIRST, True), (LAST, False), (COMMON, True)])
def test_an_evaluation_and_an_export_verify_the_model_and_what_the_fingerprint_reads(
    folder: Path, name: str, read: bool
) -> None:
    """Without the latter a result could be recorded under the fingerprint of no checkpoint."""
    assert not evaluation_refuses(folder)
    fingerprint = disk.checkpoint_fingerprint(folder.parent, STEP)
    file, item = places(folder)[name]
    flip(file, item[len(item) // 2], 3)
    assert evaluation_refuses(folder) is read
    assert refused(lambda: CheckpointReader(folder).verify(fingerprint=True)) is read
    assert read or disk.checkpoint_fingerprint(folder.parent, STEP) == fingerprint


@pytest.mark.parametrize("name", [WEIGHT, LAST, COMMON])
def test_an_old_manifest_is_compared_by_file(folder: Path, name: str) -> None:
    sums = {file: FileSum(one.bytes, one.xxh3_128) for file, one in read_manifest(folder).items()}
    write_manifest(folder, STEP, sums)
    CheckpointReader(folder).verify(fingerprint=True)
    file, item = places(folder)[name]
    flip(file, item[len(item) // 2], 3)
    assert refused(lambda: CheckpointReader(folder).verify(fingerprint=False))
    assert evaluation_refuses(folder)


def test_an_item_that_the_manifest_lacks_is_refused(folder: Path) -> None:
    sums = dict(read_manifest(folder))
    name, one = next((name, one) for name, one in sums.items() if one.items)
    _, item = places(folder)[WEIGHT]
    left = {key: value for key, value in one.items.items() if key != disk.item_key(item.start, len(item))}
    write_manifest(folder, STEP, sums | {name: FileSum(one.bytes, one.xxh3_128, left)})
    with pytest.raises(UserError, match=rf"manifest\.json does not have {WEIGHT}"):
        CheckpointReader(folder).verify(fingerprint=False)


def test_a_manifest_of_too_many_items_has_the_sums_of_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "MAXIMUM_ITEMS", 3)
    sums = read_manifest(folder)
    write_manifest(folder, STEP, sums)
    assert read_manifest(folder) == sums
    assert not any(one.items for one in read_manifest(folder).values())


def test_items_are_summed_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "CHUNK", 7)
    content = bytes(range(100))
    path = tmp_path / "file"
    path.write_bytes(content)
    items = [(0, 3), (3, 4), (7, 30), (40, 1), (41, 50), (95, 40)]
    found = sum_file(path, items)
    assert found == sum_file(path), "items make no difference to the file"
    assert set(found.items) == {disk.item_key(*one) for one in items if sum(one) <= 100}
    for offset, length in items[:5]:
        expected = disk._sum_part(io.BytesIO(content), offset, length)
        assert found.items[disk.item_key(offset, length)] == expected
