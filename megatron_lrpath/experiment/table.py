"""The table of an experiment in the paper's form: variations and paradigms, next to the paper's numbers."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from megatron_lrpath.console import terminal_table
from megatron_lrpath.experiment.load import Experiment
from megatron_lrpath.files import atomic_write_text
from megatron_lrpath.paradigms import PARADIGMS
from megatron_lrpath.plan.wording import paradigm_name
from megatron_lrpath.report.tables import csv_text
from megatron_lrpath.runs.results import fresh_evaluation, version_runs, write_report_sources
from megatron_lrpath.sealed import json_digest
from megatron_lrpath.wording import MISSING, decimals

PAGE = "table.md"


@dataclass(frozen=True)
class Row:
    """A variation under a paradigm: perplexities by version (one for each seed), the paper's, the cost."""

    group: str
    paradigm: str
    label: str
    cost: float
    measured: dict[str, tuple[float, ...]]
    paper: tuple[float, ...] | None


@dataclass(frozen=True)
class ExperimentTable:
    """The rows, and the number of available perplexities (`known` of `wanted`).

    `evaluations` has the evaluated models of versions by point, paradigm and version; `digests` the
    digests of the evaluations by `point/paradigm/run`.
    """

    experiment: Experiment
    rows: tuple[Row, ...]
    evaluations: dict[tuple[str, str, str], dict[str, Any]]
    digests: dict[str, str]

    @property
    def known(self) -> int:
        """The number of measured perplexities."""
        return sum(len(values) for row in self.rows for values in row.measured.values())

    @property
    def wanted(self) -> int:
        """The number of perplexities after all trainings."""
        seeds = {group: len(self.experiment.of(group)) for group in self.experiment.groups}
        return sum(len(row.measured) * seeds[row.group] for row in self.rows)

    @property
    def header(self) -> list[str]:
        """Return the titles of the columns."""
        paper = any(row.paper for row in self.rows)
        versions = list(self.experiment.show)
        return ["variation", "paradigm", "cost", *versions, *(f"paper {one}" for one in versions if paper)]

    def cells(self) -> list[list[str]]:
        """Return the rows as text, with mean and deviation if there are several seeds."""
        paper = any(row.paper for row in self.rows)
        means = [statistics.fmean(values) for row in self.rows for values in row.measured.values() if values]
        places = decimals(means)

        def score(values: Sequence[float]) -> str:
            deviation = f" ±{statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
            return f"{statistics.fmean(values):.{places}f}{deviation}" if values else MISSING

        lines = []
        for row in self.rows:
            line = [row.group, row.label, f"{row.cost:.2f}"]
            line += [score(row.measured[version]) for version in self.experiment.show]
            missing = [MISSING] * len(self.experiment.show) if paper else []
            lines.append(line + ([f"{number:.2f}" for number in row.paper or ()] or missing))
        return lines


def make_table(experiment: Experiment) -> ExperimentTable:
    """Read the available evaluations."""
    evaluations, digests = {}, {}
    for point, paradigm in itertools.product(experiment.points, experiment.paradigms):
        for run in version_runs(point.plan, [paradigm]):
            if found := fresh_evaluation(point.plan.folder(run), run.last_step):
                evaluations[point.name, paradigm, run.version] = found
                digests[f"{point.name}/{run.key}"] = json_digest(found)
    rows, paradigms = [], [name for name in PARADIGMS if name in experiment.paradigms]
    for group, paradigm in itertools.product(experiment.groups, paradigms):
        points, measured = experiment.of(group), {}
        for version in experiment.show:
            scores = (evaluations.get((point.name, paradigm, version)) for point in points)
            measured[version] = tuple(float(score["perplexity"]) for score in scores if score)
        label, cost = paradigm_name(points[0].plan, paradigm), points[0].plan.cost(paradigm).relative
        paper = experiment.paper.get(group, {}).get(paradigm)
        rows.append(Row(group, paradigm, label, cost, measured, paper))
    return ExperimentTable(experiment, tuple(rows), evaluations, digests)


def write_table(table: ExperimentTable, folder: Path) -> Path:
    """Write `table.md`, `table.csv` (the number of every seed), and the record of their sources; return the
    page.
    """
    lines = [f"# {table.experiment.name}", ""]
    if table.experiment.about:
        lines += [table.experiment.about, ""]
    lines += [f"| {' | '.join(table.header)} |", f"|{'---|' * len(table.header)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in table.cells()]
    if table.known < table.wanted:
        lines += ["", f"{table.known} of {table.wanted} perplexities have been measured."]
    atomic_write_text(folder / PAGE, "\n".join(lines) + "\n")
    atomic_write_text(folder / "table.csv", table_csv(table))
    write_report_sources(folder, table.digests)
    return folder / PAGE


def show_table(table: ExperimentTable, page: Path, console: Console) -> None:
    """Print the table and its path."""
    align = "ll" + "r" * (len(table.header) - 2)
    drawn = terminal_table(table.header, align, table.cells())
    if table.experiment.about:
        console.print(Text(table.experiment.about))
    console.print(drawn)
    if table.known < table.wanted:
        missing = f"{table.known} of {table.wanted} perplexities have been measured."
        console.print(Text(f"{missing} Next: lrpath run {table.experiment.path}", style="yellow"))
    console.print(Text(f"Table: {page}"), soft_wrap=True)


def table_csv(table: ExperimentTable) -> str:
    """Return one line for each measured perplexity."""
    header = ("point", "seed", "variation", "paradigm", "relative_cost", "version", "perplexity", "paper")
    lines: list[tuple[object, ...]] = []
    for row in table.rows:
        for index, version in enumerate(table.experiment.show):
            paper = row.paper[index] if row.paper else None
            for point in table.experiment.of(row.group):
                if found := table.evaluations.get((point.name, row.paradigm, version)):
                    facts = (point.name, point.plan.seed, row.group, row.paradigm, row.cost)
                    lines.append((*facts, version, float(found["perplexity"]), paper))
    return csv_text(header, lines)
