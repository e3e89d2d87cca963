"""The measured perplexities in `results/`, and statistics over seeds.

Two models are compared only with the same seed and on the same kind of processor: processors round
differently, which after some hundred steps makes another training (up to 0.63% here), and the branches of two
machines start from two main paths.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from certainty import Difference
from scipy.stats import t as student

RESULTS = Path(__file__).parent / "results"

Model = tuple[str, str, str]
"""Variation, paradigm and version."""


@dataclass(frozen=True)
class Row:
    """Perplexity of a version's model under a paradigm, trained with a seed on a processor."""

    processor: str
    seed: int
    variation: str
    paradigm: str
    cost: float
    version: str
    perplexity: float


def read(path: Path) -> list[dict[str, str]]:
    """Return the lines of a file of results; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def row(line: Mapping[str, str], version: str, cost: float) -> Row:
    """Return a line as the row of this version and cost."""
    seed, perplexity = int(line["seed"]), float(line["perplexity"])
    return Row(line["processor"], seed, line["variation"], line["paradigm"], cost, version, perplexity)


class Measured:
    """The rows of one experiment."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._at: dict[tuple[str, str, str, int], dict[str, float]] = defaultdict(dict)
        for row in self.rows:
            self._at[row.variation, row.paradigm, row.version, row.seed][row.processor] = row.perplexity

    @classmethod
    def load(cls, name: str) -> Measured:
        """Return the rows of the experiment's file; none if the file does not exist."""
        lines = read(RESULTS / f"{name}.csv")
        return cls(row(line, line["version"], float(line["relative_cost"])) for line in lines)

    @classmethod
    def by_domain(cls, name: str) -> Measured:
        """Return the experiment's rows by domain of the validation text: their versions are `VERSION/DOMAIN`."""
        costs = {(row.variation, row.paradigm): row.cost for row in cls.load(name).rows}
        lines = read(RESULTS / "domains" / f"{name}.csv")
        return cls(
            row(line, f"{line['version']}/{line['domain']}", costs[line["variation"], line["paradigm"]])
            for line in lines
        )

    def seeds(self) -> list[int]:
        """Return all seeds, sorted."""
        return sorted({row.seed for row in self.rows})

    def at(self, variation: str, paradigm: str, version: str) -> dict[int, float]:
        """Return the perplexity by seed, the mean over the processors."""
        found = {seed: self._at.get((variation, paradigm, version, seed)) for seed in self.seeds()}
        return {seed: statistics.fmean(values.values()) for seed, values in found.items() if values}

    def paired(self, value: Callable[[int], float | None]) -> list[float]:
        """Return `value(seed)` for every seed that has one."""
        found = [value(seed) for seed in self.seeds()]
        return [one for one in found if one is not None]

    def ratio(self, seed: int, above: Model, below: Model) -> float | None:
        """Return the perplexity of one model over that of another, minus 1, with the same seed.

        It is the mean over the processors that have both; None if none has.
        """
        one, other = (self._at.get((*model, seed), {}) for model in (above, below))
        found = [one[name] / other[name] - 1 for name in one if name in other]
        return statistics.fmean(found) if found else None

    def loss(self, seed: int, processor: str, weights: Mapping[Model, float]) -> float | None:
        """Return the weighted sum of models' losses (nats a token); None if one is missing."""
        found = [
            (weight, self._at.get((*model, seed), {}).get(processor)) for model, weight in weights.items()
        ]
        known = [weight * math.log(value) for weight, value in found if value is not None]
        return sum(known) if len(known) == len(found) else None

    def difference(
        self, above: Mapping[Model, float], below: Mapping[Model, float], paired: bool
    ) -> Difference:
        """Return the weighted losses of some models less those of others, for every seed that has them.

        Each is the mean over the processors that have all of them.
        """
        sides: tuple[list[float], list[float]] = ([], [])
        processors = sorted({row.processor for row in self.rows})
        for seed in self.seeds():
            found = [
                (one, other)
                for name in processors
                if (one := self.loss(seed, name, above)) is not None
                and (other := self.loss(seed, name, below)) is not None
            ]
            if found:
                for side, values in zip(sides, zip(*found, strict=True), strict=True):
                    side.append(statistics.fmean(values))
        return Difference(tuple(sides[0]), tuple(sides[1]), paired)


def mean_of(variation: str, paradigm: str, versions: Sequence[str]) -> dict[Model, float]:
    """Return the weights of the mean loss of some versions' models."""
    return {(variation, paradigm, version): 1 / len(versions) for version in versions}


def said(values: Sequence[float], places: int = 2) -> str:
    """Return `12.34 ±0.05`: mean and standard deviation over seeds; the value alone for a single seed."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{places}f}"
    return f"{mean} ±{statistics.stdev(values):.{places}f}" if len(values) > 1 else mean


def percent(values: Sequence[float]) -> str:
    """Return mean and standard deviation of shares, in percent."""
    if not values:
        return "–"
    mean = f"{100 * statistics.fmean(values):+.2f}%"
    return f"{mean} ±{100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def nats(shares: Sequence[float]) -> str:
    """Return the mean of differences that are shares of a perplexity, in nats a token."""
    return f"{statistics.fmean(map(math.log1p, shares)):+.4f}" if shares else "–"


def interval(values: Sequence[float]) -> float:
    """Return half the width of the mean's 95% interval (Student's t); infinite for a single value."""
    if len(values) < 2:
        return math.inf
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
