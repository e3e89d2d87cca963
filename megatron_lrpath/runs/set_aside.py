"""Files that a rewind has set aside in a plan's output, and their record: written before any move, with a
checksum.

Whether a rewind has begun or finished is recorded in the main path's lineage only; a record alone has no
effect.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.reading import build, why
from megatron_lrpath.runs.folder import OutputFolder
from megatron_lrpath.sealed import read_sealed, write_sealed

JOURNAL = "rewind.json"
GOING = ".removing"  # ends the name of what is set aside while it is removed


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
        """The folder of the files."""
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
    return name != JOURNAL and not name.startswith(".")  # neither the record nor what a kill has left of it
