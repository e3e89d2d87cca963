"""Whether the Megatron arguments beside a plan's are there and leave the plan what it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_lrpath.console import quiet
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.resources import given_options
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.plan.arguments import find, hint, is_neutral
from megatron_lrpath.plan.launch_line import line_problems
from megatron_lrpath.readiness.finding import FAILED, Finding

NAME = "arguments"


def argument_checks(plan: Plan, runs: Sequence[Run], extra: Sequence[str]) -> list[Finding]:
    """What is wrong with the arguments behind `--`, which each of the runs gets.

    The names and classes are checked without Megatron. Its parser, which takes seconds to import, is asked only
    where an argument is given that is not known to be neutral.
    """
    if problems := line_problems(extra):
        return [Finding(NAME, FAILED, f"after --: {problem}") for problem in problems]
    if all_neutral(extra):
        return []
    kinds = {run.is_sft: run for run in reversed(runs)}
    try:
        found = [problem for run in kinds.values() for problem in read(plan, run, extra).problems()]
    except UserError as error:
        near = " ".join(
            f"{name}{near}" for name in given_options(extra) if not find(name) and (near := hint(name))
        )
        found = [f"{error}{'; ' if near else ''}{near}"]
    return [Finding(NAME, FAILED, f"after --: {problem}") for problem in dict.fromkeys(found)]


def given_beside(plan: Plan, run: Run, extra: Sequence[str]) -> dict[str, Any]:
    """The arguments beside the plan's that the run's result depends on, as the trainer reads them.

    Raises:
        UserError: Megatron's parser does not take them.
    """
    beside: dict[str, Any] = {} if all_neutral(extra) else read(plan, run, extra).beside
    return beside


def all_neutral(extra: Sequence[str]) -> bool:
    """Whether no result depends on any of these arguments."""
    return all(is_neutral(name) for name in given_options(extra))


def read(plan: Plan, run: Run, extra: Sequence[str]) -> Any:
    """The `PlannedRun` of a run that is started with these arguments."""
    quiet()
    # Imports torch and Megatron, which nothing else here needs.
    from megatron_lrpath.training.options.from_plan import with_arguments

    return with_arguments(plan, run, extra)
