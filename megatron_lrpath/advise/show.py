"""Show the advice in the terminal and as a figure."""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_lrpath.advise.advice import WITHIN, Advice
from megatron_lrpath.advise.by_version import Allocation
from megatron_lrpath.advise.curves import enough
from megatron_lrpath.advise.fit import NAME as LAW
from megatron_lrpath.advise.predict import Candidate, Decay, own_decay
from megatron_lrpath.advise.read import beginning
from megatron_lrpath.console import terminal_table
from megatron_lrpath.errors import UserError, cause
from megatron_lrpath.files import atomic_write_bytes
from megatron_lrpath.paradigms import MAIN, OURS
from megatron_lrpath.plan import Plan
from megatron_lrpath.report.style import (
    ADVICE,
    COLOURS,
    INK,
    SOFT,
    WIDTH,
    SavedAdvice,
    drawing_style,
    finished,
    mark_versions,
    version_shade,
)
from megatron_lrpath.report.tables import csv_text
from megatron_lrpath.runs.checkpoints import complete_steps
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.results import main_path_evaluations
from megatron_lrpath.wording import MISSING, listing


def show(advice: Advice, console: Console) -> None:
    """Print the advice."""
    for line in sentences(advice):
        console.print(Text(line))
    if how := application(advice):
        console.print(Text(how))
    if advice.doubt:
        console.print(Text(advice.doubt, style="yellow"))
    console.print(Text(fitted(advice), style="dim"))
    allocated = [allocation_table(advice.plan, advice.allocation)] if advice.allocation else []
    tables = [
        *allocated,
        alphas_table(advice),
        decays_table(advice),
        *([checks_table(advice)] if advice.checks else []),
    ]
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    text = "the validation set" if advice.model.evaluated else "the version's own text"
    console.print(
        Text(
            f"Losses: nats a token on {text} at the branch's end; ±: half of the widest 95% interval; gap: "
            "perplexity (of the mean loss of the compared versions) above the best." + hint(advice),
            style="dim",
        )
    )


def sentences(advice: Advice) -> list[str]:
    """Return the recommendation, next to the plan's own alpha and the best of all."""
    lines, wanted = [], advice.target.removeprefix("the least cost for ")
    if advice.allocation:
        lines.append(f"Advice ({advice.target}): {_allocation_text(advice, advice.allocation)}")
    elif advice.chosen:
        lines.append(f"No alphas by version give {wanted} within their limits (--max-loss).")
    if advice.chosen:
        lines.append(f"One alpha for all versions: {_candidate_text(advice, advice.chosen)}.")
    elif advice.allocation:
        lines.append("One alpha for all versions does not give it.")
    else:
        lines.append(f"No alpha gives {wanted}; the table has what is near.")
    own = next((one for one in advice.own if one.alpha == advice.plan.alpha), None)
    if own and own != advice.chosen:
        lines.append(f"The plan: {_candidate_text(advice, own)}.")
    if advice.best != advice.chosen:
        lines.append(f"The best: {_candidate_text(advice, advice.best)}.")
    return lines


def application(advice: Advice) -> str:
    """Return how to apply the chosen alpha, and to which versions; empty if it is the plan's."""
    plan, chosen = advice.plan, advice.chosen
    if chosen is None or (chosen.alpha == plan.alpha and chosen.decay == own_decay(plan)):
        return ""
    begun = [
        run.version
        for run in plan.runs(OURS.name)
        if run.makes_version and RunFolder(plan.folder(run)).lineage.exists()
    ]
    text = f"To take it: `alpha: {chosen.alpha:g}` for a version in {plan.path} whose branch has not begun"
    return text + (
        f"; {listing(begun)} {'has' if len(begun) == 1 else 'have'} begun and cannot change, so do not change the "
        "plan's own alpha."
        if begun
        else "."
    )


def _allocation_text(advice: Advice, one: Allocation) -> str:
    """Return the alphas and their cost next to the plan's, the cost still to come, and how to apply them."""
    alphas = ", ".join(f"{alpha:g} for {name}" for name, alpha in one.alphas.items())
    text = f"alpha={alphas} costs {one.cost:.3f} of PTFS"
    if one.loss_of_plan is not None:
        change = np.expm1(one.loss - one.loss_of_plan)
        cost = advice.plan.cost(OURS.name).relative
        text += f", predicted perplexity {change:+.2%} against the plan's alphas at {cost:.3f}"
    last = advice.plan.versions[-1].name
    text += f". The branch of {last} adds no step to that now, and {one.due_next:,} once a further version is appended."
    if one.kept:
        text += f" Trained already, and left as they are: {listing(one.kept)}."
    if not one.applies:
        text += " All versions are trained: this is for a fresh plan of the same versions."
    return text


def allocation_table(plan: Plan, one: Allocation) -> Table:
    """Return a line for each version: its alpha, its branch's steps, and the predicted loss and perplexity."""
    table = _table(["version", "alpha", "branch steps", "loss", "95%", "perplexity", "alpha is"], left=1)
    table.title = "An alpha for each version"
    for version in plan.versions:
        name, found = version.name, one.predictions[version.name]
        state = (
            "settled: trained" if name in one.kept else "as in the plan" if name not in one.changes else "new"
        )
        table.add_row(
            name,
            f"{one.alphas[name]:g}",
            f"{one.steps[name]:,}",
            f"{found.loss:.3f}",
            f"{found.low:.3f} … {found.high:.3f}",
            f"{np.exp(found.loss):.3f}",
            state,
        )
    if one.applies and one.changes:
        table.caption = "In the plan: " + "; ".join(
            f"{name}: alpha: {alpha:g}" for name, alpha in one.changes.items()
        )
    return table


def fitted(advice: Advice) -> str:
    """Return one line on the fitted curves and the quality of the fit."""
    model = advice.model
    curves = ", ".join(curve.name for curve in model.data.sources)
    how = "decays held out one at a time" if model.held_out else "one decay: in the fit itself"
    levels = "; a level for each version's text" if len(model.fit.level) > 1 else ""
    if model.path and (checkpoints := model.data.sources[0].checkpoints):
        levels += f"; the level of validation to {len(checkpoints.logged)} checkpoints of the main path"
    return (
        f"Fitted: {LAW}, to {curves}{levels}. Off by {model.misfit:.2%} beyond the noise, by "
        f"{model.end_error:.2%} at the ends of decays ({how})."
    )


def hint(advice: Advice) -> str:
    """Return how to improve the predictions without further training; empty if there is no such way."""
    if not advice.model.evaluated:
        return " `lrpath eval PLAN` first, and validation losses are predicted."
    folder = RunFolder(advice.plan.folder(advice.plan.main))
    kept = [step for step in complete_steps(folder.checkpoints) if step > beginning(advice.plan)]
    evaluated = main_path_evaluations(folder.path)
    if set(kept) - set(evaluated) and enough([*kept, *evaluated]):
        return " `lrpath eval PLAN --main-path`, for a more precise level."
    if not advice.model.path:
        return (
            " More evaluated checkpoints of the main path (save_interval, save_retain_interval) would make their "
            "level more precise."
        )
    return ""


def _table(titles: list[str], left: int) -> Table:
    look: dict[str, Any] = {"title_justify": "left", "caption_justify": "left"}
    align = "L" * left + "R" * (len(titles) - left)
    return terminal_table(titles, align, **look)


def alphas_table(advice: Advice) -> Table:
    """Return every tenth alpha, the plan's and the chosen one, with the plan's own decay."""
    names = [version.name for version in advice.plan.versions]
    table = _table(["alpha", "cost", *names, "±", "gap", "95% of the gap"], left=0)
    table.title = _decay(own_decay(advice.plan))
    for one in advice.own:
        tenth = abs(one.alpha * 10 - round(one.alpha * 10)) < 1e-9
        if tenth or one in (advice.chosen, advice.best) or one.alpha == advice.plan.alpha:
            style = "bold" if one == advice.chosen else "" if one.possible else "dim"
            losses = [f"{version.loss:.3f}" if version else MISSING for version in one.versions]
            widest = max(version.high - version.low for version in one.versions if version)
            gaps = f"{one.gap_low:.2%} … {one.gap_high:.2%}" if one.possible else "in the warm-up"
            cells = f"{one.alpha:g}", f"{one.cost:.2f}", *losses, f"{widest / 2:.3f}", f"{one.gap:.2%}", gaps
            table.add_row(*cells, style=style)
    return table


def decays_table(advice: Advice) -> Table:
    """Return, for each decay, the alpha with the lowest loss and the cheapest alpha near the best."""
    table = _table(["decay", "best alpha", "cost", "gap", f"within {WITHIN:.2%}", "cost"], left=1)
    for decay in dict.fromkeys(one.decay for one in advice.candidates):
        mine = [one for one in advice.candidates if one.decay == decay and one.possible]
        best = min(mine, key=lambda one: one.loss, default=None)
        near = min((one for one in mine if one.gap <= WITHIN), key=lambda one: one.cost, default=None)
        cells = [f"{best.alpha:g}", f"{best.cost:.2f}", f"{best.gap:.2%}"] if best else [MISSING] * 3
        cells += [f"{near.alpha:g}", f"{near.cost:.2f}"] if near else [MISSING] * 2
        table.add_row(_decay(decay), *cells)
    return table


def checks_table(advice: Advice) -> Table:
    """Return the table of branches that were excluded from the fit."""
    table = _table(["held out", "predicted", "95% of it", "measured", "error"], left=1)
    for check in advice.checks:
        interval = f"{check.low:.3f} … {check.high:.3f}"
        cells = f"{check.predicted:.4f}", interval, f"{check.measured:.4f}", f"{check.error:+.2%}"
        table.add_row(check.run, *cells)
    errors = [abs(check.error) for check in advice.checks]
    table.caption = f"mean error {sum(errors) / len(errors):.2%}, worst {max(errors):.2%}" + regret_text(
        advice
    )
    return table


def regret_text(advice: Advice) -> str:
    """Return a sentence on the regret among the measured branches; empty if it cannot be computed."""
    one = advice.regret
    if one is None:
        return ""
    text = f". Regret: of the measured branches, for at most {one.cost:.3f} of PTFS, they take "
    text += listing([branch.name for branch in one.chosen])
    if one.chosen == one.best:
        return text + ", which is the best measured"
    return f"{text}, {one.value:.2%} in perplexity above the best measured: {listing([b.name for b in one.best])}"


def _candidate_text(advice: Advice, one: Candidate) -> str:
    decay = "" if one.decay == own_decay(advice.plan) else f" with {_decay(one.decay)} decay"
    gap = (
        "the lowest predicted loss"
        if one == advice.best
        else f"predicted perplexity {one.gap:.2%} above the best"
    )
    return f"alpha={one.alpha:g}{decay} costs {one.cost:.2f} of PTFS, {gap} ({one.loss:.4f})"


def _decay(decay: Decay) -> str:
    return f"{decay.shape} to {decay.floor:.3g}·max_lr" if decay.floor else f"{decay.shape} to 0"


LINES = ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
"""Colors of the decays (Okabe and Ito)."""


def write_figure(advice: Advice, path: Path) -> None:
    """Write the figure as PNG or SVG, according to the suffix. Raise UserError if that fails."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise UserError(f"--figure {path}: the name must end in .png or .svg")
    stream = io.BytesIO()
    with drawing_style():
        draw(advice).savefig(stream, format=kind, dpi=160)
    try:
        atomic_write_bytes(path, stream.getvalue())
    except OSError as error:
        raise UserError(f"--figure {path}: cannot be written: {cause(error)}") from None


def for_report(advice: Advice, now: datetime) -> SavedAdvice:
    """Return the advice for the report."""
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
        drawing = finished(draw(advice), ADVICE, "Which alpha", caption, csv_text(header, rows))
    lines = [*sentences(advice), *([advice.doubt] if advice.doubt else [])]
    return SavedAdvice(now.strftime("%Y-%m-%d %H:%M %Z").strip(), tuple(lines), drawing)


def draw(advice: Advice) -> Figure:
    """Draw both panels, one above the other."""
    figure = Figure(figsize=(WIDTH, 8.0), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    _curves(upper, advice)
    _costs(lower, advice)
    return figure


def _curves(axes: Axes, advice: Advice) -> None:
    """Draw the points of every curve and the fitted law; a held-out branch is drawn as points only."""
    data, fit = advice.model.data, advice.model.fit
    count = len(advice.plan.versions)
    for curve in data.sources:
        colour = SOFT if curve.kind == MAIN.name else version_shade(OURS.name, curve.version + 1, count)
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
    """Draw the mean predicted loss of the compared versions over the cost, one line for each decay."""
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
        place = advice.chosen.cost, advice.chosen.loss
        axes.plot(*place, "o", color=COLOURS[OURS.name], markeredgecolor=INK)
        axes.annotate(f"alpha={advice.chosen.alpha:g}", place, xytext=(8, 8), textcoords="offset points")
    axes.set_title("Predicted loss over cost")
    axes.set_xlabel("relative cost (training steps over those of PTFS)")
    axes.set_ylabel("mean predicted loss (nats per token)")
    axes.legend()
