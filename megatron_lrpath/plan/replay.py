"""Replay: the share of a version's samples that is drawn again from earlier versions, and how many samples that is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any


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
        """How many of a version's first `samples` samples are replayed."""
        return samples * self.share.numerator // self.share.denominator

    def new(self, samples: int) -> int:
        """How many of a version's first `samples` samples are its own."""
        return samples - self.replayed(samples)

    def steps(self, available: int, batch: int) -> int:
        """The most steps of `batch` samples for which `available` samples of its own suffice."""
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
        """How many samples of each version of `weights` are among the first `samples` of the version that replays."""
        whole, rest = divmod(self.replayed(samples), max(len(self.turns), 1))
        more = Counter(self.turns[:rest])
        return {name: whole * weight + more[place] for place, (name, weight) in enumerate(self.weights)}

    def sources(self, earlier: list[str]) -> list[str]:
        """The versions among `earlier` that it draws from, in their order."""
        named = {name for name, _ in self.weights}
        return [name for name in earlier if name in named or not named]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the share as a fraction of whole numbers."""
        weights = {"weights": dict(self.weights)} if self.weights else {}
        return {"share": str(self.share)} | weights
