"""A damaged, truncated, swapped or foreign dataset is reported; a whole one is measured and merged."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lrpath.data import indexed
from megatron_lrpath.data.indexed import check_pair
from megatron_lrpath.data.preprocess.writer import PairWriter, optimal_dtype, publish_all
from megatron_lrpath.data.slice import available_samples
from megatron_lrpath.data.token_sample import BLOCKS, IDS_IN_BLOCK, Samples
from megatron_lrpath.data.versioned_index import source_entry
from megatron_lrpath.errors import UserError
from tests.support.data_fixtures import make_lengths_dataset, make_slice
from tests.support.preprocess_fixtures import GOLDEN, call, documents, pair
from tools import check_dataset
from tools import merge_datasets as merge_tool
from tools.merge_datasets import merge_datasets

HEADER = 34


def make(prefix: Path, lengths: list[list[int]], dtype: str = "uint16", first: int = 0) -> Path:
    """Write a dataset of documents given as the lengths of their sequences; ids count up from `first`."""
    flat = [length for document in lengths for length in document]
    writer = PairWriter(prefix, np.dtype(dtype))
    tokens = np.arange(first, first + sum(flat)) % 60_000
    writer.append(
        tokens, np.array(flat, dtype=np.int32), np.array([len(one) for one in lengths], dtype=np.int32)
    )
    publish_all([writer], prefix.parent / ".publishing")
    return prefix


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return make(tmp_path / "data", [[3], [2, 4], [], [1]])


def poke(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def complaint(prefix: Path, **options: int) -> str:
    with pytest.raises(UserError) as error:
        check_pair(str(prefix), **options)  # type: ignore[arg-type]
    return str(error.value)


def test_a_whole_dataset_and_its_figures(whole: Path) -> None:
    report = check_pair(str(whole), vocab_size=11)
    assert (report.header.documents, report.header.sequences, report.tokens) == (4, 4, 10)
    assert (report.shortest, report.longest, report.empty_documents) == (1, 4, 1)
    assert (report.smallest_id, report.largest_id) == (0, 9)
    assert documents(whole) == [[0, 1, 2], [3, 4, 5, 6, 7, 8], [], [9]]


def test_the_golden_pairs_of_megatron_lm_pass() -> None:
    for index in sorted((GOLDEN / "pairs").glob("*.idx")):
        check_pair(str(index.with_suffix("")), vocab_size=70_000)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 50), max_size=4), max_size=30),
    dtype=st.sampled_from(["uint16", "int32"]),
    block=st.integers(1, 9),
)
def test_what_is_written_is_what_megatron_reads(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], dtype: str, block: int
) -> None:
    """The files follow the format's description, for blocks of any size."""
    indexed.BLOCK = block
    try:
        prefix = make(tmp_path_factory.mktemp("p") / "d", lengths, dtype)
        check_pair(str(prefix))
    finally:
        indexed.BLOCK = 1 << 20
    flat = [length for document in lengths for length in document]
    size = np.dtype(dtype).itemsize
    index = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8 if dtype == "uint16" else 4, len(flat), len(lengths) + 1)
    index += np.array(flat, dtype="<i4").tobytes()
    index += np.array([size * sum(flat[:i]) for i in range(len(flat))], dtype="<i8").tobytes()
    bounds = [sum(len(one) for one in lengths[:i]) for i in range(len(lengths) + 1)]
    assert pair(prefix)[1] == index + np.array(bounds, dtype="<i8").tobytes()
    assert pair(prefix)[0] == np.arange(sum(flat), dtype=dtype).tobytes()


def test_megatron_reads_it(whole: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dataset = indexed_dataset.IndexedDataset(str(whole))
    assert [sequence.tolist() for sequence in dataset[:4]] == [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9]]
    assert dataset.document_indices.tolist() == [0, 1, 3, 3, 4]


def test_megatrons_rule_for_the_type() -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for size in (1, 65_499, 65_500, 65_536, 100_000):
        assert optimal_dtype(size) == indexed_dataset.DType.optimal_dtype(size)


@pytest.mark.parametrize("end", [0, 5, 9, 20, 33, 34, 40, 100])
def test_a_truncated_index(whole: Path, end: int) -> None:
    path = Path(f"{whole}.idx")
    path.write_bytes(path.read_bytes()[:end])
    assert "truncated" in complaint(whole) or "not an index" in complaint(whole)


def test_a_truncated_or_grown_token_file(whole: Path) -> None:
    path = Path(f"{whole}.bin")
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert "data.bin: truncated: the index describes 10 tokens" in complaint(whole)
    path.write_bytes(data + b"\0\0")
    assert "data.bin: too long, or of another dataset" in complaint(whole)


def test_swapped_files(whole: Path) -> None:
    index, tokens = Path(f"{whole}.idx"), Path(f"{whole}.bin")
    spare = index.read_bytes()
    index.write_bytes(tokens.read_bytes())
    tokens.write_bytes(spare)
    assert "swapped" in complaint(whole)


def test_an_index_of_another_dataset(whole: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", [[7], [8]])
    shutil.copy(f"{other}.idx", f"{whole}.idx")
    assert "of another dataset" in complaint(whole) or "truncated" in complaint(whole)


def test_a_prefix_without_its_key(tmp_path: Path) -> None:
    make(tmp_path / "web_text_document", [[4]])
    with pytest.raises(UserError, match=r"web\.idx: no such file.*did you mean '.*/web_text_document'"):
        check_pair(str(tmp_path / "web"))


def test_foreign_files(whole: Path) -> None:
    index = Path(f"{whole}.idx")
    for data in (b"PAR1" + bytes(200), b'{"text": "a"}\n' * 9):
        index.write_bytes(data)
        assert "not an index of a Megatron dataset" in complaint(whole)
    index.write_bytes(b"TNTIDX\x00\x00" + bytes(90))
    assert "old" in complaint(whole)
    index.write_bytes(b"")
    assert "empty" in complaint(whole)


def test_missing_files(whole: Path) -> None:
    Path(f"{whole}.bin").unlink()
    assert "data.bin: no such file" in complaint(whole)
    assert "no such file" in complaint(whole.parent / "nothing")


def test_wrong_version_and_type(whole: Path) -> None:
    poke(Path(f"{whole}.idx"), 17, bytes([9]))
    assert "type code 9" in complaint(whole)
    poke(Path(f"{whole}.idx"), 9, struct.pack("<Q", 2))
    assert "version 2" in complaint(whole)


@pytest.mark.parametrize("count", [5, 1 << 30, 1 << 60, (1 << 64) - 1])
def test_huge_numbers_in_a_header_allocate_nothing(whole: Path, count: int) -> None:
    poke(Path(f"{whole}.idx"), 18, struct.pack("<Q", count))
    tracemalloc.start()
    assert "truncated" in complaint(whole)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_damage_inside_the_index(whole: Path) -> None:
    path = Path(f"{whole}.idx")
    good = path.read_bytes()
    for offset, data, word in [
        (HEADER + 4, struct.pack("<i", -1), "sequence 1 has negative length -1"),
        (HEADER + 4, struct.pack("<i", 3), "sequence 2 should begin at byte 12"),
        (HEADER + 16 + 8, struct.pack("<q", 7), "sequence 1 should begin at byte 6"),
        (HEADER + 48, struct.pack("<q", 1), "documents run from sequence 1"),
        (HEADER + 48 + 32, struct.pack("<q", 5), "documents run from sequence 0 to 5"),
        (HEADER + 48 + 8, struct.pack("<q", 4), "ends before it begins"),
    ]:
        path.write_bytes(good)
        poke(path, offset, data)
        assert word in complaint(whole)


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    prefix = make(tmp_path / "d", [[5], [5]], "int32")
    check_pair(str(prefix), vocab_size=10)
    assert "token 9 has id 9, outside the vocabulary of 9" in complaint(prefix, vocab_size=9)
    poke(Path(f"{prefix}.bin"), 8, struct.pack("<i", -4))
    assert "negative id -4" in complaint(prefix)


def test_the_checker_as_a_command(whole: Path) -> None:
    answer = call("check_dataset", whole, "--json", "--vocab-size", 10)
    assert answer.returncode == 0
    assert json.loads(answer.stdout)[0]["tokens"] == 10
    poke(Path(f"{whole}.bin"), 0, b"\xff\xff")
    answer = call("check_dataset", whole, "--vocab-size", 10)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ")
    assert "Traceback" not in answer.stderr


def test_the_checker_goes_through_all(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_dataset.main([str(tmp_path / "none"), f"{whole}.idx"]) == 2
    said = capsys.readouterr()
    assert "none.idx: no such file" in said.err
    assert f"{whole}: whole; " in said.out


def test_merged_datasets_hold_all_documents_in_order(tmp_path: Path) -> None:
    for number, lengths in enumerate([[[3], [2, 1]], [[], [4]], [[1]]]):
        make(tmp_path / "parts" / f"p{number}", lengths, first=100 * number)
    assert (
        merge_tool.main(["--input", str(tmp_path / "parts"), "--output-prefix", str(tmp_path / "all")]) == 0
    )
    found = [documents(tmp_path / "parts" / f"p{number}") for number in range(3)]
    assert documents(tmp_path / "all") == [one for part in found for one in part]
    assert check_pair(str(tmp_path / "all")).header.sequences == 5


def test_merging_does_as_megatron_does(tmp_path: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    parts = [make(tmp_path / f"p{i}", [[i + 1], [2, 3], []]) for i in range(3)]
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for part in parts:
        builder.add_index(str(part))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge_datasets([str(part) for part in parts], str(tmp_path / "ours"))
    assert pair(tmp_path / "ours") == pair(tmp_path / "theirs")


def test_what_cannot_be_merged_is_refused(whole: Path, tmp_path: Path) -> None:
    wide = make(tmp_path / "wide", [[1]], "int32")
    out = str(tmp_path / "out")
    for inputs, word in [
        ([whole, wide], "int32"),
        ([whole, whole], "named twice"),
        ([whole, f"{whole.parent}/../{whole.parent.name}/{whole.name}"], "named twice"),
        ([whole, tmp_path / "none"], "no such file"),
        ([out, whole], "one of the datasets"),
    ]:
        with pytest.raises(UserError, match=word):
            merge_datasets([str(name) for name in inputs], out)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no indexed dataset"):
        merge_datasets([str(empty)], out)
    (empty / "half.idx").touch()
    with pytest.raises(UserError, match=r"half\.bin: missing"):
        merge_datasets([str(empty)], out)
    merge_datasets([str(whole)], out)
    with pytest.raises(UserError, match="--overwrite"):
        merge_datasets([str(whole)], out)
    merge_datasets([str(whole)], out, overwrite=True)
    assert pair(out) == pair(whole)
    assert not list(tmp_path.glob("out*partial"))


def test_documents_without_a_token_are_counted(tmp_path: Path) -> None:
    prefix = make(tmp_path / "data", [[20], [0], [40], [], [0, 0], [0, 3], [3, 0], []])
    assert check_pair(str(prefix)).empty_documents == 4
    assert check_pair(str(make(tmp_path / "none", [[], [0]]))).empty_documents == 2


def test_a_multimodal_dataset_is_named_as_such(whole: Path) -> None:
    with open(f"{whole}.idx", "ab") as index:
        index.write(bytes(indexed.read_header(str(whole)).sequences))
    with pytest.raises(UserError, match=r"is multimodal"):
        indexed.document_lengths(whole)


def test_datasets_beyond_two_billion_tokens(tmp_path: Path) -> None:
    """Pointers, counts, slices and samples are 64 bits wide throughout; the file is sparse."""
    long = 2**31 - 1
    lengths = [long, 7, long, 100, 9]
    prefix = make_lengths_dataset(tmp_path / "data", lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    with open(f"{prefix}.bin", "r+b") as tokens:
        for number, start in enumerate(starts.tolist()):
            tokens.seek(2 * (start + lengths[number] - 3))
            tokens.write(np.array([1, 2, 3 + number], dtype=np.uint16).tobytes())
    assert check_pair(str(prefix), ids=False).tokens == sum(lengths) > 2**32
    one = make_slice(tmp_path / "v1.slice", [(prefix, [0, 2, 3], "web"), (prefix, [1, 4], "web")])
    assert one.tokens == sum(lengths)
    length = 2**24
    assert available_samples(one, length) == (2 * long + 100 - 1) // length
    sample = Samples().of(prefix)
    assert (sample.ids, sample.largest) == (BLOCKS * IDS_IN_BLOCK, 7)
    entry = source_entry(one.sources[0], length, 1, None).build()
    samples = entry["samples"]
    assert samples.tolist()[128] == [1, 1], "sample 128 begins one token into the second document"
    assert len(samples) == 258
    assert written_offsets(prefix, tmp_path / "again") == [2 * start for start in starts.tolist()]


def written_offsets(prefix: Path, target: Path) -> list[int]:
    """Return the offsets (bytes) that the writer gives a dataset of the same lengths."""
    header = indexed.read_header(str(prefix))
    writer = PairWriter(target, np.dtype("uint16"))
    writer.append_index([np.array(indexed.map_lengths(header))], [np.ones(header.sequences, dtype=np.int32)])
    writer.seal()
    count = header.sequences
    offsets = np.fromfile(
        f"{target}.idx.partial", dtype="<i8", count=count, offset=indexed.HEADER_BYTES + 4 * count
    )
    writer.discard()
    return [int(offset) for offset in offsets]
