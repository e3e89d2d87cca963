"""The table of arguments applied to a command line: arguments of Megatron, this project, a script or a fork."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import megatron.core

from megatron_lrpath.plan.arguments import MEGATRON, PATH, find, flag
from megatron_lrpath.training.options.arguments import ArgumentsProvider, full_parser
from megatron_lrpath.wording import nearest


def word(name: str, value: Any) -> str:
    """Return the name of an explicit argument for a message, with its value if only some values are refused."""
    argument = find(name)
    shown = argument is not None and (argument.allowed or argument.refused_values)
    return f"{flag(name)} {getattr(value, 'name', value)}" if shown else flag(name)


def default_problems(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return the defaults of a script (Megatron's `args_defaults`) that a run with a path refuses, a line
    each.
    """
    return [
        f"{word(name, value)} among the script's args_defaults: {argument.why(PATH)}."
        for name, value in defaults.items()
        if name not in given and value not in (None, False)
        if (argument := find(name)) is not None and argument.refuses(PATH, value)
    ]


def neutral_names(given: Mapping[str, Any]) -> frozenset[str]:
    """Return the destinations in --lr-path-neutral."""
    return frozenset(name.lstrip("-").replace("-", "_") for name in given.get("lr_path_neutral", ()))


def unclassified(given: Mapping[str, Any], own: ArgumentsProvider | None) -> list[str]:
    """Return the problems of arguments that the table lacks, and of the names in --lr-path-neutral.

    A script's own arguments, and those that a fork adds to a Megatron of the table's version, belong to
    the run.
    """
    problems = _wrong_neutral_names(given, own)
    others = [name for name in given if find(name) is None]
    if others and not _is_known_megatron():
        ours = {action.dest for action in full_parser(own)._actions} - {
            action.dest for action in full_parser()._actions
        }
        problems += [
            f"{flag(name)}: this argument is not classified for Megatron {megatron.core.__version__} (this "
            f"project knows {MEGATRON}), so that it is not known whether a result depends on it; leave it out."
            for name in others
            if name not in ours
        ]
    return problems


def _wrong_neutral_names(given: Mapping[str, Any], own: ArgumentsProvider | None) -> list[str]:
    named = neutral_names(given)
    if not named:
        return []
    theirs = {action.dest for action in full_parser(own)._actions if find(action.dest) is None} - {"help"}
    return [
        f"--lr-path-neutral {name}: an argument of Megatron's, which has its class already; leave it out."
        if find(name) is not None
        else f"--lr-path-neutral {name}: this script has no such argument{nearest(name, theirs)}."
        for name in sorted(named - theirs)
    ]


def _is_known_megatron() -> bool:
    return f"{megatron.core.__version__}.".startswith(f"{MEGATRON}.")
