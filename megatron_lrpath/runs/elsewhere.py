"""The location of a plan's relative folders when a command is called from another folder than the runs were."""

from __future__ import annotations

from pathlib import Path


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
