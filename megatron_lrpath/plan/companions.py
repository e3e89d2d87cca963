"""Arguments without effect: those that act only together with another, and those that only a user's script reads.

The rows are the sections `[[companion]]` and the fields `script` of `megatron_arguments.toml`. A model that
is trained without an argument of its command line is another model, so the argument is refused. Read without
torch and Megatron.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lrpath.plan.arguments import find, flag, sections, table
from megatron_lrpath.plan.optimizers import ADAM

DEFAULTS = {"optimizer": ADAM, "position_embedding_type": "learned_absolute"}
"""Megatron's defaults of arguments that are companions with a value."""

WITH_OR_WITHOUT = "leave it out, or give what it needs"


@dataclass(frozen=True)
class Companion:
    """A row: an argument that Megatron ignores without another.

    Attributes:
        name: the argument's destination.
        of: the alternatives, at least one of them required, as `name` or `name=value`.
    """

    name: str
    of: tuple[str, ...]

    def is_met(self, values: Mapping[str, Any]) -> bool:
        """Return whether one of the companions is among the values, by destination."""
        return any(_holds(one, values) for one in self.of)

    @property
    def ways(self) -> str:
        """The alternatives as on a command line, joined by `or`."""
        words = [" ".join((flag(name), *rest)) for name, *rest in (one.split("=") for one in self.of)]
        return " or ".join(words)

    @property
    def said(self) -> str:
        """A line for a message."""
        return f"{flag(self.name)} has no effect without {self.ways}"


def _holds(condition: str, values: Mapping[str, Any]) -> bool:
    """Return whether a companion exists; a shell variable can have any value."""
    name, _, wanted = condition.partition("=")
    value = values.get(name, DEFAULTS.get(name))
    if value is None or value is False:
        return False
    return not wanted or str(value) == wanted or "$" in str(value)


@functools.cache
def companions() -> tuple[Companion, ...]:
    """Return all rows."""
    return tuple(
        Companion(name, tuple(group["with"]))
        for group in sections("companion")
        for name in group["names"].split()
    )


def missing_companions(given: Mapping[str, Any]) -> dict[str, str]:
    """Return a line for each argument that Megatron ignores without its companion, by destination.

    Args:
        given: the arguments that are given, by destination or option (with underscores); false omits one.
    """
    values = _by_destination(given)
    return {one.name: one.said for one in companions() if one.name in values and not one.is_met(values)}


def without_effect(given: Mapping[str, Any]) -> list[str]:
    """Return a line for each argument without effect on a GPT that this package trains; `given` as in
    `missing_companions`.
    """
    scripts = {name: table()[name].script for name in _by_destination(given) if name in table()}
    read_elsewhere = [
        f"{flag(name)} has no effect: only a script of your own with {content} can read it "
        "(docs/coming-from-megatron.md)"
        for name, content in scripts.items()
        if content
    ]
    return [*missing_companions(given).values(), *read_elsewhere]


def _by_destination(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        argument.name: value
        for name, value in given.items()
        if value is not None and value is not False and (argument := find(name))
    }
