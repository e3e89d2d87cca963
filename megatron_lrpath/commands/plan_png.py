"""The learning-rate curves of a plan as a picture, in the manner of the paper's Figure 1."""

from __future__ import annotations

from megatron_lrpath.commands.plan_view import curve_points
from megatron_lrpath.plan import Plan
from megatron_lrpath.report.style import (
    drawing_style,
    name_curve,
    paradigm_panels,
    run_colour,
    to_png,
)

POINTS = 1000


def draw_curves(plan: Plan, paradigms: tuple[str, ...]) -> bytes:
    """A PNG with a panel for each paradigm: learning rate over steps, a shade for each version."""
    with drawing_style():
        figure, panels = paradigm_panels(plan, paradigms, 0.6 + 2.3 * len(paradigms))
        for paradigm, axes in panels.items():
            for run in plan.runs(paradigm):
                steps, rates = zip(*curve_points(run, POINTS), strict=True)
                colour = run_colour(plan, run)
                axes.plot(steps, rates, color=colour, linewidth=1.6)
                place = run.last_step / 2 if not run.makes_version else run.last_step
                name_curve(axes, run, (place, run.path.lr_at(place)), colour)
            axes.set_ylabel("learning rate")
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
            axes.set_ylim(0, plan.schedule.max_lr * 1.16)
        return to_png(figure)
