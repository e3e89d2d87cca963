"""Compares the learning rates that the runs really used with the plan's, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_lrpath.plan import Run
from megatron_lrpath.report.collect import RunRecord, RunTree
from megatron_lrpath.wording import plural

ROUNDING = 1e-12
"""A deviation up to this fraction of the largest rate is floating-point rounding, not another rate."""


@dataclass(frozen=True)
class Deviation:
    """One step's rate as it was and as planned."""

    step: int
    real: float
    planned: float

    @property
    def absolute(self) -> float:
        return abs(self.real - self.planned)

    @property
    def relative(self) -> float:
        """The deviation as a fraction of the planned rate; infinite where only the planned one is 0."""
        if self.absolute == 0:
            return 0.0
        return self.absolute / self.planned if self.planned else float("inf")


@dataclass(frozen=True)
class RateCheck:
    """One run: how many steps' rates were compared, and where they deviate most.

    `outside` counts the logged steps that the run should not have (a main path may have gone further than its
    plan); `largest` is the greatest absolute deviation, None where nothing was compared.
    """

    label: str
    compared: int
    outside: int
    largest: Deviation | None
    largest_relative: Deviation | None
    limit: float

    @property
    def equal(self) -> bool:
        """Whether every rate is the planned one but for rounding, and no step lies outside of the run."""
        return self.outside == 0 and (self.largest is None or self.largest.absolute <= self.limit)


def planned_rates(run: Run, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """The plan's rate in each of `steps` (step s is read at position s-1), float64 of the same shape."""
    return np.array([run.path.lr_at(int(step) - 1) for step in steps], dtype=np.float64)


def check_rates(tree: RunTree) -> list[RateCheck]:
    """Every training that has logged a rate, compared with the plan."""
    return [check_run(record) for record in tree if len(record.history)]


def check_run(record: RunRecord) -> RateCheck:
    """Compare one run's rates; steps without a rate are not compared."""
    run, history = record.run, record.history
    last_step = record.state.beyond or run.last_step
    inside = (history.steps > run.first_step) & (history.steps <= last_step)
    logged = inside & np.isfinite(history["lr"])
    steps, real = history.steps[logged], history["lr"][logged]
    planned = planned_rates(run, steps)
    pairs = [Deviation(int(s), float(r), float(p)) for s, r, p in zip(steps, real, planned, strict=True)]
    return RateCheck(
        label=record.label,
        compared=len(pairs),
        outside=int((~inside).sum()),
        largest=max(pairs, key=lambda pair: pair.absolute, default=None),
        largest_relative=max(pairs, key=lambda pair: pair.relative, default=None),
        limit=ROUNDING * run.path.schedule.max_lr,
    )


@dataclass(frozen=True)
class RateSummary:
    """The result of all checks as text. `level` is one of: none (nothing to compare), good, bad."""

    level: str
    headline: str
    details: tuple[str, ...]


def summarize(checks: list[RateCheck]) -> RateSummary:
    """Whether the runs trained at the planned rates, and by how much they did not."""
    steps = sum(check.compared for check in checks)
    if not steps:
        return RateSummary(
            "none", "No learning rate has been recorded yet, so there is nothing to compare.", ()
        )
    wrong = [check for check in checks if not check.equal]
    scope = f"{steps:,} recorded steps of {plural(len(checks), 'run')}"
    if wrong:
        share = f"{len(wrong)} of {plural(len(checks), 'run')}"
        headline = f"The learning rates are not the planned ones in {share}."
        return RateSummary("bad", headline, (_largest(checks), *(_complaint(check) for check in wrong)))
    exact = all(check.largest is None or check.largest.absolute == 0 for check in checks)
    headline = f"The learning rates are the planned ones{'' if exact else ' but for rounding'}: {scope}."
    return RateSummary("good", headline, (_largest(checks),))


def _largest(checks: list[RateCheck]) -> str:
    """The largest deviations over all runs, with the places where they are not 0."""
    absolute = max((c.largest for c in checks if c.largest), key=lambda pair: pair.absolute)
    relative = max((c.largest_relative for c in checks if c.largest_relative), key=lambda pair: pair.relative)
    return (
        f"Largest deviation of a real rate from the planned one: {absolute.absolute:.3g} absolute, "
        f"{_relative(relative)} relative (0 is expected)."
    )


def _complaint(check: RateCheck) -> str:
    parts = []
    if check.largest is not None and check.largest.absolute > check.limit:
        worst = check.largest
        parts.append(
            f"at step {worst.step:,} the rate was {worst.real:.6g}, planned {worst.planned:.6g} "
            f"(absolute {worst.absolute:.3g}, relative {_relative(worst)})"
        )
    if check.outside:
        parts.append(f"{plural(check.outside, 'recorded step')} outside of the run")
    return f"{check.label}: {'; '.join(parts)}"


def _relative(pair: Deviation) -> str:
    return f"{pair.relative:.3g}" if np.isfinite(pair.relative) else "infinite (planned 0)"
