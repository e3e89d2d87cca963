"""Figure 1 (learning rates as they were over the planned ones) and Figure 2 (perplexity against cost)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_lrpath.report.collect import PARADIGMS, RunRecord, RunTree
from megatron_lrpath.report.csvdata import csv_text
from megatron_lrpath.report.rates import planned_rates
from megatron_lrpath.report.style import (
    COLOURS,
    INK,
    LABEL_GROUND,
    SOFT,
    WIDTH,
    Drawing,
    darker,
    drawing_style,
    finished,
    mark_versions,
    version_shade,
)
from megatron_lrpath.report.tables import mean_perplexity, overall, perplexities
from megatron_lrpath.report.words import PARADIGM_LONG_NAMES, decimals, paradigm_name

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MARKERS = 100
"""Recorded rates shown as dots over the whole width; the line goes through all of them."""


def panel_titles(tree: RunTree) -> dict[str, str]:
    """`PTFS: pre-training from scratch` and so on."""
    return {p: f"{paradigm_name(tree.plan, p)}: {PARADIGM_LONG_NAMES[p]}" for p in PARADIGMS}


def version_ends(tree: RunTree) -> list[int]:
    """The step at which each version's data end, counted from the first version's first."""
    return [int(end) for end in np.cumsum([version.steps for version in tree.plan.versions])]


def run_colour(tree: RunTree, record: RunRecord) -> str:
    """The version's shade of the paradigm's colour; the main path stands apart in grey."""
    run = record.run
    if run.kind == "main":
        return SOFT
    return version_shade(run.paradigm, run.version_index, len(tree.plan.versions))


def draw_rates(tree: RunTree) -> Drawing:
    """Figure 1: a panel for each paradigm, planned rates as pale bands, recorded ones as lines with dots."""
    with drawing_style():
        figure = Figure(figsize=(WIDTH, 7.6), layout="constrained")
        panels = figure.subplots(len(PARADIGMS), 1, sharex=True, sharey=True)
        power = math.floor(math.log10(tree.plan.schedule.max_lr))
        for axes, paradigm in zip(panels, PARADIGMS, strict=True):
            _rate_panel(axes, tree, paradigm, 10.0**power)
            axes.set_title(panel_titles(tree)[paradigm], color=darker(COLOURS[paradigm]))
            axes.set_ylabel(_rate_label(power))
        finish_step_axis(panels[-1], tree)
        _rate_legend(figure)
        caption = (
            "Learning rate of every training step: recorded by the runs (thin lines with dots) over the "
            "plan's (pale bands). Dotted uprights: where a version's data end."
        )
        data = csv_text(("run", "step", "planned_lr", "recorded_lr"), _rate_rows(tree))
        title = "Figure 1. Learning rates as trained, over the planned ones"
        return finished(figure, "learning-rates", title, caption, data)


def draw_cost(tree: RunTree) -> Drawing | None:
    """Figure 2: mean perplexity of the compared versions against relative cost.

    None without any mean, and for a lone version, for which all paradigms cost the same.
    """
    scores = perplexities(tree, overall)
    means = {p: mean_perplexity(tree, scores, p) for p in PARADIGMS}
    points = {p: (tree.relative_cost(p), mean) for p, mean in means.items() if mean is not None}
    if not points or len(tree.plan.versions) == 1:
        return None
    span = f"{tree.compared[0]} to {tree.compared[-1]}" if len(tree.compared) > 1 else tree.compared[0]
    with drawing_style():
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        axes = figure.subplots()
        _cost_panel(axes, tree, points)
        axes.set_ylabel(f"mean perplexity, {span}")
        axes.set_xlabel("relative cost (training steps over those of PTFS)")
        caption = f"Mean validation perplexity of {span} against relative cost; the lower left is best."
        rows = [(paradigm_name(tree.plan, p), tree.relative_cost(p), means[p]) for p in PARADIGMS]
        data = csv_text(("paradigm", "relative_cost", "mean_perplexity"), rows)
        return finished(figure, "perplexity-cost", "Figure 2. Perplexity against cost", caption, data)


def _rate_label(power: int) -> str:
    """The label of an axis in units of 10 to this power."""
    return f"learning rate (10{str(power).translate(SUPERSCRIPTS)})" if power else "learning rate"


def _rate_panel(axes: Axes, tree: RunTree, paradigm: str, unit: float) -> None:
    plan = tree.plan
    goes_on = paradigm == "cpt" and plan.cpt_variant == "keep-min"  # the next curve begins where one ends
    for record in tree.records[paradigm]:
        run, history, colour = record.run, record.history, run_colour(tree, record)
        steps = np.arange(run.first_step + 1, run.last_step + 1)
        planned = planned_rates(run, steps) / unit
        axes.plot(steps, planned, color=colour, alpha=0.28, linewidth=5, zorder=2, solid_capstyle="butt")
        recorded, every = history["lr"] / unit, max(1, version_ends(tree)[-1] // MARKERS)
        axes.plot(history.steps, recorded, color=colour, linewidth=1.2, zorder=3)
        axes.plot(history.steps[::every], recorded[::every], ".", color=colour, markersize=3.5, zorder=3)
        if run.kind == "main":
            _label(axes, "main path", (float(steps.mean()), float(planned.max())), colour, above=True)
        else:
            _label(axes, run.version, (float(steps[-1]), float(planned[-1])), colour, above=goes_on)
    mark_versions(axes, version_ends(tree))
    axes.set_ylim(0, plan.schedule.max_lr / unit * 1.16)


def _label(axes: Axes, text: str, place: tuple[float, float], colour: str, above: bool) -> None:
    """Name a curve at a point of it: above that point, or to the right of it."""
    axes.annotate(
        text,
        place,
        xytext=(0, 5) if above else (5, 0),
        textcoords="offset points",
        ha="center" if above else "left",
        va="bottom" if above else "center",
        color=darker(colour),
        fontsize=9.5,
        fontweight="bold",
        annotation_clip=False,
        bbox=LABEL_GROUND,
    )


def finish_step_axis(axes: Axes, tree: RunTree) -> None:
    end = version_ends(tree)[-1]
    axes.set_xlim(0, end * 1.06)
    axes.set_xlabel(f"training step (each of {tree.plan.batch.tokens:,} tokens)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _rate_legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=INK, alpha=0.25, linewidth=5, label="planned"),
        Line2D([], [], color=INK, linewidth=1.2, marker=".", markersize=5, label="as trained"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)


def _rate_rows(tree: RunTree) -> Iterable[tuple[object, ...]]:
    for record in tree:
        run, history = record.run, record.history
        recorded = dict(zip(history.steps.tolist(), history["lr"].tolist(), strict=True))
        planned = planned_rates(run, np.arange(run.first_step + 1, run.last_step + 1)).tolist()
        for step, rate in enumerate(planned, start=run.first_step + 1):
            yield record.label, step, rate, recorded.get(step)


def _cost_panel(axes: Axes, tree: RunTree, points: dict[str, tuple[float, float]]) -> None:
    places = decimals([mean for _, mean in points.values()])
    costs, means = zip(*points.values(), strict=True)
    for paradigm, (cost, mean) in points.items():
        axes.plot(cost, mean, "o", color=COLOURS[paradigm], markersize=13, zorder=3)
        axes.annotate(
            f"{paradigm_name(tree.plan, paradigm)}\n{mean:.{places}f} at {cost:.2f}×",
            (cost, mean),
            xytext=(0, 13),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=darker(COLOURS[paradigm]),
            fontweight="bold",
            linespacing=1.35,
            bbox=LABEL_GROUND,
        )
    room = max(max(means) - min(means), 0.01 * max(means))
    axes.set_xlim(0, max(1.0, *costs) * 1.15)
    axes.set_ylim(min(means) - 0.35 * room, max(means) + 0.55 * room)
    axes.text(0.015, 0.03, "↙ better", transform=axes.transAxes, color=SOFT)
