"""The paper's findings as differences that can be measured with the same seed, and whether they hold here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from measured import Measured, interval, percent

LATER = ("v2", "v3", "v4")
SCHEDULES = ("cosine", "knee", "multi-step")
SHARED_RATE = "max_lr0.003"
"""Of Table 8: the rate of the other experiments."""
VARIANTS = ("reset-max", "rewarm-max", "keep-min")


@dataclass(frozen=True)
class Finding:
    """What the paper says, and the shares (one a seed) by which it holds: above zero is as it says."""

    says: str
    measure: str
    values: list[float]

    @property
    def verdict(self) -> str:
        """Whether it holds here, does not, or cannot be told from noise."""
        if len(self.values) < 2:
            sign = "as the paper" if self.values and self.values[0] > 0 else "not as the paper"
            return f"{sign}, one seed" if self.values else "not measured"
        mean = statistics.fmean(self.values)
        if abs(mean) <= interval(self.values):
            return "cannot be told from noise"
        return "holds" if mean > 0 else "does **not** hold"

    def cells(self) -> list[str]:
        """Its row in the table."""
        return [self.says, self.measure, percent(self.values), str(len(self.values)), self.verdict]


def paradigms(measured: Measured, corpus: str = "") -> Iterator[Finding]:
    """Tables 1 and 3: the three paradigms against each other, version by version."""
    for schedule in SCHEDULES:

        def gap(over: str, under: str, version: str, schedule: str = schedule) -> list[float]:
            return measured.ratios((schedule, over, version), (schedule, under, version))

        if not gap("ptfs", "cpt", "v2"):
            continue
        name = f"{corpus}{schedule}"
        for version in LATER:
            yield Finding(
                "CPT is behind PTFS", f"{name}, {version}: CPT / PTFS − 1", gap("cpt", "ptfs", version)
            )
        grown = [
            late - early
            for early, late in zip(gap("cpt", "ptfs", "v2"), gap("cpt", "ptfs", "v4"), strict=False)
        ]
        yield Finding("… and the gap grows with the versions", f"{name}: that gap, v4 less v2", grown)
        for version in LATER:
            yield Finding(
                "Ours is ahead of CPT", f"{name}, {version}: CPT / ours − 1", gap("cpt", "ours", version)
            )
        for version in LATER:
            yield Finding(
                "Ours is not behind PTFS", f"{name}, {version}: PTFS / ours − 1", gap("ptfs", "ours", version)
            )


def alphas(measured: Measured) -> Iterator[Finding]:
    """Table 2: a larger alpha is worth more in later versions."""
    for schedule in SCHEDULES:

        def gain(seed: int, version: str, schedule: str = schedule) -> float | None:
            small, large = (f"{schedule}_alpha{alpha}" for alpha in (0.2, 0.8))
            return measured.ratio(seed, (small, "ours", version), (large, "ours", version))

        def grown(seed: int, gain: Callable[[int, str], float | None] = gain) -> float | None:
            early, late = gain(seed, "v2"), gain(seed, "v4")
            return None if early is None or late is None else late - early

        measure = f"{schedule}: gain of α=0.8 over 0.2, v4 less v2"
        yield Finding("Larger α suit later versions", measure, measured.paired(grown))


def variants(measured: Measured) -> Iterator[Finding]:
    """Table 10: KeepMin is the worst variant of CPT, ResetMax the best."""
    for schedule in SCHEDULES:
        reset, rewarm, keep = (f"{schedule}_{variant}" for variant in VARIANTS)

        def gap(over: str, under: str, version: str) -> list[float]:
            return measured.ratios((over, "cpt", version), (under, "cpt", version))

        for version in LATER:
            name = f"{schedule}, {version}"
            yield Finding(
                "KeepMin is the worst", f"{name}: KeepMin / ResetMax − 1", gap(keep, reset, version)
            )
            yield Finding(
                "ResetMax is the best", f"{name}: RewarmMax / ResetMax − 1", gap(rewarm, reset, version)
            )


def at_rates() -> Measured:
    """Table 8, with what it shares with Tables 1 and 3, by rate."""
    shared = [
        replace(row, variation=SHARED_RATE)
        for row in Measured.load("tables-1-3").rows
        if row.variation == "cosine"
    ]
    rows = [row for row in Measured.load("table-8").rows if row.variation != SHARED_RATE]
    return Measured(sorted([*rows, *shared], key=lambda row: float(row.variation.removeprefix("max_lr"))))


def rates(measured: Measured) -> Iterator[Finding]:
    """Table 8: the lower the maximal rate, the further ours is ahead of PTFS."""
    for variation in dict.fromkeys(row.variation for row in measured.rows):
        if variation == SHARED_RATE:
            continue
        rate = variation.removeprefix("max_lr")
        for version in LATER:
            gap = measured.ratios((variation, "ptfs", version), (variation, "ours", version))
            yield Finding("Ours is not behind PTFS", f"η_max = {rate}, {version}: PTFS / ours − 1", gap)


def cycles(first: Measured, second: Measured) -> Iterator[Finding]:
    """Figures 4 and 5: a long cycle in the first stage, a complete decay in the second."""

    def lengths(measured: Measured) -> list[str]:
        return list(dict.fromkeys(row.variation for row in measured.rows))

    names = lengths(first)
    for other in names[1:]:
        better = first.ratios((names[0], "cpt", "v2"), (other, "cpt", "v2"))
        yield Finding("A long first cycle is good for the update", f"{names[0]} / {other} − 1, v2", better)
    names = lengths(second)
    for other in names[1:]:
        worse = second.ratios((other, "ours", "v2"), (names[0], "ours", "v2"))
        yield Finding("Only the complete decay is best", f"{other} / {names[0]} − 1, v2", worse)


def findings() -> list[Finding]:
    """All of them, as far as they are measured."""
    made = [
        *paradigms(Measured.load("tables-1-3")),
        *paradigms(Measured.load("novels"), "novels, "),
        *paradigms(Measured.load("gpu-paradigms"), "33M, "),
        *alphas(Measured.load("table-2")),
        *variants(Measured.load("table-10")),
        *rates(at_rates()),
        *cycles(Measured.load("figure-4"), Measured.load("figure-5")),
    ]
    return [finding for finding in made if finding.values]
