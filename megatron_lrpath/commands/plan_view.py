"""Tables and curves of a plan in the terminal."""

from __future__ import annotations

import itertools
from datetime import datetime
from typing import Any

import plotille
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_lrpath.console import terminal_table
from megatron_lrpath.launch.estimate import Estimate, cost_lines
from megatron_lrpath.paradigms import CPT, PARADIGM_ROWS
from megatron_lrpath.plan import PARADIGMS, Plan, Run
from megatron_lrpath.plan.wording import (
    beginning_text,
    branch_arguments_text,
    main_rate_text,
    mix_text,
    paradigm_name,
    replays_text,
    schedule_name,
    sft_text,
    step_tokens_text,
)
from megatron_lrpath.runs.storage import predicted
from megatron_lrpath.wording import byte_size, plural, short_number

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")
MAIN_COLOUR = "white"
PIPE_WIDTH = 120
CURVE_HEIGHT = 8
MARGIN = 10
AXIS_TITLE = " steps"
NARROW = 100
LOOK: dict[str, Any] = {"title_justify": "left"}


def show_plan(
    plan: Plan, paradigms: tuple[str, ...], trained: tuple[str, ...], left: Estimate, curves: bool
) -> None:
    """Print the costs of the paradigms; for those in `trained`, also the runs, the storage, the remaining training
    (`left`) and, with `curves`, the curves.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    schedule = plan.schedule
    headline = (
        f"{plan.name}: {plural(len(plan.versions), 'version')}, {schedule_name(plan)} from {schedule.max_lr:g} to "
        f"{schedule.min_lr:g}, warm-up {schedule.warmup:,} steps, alpha {plan.alpha:g}, "
        f"{step_tokens_text(plan)} tokens a step"
    )
    if changes := main_rate_text(plan):
        headline += f"; {changes}"
    if plan.adopted or plan.megatron.get("pretrained_checkpoint"):
        headline += f"; begins with {beginning_text(plan)}"
    if replays := replays_text(plan):
        headline += f"; {replays}"
    if own := branch_arguments_text(plan):
        headline += f"; branches with {own}"
    console.print(Text(headline))
    for paradigm in trained:
        console.print()
        console.print(runs_table(plan, paradigm, narrow=console.width < NARROW))
    console.print()
    console.print(costs_table(plan, paradigms))
    if others := [one for one in paradigms if one not in trained]:
        names = " and ".join(paradigm_name(plan, one) for one in others)
        text = f"{names}: not trained by this plan, for comparison; --paradigm {others[0]} shows the runs"
        console.print(Text(text, style="dim"))
    if needs := new_text(plan):
        console.print(Text(needs))
    for text in storage_texts(plan, trained):
        console.print(Text(text))
    first, *further = cost_lines(left, datetime.now().astimezone())
    console.print(Text(f"To train ({', '.join(trained)}): {first}"))
    for line in further:
        console.print(Text(f"  {line}"))
    if plan.sft is not None:
        text = f"Fine-tuning: {sft_text(plan.sft)}"
        if plan.sft.steps is None:  # epochs, whose steps are known once the data are prepared
            runs = [run for paradigm in PARADIGMS for run in plan.sft_runs(paradigm)]
            text += (
                f" ({runs[0].steps:,} steps)" if runs else " (data not prepared yet: lrpath sft --prepare)"
            )
        console.print(Text(text))
    if CPT.name in trained:
        console.print(Text(_shared_note(plan, paradigms), style="dim"))
    if curves:
        for paradigm in trained:
            console.print()
            console.print(Text(f"Learning rate, {_title(plan, paradigm)}", style="bold"))
            console.print(curve_text(plan, paradigm, console.width), no_wrap=True, crop=False)


def new_text(plan: Plan) -> str:
    """Return the tokens that the slices of versions with a replay need; empty if no version has one."""
    texts = []
    spans = zip(plan.versions, plan.timeline.begins, plan.timeline.ends, strict=True)
    for index, (version, begin, end) in enumerate(spans):
        if version.replay:
            new = plan.samples_of(index) * plan.batch.seq_length
            again = plan.tokens(begin, end) - new
            texts.append(f"{version.name} {short_number(new)} ({short_number(again)} more are replayed)")
    return f"Tokens that slices need: {', '.join(texts)}" if texts else ""


def _shared_note(plan: Plan, paradigms: tuple[str, ...]) -> str:
    """Return what the costs do not show: the run that CPT shares with another paradigm."""
    shared = plan.runs(CPT.name)[0]
    twin = "/".join(shared.same_as or ())
    note = f"{CPT.name}/{shared.name} and {twin} are the same training, which runs once"
    if set(paradigms) == set(PARADIGMS):
        every = sum(plan.cost(paradigm).steps for paradigm in PARADIGMS) - shared.steps
        note += f"; all three paradigms together: {every:,} steps"
    return f"{note}."


def runs_table(plan: Plan, paradigm: str, narrow: bool = False) -> Table:
    """Return a row for each run: where it starts, its steps, tokens (unless `narrow`), data and rate."""
    tokens = () if narrow else ("tokens",)
    table = terminal_table(
        ("run", "from", "first", "last", "steps", *tokens, "data", "learning rate"),
        f"LlRR{'R' * len(tokens)}Rll",
        title=_title(plan, paradigm),
        **LOOK,
    )
    for run in plan.runs(paradigm):
        names = ", ".join(run.slices) if len(run.slices) < 3 else f"{run.slices[0]} … {run.slices[-1]}"
        table.add_row(
            Text(run.name, style=run_colour(run)),
            Text(run.parent.run if run.parent else "–"),
            f"{run.first_step + 1:,}",
            f"{run.last_step:,}",
            f"{run.steps:,}",
            *([] if narrow else [short_number(plan.tokens_of(run))]),
            Text(f"{names} with {mix_text(run.mix)}" if run.mix else names),
            Text(_rate_text(run)),
        )
    return table


def costs_table(plan: Plan, paradigms: tuple[str, ...]) -> Table:
    """Return the total cost of each paradigm, relative to PTFS."""
    titles = ("paradigm", "runs", "steps", "tokens", "relative to PTFS")
    table = terminal_table(titles, "lrrrr", title="Cost", **LOOK)
    for paradigm in paradigms:
        cost = plan.cost(paradigm)
        table.add_row(
            paradigm_name(plan, paradigm),
            str(len(plan.runs(paradigm))),
            f"{cost.steps:,}",
            short_number(cost.tokens),
            f"{cost.relative:.2f}",
        )
    return table


def storage_texts(plan: Plan, paradigms: tuple[str, ...]) -> list[str]:
    """Return a line on the size of a checkpoint and one on each paradigm's storage; [] if it is unknown."""
    texts: list[str] = []
    for paradigm in paradigms:
        storage = predicted(plan, paradigm)
        if storage is None:
            return []
        if not texts:
            one = storage.one
            texts.append(
                f"Storage: a checkpoint takes about {byte_size(one.total)} (weights {byte_size(one.weights)}, "
                f"optimizer's state {byte_size(one.state)})"
            )
        versions = ", ".join(f"{name} {byte_size(size)}" for name, size in storage.by_version.items())
        newest = f", the newest of each run {byte_size(storage.newest)}" if storage.newest else ""
        texts.append(
            f"  {paradigm_name(plan, paradigm)}: {byte_size(storage.total)} at the end ({versions}{newest})"
        )
    return texts


def curve_text(plan: Plan, paradigm: str, width: int) -> Text:
    """Draw the paradigm's learning rates as braille dots: a color for each version, version ends below."""
    end, top = plan.timeline.ends[-1], plan.highest_rate
    columns = max(20, min(width, PIPE_WIDTH) - MARGIN - 1 - len(AXIS_TITLE))
    canvas = plotille.Canvas(columns, CURVE_HEIGHT, 0, 0, end, top * 1.02, mode="names")
    for run in plan.runs(paradigm):
        points = curve_points(run, 2 * columns * run.steps // end + 8)
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            canvas.line(x0, y0, x1, y1, color=run_colour(run))
    labels = [f"{top:.3g}", *[""] * (CURVE_HEIGHT - 2), "0"]
    drawn = canvas.plot().splitlines()
    rows = [f"{label:>{MARGIN - 1}} │" + row for label, row in zip(labels, drawn, strict=True)]
    text = Text.from_ansi("\n".join(rows))
    return text.append("\n" + _step_axis(plan.timeline.ends, columns), style="dim")


def curve_points(run: Run, count: int) -> list[tuple[float, float]]:
    """Return about `count` points (position in steps, rate) of a run, evenly spaced, and all corners."""
    first, last = run.first_step, run.last_step
    count = min(count, run.steps)
    places = {first + run.steps * index // count for index in range(count + 1)} if count else {first}
    corners = {corner for corner in run.path.corners if corner <= last}
    return [(float(x), run.path.lr_at(x)) for x in sorted(places | corners)]


def run_colour(run: Run) -> str:
    """Return a color for each version; the main path has its own."""
    return MAIN_COLOUR if not run.makes_version else COLOURS[(run.version_index - 1) % len(COLOURS)]


def _step_axis(ends: list[int], columns: int) -> str:
    """Return a line of steps below the curves: 0 and the version ends, as many as fit."""
    line = [" "] * (MARGIN + 1 + columns)
    line[MARGIN - 1 : MARGIN + 2] = " └0"
    taken = MARGIN + 2
    for end in ends:
        label = short_number(end)
        right = MARGIN + 1 + round(end / ends[-1] * columns)
        if right - len(label) > taken:
            line[right - len(label) : right] = label
            taken = right
    return "".join(line) + AXIS_TITLE


def _title(plan: Plan, paradigm: str) -> str:
    return f"{paradigm_name(plan, paradigm)}: {PARADIGM_ROWS[paradigm].long_name}"


def _rate_text(run: Run) -> str:
    path, schedule = run.path, run.path.schedule
    if path.shape == "floor":
        return f"{schedule.min_lr:g}"
    warm = "warm-up, " if path.warmup else ""
    if path.shape == "plateau":
        if path.main is not None and path.main.power:
            return f"{warm}{schedule.max_lr:g} → {path.lr_at(path.end):.3g}"
        moves = path.main.moves if path.main else ()
        return warm + ", ".join(f"{rate:g}" for rate in (schedule.max_lr, *(move.rate for move in moves)))
    return f"{warm}{path.begins_at:.6g} → {path.lr_at(path.end):.3g}"
