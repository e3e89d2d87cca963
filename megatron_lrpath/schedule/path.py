"""The learning rate of one run as a function of the position."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_lrpath.schedule.curves import Exact
from megatron_lrpath.schedule.styles import Schedule, branch_rate, whole_rate

SHAPES = ("whole", "plateau", "branch", "floor")


@dataclass(frozen=True)
class LRPath:
    """The learning rate of one run, exact at every position.

    **Which position a step's rate is read at.** A position is what has been consumed before: steps in a
    plan, samples inside Megatron. Step s (counted from 1) runs at the rate of position s−1 in steps, which
    is (s−1)·global_batch_size in samples, because Megatron calls its scheduler after the optimizer's step.
    With a warm-up of W steps, step 1 has the rate 0 and step W+1 is the first at `max_lr`; the last step of
    a run that ends at E reads position E−1, one position before a decay is complete.

    - `shape`: "whole" (warm-up, then the whole schedule), "plateau" (warm-up, then max_lr forever: the main
      path), "branch" (a complete fast decay from max_lr), "floor" (min_lr all along: CPT's KeepMin).
    - `start`, `end`: positions where the curve begins and where it is complete.
    - `warmup`: positions of linear warm-up from 0 to max_lr after `start`; only for "whole" and "plateau".
    - `cycle`: length of the decay cycle in positions from `start`, warm-up included; at least end − start.
      None: exactly that. math.inf: the rate never decays (Figures 4 and 5 of the paper).
    - `unit`: positions that make a step (1 in steps, the global batch size in samples). Only an inverse
      square root without any warm-up reads it, as its time scale of one step.

    Raises ValueError when the parts do not fit together.
    """

    schedule: Schedule
    shape: str
    start: int
    end: int
    warmup: int = 0
    cycle: float | None = None
    unit: int = 1

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {self.shape!r}")
        if not 0 <= self.start <= self.end:
            raise ValueError(f"a curve needs 0 <= start <= end, not {self.start} and {self.end}")
        if self.unit < 1:
            raise ValueError(f"unit must be at least 1, not {self.unit}")
        self._check_warmup()
        self._check_cycle()

    def lr_at(self, position: float) -> float:
        """The rate at a position; beyond `end` it stays what it is at `end`.

        Raises ValueError for a position before `start`.
        """
        if not position >= self.start:
            raise ValueError(f"position {position} lies before the curve's start {self.start}")
        if self.shape == "floor":
            return self.schedule.min_lr
        if self.shape == "plateau" and position >= self.start + self.warmup:
            return self.schedule.max_lr
        t = _exact(min(position, self.end)) - self.start
        if t < self.warmup:
            return self.schedule.max_lr * float(t / self.warmup)
        return self._decayed(t - self.warmup)

    def scaled(self, factor: int) -> LRPath:
        """The curve in other units (steps to samples): `scaled(g).lr_at(s*g) == lr_at(s)`, bit for bit."""
        if factor != int(factor) or factor < 1:
            raise ValueError(f"a curve is scaled by a whole number from 1 on, not by {factor}")
        return replace(
            self,
            schedule=self.schedule.scaled(factor),
            start=self.start * factor,
            end=self.end * factor,
            warmup=self.warmup * factor,
            cycle=None if self.cycle is None else self.cycle * factor,
            unit=self.unit * factor,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, an infinite cycle as "inf"; `from_dict` gives back an equal curve."""
        return {
            "schedule": self.schedule.to_dict(),
            "shape": self.shape,
            "start": self.start,
            "end": self.end,
            "warmup": self.warmup,
            "cycle": "inf" if self.cycle == math.inf else self.cycle,
            "unit": self.unit,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LRPath:
        """The curve that `to_dict` was called on."""
        cycle = math.inf if values.get("cycle") == "inf" else values.get("cycle")
        return cls(**(values | {"schedule": Schedule(**values["schedule"]), "cycle": cycle}))

    def _decayed(self, t: Exact) -> float:
        """The rate `t` positions after the warm-up."""
        length = (self.end - self.start if self.cycle is None else self.cycle) - self.warmup
        if self.shape == "branch":
            return branch_rate(self.schedule, t, length)
        # A curve without a warm-up of its own (CPT's ResetMax) keeps the time scale of the schedule.
        return whole_rate(self.schedule, t, length, self.warmup or self.schedule.warmup, self.unit)

    def _check_warmup(self) -> None:
        if self.warmup != int(self.warmup) or self.warmup < 0:
            raise ValueError(f"warmup must be a whole number from 0 on, not {self.warmup}")
        if self.warmup and self.shape in ("branch", "floor"):
            raise ValueError(f"a {self.shape} has no warm-up")
        length = self.end - self.start
        if self.shape in ("whole", "branch") and length <= self.warmup:
            raise ValueError(
                f"{length} positions leave nothing to decay over after a warm-up of {self.warmup}"
            )

    def _check_cycle(self) -> None:
        if self.cycle is None or self.cycle == math.inf:
            return
        if self.cycle != self.cycle or self.cycle != int(self.cycle):
            raise ValueError(f"cycle must be a whole number of positions or inf, not {self.cycle}")
        if self.cycle < self.end - self.start:
            raise ValueError(f"a cycle of {self.cycle} is shorter than its run of {self.end - self.start}")
        object.__setattr__(self, "cycle", int(self.cycle))


def _exact(position: float) -> Exact:
    """The position as a whole number where it is one, else as the fraction that the float stands for."""
    whole = int(position)
    return whole if whole == position else Fraction(position)
