"""The history of a run, one line for each step: its format, its writer, and its readers."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import time
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.console import warn
from megatron_lrpath.files import atomic_write_text
from megatron_lrpath.full_disk import PatientFile
from megatron_lrpath.reading import parse_json
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.wording import plural

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FIELDS = ("consumed_samples", "lr", "loss", "grad_norm", "seconds", "valid_loss")
TAIL_BYTES = 64 * 1024
CHECK = "crc32"  # of the line up to this field; older lines have none
_CHECK_PART = f', "{CHECK}": "'.encode()
_WAS_WHOLE = re.compile(rb'"' + CHECK.encode() + rb'": ".{8}"\}')  # a truncated line does not end like this
LARGEST_STEP = 2**63 - 1


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """One line of a history; missing numbers are None.

    `consumed_samples` counts up to the end of the step; `lr` is the rate of the step's update; `loss` is
    of this step alone, in nats per token; `seconds` is the time since the end of the previous step, or
    since the start; `mfu` is relative to the devices' peak.
    """

    step: int
    consumed_samples: float | None = None
    lr: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    seconds: float | None = None
    mfu: float | None = None
    valid_loss: float | None = None
    skipped: bool = False
    spike: bool = False


def parse_line(line: bytes) -> LoggedStep | None:
    """Parse one line of a history; None if it is damaged or partial (as the first line of a tail can be)."""
    try:
        row = parse_json(line, own=True)
    except ValueError:
        return None
    if isinstance(row, dict) and CHECK in row and not _is_whole(line, row[CHECK]):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or not 0 < step <= LARGEST_STEP:
        return None
    numbers = {name: _number(row[name]) for name in (*FIELDS, "mfu") if name in row}
    return LoggedStep(step, **numbers, skipped=bool(row.get("skipped")), spike=bool(row.get("spike")))


def _is_whole(line: bytes, check: object) -> bool:
    """Return whether a line matches its checksum `check`."""
    content, found, _ = line.rpartition(_CHECK_PART)
    return bool(found) and check == f"{zlib.crc32(content):08x}"


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _lines(path: Path) -> list[bytes]:
    """Return the non-blank lines of a file; empty if there is no file."""
    return [line for line in path.read_bytes().split(b"\n") if line.strip()] if path.is_file() else []


@dataclass(frozen=True)
class History:
    """The logged steps of one run, ascending, without duplicates.

    `steps` is int64 of shape [rows]; every column of `columns` is float64 of the same shape, NaN for
    missing values. `unreadable` counts the unreadable lines in the middle of the file (from a process
    killed during a write); an incomplete last line is normal for a running training and is not counted.
    `on_gpus`: whether a line has a share of a device's peak.
    """

    steps: NDArray[np.int64]
    columns: dict[str, NDArray[np.float64]]
    unreadable: int = 0
    on_gpus: bool = False

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, field: str) -> NDArray[np.float64]:
        return self.columns[field]

    @property
    def usual_seconds(self) -> float | None:
        """The median time of a step, which is robust to saves and to the first step after a start."""
        import numpy as np  # here: readers of single lines do not need numpy

        known = self["seconds"][np.isfinite(self["seconds"])]
        return float(np.median(known)) if len(known) else None

    @property
    def seconds(self) -> float | None:
        """The total time of the logged steps; None if no line has a time."""
        import numpy as np  # here: readers of single lines do not need numpy

        known = self["seconds"][np.isfinite(self["seconds"])]
        return float(known.sum()) if len(known) else None


def read_history(folder: Path) -> History:
    """Return the whole history of the run in `folder` as columns; empty if there is none.

    If a step was logged again after a resume, its last line counts: earlier lines belong to discarded
    steps.
    """
    import numpy as np  # here: readers of single lines do not need numpy

    lines = _lines(RunFolder(folder).history)
    parsed = [parse_line(line) for line in lines]
    rows = {row.step: row for row in parsed if row is not None}
    ordered = [rows[step] for step in sorted(rows)]
    columns = {name: np.array([getattr(row, name) for row in ordered], np.float64) for name in FIELDS}
    unreadable = sum(
        row is None
        for row, line in zip(parsed, lines, strict=True)
        if line is not lines[-1] or _WAS_WHOLE.search(line)
    )
    on_gpus = any(row.mfu is not None for row in ordered)
    return History(np.array([row.step for row in ordered], np.int64), columns, unreadable, on_gpus)


def rows_up_to(folder: Path, step: int) -> Iterator[LoggedStep]:
    """Yield the lines of a run's history up to `step`, the last one first."""
    rows = (parse_line(line) for line in reversed(_lines(RunFolder(folder).history)))
    return (row for row in rows if row is not None and row.step <= step)


def losses_before(folder: Path, step: int, count: int) -> list[float]:
    """Return the losses of the last `count` steps up to `step` in a run's history, or as many as there are."""
    losses = [row.loss for row in rows_up_to(folder, step) if row.loss is not None]
    return losses[:count][::-1]


def row_of_step(folder: Path, step: int) -> LoggedStep | None:
    """Return the step's line in a run's history; None if there is none."""
    row = next(rows_up_to(folder, step), None)
    return row if row is not None and row.step == step else None


def last_loss(folder: Path) -> float | None:
    """Return the loss of the last step in a run's history (nats per token)."""
    row = next(rows_up_to(folder, LARGEST_STEP), None)
    return row.loss if row else None


class HistoryTail:
    """Follow the history of the run in `folder`, from its last lines on, while another process writes it."""

    def __init__(self, folder: Path, window: int = 50) -> None:
        self.path = RunFolder(folder).history
        self.last: LoggedStep | None = None
        self._times: deque[float] = deque(maxlen=window)
        self._offset: int | None = None
        self._inode = 0
        self._rest = b""
        self.unreadable = 0  # complete lines that are invalid or do not match their checksum

    @property
    def seconds_per_step(self) -> float | None:
        """The median over the last lines; None if no line has the value."""
        return statistics.median(self._times) if self._times else None

    def poll(self) -> list[LoggedStep]:
        """Read the lines added since the last call (at first, and after a truncation: the file's last ones)."""
        parsed = [parse_line(line) for line in self._new_lines() if line.strip()]
        self.unreadable += sum(row is None for row in parsed)
        rows = [row for row in parsed if row is not None]
        for row in rows:
            self.last = row
            if row.seconds:
                self._times.append(row.seconds)
        return rows

    def _new_lines(self) -> list[bytes]:
        try:
            with self.path.open("rb") as stream:
                about = os.fstat(stream.fileno())
                if self._offset is None or about.st_size < self._offset or about.st_ino != self._inode:
                    # at first, or after a resumed run has truncated the file
                    self._offset, self._rest = max(0, about.st_size - TAIL_BYTES), b""
                    self._inode = about.st_ino
                is_cut = self._offset > 0 and not self._rest and self._offset == about.st_size - TAIL_BYTES
                stream.seek(self._offset)
                data = stream.read()
        except OSError:
            return []
        self._offset += len(data)
        lines = (self._rest + data).split(b"\n")
        if is_cut and len(lines) > 1:
            del lines[0]  # the rest of a line
        self._rest = lines.pop()  # a line that is still being written
        return lines


class HistoryWriter:
    """Append to a run's history; a resumed run continues it, without the steps that it will repeat.

    A line has the known fields of `LoggedStep`, null for non-finite values: `mfu` only if the devices'
    peak is known, `skipped` only if the update was skipped, and `spike` (median, limit) only at a loss
    spike.

    Args:
        folder: the run's folder.
        first_step: the step that was loaded; later ones are dropped.
        elapsed: returns the seconds since the first step began.
    """

    def __init__(self, folder: Path, first_step: int, elapsed: float = 0.0) -> None:
        path = RunFolder(folder).history
        self.last_time = time.perf_counter() - elapsed
        drop_steps_after(path, first_step)
        self._file = PatientFile(path, "The history of the steps", synced=True)

    def append(self, record: dict[str, Any]) -> None:
        """Append a step; the line is flushed at once, or when the disk has space, so that other processes can
        follow.
        """
        now = time.perf_counter()
        record["seconds"] = round(now - self.last_time, 6)
        self.last_time = now
        known = {name: None if is_not_finite(value) else value for name, value in record.items()}
        line = json.dumps(known).encode()
        self._file.write(line[:-1] + _CHECK_PART + f'{zlib.crc32(line[:-1]):08x}"}}\n'.encode())

    def sync(self) -> None:
        """Sync the file before a checkpoint refers to its lines.

        Raises:
            OSError: the disk has no space for all lines.
        """
        self._file.sync()


def is_not_finite(value: Any) -> bool:
    """Return whether a value is NaN or infinite, which JSON cannot represent."""
    return isinstance(value, float) and not math.isfinite(value)


def drop_steps_after(path: Path, step: int) -> None:
    """Truncate a history to `step`: remove steps after the last checkpoint of a killed run, and an incomplete
    last line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (row := parse_line(line)) and row.step <= step]
    damaged = sum(line.endswith(b"\n") and parse_line(line) is None for line in lines)
    if damaged:
        warn(f"{path}: {plural(damaged, 'line')} cannot be read, or is not as it was written; left out.")
    damaged_before_good = kept != lines[: len(kept)]
    lacks_its_end = bool(kept) and not kept[-1].endswith(b"\n")
    if damaged_before_good or lacks_its_end:
        text = b"".join(line.rstrip(b"\r\n") + b"\n" for line in kept)
        atomic_write_text(path, text.decode("utf-8", errors="replace"))
    elif len(kept) < len(lines):
        with path.open("r+b") as file:  # a full disk allows a truncation, but not a new file
            file.truncate(sum(map(len, kept)))
            os.fsync(file.fileno())
