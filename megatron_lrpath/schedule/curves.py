"""The formulas of the schedules: a rate from the positions since the warm-up and the length of the decay.

Positions come in as whole numbers or exact fractions and are divided once, at the end: the quotient is
correctly rounded, so a curve counted in steps and the same curve counted in samples agree to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

Exact = int | Fraction
Coefficient = Callable[[float], float]
"""The share of (max−min) that is left after the share `u` of a decay: 1 at u=0, 0 at u=1."""


class Rates(Protocol):
    """The rates of a schedule."""

    @property
    def max_lr(self) -> float:
        """Where a decay begins."""

    @property
    def min_lr(self) -> float:
        """Where it ends."""

    @property
    def middle_lr(self) -> float:
        """Multi-step's rate between them."""


def held_rate(rates: Rates, t: Exact, length: int, held: Exact, coefficient: Coefficient) -> float:
    """max for the share `held` of the length, then the decay down to min at the end."""
    begin = held * length
    if t <= begin:
        return rates.max_lr
    left = coefficient(float((t - begin) / (length - begin)))
    return min(rates.max_lr, rates.min_lr + left * (rates.max_lr - rates.min_lr))


def steps_rate(rates: Rates, t: Exact, length: int, fractions: tuple[float, float]) -> float:
    """max, middle and min, changing where the given shares of the length are over."""
    first, second = (exact_decimal(fraction) * length for fraction in fractions)
    if t < first:
        return rates.max_lr
    return rates.middle_lr if t < second else rates.min_lr


def inverse_square_root_rate(rates: Rates, t: Exact, warmup: int, unit: int) -> float:
    """max·√(W / (t+W)), not below min, as Megatron has it; `unit` stands in for a missing warm-up."""
    ratio = max(warmup, unit) / max(t + warmup, unit)
    return max(rates.min_lr, rates.max_lr * math.sqrt(ratio))


def linear(u: float) -> float:
    """1 − u."""
    return 1.0 - u


def cosine(u: float) -> float:
    """½(1 + cos πu)."""
    return 0.5 * (math.cos(math.pi * u) + 1.0)


def exponential(u: float) -> float:
    """2·½^u − 1."""
    return 2.0 * math.pow(0.5, u) - 1.0


def minus_sqrt(u: float) -> float:
    """1 − √u."""
    return 1.0 - math.sqrt(u)


@lru_cache
def exact_decimal(value: float) -> Fraction:
    """The decimal number as it was written: 0.1 is one tenth, so that a tenth of 1,000 steps is 100."""
    return Fraction(repr(float(value)))


def tenth(rate: float) -> float:
    """A tenth of a rate as it would be written: 3e-5 of 3e-4, where dividing gives 2.9999999999999997e-05."""
    return float(exact_decimal(rate) / 10)
