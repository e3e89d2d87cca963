"""Build and write the report: one HTML page, the same as Markdown, the figures, and the terminal output."""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from megatron_lrpath.console import terminal_table
from megatron_lrpath.files import atomic_write_bytes, atomic_write_text
from megatron_lrpath.plan import Plan
from megatron_lrpath.report.collect import Gap, RunTree, collect, gaps
from megatron_lrpath.report.evaluations import Prompt, completions_by_prompt, downstream_csv, downstream_table
from megatron_lrpath.report.facts import data_table, facts, subtitle, unmeasured
from megatron_lrpath.report.figures import draw_cost, draw_losses, draw_rates
from megatron_lrpath.report.rates import RateSummary, check_rates, summarize
from megatron_lrpath.report.style import Drawing, SavedAdvice, read_advice
from megatron_lrpath.report.tables import (
    Table,
    domain_table,
    fine_tuning_table,
    main_table,
    perplexity_csv,
    result_in_words,
    run_table,
    set_table,
)
from megatron_lrpath.report.trials import TrialPart, trial_parts
from megatron_lrpath.runs.folder import report_page
from megatron_lrpath.runs.results import evaluation_digests, write_report_sources

EMBEDDED_BYTES = 1_000_000
"""Maximum size of data that is also embedded in the page; larger data is only in a separate file."""


@dataclass(frozen=True)
class Report:
    """The content of the page, the Markdown file and the terminal output."""

    name: str
    written: str
    gaps: list[Gap]
    subtitle: str
    result: str
    results: Table
    domains: Table | None
    sets: Table | None
    downstream: Table | None
    completions: list[Prompt]
    rate_check: RateSummary
    rates: Drawing
    cost: Drawing | None
    losses: Drawing | None
    advice: SavedAdvice | None
    trials: list[TrialPart]
    tuned: Table | None
    runs: Table
    facts: dict[str, str]
    data: Table
    scores: str
    downstream_scores: str
    sources: dict[str, str]  # `paradigm/run` -> the digest of its evaluation

    @property
    def drawings(self) -> list[Drawing]:
        """The figures with data."""
        advice = self.advice.drawing if self.advice else None
        trials = (part.drawing for part in self.trials)
        every = (self.rates, self.cost, self.losses, advice, *trials)
        return [drawing for drawing in every if drawing is not None]


def make_report(plan: Plan, now: datetime, paradigms: Sequence[str] | None = None, left: str = "") -> Report:
    """Read the plan's runs and build the report; raise UserError if the plan's output folder does not exist.

    `paradigms` as in `collect`; `left` is the remaining training and its cost. The record of sources also
    names the evaluations of paradigms that are not shown, so that the report counts as current.
    """
    tree: RunTree = collect(plan, paradigms)
    results = main_table(tree)
    return Report(
        name=plan.name,
        written=now.strftime("%Y-%m-%d %H:%M %Z").strip(),
        gaps=gaps(tree),
        subtitle=subtitle(tree),
        result=result_in_words(tree),
        results=replace(results, notes=(*results.notes, *([unmeasured(plan)] if unmeasured(plan) else []))),
        domains=domain_table(tree),
        sets=set_table(tree),
        downstream=downstream_table(tree),
        completions=completions_by_prompt(tree),
        rate_check=summarize(check_rates(tree)),
        rates=draw_rates(tree),
        cost=draw_cost(tree),
        losses=draw_losses(tree),
        advice=read_advice(plan),
        trials=trial_parts(plan),
        tuned=fine_tuning_table(tree),
        runs=run_table(tree),
        facts=facts(tree) | ({"Left to train": left} if left else {}),
        data=data_table(tree),
        scores=perplexity_csv(tree),
        downstream_scores=downstream_csv(tree),
        sources=evaluation_digests(plan)
        | {one.label: one.evaluation.digest for one in (*tree, *tree.tuned) if one.evaluation},
    )


def write_report(report: Report, folder: Path) -> Path:
    """Write the report into `folder` and return the page's path; files of an earlier report are replaced.

    The files are `index.html` (self-contained), `report.md` with `FIGURE.png` next to it,
    `data/FIGURE.csv`, `data/perplexities.csv`, with benchmark results `data/downstream.csv`, and last the
    record of the evaluations that the report was made from.
    """
    for drawing in report.drawings:
        atomic_write_text(folder / "data" / f"{drawing.name}.csv", drawing.data)
        atomic_write_bytes(folder / f"{drawing.name}.png", drawing.png)
    atomic_write_text(folder / "data" / "perplexities.csv", report.scores)
    if report.downstream_scores:
        atomic_write_text(folder / "data" / "downstream.csv", report.downstream_scores)
    atomic_write_text(folder / "report.md", render("report.md.j2", report))
    page = report_page(folder)
    atomic_write_text(page, render("index.html.j2", report))
    write_report_sources(folder, report.sources)
    return page


def render(template: str, report: Report) -> str:
    """Render the report in one of the package's templates. User-defined names are escaped in both formats."""
    environment = Environment(
        loader=PackageLoader("megatron_lrpath.report"),
        autoescape=template.startswith("index.html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = markdown_text
    environment.filters["figure"] = figure
    environment.filters["embedded"] = embedded
    return environment.get_template(template).render(report=report)


def figure(drawing: Drawing) -> Markup:
    """Return a figure for the page: inline markup if this package drew it, an image if it was read from a
    file.
    """
    if not drawing.from_file:
        return Markup(drawing.svg)
    address = f"data:image/svg+xml;base64,{base64.b64encode(drawing.svg.encode()).decode()}"
    return Markup('<img alt="{}" src="{}">').format(drawing.caption, address)


@functools.cache
def embedded(text: str) -> str:
    """Return the text as a data URL, so that a page sent alone includes its data; empty if it would be too
    long.
    """
    data = text.encode()
    return f"data:text/csv;base64,{base64.b64encode(data).decode()}" if len(data) <= EMBEDDED_BYTES else ""


def markdown_text(text: str) -> str:
    """Escape `text` for a single line of Markdown."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", flat)


COLOURS = {"good": "green", "bad": "bold red", "none": "yellow"}


def show(report: Report, page: Path, console: Console) -> None:
    """Print the main table, the check of the learning rates, what is missing and the page's path."""
    console.print(rich_table(report.results))
    for note in report.results.notes[1:]:
        console.print(Text(note, style="dim"))
    if report.sets:
        console.print(rich_table(report.sets))
    if report.downstream:
        console.print(rich_table(report.downstream))
    if report.result:
        console.print(Text(report.result))
    check = report.rate_check
    console.print(Text(check.headline, style=COLOURS[check.level]))
    if check.level == "bad":
        for line in check.details:
            console.print(Text(line, style="red"))
    for gap in report.gaps:
        console.print(Text(gap.text, style="yellow"))
    console.print(Text(f"Report: {page}"), soft_wrap=True)


def rich_table(table: Table) -> RichTable:
    """Return the table for a terminal."""
    align = "l" * table.left + "r" * (len(table.header) - table.left)
    rows = ([Text(cell.text, style="bold" if cell.best else "") for cell in row] for row in table.rows)
    return terminal_table(table.header, align, rows)
