"""The trials of a plan as tables, figures and sentences: `lrpath probe` and `lrpath audition`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_lrpath.plan import Plan
from megatron_lrpath.report.style import INK, SOFT, WIDTH, Drawing, drawing_style, finished
from megatron_lrpath.report.tables import Cell, Table, csv_text
from megatron_lrpath.trials.compare import Comparison, Difference, Measured, compare
from megatron_lrpath.trials.record import AUDITION, PROBE, WHOLE, Trial, trials_of
from megatron_lrpath.wording import MISSING, decimals, listing, plural


@dataclass(frozen=True)
class TrialPart:
    """A trial in the report: title, sentences, table, and the figure if there are several candidates."""

    title: str
    sentences: tuple[str, ...]
    table: Table
    drawing: Drawing | None


def trial_parts(plan: Plan) -> list[TrialPart]:
    """Return all trials in the plan's output with a measurement."""
    found = [compare(plan, trial) for trial in trials_of(plan)]
    return [trial_part(plan, one) for one in found if one.texts]


def trial_part(plan: Plan, comparison: Comparison) -> TrialPart:
    """Return the part of one trial."""
    trial = comparison.trial
    return TrialPart(
        title=f"{trial.kind.capitalize()} from step {trial.begin:,} ({trial.name})",
        sentences=(design(plan, trial), *conclusions(comparison)),
        table=trial_table(comparison),
        drawing=draw_differences(comparison) if len(trial.candidates) > 1 else None,
    )


def design(plan: Plan, trial: Trial) -> str:
    """Return a sentence on the branches that are trained."""
    held = trial.steps - trial.decay
    how = f"{held:,} at its rate and {trial.decay:,} of decay" if held else "all of decay"
    return (
        f"{plural(len(trial.candidates), 'candidate')}, {plural(trial.repeats, 'repeat')} each: "
        f"{plural(trial.branches, 'branch', 'es')} of {plural(trial.steps, 'step')} ({how}) from step "
        f"{trial.begin:,} of the main path of {plan.name}."
    )


def conclusions(comparison: Comparison) -> list[str]:
    """Return sentences on the results of the trial and what to do."""
    trial, whole = comparison.trial, comparison.texts.get(WHOLE, {})
    lines = []
    if comparison.missing:
        lines.append(f"{plural(comparison.missing, 'branch', 'es')} not measured yet.")
    if not whole:
        return lines
    first, best = trial.candidates[0], next(c for c in trial.candidates if c.name == comparison.best)
    repeats = whole[first.name].repeats
    if repeats < 2:
        lines.append("One repeat gives no interval: a difference may be noise. Use more --repeats.")
    if best is first:
        lines.append(f"No candidate is better than {first.name}.")
    elif (gap := whole[best.name].difference) is not None:
        doubt = "" if gap.is_clear else "; that may be noise: its interval includes 0 or is unknown"
        lines.append(
            f"{best.name} is best on `{WHOLE}`: {difference_text(gap)} in perplexity against {first.name}{doubt}."
        )
    lines += rate_advice(comparison) if trial.kind == PROBE else data_advice(comparison)
    return lines


def rate_advice(comparison: Comparison) -> list[str]:
    """Return what to write into the plan for the next versions after a probe."""
    trial, whole = comparison.trial, comparison.texts[WHOLE]
    found, lines = comparison.best_rate, []
    rates = [candidate.rate for candidate in trial.candidates]
    if found is not None:
        bounds = f" (95% interval {found.low:.3g} to {found.high:.3g})" if found.low and found.high else ""
        lines.append(f"A parabola over the logarithm of the rate is lowest at {found.rate:.3g}{bounds}.")
    best = next(c for c in trial.candidates if c.name == comparison.best)
    gap = whole[best.name].difference
    if gap is None or not gap.is_clear:
        lines.append("Keep the rate as it is: write nothing into the plan.")
    else:
        lines.append(f"For the next version write `max_lr: {best.rate:g}` into its entry of `versions`.")
    if gap is not None and best.rate in (min(rates), max(rates)):
        lines.append("The best tried rate is at the end of the range; probe beyond it with other --rates.")
    return lines


def data_advice(comparison: Comparison) -> list[str]:
    """Return what to write into the plan after an audition, or on which texts the best one is worse."""
    trial = comparison.trial
    best = next(c for c in trial.candidates if c.name == comparison.best)
    gaps = {text: candidates[best.name].difference for text, candidates in comparison.texts.items()}
    worse = [
        f"{text} by {difference_text(gap)}"
        for text, gap in gaps.items()
        if gap is not None and gap.is_clear and gap.middle > 0
    ]
    whole = gaps[WHOLE]
    if whole is not None and whole.is_clear and worse:
        return [
            f"{best.name} is worse than {trial.candidates[0].name} on {listing(worse)}: choose by the text that "
            "matters to you."
        ]
    chosen = best if whole is not None and whole.is_clear else trial.candidates[0]
    replay = "" if chosen.replay is None else f", with `replay: {chosen.replay}`"
    return [f"For the next version take the slice {chosen.slice}{replay}."]


def trial_table(comparison: Comparison) -> Table:
    """Return a row for each candidate and text: perplexity, and the difference from the first candidate."""
    trial, texts = comparison.trial, comparison.texts
    known = [one.perplexity for candidates in texts.values() for one in candidates.values()]
    places = decimals(known) if known else 0
    rows = [
        row(candidate.name if place == 0 else "", text, candidates[candidate.name], places)
        for candidate in trial.candidates
        for place, (text, candidates) in enumerate(texts.items())
    ]
    repeats = min((one.repeats for candidates in texts.values() for one in candidates.values()), default=0)
    note = (
        f"Differences from {trial.candidates[0].name} with 95% intervals from {plural(repeats, 'paired repeat')}; "
        f"bold: the interval leaves out 0. `{WHOLE}` is the first validation set."
    )
    header = ("Candidate", "Measured on", "Perplexity", "Difference", "95% interval")
    return Table(header, tuple(rows), left=2, notes=(note,))


def row(name: str, text: str, one: Measured, places: int) -> tuple[Cell, ...]:
    """Return the row of a candidate on one text; `name` is empty below the candidate's first row."""
    gap = one.difference
    difference, bounds = ("", "") if gap is None else (percent(gap.middle), bounds_text(gap) or MISSING)
    return (
        Cell(name, opens=bool(name)),
        Cell(text),
        Cell(f"{one.perplexity:.{places}f}"),
        Cell(difference, best=gap is not None and gap.is_clear),
        Cell(bounds),
    )


def bounds_text(gap: Difference) -> str:
    """Format an interval: `[+0.20%, +0.42%]`, empty if it is unknown."""
    return "" if gap.low is None or gap.high is None else f"[{percent(gap.low)}, {percent(gap.high)}]"


def difference_text(gap: Difference) -> str:
    """Format a difference: `+0.31% [+0.20%, +0.42%]`."""
    return f"{percent(gap.middle)} {bounds_text(gap)}".rstrip()


def percent(share: float) -> str:
    """Format a signed share in percent with two decimals."""
    return f"{100 * share:+.2f}%".replace("-", "−")


def draw_differences(comparison: Comparison) -> Drawing:
    """Draw a row for each candidate and text: the difference in perplexity with its interval."""
    trial = comparison.trial
    others = trial.candidates[1:]
    height = 0.9 + 0.32 * len(others) * max(1, len(comparison.texts))
    with drawing_style():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        rows: list[tuple[Any, ...]] = []
        for text, candidates in comparison.texts.items():
            for candidate in others:
                gap = candidates[candidate.name].difference
                if gap is not None:
                    rows.append((text, candidate.name, gap.middle, gap.low, gap.high))
        draw_rows(axes, rows)
        axes.set_xlabel(f"perplexity against {trial.candidates[0].name}, %")
        title = f"Differences of the {trial.kind} from step {trial.begin:,}"
        what = "rate" if trial.kind != AUDITION else "data"
        caption = (
            f"Difference in perplexity between candidates of other {what} after {trial.steps:,} steps from one "
            "checkpoint; bars: 95% intervals from the paired repeats. Left of 0 is better."
        )
        data = csv_text(("text", "candidate", "difference", "low", "high"), rows)
        return finished(figure, trial.name, title, caption, data)


def draw_rows(axes: Axes, rows: list[tuple[Any, ...]]) -> None:
    """Draw the points with their intervals, the first row on top."""
    for place, (_, _, middle, low, high) in enumerate(rows):
        if low is not None and high is not None:
            axes.plot([100 * low, 100 * high], [place, place], color=SOFT, linewidth=2.4)
        axes.plot([100 * middle], [place], color=INK, marker="o", markersize=5, linestyle="none")
    axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{name} on {text}" for text, name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
