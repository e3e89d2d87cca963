"""The report's tables as data (one form for the page, the Markdown and the terminal), and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lrpath.paradigms import CPT, OURS, PARADIGM_ROWS, PTFS
from megatron_lrpath.plan.wording import beginning_text, paradigm_name, schedule_name
from megatron_lrpath.report.collect import RunTree
from megatron_lrpath.runs.breaks import breaks_told
from megatron_lrpath.runs.rewinds import rewinds_told
from megatron_lrpath.wording import MISSING, decimals, duration, listing, plural, short_number, signed_percent

SKIPPED_SHOWN = 10  # number of steps for a run
Scores = dict[tuple[str, str], float]
"""(paradigm, version) -> perplexity, for the models that have one."""

FORMULA = ("=", "+", "-", "@")  # first characters of a formula in a spreadsheet


@dataclass(frozen=True)
class Cell:
    """A cell's text; `best` is bold, `opens` begins a group of rows, `paradigm` sets its color.

    Prose is wrapped and keeps its line ends; other cells stay on one line.
    """

    text: str
    best: bool = False
    opens: bool = False
    paradigm: str = ""
    is_prose: bool = False


@dataclass(frozen=True)
class Table:
    """A header, rows of the same width, the number of left-aligned columns, and lines below the table."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left: int
    notes: tuple[str, ...] = ()


def perplexities(tree: RunTree, domain: str = "", of_set: str = "") -> Scores:
    """Return the perplexities of each version's model on a whole validation set (the first), or one domain;
    missing ones are omitted.
    """
    found: Scores = {}
    for paradigm, version, _, evaluation in tree.evaluated():
        score = evaluation.domains.get(domain) if domain else evaluation.score
        if of_set:
            score = evaluation.sets.get(of_set, {}).get(domain)
        if score is not None:
            found[paradigm, version] = score.perplexity
    return found


def mean_perplexity(tree: RunTree, scores: Scores, paradigm: str) -> float | None:
    """Return the mean over the common versions, see `common`; None if there are none or the paradigm has no
    perplexity.
    """
    values = [scores[paradigm, version] for version in common(tree, scores) if (paradigm, version) in scores]
    return sum(values) / len(values) if values else None


def common(tree: RunTree, scores: Scores) -> list[str]:
    """Return the compared versions for which all paradigms have a perplexity; paradigms without any are
    ignored.
    """
    have = {p: {v for v in tree.compared if (p, v) in scores} for p in tree.paradigms}
    known = [versions for versions in have.values() if versions]
    return [v for v in tree.compared if known and all(v in versions for versions in known)]


def span(versions: Sequence[str]) -> str:
    """Return `v2 to v4`, or a list of at most two."""
    return f"{versions[0]} to {versions[-1]}" if len(versions) > 2 else listing(versions)


def main_table(tree: RunTree) -> Table:
    """Return the paper's Table 1: schedule, paradigm, cost and the perplexity of every version but the first."""
    scores = perplexities(tree)
    places = decimals(list(scores.values()))
    means = {p: mean_perplexity(tree, scores, p) for p in tree.paradigms}
    mean_column = len(tree.compared) > 1
    shared = common(tree, scores)
    mean_of = "Mean" if shared in ([], tree.compared) else f"Mean of {span(shared)}"
    rows = []
    for paradigm, (label, name, *cells) in _paradigm_rows(tree, scores, schedule_name(tree.plan)):
        if mean_column:
            cells.append(score_cell(means[paradigm], [m for m in means.values() if m is not None], places))
        rows.append((label, name, Cell(f"{tree.plan.cost(paradigm).relative:.2f}×"), *cells))
    header = ("Schedule", "Paradigm", "Cost", *tree.compared, *((mean_of,) if mean_column else ()))
    return Table(header, tuple(rows), left=2, notes=tuple(_main_notes(tree, scores, places)))


def domain_table(tree: RunTree) -> Table | None:
    """Return the same for every domain of the validation set; None if no evaluation names domains."""
    sizes: dict[str, int] = {}  # in tokens, in the order in which the evaluations first contain the domains
    for record in tree:
        for name, score in (record.evaluation.domains if record.evaluation else {}).items():
            sizes.setdefault(name, score.tokens)
    rows: list[tuple[Cell, ...]] = []
    for domain, size in sizes.items():
        label = f"{domain} ({short_number(size)} tokens)"
        rows.extend(cells for _, cells in _paradigm_rows(tree, perplexities(tree, domain), label))
    return Table(("Domain", "Paradigm", *tree.compared), tuple(rows), left=2) if rows else None


def set_table(tree: RunTree) -> Table | None:
    """Return the same for the validation sets of later deliveries, each whole and by domain; None if there
    are none.
    """
    sizes: dict[tuple[str, str], int] = {}
    for name in tree.plan.data.more_sets:
        for record in tree:
            found = record.evaluation.sets.get(name, {}) if record.evaluation else {}
            for domain, score in found.items():
                if not domain or len(found) > 2:
                    sizes.setdefault((name, domain), score.tokens)
    rows: list[tuple[Cell, ...]] = []
    for (name, domain), size in sizes.items():
        label = f"{name}{f', {domain}' if domain else ''} ({short_number(size)} tokens)"
        rows.extend(cells for _, cells in _paradigm_rows(tree, perplexities(tree, domain, name), label))
    return Table(("Validation set", "Paradigm", *tree.compared), tuple(rows), left=2) if rows else None


def _paradigm_rows(tree: RunTree, scores: Scores, label: str) -> Iterator[tuple[str, tuple[Cell, ...]]]:
    """Yield for each paradigm its cells: the label (of the group, once), its name, a perplexity for each
    compared version.
    """
    places = decimals(list(scores.values()))
    columns = {v: [scores[p, v] for p in tree.paradigms if (p, v) in scores] for v in tree.compared}
    for paradigm in tree.paradigms:
        first = paradigm == tree.paradigms[0]
        cells = (score_cell(scores.get((paradigm, v)), column, places) for v, column in columns.items())
        name = Cell(paradigm_name(tree.plan, paradigm), paradigm=paradigm)
        yield paradigm, (Cell(label if first else "", opens=first), name, *cells)


def run_table(tree: RunTree) -> Table:
    """Return every training once: its first and last step, its progress, its time, its loss."""
    rows, before = [], ""
    for record in tree:
        run, usual = record.run, record.history.usual_seconds
        paradigm = record.label.split("/")[0]
        last = record.history["loss"][-10:]  # a single one would be mostly noise
        last = last[np.isfinite(last)]
        tokens = record.step_tokens or tree.plan.batch_of(run).tokens
        rows.append(
            (
                Cell(record.label, opens=paradigm != before, paradigm=paradigm),
                Cell(f"{run.parent.run} at {run.parent.step:,}" if run.parent else beginning_text(tree.plan)),
                Cell(f"{run.first_step:,} → {run.last_step:,}"),
                Cell(f"{run.steps:,}"),
                Cell(duration(record.history.seconds)),
                Cell(short_number(tokens / usual) if usual else MISSING),
                Cell(f"{last.mean():.3f}" if len(last) else MISSING),
                Cell(record.state.progress),
            )
        )
        before = paradigm
    header = ("Run", "Starts from", "From → to step", "Steps", "Time", "Tokens/s", "Train loss", "State")
    note = (
        "Time: of all recorded steps. Tokens/s: of the median step. Train loss: mean of the last ten steps."
    )
    return Table(header, tuple(rows), left=2, notes=(note, *_run_notes(tree)))


def _run_notes(tree: RunTree) -> list[str]:
    """Return lines on rewinds, breaks, a main path beyond its plan, and skipped updates."""
    beyond, skipped = [], []
    for record in tree:
        beyond += [f"{record.label} was {told}." for told in rewinds_told(record.lineage)]
        beyond += [f"{record.label} {told}." for told in breaks_told(record.lineage)]
        if record.state.beyond is not None:
            further = f"{record.label} has gone on to step {record.state.beyond:,}"
            beyond.append(f"{further}, for versions that the plan no longer has.")
        steps = [f"{step:,}" for step in record.skipped]
        if steps:
            shown = (
                listing(steps) if len(steps) <= SKIPPED_SHOWN else ", ".join([*steps[:SKIPPED_SHOWN], "…"])
            )
            updates = plural(len(steps), "update")
            skipped.append(f"{record.label}: {updates} skipped for a loss spike, step {shown}.")
    return [*beyond, *skipped]


def result_in_words(tree: RunTree) -> str:
    """Compare the mean perplexities of ours and CPT with that of PTFS; empty if there is nothing to compare."""
    scores = perplexities(tree)
    places = decimals(list(scores.values()))
    base = mean_perplexity(tree, scores, PTFS.name)
    parts = []
    for paradigm in (OURS.name, CPT.name):
        mean = mean_perplexity(tree, scores, paradigm)
        if base is not None and mean is not None:
            parts.append(
                f"{paradigm_name(tree.plan, paradigm)} {mean:.{places}f} ({signed_percent(mean / base - 1)}) "
                f"at {tree.plan.cost(paradigm).relative:.2f}× the cost"
            )
    versions = span(common(tree, scores))
    return f"Mean perplexity of {versions}: PTFS {base:.{places}f}, {', '.join(parts)}." if parts else ""


def score_cell(
    value: float | None, column: Sequence[float], places: int, best: Callable[[Sequence[float]], float] = min
) -> Cell:
    """Return the value; marked if its digits equal those of the best in a column of at least two."""
    if value is None:
        return Cell(MISSING)
    text = f"{value:.{places}f}"
    return Cell(text, best=len(column) > 1 and text == f"{best(column):.{places}f}")


def _main_notes(tree: RunTree, scores: Scores, places: int) -> list[str]:
    """Return notes on the columns, and on the first version, which the table omits."""
    sizes = {r.evaluation.score.tokens for r in tree if r.evaluation}
    basis = f"{short_number(sizes.pop())} validation tokens" if len(sizes) == 1 else "the validation set"
    best = ", the best of each column in bold" if len(tree.paradigms) > 1 else ""
    notes = [
        f"Perplexity on {basis}, lower is better{best}. "
        "Cost: steps of all of a paradigm's runs over those of PTFS."
    ]
    first = tree.plan.versions[0].name
    if first not in tree.compared and any((p, first) in scores for p in tree.paradigms):
        shown = {
            p: f"{scores[p, first]:.{places}f}" if (p, first) in scores else MISSING for p in tree.paradigms
        }
        both = {PTFS.name, CPT.name} <= shown.keys()
        same = [f"{PTFS.title} and {CPT.title} {shown[PTFS.name]} (one and the same run)"] if both else []
        others = [p for p in shown if not (both and p in (PTFS.name, CPT.name))]
        parts = [*same, *(f"{PARADIGM_ROWS[p].title} {shown[p]}" for p in others)]
        notes.append(f"{first}, as in the paper not in the table: {', '.join(parts)}.")
    return notes


def fine_tuning_table(tree: RunTree) -> Table | None:
    """Return a row for every fine-tuned version and paradigm; None if the plan has no fine-tuning."""
    sft = tree.plan.sft
    if sft is None or not tree.tuned:
        return None
    order = [version.name for version in tree.plan.versions]
    records = sorted(tree.tuned, key=lambda record: order.index(record.run.version))
    rows, before = [], ""
    for record in records:
        run, base = record.run, tree.model_of(record.run.paradigm, record.run.version)
        own, before_it = record.evaluation, base.evaluation if base is not None else None
        found = (own and own.answers, own and own.score, before_it and before_it.score)
        scores = [score.perplexity if score else None for score in found]
        rows.append(
            (
                Cell(run.version if run.version != before else "", opens=run.version != before),
                Cell(paradigm_name(tree.plan, run.paradigm), paradigm=run.paradigm),
                Cell(f"{run.steps:,}"),
                Cell(record.state.progress),
                *(score_cell(score, [], decimals([score] if score else [])) for score in scores),
            )
        )
        before = run.version
    header = ("Version", "Paradigm", "Steps", "State", "Held-out answers", "Validation set", "… before")
    note = (
        "Perplexities, lower is better: on the held-out answers of the chat data, and on the fixed validation set "
        "after and before the fine-tuning."
    )
    return Table(header, tuple(rows), left=2, notes=(note,))


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV; None and NaN become empty fields, floats keep every digit, text is safe in
    spreadsheets.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(csv_cell, header))
    for row in rows:
        writer.writerow(map(csv_cell, row))
    return stream.getvalue()


def csv_cell(value: object) -> object:
    """Return a value for a CSV file: text that a spreadsheet would read as a formula is prefixed with an
    apostrophe.
    """
    if isinstance(value, float) and math.isnan(value):
        return ""
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")  # Python's writer does not quote it
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text


def perplexity_csv(tree: RunTree) -> str:
    """Return every evaluation: one row for a whole validation set (domain empty) and one for each domain.

    If there are several sets, a last column names those after the first.
    """
    further = bool(tree.plan.data.more_sets)
    rows: list[tuple[object, ...]] = []
    for paradigm, version, record, evaluation in tree.evaluated():
        for name, scores in {"": {"": evaluation.score, **evaluation.domains}, **evaluation.sets}.items():
            for domain, score in scores.items():
                values = (domain, score.perplexity, score.loss, score.tokens, *([name] if further else []))
                rows.append((paradigm, version, record.label, *values))
    header = (
        "paradigm",
        "version",
        "run",
        "domain",
        "perplexity",
        "loss",
        "tokens",
        *(["set"] if further else []),
    )
    return csv_text(header, rows)
