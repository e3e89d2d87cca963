"""A run's completions: the model's continuations of a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.runs.folder import RunFolder, read_json_object
from megatron_lrpath.runs.results import is_fresh
from megatron_lrpath.sealed import write_sealed


@dataclass(frozen=True)
class Completion:
    """A prompt, the model's continuation, and the domain of the prompt (empty: from the plan)."""

    prompt: str
    text: str
    domain: str = ""


def has_completions(plan: Plan, run: Run) -> bool:
    """Return whether completions are made for the run's model: a version's model that was not fine-tuned."""
    return run.makes_version and not run.is_sft and not plan.tokenizer.type.startswith("Null")


def write_completions(plan: Plan, run: Run, checkpoint: str | None, found: Sequence[Completion]) -> None:
    """Record the completions of the run's model with this checkpoint fingerprint, and the plan's prompts."""
    stored = {
        "step": run.last_step,
        "checkpoint": checkpoint,
        "prompts": list(plan.prompts),
        "completions": [asdict(one) for one in found],
    }
    write_sealed(RunFolder(plan.folder(run)).completions, stored)


def _fresh(folder: Path, step: int) -> dict[str, Any]:
    stored = read_json_object(RunFolder(folder).completions)
    return stored if stored and is_fresh(folder, step, stored) else {}


def completions_of(folder: Path, step: int) -> list[Completion]:
    """Return the completions of the current model of `step`; empty if there are none that can be used."""
    rows = _fresh(folder, step).get("completions")
    fields = ("prompt", "text", "domain")
    return [
        Completion(*(str(one.get(name, "")) for name in fields))
        for one in (rows if isinstance(rows, list) else [])
        if isinstance(one, dict)
    ]


def needs_completions(plan: Plan, run: Run) -> bool:
    """Return whether the plan has its own prompts without completions of the run's model."""
    if not plan.prompts or not has_completions(plan, run):
        return False
    return _fresh(plan.folder(run), run.last_step).get("prompts") != list(plan.prompts)
