"""Missing results of a plan: its relative folders are elsewhere, or its runs must be trained first."""

from __future__ import annotations

import shlex
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan


def nothing_there(plan: Plan, what: str, command: str = "run") -> UserError:
    """The error of a command that needs what a plan's runs have not made yet, or made in another folder."""
    first = f"First: lrpath {command} {shlex.quote(str(plan.path))}"
    return UserError(f"{plan.output}: {what}. {lies_elsewhere(plan.path, plan.output) or first}")


def lies_elsewhere(plan: Path, name: str | Path) -> str:
    """Return a sentence on where a folder named in the file `plan` is, and what to do; empty if it exists
    here.

    It is also empty if the folder is not found. Relative names are resolved against the working directory;
    the search covers the folders above the plan's file.
    """
    relative = Path(name)
    if relative.is_absolute() or relative.exists():
        return ""
    for folder in plan.resolve().parents:
        if (folder / relative).exists():
            here = "paths in a plan count from the folder of the call"
            return f"{folder / relative} is there: {here}, so call it in {folder}."
    return ""
