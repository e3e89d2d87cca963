"""Read Megatron's indexed datasets without Megatron: header, document lengths, fingerprint, and all checks of
a pair.
"""

from __future__ import annotations

import glob
import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_lrpath.errors import UserError

type Lengths = np.ndarray[tuple[int], np.dtype[np.int32]]

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
HEADER_BYTES = 34  # magic 9, version 8, type code 1, number of sequences 8, number of document bounds 8
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")
DTYPE_CODES = {name: code for code, name in enumerate(DTYPES, start=1)}
BLOCK = 1 << 20  # entries read at a time
SAMPLED_BLOCKS, SAMPLED_BYTES = 64, 4096


@dataclass(frozen=True)
class IndexHeader:
    """The header of an `.idx`, checked against the size of the file."""

    prefix: str
    dtype: str
    sequences: int
    documents: int
    modes: bool

    @property
    def itemsize(self) -> int:
        """Bytes per token."""
        return np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class PairReport:
    """The figures of a valid pair: tokens, minimum and maximum of the lengths (tokens) and of the ids."""

    header: IndexHeader
    tokens: int
    shortest: int
    longest: int
    empty_documents: int
    smallest_id: int
    largest_id: int


def strip_ending(path: str) -> str:
    """Return the prefix of a pair, given the prefix or one of its files."""
    return path[:-4] if path.endswith((".bin", ".idx")) else path


def read_header(prefix: str) -> IndexHeader:
    """Read and check the header of `PREFIX.idx`; its numbers never determine an allocation.

    Raises:
        UserError: the file is missing, foreign, truncated or has another size than its header gives.
    """
    path = f"{prefix}.idx"
    for name in (path, f"{prefix}.bin"):
        if not os.path.isfile(name):
            near = sorted(glob.glob(f"{glob.escape(prefix)}_*_document.idx"))
            hint = f" (did you mean {near[0][:-4]!r}?)" if near else ""
            raise UserError(f"{name}: no such file; a dataset is a .bin and an .idx of one name{hint}")
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        head = stream.read(HEADER_BYTES)
    if head[:9] != INDEX_MAGIC:
        raise UserError(f"{path}: {_foreign(prefix, head)}")
    if len(head) < HEADER_BYTES:
        raise UserError(f"{path}: truncated: {size} bytes do not even hold the header of {HEADER_BYTES}")
    version, code, sequences, bounds = struct.unpack("<QBQQ", head[9:])
    if version != INDEX_VERSION:
        raise UserError(f"{path}: version {version} of the format; only version {INDEX_VERSION} is known")
    if not 1 <= code <= len(DTYPES):
        raise UserError(f"{path}: unknown type code {code}; 1 to 8 are known")
    expected = HEADER_BYTES + sequences * 12 + bounds * 8
    if size not in (expected, expected + sequences):
        verb = "truncated" if size < expected else "too long"
        raise UserError(
            f"{path}: {verb}: its header names {sequences:,} sequences and {bounds - 1:,} documents, which "
            f"take {expected:,} bytes, but the file has {size:,}; build the dataset again or copy it again"
        )
    if bounds < 1:
        raise UserError(f"{path}: no document bounds, not even the first")
    return IndexHeader(prefix, DTYPES[code - 1], sequences, bounds - 1, size != expected)


def _foreign(prefix: str, head: bytes) -> str:
    """Return why a file without the magic is not an index of this format."""
    with open(f"{prefix}.bin", "rb") as stream:
        if stream.read(9) == INDEX_MAGIC:
            return "swapped: the .bin holds the index, this file holds the tokens; rename the two"
    if head[:8] == b"TNTIDX\x00\x00":
        return "an index of the old lazy or cached format (TNTIDX); build the dataset again"
    if not head:
        return "empty: truncated, or never written"
    return "not an index of a Megatron dataset: it does not begin with MMIDIDX"


def map_lengths(header: IndexHeader) -> Lengths:
    """Return tokens per sequence, int32 (sequences,), mapped from the file."""
    return _mapped(header, "int32", header.sequences, 0)


def map_bounds(header: IndexHeader) -> npt.NDArray[np.int64]:
    """Return the first sequence of each document, then the number of sequences: int64 (documents + 1,),
    mapped.
    """
    return _mapped(header, "int64", header.documents + 1, 12 * header.sequences)


def _mapped(header: IndexHeader, dtype: str, count: int, skip: int) -> Any:
    if not count:
        return np.zeros(0, dtype=dtype)
    path = f"{header.prefix}.idx"
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES + skip, shape=(count,))


def blocks(array: Any, overlap: int = 0) -> Iterator[tuple[int, Any]]:
    """Yield a mapped array in pieces of `BLOCK` entries (plus `overlap`), each with its position."""
    for start in range(0, len(array), BLOCK):
        yield start, array[start : start + BLOCK + overlap]


def check_pair(prefix: str, vocab_size: int | None = None, ids: bool = True) -> PairReport:
    """Verify the pair at `prefix` in bounded memory and return its figures.

    With `ids` every token is read, and with `vocab_size` each must be in [0, vocab_size).

    Raises:
        UserError: with the file, the entry and the problem.
    """
    header = read_header(prefix)
    tokens, shortest, longest = _check_lengths(header)
    _check_bin_size(header, tokens)
    _check_bounds(header)
    empty = _empty_documents(header, tokens)
    smallest, largest = _check_ids(header, tokens, vocab_size) if ids and tokens else (0, 0)
    return PairReport(header, tokens, shortest, longest, empty, smallest, largest)


def document_lengths(prefix: Path | str) -> Lengths:
    """Return tokens of each document, mapped from the file: drawing requires one sequence per document.

    Documents are counted by sequences, as in Megatron's GPT datasets; empty ones without a sequence do not
    count.

    Raises:
        UserError: a file is missing, foreign, of the wrong size, or a document has several sequences.
    """
    header = read_header(str(prefix))
    if not header.sequences:
        raise UserError(f"{prefix}.idx: holds no document")
    if header.sequences >= 2**31:
        raise UserError(
            f"{prefix}.idx: {header.sequences:,} documents, and Megatron counts to 2**31 - 1; split it"
        )
    most = _check_bounds(header)
    if header.modes:
        raise UserError(
            f"{prefix}.idx: is multimodal (it has a mode for each of its {header.sequences:,} sequences); versions are "
            "drawn from text alone, as preprocess_data.py writes it"
        )
    if most > 1:
        raise UserError(
            f"{prefix}.idx: has documents of several sequences ({header.sequences:,} sequences, "
            f"{header.documents:,} documents); versions are drawn from text with one sequence per "
            f"document, as preprocess_data.py writes it without sentence splitting"
        )
    lengths = map_lengths(header)
    tokens = 0
    for start, block in blocks(lengths):
        _refuse_negative(header, start, block)
        tokens += int(block.sum(dtype=np.int64))
    _check_bin_size(header, tokens)
    return lengths


def fingerprint_source(prefix: Path | str) -> str:
    """Return a fingerprint (hex SHA-256) of the indexed dataset at `prefix`, independent of its path.

    It covers the size of PREFIX.bin, all of PREFIX.idx (so the number and length of every document), and
    64 blocks of 4 KiB spread evenly over PREFIX.bin, including its first and last bytes. Tokens changed in
    place between those blocks are not detected; that is the price of a result in seconds for terabytes.

    Raises:
        UserError: a file is missing.
    """
    digest = hashlib.sha256()
    try:
        with open(f"{prefix}.bin", "rb") as stream:
            digest.update(struct.pack("<Q", os.fstat(stream.fileno()).st_size))
            for block in spread_blocks(stream, SAMPLED_BLOCKS, SAMPLED_BYTES):
                digest.update(block)
        with open(f"{prefix}.idx", "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    except FileNotFoundError as error:
        raise UserError(f"{prefix}: {error.filename} is missing") from None
    return digest.hexdigest()


def spread_blocks(stream: BinaryIO, count: int, length: int) -> Iterator[bytes]:
    """Yield `count` blocks of `length` bytes spread evenly over a file, including its first and last bytes."""
    last = max(stream.seek(0, os.SEEK_END) - length, 0)
    for number in range(count):
        stream.seek(last * number // (count - 1))
        yield stream.read(length)


def _refuse_negative(header: IndexHeader, start: int, lengths: Lengths) -> None:
    """Raise for a negative length; `start` is the number of the first sequence."""
    if (low := int(lengths.min())) < 0:
        at = start + int(lengths.argmin())
        raise UserError(f"{header.prefix}.idx: damaged: sequence {at} has negative length {low}")


def _check_lengths(header: IndexHeader) -> tuple[int, int, int]:
    """Return (tokens, shortest, longest); each offset must equal the end of the sequences before it."""
    path = f"{header.prefix}.idx"
    offsets = _mapped(header, "int64", header.sequences, 4 * header.sequences)  # bytes in the .bin
    tokens, shortest, longest = 0, 1 << 31, 0
    for start, lengths in blocks(map_lengths(header)):
        _refuse_negative(header, start, lengths)
        ends = tokens + np.cumsum(lengths, dtype=np.int64)
        starts = np.concatenate([np.array([tokens], dtype=np.int64), ends[:-1]]) * header.itemsize
        wrong = np.flatnonzero(starts != offsets[start : start + BLOCK])
        if wrong.size:
            at = int(wrong[0])
            raise UserError(
                f"{path}: damaged: sequence {start + at} should begin at byte {int(starts[at]):,} of the "
                f".bin, its offset gives {int(offsets[start + at]):,}"
            )
        tokens = int(ends[-1])
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
    return tokens, shortest if header.sequences else 0, longest


def _check_bin_size(header: IndexHeader, tokens: int) -> None:
    path, expected = f"{header.prefix}.bin", tokens * header.itemsize
    if (size := os.path.getsize(path)) != expected:
        verb = "truncated" if size < expected else "too long, or of another dataset"
        raise UserError(
            f"{path}: {verb}: the index describes {tokens:,} tokens of {header.itemsize} bytes, "
            f"{expected:,} bytes, but the file has {size:,}; the two files do not belong together or one is "
            f"not whole, build the dataset again"
        )


def _check_bounds(header: IndexHeader) -> int:
    """Return the maximum number of sequences in a document; bounds must ascend from 0 to `sequences`."""
    path, bounds = f"{header.prefix}.idx", map_bounds(header)
    most = 0
    if int(bounds[0]) != 0 or int(bounds[-1]) != header.sequences:
        raise UserError(
            f"{path}: damaged: documents run from sequence {int(bounds[0])} to {int(bounds[-1])}, "
            f"not from 0 to {header.sequences}"
        )
    for start, block in blocks(bounds, overlap=1):
        steps = np.diff(block)
        if steps.size and int(steps.min()) < 0:
            raise UserError(f"{path}: damaged: document {start + int(steps.argmin())} ends before it begins")
        most = max(most, int(steps.max(initial=0)))
    return most


def _empty_documents(header: IndexHeader, tokens: int) -> int:
    """Return the number of documents without a token. Offsets and bounds have been checked."""
    offsets, empty = _mapped(header, "int64", header.sequences, 4 * header.sequences), 0
    for _, bounds in blocks(map_bounds(header), overlap=1):
        inside = int(np.searchsorted(bounds, header.sequences))  # after it: the end of the last sequence
        begins = np.concatenate(
            [offsets[bounds[:inside]], np.full(len(bounds) - inside, tokens * header.itemsize)]
        )
        empty += int((np.diff(begins) == 0).sum())
    return empty


def _check_ids(header: IndexHeader, tokens: int, vocab_size: int | None) -> tuple[int, int]:
    """Return (smallest, largest) token id."""
    path = f"{header.prefix}.bin"
    data = np.memmap(path, dtype=header.dtype, mode="r", shape=(tokens,))
    smallest, largest = 1 << 62, -(1 << 62)
    for start, block in blocks(data):
        low, high = int(block.min()), int(block.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            at = int(block.argmin() if low < 0 else block.argmax())
            raise UserError(
                f"{path}: token {start + at:,} has id {low if low < 0 else high}, outside the vocabulary "
                f"of {vocab_size:,} entries; another tokenizer made this dataset, or it is damaged"
                if vocab_size is not None
                else f"{path}: token {start + at:,} has the negative id {low}; the file is damaged"
            )
        smallest, largest = min(smallest, low), max(largest, high)
    return smallest, largest
