"""The two laws of the loss as a function of the learning-rate curve, with their derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Protocol

import numpy as np

from megatron_lrpath.advise.areas import F64, I64, Areas, Drops, Scale, read_areas, read_drops

MEMORIES = (0.9, 0.97, 0.99, 0.997, 0.999, 0.9997)
"""Values of λ that are tried: 0.999 is the authors', for runs of tens of thousands of steps."""

POWER = 0.5
"""What the power a of both laws is expected to be, before any losses are seen, ..."""
POWER_SPREAD = 0.15
"""... and the relative deviation from it that is not surprising. The losses of a first version hardly tell the power
from the floor, and left alone fits run to a small power without a floor, which predicts later versions far too low; the
many losses of later versions outweigh this."""

Bounds = tuple[tuple[float, float], ...]


class Law(Protocol):
    """A law: what it reads off a curve, its value and derivatives there, and where a fit may begin."""

    name: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]
    bounds: ClassVar[Bounds]

    def read(self, rates: F64, steps: I64, scale: Scale) -> Any:
        """What `value` needs of a curve (the rate of every step) at some of its steps."""

    def stack(self, parts: Sequence[Any]) -> Any:
        """Several curves' readings as one."""

    def value(self, parameters: F64, read: Any) -> tuple[F64, F64]:
        """Losses [n] in nats and their derivatives [n, parameters]."""

    def starts(self, losses: F64) -> list[F64]:
        """Where fits to losses like these may begin."""


@dataclass(frozen=True)
class Tissue:
    """L = L0 + A·S1^(−a) − C·S2, Tissue et al. (arXiv 2408.11029); parameters (ln L0, ln A, a, C)."""

    memory: float = 0.999
    name: ClassVar[str] = "Tissue et al."
    parameters: ClassVar[tuple[str, ...]] = ("ln L0", "ln A", "a", "C")
    bounds: ClassVar[Bounds] = ((-12.0, 6.0), (-12.0, 6.0), (0.01, 4.0), (0.0, 1e4))

    def read(self, rates: F64, steps: I64, scale: Scale) -> Areas:
        return read_areas(rates, steps, scale, self.memory)

    def stack(self, parts: Sequence[Areas]) -> Areas:
        return Areas(
            np.concatenate([part.forward for part in parts]),
            np.concatenate([part.annealed for part in parts]),
        )

    def value(self, parameters: F64, read: Areas) -> tuple[F64, F64]:
        floor, scale = np.exp(parameters[:2])
        power = scale * read.forward ** -parameters[2]
        slopes = [np.full_like(power, floor), power, -power * np.log(read.forward), -read.annealed]
        return floor + power - parameters[3] * read.annealed, np.stack(slopes, axis=1)

    def starts(self, losses: F64) -> list[F64]:
        low, high = float(losses.min()), float(losses.max())
        return [
            np.array([*_level(share * low, high), power, gain])
            for share, power, gain in product((0.5, 0.8, 0.95), (0.15, 0.5, 1.0), (0.05, 0.5))
        ]


@dataclass(frozen=True)
class MultiPower:
    """L = L0 + A·S^(−a) − B·Σ (η_{k−1}−η_k)·G(η_k^(−g)·S_k), G(x) = 1 − (Cx+1)^(−b) (arXiv 2503.12811).

    Parameters (ln L0, ln A, a, ln B, ln C, ln b, g); S includes the warm-up.
    """

    name: ClassVar[str] = "multi-power law"
    parameters: ClassVar[tuple[str, ...]] = ("ln L0", "ln A", "a", "ln B", "ln C", "ln b", "g")
    bounds: ClassVar[Bounds] = (
        (-12.0, 6.0),
        (-12.0, 6.0),
        (0.01, 4.0),
        (-12.0, 6.0),
        (-6.0, 12.0),
        (-4.0, 3.0),
        (0.0, 1.5),
    )

    def read(self, rates: F64, steps: I64, scale: Scale) -> Drops:
        return read_drops(rates, steps, scale)

    def stack(self, parts: Sequence[Drops]) -> Drops:
        rows = np.cumsum([0, *(len(part.forward) for part in parts[:-1])])
        return Drops(
            forward=np.concatenate([part.forward for part in parts]),
            row=np.concatenate([part.row + start for part, start in zip(parts, rows, strict=True)]),
            size=np.concatenate([part.size for part in parts]),
            rate=np.concatenate([part.rate for part in parts]),
            since=np.concatenate([part.since for part in parts]),
        )

    def value(self, parameters: F64, read: Drops) -> tuple[F64, F64]:
        floor, scale = np.exp(parameters[:2])
        gain, speed, bend = np.exp(parameters[3:6])
        power = scale * read.forward ** -parameters[2]
        logs = np.log(read.rate)
        argument = speed * np.exp(-parameters[6] * logs) * read.since
        log_base = np.log1p(argument)
        left = np.exp(-bend * log_base)
        steep = gain * read.size * bend * left * argument / (1.0 + argument)  # d/d ln argument

        def summed(values: F64) -> F64:
            return np.bincount(read.row, weights=values, minlength=len(power))

        annealed = summed(gain * read.size * (1.0 - left))
        slopes = [
            np.full_like(power, floor),
            power,
            -power * np.log(read.forward),
            -annealed,
            -summed(steep),
            -summed(gain * read.size * bend * log_base * left),
            summed(steep * logs),
        ]
        return floor + power - annealed, np.stack(slopes, axis=1)

    def starts(self, losses: F64) -> list[F64]:
        low, high = float(losses.min()), float(losses.max())
        return [
            np.array(
                [
                    *_level(share * low, high),
                    power,
                    np.log(gain),
                    speed,
                    -0.5,
                    0.4,
                ]
            )
            for share, power, gain, speed in product((0.6, 0.9), (0.2, 0.6), (0.1, 0.5), (1.0, 4.0))
        ]


def _level(floor: float, high: float) -> tuple[float, float]:
    """ln L0 and ln A of a law that falls from about `high` towards `floor`."""
    return float(np.log(floor)), float(np.log(max(high - floor, 1e-3) / 2))
