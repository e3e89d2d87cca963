"""Data in addition to a version's own: slices mixed into a branch, earlier versions replayed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import Any


@dataclass(frozen=True)
class MixPart:
    """A slice (name or path, without its suffix) and its share of a branch's samples, between 0 and 1.

    `place` is `FILE:LINE: key`, for errors that only the data reveal.
    """

    slice: str
    share: Fraction
    place: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The slice's name."""
        return self.slice.rstrip("/").rsplit("/", 1)[-1].removesuffix(".slice")


@dataclass(frozen=True)
class Mix:
    """The data that a branch reads in addition to the main path's samples; `seed` determines their places in
    the batches.
    """

    parts: tuple[MixPart, ...]
    seed: int

    @property
    def shares(self) -> list[Fraction]:
        """The share of each part, in order."""
        return [part.share for part in self.parts]

    def samples(self, batch: int, steps: int) -> dict[str, int]:
        """Return the samples of each slice, by its name, in `steps` steps of `batch` samples."""
        counts = [0] * len(self.parts)
        for step in quotas(self.shares, batch, steps):
            counts = [total + count for total, count in zip(counts, step, strict=True)]
        return dict(zip((part.name for part in self.parts), counts, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable data; shares as fractions of integers."""
        return {"seed": self.seed, "shares": {part.name: str(part.share) for part in self.parts}}


def quotas(shares: Sequence[Fraction], batch: int, steps: int) -> Iterator[tuple[int, ...]]:
    """Yield how many of the `batch` samples of each of `steps` steps come from each of the sources with
    `shares`.

    The rest of a step (1 minus the sum of the shares) is a source like the others. After every step, each
    source has had its share of all samples so far, rounded up or down: the sample with the earliest
    deadline comes first, which is always possible (R. Tijdeman, The chairman assignment problem, 1980).
    """
    every = [1 - sum(shares, Fraction(0)), *shares]
    unit = lcm(*(share.denominator for share in every))
    pace = [int(share * unit) * batch for share in every]  # samples a step, in 1/unit
    had = [0] * len(every)
    for step in range(1, steps + 1):
        counts = [max(0, step * speed // unit - done) for speed, done in zip(pace, had, strict=True)]
        # the sources that can round up, those with the earliest next sample first
        early = [
            (-(-(done + count + 1) * unit // speed), number)
            for number, (speed, done, count) in enumerate(zip(pace, had, counts, strict=True))
            if done + count < -(-step * speed // unit)
        ]
        for _, number in sorted(early)[: batch - sum(counts)]:
            counts[number] += 1
        had = [done + count for done, count in zip(had, counts, strict=True)]
        yield tuple(counts[1:])


@dataclass(frozen=True)
class Replay:
    """`share` (above 0, below 1) of a version's samples come from the new samples of earlier versions.

    `weights` are whole numbers by version name; empty: every earlier sample is as likely as every other one. Of the
    first n samples of a version, the share of n, rounded down, are replayed. This holds for every n, so that a
    version that becomes longer keeps its first batches.
    """

    share: Fraction
    weights: tuple[tuple[str, int], ...] = ()

    def replayed(self, samples: int) -> int:
        """Return how many of a version's first `samples` samples are replayed."""
        return samples * self.share.numerator // self.share.denominator

    def new(self, samples: int) -> int:
        """Return how many of a version's first `samples` samples are its own."""
        return samples - self.replayed(samples)

    def steps(self, available: int, batch: int) -> int:
        """Return the maximum number of steps of `batch` samples for which `available` own samples suffice."""
        return int(available / ((1 - self.share) * batch))

    @cached_property
    def turns(self) -> tuple[int, ...]:
        """The order in which the versions of `weights` (by their place) take turns, evenly spread, for one period."""
        every = [
            (Fraction(2 * turn + 1, weight), place)
            for place, (_, weight) in enumerate(self.weights)
            for turn in range(weight)
        ]
        return tuple(place for _, place in sorted(every))

    def by_version(self, samples: int) -> dict[str, int]:
        """Return how many replayed samples of each version of `weights` are among the first `samples`."""
        whole, rest = divmod(self.replayed(samples), max(len(self.turns), 1))
        more = Counter(self.turns[:rest])
        return {name: whole * weight + more[place] for place, (name, weight) in enumerate(self.weights)}

    def sources(self, earlier: list[str]) -> list[str]:
        """Return the versions among `earlier` that it draws from, in their order."""
        named = {name for name, _ in self.weights}
        return [name for name in earlier if name in named or not named]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable data; the share as a fraction of integers."""
        weights = {"weights": dict(self.weights)} if self.weights else {}
        return {"share": str(self.share)} | weights
