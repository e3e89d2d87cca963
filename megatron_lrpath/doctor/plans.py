"""Checks of a plan: its runs, and conditions that prevent their training on this machine."""

from __future__ import annotations

from megatron_lrpath.plan import PARADIGMS, Plan
from megatron_lrpath.readiness import OK, Finding, Request, check_plan
from megatron_lrpath.wording import plural


def plan_checks(plan: Plan) -> list[Finding]:
    """Return all checks of a plan."""
    runs = [run for paradigm in PARADIGMS for run in plan.runs(paradigm) if run.same_as is None]
    size = f"{plural(len(plan.versions), 'version')}, {plural(len(runs), 'run')}"
    loaded = Finding("plan", OK, f"{plan.name}: {size}")
    return [loaded, *check_plan(plan, Request())]
