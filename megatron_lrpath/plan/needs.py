"""What arguments require of the machine: Transformer Engine, a GPU, a package. Read without torch and
Megatron.

The rows are the sections `[[need]]` of `megatron_arguments.toml`. If a requirement is missing, Megatron
ignores the argument, fails late, or computes something else; so the argument is refused before anything is
built.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan.arguments import find, flag, sections

GPU, ENGINE, PLAIN = "gpu", "transformer_engine", "plain"
WORDS = {
    GPU: "a GPU",
    ENGINE: "Transformer Engine on a GPU",
    PLAIN: "plain Megatron",
    "nvidia_resiliency_ext": "the package nvidia-resiliency-ext",
    "nvidia_kitchen": "the package nvidia-kitchen",
    "deep_ep": "the package deep_ep",
    "fla": "the package flash-linear-attention",
    "wandb": "the package wandb",
}


@dataclass(frozen=True)
class Need:
    """A row: an argument with a requirement.

    Attributes:
        name: the argument's destination.
        of: the requirement: a key of `WORDS`; for a package, the name under which it is imported.
        only: the values with this requirement; empty for all except false, nothing and `unless`.
        unless: values without the requirement.
        why: the effect of its absence, if that is not obvious.
    """

    name: str
    of: str
    only: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    why: str = ""

    def applies(self, value: Any) -> bool:
        """Return whether the argument has the requirement with this value (parsed, or from a plan)."""
        if value is None or value is False or value == []:
            return False
        words = {str(getattr(one, "name", one)) for one in (value if isinstance(value, list) else [value])}
        return bool(words & set(self.only)) if self.only else not words <= set(self.unless)

    def said(self, value: Any) -> str:
        """Return a line for a message."""
        shown = (
            "" if value is True else f" {' '.join(map(_word, value if isinstance(value, list) else [value]))}"
        )
        return f"{flag(self.name)}{shown} needs {WORDS[self.of]}{f': {self.why}' if self.why else ''}"


def _word(value: Any) -> str:
    return str(getattr(value, "name", value))


@functools.cache
def needs() -> tuple[Need, ...]:
    """Return all rows."""
    return tuple(
        Need(
            name,
            group["of"],
            tuple(group.get("only", ())),
            tuple(group.get("unless", ())),
            group.get("why", ""),
        )
        for group in sections("need")
        for name in group["names"].split()
    )


def unmet(arguments: Mapping[str, Any], have: Collection[str]) -> list[str]:
    """Return a line for each argument (by destination or option, with underscores) whose requirement is
    missing.

    Args:
        arguments: parsed values, or those of a plan.
        have: the available keys of `WORDS`.
    """
    values = {argument.name: value for name, value in arguments.items() if (argument := find(name))}
    return [
        need.said(values[need.name])
        for need in needs()
        if need.of not in have and need.name in values and need.applies(values[need.name])
    ]


def refuse(problems: Iterable[str], where: str) -> None:
    """Raise one UserError with all lines of `unmet`; `where` describes the machine's lack."""
    lines = [f"- {problem}" for problem in dict.fromkeys(problems)]
    if lines:
        raise UserError(
            f"{where}:\n" + "\n".join(lines) + "\nLeave these arguments out, or install what they need "
            "(docs/gpus.md). Calling again does not help before that."
        )


def installed(device: str) -> frozenset[str]:
    """Return what a process started here would have, determined without imports."""
    found = {name for name in WORDS if name not in (GPU, ENGINE, PLAIN) and is_installed(name)}
    if device == "cuda":
        found |= {GPU} | ({ENGINE} if is_installed(ENGINE) else set())
    return frozenset(found)


def is_installed(package: str) -> bool:
    """Return whether a top-level package can be found."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
