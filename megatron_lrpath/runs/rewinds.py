"""The rewinds in a main path's lineage: whether one was interrupted, and a description of all."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError


def unfinished(lineage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the interrupted rewind, which must be called again; None if there is none."""
    return next((one for one in (lineage or {}).get("rewinds", []) if not one.get("finished")), None)


def require_no_rewind(folder: Path, lineage: Mapping[str, Any] | None) -> None:
    """Refuse to use a main path that an interrupted rewind has moved only partly.

    Raises:
        UserError: with the command that completes the rewind.
    """
    one = unfinished(lineage)
    if one is None or lineage is None:
        return
    plan = next((start["plan"] for start in reversed(lineage["starts"]) if start.get("plan")), "PLAN")
    raise UserError(
        f"{folder}: its rewind to step {one['to_step']:,} was interrupted; call it again first: {command(plan, one)}"
    )


def command(plan: Path | str, rewind: Mapping[str, Any]) -> str:
    """Return the command of a rewind."""
    dropped = "".join(f" --drop {name}" for name in rewind["dropped"])
    return f"lrpath rewind {plan} --to-step {rewind['to_step']}{dropped}"


def rewinds_told(lineage: Mapping[str, Any]) -> list[str]:
    """Describe the rewinds in a lineage, a clause each."""
    found = lineage.get("rewinds")
    told = []
    for one in found if isinstance(found, list) else []:
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # a damaged lineage
            without = f", without {', '.join(one['dropped'])}" if one["dropped"] else ""
            state = "" if one["finished"] else " (interrupted: call it again)"
            span = f"from step {one['from_step']:,} to step {one['to_step']:,}"
            told.append(f"rewound {span} on {one['time'][:10]}{without}{state}")
    return told
