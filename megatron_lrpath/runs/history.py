"""What a run wrote down while it trained: `history.jsonl` as columns, one row per step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIELDS = ("consumed_samples", "lr", "loss", "grad_norm", "seconds", "valid_loss")


@dataclass(frozen=True)
class History:
    """The logged steps of one run, ascending, each once.

    `steps` is int64 of shape [rows]; every column of `columns` is float64 of the same shape, NaN where a
    line did not say. `unreadable` counts the lines in the middle of the file that could not be read (a
    process that was killed while it wrote); a torn last line is expected of a running one and not counted.
    """

    steps: NDArray[np.int64]
    columns: dict[str, NDArray[np.float64]]
    unreadable: int = 0

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, field: str) -> NDArray[np.float64]:
        return self.columns[field]

    @property
    def last_step(self) -> int | None:
        """The last logged step, None before the first."""
        return int(self.steps[-1]) if len(self.steps) else None

    @property
    def usual_seconds(self) -> float | None:
        """The median time of a step, which neither a checkpoint nor the first step after a start bends."""
        known = self["seconds"][np.isfinite(self["seconds"])]
        return float(np.median(known)) if len(known) else None

    @property
    def seconds(self) -> float | None:
        """The time that the logged steps took together, None where no line says one."""
        known = self["seconds"][np.isfinite(self["seconds"])]
        return float(known.sum()) if len(known) else None


def read_history(path: Path) -> History:
    """Read `history.jsonl`; a file that is not there is an empty history.

    A step that was logged again after a resume counts with its last line: the earlier one belongs to an
    attempt whose end was thrown away.
    """
    rows: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for last, line in _lines(path):
        row = _parse(line)
        if row is not None:
            rows[row["step"]] = row
        elif not last:
            unreadable += 1
    ordered = [rows[step] for step in sorted(rows)]
    columns = {name: np.array([_number(row.get(name)) for row in ordered], np.float64) for name in FIELDS}
    return History(np.array(sorted(rows), dtype=np.int64), columns, unreadable)


def _lines(path: Path) -> list[tuple[bool, str]]:
    """The file's lines that are not blank, each with whether it is the last one."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    return [(number == len(lines), line) for number, line in enumerate(lines, start=1)]


def _parse(line: str) -> dict[str, Any] | None:
    """The line's object where it is one with a whole, positive `step`, else None."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) and step > 0 else None


def _number(value: object) -> float:
    """`value` as a float, NaN where it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
