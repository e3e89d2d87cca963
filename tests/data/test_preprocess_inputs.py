"""Every input format gives the same pair; unreadable input is refused with its name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_lrpath.data.indexed import read_header
from megatron_lrpath.data.preprocess import parquet_pages, readers
from megatron_lrpath.data.preprocess.parquet_pages import PageError, longest_dictionary
from megatron_lrpath.data.preprocess.readers import read_chunks
from tests.golden.make import texts
from tests.support.preprocess_fixtures import (
    GOLDEN,
    NULL,
    SP,
    command,
    documents,
    environment,
    pair,
    preprocess,
    write_lines,
)

TEXTS = texts()
LINES = (GOLDEN / "texts.jsonl").read_bytes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Return the pair of the golden texts."""
    folder = tmp_path_factory.mktemp("expected")
    assert preprocess(GOLDEN / "texts.jsonl", folder / "out", *SP) == 0
    return pair(folder / "out_text_document")


def packed(kind: str, folder: Path) -> Path:
    """Write the golden texts in another format, under a name without its suffix; return the path."""
    path = folder / "input"
    half = len(LINES) // 2
    if kind == "gzip":
        path.write_bytes(gzip.compress(LINES))
    elif kind == "gzip members":
        path.write_bytes(gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]))
    elif kind == "zstd":
        path.write_bytes(zstandard.compress(LINES))
    elif kind == "zstd frames":
        path.write_bytes(zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:]))
    elif kind == "pzstd":
        skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
        halves = (skipped + zstandard.compress(part) for part in (LINES[:half], LINES[half:]))
        path.write_bytes(b"".join(halves))
    elif kind == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + LINES)
    elif kind == "windows":
        path.write_bytes(LINES.replace(b"\n", b"\r\n"))
    elif kind == "no end of line":
        path.write_bytes(LINES.rstrip(b"\n"))
    else:
        types = {"parquet": pyarrow.string(), "parquet large": pyarrow.large_string()}
        column = pyarrow.array(TEXTS, types.get(kind, pyarrow.binary()) if kind != "parquet words" else None)
        column = column.dictionary_encode() if kind == "parquet words" else column
        table = pyarrow.table({"id": range(len(TEXTS)), "text": column})
        pyarrow.parquet.write_table(table, path, row_group_size=10)
    return path


KINDS = [
    "gzip", "gzip members", "zstd", "zstd frames", "pzstd", "bom", "windows", "no end of line",
    "parquet", "parquet large", "parquet bytes", "parquet words",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_pair(kind: str, tmp_path: Path, expected: tuple[bytes, bytes]) -> None:
    assert preprocess(packed(kind, tmp_path), tmp_path / "out", *SP) == 0
    assert pair(tmp_path / "out_text_document") == expected


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_standard_input(compress: object, tmp_path: Path, expected: tuple[bytes, bytes]) -> None:
    line = command("preprocess_data", "--input", "-", *SP, "--output-prefix", tmp_path / "out")
    data = compress(LINES)  # type: ignore[operator]
    answer = subprocess.run(line, input=data, env=environment(), capture_output=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert pair(tmp_path / "out_text_document") == expected


def test_several_inputs_and_patterns_in_order(tmp_path: Path) -> None:
    for number in (3, 1, 2):
        write_lines(tmp_path / f"part{number}.jsonl", [f"{number} 0", f"{number} 1"])
    last = write_lines(tmp_path / "last.jsonl", ["9"])
    assert preprocess([tmp_path / "part*.jsonl", last], tmp_path / "out", *NULL) == 0
    found = documents(tmp_path / "out_text_document")
    assert found == [[1, 0], [1, 1], [2, 0], [2, 1], [3, 0], [3, 1], [9]]


@pytest.mark.parametrize("again", ["in.jsonl", "./in.jsonl", "link.jsonl", "i*.jsonl"])
def test_an_input_that_is_named_twice_is_refused(
    again: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["1 2"])
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    assert preprocess([source, f"{tmp_path}/{again}"], tmp_path / "out", *NULL) == 2
    assert "named twice" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_no_chunk_is_cut_inside_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    monkeypatch.setattr(readers, "READ_BYTES", 64)
    source = write_lines(tmp_path / "in.jsonl", ["x" * (i * 37 % 900) for i in range(200)])
    chunks = list(read_chunks([str(source), str(source)], ["text"]))
    assert b"".join(chunk.lines for chunk in chunks) == source.read_bytes() * 2
    assert all(chunk.lines.endswith(b"\n") for chunk in chunks)
    assert [chunk.first for chunk in chunks if chunk.index in (0, 200)] == [1, 1]
    assert sum(chunk.count for chunk in chunks) == 400
    assert all(len(chunk.lines) < 300 + 64 + 1000 for chunk in chunks)
    assert chunks[-1].position == 2 * source.stat().st_size


@given(st.lists(st.binary(max_size=12), max_size=8))
def test_lines_are_put_together_from_any_blocks(blocks: list[bytes]) -> None:
    size, readers.CHUNK_BYTES = readers.CHUNK_BYTES, 5
    try:
        pieces = list(readers._whole_lines("x", iter([block for block in blocks if block])))
    finally:
        readers.CHUNK_BYTES = size
    assert b"".join(pieces) == b"".join(blocks)
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])


def refusal(capsys: pytest.CaptureFixture[str], source: Path | str, prefix: Path, *more: str) -> str:
    """Return the tool's message when it refuses with status 2 and writes nothing."""
    assert preprocess(source, prefix, *more) == 2
    assert not list(prefix.parent.glob(f"{prefix.name}*document*"))
    answer = capsys.readouterr().err
    assert "Traceback" not in answer
    return answer


@pytest.mark.parametrize("kind", ["gzip", "zstd", "parquet"])
def test_a_truncated_file_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed(kind, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refusal(capsys, path, tmp_path / "out", *SP, "--max-rejects", "1000000")


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_damaged_file_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed(kind, tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path.write_bytes(data)
    answer = refusal(capsys, path, tmp_path / "out", *SP)
    assert "error" in answer


def test_missing_inputs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing.jsonl: no such file" in refusal(
        capsys, tmp_path / "nothing.jsonl", tmp_path / "out", *NULL
    )
    assert "no file matches" in refusal(capsys, tmp_path / "*.jsonl", tmp_path / "out", *NULL)
    empty = write_lines(tmp_path / "empty", [])
    assert "no documents" in refusal(capsys, empty, tmp_path / "out", *NULL)


def test_a_missing_column_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed("parquet", tmp_path)
    answer = refusal(capsys, path, tmp_path / "out", *SP, "--json-keys", "body")
    assert "no column 'body'; it has id, text" in answer


FOREIGN: dict[str, tuple[bytes, str]] = {
    "bzip2": (bz2.compress(LINES), "bzip2 -dc"),
    "xz": (lzma.compress(LINES), "xz -dc"),
    "zip": (b"PK\x03\x04" + bytes(40), "unzip -p"),
    "arrow": (b"ARROW1\0\0" + bytes(40), "an Arrow file"),
    "utf-16": (('{"text": "1"}\n' * 9).encode("utf-16"), "iconv -f UTF-16"),
    "utf-16 without its mark": (
        ('{"text": "1"}\n' * 9).encode("utf-16-le"),
        "iconv -f UTF-16LE",
    ),
    "array": (b'\n [{"text": "1"},\n{"text": "2"}]\n', "jq -c"),
    "array with a mark": (b'\xef\xbb\xbf[{"text": "1"}]\n', "jq -c"),
    "packed array": (gzip.compress(b'[{"text": "1"}]\n'), "jq -c"),
    "packed twice": (gzip.compress(gzip.compress(LINES)), "packed twice"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_format_stops_at_its_first_bytes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, advice = FOREIGN[kind]
    path = tmp_path / "input"
    path.write_bytes(data)
    assert advice in refusal(capsys, path, tmp_path / "out", *NULL, "--max-rejects", "1000000")


def test_two_columns_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "input"
    table = pyarrow.Table.from_arrays([pyarrow.array(["1"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, path)
    assert "several columns are named 'text'" in refusal(capsys, path, tmp_path / "out", *NULL)


def test_a_frame_with_a_larger_window_is_refused_with_a_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.zst"
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(stream.compress(LINES) + stream.flush())
    assert f"zstd -dc --long=31 {path}" in refusal(capsys, path, tmp_path / "out", *SP)


def test_a_file_of_another_kind_does_not_pass_for_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "photo"
    path.write_bytes(bytes(range(256)) * 20)
    assert "rejected" in refusal(capsys, path, tmp_path / "out", *NULL)


def test_duplicate_keys_and_escapes_as_python_reads_them(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "1", "text": "2 3"}\n{"x": NaN, "text": "\\u0034"}\n')
    assert preprocess(source, tmp_path / "out", *NULL) == 0
    assert documents(tmp_path / "out_text_document") == [[2, 3], [4]]
    assert json.loads('"\\u0034"') == "4"


def test_zstandard_is_unpacked_in_bounded_pieces(tmp_path: Path) -> None:
    """A few kilobytes that expand to a hundred megabytes do not become one block in memory."""
    path = tmp_path / "small.zst"
    path.write_bytes(zstandard.compress((b'{"text": "a"}' + b" " * 4000 + b"\n") * 25_000))
    assert path.stat().st_size < 200_000
    largest = total = 0
    for chunk in readers.read_file(str(path), ["text"], 0, 0):
        largest, total = max(largest, len(chunk.lines or b"")), total + chunk.count
    assert total == 25_000
    assert largest < 48 * 2**20


@pytest.mark.parametrize("kind", ["plain", "gzip", "zstd", "parquet"])
def test_a_document_longer_than_any_is_refused_before_it_is_in_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readers, "DOCUMENT_BYTES", 20 << 20)  # zstandard is unpacked by up to 16 MiB
    texts = ["1", "2", "3" * (50 << 20), "4"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path = tmp_path / "in"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd")
    else:
        path.write_bytes({"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}[kind](lines))
    answer = refusal(capsys, path, tmp_path / "out", *NULL)
    assert f"{'row' if kind == 'parquet' else 'line'} 3 is longer than 20 MiB" in answer


def test_a_page_that_would_be_unpacked_whole_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has a few kilobytes on the disk. Columns that are not read do not count."""
    monkeypatch.setattr(parquet_pages, "PAGE_BYTES", 8 << 20)
    path = tmp_path / "one_page.parquet"
    texts = pyarrow.array(["x" * (1 << 20)] * 9)
    small = pyarrow.array(["1"] * 9)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": small, "more": texts}), path, compression="zstd", use_dictionary=False
    )
    assert path.stat().st_size < 20_000
    assert preprocess(path, tmp_path / "small", *NULL) == 0
    answer = refusal(capsys, path, tmp_path / "out", *NULL, "--json-keys", "text", "more")
    assert re.search(r"row group 1 has a page of 9,437,\d{3} bytes in the column more", answer)
    assert "write_batch_size=10" in answer


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
def test_every_page_of_a_parquet_file_is_found_by_its_header(
    tmp_path: Path, version: str, compression: str
) -> None:
    path = tmp_path / "in.parquet"
    words = [f"word {number % 7}" for number in range(3000)]
    table = pyarrow.table({"text": words, "a": [{"b": [n, n], "c.d": "x"} for n in range(3000)]})
    pyarrow.parquet.write_table(
        table, path, row_group_size=1000, compression=compression, data_page_size=500, data_page_version=version,
        write_batch_size=50, write_page_checksum=True,
    )  # fmt: skip
    content = bytearray(path.read_bytes())
    metadata = pyarrow.parquet.ParquetFile(path).metadata
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            begin, length = parquet_pages._begin(column), column.total_compressed_size
            found = list(parquet_pages.pages(io.BytesIO(content), begin, length))
            headers = column.total_uncompressed_size - sum(page.unpacked for page in found)
            assert headers == length - sum(page.packed for page in found), (
                "no byte of the column is left over"
            )
            assert {page.kind for page in found} >= {3 if version == "2.0" else 0}
    generator = random.Random(1)
    for _ in range(300):  # with damage anywhere, pages are found or refused
        damaged = bytearray(content[begin : begin + length])
        damaged[generator.randrange(60)] = generator.randrange(256)
        with suppress(PageError):
            list(parquet_pages.pages(io.BytesIO(damaged), 0, length))


@pytest.mark.parametrize(("megabytes", "at_once"), [(0, 64), (1, 63), (16, 3), (100, 1)])
def test_rows_that_share_one_long_value_are_unpacked_a_few_at_a_time(
    tmp_path: Path, megabytes: int, at_once: int
) -> None:
    path = tmp_path / "few_bytes.parquet"
    text = "x" * max(1, megabytes << 20)
    table = pyarrow.table({"text": pyarrow.array([0] * 200).dictionary_encode()})
    words = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 200), pyarrow.array([text]))
    pyarrow.parquet.write_table(table.set_column(0, "text", words), path, compression="zstd")
    assert path.stat().st_size < 100_000
    with path.open("rb") as raw:
        longest = longest_dictionary(pyarrow.parquet.ParquetFile(raw).metadata, raw, ["text"])
        assert readers._rows_at_once(longest) == at_once
    if megabytes == 1:
        chunks = list(readers.read_file(str(path), ["text"], 0, 0))
        assert sum(chunk.count for chunk in chunks) == 200
        assert max(chunk.count for chunk in chunks) <= 2


@pytest.mark.parametrize(
    ("size", "dtype"), [(65_499, "uint16"), (65_500, "int32"), (65_536, "int32"), (65_537, "int32")]
)
def test_ids_of_two_and_of_four_bytes(size: int, dtype: str, tmp_path: Path) -> None:
    ids = [0, 32_767, 32_768, size - 2, size - 1]
    source = write_lines(tmp_path / "in.jsonl", [" ".join(map(str, ids)), "1"])
    options = ("--append-eod", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(size))
    assert preprocess(source, tmp_path / "out", *options) == 0
    made = tmp_path / "out_text_document"
    assert read_header(str(made)).dtype == dtype
    assert documents(made) == [[*ids, size - 1], [1, size - 1]]
