"""The completions of `lrpath eval` in the run folders: under each prompt, each version's continuation."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lrpath.plan.wording import paradigm_name
from megatron_lrpath.report.collect import RunTree
from megatron_lrpath.report.tables import Cell, Table
from megatron_lrpath.runs.completions import completions_of


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
