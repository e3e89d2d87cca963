"""Slice files: written and read back, refused if damaged, found after a move, checked for overlaps."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lrpath.data import slice_codec
from megatron_lrpath.data.draw_random import permutation, uniforms
from megatron_lrpath.data.indexed import document_lengths, fingerprint_source
from megatron_lrpath.data.slice import (
    Slice,
    SliceSource,
    available_samples,
    check_disjoint,
    open_slices,
    require_samples,
    verify_slices,
)
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan.spec import Data
from tests.support.data_fixtures import make_indexed_dataset, make_random_dataset, make_slice


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder with data/a and data/b (indexed datasets), and their slices v1, v2 and valid."""
    a = make_random_dataset(tmp_path / "data/a", [5, 7, 3, 9, 4, 6, 8, 2])
    b = make_random_dataset(tmp_path / "data/b", [10, 20, 30, 40], first=1000)
    make_slice(tmp_path / "data/slices/v1.slice", [(a, [0, 3, 5], "web"), (b, [1], "books")])
    make_slice(tmp_path / "data/slices/v2.slice", [(a, [1, 2], "web"), (b, [0, 3], "books")])
    make_slice(tmp_path / "data/slices/valid.slice", [(a, [4, 7], "web"), (b, [2], "books")])
    return tmp_path


def test_a_slice_comes_back_as_it_was_written(tree: Path) -> None:
    loaded = Slice.load(tree / "data/slices/v1.slice")
    assert loaded.name == "v1"
    assert loaded.seed == 1
    assert [source.documents.tolist() for source in loaded.sources] == [[0, 3, 5], [1]]
    assert all(source.documents.dtype == np.int32 for source in loaded.sources)
    assert loaded.tokens == 5 + 9 + 6 + 20
    assert loaded.tokens_by_domain == {"web": 20, "books": 20}
    verify_slices([loaded])


def test_a_slice_is_the_same_file_each_time_it_is_written(tree: Path) -> None:
    path = tree / "data/slices/v1.slice"
    before = path.read_bytes()
    Slice.load(path).save(path)
    assert path.read_bytes() == before


def test_a_moved_tree_still_works(tree: Path) -> None:
    (tree / "elsewhere").mkdir()
    shutil.move(tree / "data", tree / "elsewhere/moved")
    loaded = Slice.load(tree / "elsewhere/moved/slices/v1.slice")
    verify_slices([loaded])
    assert loaded.sources[0].prefix == tree / "elsewhere/moved/a"


def test_a_slice_is_found_through_a_link_and_from_another_folder(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "far/away").mkdir(parents=True)
    (tree / "far/away/linked").symlink_to(tree / "data/slices")
    monkeypatch.chdir(tree / "far")
    verify_slices([Slice.load("away/linked/v2.slice")])


def test_the_fingerprint_is_of_content_alone(tree: Path) -> None:
    one = Slice.load(tree / "data/slices/v1.slice")
    other = Slice("other", 99, one.sources)
    assert other.fingerprint == one.fingerprint
    fewer = SliceSource(one.sources[0].prefix, one.sources[0].fingerprint, "web", np.int32([0, 3]), 14)
    assert Slice("v1", 1, (fewer, one.sources[1])).fingerprint != one.fingerprint


def test_every_flipped_byte_and_every_cut_is_noticed(tree: Path) -> None:
    path = tree / "data/slices/v1.slice"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="not a whole slice file"):
            Slice.load(path)
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="not a whole slice file"):
            Slice.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04zip", pickle.dumps({"a": 1}), b"LRPSLICE" + b"\xff" * 60]
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v1.slice").write_bytes(content)
    with pytest.raises(UserError, match=r"v1\.slice: not a whole slice file"):
        Slice.load(tmp_path / "v1.slice")


def test_a_header_that_promises_too_much_is_refused_before_memory_is_taken() -> None:
    blocks = [(1 << 20, slice_codec.pack_documents(np.arange(3, dtype=np.int32))[0][1])]
    with pytest.raises(slice_codec.DamagedError, match="number of documents"):
        slice_codec.unpack_documents(blocks)
    with pytest.raises(slice_codec.DamagedError, match="block of"):
        slice_codec.unpack_documents([(1 << 40, b"")])


def test_the_error_of_a_missing_slice_shows_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"v9\.slice: there is no such slice.*slice_versions"):
        Slice.load(tmp_path / "v9.slice")


def test_a_renamed_slice_is_refused(tree: Path) -> None:
    os.rename(tree / "data/slices/v2.slice", tree / "data/slices/v3.slice")
    with pytest.raises(UserError, match=r"holds the slice 'v2'.*v2\.slice"):
        Slice.load(tree / "data/slices/v3.slice")


def test_a_missing_source_is_named(tree: Path) -> None:
    os.remove(tree / "data/b.bin")
    with pytest.raises(UserError, match=r"v1\.slice: names the indexed dataset .*b\.bin is missing"):
        verify_slices([Slice.load(tree / "data/slices/v1.slice")])


@pytest.mark.parametrize("changed", ["other lengths", "other tokens"])
def test_a_changed_source_is_refused(tree: Path, changed: str) -> None:
    lengths = [5, 7, 3, 9, 4, 6, 2, 8] if changed == "other lengths" else [5, 7, 3, 9, 4, 6, 8, 2]
    make_random_dataset(tree / "data/a", lengths, first=2)
    with pytest.raises(UserError, match="not the one this slice was drawn from"):
        verify_slices([Slice.load(tree / "data/slices/v1.slice")])


def test_slices_of_a_plan_are_opened_in_order_and_proved_disjoint(tree: Path) -> None:
    data = Data(str(tree / "data/slices"), str(tree / "data/slices/valid"))
    assert [one.name for one in open_slices(data, ["v2", "v1"])] == ["v2", "v1"]
    make_slice(tree / "data/slices/v3.slice", [(tree / "data/a", [2, 5, 6], "web")])
    with pytest.raises(
        UserError, match=r"v2\.slice and .*v3\.slice share 1 documents \(the first is number 2\)"
    ):
        open_slices(data, ["v2", "v3"])


@pytest.mark.parametrize("named", [True, False])
def test_a_validation_document_in_a_version_is_refused(tree: Path, named: bool) -> None:
    make_slice(tree / "data/slices/v4.slice", [(tree / "data/b", [2], "books")])
    data = Data(str(tree / "data/slices"), str(tree / "data/slices/valid") if named else "")
    with pytest.raises(UserError, match="share 1 documents"):
        open_slices(data, ["v4"])


def test_a_copy_of_a_dataset_hides_no_shared_document(tree: Path) -> None:
    for ending in (".bin", ".idx"):
        shutil.copy(tree / f"data/a{ending}", tree / f"data/copy{ending}")
    one = make_slice(tree / "data/slices/v5.slice", [(tree / "data/copy", [3], "web")])
    with pytest.raises(UserError, match="share 1 documents"):
        check_disjoint([Slice.load(tree / "data/slices/v1.slice"), one])


def test_too_few_tokens_are_refused_with_both_numbers(tree: Path) -> None:
    one = Slice.load(tree / "data/slices/v1.slice")
    assert available_samples(one, 4) == (19 // 4) + (19 // 4)
    require_samples(one, 8, 4)
    with pytest.raises(UserError, match=r"v1.*need 9 samples of 4 tokens \(36 tokens\).*has 8 \(40 tokens"):
        require_samples(one, 9, 4)


@given(st.sets(st.integers(0, 2**31 - 1), max_size=200))
def test_any_set_of_documents_survives_packing(chosen: set[int]) -> None:
    documents = np.array(sorted(chosen), dtype=np.int32)
    assert np.array_equal(slice_codec.unpack_documents(slice_codec.pack_documents(documents)), documents)


def test_packing_continues_across_blocks_in_bounded_memory() -> None:
    documents = np.flatnonzero(uniforms(10_000_000, "documents") < 0.25).astype(np.int32)
    blocks = slice_codec.pack_documents(documents)
    assert len(blocks) == 3
    assert sum(len(data) for _, data in blocks) < 0.6 * len(documents)
    assert np.array_equal(slice_codec.unpack_documents(blocks), documents)


@pytest.mark.parametrize("documents", [[3, 3], [4, 2], [-1, 2]])
def test_repeated_unsorted_or_negative_documents_cannot_be_written(documents: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        slice_codec.pack_documents(np.array(documents, dtype=np.int32))


@settings(max_examples=30)
@given(st.integers(0, 500), st.integers())
def test_a_permutation_holds_every_number_once_and_follows_its_key(count: int, key: int) -> None:
    order = permutation(count, "key", key)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, permutation(count, "key", key))


def test_permutations_are_the_same_on_every_machine_for_ever() -> None:
    assert permutation(10, "documents", 1234, "v1").tolist() == [2, 9, 1, 4, 3, 0, 5, 7, 8, 6]
    assert uniforms(2, "x", 1).tolist() == [0.5955528093311055, 0.7169568252662556]
    assert permutation(1000, 1).tolist() != permutation(1000, 2).tolist()


def test_an_index_is_read_like_megatron_reads_it(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = make_random_dataset(tmp_path / "d", [3, 1, 4, 1, 5])
    assert document_lengths(prefix).tolist() == IndexedDataset(str(prefix)).sequence_lengths.tolist()


def rewrite(path: Path, position: int, data: bytes) -> None:
    """Overwrite bytes of a file in place."""
    content = bytearray(path.read_bytes())
    content[position : position + len(data)] = data
    path.write_bytes(content)


def test_bad_indexed_datasets_are_named_as_such(tmp_path: Path) -> None:
    prefix = make_random_dataset(tmp_path / "d", [3, 1, 4, 1, 5])
    idx, whole = tmp_path / "d.idx", (tmp_path / "d.idx").read_bytes()
    cases = [
        (lambda: rewrite(idx, 0, b"NOTMAGIC"), "not an index of a Megatron"),
        (lambda: rewrite(idx, 9, struct.pack("<Q", 2)), "version 2"),
        (lambda: rewrite(idx, 18, struct.pack("<Q", 10**9)), "its header names"),
        (lambda: rewrite(idx, 34, struct.pack("<i", -3)), "negative length"),
        (lambda: rewrite(idx, 34, struct.pack("<i", 9)), "do not belong together"),
        (lambda: idx.write_bytes(whole[:-1]), "its header names"),
        (lambda: idx.write_bytes(whole[:20]), "truncated"),
        (lambda: idx.unlink(), r"d\.idx: no such file"),
    ]
    for damage, message in cases:
        idx.write_bytes(whole)
        damage()
        with pytest.raises(UserError, match=message):
            document_lengths(prefix)


def test_documents_of_several_sequences_are_refused(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.uint16)
    builder.add_document(torch.arange(6), [2, 4])
    builder.finalize(str(tmp_path / "d.idx"))
    with pytest.raises(UserError, match="documents of several sequences"):
        document_lengths(tmp_path / "d")


def test_empty_documents_do_no_harm(tmp_path: Path) -> None:
    prefix = make_indexed_dataset(tmp_path / "d", [[1, 2], [], [3]])
    assert document_lengths(prefix).tolist() == [2, 0, 1]


def test_the_fingerprint_of_a_dataset_does_not_depend_on_its_place(tmp_path: Path) -> None:
    one = make_random_dataset(tmp_path / "one", [3, 1, 4])
    other = make_random_dataset(tmp_path / "deep/er/other", [3, 1, 4])
    assert fingerprint_source(one) == fingerprint_source(other)
