"""Change a plan by dotted keys: those of an experiment, and those of `--set KEY=VALUE`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import PlanError
from megatron_lrpath.plan.file.arguments import RECIPE
from megatron_lrpath.plan.file.keys import TEMPLATES
from megatron_lrpath.plan.file.load import plan_from
from megatron_lrpath.plan.file.source import parse_value, plain, plan_text, read_source
from megatron_lrpath.plan.plan import Plan
from megatron_lrpath.wording import nearest

OPTION = "--set"
_PART = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*)(?:\[([0-9]+)\])?")
_ARGUMENTS = ("model", "megatron", "branch_megatron")  # mappings whose keys have `-` or `_`
_PATH_ARGUMENT = re.compile(r".*[-_](path|file|dir|cfg)|pretrained[-_]checkpoint")


def change(plan: dict[str, Any], key: str, value: Any) -> bool:
    """Set `schedule.max_lr`, `versions[0].cycle_steps.scratch`, `versions.steps` (every version's) …

    None removes the key, so that its default applies; return False if it did not exist. Raise ValueError
    for a key that cannot be resolved.
    """
    *way, last = key.split(".")
    if way[:1] == ["model"] and isinstance(recipe := plan.get("model"), str):
        plan["model"] = {RECIPE: recipe}
    places: list[dict[str, Any]] = [plan]
    for part in way:
        places = [found for place in places for found in _descend(place, part, key)]
    was_there = False
    for place in places:
        name = _written(place, last) if way and way[-1] in _ARGUMENTS else last
        was_there |= name in place
        if value is None:
            place.pop(name, None)
        else:
            place[name] = value
    return was_there or value is not None


def _written(place: dict[str, Any], name: str) -> str:
    """Return an argument's name as the plan spells it, with `-` or with `_`."""
    alike = (one for one in place if one.replace("-", "_") == name.replace("-", "_"))
    return next(alike, name)


def _descend(place: dict[str, Any], part: str, key: str) -> list[dict[str, Any]]:
    match = _PART.fullmatch(part)
    if not match:
        raise ValueError(f"{key!r} is no key; write it like schedule.max_lr or versions[0].steps")
    found = place.setdefault(match[1], {})
    number = None if match[2] is None else int(match[2])
    if isinstance(found, list):
        chosen = found if number is None else found[number : number + 1]
        if not chosen:
            raise ValueError(f"{key}: {match[1]} has only {len(found)} entries")
    elif number is not None:
        raise ValueError(f"{key}: {match[1]!r} is no list, so that it has no entry [{number}]")
    else:
        chosen = [found]
    for one in chosen:
        if not isinstance(one, dict):
            raise ValueError(f"{key}: {match[1]!r} is {one!r} there, not a mapping")
    return chosen


@dataclass(frozen=True)
class Changed:
    """A plan with overrides: `overrides` by their keys, and `text`, the resulting plan file.

    Relative paths are absolute in `text`, including the output. Errors of `plan` name the lines of the
    original file.
    """

    overrides: dict[str, Any]
    plan: Plan
    text: str


def changed_plan(path: Path, words: Sequence[str], output: str | None = None) -> Changed:
    """Apply these `--set` words to the plan in `path` and check the result; `output` replaces the plan's own.

    Raise PlanError: an error that the file alone would have, too, names its line, others `--set KEY`.
    """
    source = read_source(path)
    if source.is_experiment:
        raise PlanError(
            f"{path}: is an experiment, to which {OPTION} does not apply; write the keys under `set:` in it"
        )
    overrides = read_words(words)
    if output is not None and "output" in overrides:
        raise PlanError(
            f"{OPTION} output: the settings of the cluster give an output, too (--output, LRPATH_OUTPUT or their "
            f"file): {output}; leave one of them out"
        )
    values = plain(source.root)
    for key, value in overrides.items():
        try:
            took = change(values, key, value)
        except ValueError as error:
            raise PlanError(f"{OPTION} {error}") from None
        if not took:
            hint = nearest(key, source.keys)
            raise PlanError(
                f"{OPTION} {key}: {path} does not give it{hint}, so that nothing can be taken away"
            )
    if output is not None:
        values["output"] = output
    located = source.changed(values, OPTION)
    plan = plan_from(located)
    made = _absolute(values) | {"output": os.path.abspath(plan.output)}
    return Changed(overrides, plan_from(located.changed(made)), plan_text(made))


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE`; VALUE is YAML, an empty value is null.

    Raise PlanError for a word without `=` or with several lines, invalid YAML, and a repeated key.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise PlanError(f"{OPTION} {word}: write it like {OPTION} schedule.max_lr=1e-3")
        if len(word.splitlines()) > 1:
            raise PlanError(
                f"{OPTION} {key.splitlines()[0]}: has several lines; write it in one, `\\n` in double quotes"
            )
        if key in values:
            raise PlanError(f"{OPTION} {key}: given twice; keep one of them")
        values[key] = parse_value(f"{OPTION} {key}", text)
    return values


def _absolute(plan: dict[str, Any]) -> dict[str, Any]:
    """Return a valid plan's values with paths relative to the current working directory."""
    return {key: _absolute_section(key, value) for key, value in plan.items()}


def _absolute_section(key: str, value: Any) -> Any:
    if key == "versions":
        return [_absolute(version) for version in value]
    if not isinstance(value, dict):
        return value
    if key == "data":
        return {name: _from_here(one) for name, one in value.items()}
    if key == "tokenizer":  # a name of Hugging Face, unless a local file has it
        return value | {"model": _if_here(value["model"])} if value.get("model") else value
    if key == "branch_mix":
        slices = {_from_here(name) if "/" in name else name: share for name, share in value["slices"].items()}
        return value | {"slices": slices}
    if key == "sft":
        return {name: _absolute_tuning(name, one) for name, one in value.items()}
    if key in _ARGUMENTS:
        return {
            name: _from_here(one) if _PATH_ARGUMENT.fullmatch(name) else one for name, one in value.items()
        }
    return value


def _absolute_tuning(key: str, value: Any) -> Any:
    if key in ("data", "valid"):
        return _from_here(value)
    if key == "chat_template" and value not in TEMPLATES:
        return _from_here(value)
    return _absolute_section(key, value)


def _from_here(value: Any) -> Any:
    """Return texts as absolute paths, alone or in a list; URLs and values other than text are unchanged."""
    if isinstance(value, list):
        return [_from_here(one) for one in value]
    return os.path.abspath(value) if isinstance(value, str) and "://" not in value else value


def _if_here(name: str) -> str:
    return os.path.abspath(name) if os.path.exists(name) else name
