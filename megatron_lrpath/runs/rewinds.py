"""What a main path's lineage says of its rewinds: whether one was interrupted, and all of them in words."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError


def unfinished(lineage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The rewind that was interrupted and has to be called again; None where there is none."""
    return next((one for one in (lineage or {}).get("rewinds", []) if not one.get("finished")), None)


def require_no_rewind(folder: Path, lineage: Mapping[str, Any] | None) -> None:
    """Refuse to use a main path of which an interrupted rewind has moved a part only.

    Raises:
        UserError: with the command that goes on.
    """
    one = unfinished(lineage)
    if one is None or lineage is None:
        return
    plan = next((start["plan"] for start in reversed(lineage["starts"]) if start.get("plan")), "PLAN")
    raise UserError(
        f"{folder}: its rewind to step {one['to_step']:,} was interrupted; call it again first: {command(plan, one)}"
    )


def command(plan: Path | str, rewind: Mapping[str, Any]) -> str:
    """The call that makes a rewind."""
    dropped = "".join(f" --drop {name}" for name in rewind["dropped"])
    return f"lrpath rewind {plan} --to-step {rewind['to_step']}{dropped}"


def rewinds_told(lineage: Mapping[str, Any]) -> list[str]:
    """What a lineage records of rewinds, a clause each."""
    found = lineage.get("rewinds")
    told = []
    for one in found if isinstance(found, list) else []:
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # a damaged lineage
            without = f", without {', '.join(one['dropped'])}" if one["dropped"] else ""
            state = "" if one["finished"] else " (interrupted: call it again)"
            span = f"from step {one['from_step']:,} to step {one['to_step']:,}"
            told.append(f"rewound {span} on {one['time'][:10]}{without}{state}")
    return told
