"""The advice in the terminal: a sentence, the fit, every alpha with the plan's decay, other decays."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_lrpath.advise.advice import WITHIN, Advice
from megatron_lrpath.advise.curves import enough
from megatron_lrpath.advise.law import NAME
from megatron_lrpath.advise.predict import Candidate, Decay, own_decay
from megatron_lrpath.advise.read import beginning
from megatron_lrpath.evaluate.along import along
from megatron_lrpath.training.checkpoints.on_disk import CHECKPOINTS, complete_steps

MISSING = "–"


def show(advice: Advice, console: Console) -> None:
    """Print the advice."""
    for line in sentences(advice):
        console.print(Text(line))
    if advice.doubt:
        console.print(Text(advice.doubt, style="yellow"))
    console.print(Text(fitted(advice), style="dim"))
    tables = [alphas_table(advice), decays_table(advice), *([checks_table(advice)] if advice.checks else [])]
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    text = "the validation set" if advice.model.evaluated else "the version's own text"
    console.print(
        Text(
            f"Losses: nats a token on {text} at the branch's end; ±: half of the widest 95% interval; gap: mean "
            "loss of the compared versions above the best." + hint(advice),
            style="dim",
        )
    )


def sentences(advice: Advice) -> list[str]:
    """What to choose, the plan's own alpha beside it, and the best of all."""
    lines = []
    if advice.chosen:
        lines.append(f"Advice ({advice.target}): {_said(advice, advice.chosen)}.")
    else:
        lines.append(
            f"No alpha gives {advice.target.removeprefix('the least cost for ')}; the table has what is near."
        )
    own = next((one for one in advice.own if one.alpha == advice.plan.alpha), None)
    if own and own != advice.chosen:
        lines.append(f"The plan: {_said(advice, own)}.")
    if advice.best != advice.chosen:
        lines.append(f"The best: {_said(advice, advice.best)}.")
    return lines


def fitted(advice: Advice) -> str:
    """What was fitted, and how well, in a line."""
    model = advice.model
    curves = ", ".join(curve.name for curve in model.data.sources)
    how = "decays held out one at a time" if model.held_out else "one decay: in the fit itself"
    levels = "; a level for each version's text" if len(model.fit.level) > 1 else ""
    if model.path and (checkpoints := model.data.sources[0].checkpoints):
        levels += f"; the level of validation to {len(checkpoints.logged)} checkpoints of the main path"
    return (
        f"Fitted: {NAME}, to {curves}{levels}. Off by {model.misfit:.2%} beyond the noise, by "
        f"{model.end_error:.2%} at the ends of decays ({how})."
    )


def hint(advice: Advice) -> str:
    """What would make the predictions better that nothing has to be trained for; empty where there is nothing."""
    if not advice.model.evaluated:
        return " `lrpath eval PLAN` first, and validation losses are predicted."
    folder = Path(advice.plan.folder(advice.plan.run("ours", "main")))
    kept = [step for step in complete_steps(folder / CHECKPOINTS) if step > beginning(advice.plan)]
    if set(kept) - set(along(folder)) and enough([*kept, *along(folder)]):
        return " `lrpath eval PLAN --main-path`, and their level is surer."
    if not advice.model.path:
        return (
            " Their level would be surer with more of the main path's checkpoints (save_interval, "
            "save_retain_interval) evaluated."
        )
    return ""


def alphas_table(advice: Advice) -> Table:
    """Every tenth alpha, the plan's and the chosen one, with the plan's own decay."""
    names = [version.name for version in advice.plan.versions]
    table = _table(["alpha", "cost", *names, "±", "gap", "95% of the gap"], left=0)
    table.title = f"{_decay(own_decay(advice.plan))}"
    for one in advice.own:
        tenth = abs(one.alpha * 10 - round(one.alpha * 10)) < 1e-9
        if tenth or one in (advice.chosen, advice.best) or one.alpha == advice.plan.alpha:
            style = "bold" if one == advice.chosen else "" if one.possible else "dim"
            table.add_row(*_row(one), style=style)
    return table


def decays_table(advice: Advice) -> Table:
    """For each decay the alpha with the lowest loss, and the cheapest one near the best."""
    near_enough = f"{WITHIN:.1%}"
    table = _table(["decay", "best alpha", "cost", "gap", f"within {near_enough}", "cost"], left=1)
    for decay in dict.fromkeys(one.decay for one in advice.candidates):
        mine = [one for one in advice.candidates if one.decay == decay and one.possible]
        best = min(mine, key=lambda one: one.loss, default=None)
        near = min((one for one in mine if one.gap <= WITHIN), key=lambda one: one.cost, default=None)
        cells = [f"{best.alpha:g}", f"{best.cost:.2f}", f"{best.gap:.2%}"] if best else [MISSING] * 3
        cells += [f"{near.alpha:g}", f"{near.cost:.2f}"] if near else [MISSING] * 2
        table.add_row(_decay(decay), *cells)
    return table


def checks_table(advice: Advice) -> Table:
    """Branches that the fit had not seen."""
    table = _table(["held out", "predicted", "95% of it", "measured", "error"], left=1)
    for check in advice.checks:
        interval = f"{check.low:.3f} … {check.high:.3f}"
        cells = f"{check.predicted:.4f}", interval, f"{check.measured:.4f}", f"{check.error:+.2%}"
        table.add_row(check.run, *cells)
    errors = [abs(check.error) for check in advice.checks]
    table.caption = f"mean error {sum(errors) / len(errors):.2%}, worst {max(errors):.2%}"
    return table


def _said(advice: Advice, one: Candidate) -> str:
    decay = "" if one.decay == own_decay(advice.plan) else f" with {_decay(one.decay)} decay"
    gap = (
        "the lowest predicted loss" if one == advice.best else f"predicted loss {one.gap:.2%} above the best"
    )
    return f"alpha={one.alpha:g}{decay} costs {one.cost:.2f} of PTFS, {gap} ({one.loss:.4f})"


def _decay(decay: Decay) -> str:
    return f"{decay.shape} to {decay.floor:.3g}·max_lr" if decay.floor else f"{decay.shape} to 0"


def _row(one: Candidate) -> Iterable[str]:
    yield f"{one.alpha:g}"
    yield f"{one.cost:.2f}"
    for version in one.versions:
        yield f"{version.loss:.3f}" if version else MISSING
    yield f"{max(version.high - version.low for version in one.versions if version) / 2:.3f}"
    yield f"{one.gap:.2%}"
    yield f"{one.gap_low:.2%} … {one.gap_high:.2%}" if one.possible else "in the warm-up"


def _table(titles: list[str], left: int) -> Table:
    table = Table(
        box=None, padding=(0, 2, 0, 0), header_style="bold", title_justify="left", caption_justify="left"
    )
    for index, title in enumerate(titles):
        table.add_column(Text(title), justify="left" if index < left else "right", no_wrap=True)
    return table
