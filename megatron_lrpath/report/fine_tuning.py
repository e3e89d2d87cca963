"""The fine-tuned versions as a table: how far they are, and their perplexities."""

from __future__ import annotations

from megatron_lrpath.report.collect import RunRecord, RunTree, Score
from megatron_lrpath.report.tables import Cell, Table
from megatron_lrpath.report.words import MISSING, decimals, paradigm_name


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
                Cell(record.state),
                _cell(record.evaluation.answers if record.evaluation else None),
                _cell(record.evaluation.score if record.evaluation else None),
                _cell(_before(tree, record)),
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


def _cell(score: Score | None) -> Cell:
    return Cell(MISSING if score is None else f"{score.perplexity:.{decimals([score.perplexity])}f}")
