"""The datasets that Megatron's loop reads: version slices chained, shuffled together, mixed, or for validation."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_lrpath.data.index_cache import Arrays, CacheEntry, IndexCache, private_folder
from megatron_lrpath.data.slice import Slice, SliceSource, require_mix_samples, require_samples
from megatron_lrpath.data.versioned_index import interleave_entry, mix_entry, mixture_entry, source_entry
from megatron_lrpath.plan.mix import Mix


@dataclass(frozen=True)
class Location:
    """A stretch of a document in a sample: `length` tokens of document number `document` from `offset` on."""

    version: str
    prefix: Path
    document: int
    offset: int
    length: int


class SourceDataset(GPTDataset):
    """One epoch of one source of a slice: Megatron's GPTDataset, with an index of our own.

    Megatron's own index cache does not tell two slices of one dataset apart, and is written in place. Two
    more things differ. No token id counts as padding, since slices hold none: Megatron would blank out every
    real token that shares the tokenizer's padding id. And where samples may be padded, masks are not reused:
    Megatron reuses the first sample's loss mask as it stands after that sample's padding was masked.
    """

    def __init__(self, source: SliceSource, indexed: Any, arrays: Arrays, split: Any, config: Any) -> None:
        self._arrays = arrays
        with warnings.catch_warnings():  # about padding ids, which play no part here
            warnings.simplefilter("ignore")
            super().__init__(indexed, str(source.prefix), source.documents, None, split, config)
        self._pad_token_id = -1  # the id of no token
        if split is not Split.train:
            self.masks_and_position_ids_are_cacheable = False

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._arrays["documents"], self._arrays["samples"], self._arrays["shuffle"]

    def __len__(self) -> int:
        """Samples in the epoch."""
        return len(self.shuffle_index)

    def locate(self, sample: int, version: str) -> list[Location]:
        """The stretches of documents that make up `sample`, its last label included."""
        row = int(self.shuffle_index[sample])
        (first, begin), (last, end) = self.sample_index[row : row + 2].tolist()
        end += self.config.add_extra_token_to_sequence
        places = []
        for place in range(first, last + 1):
            document = int(self.document_index[place])
            offset = begin if place == first else 0
            length = (end if place == last else int(self.dataset.sequence_lengths[document])) - offset
            if length:
                places.append(Location(version, Path(self.dataset_path), document, offset, length))
        return places


@dataclass(frozen=True)
class VersionSamples:
    """A version's samples, its sources interleaved in their shares; `order` is None for a single source."""

    name: str
    samples: int
    sources: list[SourceDataset]
    order: Arrays | None

    def place(self, sample: int) -> tuple[SourceDataset, int]:
        """The source of a sample of this version, and its number there."""
        if self.order is None:
            return self.sources[0], sample
        return self.sources[int(self.order["source"][sample])], int(self.order["sample"][sample])


class PlacedSamples(torch.utils.data.Dataset, ABC):
    """A dataset that only knows where its samples are: `_place` finds them, the source builds the tensors.

    Items are GPTDataset's: `tokens`, `labels`, `loss_mask`, `position_ids` (each [seq_length]) and, if the
    configuration asks for it, `attention_mask` ([1, seq_length, seq_length]).
    """

    def __getitem__(self, sample: int | None) -> dict[str, torch.Tensor]:
        """The sample at this position (None: one that only fills up a batch, masked out)."""
        if sample is None or self._fills(sample):
            return self._any_source()[None]
        _, dataset, number = self._place(sample)
        return dataset[number]

    def locate(self, sample: int) -> list[Location]:
        """The documents that the sample at this position is made of, in their order; none where it fills up."""
        if self._fills(sample):
            return []
        version, dataset, number = self._place(sample)
        return dataset.locate(number, version)

    @abstractmethod
    def _place(self, sample: int) -> tuple[str, SourceDataset, int]:
        """(version, source, number in it) of the sample at this position."""

    @abstractmethod
    def _any_source(self) -> SourceDataset:
        """The source whose masked-out samples fill up a batch."""

    def _fills(self, sample: int) -> bool:
        """Whether this position only fills up a batch."""
        return False


class VersionedDataset(PlacedSamples):
    """Versions one after the other, or with `order` (a permutation of all their samples) shuffled together.

    No sample occurs twice. The positions of the first `before` samples, which another training has read, are empty.
    """

    index_split = Split.train

    def __init__(
        self, versions: Sequence[VersionSamples], order: np.ndarray | None = None, before: int = 0
    ) -> None:
        self._versions = versions
        self._order = order
        self._before = before
        self._ends = list(accumulate((version.samples for version in versions), initial=before))[1:]

    def __len__(self) -> int:
        """Samples of all versions."""
        return self._ends[-1]

    def version_of(self, sample: int) -> str:
        """The name of the version that the sample at this position comes from."""
        return self._place(sample)[0]

    def _any_source(self) -> SourceDataset:
        return self._versions[0].place(0)[0]

    def _place(self, sample: int) -> tuple[str, SourceDataset, int]:
        if not self._before <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        number = sample if self._order is None else int(self._order[sample])
        which = bisect_right(self._ends, number)
        version = self._versions[which]
        return version.name, *version.place(number - self._ends[which] + version.samples)


class MixedDataset(VersionedDataset):
    """The main path's samples at their own positions, but for those that the mix takes.

    `taken["source"][p]` says whose sample stands at position `first` + p: 0 the main path's own, j the j-th
    slice's, which is number `taken["sample"][p]` of that slice.
    """

    def __init__(
        self, main: VersionedDataset, first: int, taken: Arrays, parts: Sequence[VersionSamples]
    ) -> None:
        super().__init__(main._versions, main._order, main._before)
        self._first = first
        self._taken = taken
        self._parts = parts

    def _place(self, sample: int) -> tuple[str, SourceDataset, int]:
        position = sample - self._first
        source = int(self._taken["source"][position]) if 0 <= position < len(self._taken["source"]) else 0
        if not source:
            return super()._place(sample)
        part = self._parts[source - 1]
        return part.name, *part.place(int(self._taken["sample"][position]))


class ValidationDataset(PlacedSamples):
    """All of a slice, in fixed order, domain after domain.

    Every token is predicted exactly once (but the first of each source, which nothing comes before). The last
    sample of each source is filled up, and `multiple_of` appends samples, all of that masked out.
    """

    index_split = Split.valid

    def __init__(self, name: str, sources: Sequence[tuple[str, SourceDataset]], multiple_of: int = 1) -> None:
        self._name = name
        self._sources = sources
        self._ends = list(accumulate(len(dataset) for _, dataset in sources))
        self._length = -(-self._ends[-1] // multiple_of) * multiple_of

    def __len__(self) -> int:
        """Samples, those that only fill up included."""
        return self._length

    @property
    def domains(self) -> list[str]:
        """The domains, in the order of their samples."""
        return list(dict.fromkeys(domain for domain, _ in self._sources))

    def domain_of(self, sample: int) -> str:
        """The domain of a sample; the last one's for samples that only fill up (they weigh nothing)."""
        return self._sources[bisect_right(self._ends, min(sample, self._ends[-1] - 1))][0]

    def _any_source(self) -> SourceDataset:
        return self._sources[-1][1]

    def _fills(self, sample: int) -> bool:
        return self._ends[-1] <= sample < self._length

    def _place(self, sample: int) -> tuple[str, SourceDataset, int]:
        if not 0 <= sample < self._ends[-1]:
            raise IndexError(f"sample {sample} of {self._length}")
        which = bisect_right(self._ends, sample)
        dataset = self._sources[which][1]
        return self._name, dataset, sample - self._ends[which] + len(dataset)


def build_chained(
    slices: Sequence[Slice], samples: Sequence[int], config: GPTDatasetConfig, seed: int, before: int = 0
) -> VersionedDataset:
    """Version 1's samples, then version 2's, …: main path, branches, CPT; a position is a consumed sample.

    `samples[i]` is how many of version i are used; `before` positions come before version 1's. Each version is one
    epoch, shuffled by (seed, its name), so that neither a longer run nor a later version changes what comes before.
    Under torch.distributed every rank must call this (one builds the index, the others wait).

    Raises:
        UserError: a slice yields fewer samples than asked for, or its source is gone or another.
    """
    versions, _ = open_versions(slices, samples, config, seed, [])
    return VersionedDataset(versions, before=before)


def build_shuffled(
    slices: Sequence[Slice], samples: Sequence[int], config: GPTDatasetConfig, seed: int
) -> VersionedDataset:
    """PTFS: exactly the samples of `build_chained`, permuted together by (seed, number of versions).

    Raises as `build_chained`; every rank must call it.
    """
    versions, arrays = open_versions(slices, samples, config, seed, [mixture_entry(samples, seed)])
    return VersionedDataset(versions, arrays[-1]["order"])


def build_validation(one: Slice, config: GPTDatasetConfig, multiple_of: int = 1) -> ValidationDataset:
    """The validation slice; with `multiple_of` (a global batch) no sample is lost to a loader that drops
    the last incomplete batch. Every rank must call it.

    Raises:
        UserError: nothing to predict in it, or its source is gone or another.
    """
    require_samples(one, 1, 1)
    extra = int(config.add_extra_token_to_sequence)
    domains = list(one.tokens_by_domain)
    sources = sorted((s for s in one.sources if s.tokens > extra), key=lambda s: domains.index(s.domain))
    entries = [source_entry(source, config.sequence_length, extra, None) for source in sources]
    arrays = cache_of(one, config).prepare(entries)
    opened = _open_indexed(sources, config)
    return ValidationDataset(
        one.name,
        [
            (source.domain, SourceDataset(source, opened[source.prefix], index, Split.valid, config))
            for source, index in zip(sources, arrays, strict=True)
        ],
        multiple_of,
    )


def open_versions(
    slices: Sequence[Slice], samples: Sequence[int], config: Any, seed: int, more: list[CacheEntry]
) -> tuple[list[VersionSamples], list[Arrays]]:
    """Each version's samples, and the arrays of all entries, those of `more` last."""
    seq_length, extra = config.sequence_length, int(config.add_extra_token_to_sequence)
    used: list[tuple[Slice, list[SliceSource]]] = []
    entries: list[CacheEntry] = []
    for one, count in zip(slices, samples, strict=True):
        require_samples(one, count, seq_length)
        sources = [source for source in one.sources if source.tokens >= seq_length + 1]
        used.append((one, sources))
        entries += [source_entry(source, seq_length, extra, (seed, one.name)) for source in sources]
        entries.append(interleave_entry([(s.tokens - 1) // seq_length for s in sources], seed, one.name))
    arrays = cache_of(slices[0], config).prepare([*entries, *more])
    opened = _open_indexed([source for _, sources in used for source in sources], config)
    versions = []
    left = iter(arrays)
    for (one, sources), count in zip(used, samples, strict=True):
        datasets = [SourceDataset(s, opened[s.prefix], next(left), Split.train, config) for s in sources]
        order = next(left)
        versions.append(VersionSamples(one.name, count, datasets, order if len(datasets) > 1 else None))
    return versions, arrays


def _open_indexed(sources: Sequence[SliceSource], config: Any) -> dict[Path, Any]:
    """Map every indexed dataset once, however many slices name it."""
    prefixes = dict.fromkeys(source.prefix for source in sources)
    return {prefix: IndexedDataset(str(prefix), mmap=config.mmap_bin_files) for prefix in prefixes}


def cache_of(one: Slice, config: Any) -> IndexCache:
    """The cache that the configuration names (--data-cache-path), else `.cache` next to the slices."""
    if config.path_to_cache:
        return IndexCache(config.path_to_cache)
    return IndexCache(one.path.parent / ".cache" if one.path else private_folder(create=True))


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
