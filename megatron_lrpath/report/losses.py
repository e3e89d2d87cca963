"""The loss curves: every run's training loss over the steps, branches from where they leave the main path."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from megatron_lrpath.evaluate.along import along
from megatron_lrpath.report.collect import PARADIGMS, RunRecord, RunTree
from megatron_lrpath.report.csvdata import csv_text
from megatron_lrpath.report.figures import finish_step_axis, panel_titles, run_colour, version_ends
from megatron_lrpath.report.style import (
    COLOURS,
    INK,
    LABEL_GROUND,
    WIDTH,
    Drawing,
    darker,
    drawing_style,
    finished,
    mark_versions,
)

Column = NDArray[np.float64]
POINTS = 1500
"""Points that a raw curve is drawn with at most; more would be thinner than the picture's dots."""


def draw_losses(tree: RunTree) -> Drawing | None:
    """A panel for each paradigm; None where no loss has been recorded."""
    if not any(np.isfinite(record.history["loss"]).any() for record in tree):
        return None
    with drawing_style():
        figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
        panels = figure.subplots(len(PARADIGMS), 1, sharex=True, sharey=True)
        raw_alpha = 0.22 * min(1.0, 4 / len(tree.plan.versions))  # many runs lie over one another
        for axes, paradigm in zip(panels, PARADIGMS, strict=True):
            for record in tree.records[paradigm]:
                _draw_run(axes, record, run_colour(tree, record), window_of(tree), raw_alpha)
            mark_versions(axes, version_ends(tree))
            axes.set_title(panel_titles(tree)[paradigm], color=darker(COLOURS[paradigm]))
            axes.set_ylabel("loss (nats per token)")
        panels[-1].set_ylim(*loss_limits(tree))
        finish_step_axis(panels[-1], tree)
        _legend(figure, tree)
        caption = _caption(tree)
        data = csv_text(("run", "step", "train_loss", "train_loss_smoothed", "valid_loss"), _rows(tree))
        return finished(figure, "loss-curves", "Loss curves", caption, data)


def window_of(tree: RunTree) -> int:
    """The steps that a running mean reads in any run: 2% of all versions' steps, odd, at least 5."""
    return 2 * max(2, version_ends(tree)[-1] // 100) + 1


def smoothed(values: Column, window: int) -> Column:
    """The running mean over an odd number of values, centred, shorter at both ends.

    Values that are not finite (a skipped step) are left out; a window without any other has the mean NaN.
    """
    half = window // 2
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def thinned(steps: NDArray[np.int64], values: Column) -> tuple[NDArray[np.int64], Column]:
    """The curve with at most about `POINTS` points: the lowest and the highest of each stretch, in order."""
    if len(values) <= POINTS:
        return steps, values
    kept: list[int] = []
    for part in np.array_split(np.flatnonzero(np.isfinite(values)), POINTS // 2):
        if len(part):
            kept.extend(sorted({int(part[values[part].argmin()]), int(part[values[part].argmax()])}))
    return steps[kept], values[kept]


def loss_limits(tree: RunTree) -> tuple[float, float]:
    """A loss axis from the lowest loss to where the longest run stands after a twentieth of its steps.

    The steep fall before that, which would take most of the picture, is cut off.
    """
    window = window_of(tree)
    curves = [smoothed(record.history["loss"], window) for record in tree if len(record.history)]
    finite = [curve[np.isfinite(curve)] for curve in curves]
    raw = np.concatenate([record.history["loss"] for record in tree if len(record.history)])
    low = float(np.quantile(raw[np.isfinite(raw)], 0.002))
    longest = max(finite, key=len)
    high = max(longest[len(longest) // 20], *(np.median(curve) for curve in finite if len(curve)))
    room = max(float(high) - low, 0.01)
    return low - 0.06 * room, high + 0.04 * room


def validation_losses(record: RunRecord) -> dict[int, float]:
    """Step -> loss on validation text: measured during the training, of the main path's checkpoints, of the end."""
    steps, valid = record.history.steps, record.history["valid_loss"]
    measured = np.isfinite(valid)
    found = dict(zip(steps[measured].tolist(), valid[measured].tolist(), strict=True))
    if record.run.kind == "main":
        found |= {step: one["loss"] for step, one in along(record.folder).items()}
    if record.evaluation:
        found[record.evaluation.step] = record.evaluation.score.loss
    return found


def _caption(tree: RunTree) -> str:
    dots = "; dots: loss on the validation set" if any(validation_losses(record) for record in tree) else ""
    return (
        f"Training loss of every step (pale) and its mean over {window_of(tree)} steps (line){dots}. "
        "Branches begin where they leave the main path; the steep fall of the first steps is cut off. PTFS "
        "reads all versions shuffled together, CPT and ours the newest: compare training losses within a "
        "paradigm, and paradigms by their perplexities."
    )


def _draw_run(axes: Axes, record: RunRecord, colour: str, window: int, raw_alpha: float) -> None:
    steps, loss = record.history.steps, record.history["loss"]
    mean = smoothed(loss, window)
    axes.plot(*thinned(steps, loss), color=colour, alpha=raw_alpha, linewidth=0.7, zorder=2)
    axes.plot(*thinned(steps, mean), color=colour, linewidth=1.6, zorder=3)
    valid = validation_losses(record)
    axes.plot(
        list(valid), list(valid.values()), "o", color=colour, zorder=4, markersize=6, mec="white", mew=0.8
    )
    if len(steps) and record.run.kind != "main":
        axes.annotate(
            record.run.version,
            (float(steps[-1]), max(float(mean[-1]), valid.get(int(steps[-1]), -np.inf))),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=darker(colour),
            fontsize=9.5,
            fontweight="bold",
            bbox=LABEL_GROUND,
        )


def _legend(figure: Figure, tree: RunTree) -> None:
    handles = [
        Line2D([], [], color=INK, alpha=0.3, linewidth=0.8, label="each step"),
        Line2D([], [], color=INK, linewidth=1.6, label=f"mean over {window_of(tree)} steps"),
    ]
    if any(validation_losses(record) for record in tree):
        handles.append(Line2D([], [], color=INK, linestyle="", marker="o", markersize=5, label="validation"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))


def _rows(tree: RunTree) -> Iterable[tuple[object, ...]]:
    for record in tree:
        history, valid = record.history, validation_losses(record)
        columns = (history.steps, history["loss"], smoothed(history["loss"], window_of(tree)))
        for step, loss, mean in zip(*(column.tolist() for column in columns), strict=True):
            yield record.label, step, loss, mean, valid.pop(step, None)
        for step, loss in valid.items():
            yield record.label, step, None, None, loss
