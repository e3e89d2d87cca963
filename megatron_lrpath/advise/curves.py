"""Loss curves, averaged to the points of a fit, and the drops of the learning rate that the law reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_lrpath.schedule import LRPath

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

GROUPS = 48
"""Maximum number of groups of neighboring drops that the law sums over, for each curve."""


@dataclass(frozen=True)
class Scale:
    """The units that bring a fit's numbers close to 1: the highest rate, and the area at the end of the first
    version.

    `warmup` is in steps; increases of the rate during warm-up do not count as (negative) annealing.
    """

    max_lr: float
    area: float
    warmup: int

    @property
    def steps(self) -> float:
        """The number of steps at the highest rate that make up `area`."""
        return self.area / self.max_lr


@dataclass(frozen=True)
class Drops:
    """For each step at which a curve is read, the preceding drops of the rate, in flat arrays.

    `row` [m] is the index of the step in [0, n), `size` [m] the drop divided by max_lr, `rate` [m] the
    rate after the drop divided by max_lr, `since` [m] the area from the drop to the step; `forward` [n] is
    the whole area. Areas are in units of `Scale.area`.
    """

    forward: F64
    row: I64
    size: F64
    rate: F64
    since: F64


def rates_of(path: LRPath, first: int, last: int, most: int | None = None) -> F64:
    """Return the rates of the steps first+1 to last (step s is at position s−1), shape [last−first].

    With `most`, a longer curve is read at about that many positions and interpolated linearly between
    them.
    """
    count = last - first
    stride = math.ceil(count / most) if most and count > most else 1
    places = np.arange(first, last, stride)
    rates = np.array([path.lr_at(int(place)) for place in places], dtype=np.float64)
    return rates if stride == 1 else np.interp(np.arange(first, last), places, rates)


def read_drops(rates: F64, steps: I64, scale: Scale) -> Drops:
    """Return the drops of a curve (the rate of every step) before some of its steps (from 1); neighboring
    drops are grouped.
    """
    area = np.cumsum(rates) / scale.area
    before = area - rates / scale.area  # the area up to, not including, each step
    drops = -np.diff(rates, prepend=rates[:1])  # before each step; a later rise is negative
    drops[: scale.warmup + 1] = 0.0
    index = steps - 1
    groups = _groups(drops)
    sizes = [np.abs(drops[group]) for group in groups]
    halves = [size.cumsum().searchsorted(float(size.sum() / 2)) for size in sizes]
    place = np.array([group[half] for group, half in zip(groups, halves, strict=True)], dtype=np.int64)
    size = np.array([drops[group].sum() for group in groups]) / scale.max_lr
    rate = np.maximum(rates[place], 1e-6 * scale.max_lr) / scale.max_lr
    row, column = np.nonzero(index[:, None] >= place[None, :])
    since = area[index][row] - before[place][column]
    return Drops(area[index], row, size[column], rate[column], since)


def join_drops(parts: Sequence[Drops]) -> Drops:
    """Concatenate the drops of several curves."""
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


def _groups(drops: F64) -> list[I64]:
    """Return the steps with a drop, in at most `GROUPS` groups with about the same sum each."""
    steps = np.flatnonzero(drops)
    if not len(steps):
        return []
    share = np.abs(drops[steps]).cumsum()
    number = np.minimum((share / share[-1] * GROUPS).astype(np.int64), GROUPS - 1)
    return np.split(steps, np.flatnonzero(np.diff(number)) + 1)


POINTS = 60
"""Maximum number of points for each version and curve."""
SHORTEST = 4
"""Minimum number of steps averaged in a point, because the loss of a single batch is noisy."""
DECAYED = 0.5
"""A branch counts as decayed when its rate is at most this fraction of the maximum."""

JITTER = 3e-3
"""Relative deviation of a model at the maximum rate between checkpoints: the deviation of those in
`docs/reproduction.md` from their law."""
FEWEST_CHECKPOINTS = 4
"""Minimum number of evaluated checkpoints of the main path for a law with three parameters; the last must have at least
twice the steps of the first."""


@dataclass(frozen=True)
class Points:
    """Arrays of shape [n]: middle step, ln of the mean loss, its standard deviation from noise alone, version
    (from 0).
    """

    steps: I64
    logs: F64
    deviations: F64
    versions: I64


@dataclass(frozen=True)
class Curve:
    """The curve of a run including the rates of its ancestors from step 1 on; the losses are the run's own.

    `rates` [last step]: the rate of every step, ancestors' first. `logged`, `losses` [rows]: the run's own
    steps and their losses (nats per token), ascending, finite. `ends` [versions]: each version's last
    step. `validation`: the loss on the validation set at the end of the run (nats per token); None if it
    was not evaluated. `main`: for a branch, the main path if it has logged the same steps, and so the same
    batches. The losses are then divided by the main path's, because the difficulty of a batch is common to
    both models. `checkpoints`: for the main path, the validation losses at its evaluated checkpoints as a
    separate curve.
    """

    name: str
    kind: str
    version: int
    rates: F64
    logged: I64
    losses: F64
    ends: I64
    validation: float | None = None
    main: Curve | None = None
    checkpoints: Checkpoints | None = None

    @cached_property
    def baseline(self) -> F64:
        """The divisor of the losses [rows]: the main path's losses at the same steps, or 1."""
        if self.main is None:
            return np.ones(len(self.losses))
        return self.main.losses[np.searchsorted(self.main.logged, self.logged)]

    @cached_property
    def points(self) -> Points:
        """The means over ranges of steps, each within one version; relative to the main path's, see `main`."""
        versions = np.searchsorted(self.ends, self.logged)
        groups = []
        for version in np.unique(versions):
            rows = np.flatnonzero(versions == version)
            groups += np.array_split(rows, max(1, min(POINTS, len(rows) // SHORTEST)))
        return Points(
            steps=np.array([self.logged[rows[len(rows) // 2]] for rows in groups], dtype=np.int64),
            logs=np.log([self.losses[rows].mean() / self.baseline[rows].mean() for rows in groups]),
            deviations=self.noise / np.sqrt([len(rows) for rows in groups]),
            versions=np.array([versions[rows[0]] for rows in groups], dtype=np.int64),
        )

    @cached_property
    def noise(self) -> float:
        """The standard deviation of one step's ln loss (see `main`), estimated from differences of
        neighboring steps.
        """
        return float(np.std(np.diff(np.log(self.losses / self.baseline))) / np.sqrt(2))

    @property
    def decays(self) -> bool:
        """Return whether the logged part has a decay that is long enough to fit."""
        return bool(self.rates[int(self.logged[-1]) - 1] <= DECAYED * self.rates.max())

    @property
    def complete(self) -> bool:
        """Return whether the run is logged to its end."""
        return int(self.logged[-1]) == len(self.rates)

    @property
    def tail(self) -> slice:
        """The rows of the last tenth of the run's steps, at least five; the final loss is their mean."""
        return slice(-max(5, len(self.logged) // 10), None)

    def end(self, scale: Scale) -> Drops:
        """Return the drops of the curve at its last step."""
        return read_drops(self.rates, np.array([len(self.rates)]), scale)

    def beside(self, main: Curve) -> Curve:
        """Return the branch relative to the main path if the main path has logged all of its steps and the
        noise is lower that way; otherwise return the branch itself.
        """
        if not np.isin(self.logged, main.logged).all():
            return self
        relative = replace(self, main=main)
        return relative if relative.noise < self.noise else self

    def upto(self, last: int) -> Self:
        """Return the curve as it was at step `last`."""
        inside = self.logged <= last
        cut = replace(self, rates=self.rates[:last], logged=self.logged[inside], losses=self.losses[inside])
        return replace(cut, checkpoints=self.checkpoints.upto(last)) if self.checkpoints else cut


class Checkpoints(Curve):
    """The validation losses of a run's checkpoints: each is a point, and all are measured on the same text."""

    @cached_property
    def points(self) -> Points:
        """The points of the evaluated checkpoints."""
        count = len(self.logged)
        alike = np.zeros(count, dtype=np.int64)
        return Points(self.logged, np.log(self.losses), np.full(count, JITTER), alike)


def enough(steps: Sequence[int]) -> bool:
    """Return whether evaluated checkpoints at these steps are enough for a law, see `FEWEST_CHECKPOINTS`."""
    return len(set(steps)) >= FEWEST_CHECKPOINTS and max(steps) >= 2 * min(steps)
