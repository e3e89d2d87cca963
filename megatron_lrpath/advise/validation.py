"""From the law of the training loss to losses on the validation set, by what has been evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_lrpath.advise.areas import F64, Drops, Scale, read_drops
from megatron_lrpath.advise.curves import JITTER, Checkpoints, Curve
from megatron_lrpath.advise.fit import OFF, Fit, fit_law, gather

GAIN_SPREAD = 0.15
"""Share of a decay's gain in training, as a standard deviation, that its gain in validation may differ by."""

FIRST_TEXT = np.array([0])
"""The validation text is the same for all versions: the law is read without the levels of their own texts."""


def fit_path(path: Checkpoints, scale: Scale, samples: int, seed: int = 0) -> tuple[Fit, ...]:
    """The law fitted to the main path's validation losses, and `samples` times to others that might have been."""
    data = gather([path], scale)
    fit = fit_law(data)
    rng = np.random.default_rng(seed)
    fits = [fit]
    for _ in range(samples):
        logs = data.logs + rng.normal(0, JITTER, len(data.logs))
        fits.append(fit_law(replace(data, logs=logs, expectation=data.expectation.drawn(rng)), [fit.start]))
    return tuple(fits)


@dataclass(frozen=True)
class Validation:
    """What turns a law of the training loss into validation losses.

    `fits`: the law and its samples. `branches`: those that have been evaluated, at least one. `main`: the main path.
    `path`: the law of its validation losses and as many samples; empty where too few checkpoints were evaluated.
    With it a branch ends at the main path's validation loss minus `share` of what the decay gains in training.
    Without it the branch ends at its training loss. What the evaluated branches lie above that is added, see
    `offsets`.
    """

    fits: tuple[Fit, ...]
    branches: tuple[Curve, ...]
    main: Curve
    path: tuple[Fit, ...] = ()

    @cached_property
    def offsets(self) -> dict[int, F64]:
        """By version with evaluated branches: how much (nats) they lie above what is made of every fit, [1 + samples].

        The training loss falls faster than validation, so each version's own branches tell.
        """
        found: dict[int, list[F64]] = {}
        for curve in self.branches:
            found.setdefault(curve.version, []).append(
                (curve.validation or 0.0) - self._bare(curve.end(self._scale), curve.version)
            )
        return {version: np.mean(offsets, axis=0) for version, offsets in found.items()}

    def ends_at(self, read: Drops, index: int, told: int) -> F64:
        """The validation loss (nats a token) at the end of a branch of version `index` by every fit, [1 + samples].

        `told`: the version whose evaluated branches tell the level.
        """
        return self._bare(read, index) + self.offsets[told]

    @cached_property
    def share(self) -> F64:
        """The share of a decay's gain in training that it gains in validation by every fit, [1 + samples].

        Between what the evaluated branches tell, in the mean, and 1, which is as sure as `GAIN_SPREAD` says. A branch
        is as sure as the main path is known at its end (`OFF`, and what its samples differ by), and all together are
        no surer than the surest: the main path is the same. A decay that gains nothing tells nothing.
        """
        shares, weights = [], []
        for curve in self.branches:
            level, trained = self._main_ends[curve.version]
            gain = np.maximum(trained - _losses(self.fits, curve.end(self._scale)), 1e-6 * level)
            shares.append((level - (curve.validation or 0.0)) / gain)
            weights.append(gain**2 / ((OFF * level) ** 2 + np.var(level)))
        told, sure = np.average(shares, axis=0, weights=weights), np.max(weights, axis=0)
        return (sure * told + GAIN_SPREAD**-2) / (sure + GAIN_SPREAD**-2)

    def _bare(self, read: Drops, index: int) -> F64:
        """`ends_at` before the evaluated branches have told the level."""
        ends = _losses(self.fits, read)
        if not self.path:
            return ends
        level, trained = self._main_ends[index]
        return level - self.share * (trained - ends)

    @cached_property
    def _main_ends(self) -> list[tuple[F64, F64]]:
        """Validation and training loss by every fit of the main path at each version's end, reached or not."""
        more = np.full(max(0, int(self.main.ends[-1]) - len(self.main.rates)), self._scale.max_lr)
        rates = np.concatenate([self.main.rates, more])
        reads = [read_drops(rates, np.array([last]), self._scale) for last in self.main.ends]
        return [(_losses(self.path, read), _losses(self.fits, read)) for read in reads]

    @property
    def _scale(self) -> Scale:
        return self.fits[0].scale


def _losses(fits: Sequence[Fit], read: Drops) -> F64:
    """The losses of every fit, [fits], on the validation text but for its level."""
    return np.array([fit.losses_of(read, FIRST_TEXT)[0] for fit in fits])
