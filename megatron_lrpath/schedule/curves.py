"""The formulas of the decays, as shares of (max−min), and the exact fractions of decimals in plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

Exact = int | Fraction
Coefficient = Callable[[float], float]
"""The share of (max−min) that is left after the share `u` of a decay: 1 at u=0, 0 at u=1."""


def linear(u: float) -> float:
    """Return 1 − u."""
    return 1.0 - u


def cosine(u: float) -> float:
    """Return ½(1 + cos πu)."""
    return 0.5 * (math.cos(math.pi * u) + 1.0)


def exponential(u: float) -> float:
    """Return 2·½^u − 1."""
    return 2.0 * math.pow(0.5, u) - 1.0


def minus_sqrt(u: float) -> float:
    """Return 1 − √u."""
    return 1.0 - math.sqrt(u)


@lru_cache
def exact_decimal(value: float) -> Fraction:
    """Return the decimal number as it was written: 0.1 is one tenth, so a tenth of 1,000 steps is 100."""
    return Fraction(repr(float(value)))


def tenth(rate: float) -> float:
    """Return a tenth of a rate in decimal: 3e-5 of 3e-4, where a division gives 2.9999999999999997e-05."""
    return float(exact_decimal(rate) / 10)
