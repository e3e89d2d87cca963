"""The report's figures: learning rates, perplexity against cost, and the loss curves."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from megatron_lrpath.paradigms import CPT, CPT_VARIANTS, KEEP_MIN
from megatron_lrpath.plan.wording import paradigm_name
from megatron_lrpath.report.collect import RunRecord, RunTree
from megatron_lrpath.report.rates import planned_rates
from megatron_lrpath.report.style import (
    COLOURS,
    INK,
    SOFT,
    WIDTH,
    Drawing,
    drawing_style,
    finished,
    name_curve,
    paradigm_panels,
    rate_panels,
    run_colour,
    write_label,
)
from megatron_lrpath.report.tables import common, csv_text, mean_perplexity, perplexities, span
from megatron_lrpath.runs.breaks import breaks
from megatron_lrpath.runs.results import main_path_evaluations
from megatron_lrpath.wording import decimals

MARKERS = 100
"""Number of recorded rates shown as dots over the whole width; the line goes through all of them."""


def draw_rates(tree: RunTree) -> Drawing:
    """Return Figure 1: a panel for each paradigm, planned rates as pale bands, recorded ones as lines with
    dots.
    """
    with drawing_style():
        figure, panels, unit = rate_panels(tree.plan, tree.paradigms, 0.7 + 2.3 * len(tree.paradigms))
        for paradigm, axes in panels.items():
            _rate_panel(axes, tree, paradigm, unit)
        band = Line2D([], [], color=INK, alpha=0.25, linewidth=5, label="planned")
        line = Line2D([], [], color=INK, linewidth=1.2, marker=".", markersize=5, label="as trained")
        figure.legend(handles=[band, line], loc="outside upper right", ncols=2)
        caption = (
            "Learning rate of every training step: recorded by the runs (thin lines with dots) over the "
            "plan's (pale bands). Dotted uprights: where a version's data end."
        )
        data = csv_text(("run", "step", "planned_lr", "recorded_lr"), _rate_rows(tree))
        title = "Figure 1. Learning rates as trained, over the planned ones"
        return finished(figure, "learning-rates", title, caption, data)


def draw_cost(tree: RunTree) -> Drawing | None:
    """Return Figure 2: mean perplexity of the compared versions against relative cost.

    Return None without any mean, for a single paradigm, and for a single version, for which all paradigms
    cost the same.
    """
    scores = perplexities(tree)
    means = {p: mean_perplexity(tree, scores, p) for p in tree.paradigms}
    points = {p: (tree.plan.cost(p).relative, mean) for p, mean in means.items() if mean is not None}
    if not points or len(tree.paradigms) == 1 or len(tree.plan.versions) == 1:
        return None
    versions = span(common(tree, scores))
    with drawing_style():
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        axes = figure.subplots()
        _cost_panel(axes, tree, points)
        axes.set_ylabel(f"mean perplexity, {versions}")
        axes.set_xlabel("relative cost (training steps over those of PTFS)")
        caption = f"Mean validation perplexity of {versions} against relative cost; the lower left is best."
        rows = [(paradigm_name(tree.plan, p), tree.plan.cost(p).relative, means[p]) for p in tree.paradigms]
        data = csv_text(("paradigm", "relative_cost", "mean_perplexity"), rows)
        return finished(figure, "perplexity-cost", "Figure 2. Perplexity against cost", caption, data)


def _rate_panel(axes: Axes, tree: RunTree, paradigm: str, unit: float) -> None:
    plan = tree.plan
    # with this variant the next curve begins at the end of the last
    goes_on = paradigm == CPT.name and CPT_VARIANTS[plan.cpt_variant] == KEEP_MIN
    for record in tree.records[paradigm]:
        run, history, colour = record.run, record.history, run_colour(plan, record.run)
        steps = np.arange(run.first_step + 1, run.last_step + 1)
        planned = planned_rates(run, steps) / unit
        axes.plot(steps, planned, color=colour, alpha=0.28, linewidth=5, zorder=2, solid_capstyle="butt")
        recorded, every = history["lr"] / unit, max(1, plan.timeline.ends[-1] // MARKERS)
        axes.plot(history.steps, recorded, color=colour, linewidth=1.2, zorder=3)
        axes.plot(history.steps[::every], recorded[::every], ".", color=colour, markersize=3.5, zorder=3)
        middle = (float(steps.mean()), float(planned.max()))
        place = middle if not run.makes_version else (float(steps[-1]), float(planned[-1]))
        name_curve(axes, run, place, colour, above=goes_on)


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
        text = f"{paradigm_name(tree.plan, paradigm)}\n{mean:.{places}f} at {cost:.2f}×"
        write_label(axes, text, (cost, mean), (0, 13), COLOURS[paradigm], linespacing=1.35)
    room = max(max(means) - min(means), 0.01 * max(means))
    axes.set_xlim(0, max(1.0, *costs) * 1.15)
    axes.set_ylim(min(means) - 0.35 * room, max(means) + 0.55 * room)
    axes.text(0.015, 0.03, "↙ better", transform=axes.transAxes, color=SOFT)


Column = NDArray[np.float64]
_COMPARED = (
    " PTFS reads all versions shuffled together, CPT and ours the newest: compare training losses within a paradigm, "
    "and paradigms by their perplexities."
)
POINTS = 1500
"""Maximum number of points of a raw curve; more would be closer than the picture's dots."""


def draw_losses(tree: RunTree) -> Drawing | None:
    """Return the loss curves, a panel for each paradigm; None if no loss is recorded."""
    if not any(np.isfinite(record.history["loss"]).any() for record in tree):
        return None
    with drawing_style():
        figure, panels = paradigm_panels(tree.plan, tree.paradigms, 0.6 + 2.6 * len(tree.paradigms))
        raw_alpha = 0.22 * min(1.0, 4 / len(tree.plan.versions))  # many runs overlap
        for paradigm, axes in panels.items():
            for record in tree.records[paradigm]:
                _draw_run(axes, record, run_colour(tree.plan, record.run), window_of(tree), raw_alpha)
            axes.set_ylabel("loss (nats per token)")
        axes.set_ylim(*loss_limits(tree))
        window = window_of(tree)
        handles = [
            Line2D([], [], color=INK, alpha=0.3, linewidth=0.8, label="each step"),
            Line2D([], [], color=INK, linewidth=1.6, label=f"mean over {window} steps"),
        ]
        dots = any(validation_losses(record) for record in tree)
        if dots:
            dot = Line2D([], [], color=INK, linestyle="", marker="o", markersize=5, label="validation")
            handles.append(dot)
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
        broken = any(breaks(record.lineage) for record in tree)
        caption = (
            f"Training loss of every step (pale) and its mean over {window} steps (line)"
            f"{'; dots: loss on the validation set' if dots else ''}"
            f"{'; dotted upright lines: breaks' if broken else ''}. Branches begin where they leave the main "
            "path; the steep fall of the first steps is cut off."
            + (_COMPARED if len(tree.paradigms) > 1 else "")
        )
        data = csv_text(("run", "step", "train_loss", "train_loss_smoothed", "valid_loss"), _rows(tree))
        return finished(figure, "loss-curves", "Loss curves", caption, data)


def window_of(tree: RunTree) -> int:
    """Return the window of the running mean in steps: 2% of all versions' steps, odd, at least 5."""
    return 2 * max(2, tree.plan.timeline.ends[-1] // 100) + 1


def smoothed(values: Column, window: int) -> Column:
    """Return the running mean over an odd number of values, centered, shorter at both ends.

    Non-finite values (of a skipped step) are ignored; the mean of a window without finite values is NaN.
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
    """Reduce the curve to about `POINTS` points: the minimum and the maximum of each interval, in order."""
    if len(values) <= POINTS:
        return steps, values
    kept: list[int] = []
    for part in np.array_split(np.flatnonzero(np.isfinite(values)), POINTS // 2):
        if len(part):
            kept.extend(sorted({int(part[values[part].argmin()]), int(part[values[part].argmax()])}))
    return steps[kept], values[kept]


def loss_limits(tree: RunTree) -> tuple[float, float]:
    """Limit the loss axis to the range from the lowest loss to that of the longest run after a twentieth of
    its steps.

    The steep initial fall, which would fill most of the picture, is cut off.
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
    """Return validation losses by step: measured during the training, of main-path checkpoints, and at the
    end.
    """
    steps, valid = record.history.steps, record.history["valid_loss"]
    measured = np.isfinite(valid)
    found = dict(zip(steps[measured].tolist(), valid[measured].tolist(), strict=True))
    if not record.run.makes_version:
        found |= {step: one["loss"] for step, one in main_path_evaluations(record.folder).items()}
    if record.evaluation:
        found[record.evaluation.step] = record.evaluation.score.loss
    return found


def _draw_run(axes: Axes, record: RunRecord, colour: str, window: int, raw_alpha: float) -> None:
    steps, loss = record.history.steps, record.history["loss"]
    mean = smoothed(loss, window)
    axes.plot(*thinned(steps, loss), color=colour, alpha=raw_alpha, linewidth=0.7, zorder=2)
    axes.plot(*thinned(steps, mean), color=colour, linewidth=1.6, zorder=3)
    for step in breaks(record.lineage):
        axes.axvline(step, color=colour, linestyle=":", linewidth=1.0, zorder=1)
    valid = validation_losses(record)
    axes.plot(
        list(valid), list(valid.values()), "o", color=colour, zorder=4, markersize=6, mec="white", mew=0.8
    )
    if len(steps) and record.run.makes_version:
        place = float(steps[-1]), max(float(mean[-1]), valid.get(int(steps[-1]), -np.inf))
        write_label(axes, record.run.version, place, (0, 6), colour, fontsize=9.5)


def _rows(tree: RunTree) -> Iterable[tuple[object, ...]]:
    for record in tree:
        history, valid = record.history, validation_losses(record)
        columns = (history.steps, history["loss"], smoothed(history["loss"], window_of(tree)))
        for step, loss, mean in zip(*(column.tolist() for column in columns), strict=True):
            yield record.label, step, loss, mean, valid.pop(step, None)
        for step, loss in valid.items():
            yield record.label, step, None, None, loss
