"""Results of `lrpath eval` other than perplexities: benchmarks in the form of the paper's Table 4, and completions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_lrpath.evaluate.downstream import Benchmark, in_order
from megatron_lrpath.plan.wording import paradigm_name
from megatron_lrpath.report.collect import RunTree
from megatron_lrpath.report.tables import Cell, Table, csv_text, score_cell
from megatron_lrpath.runs.completions import completions_of
from megatron_lrpath.runs.folder import RunFolder, read_json_object

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Measured:
    """A model's results: its version and paradigm, and whether it was fine-tuned."""

    version: str
    paradigm: str
    tuned: bool
    results: Results


def collected(tree: RunTree) -> list[Measured]:
    """Return every measured model, by version, pre-trained before fine-tuned models, in the order of
    paradigms.

    Results of another step than the model's are excluded.
    """
    found = []
    for version in (version.name for version in tree.plan.versions):
        bare = [(tree.model_of(paradigm, version), False) for paradigm in tree.paradigms]
        tuned = [(record, True) for record in tree.tuned if record.run.version == version]
        for record, is_tuned in (*bare, *tuned):
            if record is None:
                continue
            stored = read_json_object(RunFolder(record.folder).downstream) or {}
            rows = stored.get("results") if stored.get("step") == record.run.last_step else None
            results = {
                task: row
                for task, row in (rows.items() if isinstance(rows, dict) else ())
                if isinstance(row, dict) and isinstance(row.get("score"), int | float)
            }
            if results:
                found.append(Measured(version, record.run.paradigm, is_tuned, results))
    return found


def downstream_table(tree: RunTree) -> Table | None:
    """Return the compared versions' scores times 100 and their mean; None if there are no results.

    The best score of a version in each column is marked, separately for pre-trained and fine-tuned models.
    """
    rows = [row for row in collected(tree) if row.version in tree.compared]
    if not rows:
        return None
    columns = in_order({task for row in rows for task in row.results})
    drawn: list[tuple[Cell, ...]] = []
    for (version, tuned), group in itertools.groupby(rows, key=lambda row: (row.version, row.tuned)):
        members = list(group)
        lines = [scores(row.results, columns) for row in members]
        full = [[score for score in column if None not in column] for column in zip(*lines, strict=True)]
        for number, (row, line) in enumerate(zip(members, lines, strict=True)):
            cells = [score_cell(score, column, 2, max) for score, column in zip(line, full, strict=True)]
            name = Cell(paradigm_name(tree.plan, row.paradigm), paradigm=row.paradigm)
            first = "" if number else f"{version}, fine-tuned" if tuned else version
            drawn.append((Cell(first, opens=not number), name, *cells))
    header = ("Version", "Paradigm", *(column.label for column in columns), "AVG")
    return Table(header, tuple(drawn), left=2, notes=tuple(_notes([row.results for row in rows])))


def scores(results: Results, columns: list[Benchmark]) -> list[float | None]:
    """Return a row's scores times 100, and their mean if none is missing."""
    found = [100 * results[column.task]["score"] if column.task in results else None for column in columns]
    known = [score for score in found if score is not None]
    return [*found, sum(known) / len(known) if known and len(known) == len(found) else None]


def downstream_csv(tree: RunTree) -> str:
    """Return every result of every model with all digits, including subtasks; empty if there are no results."""
    rows: list[tuple[object, ...]] = []
    for model in collected(tree):
        who = (model.paradigm, model.version, "yes" if model.tuned else "no")
        for column in in_order(model.results):
            row = model.results[column.task]
            settings = row.get("settings", {})
            rest = tuple(settings.get(name) for name in ("limit", "num_fewshot", "chat"))
            measures = (row.get("stderr"), row.get("metric"), row.get("samples"), *rest)
            rows.append((*who, column.label, column.task, row["score"], *measures))
            for name, score in row.get("subtasks", {}).items():
                rows.append((*who, column.label, name, score, None, row.get("metric"), None, *rest))
    header = "paradigm version fine_tuned benchmark task score stderr metric samples limit fewshot chat"
    return csv_text(header.split(), rows) if rows else ""


def _notes(rows: Iterable[Results]) -> list[str]:
    """Return a note on the scores, and on settings that change them from the tasks' defaults."""
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


@dataclass(frozen=True)
class Prompt:
    """A prompt, its domain (empty: from the plan), and a table of the versions' continuations."""

    text: str
    domain: str
    table: Table


def completions_by_prompt(tree: RunTree) -> list[Prompt]:
    """Return the prompts with completions, with a row for each paradigm and version; empty if there are none."""
    by_prompt: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for paradigm in tree.paradigms:
        for version in tree.plan.versions:
            record = tree.model_of(paradigm, version.name)
            for one in completions_of(record.folder, record.run.last_step) if record else ():
                row = (paradigm, version.name, one.text)
                by_prompt.setdefault((one.prompt, one.domain), []).append(row)
    found = []
    for (prompt, domain), written in by_prompt.items():
        rows, before = [], ""
        for paradigm, name, text in written:
            opens, before = paradigm != before, paradigm
            label = paradigm_name(tree.plan, paradigm) if opens else ""
            first = Cell(label, opens=opens, paradigm=paradigm if opens else "")
            rows.append((first, Cell(name), Cell(text.strip() or "–", is_prose=True)))
        found.append(
            Prompt(prompt, domain, Table(("Paradigm", "Version", "Continuation"), tuple(rows), left=3))
        )
    return found
