"""Which trainings of several plans are one and the same, so that they are carried out once."""

from __future__ import annotations

import json
from collections.abc import Sequence

from megatron_lrpath.plan import Plan, Run

Steps = tuple[int, ...]


def training_key(plan: Plan, run: Run) -> str:
    """Equal for two runs exactly where they are the same training: identity and data.

    A main path has no end of its own, so how far it goes does not count.
    """
    facts = plan.identity(run) | {"slices": plan.data.slices}
    if run.mix is not None:
        facts["mix_slices"] = [part.slice for part in run.mix.parts]
    if run.kind == "main":
        facts["versions"] = [(version.name, version.steps) for version in plan.versions]
    return json.dumps(facts, sort_keys=True)


def main_points(plans: Sequence[Plan]) -> list[Steps]:
    """For each plan the steps at which some plan's branches leave a main path that is the same training."""
    keys = [training_key(plan, plan.run("ours", "main")) for plan in plans]
    steps: dict[str, set[int]] = {}
    for plan, key in zip(plans, keys, strict=True):
        steps.setdefault(key, set()).update(plan.run("ours", "main").keep_steps)
    return [tuple(sorted(steps[key])) for key in keys]
