"""The advice as a figure: the fitted curves, and loss over cost for every decay."""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_lrpath.advise.advice import Advice
from megatron_lrpath.advise.predict import own_decay
from megatron_lrpath.advise.table import fitted, sentences
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_bytes
from megatron_lrpath.report.advice import NAME, SavedAdvice
from megatron_lrpath.report.csvdata import csv_text
from megatron_lrpath.report.style import (
    COLOURS,
    INK,
    SOFT,
    WIDTH,
    drawing_style,
    finished,
    mark_versions,
    version_shade,
)

LINES = ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, for the decays."""


def write_figure(advice: Advice, path: Path) -> None:
    """Write the figure as PNG or SVG, by the file's ending. Raises UserError where that cannot be done."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise UserError(f"--figure {path}: the name must end in .png or .svg")
    stream = io.BytesIO()
    with drawing_style():
        draw(advice).savefig(stream, format=kind, dpi=160)
    try:
        atomic_write_bytes(path, stream.getvalue())
    except OSError as error:
        raise UserError(f"--figure {path}: cannot be written: {error.strerror}") from None


def for_report(advice: Advice, now: datetime) -> SavedAdvice:
    """The advice as the report shows it."""
    caption = (
        f"{fitted(advice)} Losses are nats a token; predicted ones are of the "
        f"{'validation' if advice.model.evaluated else 'training'} text at the branches' ends."
    )
    header = ("decay", "min_lr_share", "alpha", "relative_cost", "loss", "gap", "gap_low", "gap_high")
    rows = [
        (one.decay.shape, one.decay.floor, one.alpha, one.cost, one.loss, one.gap, one.gap_low, one.gap_high)
        for one in advice.candidates
        if one.possible
    ]
    with drawing_style():
        drawing = finished(draw(advice), NAME, "Which alpha", caption, csv_text(header, rows))
    words = [*sentences(advice), *([advice.doubt] if advice.doubt else [])]
    return SavedAdvice(now.strftime("%Y-%m-%d %H:%M %Z").strip(), tuple(words), drawing)


def draw(advice: Advice) -> Figure:
    """Both panels, one over the other."""
    figure = Figure(figsize=(WIDTH, 8.0), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    _curves(upper, advice)
    _costs(lower, advice)
    return figure


def _curves(axes: Axes, advice: Advice) -> None:
    """The points of every curve and the law through them; a held-out branch has its points alone."""
    data, fit = advice.model.data, advice.model.fit
    count = len(advice.plan.versions)
    for curve in data.sources:
        colour = SOFT if curve.kind == "main" else version_shade("ours", curve.version + 1, count)
        points = curve.points
        over = fit.losses(curve.main.rates, points.steps, points.versions) if curve.main else 1.0
        axes.plot(points.steps, np.exp(points.logs) * over, ".", color=colour, markersize=4, alpha=0.6)
        steps = np.unique(np.linspace(curve.logged[0], len(curve.rates), 300).astype(np.int64))
        losses = fit.losses(curve.rates, steps, np.searchsorted(curve.ends, steps))
        axes.plot(steps, losses, color=colour, linewidth=1.6, label=curve.name)
    mark_versions(axes, [int(end) for end in advice.plan.timeline.ends])
    axes.set_title("Losses (points) and the fitted law (lines)")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(ncols=2)


def _costs(axes: Axes, advice: Advice) -> None:
    """The mean predicted loss of the compared versions over the cost, a line for each decay."""
    own = own_decay(advice.plan)
    decays = list(dict.fromkeys(one.decay for one in advice.candidates))
    for index, decay in enumerate(decays):
        mine = [one for one in advice.candidates if one.decay == decay and one.possible]
        colour = LINES[index % len(LINES)]
        label = f"{decay.shape} to {decay.floor:.3g} of the maximum"
        costs, losses = [one.cost for one in mine], [one.loss for one in mine]
        style = "-" if index < len(LINES) else "--"
        axes.plot(costs, losses, style, color=colour, linewidth=2.2 if decay == own else 1.2, label=label)
    if advice.chosen:
        axes.plot(advice.chosen.cost, advice.chosen.loss, "o", color=COLOURS["ours"], markeredgecolor=INK)
        axes.annotate(
            f"alpha={advice.chosen.alpha:g}",
            (advice.chosen.cost, advice.chosen.loss),
            xytext=(8, 8),
            textcoords="offset points",
        )
    axes.set_title("Predicted loss over cost")
    axes.set_xlabel("relative cost (training steps over those of PTFS)")
    axes.set_ylabel("mean predicted loss (nats per token)")
    axes.legend()
