"""Where a plan's relative folders lie when a command is called from another folder than the runs were."""

from __future__ import annotations

from pathlib import Path


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
