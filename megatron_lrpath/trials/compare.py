"""The comparison of a trial's candidates: differences with intervals from the pairing, and the best rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from megatron_lrpath.plan import Plan
from megatron_lrpath.trials.record import PROBE, WHOLE, Trial, losses_of

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Perplexity over that of the first candidate, minus 1, with its 95% interval; None if unknown."""

    middle: float
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Return whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Measured:
    """A candidate on one text: the perplexity (over the mean loss of the repeats), and the difference.

    `difference` is None for the first candidate; `repeats` is the number of repeats that every candidate has.
    """

    perplexity: float
    difference: Difference | None
    repeats: int


@dataclass(frozen=True)
class BestRate:
    """The minimum of a parabola through the losses over the logarithm of the rate, with its 95% interval.

    The interval is None with a single repeat.
    """

    rate: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """The texts by name, `WHOLE` first, with the candidates; empty if no repeat is complete.

    `best_rate` is of a probe whose repeats all have their lowest loss between the tried rates.
    """

    trial: Trial
    texts: dict[str, dict[str, Measured]]
    best_rate: BestRate | None
    missing: int

    @property
    def best(self) -> str | None:
        """The candidate with the lowest loss on the first validation set; None without a complete repeat."""
        whole = self.texts.get(WHOLE)
        return min(whole, key=lambda name: whole[name].perplexity) if whole else None


def compare(plan: Plan, trial: Trial) -> Comparison:
    """Compare what has been measured so far; a repeat counts if all candidates have it."""
    losses = losses_of(plan, trial)
    names = [candidate.name for candidate in trial.candidates]
    texts = {}
    for text, by_candidate in losses.items():
        table = complete_repeats([by_candidate[name] for name in names])
        if table.shape[1]:
            texts[text] = measured(names, table)
    whole = losses.get(WHOLE, {})
    best = None
    if trial.kind == PROBE and WHOLE in texts:
        rates = [candidate.rate for candidate in trial.candidates]
        best = best_rate(rates, complete_repeats([whole[name] for name in names]))
    known = sum(value is not None for values in whole.values() for value in values)
    return Comparison(trial, texts, best, trial.branches - known)


def complete_repeats(losses: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Return the losses [candidates, repeats] of the repeats that every candidate has."""
    columns = [column for column in zip(*losses, strict=True) if None not in column]
    return np.array(columns, dtype=float).T.reshape(len(losses), len(columns))


def measured(names: Sequence[str], losses: np.ndarray) -> dict[str, Measured]:
    """Return the candidates on one text, by name; `losses` [candidates, repeats] in nats per token."""
    repeats = losses.shape[1]
    means, half = losses.mean(axis=1), half_width(losses)
    found = {}
    for place, name in enumerate(names):
        gap = float(means[place] - means[0])
        bounds = (None, None) if half is None else (math.expm1(gap - half), math.expm1(gap + half))
        difference = Difference(math.expm1(gap), *bounds) if place else None
        found[name] = Measured(math.exp(means[place]), difference, repeats)
    return found


def half_width(losses: np.ndarray) -> float | None:
    """Return half the 95% interval of a difference of two mean losses; None with one repeat or candidate.

    A loss is the sum of a candidate's part, a repeat's part (the same batches, hence the pairing) and noise,
    which is assumed equally large for all candidates: the randomized block design. With two candidates it is
    the paired t interval.
    """
    candidates, repeats = losses.shape
    freedom = (candidates - 1) * (repeats - 1)
    if freedom < 1:
        return None
    noise = losses - losses.mean(axis=1, keepdims=True) - losses.mean(axis=0) + losses.mean()
    variance = float((noise**2).sum()) / freedom
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(2 * variance / repeats)


def best_rate(rates: Sequence[float], losses: np.ndarray) -> BestRate | None:
    """Return the rate with the lowest loss; `losses` [rates, repeats].

    Return None with fewer than three rates, and if a repeat's parabola has no minimum between the tried
    rates: the losses then do not determine it.
    """
    if len(rates) < 3:
        return None
    places = np.log(rates)
    found = []
    for column in losses.T:
        square, linear, _ = np.polyfit(places - places.mean(), column, 2)
        lowest = places.mean() - linear / (2 * square) if square > 0 else math.inf
        if not places.min() <= lowest <= places.max():
            return None
        found.append(lowest)
    middle, repeats = float(np.mean(found)), len(found)
    if repeats < 2:
        return BestRate(math.exp(middle), None, None)
    half = float(stdtrit(repeats - 1, (1 + CONFIDENCE) / 2) * np.std(found, ddof=1) / math.sqrt(repeats))
    return BestRate(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def to_dict(comparison: Comparison) -> Mapping[str, object]:
    """Return JSON-serializable data; differences are fractions, not percent."""
    texts = {
        text: {
            name: {
                "perplexity": one.perplexity,
                "repeats": one.repeats,
                "difference": one.difference
                and [one.difference.low, one.difference.middle, one.difference.high],
            }
            for name, one in candidates.items()
        }
        for text, candidates in comparison.texts.items()
    }
    best = comparison.best_rate
    return {
        "texts": texts,
        "best": comparison.best,
        "best_rate": best and [best.low, best.rate, best.high],
        "missing": comparison.missing,
    }
