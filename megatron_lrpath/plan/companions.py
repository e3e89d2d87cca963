"""What arguments require of other arguments: without its companion, Megatron ignores an argument.

The rows are the sections `[[companion]]` of `megatron_arguments.toml`. A model that is trained without an
argument of its command line is another model, so the argument is refused. Read without torch and Megatron.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lrpath.plan.arguments import TABLE_FILE, find, flag
from megatron_lrpath.plan.optimizers import ADAM

DEFAULTS = {"optimizer": ADAM}
"""Megatron's defaults of arguments that are companions with a value."""

WITH_OR_WITHOUT = "leave it out, or give what it needs"


@dataclass(frozen=True)
class Companion:
    """A row: an argument that acts only together with another.

    Attributes:
        name: the argument's destination.
        of: the alternatives, at least one of them required, as `name` or `name=value`; empty if a GPT never reads it.
        why: the reason in that case.
    """

    name: str
    of: tuple[str, ...]
    why: str = ""

    def is_met(self, values: Mapping[str, Any]) -> bool:
        """Return whether one of the companions is among the values, by destination."""
        return any(_holds(one, values) for one in self.of)

    @property
    def said(self) -> str:
        """A line for a message."""
        if not self.of:
            return f"{flag(self.name)} has no effect: {self.why}"
        ways = " or ".join(
            " ".join((flag(name), *rest)) for name, *rest in (one.split("=") for one in self.of)
        )
        return f"{flag(self.name)} has no effect without {ways}"


def _holds(condition: str, values: Mapping[str, Any]) -> bool:
    name, _, wanted = condition.partition("=")
    value = values.get(name, DEFAULTS.get(name))
    return str(value) == wanted if wanted else value is not None and value is not False


@functools.cache
def companions() -> tuple[Companion, ...]:
    """Return all rows."""
    groups = tomllib.loads(TABLE_FILE.read_text(encoding="utf-8"))["companion"]
    return tuple(
        Companion(name, tuple(group["with"]), group.get("why", ""))
        for group in groups
        for name in group["names"].split()
    )


def without_effect(given: Mapping[str, Any]) -> list[str]:
    """Return a line for each argument that Megatron would ignore; `given` as in `missing_companions`."""
    return [one.said for one in missing_companions(given)]


def missing_companions(given: Mapping[str, Any]) -> list[Companion]:
    """Return the rows of the arguments that Megatron would ignore, because their companion is missing.

    Args:
        given: the arguments that are given, by destination or option (with underscores); false omits one.
    """
    values = {
        argument.name: value
        for name, value in given.items()
        if value is not None and value is not False and (argument := find(name))
    }
    return [one for one in companions() if one.name in values and not one.is_met(values)]
