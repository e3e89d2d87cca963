"""Scores on downstream benchmarks in the form of the paper's Table 4: a row for every version and paradigm."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_lrpath.evaluate.benchmarks import Benchmark, in_order
from megatron_lrpath.evaluate.downstream import RESULTS
from megatron_lrpath.evaluate.targets import read_json
from megatron_lrpath.report.collect import PARADIGMS, RunTree
from megatron_lrpath.report.csvdata import csv_text
from megatron_lrpath.report.tables import Cell, Table
from megatron_lrpath.report.words import MISSING, paradigm_name

Results = dict[str, dict[str, Any]]


def results_in(folder: Path, step: int) -> Results:
    """Task -> what was measured of the model of this step; results of another step are left out."""
    stored = read_json(folder / RESULTS) or {}
    found = stored.get("results") if stored.get("step") == step else None
    rows = found.items() if isinstance(found, dict) else ()
    return {
        task: row for task, row in rows if isinstance(row, dict) and isinstance(row.get("score"), int | float)
    }


def collected(tree: RunTree) -> dict[tuple[str, str], Results]:
    """(version, paradigm) -> results, of every version's model that has some."""
    found: dict[tuple[str, str], Results] = {}
    for version in tree.plan.versions:
        for paradigm in PARADIGMS:
            record = tree.model_of(paradigm, version.name)
            results = results_in(record.folder, record.run.last_step) if record else {}
            if results:
                found[version.name, paradigm] = results
    return found


def downstream_table(tree: RunTree) -> Table | None:
    """The compared versions' scores times 100 and their mean; None where nothing was measured.

    The best of a version in each column is marked where all its paradigms have a score.
    """
    rows = {key: row for key, row in collected(tree).items() if key[0] in tree.compared}
    if not rows:
        return None
    columns = in_order({task for results in rows.values() for task in results})
    drawn: list[tuple[Cell, ...]] = []
    for version in tree.compared:
        shown = [paradigm for paradigm in PARADIGMS if (version, paradigm) in rows]
        lines = {paradigm: scores(rows[version, paradigm], columns) for paradigm in shown}
        for number, paradigm in enumerate(shown):
            cells = [
                _cell(score, [line[place] for line in lines.values()])
                for place, score in enumerate(lines[paradigm])
            ]
            name = Cell(paradigm_name(tree.plan, paradigm), paradigm=paradigm)
            drawn.append((Cell("" if number else version, opens=not number), name, *cells))
    header = ("Version", "Paradigm", *(column.label for column in columns), "AVG")
    return Table(header, tuple(drawn), left=2, notes=tuple(_notes(rows.values(), columns)))


def scores(results: Results, columns: list[Benchmark]) -> list[float | None]:
    """A row's scores times 100 and, where there are all of them, their mean."""
    found = [100 * results[column.task]["score"] if column.task in results else None for column in columns]
    known = [score for score in found if score is not None]
    return [*found, sum(known) / len(known) if len(known) == len(found) else None]


def downstream_csv(tree: RunTree) -> str:
    """Every result of every version with all its digits, subtasks too; empty where nothing was measured."""
    rows: list[tuple[object, ...]] = []
    for (version, paradigm), results in collected(tree).items():
        for column in in_order(results):
            row = results[column.task]
            settings = row.get("settings", {})
            rest = (row.get("metric"), row.get("samples"), settings.get("limit"), settings.get("num_fewshot"))
            rows.append(
                (paradigm, version, column.label, column.task, row["score"], row.get("stderr"), *rest)
            )
            for name, score in row.get("subtasks", {}).items():
                rows.append(
                    (paradigm, version, column.label, name, score, None, row.get("metric"), None, *rest[2:])
                )
    header = (
        "paradigm",
        "version",
        "benchmark",
        "task",
        "score",
        "stderr",
        "metric",
        "samples",
        "limit",
        "fewshot",
    )
    return csv_text(header, rows) if rows else ""


def _cell(score: float | None, column: list[float | None]) -> Cell:
    if score is None:
        return Cell(MISSING)
    known = [value for value in column if value is not None]
    text = f"{score:.2f}"
    return Cell(text, best=len(known) == len(column) > 1 and text == f"{max(known):.2f}")


def _notes(rows: Iterable[Results], columns: list[Benchmark]) -> list[str]:
    """What the numbers are, and what makes them other numbers than the tasks' own."""
    notes = ["Scores of lm-evaluation-harness times 100, higher is better, the best of each version in bold."]
    settings = [row.get("settings", {}) for results in rows for row in results.values()]
    limits = sorted({setting["limit"] for setting in settings if setting.get("limit")})
    if limits:
        notes.append(
            f"Some were measured on the first {', '.join(map(str, limits))} samples of each subtask alone."
        )
    if len({(setting.get("num_fewshot"), setting.get("chat")) for setting in settings}) > 1:
        notes.append("Not all were measured with the same prompts (--num-fewshot, --chat).")
    return notes
