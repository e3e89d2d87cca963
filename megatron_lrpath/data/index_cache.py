"""Cache arrays that one process builds and all map: the indices of versioned datasets.

An entry's name is the hash of its inputs, which determine its content. So it does not matter which process
builds it, or how many do so concurrently: every file is written atomically, and a process that replaces a
file writes the same bytes. A file ends with the XXH3-128 of its content; a damaged file, or one without a
checksum, is built again.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
import xxhash

from megatron_lrpath.console import warn
from megatron_lrpath.errors import UserError, cause
from megatron_lrpath.files import atomic_open
from megatron_lrpath.sealed import json_digest

type Arrays = dict[str, np.ndarray]

PATIENCE_SECONDS = 5.0
MARK = b"lrp-xxh3"  # before the checksum at the end of a file
SUM_BYTES = len(MARK) + 16
NO_ARRAY = (OSError, ValueError, EOFError, SyntaxError, TokenError, TypeError, OverflowError)
"""Errors of NumPy for a file that is missing, truncated, damaged, or has Python objects."""
CHUNK = 4 * 2**20  # bytes summed at a time


@dataclass(frozen=True)
class CacheEntry:
    """Some named arrays: `build` makes them, from the content of `key` (JSON-serializable) only."""

    key: object
    names: tuple[str, ...]
    build: Callable[[], Arrays]

    @property
    def identity(self) -> str:
        """The entry's name in the cache."""
        return json_digest(self.key)[:32]

    def file(self, folder: Path, name: str) -> Path:
        """Return the file of one array."""
        return folder / f"{self.identity}-{name}.npy"

    def write(self, folder: Path, arrays: Arrays) -> None:
        """Write all arrays, each file atomically."""
        for name in self.names:
            with atomic_open(self.file(folder, name)) as stream:
                summing = _Summing(stream)
                np.lib.format.write_array(summing, arrays[name], allow_pickle=False)
                stream.write(MARK + summing.digest.digest())

    def read(self, folder: Path, name: str) -> np.ndarray:
        """Return one array, mapped read-only, after a comparison of its file's checksum. Raise `NO_ARRAY`."""
        path = self.file(folder, name)
        _check_sum(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)


class _Summing:
    """A file for NumPy to write to, which computes the checksum of what is written."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.digest = xxhash.xxh3_128()

    def write(self, content: bytes) -> int:
        """Write, and add to the checksum."""
        self.digest.update(content)
        return self.stream.write(content)


def _check_sum(path: Path) -> None:
    """Raise ValueError if a file has no checksum or differs from it."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        left = os.fstat(stream.fileno()).st_size - SUM_BYTES
        stream.seek(max(left, 0))
        end = stream.read(SUM_BYTES)
        if left < 0 or not end.startswith(MARK):
            raise ValueError("it has no checksum")
        stream.seek(0)
        while part := stream.read(min(left, CHUNK)):
            digest.update(part)
            left -= len(part)
    if end != MARK + digest.digest():
        warn(f"{path}: the index is damaged (it is not what was written) and is built again. Check the disk.")
        raise ValueError("it is damaged")


class IndexCache:
    """A folder of entries; if it is not writable, a private temporary folder is used."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def load(self, entry: CacheEntry) -> Arrays | None:
        """Return the entry's arrays, mapped read-only; None if one is missing or damaged."""
        for folder in (self.folder, private_folder()):
            try:
                return {name: entry.read(folder, name) for name in entry.names}
            except NO_ARRAY:
                continue
        return None

    def build(self, entry: CacheEntry) -> None:
        """Build the entry and write it.

        Raises:
            UserError: neither the cache's folder nor the private one can be written to.
        """
        arrays = entry.build()
        try:
            entry.write(self.folder, arrays)
        except OSError as refusal:
            folder = private_folder(create=True)
            try:
                entry.write(folder, arrays)
            except OSError as error:
                raise UserError(
                    f"cannot write the index of the data, neither to {self.folder} ({cause(refusal)}) "
                    f"nor to {folder} ({cause(error)}); make room, or name another folder "
                    f"with --data-cache-path"
                ) from None

    def prepare(self, entries: Iterable[CacheEntry]) -> list[Arrays]:
        """Return all entries' arrays, and build missing ones; under torch.distributed every rank must call
        this.

        Rank 0 builds while the others wait. If its files are not visible (on a disk that the nodes do not
        share), one process of each node builds them again.
        """
        wanted = list(entries)
        found: dict[str, Arrays | None] = {}
        ranks = _distributed()
        for builds in (ranks is None or ranks.get_rank() == 0, local_rank() == 0):
            for entry in wanted if builds else ():
                if found.get(entry.identity) is not None:
                    continue
                if (arrays := self.load(entry)) is None:
                    self.build(entry)
                    arrays = self.load(entry)
                found[entry.identity] = arrays
            if ranks is not None:
                ranks.barrier()
        return [found.get(entry.identity) or self._load_surely(entry) for entry in wanted]

    def _load_surely(self, entry: CacheEntry) -> Arrays:
        """Load what another process has built; a network disk can show it late. Build it after a timeout."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (arrays := self.load(entry)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if arrays is None:
            self.build(entry)
            arrays = self.load(entry)
        if arrays is None:
            raise UserError(f"{self.folder}: what is written there cannot be read back; use another folder")
        return arrays


def private_folder(create: bool = False) -> Path:
    """Return this user's temporary folder for indices, created on demand.

    Raises:
        UserError: another user created the folder, whose files cannot be trusted.
    """
    folder = Path(tempfile.gettempdir()) / f"lrpath-index-{os.getuid()}"
    if create:
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
        raise UserError(f"{folder}: belongs to another user; set TMPDIR to a folder of your own")
    return folder


def _distributed() -> Any:
    """Return torch.distributed if this is one of several ranks; torch is not imported for that."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed


def local_rank() -> int:
    """Return the rank within this node; an unknown rank counts as 0, which only costs a second build."""
    ranked = _distributed() is not None
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) if ranked else 0
