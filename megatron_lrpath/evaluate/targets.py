"""Which runs make a version's model, and which of them still want an evaluation; without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_lrpath.plan import Plan, Run

EVALUATION = "eval.json"
RESULT = "result.json"


def version_runs(plan: Plan, paradigms: Iterable[str]) -> list[Run]:
    """The runs whose end is a version's model (all but the main path), each training once."""
    runs: dict[Path, Run] = {}
    for paradigm in paradigms:
        for run in plan.runs(paradigm):
            if run.kind != "main":
                carried_out = plan.run(*run.same_as) if run.same_as else run
                runs.setdefault(plan.folder(carried_out), carried_out)
    return list(runs.values())


def model_runs(plan: Plan, paradigms: Iterable[str]) -> list[Run]:
    """The runs that end with a model to use: `version_runs`, then their fine-tunings, each training once."""
    names = list(paradigms)
    runs = {plan.folder(run): run for run in version_runs(plan, names)}
    for paradigm in names:
        for run in plan.sft_runs(paradigm):
            carried_out = plan.run(*run.same_as) if run.same_as else run
            runs.setdefault(plan.folder(carried_out), carried_out)
    return list(runs.values())


def is_trained(plan: Plan, run: Run) -> bool:
    """Whether the run has reached its end."""
    result = read_json(plan.folder(run) / RESULT)
    return result is not None and result.get("step") == run.last_step


def needs_evaluation(plan: Plan, run: Run) -> bool:
    """Whether the run is trained and its evaluation is missing or of an earlier training."""
    folder = plan.folder(run)
    evaluation = read_json(folder / EVALUATION)
    if evaluation is None or evaluation.get("step") != run.last_step:
        return is_trained(plan, run)
    fresh = (folder / EVALUATION).stat().st_mtime >= (folder / RESULT).stat().st_mtime
    return is_trained(plan, run) and not fresh


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none or it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
