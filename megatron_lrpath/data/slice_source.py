"""What slices need of an indexed dataset: the length of each document, and a fingerprint of the whole."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lrpath.data.indexed_check import IndexHeader, blocks, map_bounds, map_lengths, read_header
from megatron_lrpath.errors import UserError

type Lengths = np.ndarray[tuple[int], np.dtype[np.int32]]

SAMPLED_BLOCKS = 64
SAMPLED_BYTES = 4096


@dataclass(frozen=True)
class SourceIndex:
    """The index of one indexed dataset: `lengths` holds the tokens of each document, mapped from the file."""

    prefix: Path
    lengths: Lengths

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)


def open_source(prefix: Path | str) -> SourceIndex:
    """Open the index of the dataset at `prefix`; its lengths stay on disk until they are used.

    Documents are counted as Megatron's GPT datasets do, by sequences: what has no tokens at all is none.

    Raises:
        UserError: a file is missing, foreign, of the wrong size, or a document is made of several sequences.
    """
    header = read_header(str(prefix))
    if not header.sequences:
        raise UserError(f"{prefix}.idx: holds no document")
    if header.sequences >= 2**31:
        raise UserError(
            f"{prefix}.idx: {header.sequences:,} documents, and Megatron counts to 2**31 - 1; split it"
        )
    _check_documents(header)
    lengths = map_lengths(header)
    _check_tokens(header, lengths)
    return SourceIndex(Path(prefix), lengths)


def _check_documents(header: IndexHeader) -> None:
    """Refuse documents of several sequences, and datasets of several kinds of tokens."""
    bounds = map_bounds(header)
    fine = not header.modes and int(bounds[0]) == 0 and int(bounds[-1]) == header.sequences
    for _, block in blocks(bounds, overlap=1):
        steps = np.diff(block)
        fine = fine and bool(((steps == 0) | (steps == 1)).all())
    if not fine:
        raise UserError(
            f"{header.prefix}.idx: has documents of several sequences ({header.sequences:,} sequences, "
            f"{header.documents:,} documents); versions are drawn from text with one sequence per "
            f"document, as preprocess_data.py writes it without sentence splitting"
        )


def _check_tokens(header: IndexHeader, lengths: Lengths) -> None:
    """Refuse negative lengths, and a token file that is not as long as the index says."""
    tokens = 0
    for _, block in blocks(lengths):
        if block.min() < 0:
            raise UserError(f"{header.prefix}.idx: a document has a negative length; the file is damaged")
        tokens += int(block.sum(dtype=np.int64))
    size, expected = Path(f"{header.prefix}.bin").stat().st_size, tokens * header.itemsize
    if size != expected:
        raise UserError(
            f"{header.prefix}.bin: {size:,} bytes, but the index describes {expected:,}; the two files do "
            f"not belong together or one is not whole, build the dataset again"
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
        with open(f"{prefix}.bin", "rb") as stream:
            size = stream.seek(0, 2)
            digest.update(struct.pack("<Q", size))
            last = max(size - SAMPLED_BYTES, 0)
            for block in range(SAMPLED_BLOCKS):
                stream.seek(last * block // (SAMPLED_BLOCKS - 1))
                digest.update(stream.read(SAMPLED_BYTES))
        with open(f"{prefix}.idx", "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    except FileNotFoundError as error:
        raise UserError(f"{prefix}: {error.filename} is missing") from None
    return digest.hexdigest()
