"""What a report cannot say yet, and why: unfinished runs, missing or foreign evaluations, damaged files."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lrpath.report.collect import RunTree
from megatron_lrpath.report.words import count, listing


@dataclass(frozen=True)
class Gap:
    """Something missing in words, and the command that goes on (empty where none does)."""

    text: str
    command: str = ""


def gaps(tree: RunTree) -> list[Gap]:
    """Everything that is missing or damaged; nothing where the report is whole."""
    found = []
    unfinished, unevaluated = tree.unfinished(), tree.unevaluated()
    if unfinished:
        states = listing([f"{record.label} ({record.state})" for record in unfinished])
        text = f"{count(len(unfinished), 'run')} not finished: {states}."
        found.append(Gap(text, f"lrpath run {tree.plan.path}"))
    if unevaluated:
        names = listing([record.label for record in unevaluated])
        text = f"{count(len(unevaluated), 'trained model')} without a perplexity: {names}."
        found.append(Gap(text, f"lrpath eval {tree.plan.path}"))
    sizes = sorted({record.evaluation.score.tokens for record in tree if record.evaluation})
    if len(sizes) > 1:
        text = (
            "The perplexities cannot be compared: they were measured on different numbers of validation "
            f"tokens ({listing([f'{size:,}' for size in sizes])}). Evaluate every model again on one set."
        )
        found.append(Gap(text))
    found.extend(Gap(f"{record.label}: {problem}.") for record in tree for problem in record.problems)
    return found
