"""Write `.bin`/`.idx` pairs and lists of rejects in bounded memory, under temporary names until they are
complete.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_lrpath.data import document_hashes
from megatron_lrpath.data.document_hashes import Hashes
from megatron_lrpath.data.indexed import DTYPE_CODES, INDEX_MAGIC, INDEX_VERSION
from megatron_lrpath.data.record import record_path
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_open, sweep_unfinished, sync_folder

IntArray = npt.NDArray[np.integer[Any]]

PARTIAL = ".partial"
WRITE_BLOCK = 1 << 18  # entries of the index held in memory at a time


def optimal_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of tokens by Megatron's rule: two bytes below 65,500 entries, otherwise four."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class PairWriter:
    """An indexed dataset that is being written: `PREFIX.bin.partial` grows, the index follows at the end.

    The numbers of the index are buffered in a file, so memory does not depend on the number of documents.
    Until `discard` the output is locked: a second process that writes the same dataset is refused, and
    leftovers of a killed one are overwritten.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype[Any]) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self.sequences = 0
        self.tokens = 0
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        # all stay open: the index is written from the buffer files, and the first is the lock
        self._lengths = open_locked(self.path(".lengths") + PARTIAL, self.prefix)
        self._counts = Path(self.path(".counts") + PARTIAL).open("w+b")  # noqa: SIM115
        self._bin = Path(self.path(".bin") + PARTIAL).open("wb")  # noqa: SIM115
        self._hashes: BinaryIO | None = None  # of the sequences, if they are given

    def path(self, ending: str) -> str:
        return self.prefix + ending

    def append(
        self, tokens: IntArray, lengths: IntArray, counts: IntArray, hashes: Hashes | None = None
    ) -> None:
        """Add documents.

        `tokens`: all token ids in order; `lengths`: tokens per sequence; `counts`: sequences per document; `hashes`:
        of each sequence. Raise `OverflowError` if an id does not fit the dataset's type.
        """
        if tokens.dtype != self.dtype and tokens.size:
            limits = np.iinfo(self.dtype)
            low, high = int(tokens.min()), int(tokens.max())
            if low < limits.min or high > limits.max:
                outside = low if low < limits.min else high
                raise OverflowError(f"token id {outside} does not fit {self.dtype.name}")
        tokens = tokens.astype(self.dtype, copy=False)
        self._bin.write(memoryview(np.ascontiguousarray(tokens)).cast("B"))
        self.append_index((lengths,), (counts,))
        if hashes is not None:
            self.append_hashes((hashes,))

    def append_file(self, path: str) -> None:
        """Copy the tokens of another dataset's `.bin`; `append_index` adds their lengths."""
        with open(path, "rb") as source:
            self._bin.flush()
            shutil.copyfileobj(source, self._bin, 1 << 22)

    def append_index(self, lengths: Iterable[IntArray], counts: Iterable[IntArray]) -> None:
        """Add the index of tokens that are already in the `.bin`, block by block."""
        for block in lengths:
            self._lengths.write(block.astype(np.int32).tobytes())
            self.sequences += len(block)
            self.tokens += int(block.sum(dtype=np.int64))
        for block in counts:
            self._counts.write(block.astype(np.int32).tobytes())
            self.documents += len(block)

    def append_hashes(self, blocks: Iterable[Hashes]) -> None:
        """Add the hashes of sequences, in the order of the sequences."""
        if self._hashes is None:
            self._hashes = Path(self.path(document_hashes.ENDING) + PARTIAL).open("w+b")  # noqa: SIM115
        for block in blocks:
            self._hashes.write(block.astype(document_hashes.DTYPE).tobytes())

    @property
    def has_hashes(self) -> bool:
        """Return whether hashes were added."""
        return self._hashes is not None

    def hash_blocks(self) -> Iterator[Hashes]:
        """Yield the hashes added so far, block by block."""
        if self._hashes is not None:
            self._hashes.flush()
            self._hashes.seek(0)
            while data := self._hashes.read(8 * WRITE_BLOCK):
                yield np.frombuffer(data, dtype=document_hashes.DTYPE)

    def seal(self) -> None:
        """Write the index next to the tokens and sync all files, still under their temporary names."""
        if self._hashes is not None:
            self._hashes.flush()
            os.fsync(self._hashes.fileno())
        self._lengths.flush()
        self._counts.flush()
        with open(self.path(".idx") + PARTIAL, "wb") as index:
            self._write_index(index)
            index.flush()
            os.fsync(index.fileno())
        self._bin.flush()
        os.fsync(self._bin.fileno())

    def blocks(self, spool: BinaryIO) -> Iterator[npt.NDArray[np.int32]]:
        """Yield the numbers of a buffer file from its beginning."""
        spool.flush()
        spool.seek(0)
        while data := spool.read(4 * WRITE_BLOCK):
            yield np.frombuffer(data, dtype=np.int32)

    def _write_index(self, index: BinaryIO) -> None:
        """Write Megatron's layout: header, lengths, byte offsets, first sequence of each document and the
        end.
        """
        code = DTYPE_CODES[self.dtype.name]
        header = struct.pack("<QBQQ", INDEX_VERSION, code, self.sequences, self.documents + 1)
        index.write(INDEX_MAGIC + header)
        for block in self.blocks(self._lengths):
            index.write(block.tobytes())
        offset = 0
        for block in self.blocks(self._lengths):
            ends = offset + np.cumsum(block, dtype=np.int64) * self.dtype.itemsize
            index.write((ends - block * np.int64(self.dtype.itemsize)).tobytes())
            offset = int(ends[-1])
        first = 0
        index.write(np.int64(first).tobytes())
        for block in self.blocks(self._counts):
            ends = first + np.cumsum(block, dtype=np.int64)
            index.write(ends.tobytes())
            first = int(ends[-1])

    def publish(self) -> None:
        """Rename the sealed pair: an old record and index are removed first, the new index comes last.

        So an index or a record is never next to tokens or hashes of another dataset.
        """
        folder = Path(self.prefix).parent
        record_path(self.prefix).unlink(missing_ok=True)
        sweep_unfinished(record_path(self.prefix))
        Path(self.path(document_hashes.ENDING)).unlink(missing_ok=True)
        if os.path.exists(self.path(".idx")):
            os.unlink(self.path(".idx"))
            sync_folder(folder)
        if self._hashes is not None:
            os.replace(self.path(document_hashes.ENDING) + PARTIAL, self.path(document_hashes.ENDING))
        os.replace(self.path(".bin") + PARTIAL, self.path(".bin"))
        os.replace(self.path(".idx") + PARTIAL, self.path(".idx"))
        sync_folder(folder)

    def discard(self) -> None:
        """Close and remove all temporary files; a second call has no effect."""
        if self._lengths.closed:
            return
        for ending in (".idx", ".counts", ".bin", document_hashes.ENDING, ".lengths"):
            Path(self.path(ending) + PARTIAL).unlink(missing_ok=True)
        for stream in (self._bin, self._counts, self._hashes, self._lengths):
            if stream is not None:
                stream.close()


def publish_all(
    writers: list[PairWriter], marker: Path, record: Callable[[str], object] | None = None
) -> None:
    """Publish pairs that belong together, each with the record that `record(prefix)` writes.

    The set is incomplete while `marker` exists. The locks are held until it is removed, so that the
    owner of a marker without locks is dead.
    """
    for writer in writers:
        writer.seal()
    marker.touch()
    sync_folder(marker.parent)
    for writer in writers:
        writer.publish()
        if record is not None:
            record(writer.prefix)
    marker.unlink()
    sync_folder(marker.parent)
    for writer in writers:
        writer.discard()


def refuse_existing(prefixes: list[str], marker: Path, overwrite: bool) -> None:
    """Raise `UserError` if an output exists, unless it may be replaced.

    Leftovers of a run that died while publishing (its marker still exists) are not a finished output. Call
    it with the outputs locked; an earlier call only saves the user some waiting.
    """
    if overwrite or marker.exists():
        return
    for prefix in prefixes:
        for ending in (".idx", ".bin"):
            if os.path.exists(prefix + ending):
                raise UserError(f"{prefix + ending} exists already; --overwrite replaces it")


def remove_left_overs(prefixes: list[str]) -> None:
    """Remove temporary files of killed runs; call it with the outputs locked."""
    for prefix in prefixes:
        for name in glob.glob(f"{glob.escape(prefix)}.*{PARTIAL}"):
            os.unlink(name)


def concatenate(parts: list[PairWriter], target: PairWriter) -> None:
    """Append the partial pairs `parts`, in order, to `target`."""
    for part in parts:
        part._bin.flush()
        target.append_file(part.path(".bin") + PARTIAL)
        target.append_index(part.blocks(part._lengths), part.blocks(part._counts))
        if part.has_hashes:
            target.append_hashes(part.hash_blocks())


def open_locked(path: str, output: str) -> BinaryIO:
    """Open an empty temporary file of `output` for writing, and exclude other processes while it is open.

    Raises:
        UserError: another process has it.
    """
    stream = Path(path).open("a+b")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise UserError(f"{output}: another process is writing it just now") from None
    stream.truncate(0)
    return stream


class RejectLog:
    """The list of rejected documents of one run, written next to the output if there are any.

    Until `close`, no other run can have the same output. `option` sets the limit; `none_usable` is the advice if no
    document was accepted.
    """

    def __init__(self, path: Path, limit: int, none_usable: str, option: str = "--max-rejects") -> None:
        self.path = path
        self.limit = limit
        self.none_usable = none_usable
        self.option = option
        self.count = 0
        self.first = ""
        self._aside = Path(f"{path}.partial")
        self._aside.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open_locked(str(self._aside), str(path.with_suffix("")))

    def add(self, name: str, line: int, reason: str) -> None:
        """Record one document: the input file, its line or row (from 1) and the problem."""
        entry = f"{'<stdin>' if name == '-' else name}:{line}: {reason}"
        self.first = self.first or entry
        self.count += 1
        self._stream.write((entry + "\n").encode("utf-8", "backslashreplace"))

    def publish(self) -> None:
        """Rename the list to its final name, or remove that of an earlier run if nothing was rejected."""
        self._stream.flush()
        if self.count:
            with atomic_open(self.path) as target, open(self._aside, "rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
        else:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove temporary files and release the output."""
        if self._stream.closed:
            return
        self._aside.unlink(missing_ok=True)
        self._stream.close()

    def verdict(self, documents: int) -> None:
        """Raise `UserError` if more documents were rejected than the option allows."""
        if self.count > self.limit:
            advice = (
                self.none_usable
                if not documents
                else (
                    f"Fix or remove them; or leave such documents out of the output: {self.option} {self.count}, or "
                    "more if others follow"
                )
            )
            raise UserError(
                f"{self.count:,} of {self.count + documents:,} documents were rejected, {self.option} allows "
                f"{self.limit:,}; reading stopped there, and nothing was written. They are listed in {self.path}, "
                f"the first is\n  {self.first}\n{advice}"
            )
