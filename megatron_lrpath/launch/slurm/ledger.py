"""What was submitted for a plan: `OUTPUT/slurm/jobs.json`, and the files beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_json

FOLDER = "slurm"
MARK = "lrpath: "  # begins the comment of a job that was held or stopped for a reason


@dataclass(frozen=True)
class Entry:
    """One submitted job.

    `depends` are the numbers of the jobs it waits for. `parent` and `parent_step` name the training whose
    checkpoint it starts from, and are set where that training goes on after that step. `target` is the last
    step of a training, 0 for the others.
    """

    key: str
    number: int
    script: str
    depends: tuple[int, ...] = ()
    parent: str | None = None
    parent_step: int = 0
    target: int = 0
    submitted: str = ""


@dataclass(frozen=True)
class Ledger:
    """The folder `OUTPUT/slurm`, which holds all that concerns the jobs of one plan."""

    folder: Path

    @classmethod
    def of(cls, output: str) -> Ledger:
        """The ledger of the plan with this output."""
        return cls(Path(output) / FOLDER)

    @property
    def file(self) -> Path:
        """Where the entries stand."""
        return self.folder / "jobs.json"

    def entries(self) -> list[Entry]:
        """All entries, oldest first; none before the first submission. UserError where the file is damaged."""
        try:
            rows = json.loads(self.file.read_text(encoding="utf-8"))["jobs"]
            return [Entry(**{**row, "depends": tuple(row["depends"])}) for row in rows]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.file}: cannot be read ({error}). Cancel this plan's jobs by hand (squeue --me), remove the "
                "file and submit again: what is trained stays."
            ) from None

    def add(self, entry: Entry) -> None:
        """Append an entry."""
        rows = [asdict(one) for one in [*self.entries(), entry]]
        atomic_write_json(self.file, {"jobs": rows})

    def newest(self) -> dict[str, Entry]:
        """The last entry of every key."""
        return {entry.key: entry for entry in self.entries()}

    def entry(self, number: int) -> Entry | None:
        """The entry of a job."""
        return next((entry for entry in self.entries() if entry.number == number), None)

    def attempts_file(self, number: int) -> Path:
        """Where a job notes how each of its starts ended."""
        return self.folder / "attempts" / f"{number}.jsonl"

    def cancel_mark(self, number: int) -> Path:
        """A file that says: this job is not to be requeued."""
        return self.folder / "cancelled" / str(number)


def dependents(entries: Sequence[Entry], number: int) -> Iterator[Entry]:
    """The entries that wait for job `number`, directly or through others, nearest first."""
    seen = {number}
    for entry in entries:  # what an entry waits for was submitted before it
        if seen.intersection(entry.depends):
            seen.add(entry.number)
            yield entry
