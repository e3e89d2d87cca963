"""The paper's claims as measurable differences, with a verdict on each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from certainty import Difference, difference_said, holm
from measured import Measured, Model, mean_of

LATER = ("v2", "v3", "v4")
SCHEDULES = ("cosine", "knee", "multi-step")
SHARED_RATE = "max_lr0.003"
"""Variation of Table 8 that has the rate of the other experiments."""
VARIANTS = ("reset-max", "rewarm-max", "keep-min")
BY_VERSION = "minus-sqrt_by-version"


@dataclass(frozen=True)
class Finding:
    """A claim, how it is measured, and the difference that supports it: above zero is as claimed.

    `main`: it belongs to the main findings, else to the details. Each of the two lists is corrected for its
    number.
    """

    says: str
    measure: str
    difference: Difference
    main: bool = False

    @property
    def apart(self) -> bool:
        """Return whether the finding's own 95% interval excludes zero."""
        return abs(self.difference.mean) > self.difference.half

    def verdict(self, corrected: bool) -> str:
        """Return in words whether the claim holds here; `corrected`: it passes Holm's correction."""
        good = self.difference.mean > 0
        if self.difference.seeds < 2:
            return "as claimed, one seed" if good else "not as claimed, one seed"
        if self.apart:
            verdict = "holds" if good else "does **not** hold"
            return verdict if corrected else f"{verdict}, by its own interval only"
        more = self.difference.seeds_to_settle()
        return f"open; about {more} seeds would settle it" if more else "open; no difference worth settling"

    def cells(self, corrected: bool) -> list[str]:
        """Return the finding's row in the table."""
        nats = f"{self.difference.mean:+.4f}"
        seeds = str(self.difference.seeds)
        return [
            self.says, self.measure, difference_said(self.difference), nats, seeds, self.verdict(corrected)
        ]  # fmt: skip


def finding_rows(findings: Sequence[Finding]) -> list[list[str]]:
    """Return the rows of a table of findings, corrected together for their number."""
    several = [finding for finding in findings if finding.difference.seeds > 1]
    passed = dict(zip(map(id, several), holm([one.difference.p for one in several]), strict=True))
    return [finding.cells(passed.get(id(finding), False)) for finding in findings]


def one(variation: str, paradigm: str, version: str) -> dict[Model, float]:
    """Return the weights of a single model."""
    return {(variation, paradigm, version): 1.0}


def paradigms(measured: Measured, corpus: str = "") -> Iterator[Finding]:
    """Yield the findings of Tables 1 and 3: the paradigms against each other, in the mean and by version."""
    claims = (
        ("CPT is behind PTFS", "cpt", "ptfs"),
        ("Ours is ahead of CPT", "cpt", "ours"),
        ("Ours is not behind PTFS", "ptfs", "ours"),
    )
    names = {"cpt": "CPT", "ptfs": "PTFS ({})", "ours": "ours"}
    for schedule in SCHEDULES:
        name = f"{corpus}{schedule}"
        for says, over, under in claims:
            ratio = f"{names[over]} / {names[under]} − 1".format(schedule)
            mean = measured.difference(
                mean_of(schedule, over, LATER), mean_of(schedule, under, LATER), paired=False
            )
            yield Finding(says, f"{name}, mean of v2–v4: {ratio}", mean, main=True)
            for version in LATER:
                found = measured.difference(
                    one(schedule, over, version), one(schedule, under, version), paired=False
                )
                yield Finding(says, f"{name}, {version}: {ratio}", found)
        late = one(schedule, "cpt", "v4") | one(schedule, "ptfs", "v2")
        early = one(schedule, "cpt", "v2") | one(schedule, "ptfs", "v4")
        grown = measured.difference(late, early, paired=True)
        measure = f"{name}: CPT / PTFS ({schedule}), v4 over v2"
        yield Finding("CPT falls further behind from version to version", measure, grown, main=True)


def best_ptfs(measured: Measured) -> Iterator[Finding]:
    """Yield the findings of ours with the paper's setting against the better schedules of PTFS."""
    for schedule in SCHEDULES[1:]:
        found = measured.difference(
            mean_of(schedule, "ptfs", LATER), mean_of("cosine", "ours", LATER), paired=False
        )
        measure = f"mean of v2–v4: PTFS ({schedule}) / ours (cosine, α = 0.6) − 1"
        yield Finding("Ours is not behind a better PTFS", measure, found, main=True)


def with_controls() -> Measured:
    """Return Tables 1 and 3 with alphas by version and PTFS at ours' rates (variations `rates:…`)."""
    rates = [replace(row, variation=f"rates:{row.variation}") for row in Measured.load("at-ours-rates").rows]
    return Measured([*Measured.load("tables-1-3").rows, *rates, *Measured.load("by-version").rows])


def parts(measured: Measured) -> tuple[Difference, Difference]:
    """Split the difference between v4 of ours (cosine, alpha 0.6) and of PTFS (cosine).

    Return the schedule's part (PTFS at ours' rates less PTFS (cosine)) and the data order's part (ours less
    PTFS at ours' rates).
    """
    rates = one("rates:cosine", "ptfs", "v4")
    schedule = measured.difference(rates, one("cosine", "ptfs", "v4"), paired=False)
    return schedule, measured.difference(one("cosine", "ours", "v4"), rates, paired=False)


def controls(measured: Measured) -> Iterator[Finding]:
    """Yield the findings on the parts of the schedule and the data order, and on alphas by version."""
    schedule, order = parts(measured)
    yield Finding(
        "The cosine is a better schedule for PTFS than ours' rates",
        "v4: PTFS (ours' rates) / PTFS (cosine) − 1", schedule, main=True,
    )  # fmt: skip
    yield Finding(
        "At the same rates, data in order are worse than data shuffled together",
        "v4: ours (cosine, α = 0.6) / PTFS (ours' rates) − 1", order, main=True,
    )  # fmt: skip
    mine = mean_of(BY_VERSION, "ours", LATER)
    own = measured.difference(mean_of("cosine", "ours", LATER), mine, paired=True)
    yield Finding(
        "α by version (cost 0.495) is not behind the paper's setting (0.58)",
        "mean of v2–v4: ours (cosine, α = 0.6) / ours (1−√, by version) − 1", own, main=True,
    )  # fmt: skip
    for style in ("cosine", "knee"):
        full = measured.difference(mean_of(style, "ptfs", LATER), mine, paired=False)
        yield Finding(
            "α by version (cost 0.495) is not behind PTFS",
            f"mean of v2–v4: PTFS ({style}) / ours (1−√, by version) − 1", full, main=True,
        )  # fmt: skip


def alphas(measured: Measured) -> Iterator[Finding]:
    """Yield the findings of Table 2: a larger alpha is worth more in later versions."""
    for schedule in SCHEDULES:
        small, large = (f"{schedule}_alpha{alpha}" for alpha in (0.2, 0.8))
        gained = one(small, "ours", "v4") | one(large, "ours", "v2")
        before = one(small, "ours", "v2") | one(large, "ours", "v4")
        measure = f"{schedule}: α = 0.2 / α = 0.8, v4 over v2"
        difference = measured.difference(gained, before, paired=True)
        yield Finding("Larger α suit later versions", measure, difference, main=True)


def variants(measured: Measured) -> Iterator[Finding]:
    """Yield the findings of Table 10: KeepMin is the worst variant of CPT, ResetMax the best."""
    for schedule in SCHEDULES:
        reset, rewarm, keep = (f"{schedule}_{variant}" for variant in VARIANTS)
        for says, worse, ratio in (
            ("KeepMin is the worst CPT", keep, "KeepMin / ResetMax − 1"),
            ("ResetMax is the best CPT", rewarm, "RewarmMax / ResetMax − 1"),
        ):
            mean = measured.difference(
                mean_of(worse, "cpt", LATER), mean_of(reset, "cpt", LATER), paired=True
            )
            yield Finding(says, f"{schedule}, mean of v2–v4: {ratio}", mean, main=True)
            for version in LATER:
                found = measured.difference(
                    one(worse, "cpt", version), one(reset, "cpt", version), paired=True
                )
                yield Finding(says, f"{schedule}, {version}: {ratio}", found)


def at_rates() -> Measured:
    """Return Table 8, with the rows that it shares with Tables 1 and 3, sorted by rate."""
    shared = [
        replace(row, variation=SHARED_RATE)
        for row in Measured.load("tables-1-3").rows
        if row.variation == "cosine"
    ]
    found = [row for row in Measured.load("table-8").rows if row.variation != SHARED_RATE]
    return Measured(sorted([*found, *shared], key=lambda row: float(row.variation.removeprefix("max_lr"))))


def rates(measured: Measured) -> Iterator[Finding]:
    """Yield the findings of Table 8: ours is not behind PTFS at other maximal rates."""
    for variation in dict.fromkeys(row.variation for row in measured.rows):
        if variation == SHARED_RATE:
            continue
        rate = variation.removeprefix("max_lr")
        for version in LATER:
            gap = measured.difference(
                one(variation, "ptfs", version), one(variation, "ours", version), paired=False
            )
            measure = f"η_max = {rate}, {version}: PTFS (cosine) / ours − 1"
            yield Finding("Ours is not behind PTFS", measure, gap)


def cycles(first: Measured, second: Measured) -> Iterator[Finding]:
    """Yield the findings of Figures 4 and 5: a long cycle in the first stage, a full decay in the second."""

    def lengths(measured: Measured) -> list[str]:
        return list(dict.fromkeys(row.variation for row in measured.rows))

    for base, *others in filter(None, [lengths(first)]):
        for other in others:
            better = first.difference(one(base, "cpt", "v2"), one(other, "cpt", "v2"), paired=True)
            yield Finding("A long first cycle is good for the update", f"{base} / {other} − 1, v2", better)
    for base, *others in filter(None, [lengths(second)]):
        for other in others:
            worse = second.difference(one(other, "ours", "v2"), one(base, "ours", "v2"), paired=True)
            yield Finding("Only the complete decay is best", f"{other} / {base} − 1, v2", worse)


def small_findings() -> list[Finding]:
    """Return the measured findings of the 1.03M and 33M settings."""
    paper = Measured.load("tables-1-3")
    made = [
        *controls(with_controls()),
        *paradigms(paper),
        *best_ptfs(paper),
        *paradigms(Measured.load("novels"), "novels, "),
        *paradigms(Measured.load("gpu-paradigms"), "33M, "),
        *alphas(Measured.load("table-2")),
        *variants(Measured.load("table-10")),
        *rates(at_rates()),
        *cycles(Measured.load("figure-4"), Measured.load("figure-5")),
    ]
    return [finding for finding in made if finding.difference.seeds]
