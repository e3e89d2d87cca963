"""What a loss law reads off a learning-rate curve: its area, how far it was annealed, its single drops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from megatron_lrpath.schedule import LRPath

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

DROPS = 48
"""Groups of neighbouring drops of a curve that the multi-power law sums over, at most."""


@dataclass(frozen=True)
class Scale:
    """What makes a fit's numbers close to 1: the highest rate, and the area where the first version ends.

    `warmup` is in steps; rises of the rate in it do not count as (negative) annealing.
    """

    max_lr: float
    area: float
    warmup: int


@dataclass(frozen=True)
class Areas:
    """One curve read at some of its steps, all of shape [n], in units of `Scale.area`."""

    forward: F64
    annealed: F64


@dataclass(frozen=True)
class Drops:
    """The drops of one curve that lie before each of the steps it is read at, flat.

    `row` [m] is the index of the step in [0, n), `size` [m] the drop over max_lr, `rate` [m] the rate after
    it over max_lr, `since` [m] the area from the drop to the step; `forward` [n] is the whole area.
    """

    forward: F64
    row: I64
    size: F64
    rate: F64
    since: F64


def rates_of(path: LRPath, first: int, last: int, most: int | None = None) -> F64:
    """The rates of the steps first+1 to last (step s is read at position s−1), shape [last−first].

    With `most` a longer curve is read at about so many positions and drawn straight in between.
    """
    count = last - first
    stride = math.ceil(count / most) if most and count > most else 1
    places = np.arange(first, last, stride)
    rates = np.array([path.lr_at(int(place)) for place in places], dtype=np.float64)
    return rates if stride == 1 else np.interp(np.arange(first, last), places, rates)


def drops_of(rates: F64, warmup: int) -> F64:
    """How much the rate fell before each step, 0 up to the end of the warm-up; a later rise is negative."""
    drops = -np.diff(rates, prepend=rates[:1])
    drops[: warmup + 1] = 0.0
    return drops


def read_areas(rates: F64, steps: I64, scale: Scale, memory: float) -> Areas:
    """S1 and S2 of Tissue et al. (arXiv 2408.11029, eq. 1) at some steps (counted from 1).

    S1 = Σ η; S2 = Σ m_i with m_i = memory·m_{i−1} + (η_{i−1} − η_i), a linear filter of the drops.
    """
    momentum = lfilter([1.0], [1.0, -memory], drops_of(rates, scale.warmup))
    index = steps - 1
    return Areas(np.cumsum(rates)[index] / scale.area, np.cumsum(momentum)[index] / scale.area)


def read_drops(rates: F64, steps: I64, scale: Scale) -> Drops:
    """The drops that the multi-power law (arXiv 2503.12811) sums over, neighbours taken together."""
    area = np.cumsum(rates) / scale.area
    before = area - rates / scale.area  # the area up to, not including, each step
    drops = drops_of(rates, scale.warmup)
    index = steps - 1
    groups = _groups(drops)
    if not groups:
        none = np.zeros(0)
        return Drops(area[index], np.zeros(0, dtype=np.int64), none, none, none)
    place = np.array(
        [group[np.abs(drops[group]).cumsum().searchsorted(_half(drops, group))] for group in groups]
    )
    size = np.array([drops[group].sum() for group in groups]) / scale.max_lr
    rate = np.maximum(rates[place], 1e-6 * scale.max_lr) / scale.max_lr
    row, column = np.nonzero(index[:, None] >= place[None, :])
    since = area[index][row] - before[place][column]
    return Drops(area[index], row, size[column], rate[column], since)


def _groups(drops: F64) -> list[I64]:
    """The steps with a drop, in at most `DROPS` stretches with about the same sum each."""
    steps = np.flatnonzero(drops)
    if not len(steps):
        return []
    share = np.abs(drops[steps]).cumsum()
    number = np.minimum((share / share[-1] * DROPS).astype(np.int64), DROPS - 1)
    return np.split(steps, np.flatnonzero(np.diff(number)) + 1)


def _half(drops: F64, group: I64) -> float:
    return float(np.abs(drops[group]).sum() / 2)
