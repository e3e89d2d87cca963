"""Check the Megatron arguments of a plan file: names, values and classes; one error lists all problems."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_lrpath.errors import PlanError
from megatron_lrpath.models import ModelSpec, resolve_model
from megatron_lrpath.plan.arguments import PLAN, START, by_option, hint
from megatron_lrpath.plan.file.source import Entry
from megatron_lrpath.plan.file.values import read_mapping, read_scalar
from megatron_lrpath.plan.sft import DROPPED

_ARGUMENT = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
RECIPE = "recipe"

Reason = Callable[[str], str | None]
"""The reason why an argument cannot be set in this section; None if it can."""


def read_arguments(entry: Entry | None) -> dict[str, Any]:
    """Return a mapping of Megatron arguments, with underscores in the keys; values are scalars or lists of
    them.

    Raise PlanError if it is not a mapping; `check_arguments` checks names and values.
    """
    if entry is None or entry.value is None:
        return {}
    arguments: dict[str, Any] = {}
    for written, child in read_mapping(entry).items():
        name = written.replace("-", "_")
        if not _ARGUMENT.fullmatch(written):
            raise child.error("not the name of an argument; write it without the dashes before it")
        if name in arguments:
            raise child.error("given twice, with `-` and with `_`; keep one of them")
        values = child.value
        arguments[name] = (
            [read_scalar(item) for item in values] if isinstance(values, list) else read_scalar(child)
        )
    return arguments


def check_arguments(
    model_entry: Entry,
    megatron: Entry | None,
    sft: Entry | None,
    branches: Sequence[Entry | None],
    model: ModelSpec,
) -> None:
    """Check the sections `model`, `megatron`, `sft.megatron` and `branch_megatron`, of the plan and of
    versions.

    Raise PlanError with all problems, a line each: unknown names, values that the parser rejects,
    arguments that follow from the plan, are refused, or belong to another section.
    """
    of_model = resolve_model(model)

    def in_model(name: str) -> str | None:
        return set_by_plan(name, "follows from the plan; leave it out and set `{key}`")

    def in_megatron(name: str) -> str | None:
        return "an argument of the model; set it under `model:`" if name in of_model else in_model(name)

    def in_sft(name: str) -> str | None:
        said = "the plan and the keys of `sft` (`{key}` for versions)"
        if found := set_by_plan(name, f"cannot be set here; leave it out: follows from {said}"):
            return found
        if name in of_model:
            return "cannot be set here; leave it out: the model is the version's"
        if name in DROPPED:
            return (
                "cannot be set here; leave it out: packed samples have an attention of their own and are not "
                "split over ranks"
            )
        return None

    def in_branch(name: str) -> str | None:
        if found := set_by_plan(
            name, "follows from the plan, for branches as well; leave it out and set `{key}`"
        ):
            return found
        if for_branches(name):
            return None
        known = sorted(option for option in by_option() if for_branches(option))
        return (
            "cannot be set for branches alone: they continue with the main path's samples, model and state; set it "
            f"under `megatron:`, or in a plan of its own. For branches alone there are {', '.join(known)}"
        )

    sections = (
        (model_entry, in_model),
        (megatron, in_megatron),
        (sft, in_sft),
        *((one, in_branch) for one in branches),
    )
    problems = [problem for entry, reason in sections for problem in _problems(entry, reason)]
    if problems:
        raise PlanError("\n".join(problems))


def for_branches(name: str) -> bool:
    """Return whether branches can have another value of an argument than the main path; False for
    unclassified ones.
    """
    argument = by_option().get(name)
    return argument is not None and argument.branch


def set_by_plan(name: str, said: str) -> str | None:
    """Return `said` with the key of the plan that determines an argument; None if no key does."""
    argument = by_option().get(name)
    return said.format(key=argument.key) if argument is not None and argument.key else None


def _problems(entry: Entry | None, reason: Reason) -> list[str]:
    if entry is None or not isinstance(entry.value, dict):
        return []
    return [
        str(child.error(said))
        for written, child in entry.value.items()
        if (said := _problem(written.replace("-", "_"), child, reason))
    ]


def _problem(name: str, entry: Entry, reason: Reason) -> str | None:
    if name == RECIPE and entry.key == f"model.{RECIPE}":
        return None
    argument = by_option().get(name)
    if argument is None:
        return (
            f"Megatron has no argument {name!r}{hint(name)}; an argument of a script of your own or of a fork "
            "is given on its command line"
        )
    if said := reason(name):
        return said
    if argument.plan == START or name.startswith("lr_path"):
        return "selects the run to start; leave it out of the plan"
    values = entry.value
    items = values if isinstance(values, list) else [entry]
    if any(item.value is None or isinstance(item.value, list | dict) for item in items):
        return None  # no value: `read_arguments` reports it
    value = [item.value for item in values] if isinstance(values, list) else values
    if said := argument.forms[name].problem(value):
        return said
    if value is not False and argument.refuses(PLAN, value):
        return f"cannot be set in a plan: {argument.why(PLAN)}"
    return None
