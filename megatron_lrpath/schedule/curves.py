"""The formulas of the schedules: a rate from the positions since the warm-up and the length of the decay.

Positions come in as whole numbers or exact fractions and are divided once, at the end: the quotient is
correctly rounded, so a curve counted in steps and the same curve counted in samples agree to the last bit.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

from megatron_lrpath.schedule.knobs import Schedule

Exact = int | Fraction


def whole_rate(schedule: Schedule, t: Exact, length: float) -> float:
    """The whole schedule, `t` positions after its warm-up, over `length` positions (inf: it never decays).

    - cosine: min + ½(max−min)(1 + cos πu), u = t/length; linear: max − u(max−min); constant: max.
    - knee: max for `knee_explore` of the length, then linear to min (Iyer et al. 2023).
    - multi-step: max, √(max·min), min (Bi et al. 2024).
    - wsd: max, then `wsd_decay_shape` over the last `wsd_decay_fraction` (Hu et al. and Hägele et al. 2024).

    inverse-square-root does not depend on a length and stands in `inverse_square_root_rate`.
    """
    if schedule.style == "constant" or math.isinf(length):
        return schedule.max_lr
    total = int(length)
    if schedule.style == "multi-step":
        return _steps_rate(schedule, t, total, schedule.multi_step_fractions)
    if schedule.style == "knee":
        return _held_rate(schedule, t, total, exact_decimal(schedule.knee_explore), "linear")
    if schedule.style == "wsd":
        held = 1 - exact_decimal(schedule.wsd_decay_fraction)
        return _held_rate(schedule, t, total, held, schedule.wsd_decay_shape)
    return _held_rate(schedule, t, total, 0, schedule.style)


def branch_rate(schedule: Schedule, t: Exact, length: float) -> float:
    """The complete fast decay of a branch, `t` positions after it left the main path.

    The main path was the time at max_lr, so a branch is the decay alone, over its whole length: cosine stays
    cosine; knee is linear; wsd is its decay shape; multi-step is half at √(max·min), half at min. The styles
    that have no decay of their own to complete (constant, inverse-square-root) decay linearly.
    """
    if math.isinf(length):
        return schedule.max_lr
    if schedule.style == "multi-step":
        return _steps_rate(schedule, t, int(length), (0.0, 0.5))
    shape = {"cosine": "cosine", "wsd": schedule.wsd_decay_shape}.get(schedule.style, "linear")
    return _held_rate(schedule, t, int(length), 0, shape)


def inverse_square_root_rate(schedule: Schedule, t: Exact, warmup: int, unit: int) -> float:
    """max·√(W / (t+W)), not below min, as Megatron has it; `unit` stands in for a missing warm-up."""
    ratio = max(warmup, unit) / max(t + warmup, unit)
    return max(schedule.min_lr, schedule.max_lr * math.sqrt(ratio))


def decay_coefficient(shape: str, u: float) -> float:
    """The share of (max−min) that is left after the share `u` of a decay: 1 at u=0, 0 at u=1."""
    if shape == "linear":
        return 1.0 - u
    if shape == "cosine":
        return 0.5 * (math.cos(math.pi * u) + 1.0)
    if shape == "exponential":
        return 2.0 * math.pow(0.5, u) - 1.0
    if shape == "minus-sqrt":
        return 1.0 - math.sqrt(u)
    raise ValueError(f"no decay shape {shape!r}")


@lru_cache
def exact_decimal(value: float) -> Fraction:
    """The decimal number as it was written: 0.1 is one tenth, so that a tenth of 1,000 steps is 100."""
    return Fraction(repr(float(value)))


def tenth(rate: float) -> float:
    """A tenth of a rate as it would be written: 3e-5 of 3e-4, where dividing gives 2.9999999999999997e-05."""
    return float(exact_decimal(rate) / 10)


def _held_rate(schedule: Schedule, t: Exact, length: int, held: Exact, shape: str) -> float:
    """max for the share `held` of the length, then the decay shape down to min at the end."""
    begin = held * length
    if t <= begin:
        return schedule.max_lr
    coefficient = decay_coefficient(shape, float((t - begin) / (length - begin)))
    return min(schedule.max_lr, schedule.min_lr + coefficient * (schedule.max_lr - schedule.min_lr))


def _steps_rate(schedule: Schedule, t: Exact, length: int, fractions: tuple[float, float]) -> float:
    """max, middle and min, changing where the given shares of the length are over."""
    first, second = (exact_decimal(fraction) * length for fraction in fractions)
    if t < first:
        return schedule.max_lr
    return schedule.middle_lr if t < second else schedule.min_lr
