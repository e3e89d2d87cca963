"""A branch whose batches hold other slices' samples, too: which positions they take, and whose samples they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_lrpath.data.draw_random import random_words
from megatron_lrpath.data.index_cache import Arrays, Entry
from megatron_lrpath.data.slice import Slice
from megatron_lrpath.data.slice_check import require_mix_samples
from megatron_lrpath.data.versioned import (
    Location,
    SourceDataset,
    VersionedDataset,
    VersionSamples,
    cache_of,
    open_versions,
)
from megatron_lrpath.plan.mix import Mix, quotas

FORMAT = 1  # part of the key: raise it when the arrays change their meaning


class MixedDataset(torch.utils.data.Dataset):
    """The main path's samples at their own positions, but for those that the mix takes.

    `taken["source"][p]` says whose sample stands at position `first` + p: 0 the main path's own, j the j-th
    slice's, which is number `taken["sample"][p]` of that slice. Items are those of `VersionedDataset`.
    """

    index_split = Split.train

    def __init__(
        self, main: VersionedDataset, first: int, taken: Arrays, parts: Sequence[VersionSamples]
    ) -> None:
        self._main = main
        self._first = first
        self._taken = taken
        self._parts = parts

    def __len__(self) -> int:
        """Positions, those before the branch point included."""
        return len(self._main)

    def __getitem__(self, sample: int | None) -> dict[str, torch.Tensor]:
        """The sample at this position of the run (None: one that fills up a batch, masked out)."""
        found = None if sample is None else self._place(sample)
        if found is None:
            return self._main[sample]
        _, dataset, number = found
        return dataset[number]

    def version_of(self, sample: int) -> str:
        """The version, or the slice of the mix, that the sample at this position comes from."""
        found = self._place(sample)
        return self._main.version_of(sample) if found is None else found[0]

    def locate(self, sample: int) -> list[Location]:
        """The documents that the sample at this position is made of, in their order."""
        found = self._place(sample)
        if found is None:
            return self._main.locate(sample)
        name, dataset, number = found
        return dataset.locate(number, name)

    def _place(self, sample: int) -> tuple[str, SourceDataset, int] | None:
        """(slice, source, number in it) where the mix has the position, else None."""
        position = sample - self._first
        if not 0 <= position < len(self._taken["source"]):
            return None
        source = int(self._taken["source"][position])
        if not source:
            return None
        part = self._parts[source - 1]
        return part.name, *part.place(int(self._taken["sample"][position]))


def mix_entry(mix: Mix, batch: int, steps: int, version: str) -> Entry:
    """The cache entry of the positions that a mix takes in a branch of `steps` steps of `batch` samples."""
    shares = [str(share) for share in mix.shares]
    key = ["mix", FORMAT, shares, mix.seed, batch, steps, version]
    return Entry(key, ("source", "sample"), lambda: places(mix, batch, steps, version))


def places(mix: Mix, batch: int, steps: int, version: str) -> Arrays:
    """Whose sample stands at each position: `source` (uint16, 0: the main path) and `sample` (uint32).

    Every step holds as many samples of a slice as `quotas` says, at places that (seed, version) decide, and a
    slice's samples come in its own order, each once.
    """
    table = np.zeros((steps, batch), dtype=np.uint16)
    order = np.argsort(
        random_words(steps * batch, "mix", mix.seed, version).reshape(steps, batch), axis=1, kind="stable"
    )
    for step, counts in enumerate(quotas(mix.shares, batch, steps)):
        numbers = np.repeat(np.arange(1, len(counts) + 1, dtype=np.uint16), counts)
        table[step, order[step, : len(numbers)]] = numbers
    source = table.reshape(-1)
    sample = np.zeros(len(source), dtype=np.uint32)
    for number in range(1, len(mix.parts) + 1):
        here = source == number
        sample[here] = np.arange(np.count_nonzero(here), dtype=np.uint32)
    return {"source": source, "sample": sample}


def build_mixed(
    main: VersionedDataset,
    slices: Sequence[Slice],
    mix: Mix,
    branch: tuple[str, int, int, int],
    config: GPTDatasetConfig,
) -> MixedDataset:
    """The branch's samples; `branch` is (version, first position, batch in samples, steps).

    `slices` are the mix's, in its order. Every rank must call it (one builds the index, the others wait).

    Raises:
        UserError: a slice yields fewer samples than its share needs.
    """
    version, first, batch, steps = branch
    needed = require_mix_samples(slices, mix, batch, steps, config.sequence_length)
    parts, _ = open_versions(slices, needed, config, mix.seed, [])
    [taken] = cache_of(slices[0], config).prepare([mix_entry(mix, batch, steps, version)])
    return MixedDataset(main, first, taken, parts)
