"""Reads what slices need of Megatron's indexed datasets: lengths of documents, and a fingerprint.

Layout of PREFIX.idx, all little-endian: magic `MMIDIDX\\0\\0`, version (u64, 1), type code (u8), number of
sequences (u64), number of document boundaries (u64), then the sequences' lengths (i32), their byte offsets in
PREFIX.bin (i64) and the document boundaries (i64).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lrpath.errors import UserError

type Lengths = np.ndarray[tuple[int], np.dtype[np.int32]]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
ITEM_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}  # Megatron's type codes: bytes per token
BLOCK = 1 << 20
SAMPLED_BLOCKS = 64
SAMPLED_BYTES = 4096


@dataclass(frozen=True)
class SourceIndex:
    """The index of one indexed dataset: `lengths` holds the tokens of each document, mapped from the file."""

    prefix: Path
    item_size: int
    lengths: Lengths
    bin_size: int

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)


def idx_path(prefix: Path | str) -> Path:
    """The index file of the indexed dataset at `prefix`."""
    return Path(f"{prefix}.idx")


def bin_path(prefix: Path | str) -> Path:
    """The token file of the indexed dataset at `prefix`."""
    return Path(f"{prefix}.bin")


def open_source(prefix: Path | str) -> SourceIndex:
    """Open the index of the dataset at `prefix`; its lengths stay on disk until they are used.

    Raises:
        UserError: a file is missing, foreign, of the wrong size, or a document is made of several sequences.
    """
    index, tokens = idx_path(prefix), bin_path(prefix)
    for path in (index, tokens):
        if not path.is_file():
            raise UserError(
                f"{prefix}: there is no {path.name} in {path.parent}; name an indexed dataset by its path "
                f"without .bin and .idx"
            )
    item_size, sequences, boundaries = _read_header(index)
    expected = HEADER.size + sequences * 12 + boundaries * 8
    if index.stat().st_size != expected:
        raise UserError(
            f"{index}: {index.stat().st_size:,} bytes, but its header describes {expected:,}; "
            f"the file is damaged or not whole, build the dataset again"
        )
    if not sequences:
        raise UserError(f"{index}: holds no document")
    _check_boundaries(index, sequences, boundaries)
    lengths = np.memmap(index, dtype="<i4", mode="r", offset=HEADER.size, shape=(sequences,))
    _check_sizes(index, tokens, lengths, item_size)
    return SourceIndex(Path(prefix), item_size, lengths, tokens.stat().st_size)


def _read_header(index: Path) -> tuple[int, int, int]:
    """(bytes per token, number of sequences, number of document boundaries) of an index file."""
    with index.open("rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(f"{index}: not an index of Megatron's (no {MAGIC[:7].decode()} at its start)")
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != 1 or code not in ITEM_SIZES:
        raise UserError(f"{index}: version {version}, type code {code}; version 1 and codes 1 to 8 are known")
    if sequences >= 2**31:
        raise UserError(
            f"{index}: {sequences:,} documents, and Megatron counts to 2**31 - 1; split the dataset"
        )
    return ITEM_SIZES[code], sequences, boundaries


def _check_boundaries(index: Path, sequences: int, boundaries: int) -> None:
    """Refuse documents of several sequences (empty documents, which have none, are all right)."""
    bounds = np.memmap(index, dtype="<i8", mode="r", offset=HEADER.size + 12 * sequences, shape=(boundaries,))
    fine = boundaries > sequences and bounds[0] == 0 and bounds[-1] == sequences
    for start in range(0, boundaries - 1, BLOCK) if fine else ():
        steps = np.diff(bounds[start : start + BLOCK + 1])
        fine = fine and bool(((steps == 0) | (steps == 1)).all())
    if not fine:
        raise UserError(
            f"{index}: has documents of several sequences ({sequences:,} sequences, {boundaries - 1:,} "
            f"documents); versions are drawn from datasets with one sequence per document, as "
            f"preprocess_data.py writes them without sentence splitting"
        )


def _check_sizes(index: Path, tokens: Path, lengths: Lengths, item_size: int) -> None:
    """Refuse a token file that is not as long as the index says, and negative lengths."""
    expected = 0
    for start in range(0, len(lengths), BLOCK):
        block = lengths[start : start + BLOCK]
        if block.min() < 0:
            raise UserError(f"{index}: a document has a negative length; the file is damaged")
        expected += int(block.sum(dtype=np.int64)) * item_size
    if tokens.stat().st_size != expected:
        raise UserError(
            f"{tokens}: {tokens.stat().st_size:,} bytes, but {index.name} describes {expected:,}; "
            f"the two do not belong together or one is not whole, build the dataset again"
        )


def fingerprint_source(prefix: Path | str) -> str:
    """A fingerprint (hex SHA-256) of the indexed dataset at `prefix`, wherever it lies.

    It covers the size of PREFIX.bin, all of PREFIX.idx (so the number and length of every document), and 64
    blocks of 4 KiB spread evenly over PREFIX.bin, its first and last bytes among them. Tokens changed in
    place between those blocks go unnoticed; that is the price of an answer in seconds for terabytes.

    Raises:
        UserError: a file is missing.
    """
    digest = hashlib.sha256()
    try:
        with bin_path(prefix).open("rb") as stream:
            size = stream.seek(0, 2)
            digest.update(struct.pack("<Q", size))
            last = max(size - SAMPLED_BYTES, 0)
            for block in range(SAMPLED_BLOCKS):
                stream.seek(last * block // (SAMPLED_BLOCKS - 1))
                digest.update(stream.read(SAMPLED_BYTES))
        with idx_path(prefix).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    except FileNotFoundError as error:
        raise UserError(f"{prefix}: {error.filename} is missing") from None
    return digest.hexdigest()
