"""The number of samples of each step, which can change: conversion of steps to consumed samples and back."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True)
class BatchSizes:
    """The number of samples of each step.

    `changes` are pairs (step, size) in ascending order: the steps after `step` have `size` samples, until the
    next pair. At the first pair's step, `samples` samples have been consumed; earlier steps are not
    described.

    Raises ValueError for sizes below 1 and steps that do not ascend.
    """

    changes: tuple[tuple[int, int], ...]
    samples: int = 0

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.changes]
        ascending = all(before < after for before, after in pairwise(steps))
        if not steps or not ascending or steps[0] < 0 or min(size for _, size in self.changes) < 1:
            raise ValueError(f"batch sizes need ascending steps and sizes of at least 1, not {self.changes}")

    @classmethod
    def constant(cls, size: int) -> BatchSizes:
        """Return the sizes if every step has `size` samples."""
        return cls(((0, size),))

    @classmethod
    def of(cls, changes: Iterable[tuple[int, int]], samples: int = 0) -> BatchSizes:
        """Return the sizes for pairs that may repeat a size."""
        kept: list[tuple[int, int]] = []
        for step, size in changes:
            if not kept or kept[-1][1] != size:
                kept.append((step, size))
        return cls(tuple(kept), samples)

    @property
    def first(self) -> int:
        """The step at which the description begins."""
        return self.changes[0][0]

    def size_of(self, step: int) -> int:
        """Return the samples of a step (from 1); the first described size for earlier steps."""
        return self.changes[max(0, bisect_left(self._steps, step) - 1)][1]

    def samples_at(self, step: int) -> int:
        """Return the samples that have been consumed after `step` steps.

        Raise ValueError for a step before the first one.
        """
        if step < self.first:
            raise ValueError(f"step {step} is before the first step {self.first}")
        piece = bisect_right(self._steps, step) - 1
        begin, size = self.changes[piece]
        return self._bounds[piece] + (step - begin) * size

    def between(self, first: int, last: int) -> int:
        """Return the samples of the steps `first` + 1 to `last`."""
        return self.samples_at(last) - self.samples_at(first)

    def steps_at(self, samples: int) -> int | Fraction:
        """Return the steps after which so many samples have been consumed; a fraction within a step."""
        piece = max(0, bisect_right(self._bounds, samples) - 1)
        begin, size = self.changes[piece]
        steps = begin + Fraction(samples - self._bounds[piece], size)
        return int(steps) if steps.denominator == 1 else steps

    def sizes(self, first: int, last: int) -> list[int]:
        """Return the distinct sizes of the steps `first` + 1 to `last`, in order."""
        if last <= first:
            return []
        pieces = range(max(0, bisect_right(self._steps, first) - 1), bisect_left(self._steps, last))
        return list(dict.fromkeys(self.changes[piece][1] for piece in pieces))

    def thresholds(self) -> list[tuple[int, int]]:
        """Return pairs (consumed samples, size): from so many consumed samples on, steps have `size`."""
        return [(bound, size) for bound, (_, size) in zip(self._bounds, self.changes, strict=True)]

    @cached_property
    def _steps(self) -> list[int]:
        return [step for step, _ in self.changes]

    @cached_property
    def _bounds(self) -> list[int]:
        """Consumed samples at each pair's step."""
        bounds = [self.samples]
        for (begin, size), (end, _) in pairwise(self.changes):
            bounds.append(bounds[-1] + (end - begin) * size)
        return bounds
