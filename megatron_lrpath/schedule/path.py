"""The learning rate of one run as a function of the position."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from megatron_lrpath.schedule.curves import Exact
from megatron_lrpath.schedule.main_path import MainRate
from megatron_lrpath.schedule.styles import Schedule, branch_rate, whole_rate

SHAPES = ("whole", "plateau", "branch", "floor")


@dataclass(frozen=True)
class LRPath:
    """The learning rate of one run, exact at every position.

    **The position of a step's rate.** A position is the amount consumed before: steps in a plan, samples
    inside Megatron. Step s (from 1) has the rate of position s−1 in steps, which is (s−1)·global_batch_size
    in samples, because Megatron calls its scheduler after the optimizer's step. With a warm-up of W steps,
    step 1 has the rate 0 and step W+1 is the first at `max_lr`; the last step of a run that ends at E has the
    rate of position E−1, one position before a decay is complete.

    - `shape`: "whole" (warm-up, then the whole schedule), "plateau" (warm-up, then max_lr forever: the main
      path), "branch" (a complete fast decay from max_lr), "floor" (min_lr all along: CPT's KeepMin).
    - `start`, `end`: positions where the curve begins and where it is complete.
    - `warmup`: positions of linear warm-up from 0 to max_lr after `start`; only for "whole" and "plateau".
    - `cycle`: length of the decay cycle in positions from `start`, warm-up included; at least end − start.
      None: exactly that. math.inf: the rate never decays (Figures 4 and 5 of the paper).
    - `peak`: the rate from which a "branch" or a "whole" schedule decays, where it is not max_lr: what the main path
      has where the branch leaves it. None: max_lr.
    - `main`: how the rate of a "plateau" changes on its way; None: it stays at max_lr.
    - `unit`: positions that make a step (1 in steps, the global batch size in samples). Only an inverse
      square root without any warm-up reads it, as its time scale of one step.

    Raises ValueError if the parts are inconsistent.
    """

    schedule: Schedule
    shape: str
    start: int
    end: int
    warmup: int = 0
    cycle: float | None = None
    unit: int = 1
    peak: float | None = None
    main: MainRate | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {self.shape!r}")
        if not 0 <= self.start <= self.end:
            raise ValueError(f"a curve needs 0 <= start <= end, not {self.start} and {self.end}")
        if self.unit < 1:
            raise ValueError(f"unit must be at least 1, not {self.unit}")
        self._check_warmup()
        self._check_cycle()
        self._check_rates()

    @property
    def begins_at(self) -> float:
        """The rate after the warm-up, from which a decay begins."""
        return self.schedule.max_lr if self.peak is None else self.peak

    @property
    def top(self) -> float:
        """The highest rate that the curve can have."""
        moves = [move.rate for move in self.main.moves] if self.main else []
        return max(self.begins_at, *moves) if moves else self.begins_at

    @property
    def corners(self) -> list[int]:
        """The positions at which the slope of the curve changes, without its ends."""
        return [self.start + self.warmup, *(self.main.corners if self.main else [])]

    def lr_at(self, position: float | Fraction) -> float:
        """Return the rate at a position; beyond `end` it is the rate at `end`.

        Raise ValueError for a position before `start`.
        """
        if not position >= self.start:
            raise ValueError(f"position {position} lies before the curve's start {self.start}")
        if self.shape == "floor":
            return self.schedule.min_lr
        if self.shape == "plateau" and position >= self.start + self.warmup:
            if self.main is None:
                return self.schedule.max_lr
            return self.main.at(_exact(position), self.schedule.max_lr, self.schedule.min_lr)
        t = _exact(min(position, self.end)) - self.start
        if t < self.warmup:
            return self.begins_at * float(t / self.warmup)
        return self._decayed(t - self.warmup)

    def scaled(self, factor: int) -> LRPath:
        """Return the curve in other units (steps to samples): `scaled(g).lr_at(s*g) == lr_at(s)`, bitwise."""
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
            main=None if self.main is None else self.main.scaled(factor),
        )

    def with_rates(self, max_lr: float, min_lr: float) -> LRPath:
        """Return the curve between other rates: its own rates keep their ratio to max_lr, at least min_lr."""
        ratio = max_lr / self.schedule.max_lr
        return replace(
            self,
            schedule=replace(self.schedule, max_lr=max_lr, min_lr=min_lr),
            peak=None if self.peak is None else max(self.peak * ratio, min_lr),
            main=None if self.main is None else self.main.times(ratio),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable dict, an infinite cycle as "inf"; `from_dict` returns an equal curve.

        Entries for its own rates are only present if it has any, so that older dicts stay equal.
        """
        own: dict[str, Any] = {} if self.peak is None else {"peak": self.peak}
        if self.main is not None:
            own["main"] = self.main.to_dict()
        return own | {
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
        """Return the curve that `to_dict` was called on."""
        cycle = math.inf if values.get("cycle") == "inf" else values.get("cycle")
        main = MainRate.from_dict(values["main"]) if values.get("main") else None
        schedule = Schedule(**values["schedule"])
        return cls(**(values | {"schedule": schedule, "cycle": cycle, "main": main}))

    def _decayed(self, t: Exact) -> float:
        """Return the rate `t` positions after the warm-up."""
        length = (self.end - self.start if self.cycle is None else self.cycle) - self.warmup
        if self.shape == "branch":
            return branch_rate(self._decay, t, length)
        # A curve without its own warm-up (CPT's ResetMax) keeps the time scale of the schedule.
        return whole_rate(self._decay, t, length, self.warmup or self.schedule.warmup, self.unit)

    @cached_property
    def _decay(self) -> Schedule:
        """The schedule for a decay: from `peak`."""
        return self.schedule if self.peak is None else replace(self.schedule, max_lr=self.peak)

    def _check_rates(self) -> None:
        if self.peak is not None and (
            self.shape not in ("branch", "whole") or self.peak < self.schedule.min_lr
        ):
            raise ValueError(f"a {self.shape} cannot decay from {self.peak}")
        if self.main is not None and (
            self.shape != "plateau" or min(self.main.corners, default=0) < self.start + self.warmup
        ):
            raise ValueError("only a plateau changes its rate, and after its warm-up")

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


def _exact(position: float | Fraction) -> Exact:
    """Return the position as an integer if it is one, else as the exact fraction of the float."""
    whole = int(position)
    return whole if whole == position else Fraction(position)
