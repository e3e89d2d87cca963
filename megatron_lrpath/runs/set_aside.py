"""What a rewind has set aside in a plan's output, and its record: written before anything moves, sealed."""

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

    `moves` are pairs of paths, from and to; `slices` likewise. All are relative to the output, so that the output may
    be moved. `runs` are the keys of the runs that go with the tail. While it is not `finished`, nothing may be trained.
    """

    number: int
    time: str
    to_step: int
    from_step: int
    dropped: tuple[str, ...]
    runs: tuple[str, ...]
    moves: tuple[tuple[str, str], ...]
    slices: tuple[tuple[str, str], ...]
    finished: bool = False

    def folder(self, output: Path) -> Path:
        """Where it lies."""
        return OutputFolder(output).set_aside / str(self.number)

    def save(self, output: Path) -> None:
        """Write the record."""
        write_sealed(self.folder(output) / JOURNAL, asdict(self))


def all_set_aside(output: Path) -> list[SetAside]:
    """Every rewind whose tail still lies there, the oldest first.

    Raises:
        UserError: a record is damaged.
    """
    found = []
    for folder in sorted(_numbered(output), key=lambda one: int(one.name)):
        path = folder / JOURNAL
        try:
            record, _ = read_sealed(path)
            found.append(build(SetAside, record))
        except FileNotFoundError:
            continue  # killed before it had begun
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read ({why(error)}); restore it from a backup. It says what was moved from where"
            ) from None
    return found


def free_number(output: Path, used: int) -> int:
    """The number of the next rewind, after `used` and those that lie there."""
    begun = [one.number for one in all_set_aside(output)]
    return max([used, *begun], default=0) + 1


def half_removed(output: Path) -> list[Path]:
    """What a killed removal has left."""
    root = OutputFolder(output).set_aside
    return sorted(root.glob(f"*{GOING}")) if root.is_dir() else []


def _numbered(output: Path) -> list[Path]:
    root = OutputFolder(output).set_aside
    return [root / name for name in os.listdir(root) if name.isdecimal()] if root.is_dir() else []
