"""The learning-rate curves of a plan as a picture, in the manner of the paper's Figure 1."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_lrpath.commands.plan_view import curve_points
from megatron_lrpath.paradigms import PARADIGM_ROWS
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.plan.wording import paradigm_name
from megatron_lrpath.report.style import (
    COLOURS,
    SOFT,
    WIDTH,
    drawing_style,
    mark_versions,
    to_png,
    version_shade,
)

POINTS = 1000


def draw_curves(plan: Plan, paradigms: tuple[str, ...]) -> bytes:
    """A PNG with a panel for each paradigm: learning rate over steps, a shade for each version."""
    with drawing_style():
        figure = Figure(figsize=(WIDTH, 0.6 + 2.3 * len(paradigms)), layout="constrained")
        panels = figure.subplots(len(paradigms), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, paradigm in zip(panels, paradigms, strict=True):
            _draw_panel(axes, plan, paradigm)
        panels[-1].set_xlabel(f"training step (each of {plan.batch.tokens:,} tokens)")
        panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        return to_png(figure)


def _draw_panel(axes: Axes, plan: Plan, paradigm: str) -> None:
    for run in plan.runs(paradigm):
        steps, rates = zip(*curve_points(run, POINTS), strict=True)
        colour = (
            SOFT if not run.makes_version else version_shade(paradigm, run.version_index, len(plan.versions))
        )
        axes.plot(steps, rates, color=colour, linewidth=1.6)
        _name_curve(axes, run, colour)
    mark_versions(axes, plan.timeline.ends)
    axes.set_title(
        f"{paradigm_name(plan, paradigm)}: {PARADIGM_ROWS[paradigm].long_name}", color=COLOURS[paradigm]
    )
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.set_xlim(0, plan.timeline.ends[-1] * 1.06)
    axes.set_ylim(0, plan.schedule.max_lr * 1.16)


def _name_curve(axes: Axes, run: Run, colour: str) -> None:
    """The version's name at the end of its curve; the main path's above its middle."""
    main = not run.makes_version
    place = run.last_step / 2 if main else run.last_step
    axes.annotate(
        "main path" if main else run.version,
        (place, run.path.lr_at(place)),
        xytext=(0, 5) if main else (5, 0),
        textcoords="offset points",
        ha="center" if main else "left",
        va="bottom" if main else "center",
        color=colour,
        fontweight="bold",
        annotation_clip=False,
    )
