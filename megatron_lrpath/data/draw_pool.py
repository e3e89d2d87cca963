"""The documents of one dataset that no slice has yet, and the drawing from them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_lrpath.data.draw_random import permutation
from megatron_lrpath.data.slice import Slice, SliceSource
from megatron_lrpath.data.slice_codec import Documents
from megatron_lrpath.data.slice_source import fingerprint_source, open_source
from megatron_lrpath.errors import UserError

BLOCK = 1 << 22


class SourcePool:
    """One dataset: which documents are free, and their tokens. A byte of memory per document.

    Documents without tokens belong to no slice. `weight` None: in proportion to the free tokens.
    """

    def __init__(self, prefix: Path, domain: str, weight: Fraction | None, existing: Sequence[Slice]) -> None:
        self.prefix, self.domain, self.weight = prefix, domain, weight
        self.lengths = open_source(prefix).lengths
        self.fingerprint = fingerprint_source(prefix)
        self.free = np.empty(len(self.lengths), dtype=bool)
        self.free_tokens = 0
        for start in range(0, len(self.lengths), BLOCK):
            self.free[start : start + BLOCK] = self.lengths[start : start + BLOCK] > 0
            self.free_tokens += int(self.lengths[start : start + BLOCK].sum(dtype=np.int64))
        for one in existing:
            self._keep_out(one)

    def _keep_out(self, one: Slice) -> None:
        """Take what an existing slice holds of this dataset out of the free documents.

        Raises:
            UserError: the slice was drawn from another state of this very dataset.
        """
        for source in one.sources:
            if source.fingerprint == self.fingerprint:
                self.take(source.documents)
            elif source.prefix.resolve() == self.prefix.resolve():
                raise UserError(
                    f"{self.prefix}: has changed since {one.path or one.name} was drawn from it, so that "
                    f"nobody can tell what is new; bring the old dataset back, and give new data "
                    f"a name of its own"
                )

    def take(self, documents: Documents) -> None:
        """Mark free documents as taken."""
        self.free[documents] = False
        self.free_tokens -= int(self.lengths[documents].sum(dtype=np.int64))

    @property
    def free_documents(self) -> int:
        """Number of free documents."""
        return int(np.count_nonzero(self.free))

    def take_range(self, first: int, end: int | None, version: str) -> Documents:
        """Take the documents `first` … `end` - 1 (those without tokens left out).

        Raises:
            UserError: not so many documents there, or some are in a slice already.
        """
        end = len(self.free) if end is None else end
        where = f"--documents {version}={self.prefix}:{first}-{end}"
        if end > len(self.free) or first >= end:
            raise UserError(f"{where}: the dataset has {len(self.free):,} documents")
        chosen = first + np.flatnonzero(self.lengths[first:end] > 0).astype(np.int32)
        used = chosen[~self.free[chosen]]
        if len(used):
            raise UserError(
                f"{where}: {len(used):,} of these documents are in a slice already "
                f"(the first is number {used[0]})"
            )
        self.take(chosen)
        return chosen

    def draw(self, targets: Sequence[int | None], seed: int) -> list[Documents]:
        """Draw one set of documents after the other, of at least these many tokens each, from the free ones.

        All follow one random order of the dataset, decided by the seed and the dataset's content: what is
        drawn later does not change what is drawn first, and going on in another call goes on in that order.
        Where the free documents only just suffice, a set may end one document early so that the rest is
        enough for those after it; None stands for the last, which gets the rest. Sorted int32 arrays.
        """
        order = permutation(len(self.free), "draw", seed, self.fingerprint)
        order = order[self.free[order]]
        ends = np.cumsum(self.lengths[order], dtype=np.int64)
        sets = []
        done = 0
        for place, target in enumerate(targets):
            if target is None:
                end = len(order)
            else:
                later = sum(target or 0 for target in targets[place + 1 :])
                end = _end_of(ends, done, target, later)
            sets.append(np.sort(order[done:end]).astype(np.int32))
            done = end
        return sets

    def source(self, documents: Documents) -> SliceSource:
        """These documents as a source of a slice."""
        tokens = int(self.lengths[documents].sum(dtype=np.int64))
        return SliceSource(self.prefix, self.fingerprint, self.domain, documents, tokens)


def _end_of(ends: np.ndarray, done: int, target: int, later: int) -> int:
    """Up to which document to go from `done` on, for `target` tokens while `later` remain (see `draw`)."""
    if target <= 0:
        return done
    before = int(ends[done - 1]) if done else 0
    end = int(np.searchsorted(ends, before + target)) + 1
    if end > len(ends) or int(ends[-1] - ends[end - 1]) < later:
        end -= 1
    return end
