"""The figure of the main findings: each difference with its 95% interval."""

from __future__ import annotations

from pathlib import Path

from certainty import holm, in_percent
from findings import Finding
from main_setting import all_findings

HOLDS, OPEN, FAILS = "#009E73", "#9aa4af", "#D55E00"


def label(one: Finding) -> str:
    """Return the claim and where it was measured."""
    where = one.measure.replace(", mean of v2–v4", "").replace("mean of v2–v4: ", "").replace(" − 1", "")
    return f"{one.says} ({where})"


def draw_claims(path: Path) -> None:
    """Draw a line for each main finding of several seeds; to the right of zero is as claimed.

    The point is filled where the difference passes Holm's correction.
    """
    drawn = [one for one in all_findings() if one.main and one.difference.seeds > 1]
    if not drawn:
        return
    import matplotlib
    from matplotlib.figure import Figure

    from megatron_lrpath.report.style import STYLE

    passed = holm([one.difference.p for one in drawn])
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.stem}):
        figure = Figure(figsize=(10, 0.9 + 0.27 * len(drawn)), layout="constrained")
        axes = figure.add_subplot()
        for height, (one, corrected) in enumerate(zip(drawn[::-1], passed[::-1], strict=True)):
            mean, half = one.difference.mean, one.difference.half
            low, middle, high = (in_percent(mean + side * half) for side in (-1, 0, 1))
            colour = (HOLDS if mean > 0 else FAILS) if one.apart else OPEN
            axes.plot([low, high], [height, height], color=colour, lw=1.6)
            axes.plot([middle], [height], "o", color=colour, mfc=colour if corrected else "white", ms=5)
        axes.set_yticks(range(len(drawn)), [label(one) for one in drawn[::-1]])
        axes.tick_params(axis="y", labelsize=7)
        axes.axvline(0, color="#1f2328", lw=0.8)
        axes.set_xlabel("difference in perplexity, %")
        figure.savefig(path, metadata={"Date": None})
