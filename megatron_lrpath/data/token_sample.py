"""A bounded sample of the ids of an indexed dataset whose tokenizer is unknown."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lrpath.data.indexed import read_header
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.reading import read_json

BLOCKS, IDS_IN_BLOCK = 256, 1 << 12  # of each dataset, spread evenly: a million ids
CACHE = "token-samples.json"


@dataclass(frozen=True)
class Sample:
    """Sampled ids: their number, minimum and maximum."""

    ids: int
    smallest: int
    largest: int

    def outside(self, vocab_size: int | None) -> int | None:
        """Return an id that is not in [0, vocab_size); None if there is none."""
        if not self.ids or (self.smallest >= 0 and (vocab_size is None or self.largest < vocab_size)):
            return None
        return self.smallest if self.smallest < 0 else self.largest


class Samples:
    """Samples of datasets; cached in `folder`, if the folder around it exists and is writable, by file, size
    and time.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = None if folder is None else folder / CACHE
        self._known: dict[str, Any] = {}
        if self._path is None:
            return
        with suppress(OSError, ValueError):
            content = read_json(self._path)
            self._known = content if isinstance(content, dict) else {}

    def of(self, prefix: Path | str) -> Sample:
        """Return the sample of a dataset.

        Raises:
            UserError: the dataset is missing, or its header is damaged.
        """
        path = Path(f"{prefix}.bin").absolute()
        header = read_header(str(prefix))
        state = path.stat()
        key = f"{path} {state.st_size} {state.st_mtime_ns} {header.dtype}"
        with suppress(KeyError, TypeError, ValueError):
            return Sample(*map(int, self._known[key]))
        sample = look(path, np.dtype(header.dtype))
        self._known = {name: value for name, value in self._known.items() if not name.startswith(f"{path} ")}
        self._known[key] = [sample.ids, sample.smallest, sample.largest]
        if self._path is not None and self._path.parent.parent.is_dir():
            with suppress(OSError):
                atomic_write_json(self._path, self._known)
        return sample


def look(path: Path, dtype: np.dtype[Any]) -> Sample:
    """Return ids spread over a file of tokens, including its first and last; all of them if there are few."""
    whole = os.path.getsize(path) // dtype.itemsize
    starts, length = [0], whole
    if whole > BLOCKS * IDS_IN_BLOCK:
        length = IDS_IN_BLOCK
        starts = [(whole - length) * number // (BLOCKS - 1) for number in range(BLOCKS)]
    ids, smallest, largest = 0, 0, -1
    with path.open("rb", buffering=0) as stream:
        for start in starts:
            stream.seek(start * dtype.itemsize)
            part = np.fromfile(stream, dtype, length)
            if part.size:
                low, high = int(part.min()), int(part.max())
                smallest, largest = (min(smallest, low), max(largest, high)) if ids else (low, high)
                ids += part.size
    return Sample(ids, smallest, largest)
