"""What the law of the loss reads off a learning-rate curve: its area, and its single drops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_lrpath.schedule import LRPath

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

GROUPS = 48
"""Groups of neighbouring drops of a curve that the law sums over, at most."""


@dataclass(frozen=True)
class Scale:
    """What makes a fit's numbers close to 1: the highest rate, and the area where the first version ends.

    `warmup` is in steps; rises of the rate in it do not count as (negative) annealing.
    """

    max_lr: float
    area: float
    warmup: int

    @property
    def steps(self) -> float:
        """The steps at the highest rate that make up `area`."""
        return self.area / self.max_lr


@dataclass(frozen=True)
class Drops:
    """The drops of one curve that lie before each of the steps it is read at, flat.

    `row` [m] is the index of the step in [0, n), `size` [m] the drop over max_lr, `rate` [m] the rate after
    it over max_lr, `since` [m] the area from the drop to the step; `forward` [n] is the whole area. Areas are in
    units of `Scale.area`.
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


def read_drops(rates: F64, steps: I64, scale: Scale) -> Drops:
    """The drops of a curve (the rate of every step) before some of its steps (from 1), neighbours taken together."""
    area = np.cumsum(rates) / scale.area
    before = area - rates / scale.area  # the area up to, not including, each step
    drops = _drops_of(rates, scale.warmup)
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


def join_drops(parts: Sequence[Drops]) -> Drops:
    """Several curves' drops as those of one."""
    none = np.zeros(0)
    parts = [Drops(none, np.zeros(0, dtype=np.int64), none, none, none), *parts]
    rows = np.cumsum([0, *(len(part.forward) for part in parts[:-1])])
    return Drops(
        forward=np.concatenate([part.forward for part in parts]),
        row=np.concatenate([part.row + start for part, start in zip(parts, rows, strict=True)]),
        size=np.concatenate([part.size for part in parts]),
        rate=np.concatenate([part.rate for part in parts]),
        since=np.concatenate([part.since for part in parts]),
    )


def _drops_of(rates: F64, warmup: int) -> F64:
    """How much the rate fell before each step, 0 up to the end of the warm-up; a later rise is negative."""
    drops = -np.diff(rates, prepend=rates[:1])
    drops[: warmup + 1] = 0.0
    return drops


def _groups(drops: F64) -> list[I64]:
    """The steps with a drop, in at most `GROUPS` stretches with about the same sum each."""
    steps = np.flatnonzero(drops)
    if not len(steps):
        return []
    share = np.abs(drops[steps]).cumsum()
    number = np.minimum((share / share[-1] * GROUPS).astype(np.int64), GROUPS - 1)
    return np.split(steps, np.flatnonzero(np.diff(number)) + 1)


def _half(drops: F64, group: I64) -> float:
    return float(np.abs(drops[group]).sum() / 2)
