"""Compare the learning rates of the runs with the plan's, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_lrpath.plan import Run
from megatron_lrpath.report.collect import RunTree
from megatron_lrpath.wording import plural

ROUNDING = 1e-12
"""A deviation up to this fraction of the largest rate is floating-point rounding, not another rate."""


@dataclass(frozen=True)
class Deviation:
    """The logged and the planned rate of a step."""

    step: int
    real: float
    planned: float

    @property
    def absolute(self) -> float:
        return abs(self.real - self.planned)

    @property
    def relative(self) -> float:
        """The deviation relative to the planned rate; infinite if only the planned rate is 0."""
        if self.absolute == 0:
            return 0.0
        return self.absolute / self.planned if self.planned else float("inf")


@dataclass(frozen=True)
class RateCheck:
    """The check of one run: the number of compared steps, and the largest deviations.

    `outside` is the number of logged steps that the run should not have (a main path can have passed the
    end of its plan); `largest` is the largest absolute deviation, None if nothing was compared.
    """

    label: str
    compared: int
    outside: int
    largest: Deviation | None
    largest_relative: Deviation | None
    limit: float

    @property
    def equal(self) -> bool:
        """Return whether every rate equals the planned one up to rounding, and no step is outside."""
        return self.outside == 0 and (self.largest is None or self.largest.absolute <= self.limit)


def planned_rates(run: Run, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the plan's rate in each of `steps` (step s is read at position s-1), float64 of the same shape."""
    return np.array([run.path.lr_at(int(step) - 1) for step in steps], dtype=np.float64)


def check_rates(tree: RunTree) -> list[RateCheck]:
    """Compare all trainings that have logged a rate with the plan; steps without a rate are skipped."""
    checks = []
    for record in tree:
        run, history = record.run, record.history
        if not len(history):
            continue
        last_step = record.state.beyond or run.last_step
        inside = (history.steps > run.first_step) & (history.steps <= last_step)
        logged = inside & np.isfinite(history["lr"])
        steps, real = history.steps[logged], history["lr"][logged]
        rates = zip(steps, real, planned_rates(run, steps), strict=True)
        pairs = [Deviation(int(step), float(rate), float(planned)) for step, rate, planned in rates]
        absolute = max(pairs, key=lambda pair: pair.absolute, default=None)
        relative = max(pairs, key=lambda pair: pair.relative, default=None)
        limit = ROUNDING * run.path.top
        outside = int((~inside).sum())
        checks.append(RateCheck(record.label, len(pairs), outside, absolute, relative, limit))
    return checks


@dataclass(frozen=True)
class RateSummary:
    """The result of all checks as text. `level` is none (nothing to compare), good, or bad."""

    level: str
    headline: str
    details: tuple[str, ...]


def summarize(checks: list[RateCheck]) -> RateSummary:
    """Return whether the runs trained at the planned rates, and the deviations if not."""
    steps = sum(check.compared for check in checks)
    if not steps:
        text = "No learning rate has been recorded yet, so there is nothing to compare."
        return RateSummary("none", text, ())
    wrong = [check for check in checks if not check.equal]
    runs = plural(len(checks), "run")
    if wrong:
        headline = f"The learning rates are not the planned ones in {len(wrong)} of {runs}."
        details = [_largest(checks)]
        for check in wrong:
            parts, worst = [], check.largest
            if worst is not None and worst.absolute > check.limit:
                parts.append(
                    f"at step {worst.step:,} the rate was {worst.real:.6g}, planned {worst.planned:.6g} "
                    f"(absolute {worst.absolute:.3g}, relative {_relative(worst)})"
                )
            if check.outside:
                parts.append(f"{plural(check.outside, 'recorded step')} outside of the run")
            details.append(f"{check.label}: {'; '.join(parts)}")
        return RateSummary("bad", headline, tuple(details))
    exact = all(check.largest is None or check.largest.absolute == 0 for check in checks)
    scope = f"{steps:,} recorded steps of {runs}"
    headline = f"The learning rates are the planned ones{'' if exact else ' but for rounding'}: {scope}."
    return RateSummary("good", headline, (_largest(checks),))


def _largest(checks: list[RateCheck]) -> str:
    """Return the largest deviations over all runs, with their steps if they are not 0."""
    absolute = max((c.largest for c in checks if c.largest), key=lambda pair: pair.absolute)
    relative = max((c.largest_relative for c in checks if c.largest_relative), key=lambda pair: pair.relative)
    return (
        f"Largest deviation of a real rate from the planned one: {absolute.absolute:.3g} absolute, "
        f"{_relative(relative)} relative (0 is expected)."
    )


def _relative(pair: Deviation) -> str:
    return f"{pair.relative:.3g}" if np.isfinite(pair.relative) else "infinite (planned 0)"
