"""Arrays that are built once, by one process, and mapped by all: the indices of versioned datasets.

An entry's name is the hash of all it is made from, and what is built is decided by that alone. So it does not
matter who builds it, or how many do at once: every file appears whole (temporary file, rename), and whoever
replaces one replaces it with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_open

type Arrays = dict[str, np.ndarray]

PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Entry:
    """Some named arrays: `build` makes them, from nothing but what `key` (JSON-able) says."""

    key: object
    names: tuple[str, ...]
    build: Callable[[], Arrays]

    @property
    def identity(self) -> str:
        """The entry's name in the cache."""
        return hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:32]


class IndexCache:
    """A folder of entries; where it cannot be written, a private folder for temporary files stands in."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def load(self, entry: Entry) -> Arrays | None:
        """The entry's arrays, mapped read-only, or None where they are not all there and whole."""
        for folder in (self.folder, private_folder()):
            try:
                return {name: _map(_file(folder, entry, name)) for name in entry.names}
            except (OSError, ValueError, EOFError):
                continue
        return None

    def build(self, entry: Entry) -> None:
        """Build the entry and write it.

        Raises:
            UserError: neither the cache's folder nor the private one can be written to.
        """
        arrays = entry.build()
        try:
            _write(self.folder, entry, arrays)
        except OSError as refusal:
            folder = private_folder(create=True)
            try:
                _write(folder, entry, arrays)
            except OSError as error:
                raise UserError(
                    f"cannot write the index of the data, neither to {self.folder} ({refusal.strerror}) "
                    f"nor to {folder} ({error.strerror}); make room, or name another folder "
                    f"with --data-cache-path"
                ) from None

    def prepare(self, entries: Iterable[Entry]) -> list[Arrays]:
        """All entries' arrays, building what is missing; under torch.distributed every rank must call this.

        Rank 0 builds while the others wait. Where its files cannot be seen (a disk that the nodes do not
        share), one process of each node builds them once more.
        """
        wanted = list(entries)
        if _rank() == 0:
            self._complete(wanted)
        _barrier()
        if local_rank() == 0:
            self._complete(wanted)
        _barrier()
        return [self._load_surely(entry) for entry in wanted]

    def _complete(self, entries: list[Entry]) -> None:
        """Build the entries that are missing."""
        for entry in entries:
            if self.load(entry) is None:
                self.build(entry)

    def _load_surely(self, entry: Entry) -> Arrays:
        """Load what somebody has built. A network disk may show it late; in the end it is built here."""
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
    """This user's folder for indices among the temporary files, made on request.

    Raises:
        UserError: the folder was made by somebody else, whose files are not to be trusted.
    """
    folder = Path(tempfile.gettempdir()) / f"lrpath-index-{os.getuid()}"
    if create:
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
        raise UserError(f"{folder}: belongs to somebody else; set TMPDIR to a folder of your own")
    return folder


def _file(folder: Path, entry: Entry, name: str) -> Path:
    """The file of one array."""
    return folder / f"{entry.identity}-{name}.npy"


def _write(folder: Path, entry: Entry, arrays: Arrays) -> None:
    """Write all arrays of an entry, each file atomically."""
    for name in entry.names:
        with atomic_open(_file(folder, entry, name)) as stream:
            np.lib.format.write_array(stream, arrays[name], allow_pickle=False)


def _map(path: Path) -> np.ndarray:
    """Map one array; raises OSError or ValueError where it is missing, cut short or of Python objects."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _distributed() -> bool:
    """Whether this is one of several ranks; asks torch only where somebody else has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    """The global rank, 0 without torch.distributed."""
    if not _distributed():
        return 0
    import torch

    return torch.distributed.get_rank()


def local_rank() -> int:
    """The rank within this node; unknown counts as 0, which only costs a second build."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) if _distributed() else 0


def _barrier() -> None:
    """Wait for all ranks."""
    if _distributed():
        import torch

        torch.distributed.barrier()
