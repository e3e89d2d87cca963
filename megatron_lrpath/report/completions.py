"""The completions of `lrpath eval` in the run folders as a table: a prompt, then each version's continuation."""

from __future__ import annotations

from megatron_lrpath.plan.wording import paradigm_name
from megatron_lrpath.report.collect import RunTree
from megatron_lrpath.report.tables import Cell, Table
from megatron_lrpath.runs.completions import completions_of


def completion_table(tree: RunTree) -> Table | None:
    """Return a row for each prompt, paradigm and version; None if no model has completions."""
    by_prompt: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for paradigm in tree.paradigms:
        for version in tree.plan.versions:
            record = tree.model_of(paradigm, version.name)
            for one in completions_of(record.folder, record.run.last_step) if record else ():
                row = (paradigm, version.name, one.text)
                by_prompt.setdefault((one.prompt, one.domain), []).append(row)
    rows = []
    for (prompt, domain), written in by_prompt.items():
        for number, (paradigm, name, text) in enumerate(written):
            label = f"{prompt} [{domain}]" if domain else prompt
            shown = Cell(paradigm_name(tree.plan, paradigm), paradigm=paradigm)
            rows.append(
                (Cell("" if number else label, opens=not number), shown, Cell(name), Cell(text or "–"))
            )
    return Table(("Prompt", "Paradigm", "Version", "Completion"), tuple(rows), left=4) if rows else None
