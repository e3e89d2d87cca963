"""The learning-rate curves of a plan as a picture, in the manner of the paper's Figure 1."""

from __future__ import annotations

import numpy as np

from megatron_lrpath.commands.plan_view import curve_points
from megatron_lrpath.plan import Plan
from megatron_lrpath.report.style import drawing_style, name_curve, rate_panels, run_colour, to_png

POINTS = 1000


def draw_curves(plan: Plan, paradigms: tuple[str, ...]) -> bytes:
    """A PNG with a panel for each paradigm: learning rate over steps, a shade for each version."""
    with drawing_style():
        figure, panels, unit = rate_panels(plan, paradigms, 0.6 + 2.3 * len(paradigms))
        for paradigm, axes in panels.items():
            for run in plan.runs(paradigm):
                steps, rates = np.array(curve_points(run, POINTS)).T
                colour = run_colour(plan, run)
                axes.plot(steps, rates / unit, color=colour, linewidth=1.6)
                place = run.last_step / 2 if not run.makes_version else run.last_step
                name_curve(axes, run, (place, run.path.lr_at(place) / unit), colour)
        return to_png(figure)
