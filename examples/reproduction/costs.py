"""The figure of perplexity over cost: ours with one alpha and with alphas by version, PTFS, CPT and merges.

Every point is a difference from the paper's setting (cosine, alpha 0.6) with the same seed and processor.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import main_setting
from beyond import Sweep, load_sweep
from certainty import LEVEL, Difference, in_percent
from findings import BY_VERSION, with_controls
from measured import RESULTS, Measured, mean_of

VERSIONS = ("v2", "v4")
"""Versions that every experiment of the figure has trained."""
BLUE, GREEN, RED, PINK, GREY, BLACK = "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#59636e", "#000000"
MERGED_COST = 0.4
"""Cost of the main path of four versions alone."""


@dataclass(frozen=True)
class Point:
    """Cost (share of PTFS's steps), and the difference from the paper's setting at this cost."""

    cost: float
    difference: Difference


def one_alpha(sweep: Sweep, shape: str) -> list[Point]:
    """Return the points of a decay to a tenth of the maximum rate, by alpha."""
    own = mean_of(sweep.reference.variation, "ours", VERSIONS)
    return [
        Point(one.cost, sweep.measured.difference(mean_of(one.variation, "ours", VERSIONS), own, paired=True))
        for one in sweep.line(shape, sweep.top)
    ]


def single(measured: Measured, own: str, variation: str, paradigm: str) -> list[Point]:
    """Return the point of a setting of any paradigm, compared with the variation `own` of ours."""
    base, mine = (mean_of(*model, VERSIONS) for model in ((own, "ours"), (variation, paradigm)))
    same = (row.cost for row in measured.rows if (row.variation, row.paradigm) == (variation, paradigm))
    return [Point(next(same, 0), measured.difference(mine, base, paired=paradigm == "ours"))]


def merges(sweep: Sweep) -> list[Point]:
    """Return the point of the main path's best merge: its gap to the trained branch plus the branch's gap."""
    path = RESULTS / "merged.json"
    found: dict[float, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in json.loads(path.read_text(encoding="utf-8")) if path.exists() else []:
        if row["trained"]:
            found[row["alpha"]][row["seed"]][row["version"]] = math.log(row["merged"] / row["trained"])
    made = []
    for one in sweep.line("minus-sqrt", 0.0):
        gaps = {
            seed: statistics.fmean(by_version.values())
            for seed, by_version in found[one.alpha].items()
            if set(by_version) >= set(VERSIONS)
        }
        values = [
            math.log1p(trained) + gap
            for seed, gap in gaps.items()
            if (trained := sweep.gap(one, seed)) is not None
        ]
        made.append(Point(MERGED_COST, Difference(tuple(values), (0.0,) * len(values), paired=True)))
    return sorted((one for one in made if one.difference.seeds), key=lambda one: one.difference.mean)[:1]


Line = tuple[str, str, str, list[Point]]
"""Name, color, marker and points."""


def small_lines() -> Iterator[Line]:
    """Yield the lines of the 1.03M setting."""
    sweep = load_sweep()
    if not sweep.settings:
        return
    measured = with_controls()
    yield "ours, one α, cosine (the paper's)", BLUE, "o", one_alpha(sweep, "cosine")
    yield "ours, one α, 1−√", GREEN, "o", one_alpha(sweep, "minus-sqrt")
    yield "ours, α by version, 1−√", RED, "*", single(measured, "cosine", BY_VERSION, "ours")
    yield "merges of the main path", PINK, "X", merges(sweep)
    yield "CPT, cosine (the paper's)", GREY, "s", single(measured, "cosine", "cosine", "cpt")
    yield "PTFS, cosine (the paper's)", BLACK, "D", single(measured, "cosine", "cosine", "ptfs")
    yield "PTFS, knee (best measured)", BLACK, "P", single(measured, "cosine", "knee", "ptfs")


def main_lines() -> Iterator[Line]:
    """Yield the lines of the main setting."""
    measured = main_setting.load()

    def by_alpha(shape: str) -> list[Point]:
        names = (f"{shape}_alpha{alpha}" for alpha in (0.2, 0.4, 0.6, 0.8))
        return [point for name in names for point in single(measured, main_setting.OWN, name, "ours")]

    yield "ours, one α, cosine (the paper's)", BLUE, "o", by_alpha("cosine")
    yield "ours, one α, 1−√", GREEN, "o", by_alpha("minus-sqrt")
    for variation, end in ((BY_VERSION, "a tenth"), (main_setting.TO_A_HUNDREDTH, "a hundredth")):
        found = single(measured, main_setting.OWN, variation, "ours")
        yield f"ours, α by version, 1−√ to {end}", RED, "*", found
    yield "CPT, cosine (the paper's)", GREY, "s", single(measured, main_setting.OWN, "reset-max", "cpt")
    for style in ("cosine", *main_setting.others(measured)):
        yield (
            f"PTFS, {style}",
            BLACK,
            "D" if style == "cosine" else "P",
            single(measured, main_setting.OWN, style, "ptfs"),
        )


def lines() -> list[Line]:
    """Return the lines of the main setting if it has ours, PTFS and CPT, else of the 1.03M setting."""
    for found in (main_lines(), small_lines()):
        measured = [
            (name, colour, marker, [one for one in points if one.difference.seeds])
            for name, colour, marker, points in found
        ]
        drawn = [line for line in measured if line[3]]
        if all(any(name.startswith(paradigm) for name, *_ in drawn) for paradigm in ("ours", "PTFS", "CPT")):
            return drawn
    return []


def draw_costs(path: Path) -> None:
    """Draw perplexity over cost, with 95% intervals where there are several seeds."""
    drawn = lines()
    if not drawn:
        return
    import matplotlib
    from matplotlib.figure import Figure

    from megatron_lrpath.report.style import STYLE

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.stem}):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for name, colour, marker, points in drawn:
            means = [in_percent(one.difference.mean) for one in points]
            halves = [100 * one.difference.half if one.difference.half < 1 else 0.0 for one in points]
            costs = [one.cost for one in points]
            axes.errorbar(
                costs, means, halves, color=colour, marker=marker, ms=9 if marker == "*" else 5, lw=1.2,
                elinewidth=0.8, capsize=2, label=name,
            )  # fmt: skip
        axes.axhline(0, color="#59636e", lw=0.8)
        axes.set_ylim(top=7)
        axes.set_xlabel("steps of all runs over those of PTFS")
        axes.set_ylabel("perplexity over the paper's setting, %")
        axes.legend(fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def table() -> list[list[str]]:
    """Return the figure's points: line, cost, difference in percent with interval, nats and seeds."""
    level = f"{100 * (1 - LEVEL):.0f}%"
    made = [["line", "cost", f"against the paper's setting [{level} interval]", "nats", "seeds"]]
    for name, _, _, points in lines():
        for one in points:
            mean, half, seeds = one.difference.mean, one.difference.half, one.difference.seeds
            low, high = (in_percent(mean + side * half) for side in (-1, 1)) if seeds > 1 else (0, 0)
            interval = f" [{low:+.2f}, {high:+.2f}]" if seeds > 1 else ""
            made.append(
                [name, f"{one.cost:.3f}", f"{in_percent(mean):+.2f}%{interval}", f"{mean:+.4f}", str(seeds)]
            )
    return made
