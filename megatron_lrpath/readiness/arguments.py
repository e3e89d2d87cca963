"""Check that Megatron arguments in addition to a plan's exist and do not contradict the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_lrpath.console import quiet
from megatron_lrpath.errors import UserError
from megatron_lrpath.launch.memory import arguments_of
from megatron_lrpath.launch.resources import given_options
from megatron_lrpath.models import shape_problems
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.plan.arguments import find, is_neutral, option_hint
from megatron_lrpath.plan.companions import WITH_OR_WITHOUT, without_effect
from megatron_lrpath.plan.launch_line import line_problems
from megatron_lrpath.plan.secrets import secret_problem
from megatron_lrpath.readiness.finding import FAILED, WARNING, Finding
from megatron_lrpath.runs.lineage import is_plan_bound

NAME = "arguments"
BEHIND = "after --: "


def argument_checks(plan: Plan, runs: Sequence[Run], extra: Sequence[str]) -> list[Finding]:
    """Return the problems of the arguments after `--`, which each of the runs gets.

    Names and classes are checked without Megatron. Its parser, which takes seconds to import, is used only
    if an argument is not known to be neutral.
    """
    problems = line_problems(extra)
    if secret := secret_problem(extra):
        problems.append(secret)
    problems += [
        f"--{names[0].replace('_', '-')}: {problem}"
        for names, problem in shape_problems(arguments_of(plan, extra), plan.batch.seq_length)
    ]
    if problems:
        return [Finding(NAME, FAILED, f"{BEHIND}{problem}") for problem in problems]
    if all_neutral(extra):
        return []
    kinds = {(run.is_sft, str(plan.megatron_of(run))): run for run in reversed(runs)}.values()
    try:
        found = [problem for run in kinds for problem in read(plan, run, extra).problems()]
    except UserError as error:
        found = [str(error)]
        if unknown := [name for name in given_options(extra) if find(name) is None]:
            options = ["--" + name.replace("_", "-") for name in unknown]
            found = [f"{option}: Megatron has no such argument{option_hint(option)}" for option in options]
            known = argument_checks(plan, runs, without_unknown(extra))
            found += [problem.found.removeprefix(BEHIND) for problem in known]
    return [Finding(NAME, FAILED, f"{BEHIND}{problem}") for problem in dict.fromkeys(found)]


def effect_checks(plan: Plan, extra: Sequence[str]) -> list[Finding]:
    """Report the arguments that Megatron would ignore, of the plan and after `--`.

    They are failures. If a run of the plan has been begun with them, they are warnings: its arguments are
    fixed, and it was trained without their effect.
    """
    begun = is_plan_bound(plan)
    status, advice = (WARNING, "Megatron ignores it") if begun else (FAILED, WITH_OR_WITHOUT)
    return [Finding(NAME, status, f"{line}; {advice}") for line in without_effect(arguments_of(plan, extra))]


def without_unknown(extra: Sequence[str]) -> list[str]:
    """Return the arguments without those that the table lacks."""
    kept: list[str] = []
    keeps = True
    for word in extra:
        if word.startswith("--"):
            keeps = find(word[2:].partition("=")[0].replace("-", "_")) is not None
        kept += [word] if keeps else []
    return kept


def given_beside(plan: Plan, run: Run, extra: Sequence[str]) -> dict[str, Any]:
    """Return the additional arguments that affect the run's result, as parsed by the trainer.

    Raises:
        UserError: Megatron's parser rejects them.
    """
    beside: dict[str, Any] = {} if all_neutral(extra) else read(plan, run, extra).beside
    return beside


def all_neutral(extra: Sequence[str]) -> bool:
    """Return whether no result depends on any of these arguments."""
    return all(is_neutral(name) for name in given_options(extra))


def read(plan: Plan, run: Run, extra: Sequence[str]) -> Any:
    """Return the `PlannedRun` of a run that is started with these arguments."""
    quiet()
    # Imported here: it imports torch and Megatron, which nothing else in this module needs.
    from megatron_lrpath.training.options.from_plan import with_arguments

    return with_arguments(plan, run, extra)
