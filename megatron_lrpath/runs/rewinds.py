"""The rewinds of a main path: their entries in its lineage, and the files that they have set aside.

Whether a rewind has begun or finished is recorded in the lineage only. The record next to the files, written before any
move and with a checksum, has no effect alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.reading import build, why
from megatron_lrpath.runs.folder import OutputFolder
from megatron_lrpath.sealed import read_sealed, write_sealed


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


JOURNAL = "rewind.json"
GOING = ".removing"  # suffix of what is set aside while it is removed


@dataclass(frozen=True)
class SetAside:
    """One rewind.

    `moves` are pairs of paths, from and to, relative to the output, so that the output can be moved;
    `slices` are pairs of names in the plan's folder of slices. `runs` are the keys of the runs that are
    set aside with the tail.
    """

    number: int
    time: str
    to_step: int
    from_step: int
    dropped: tuple[str, ...]
    runs: tuple[str, ...]
    moves: tuple[tuple[str, str], ...]
    slices: tuple[tuple[str, str], ...]

    def folder(self, output: Path) -> Path:
        """Return the folder of the files."""
        return _folder(output, self.number)

    def save(self, output: Path) -> None:
        """Write the record."""
        write_sealed(self.folder(output) / JOURNAL, asdict(self))


def read_set_aside(output: Path, number: int) -> SetAside:
    """Read the record of a rewind.

    Raises:
        UserError: it is missing or damaged.
    """
    path = _folder(output, number) / JOURNAL
    try:
        return build(SetAside, read_sealed(path)[0])
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({why(error)}); restore it from a backup. It records what was moved from where"
        ) from None


def all_set_aside(output: Path) -> list[SetAside]:
    """Return every rewind whose files are still set aside, the oldest first.

    Raises:
        UserError: a record is damaged.
    """
    return [read_set_aside(output, number) for number in _numbers(output)]


def free_number(output: Path, used: int) -> int:
    """Return the number of the next rewind, after `used` and those with files still set aside."""
    return max([used, *_numbers(output)]) + 1


def half_removed(output: Path) -> list[Path]:
    """Return the leftovers of an interrupted removal."""
    root = OutputFolder(output).set_aside
    return sorted(root.glob(f"*{GOING}")) if root.is_dir() else []


def _folder(output: Path, number: int) -> Path:
    return OutputFolder(output).set_aside / str(number)


def _numbers(output: Path) -> list[int]:
    """Return the numbers of the folders with more than a record; a call that was killed early leaves only a
    record.
    """
    root = OutputFolder(output).set_aside
    names = [name for name in os.listdir(root) if name.isdecimal()] if root.is_dir() else []
    return sorted(int(name) for name in names if any(map(_is_moved, os.listdir(root / name))))


def _is_moved(name: str) -> bool:
    return name != JOURNAL and not name.startswith(".")  # neither the record nor leftovers of a killed write
