"""Checks of a plan: its file, and conditions that prevent its training on this machine."""

from __future__ import annotations

from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import PARADIGMS, load_plan
from megatron_lrpath.readiness import FAILED, OK, Finding, Request, check_plan


def plan_checks(path: Path) -> list[Finding]:
    """Return all checks of a plan; if the plan cannot be loaded, that is the only check."""
    try:
        plan = load_plan(path)
        runs = [run for paradigm in PARADIGMS for run in plan.runs(paradigm) if run.same_as is None]
    except UserError as error:
        return [Finding("plan", FAILED, str(error))]
    loaded = Finding("plan", OK, f"{plan.name}: {len(plan.versions)} versions, {len(runs)} runs")
    return [loaded, *check_plan(plan, Request())]
