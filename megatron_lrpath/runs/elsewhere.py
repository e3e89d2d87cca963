"""What is not where a plan's relative folders point to: it lies elsewhere, or has to be trained first."""

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
    """Where a folder that the file `plan` names lies, as a sentence with what to do; empty where it is here.

    Empty, too, where it is nowhere near. A relative name counts from the working directory; looked at are the folders
    above the plan's file.
    """
    relative = Path(name)
    if relative.is_absolute() or relative.exists():
        return ""
    for folder in plan.resolve().parents:
        if (folder / relative).exists():
            here = "paths in a plan count from the folder of the call"
            return f"{folder / relative} is there: {here}, so call it in {folder}."
    return ""
