"""The changes of the main path's rate: to the rates of later versions, or as a falling power of the step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_lrpath.schedule.curves import Exact


@dataclass(frozen=True)
class Move:
    """A linear change of the rate from position `start` to `start + length`, where it reaches `rate`."""

    start: int
    length: int
    rate: float


@dataclass(frozen=True)
class MainRate:
    """The main path's rate after its warm-up, if it does not stay at max_lr.

    - `moves`: in order; each begins when the one before it is complete, or later.
    - `power`, `begin`: from position `begin` on the rate is max_lr · (begin / position)^power; constant if 0.

    The rate never falls below min_lr. The rate at a position does not depend on later moves, so that a
    move can be appended.

    Raises ValueError if the parts are inconsistent.
    """

    moves: tuple[Move, ...] = ()
    power: float = 0.0
    begin: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.power) and self.power >= 0) or (self.power and self.begin < 1):
            raise ValueError(
                f"a falling rate needs a power from 0 and a begin from 1, not {self.power}, {self.begin}"
            )
        if self.power and self.moves:
            raise ValueError("the rate either falls with a power or moves to rates of its own")
        place = 0
        for move in self.moves:
            if move.length < 0 or move.start < place or not (math.isfinite(move.rate) and move.rate > 0):
                raise ValueError(f"{move} does not follow on the one before it")
            place = move.start + move.length

    def at(self, position: Exact, max_lr: float, min_lr: float) -> float:
        """Return the rate at a position after the warm-up."""
        if self.power:
            ratio = 1.0 if position <= self.begin else float(Fraction(self.begin) / position)
            return max(min_lr, max_lr * math.pow(ratio, self.power))
        rate = max_lr
        for move in self.moves:
            if position < move.start:
                break
            if position >= move.start + move.length:
                rate = move.rate
                continue
            share = float(Fraction(position - move.start) / move.length)
            return max(min_lr, rate + share * (move.rate - rate))
        return max(min_lr, rate)

    @property
    def corners(self) -> list[int]:
        """Return the positions at which the slope of the curve changes."""
        ends = [place for move in self.moves for place in (move.start, move.start + move.length)]
        return [*ends, *([self.begin] if self.power else [])]

    def scaled(self, factor: int) -> MainRate:
        """Return the same changes in other units: each position becomes `factor` positions."""
        moves = tuple(Move(one.start * factor, one.length * factor, one.rate) for one in self.moves)
        return replace(self, moves=moves, begin=self.begin * factor)

    def times(self, ratio: float) -> MainRate:
        """Return the same changes with all rates multiplied by `ratio`; max_lr is an argument of `at`."""
        return replace(self, moves=tuple(replace(one, rate=one.rate * ratio) for one in self.moves))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable data, which `from_dict` converts back to an equal object."""
        return {"moves": [asdict(one) for one in self.moves], "power": self.power, "begin": self.begin}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MainRate:
        """Return the object that `to_dict` converted."""
        return cls(tuple(Move(**one) for one in values["moves"]), values["power"], values["begin"])
