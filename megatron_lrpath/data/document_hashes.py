"""A 64-bit hash of each document's tokens, `PREFIX.hashes`, to find the same text in another dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_lrpath.data.indexed import map_lengths, read_header
from megatron_lrpath.errors import UserError, cause
from megatron_lrpath.files import atomic_open
from megatron_lrpath.runs.checkpoints import sum_file

type Hashes = npt.NDArray[np.uint64]

ENDING = ".hashes"
KEY = "hashes"  # the key in a dataset's record, which has the checksum of the file
DTYPE = np.dtype("<u8")
BLOCK = 1 << 22  # hashes read at a time
TOKENS = 1 << 24  # tokens read at a time


def hash_documents(tokens: npt.NDArray[Any], lengths: npt.NDArray[Any], eod: int | None) -> Hashes:
    """Return the XXH3-64 of each document's ids as 32-bit numbers, uint64 (documents,).

    An end-of-document token at the end of a document does not count, so that the same text has the same hash with
    and without it. The type of the ids does not count either.

    Args:
        tokens: the ids of all documents, concatenated.
        lengths: the number of tokens of each document.
        eod: the id of the end-of-document token, None if the tokenizer has none.
    """
    ids = np.ascontiguousarray(tokens, dtype="<u4")
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    if eod is not None and len(ids):
        ends = ends - ((lengths > 0) & (ids[np.maximum(ends - 1, 0)] == eod))
    data = memoryview(ids).cast("B") if len(ids) else memoryview(b"")
    digest = xxhash.xxh3_64_intdigest
    found = (
        digest(data[4 * start : 4 * end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    )
    return np.fromiter(found, dtype=np.uint64, count=len(lengths))


def dataset_hashes(prefix: Path | str, eod: int | None) -> Iterator[Hashes]:
    """Read all of a finished dataset's `.bin` and yield its hashes, block by block."""
    header = read_header(str(prefix))
    lengths = map_lengths(header)
    with open(f"{prefix}.bin", "rb") as stream:
        start = 0
        while start < len(lengths):
            block = lengths[start : start + BLOCK]
            count = max(1, int(np.searchsorted(np.cumsum(block, dtype=np.int64), TOKENS, side="right")))
            block = block[:count]
            tokens = np.fromfile(stream, dtype=header.dtype, count=int(block.sum(dtype=np.int64)))
            yield hash_documents(tokens, block, eod)
            start += count


@dataclass(frozen=True)
class HashFile:
    """The file with the hashes of a dataset's documents, as described in the dataset's record.

    `eod`: the end-of-document token, which does not count (None: none); `xxh3_128`: the file's checksum.
    """

    path: Path
    documents: int
    eod: int | None
    xxh3_128: str

    def verify(self) -> None:
        """Compare the whole file with its checksum.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            found = sum_file(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({cause(error)}); {_remedy(self.path)}") from None
        if (found.bytes, found.xxh3_128) != (self.documents * DTYPE.itemsize, self.xxh3_128):
            raise UserError(f"{self.path}: does not hold the hashes that were written; {_remedy(self.path)}")

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, Hashes]]:
        """Yield the hashes, `size` at a time, each block with the number of its first document."""
        with self.path.open("rb") as stream:
            for start in range(0, self.documents, size):
                yield start, np.fromfile(stream, dtype=DTYPE, count=size)


def hashes_path(record: Path) -> Path:
    """Return the path of the hashes in the folder of a dataset's record."""
    return record.with_name(record.name.removesuffix(".tokens.json") + ENDING)


def describe(path: Path, eod: int | None) -> dict[str, Any]:
    """Return the entry of a dataset's record for its file of hashes."""
    found = sum_file(path)
    return {"documents": found.bytes // DTYPE.itemsize, "eod": eod, "xxh3_128": found.xxh3_128}


def check_form(described: Any) -> Mapping[str, Any]:
    """Return the same object if its form is valid. Raise ValueError otherwise."""
    if not isinstance(described, dict):
        raise ValueError(f"`{KEY}` is no object")
    count, eod, digest = (described.get(name) for name in ("documents", "eod", "xxh3_128"))
    if type(count) is not int or count < 0 or (eod is not None and type(eod) is not int):
        raise ValueError(f"`{KEY}` lacks a number")
    if not isinstance(digest, str):
        raise ValueError(f"`{KEY}` lacks a checksum")
    return described


def write_hashes(path: Path, prefix: Path | str, eod: int | None) -> None:
    """Hash all documents of a finished dataset into `path`, atomically."""
    with atomic_open(path) as stream:
        for block in dataset_hashes(prefix, eod):
            stream.write(block.astype(DTYPE).tobytes())


def _remedy(path: Path) -> str:
    return (
        f"remove it, and hash the dataset again: tools/check_dataset.py {path.with_suffix('')} --tokenizer-model "
        "MODEL --record"
    )
