"""Find the decay that reaches the perplexity of the paper's setting at the least cost: tables and figure."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from measured import Measured, interval, nats, percent

EXPERIMENT = "beyond-0.58"
FINE = "beyond-0.58-fine"
"""Further alphas of the best decay."""
SAME = "table-2"
"""Experiment with the cosine to a tenth of the maximum, under another name: the same rates in every step."""
TENTH = "0.0003"
COLOURS = {"cosine": "#0072B2", "linear": "#E69F00", "exponential": "#CC79A7", "minus-sqrt": "#009E73"}
"""Colors by shape, in the order of tables and legend."""
NAME = re.compile(r"(?P<shape>[a-z-]+)_min_lr(?P<end>[^_]+)_alpha(?P<alpha>[0-9.]+)")


@dataclass(frozen=True)
class Setting:
    """A decay (shape and end of its rate) and an alpha."""

    variation: str
    shape: str
    end: float
    alpha: float
    cost: float


class Sweep:
    """All settings, compared by the mean of the versions' losses (by the geometric mean of perplexities)."""

    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        self.versions = sorted({row.version for row in measured.rows})

    @cached_property
    def settings(self) -> list[Setting]:
        """Settings that were measured."""
        found = {}
        for row in self.measured.rows:
            if match := NAME.fullmatch(row.variation):
                alpha, end = float(match["alpha"]), float(match["end"])
                found[row.variation] = Setting(row.variation, match["shape"], end, alpha, row.cost)
        return list(found.values())

    @property
    def top(self) -> float:
        """End rate of the paper: the highest of those tried."""
        return max(setting.end for setting in self.settings)

    @property
    def reference(self) -> Setting:
        """The paper's setting: cosine to a tenth of the maximum, alpha 0.6."""
        return next(
            one for one in self.settings if (one.shape, one.end, one.alpha) == ("cosine", self.top, 0.6)
        )

    def perplexity(self, setting: Setting) -> float:
        """Return the geometric mean of the versions' perplexities over all seeds."""
        found = [self.measured.at(setting.variation, "ours", version).values() for version in self.versions]
        return statistics.geometric_mean(value for values in found for value in values)

    def gap(self, setting: Setting, seed: int) -> float | None:
        """Return the perplexity over the reference's, minus 1; None for a seed that lacks a version."""
        mine, other = setting.variation, self.reference.variation
        found = [self.measured.ratio(seed, (mine, "ours", v), (other, "ours", v)) for v in self.versions]
        ratios = [ratio for ratio in found if ratio is not None]
        whole = len(ratios) == len(found)
        return math.expm1(statistics.fmean(map(math.log1p, ratios))) if whole else None

    def gaps(self, setting: Setting) -> list[float]:
        """Return the gap for every seed that has the runs for it."""
        return self.measured.paired(lambda seed: self.gap(setting, seed))

    def decays(self) -> list[tuple[str, float]]:
        """Return the shapes with their ends, the highest end first."""
        found = {(one.shape, one.end) for one in self.settings}
        return sorted(found, key=lambda decay: (list(COLOURS).index(decay[0]), -decay[1]))

    def line(self, shape: str, end: float) -> list[Setting]:
        """Return the settings of a decay, sorted by alpha."""
        mine = [one for one in self.settings if (one.shape, one.end) == (shape, end)]
        return sorted(mine, key=lambda one: one.alpha)


def load_sweep() -> Sweep:
    """Return the experiments' rows, with those of Table 2 for the settings that are the same."""
    rows = [*Measured.load(EXPERIMENT).rows, *Measured.load(FINE).rows]
    known, versions = {replace(row, perplexity=0.0) for row in rows}, {row.version for row in rows}
    for row in Measured.load(SAME).rows:
        same = replace(row, variation=row.variation.replace("cosine_alpha", f"cosine_min_lr{TENTH}_alpha"))
        new = replace(same, perplexity=0.0) not in known
        if NAME.fullmatch(same.variation) and new and row.version in versions:
            rows.append(same)
    return Sweep(Measured(rows))


def end_said(sweep: Sweep, end: float) -> str:
    """Return an end rate as a share of the maximum rate; the highest is a tenth."""
    return f"{0.1 * end / sweep.top:g}·η_max" if end else "0"


def shapes() -> str:
    """Return the table of the sweep: gaps to the paper's setting, a row per decay, a column per alpha."""
    sweep = load_sweep()
    if not sweep.settings:
        return "Not measured yet.\n"
    alphas = sorted({one.alpha for one in sweep.settings})
    costs = {one.alpha: one.cost for one in sweep.settings}
    rows = [["decay", "to", *(f"α={alpha:g} ({costs[alpha]:.2f})" for alpha in alphas)]]
    rows.append(["---"] * len(rows[0]))
    for shape, end in sweep.decays():
        cells = {one.alpha: percent(sweep.gaps(one)) for one in sweep.line(shape, end)}
        rows.append([shape, end_said(sweep, end), *(cells.get(alpha, "–") for alpha in alphas)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def cheaper() -> str:
    """Return a table: for each decay the smallest alpha that makes it no worse than the paper's setting."""
    sweep = load_sweep()
    if not sweep.settings:
        return "Not measured yet.\n"
    rows = [
        [
            "decay",
            "to",
            "least α no worse",
            "cost",
            "perplexity against the paper's setting",
            "nats",
            "beyond noise",
        ]
    ]
    rows.append(["---"] * len(rows[0]))
    found = []
    for shape, end in sweep.decays():
        good = [one for one in sweep.line(shape, end) if statistics.fmean(sweep.gaps(one) or [1.0]) <= 0]
        if good:
            found.append(good[0])
    for one in sorted(found, key=lambda one: (one.cost, statistics.fmean(sweep.gaps(one)))):
        gaps = sweep.gaps(one)
        sure = "yes" if statistics.fmean(gaps) < -interval(gaps) else "no" if len(gaps) > 1 else "one seed"
        rows.append(
            [
                one.shape,
                end_said(sweep, one.end),
                f"{one.alpha:g}",
                f"{one.cost:.2f}",
                percent(gaps),
                nats(gaps),
                sure,
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def draw_figure(path: Path) -> None:
    """Draw perplexity over cost, a line for each shape and end; differences are those within a seed."""
    sweep = load_sweep()
    if not sweep.settings:
        return
    import matplotlib
    from matplotlib.figure import Figure

    from megatron_lrpath.report.style import STYLE

    dashes = dict(zip(sorted({one.end for one in sweep.settings}), ("-", "--", ":"), strict=False))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": EXPERIMENT}):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes = figure.add_subplot()
        own = sweep.reference
        reference = sweep.perplexity(own)
        for shape, end in sweep.decays():
            line = sweep.line(shape, end)
            values = [reference * (1 + statistics.fmean(sweep.gaps(one))) for one in line]
            label = f"{shape}, to {end_said(sweep, end)}"
            axes.plot(
                [one.cost for one in line],
                values,
                dashes[end],
                color=COLOURS[shape],
                marker="o",
                ms=3,
                label=label,
            )
        axes.axhline(reference, color="#59636e", lw=0.8)
        axes.annotate(
            "the paper's setting", (own.cost, axes.get_ylim()[1]), ha="center", va="top", fontsize=9
        )
        axes.axvline(own.cost, color="#59636e", lw=0.8)
        axes.set_xlabel("steps of all runs over those of pre-training from scratch")
        axes.set_ylabel(f"perplexity (mean of {', '.join(sweep.versions)})")
        axes.legend(ncols=2, fontsize=8)
        figure.savefig(path, metadata={"Date": None})
