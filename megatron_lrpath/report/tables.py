"""The report's tables as data (one form for the page, the Markdown and the terminal), and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_lrpath.paradigms import CPT, OURS, PTFS, TABLE_ORDER
from megatron_lrpath.plan.wording import paradigm_name, schedule_name
from megatron_lrpath.report.collect import RunRecord, RunTree, Score
from megatron_lrpath.wording import MISSING, decimals, duration, listing, plural, short_number, signed_percent

SKIPPED_SHOWN = 10  # steps of a run
Scores = dict[tuple[str, str], float]
"""(paradigm, version) -> perplexity, for the models that have one."""


@dataclass(frozen=True)
class Cell:
    """A cell's text; `best` is set in bold, `opens` begins a group of rows, `paradigm` shows its colour."""

    text: str
    best: bool = False
    opens: bool = False
    paradigm: str = ""


@dataclass(frozen=True)
class Table:
    """A header, rows of the same width, the number of left-aligned columns, and lines to stand below."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left: int
    notes: tuple[str, ...] = ()


def perplexities(tree: RunTree, pick: Callable[[RunRecord], Score | None]) -> Scores:
    """The perplexity that `pick` finds in each version's model; models without one are left out."""
    found: Scores = {}
    for paradigm in TABLE_ORDER:
        for version in tree.plan.versions:
            record = tree.model_of(paradigm, version.name)
            score = pick(record) if record is not None else None
            if score is not None:
                found[paradigm, version.name] = score.perplexity
    return found


def overall(record: RunRecord) -> Score | None:
    """The score on the whole validation set."""
    return record.evaluation.score if record.evaluation else None


def of_domain(domain: str, record: RunRecord) -> Score | None:
    """The score on one domain."""
    return record.evaluation.domains.get(domain) if record.evaluation else None


def mean_perplexity(tree: RunTree, scores: Scores, paradigm: str) -> float | None:
    """The mean over the compared versions; None unless every one of them has a perplexity."""
    values = [scores.get((paradigm, version)) for version in tree.compared]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def main_table(tree: RunTree) -> Table:
    """The paper's Table 1: schedule, paradigm, cost and the perplexity of every version but the first."""
    scores = perplexities(tree, overall)
    places = decimals(list(scores.values()))
    means = {p: mean_perplexity(tree, scores, p) for p in TABLE_ORDER}
    mean_column = len(tree.compared) > 1
    rows = []
    for paradigm in TABLE_ORDER:
        first = paradigm == TABLE_ORDER[0]
        row = [
            Cell(schedule_name(tree.plan) if first else "", opens=first),
            Cell(paradigm_name(tree.plan, paradigm), paradigm=paradigm),
            Cell(f"{tree.relative_cost(paradigm):.2f}×"),
            *_score_cells(tree.compared, scores, paradigm, places),
        ]
        if mean_column:
            row.append(_cell(means[paradigm], [m for m in means.values() if m is not None], places))
        rows.append(tuple(row))
    header = ("Schedule", "Paradigm", "Cost", *tree.compared, *(("Mean",) if mean_column else ()))
    return Table(header, tuple(rows), left=2, notes=tuple(_main_notes(tree, scores, places)))


def domain_table(tree: RunTree) -> Table | None:
    """The same for every domain of the validation set; None where no evaluation names domains."""
    sizes = _domain_sizes(tree)
    rows = []
    for domain in sizes:
        scores = perplexities(tree, partial(of_domain, domain))
        places = decimals(list(scores.values()))
        for paradigm in TABLE_ORDER:
            first = paradigm == TABLE_ORDER[0]
            label = f"{domain} ({short_number(sizes[domain])} tokens)" if first else ""
            name = Cell(paradigm_name(tree.plan, paradigm), paradigm=paradigm)
            cells = _score_cells(tree.compared, scores, paradigm, places)
            rows.append((Cell(label, opens=first), name, *cells))
    return Table(("Domain", "Paradigm", *tree.compared), tuple(rows), left=2) if rows else None


def run_table(tree: RunTree) -> Table:
    """Every training once: where it starts and ends, how far it is, how long it took, its loss."""
    rows, before = [], ""
    for record in tree:
        run, usual = record.run, record.history.usual_seconds
        paradigm = record.label.split("/")[0]
        rows.append(
            (
                Cell(record.label, opens=paradigm != before, paradigm=paradigm),
                Cell(f"{run.parent.run} at {run.parent.step:,}" if run.parent else "random weights"),
                Cell(f"{run.first_step:,} → {run.last_step:,}"),
                Cell(f"{run.steps:,}"),
                Cell(duration(record.history.seconds)),
                Cell(short_number(tree.plan.batch.tokens / usual) if usual else MISSING),
                Cell(_last_loss(record)),
                Cell(record.state.progress),
            )
        )
        before = paradigm
    header = ("Run", "Starts from", "From → to step", "Steps", "Time", "Tokens/s", "Train loss", "State")
    note = (
        "Time: of all recorded steps. Tokens/s: of the median step. Train loss: mean of the last ten steps."
    )
    return Table(header, tuple(rows), left=2, notes=(note, *_beyond_notes(tree), *_skipped_notes(tree)))


def _beyond_notes(tree: RunTree) -> list[str]:
    """Which main path has gone further than its plan."""
    return [
        f"{record.label} has gone on to step {record.state.beyond:,}, for versions that the plan no longer has."
        for record in tree
        if record.state.beyond is not None
    ]


def _skipped_notes(tree: RunTree) -> list[str]:
    """Which updates were skipped for a loss spike, run by run (the first of many)."""
    notes = []
    for record in tree:
        steps = [f"{step:,}" for step in record.skipped]
        shown = listing(steps) if len(steps) <= SKIPPED_SHOWN else f"{', '.join(steps[:SKIPPED_SHOWN])}, …"
        if steps:
            notes.append(
                f"{record.label}: {plural(len(steps), 'update')} skipped for a loss spike, step {shown}."
            )
    return notes


def result_in_words(tree: RunTree) -> str:
    """The mean perplexities of ours and CPT against that of PTFS; empty where there is nothing to compare."""
    scores = perplexities(tree, overall)
    places = decimals(list(scores.values()))
    base = mean_perplexity(tree, scores, PTFS.name)
    parts = []
    for paradigm in (OURS.name, CPT.name):
        mean = mean_perplexity(tree, scores, paradigm)
        if base is not None and mean is not None:
            parts.append(
                f"{paradigm_name(tree.plan, paradigm)} {mean:.{places}f} ({signed_percent(mean / base - 1)}) "
                f"at {tree.relative_cost(paradigm):.2f}× the cost"
            )
    return (
        f"Mean perplexity of {_span(tree.compared)}: PTFS {base:.{places}f}, {', '.join(parts)}."
        if parts
        else ""
    )


def _score_cells(versions: list[str], scores: Scores, paradigm: str, places: int) -> list[Cell]:
    """One cell a version, the lowest perplexity of the version's column marked."""
    columns = {v: [scores[p, v] for p in TABLE_ORDER if (p, v) in scores] for v in versions}
    return [_cell(scores.get((paradigm, v)), columns[v], places) for v in versions]


def _cell(value: float | None, column: list[float], places: int) -> Cell:
    """The value; best where it shows the same digits as the lowest of at least two."""
    if value is None:
        return Cell(MISSING)
    text = f"{value:.{places}f}"
    return Cell(text, best=len(column) > 1 and text == f"{min(column):.{places}f}")


def _main_notes(tree: RunTree, scores: Scores, places: int) -> list[str]:
    """What the columns mean, and the first version, which the table leaves out."""
    sizes = {r.evaluation.score.tokens for r in tree if r.evaluation}
    basis = f"{short_number(sizes.pop())} validation tokens" if len(sizes) == 1 else "the validation set"
    notes = [
        f"Perplexity on {basis}, lower is better, the best of each column in bold. "
        "Cost: steps of all of a paradigm's runs over those of PTFS."
    ]
    first = tree.plan.versions[0].name
    if first not in tree.compared and any((p, first) in scores for p in TABLE_ORDER):
        shown = {
            p: f"{scores[p, first]:.{places}f}" if (p, first) in scores else MISSING for p in TABLE_ORDER
        }
        notes.append(
            f"{first}, as in the paper not in the table: PTFS and CPT {shown[PTFS.name]} "
            f"(one and the same run), {OURS.title} {shown[OURS.name]}."
        )
    return notes


def _domain_sizes(tree: RunTree) -> dict[str, int]:
    """Validation tokens of every domain that an evaluation names, in the order they are first named."""
    sizes: dict[str, int] = {}
    for record in tree:
        for name, score in (record.evaluation.domains if record.evaluation else {}).items():
            sizes.setdefault(name, score.tokens)
    return sizes


def _last_loss(record: RunRecord) -> str:
    """The mean training loss of the last ten recorded steps; of a single one it would be mostly noise."""
    loss = record.history["loss"][-10:]
    finite = loss[np.isfinite(loss)]
    return f"{finite.mean():.3f}" if len(finite) else MISSING


def _span(versions: list[str]) -> str:
    return f"{versions[0]} to {versions[-1]}" if len(versions) > 2 else listing(versions)


def fine_tuning_table(tree: RunTree) -> Table | None:
    """A row for every version and paradigm that is fine-tuned; None where the plan fine-tunes nothing."""
    sft = tree.plan.sft
    if sft is None or not tree.tuned:
        return None
    order = [version.name for version in tree.plan.versions]
    records = sorted(tree.tuned, key=lambda record: order.index(record.run.version))
    rows, before = [], ""
    for record in records:
        run = record.run
        rows.append(
            (
                Cell(run.version if run.version != before else "", opens=run.version != before),
                Cell(paradigm_name(tree.plan, run.paradigm), paradigm=run.paradigm),
                Cell(f"{run.steps:,}"),
                Cell(record.state.progress),
                _answers_cell(record.evaluation.answers if record.evaluation else None),
                _answers_cell(record.evaluation.score if record.evaluation else None),
                _answers_cell(_before(tree, record)),
            )
        )
        before = run.version
    header = ("Version", "Paradigm", "Steps", "State", "Held-out answers", "Validation set", "… before")
    note = (
        "Perplexities, lower is better: on the held-out answers of the chat data, and on the fixed validation set "
        "after and before the fine-tuning."
    )
    return Table(header, tuple(rows), left=2, notes=(note,))


def _before(tree: RunTree, record: RunRecord) -> Score | None:
    base = tree.model_of(record.run.paradigm, record.run.version)
    return base.evaluation.score if base is not None and base.evaluation is not None else None


def _answers_cell(score: Score | None) -> Cell:
    return Cell(MISSING if score is None else f"{score.perplexity:.{decimals([score.perplexity])}f}")


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV; None and NaN become empty fields, floats keep every digit."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if _absent(value) else value for value in row] for row in rows])
    return stream.getvalue()


def perplexity_csv(tree: RunTree) -> str:
    """Every evaluation: one row for the whole validation set (domain empty) and one for each domain."""
    rows: list[tuple[object, ...]] = []
    for paradigm in TABLE_ORDER:
        for version in tree.plan.versions:
            record = tree.model_of(paradigm, version.name)
            if record is None or record.evaluation is None:
                continue
            scores = {"": record.evaluation.score, **record.evaluation.domains}
            for domain, score in scores.items():
                values = (domain, score.perplexity, score.loss, score.tokens)
                rows.append((paradigm, version.name, record.label, *values))
    header = ("paradigm", "version", "run", "domain", "perplexity", "loss", "tokens")
    return csv_text(header, rows)


def _absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
