"""The knobs of a learning-rate schedule, checked when they are set."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

STYLES = ("cosine", "knee", "multi-step", "wsd", "linear", "constant", "inverse-square-root")
WSD_DECAY_SHAPES = ("linear", "cosine", "exponential", "minus-sqrt")


@dataclass(frozen=True)
class Schedule:
    """What is chosen once for all runs of a plan; `LRPath` makes the curve of one run out of it.

    The three fractions below are fractions of `D`, the whole schedule after its warm-up (the paper's "half of
    the steps", "80% and 90% of the steps"): a run of 10,000 steps with 2,000 steps of warm-up has D = 8,000,
    and its Knee explores for 4,000 steps after the warm-up. A cycle longer than the run makes D longer, too.

    - `max_lr`, `min_lr`: 0 <= min_lr <= max_lr, finite, max_lr > 0.
    - `warmup`: positions (steps in a plan, samples inside Megatron).
    - `knee_explore`: share of D that Knee stays at `max_lr`; in [0, 1).
    - `multi_step_fractions`: where in D multi-step goes to its middle rate and to `min_lr`; in [0, 1].
    - `wsd_decay_fraction`: the last share of D, in which WSD decays; in (0, 1].
    - `wsd_decay_shape`: one of `WSD_DECAY_SHAPES`, Megatron's formulas.

    Raises ValueError when a knob is out of its range.
    """

    style: str
    max_lr: float
    min_lr: float
    warmup: int = 0
    knee_explore: float = 0.5
    multi_step_fractions: tuple[float, float] = (0.8, 0.9)
    wsd_decay_fraction: float = 0.1
    wsd_decay_shape: str = "linear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "multi_step_fractions", tuple(self.multi_step_fractions))
        self._check_rates()
        self._check_choices()
        self._check_fractions()

    def scaled(self, factor: int) -> Schedule:
        """The same knobs where one position has become `factor` positions."""
        return replace(self, warmup=self.warmup * factor)

    @property
    def middle_lr(self) -> float:
        """Multi-step's middle rate, √(max_lr · min_lr).

        With min_lr = 0 that would be 0 as well; the rate is then √0.1 ≈ 31.6% of max_lr, what the formula
        gives at the paper's min_lr = 0.1 max_lr.
        """
        if self.min_lr == 0:
            return self.max_lr * math.sqrt(0.1)
        middle = math.sqrt(self.max_lr) * math.sqrt(self.min_lr)
        return min(max(middle, self.min_lr), self.max_lr)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; `from_dict` gives back an equal schedule."""
        return asdict(self) | {"multi_step_fractions": list(self.multi_step_fractions)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Schedule:
        """The schedule that `to_dict` was called on."""
        return cls(**values)

    def _check_rates(self) -> None:
        if not (math.isfinite(self.max_lr) and math.isfinite(self.min_lr)):
            raise ValueError(f"learning rates must be finite (max_lr={self.max_lr}, min_lr={self.min_lr})")
        if self.max_lr <= 0:
            raise ValueError(f"max_lr must be above 0, not {self.max_lr}")
        if self.min_lr < 0:
            raise ValueError(f"min_lr must not be below 0, as {self.min_lr} is")
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr {self.min_lr} is above max_lr {self.max_lr}")

    def _check_choices(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, not {self.style!r}")
        if self.wsd_decay_shape not in WSD_DECAY_SHAPES:
            raise ValueError(
                f"wsd_decay_shape must be one of {', '.join(WSD_DECAY_SHAPES)}, not {self.wsd_decay_shape!r}"
            )
        if self.warmup != int(self.warmup) or self.warmup < 0:
            raise ValueError(f"warmup must be a whole number from 0 on, not {self.warmup}")

    def _check_fractions(self) -> None:
        if not 0 <= self.knee_explore < 1:
            raise ValueError(f"knee_explore must lie in [0, 1), not be {self.knee_explore}")
        if not 0 < self.wsd_decay_fraction <= 1:
            raise ValueError(f"wsd_decay_fraction must lie in (0, 1], not be {self.wsd_decay_fraction}")
        if len(self.multi_step_fractions) != 2:
            raise ValueError(f"multi_step_fractions must be two numbers, not {self.multi_step_fractions}")
        first, second = self.multi_step_fractions
        if not 0 <= first <= second <= 1:
            raise ValueError(f"multi_step_fractions must ascend within [0, 1], unlike {first}, {second}")
