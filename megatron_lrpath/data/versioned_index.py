"""Compute the indices of versioned datasets as pure functions: which tokens a sample consists of.

The arrays equal Megatron's (`GPTDataset`), computed in integers throughout: its compiled helper counts the
samples of a set with a partial last one in 32-bit floating point, which is wrong beyond 16 million tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from megatron_lrpath.data.draw_random import permutation, random_words, uniforms
from megatron_lrpath.data.index_cache import Arrays, CacheEntry
from megatron_lrpath.data.indexed import Lengths, document_lengths
from megatron_lrpath.data.slice import SliceSource
from megatron_lrpath.data.slice_codec import Documents
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.mix import Mix, Replay, quotas
from megatron_lrpath.plan.spec import Version

FORMAT = 1  # part of every key: increase it when any of these arrays changes its meaning


def sample_bounds(lengths: Lengths, seq_length: int, extra: int, keep_partial: bool) -> np.ndarray:
    """Return the beginnings of samples in a sequence of documents of these `lengths`: int32 [samples + 1, 2].

    Row i has the document (its position in the sequence) and the offset in it at which sample i begins;
    sample i takes `seq_length` tokens from there and `extra` more (1: the last label), with which sample i
    + 1 begins. The row after the last sample is the end of that sample's `seq_length` tokens. With
    `keep_partial` the last sample can be short; otherwise an incomplete sample is dropped.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    usable = max(int(ends[-1]) - extra, 0) if len(ends) else 0
    samples = -(-usable // seq_length) if keep_partial else usable // seq_length
    starts = np.minimum(np.arange(samples + 1, dtype=np.int64) * seq_length, usable)
    # a boundary that falls after the last token (extra = 0) belongs to the end of the last document
    document = np.minimum(np.searchsorted(ends, starts, side="right"), max(len(ends) - 1, 0))
    offset = starts - (ends[document] - lengths[document]) if len(ends) else starts
    return np.stack([document, offset], axis=1).astype(np.int32)


def source_entry(
    source: SliceSource, seq_length: int, extra: int, order: tuple[int, str] | None
) -> CacheEntry:
    """Return the cache entry of a source's index: its documents in order, its samples' bounds and order.

    `order` is (seed, version), which determine the shuffle of documents and samples; an incomplete last
    sample is dropped. None (validation) keeps both in their order and keeps a short last sample.
    """

    def build() -> Arrays:
        documents = source.documents
        if order is not None:
            documents = documents[permutation(len(documents), "documents", *order, source.digest)]
        lengths = _lengths_of(source, documents)
        bounds = sample_bounds(lengths, seq_length, extra, keep_partial=order is None)
        samples = len(bounds) - 1
        if order is None:
            shuffle = np.arange(samples, dtype=np.uint32)
        else:
            shuffle = permutation(samples, "samples", *order, source.digest)
        return {"documents": documents, "samples": bounds, "shuffle": shuffle}

    key = ["source", FORMAT, source.digest, seq_length, extra, order]
    return CacheEntry(key, ("documents", "samples", "shuffle"), build)


def _lengths_of(source: SliceSource, documents: Documents) -> Lengths:
    """Return the tokens of each of `documents`.

    Raises:
        UserError: they differ from the slice's count, so it is not the same dataset.
    """
    every = document_lengths(source.prefix)
    beyond = len(documents) and int(documents.max()) >= len(every)
    lengths = None if beyond else every[documents]
    if lengths is None or int(lengths.sum(dtype=np.int64)) != source.tokens:
        raise UserError(
            f"{source.prefix}: is not the indexed dataset that the slice was drawn from (its documents do "
            f"not have the tokens that the slice counted); bring the old one back"
        )
    return lengths


def interleave_entry(counts: Sequence[int], seed: int, version: str) -> CacheEntry:
    """Return the cache entry of the order in which a version's sources alternate; see `interleave`."""
    key = ["interleave", FORMAT, list(counts), seed, version]
    return CacheEntry(key, ("source", "sample"), lambda: interleave(counts, "interleave", seed, version))


def interleave(counts: Sequence[int], *key: object) -> Arrays:
    """Spread `counts[j]` samples of each source j evenly: arrays `source` (uint16) and `sample` (uint32).

    Each source's samples keep their order. Sample k of n is put at a random place in the k-th of n equal
    parts of the version, so that every range of it (a batch, a shorter run) has each source in its share
    to within two samples, without a fixed rhythm between sources and ranks.
    """
    filled = [number for number, count in enumerate(counts) if count]
    places = [
        (np.arange(counts[number]) + uniforms(counts[number], *key, number)) / counts[number]
        for number in filled
    ]
    order = np.argsort(np.concatenate(places), kind="stable") if places else np.empty(0, dtype=np.int64)
    source = np.repeat(np.array(filled, dtype=np.uint16), [counts[number] for number in filled])
    sample = [np.arange(counts[number], dtype=np.uint32) for number in filled]
    return {
        "source": source[order],
        "sample": (np.concatenate(sample) if sample else np.empty(0, dtype=np.uint32))[order],
    }


def mixture_entry(samples: Sequence[int], seed: int) -> CacheEntry:
    """Return the cache entry of the order of versions shuffled together: a permutation of all their samples.

    `samples` of each version, oldest first. The order depends on the seed and on the number of versions.
    """
    total = sum(samples)
    key = ["mixture", FORMAT, list(samples), seed]
    return CacheEntry(key, ("order",), lambda: {"order": permutation(total, "mixture", seed, len(samples))})


def mix_entry(mix: Mix, batch: int, steps: int, version: str) -> CacheEntry:
    """Return the cache entry of the positions that a mix takes in `steps` steps of `batch` samples."""
    shares = [str(share) for share in mix.shares]
    key = ["mix", FORMAT, shares, mix.seed, batch, steps, version]
    return CacheEntry(key, ("source", "sample"), lambda: places(mix, batch, steps, version))


def replay_entries(plan: Plan, count: int) -> list[CacheEntry | None]:
    """Return the cache entries of the replays of the first `count` versions, None without; see `replayed_places`."""
    named = [(version.name, plan.samples_of(index)) for index, version in enumerate(plan.versions[:count])]
    return [
        _replay_entry(version, named[:index], plan.timeline.sizes[index], plan.seed)
        for index, version in enumerate(plan.versions[:count])
    ]


def _replay_entry(
    version: Version, earlier: Sequence[tuple[str, int]], batch: int, seed: int
) -> CacheEntry | None:
    if (replay := version.replay) is None:
        return None
    key = ["replay", FORMAT, replay.to_dict(), version.name, list(earlier), batch, version.steps, seed]
    build = partial(replayed_places, replay, version.name, earlier, batch, version.steps, seed)
    return CacheEntry(key, ("source", "sample"), build)


def replayed_places(
    replay: Replay, version: str, earlier: Sequence[tuple[str, int]], batch: int, steps: int, seed: int
) -> Arrays:
    """Return the sample at each position of a version: its `source` (uint16, 0: the version) and `sample` (uint32).

    Source j is the j-th of the `earlier` versions, which are names with their numbers of new samples. The
    version's own samples keep their order. Each step has the share of all samples so far, rounded down, at
    places determined by (seed, version); no sample is replayed twice in a version. Nothing depends on later
    steps.
    """
    due = np.array([replay.replayed(step * batch) for step in range(steps + 1)])
    words = random_words(steps * batch, "replay", seed, version).reshape(steps, batch)
    marks = np.zeros((steps, batch), dtype=bool)
    np.put_along_axis(
        marks,
        np.argsort(words, axis=1, kind="stable"),
        np.arange(batch)[np.newaxis] < np.diff(due)[:, np.newaxis],
        axis=1,
    )
    again = marks.reshape(-1)
    drawn = _weighted if replay.weights else _uniform
    source, sample = np.zeros(len(again), dtype=np.uint16), np.zeros(len(again), dtype=np.uint32)
    source[again], sample[again] = drawn(replay, earlier, int(due[-1]), (seed, version))
    sample[~again] = np.arange(len(again) - int(due[-1]), dtype=np.uint32)
    return {"source": source, "sample": sample}


type _Draws = tuple[
    np.ndarray, np.ndarray
]  # the source (from 1 on) of each replayed sample, and its number in it


def _uniform(replay: Replay, earlier: Sequence[tuple[str, int]], count: int, key: tuple[int, str]) -> _Draws:
    ends = np.cumsum([samples for _, samples in earlier])
    drawn = permutation(int(ends[-1]), "replayed", *key)[:count].astype(np.int64)
    source = np.searchsorted(ends, drawn, side="right")
    return source + 1, drawn - np.concatenate([[0], ends])[source]


def _weighted(replay: Replay, earlier: Sequence[tuple[str, int]], count: int, key: tuple[int, str]) -> _Draws:
    turns = np.array(replay.turns)
    taken = np.tile(turns, count // len(turns) + 1)[:count]
    source, sample = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    names = [name for name, _ in earlier]
    for place, (name, _) in enumerate(replay.weights):
        here, number = taken == place, names.index(name)
        source[here] = number + 1
        order = permutation(earlier[number][1], "replayed", *key, name)
        sample[here] = order[: np.count_nonzero(here)]
    return source, sample


def places(mix: Mix, batch: int, steps: int, version: str) -> Arrays:
    """Return the sample at each position: its `source` (uint16, 0: the main path) and number `sample` (uint32).

    Every step has the number of samples of a slice that `quotas` gives, at places determined by (seed,
    version). A slice's samples keep their order, each once.
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
