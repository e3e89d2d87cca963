"""A run's completions: what its model writes after a few prompts, for people to look at."""

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
    """A prompt, what the model wrote after it, and the domain that the prompt is from (empty: the plan)."""

    prompt: str
    text: str
    domain: str = ""


def has_completions(plan: Plan, run: Run) -> bool:
    """Whether the run's model is asked for completions: a version as it is, of text."""
    return run.makes_version and not run.is_sft and not plan.tokenizer.type.startswith("Null")


def write_completions(plan: Plan, run: Run, checkpoint: str | None, found: Sequence[Completion]) -> None:
    """Record the completions of the run's model, whose checkpoint has this fingerprint, and the plan's prompts."""
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
    """The completions of the model of `step` as it is now; none where there are none that can be used."""
    rows = _fresh(folder, step).get("completions")
    fields = ("prompt", "text", "domain")
    return [
        Completion(*(str(one.get(name, "")) for name in fields))
        for one in (rows if isinstance(rows, list) else [])
        if isinstance(one, dict)
    ]


def needs_completions(plan: Plan, run: Run) -> bool:
    """Whether the plan has prompts of its own that the run's model has not been asked."""
    if not plan.prompts or not has_completions(plan, run):
        return False
    return _fresh(plan.folder(run), run.last_step).get("prompts") != list(plan.prompts)
