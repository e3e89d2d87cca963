"""Read documents in chunks from JSON lines (plain, gzip, zstandard), Parquet and standard input; refuse other files."""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_lrpath.data.preprocess.parquet_pages import PageError, longest_dictionary
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import named_twice

STDIN = "-"
CHUNK_BYTES = 1 << 20
READ_BYTES = 1 << 18
ZSTD_PIECE = 512  # bytes read at a time: unpacked 16 MiB at most, at any ratio
ZSTD_WINDOW = 1 << 27  # bytes that a frame may refer to, as in the command zstd
PARQUET_ROWS = 1024  # maximum number in a chunk
PARQUET_BATCH = 64  # rows that are unpacked at a time, fewer if a dictionary has long values
DOCUMENT_BYTES = (
    1 << 28
)  # maximum of a line or row: a longer one is not a document, and takes the memory of many
GZIP_MAGIC, ZSTD_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a frame that pzstd and others put before the data
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """Some complete documents of one file.

    `first` is the number of the first line or row (from 1), `index` counts the preceding documents over
    all files. `lines` has raw JSON lines; `rows` has one list of values per JSON key instead (Parquet).
    `position` is the progress in bytes of the files on disk, over all files.
    """

    name: str
    first: int
    index: int
    count: int
    position: int
    lines: bytes = b""
    rows: list[list[Any]] | None = None


def expand_inputs(patterns: Sequence[str], where: str = "--input") -> list[str]:
    """Return the file names of `where`: each a file, a glob pattern (sorted) or `-`.

    Raises:
        UserError: a name or pattern that matches no file, or two that match one file.
    """
    names: list[str] = []
    for pattern in patterns:
        if pattern == STDIN or os.path.isfile(pattern):
            names.append(pattern)
            continue
        found = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
        if not found:
            raise UserError(f"{where} {pattern}: no such file, and no file matches it as a pattern")
        names += found
    if twice := named_twice(names):
        again = f"{twice[1]} is" if twice[0] == twice[1] else f"{' and '.join(twice)} are one file,"
        raise UserError(f"{where}: {again} named twice; its documents would be there twice")
    return names


def total_bytes(names: Sequence[str]) -> int | None:
    """Return the size of all inputs on disk in bytes; None if standard input is among them."""
    if any(not os.path.isfile(name) for name in names):
        return None
    return sum(os.path.getsize(name) for name in names)


def read_chunks(names: Sequence[str], keys: Sequence[str]) -> Iterator[Chunk]:
    """Yield all documents of the inputs in order, in chunks of about a megabyte or of one longer document.

    Raises:
        UserError: a file cannot be read or its compressed data is truncated.
    """
    index = position = 0
    for name in names:
        chunk = None
        for chunk in read_file(name, keys, index, position):
            yield chunk
        if chunk is not None:
            index = chunk.index + chunk.count
        position += os.path.getsize(name) if os.path.isfile(name) else 0


def read_file(name: str, keys: Sequence[str], index: int, position: int) -> Iterator[Chunk]:
    """Yield the documents of one file; its kind is detected from its first bytes, not from its name."""
    try:
        with sys.stdin.buffer if name == STDIN else Path(name).open("rb") as raw:
            head = raw.peek(4)[:4] if isinstance(raw, io.BufferedReader) else b""
            if head == PARQUET_MAGIC:
                yield from _read_parquet(name, raw, keys, index, position)
            else:
                yield from _read_lines(name, raw, head, index, position)
    except (OSError, EOFError, zlib.error) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{name}: cannot be read to its end: {reason}") from None


def _read_lines(name: str, raw: BinaryIO, head: bytes, index: int, position: int) -> Iterator[Chunk]:
    counter = _Counter(raw)
    if head == ZSTD_MAGIC or SKIPPABLE.match(head):
        blocks = _unpack_zstd(name, counter)
    else:
        packed = head[:2] == GZIP_MAGIC
        stream = gzip.GzipFile(fileobj=cast(BinaryIO, counter), mode="rb") if packed else counter
        blocks = iter(partial(stream.read, READ_BYTES), b"")
    first = 1
    for lines in _whole_lines(name, _of_text(name, blocks)):
        count = lines.count(b"\n") + (not lines.endswith(b"\n"))
        if first == 1 and lines.startswith(UTF8_BOM):
            lines = lines[len(UTF8_BOM) :]
        yield Chunk(name, first, index, count, position + counter.bytes, lines=lines)
        first += count
        index += count


def _of_text(name: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the blocks after a check of the first; raise UserError if it is not JSON lines."""
    for number, block in enumerate(blocks):
        if number == 0:
            refuse_foreign(name, block)
        yield block


class _Counter:
    """Forwards reads and counts their bytes, for the progress bar."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self.bytes += len(data)
        return data


def _unpack_zstd(name: str, stream: _Counter) -> Iterator[bytes]:
    """Yield all frames of a zstandard file; a truncated one is an error, which the library's stream hides."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{name}: zstandard needs its package: pip install zstandard") from None
    frame = None
    try:
        while data := stream.read(READ_BYTES):
            for start in range(0, len(data), ZSTD_PIECE):
                piece = data[start : start + ZSTD_PIECE]
                while piece:
                    frame = frame or zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
                    if block := frame.decompress(piece):
                        yield block
                    piece = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        if "too much memory" in str(error):
            raise UserError(
                f"{name}: was packed with a window of more than {ZSTD_WINDOW >> 20} MiB (zstd --long). Unpack it on "
                f"the way: zstd -dc --long=31 {name} | … --input -"
            ) from None
        raise UserError(f"{name}: cannot be read to its end: {error}") from None
    if frame is not None:
        raise UserError(f"{name}: cannot be read to its end: the last zstandard frame breaks off")


def _whole_lines(name: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Join blocks and split them after the last line end, so that each piece has complete lines.

    Raises:
        UserError: a line exceeds the maximum length of a document.
    """
    held: list[bytes] = []
    size = lines = 0
    for block in blocks:
        held.append(block)
        size += len(block)
        if size >= CHUNK_BYTES and (end := block.rfind(b"\n") + 1):
            whole = b"".join([*held[:-1], block[:end]])
            lines += whole.count(b"\n")
            yield whole
            held = [block[end:]] if end < len(block) else []
            size = len(block) - end
        elif size > DOCUMENT_BYTES:
            raise too_long(name, "line", lines + sum(one.count(b"\n") for one in held) + 1)
    if size:
        yield b"".join(held)


def too_long(name: str, kind: str, number: int) -> UserError:
    """Return the error for a document that would take the memory of many."""
    return UserError(
        f"{name}: {kind} {number:,} is longer than {DOCUMENT_BYTES >> 20} MiB, the most that one document may have. "
        "Split it, or take it out."
    )


def _read_parquet(
    name: str, raw: BinaryIO, keys: Sequence[str], index: int, position: int
) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{name}: Parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(raw, buffer_size=CHUNK_BYTES, pre_buffer=False)
        present = table.schema_arrow.names
        if missing := [key for key in keys if key not in present]:
            raise UserError(f"{name}: no column {missing[0]!r}; it has {', '.join(present)}")
        if double := [key for key in keys if present.count(key) > 1]:
            raise UserError(f"{name}: several columns are named {double[0]!r}; rename all but one")
        first, size, total = 1, os.path.getsize(name), max(table.metadata.num_rows, 1)
        for rows in _joined(_pieces(name, table, raw, keys)):
            count = len(rows[0])
            done = position + size * (first + count - 1) // total
            yield Chunk(name, first, index, count, done, rows=rows)
            first += count
            index += count
    except (pyarrow.ArrowException, PageError) as error:
        raise UserError(f"{name}: cannot be read as Parquet: {error}") from None


def _pieces(
    name: str, table: Any, raw: BinaryIO, keys: Sequence[str]
) -> Iterator[tuple[int, list[list[Any]]]]:
    """Yield (bytes, values by key) of a few rows of a Parquet file: about a chunk, or one longer row."""
    at_once = _rows_at_once(longest_dictionary(table.metadata, raw, keys))
    first = 1
    for batch in table.iter_batches(batch_size=at_once, columns=list(keys), use_threads=False):
        columns = [_undecoded(batch.column(key)) for key in keys]
        held = sum(column.nbytes for column in columns)
        step = max(1, min(batch.num_rows, batch.num_rows * CHUNK_BYTES // max(held, 1)))
        for start in range(0, batch.num_rows, step):
            few = [column.slice(start, step) for column in columns]
            size = sum(column.nbytes for column in few)
            if step == 1 and size > DOCUMENT_BYTES:
                raise too_long(name, "row", first + start)
            yield size, [column.to_pylist() for column in few]
        first += batch.num_rows


def _joined(pieces: Iterator[tuple[int, list[list[Any]]]]) -> Iterator[list[list[Any]]]:
    """Combine pieces to chunks."""
    held: list[list[Any]] = []
    size = 0
    for added, rows in pieces:
        held = [old + new for old, new in zip(held, rows, strict=True)] if held else rows
        size += added
        if size >= CHUNK_BYTES or len(held[0]) >= PARQUET_ROWS:
            yield held
            held, size = [], 0
    if held:
        yield held


def _rows_at_once(longest: int) -> int:
    """Return the number of rows to unpack at a time if each may have a dictionary's longest value (bytes)."""
    return max(1, min(PARQUET_BATCH, PARQUET_BATCH * CHUNK_BYTES // max(longest, 1)))


def _undecoded(column: Any) -> Any:
    """Return strings as bytes, so that a string that is not UTF-8 is rejected alone, without its whole chunk."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type):
        return column.cast(pyarrow.binary())
    return column.cast(pyarrow.large_binary()) if pyarrow.types.is_large_string(column.type) else column


UNPACK = "unpack it on the way: {} {{name}} | … --input -"
CONVERT = "convert it to JSON lines or Parquet"
RECODE = "recode it: iconv -f {} -t UTF-8 {{name}} | … --input -"
FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"BZh", "packed with bzip2", UNPACK.format("bzip2 -dc")),
    (b"\xfd7zXZ\x00", "packed with xz", UNPACK.format("xz -dc")),
    (b"\x04\x22\x4d\x18", "packed with lz4", UNPACK.format("lz4 -dc")),
    (b"\xff\x06\x00\x00sNaPpY", "packed with snappy", "unpack it first"),
    (b"PK\x03\x04", "a zip archive", UNPACK.format("unzip -p")),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK.format("7z x -so")),
    (b"\x1f\x8b", "packed twice", "unpack it once"),
    (b"\x28\xb5\x2f\xfd", "packed twice", "unpack it once"),
    (b"PAR1", "Parquet, packed once more", "unpack it first: Parquet is read as it is"),
    (b"ARROW1", "an Arrow file", CONVERT),
    (b"\xff\xff\xff\xff", "an Arrow stream", CONVERT),
    (b"FEA1", "a Feather file", CONVERT),
    (b"ORC", "an ORC file", CONVERT),
    (b"Obj\x01", "an Avro file", CONVERT),
    (b"SQLite format 3\x00", "an SQLite database", CONVERT),
    (b"\x89HDF", "an HDF5 file", CONVERT),
    (b"%PDF", "a PDF document", CONVERT),
    (b"\xff\xfe\x00\x00", "UTF-32 text", RECODE.format("UTF-32")),
    (b"\x00\x00\xfe\xff", "UTF-32 text", RECODE.format("UTF-32")),
    (b"\xff\xfe", "UTF-16 text", RECODE.format("UTF-16")),
    (b"\xfe\xff", "UTF-16 text", RECODE.format("UTF-16")),
    (b"{\x00", "UTF-16 text", RECODE.format("UTF-16LE")),
    (b"\x00{", "UTF-16 text", RECODE.format("UTF-16BE")),
)
NONE_USABLE = (
    'A line must be a JSON object with the text of a document under the key "text" (--json-keys names another key). '
    "`lrpath docs data` shows how to convert plain text"
)
TAR_MAGIC, TAR_PLACE = b"ustar", 257


def refuse_foreign(name: str, beginning: bytes) -> None:
    """Raise an error if the first bytes of an unpacked file are not JSON lines.

    Raises:
        UserError: the file has another format; the message gives its kind, and what to do.
    """
    kind = kind_of(beginning)
    if kind is not None:
        what, advice = kind
        raise UserError(f"{name}: is {what}, where JSON lines are read; {advice.format(name=name)}")


def kind_of(beginning: bytes) -> tuple[str, str] | None:
    """Return the kind of a file that is not JSON lines, and what to do with it."""
    for magic, what, advice in FORMATS:
        if beginning.startswith(magic):
            return what, advice
    if beginning[TAR_PLACE : TAR_PLACE + len(TAR_MAGIC)] == TAR_MAGIC:
        return "a tar archive", UNPACK.format("tar -xOf")
    if beginning.removeprefix(UTF8_BOM).lstrip()[:1] == b"[":
        return "a JSON array", "take it apart: jq -c '.[]' {name} | … --input -"
    return None


def none_usable(names: Sequence[str], first: str, advice: str = NONE_USABLE) -> str:
    """Return the message about inputs in which no document is usable; `first` is the first rejected one."""
    return f"no usable documents in {', '.join(names)}" + (
        f"; the first is\n  {first}\n{advice}" if first else ""
    )
