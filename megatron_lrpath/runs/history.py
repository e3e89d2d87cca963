"""What a run wrote down while it trained: `history.jsonl` as columns, one row per step."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lrpath.files import atomic_write_text
from megatron_lrpath.full_disk import PatientFile

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


HISTORY = "history.jsonl"


class HistoryWriter:
    """Appends to a run's history; a resumed run continues it, without the steps that it will do again.

    A line holds `step`, `consumed_samples` (after the step), `lr` (that stood in the optimizer during the
    step), `loss` (of this step alone, nats a token), `grad_norm`, `seconds` (since the previous step ended; of
    the first one after a start, since it began), `mfu` (where the devices' peak is known), and `skipped` where
    the update was skipped.

    Args:
        path: the file.
        first_step: the step that was loaded; later ones are dropped.
        elapsed: seconds since the first step began.
    """

    def __init__(self, path: Path, first_step: int, elapsed: float = 0.0) -> None:
        self.path = path
        self.last_time = time.perf_counter() - elapsed
        drop_steps_after(path, first_step)
        self._file = PatientFile(path, "The history of the steps", synced=True)

    def append(self, record: dict[str, Any]) -> None:
        """Add a step; the line reaches the file at once, or when the disk has room, so that others can follow."""
        now = time.perf_counter()
        record["seconds"] = round(now - self.last_time, 6)
        self.last_time = now
        self._file.write(json.dumps(record).encode() + b"\n")

    def sync(self) -> None:
        """Let the lines survive a power cut: a checkpoint is about to stand for them.

        Raises:
            OSError: the disk has no room for all of them.
        """
        self._file.sync()


def drop_steps_after(path: Path, step: int) -> None:
    """Cut a history back to `step`: what a killed run did after its last checkpoint, and a torn last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if is_step_up_to(line, step)]
    damaged_before_good = kept != lines[: len(kept)]
    lacks_its_end = bool(kept) and not kept[-1].endswith(b"\n")
    if damaged_before_good or lacks_its_end:
        text = b"".join(line.rstrip(b"\r\n") + b"\n" for line in kept)
        atomic_write_text(path, text.decode("utf-8", errors="replace"))
    elif len(kept) < len(lines):
        shorten(path, sum(map(len, kept)))


def shorten(path: Path, size: int) -> None:
    """Cut a file to `size` bytes, for good; a full disk allows that, and would not allow a new file."""
    with path.open("r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def is_step_up_to(line: str | bytes, step: int) -> bool:
    """Whether `line` is a whole record of a step not after `step`."""
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False


def losses_before(folder: Path, step: int, count: int) -> list[float]:
    """The losses of the last `count` steps up to `step` in a run's history, as far as it holds them."""
    path = folder / HISTORY
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if is_step_up_to(line, step)]
    return [row["loss"] for row in rows if isinstance(row.get("loss"), float)][-count:]


def row_of_step(path: Path, step: int) -> dict[str, Any] | None:
    """A step's line of a history, None where it has none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    rows = (json.loads(line) for line in reversed(lines) if is_step_up_to(line, step))
    row = next(rows, None)
    return row if row is not None and row["step"] == step else None


def last_loss(folder: Path) -> float | None:
    """The loss of the last step in a run's history (nats a token)."""
    lines = (folder / HISTORY).read_text(encoding="utf-8").splitlines() if (folder / HISTORY).exists() else []
    return json.loads(lines[-1]).get("loss") if lines else None
