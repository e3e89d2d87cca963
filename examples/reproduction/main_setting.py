"""The findings of the main setting (`r20-*.yaml`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import drift
from certainty import Difference, difference_said
from findings import BY_VERSION, LATER, Finding, parts, small_findings, with_controls
from measured import Measured, mean_of

OWN = "cosine_alpha0.6"
"""Variation with the paper's setting of ours."""
TO_A_HUNDREDTH = f"{BY_VERSION}_to-0.01"
"""Alphas by version with a decay to a hundredth of the rate, as in the best PTFS, instead of a tenth."""
WITHIN = 0.01
"""Allowed gap in perplexity of alphas by version to the best PTFS: the goal set before the trainings."""
RATES = "rates:"
"""Prefix of the variations of PTFS at ours' rates."""


def load() -> Measured:
    """Return the rows of its experiments, without those that choose rates and schedules with own seeds."""
    rows = [row for name in ("r20-ptfs", "r20-ours", "r20-cpt") for row in Measured.load(name).rows]
    for version in LATER:
        same = Measured.load(f"r20-at-ours-rates-{version}").rows
        rows += [replace(row, variation=RATES + row.variation) for row in same]
    return Measured(rows)


def others(measured: Measured) -> list[str]:
    """Return the trained schedules of PTFS except the cosine and the rates of `ours`: the best, as chosen."""
    names = dict.fromkeys(row.variation for row in measured.rows if row.paradigm == "ptfs")
    return [name for name in names if name != "cosine" and not name.startswith(RATES)]


def between(
    measured: Measured, above: tuple[str, str], below: tuple[str, str], paired: bool = False
) -> Difference:
    """Return the mean loss of v2 to v4 of a variation and paradigm less that of another."""
    return measured.difference(mean_of(*above, LATER), mean_of(*below, LATER), paired)


def main_parts(measured: Measured) -> tuple[Difference, Difference]:
    """Return the parts as `findings.parts` does, for the mean of v2 to v4."""
    rates = (RATES + OWN, "ptfs")
    return between(measured, rates, ("cosine", "ptfs")), between(measured, (OWN, "ours"), rates)


def main_findings(measured: Measured) -> Iterator[Finding]:
    """Yield the findings on the paradigms, the two parts of ours against PTFS, and the goals."""
    ptfs, cpt, ours = ("cosine", "ptfs"), ("reset-max", "cpt"), (OWN, "ours")
    schedule, order = main_parts(measured)
    named = "20 tokens a parameter, mean of v2–v4: "
    own = "ours (cosine, α = 0.6)"
    for says, ratio, difference in (
        ("CPT is behind PTFS", "CPT / PTFS (cosine) − 1", between(measured, cpt, ptfs)),
        ("Ours is ahead of CPT", f"CPT / {own} − 1", between(measured, cpt, ours)),
        ("Ours is not behind PTFS", f"PTFS (cosine) / {own} − 1", between(measured, ptfs, ours)),
        ("The cosine is a better schedule for PTFS than ours' rates", "PTFS (ours' rates) / PTFS (cosine) − 1",
         schedule),
        ("At the same rates, data in order are worse than data shuffled together",
         f"{own} / PTFS (ours' rates) − 1", order),
    ):  # fmt: skip
        yield Finding(says, named + ratio, difference, main=True)
    yield Finding(
        "A decay to a hundredth of the rate is better than one to a tenth",
        f"{named}ours (1−√ to a tenth, by version) / ours (1−√ to a hundredth, by version) − 1",
        between(measured, (BY_VERSION, "ours"), (TO_A_HUNDREDTH, "ours"), paired=True),
    )
    for variation, end in ((BY_VERSION, "a tenth"), (TO_A_HUNDREDTH, "a hundredth")):
        by_version, best = (variation, "ours"), f"ours (1−√ to {end}, by version)"
        says = f"α by version (cost 0.495; 1−√ to {end}) is"
        for than, ratio, difference in (
            ("not behind the paper's setting (0.58)", f"{own} / {best} − 1",
             between(measured, ours, by_version, paired=True)),
            ("not behind PTFS", f"PTFS (cosine) / {best} − 1", between(measured, ptfs, by_version)),
        ):  # fmt: skip
            yield Finding(f"{says} {than}", named + ratio, difference, main=True)
        for style in others(measured):
            found = between(measured, (style, "ptfs"), by_version)
            yield Finding(
                f"{says} within 1% of a better PTFS",
                f"{named}1.01 · PTFS ({style}) / {best} − 1",
                replace(found, above=tuple(loss + math.log1p(WITHIN) for loss in found.above)),
                main=True,
            )


def all_findings() -> list[Finding]:
    """Return the measured findings of the main setting, then those of the other settings."""
    measured = [one for one in (*main_findings(load()), *drift.findings()) if one.difference.seeds]
    return measured + small_findings()


def parts_said() -> str:
    """Return a sentence per setting: the schedule's and the data order's part of ours against PTFS."""
    said = ""
    for where, (schedule, order) in (
        ("In the main setting, mean of v2 to v4", main_parts(load())),
        ("At v4 of the 1.03M setting", parts(with_controls())),
    ):
        if schedule.seeds and order.seeds:
            seeds = f"{schedule.seeds} seeds" if schedule.seeds > 1 else "one seed"
            said += (
                f"{where} ({seeds}), the perplexity of PTFS at ours' rates differs from that of PTFS (cosine) by "
                f"{difference_said(schedule)}: the part of the schedule. The perplexity of ours (cosine, α = 0.6) "
                f"differs from that of PTFS at ours' rates by {difference_said(order)}: the part of the order of the "
                "data.\n"
            )
    return said or "Not measured yet.\n"
