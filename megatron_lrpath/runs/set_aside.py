"""What a rewind has set aside in a plan's output, and its record: written before anything moves, sealed.

Whether a rewind is begun or finished stands in the main path's lineage alone; a record without it moves nothing.
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

    `moves` are pairs of paths, from and to, relative to the output, so that the output may be moved; `slices` are
    pairs of names in the plan's folder of slices. `runs` are the keys of the runs that go with the tail.
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
        """Where it lies."""
        return _folder(output, self.number)

    def save(self, output: Path) -> None:
        """Write the record."""
        write_sealed(self.folder(output) / JOURNAL, asdict(self))


def read_set_aside(output: Path, number: int) -> SetAside:
    """The record of a rewind.

    Raises:
        UserError: it is not there, or damaged.
    """
    path = _folder(output, number) / JOURNAL
    try:
        return build(SetAside, read_sealed(path)[0])
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({why(error)}); restore it from a backup. It says what was moved from where"
        ) from None


def all_set_aside(output: Path) -> list[SetAside]:
    """Every rewind that has set something aside which still lies there, the oldest first.

    Raises:
        UserError: a record is damaged.
    """
    return [read_set_aside(output, number) for number in _numbers(output)]


def free_number(output: Path, used: int) -> int:
    """The number of the next rewind, after `used` and those of which something lies there."""
    return max([used, *_numbers(output)]) + 1


def half_removed(output: Path) -> list[Path]:
    """What a killed removal has left."""
    root = OutputFolder(output).set_aside
    return sorted(root.glob(f"*{GOING}")) if root.is_dir() else []


def _folder(output: Path, number: int) -> Path:
    return OutputFolder(output).set_aside / str(number)


def _numbers(output: Path) -> list[int]:
    """The numbers of the folders that hold more than a record, which a call that was killed at once leaves."""
    root = OutputFolder(output).set_aside
    names = [name for name in os.listdir(root) if name.isdecimal()] if root.is_dir() else []
    return sorted(int(name) for name in names if any(map(_is_moved, os.listdir(root / name))))


def _is_moved(name: str) -> bool:
    return name != JOURNAL and not name.startswith(".")  # neither the record nor what a kill has left of it
