"""The datasets that Megatron's loop reads: version slices chained, shuffled together, mixed, or for
validation.
"""

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
    """A part of a document in a sample: `length` tokens of document number `document` from `offset` on."""

    version: str
    prefix: Path
    document: int
    offset: int
    length: int


class SourceDataset(GPTDataset):
    """One epoch of one source of a slice: Megatron's GPTDataset, with this package's index.

    Megatron's own index cache does not distinguish two slices of one dataset, and is written in place. Two
    more things differ. No token id counts as padding, because slices have none: Megatron would mask every
    real token equal to the tokenizer's padding id. And if samples can be padded, masks are not reused:
    Megatron reuses the first sample's loss mask after its padding was masked.
    """

    def __init__(self, source: SliceSource, indexed: Any, arrays: Arrays, split: Any, config: Any) -> None:
        self._arrays = arrays
        with warnings.catch_warnings():  # about padding ids, which are not used here
            warnings.simplefilter("ignore")
            super().__init__(indexed, str(source.prefix), source.documents, None, split, config)
        self._pad_token_id = -1  # the id of no token
        if split is not Split.train:
            self.masks_and_position_ids_are_cacheable = False

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._arrays["documents"], self._arrays["samples"], self._arrays["shuffle"]

    def __len__(self) -> int:
        """Return the number of samples in the epoch."""
        return len(self.shuffle_index)

    def locate(self, sample: int, version: str) -> list[Location]:
        """Return the parts of documents in `sample`, including its last label."""
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
    """A version's own samples, with its sources interleaved in their shares; `order` is None for one source."""

    name: str
    samples: int
    sources: list[SourceDataset]
    order: Arrays | None

    def place(self, sample: int) -> tuple[SourceDataset, int]:
        """Return the source of a sample of this version, and its number there."""
        if self.order is None:
            return self.sources[0], sample
        return self.sources[int(self.order["source"][sample])], int(self.order["sample"][sample])


class PlacedSamples(torch.utils.data.Dataset, ABC):
    """A dataset that only locates its samples: `_place` finds them, the source builds the tensors.

    Items are GPTDataset's: `tokens`, `labels`, `loss_mask`, `position_ids` (each [seq_length]) and, if
    configured, `attention_mask` ([1, seq_length, seq_length]).
    """

    def __getitem__(self, sample: int | None) -> dict[str, torch.Tensor]:
        """Return the sample at this position (None: a padding sample, masked out)."""
        if sample is None or self._fills(sample):
            return self._any_source()[None]
        _, dataset, number = self._place(sample)
        return dataset[number]

    def locate(self, sample: int) -> list[Location]:
        """Return the documents of the sample at this position, in order; none for a padding sample."""
        if self._fills(sample):
            return []
        version, dataset, number = self._place(sample)
        return dataset.locate(number, version)

    @abstractmethod
    def _place(self, sample: int) -> tuple[str, SourceDataset, int]:
        """Return (version, source, number in it) of the sample at this position."""

    @abstractmethod
    def _any_source(self) -> SourceDataset:
        """Return the source of padding samples."""

    def _fills(self, sample: int) -> bool:
        """Return whether this position is a padding sample."""
        return False


class VersionedDataset(PlacedSamples):
    """Versions in sequence, or with `order` (a permutation of all their samples) shuffled together.

    `replays`: for each version, the positions of earlier samples among its own, None for a version without;
    see `versioned_index.replayed_places`. Only replayed samples occur twice. The positions of the first
    `before` samples, which another training has read, are empty.
    """

    index_split = Split.train

    def __init__(
        self,
        versions: Sequence[VersionSamples],
        order: np.ndarray | None = None,
        replays: Sequence[Arrays | None] = (),
        before: int = 0,
    ) -> None:
        self._versions = versions
        self._order = order
        self._replays = replays or [None] * len(versions)
        self._before = before
        self._lengths = [
            version.samples if again is None else len(again["source"])
            for version, again in zip(versions, self._replays, strict=True)
        ]
        self._ends = list(accumulate(self._lengths, initial=before))[1:]

    def __len__(self) -> int:
        """Return the end position, which is the number of samples of all versions plus `before`."""
        return self._ends[-1]

    def version_of(self, sample: int) -> str:
        """Return the name of the version of the sample at this position."""
        return self._place(sample)[0]

    def is_replayed(self, sample: int) -> bool:
        """Return whether the sample at this position is one of an earlier version that is read again."""
        which, number = self._split(sample)
        again = self._replays[which]
        return again is not None and bool(again["source"][number])

    def _any_source(self) -> SourceDataset:
        return self._versions[0].place(0)[0]

    def _place(self, sample: int) -> tuple[str, SourceDataset, int]:
        which, number = self._split(sample)
        again = self._replays[which]
        if again is not None:
            source, number = int(again["source"][number]), int(again["sample"][number])
            which = source - 1 if source else which
        version = self._versions[which]
        return version.name, *version.place(number)

    def _split(self, sample: int) -> tuple[int, int]:
        """Return the index of the version to whose steps a position belongs, and the number in it."""
        if not self._before <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        number = sample if self._order is None else int(self._order[sample])
        which = bisect_right(self._ends, number)
        return which, number - self._ends[which] + self._lengths[which]


class MixedDataset(VersionedDataset):
    """The main path's samples at their own positions, except those that the mix replaces.

    `taken["source"][p]` is the source of the sample at position `first` + p: 0 is the main path itself, j the
    j-th slice, whose sample number `taken["sample"][p]` is read.
    """

    def __init__(
        self, main: VersionedDataset, first: int, taken: Arrays, parts: Sequence[VersionSamples]
    ) -> None:
        super().__init__(main._versions, main._order, main._replays, main._before)
        self._first = first
        self._taken = taken
        self._parts = parts

    def _place(self, sample: int) -> tuple[str, SourceDataset, int]:
        source = self._source(sample)
        if not source:
            return super()._place(sample)
        part = self._parts[source - 1]
        return part.name, *part.place(int(self._taken["sample"][sample - self._first]))

    def is_replayed(self, sample: int) -> bool:
        """Return whether the main path's own sample is read here, and belongs to an earlier version."""
        return not self._source(sample) and super().is_replayed(sample)

    def _source(self, sample: int) -> int:
        position = sample - self._first
        return int(self._taken["source"][position]) if 0 <= position < len(self._taken["source"]) else 0


class ValidationDataset(PlacedSamples):
    """All of a slice, in fixed order, domain by domain.

    Every token is predicted exactly once (except the first of each source, which has no predecessor). The
    last sample of each source is padded, and `multiple_of` appends samples; all padding is masked out.
    """

    index_split = Split.valid

    def __init__(self, name: str, sources: Sequence[tuple[str, SourceDataset]], multiple_of: int = 1) -> None:
        self._name = name
        self._sources = sources
        self._ends = list(accumulate(len(dataset) for _, dataset in sources))
        self._length = -(-self._ends[-1] // multiple_of) * multiple_of

    def __len__(self) -> int:
        """Return the number of samples, including padding samples."""
        return self._length

    @property
    def domains(self) -> list[str]:
        """The domains, in the order of their samples."""
        return list(dict.fromkeys(domain for domain, _ in self._sources))

    def domain_of(self, sample: int) -> str:
        """Return the domain of a sample; padding samples get the last one's (they have no weight)."""
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
    slices: Sequence[Slice],
    samples: Sequence[int],
    config: GPTDatasetConfig,
    seed: int,
    replays: Sequence[CacheEntry | None] = (),
    before: int = 0,
) -> VersionedDataset:
    """Return version 1's samples, then version 2's, …, for main path, branches and CPT, by consumed samples.

    `samples[i]` is the number of version i's own samples; `replays` are the earlier samples among them, see
    `replay_entries`; `before` positions precede version 1's. Each version is one epoch, shuffled by (seed, its name),
    so that neither a longer run nor a later version changes what comes before. Under torch.distributed every rank must
    call this (one builds the index, the others wait).

    Raises:
        UserError: a slice has fewer samples than requested, or a source is missing or replaced.
    """
    entries = [entry for entry in replays if entry]
    versions, arrays = open_versions(slices, samples, config, seed, entries)
    found = iter(arrays[len(arrays) - len(entries) :])
    places = [next(found) if entry else None for entry in replays]
    return VersionedDataset(versions, replays=places, before=before)


def build_shuffled(
    slices: Sequence[Slice], samples: Sequence[int], config: GPTDatasetConfig, seed: int
) -> VersionedDataset:
    """Return PTFS' samples: `samples[i]` of version i, permuted together by (seed, number of versions).

    Raises as `build_chained`; every rank must call it.
    """
    versions, arrays = open_versions(slices, samples, config, seed, [mixture_entry(samples, seed)])
    return VersionedDataset(versions, arrays[-1]["order"])


def build_validation(one: Slice, config: GPTDatasetConfig, multiple_of: int = 1) -> ValidationDataset:
    """Return the validation slice. With `multiple_of` (a global batch) no sample is lost to a loader that
    drops the last incomplete batch. Every rank must call it.

    Raises:
        UserError: it has nothing to predict, or a source is missing or replaced.
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
    """Return each version's samples, and the arrays of all entries, those of `more` last."""
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
    """Map every indexed dataset once, regardless of the number of slices that name it."""
    prefixes = dict.fromkeys(source.prefix for source in sources)
    return {prefix: IndexedDataset(str(prefix), mmap=config.mmap_bin_files) for prefix in prefixes}


def cache_of(one: Slice, config: Any) -> IndexCache:
    """Return the cache that the configuration names (--data-cache-path), else `.cache` next to the slices."""
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
    """Return the branch's samples; `branch` is (version, first position, batch in samples, steps).

    `slices` are the mix's, in its order. Every rank must call it (one builds the index, the others wait).

    Raises:
        UserError: a slice yields fewer samples than its share needs.
    """
    version, first, batch, steps = branch
    needed = require_mix_samples(slices, mix, batch, steps, config.sequence_length)
    parts, _ = open_versions(slices, needed, config, mix.seed, [])
    [taken] = cache_of(slices[0], config).prepare([mix_entry(mix, batch, steps, version)])
    return MixedDataset(main, first, taken, parts)
