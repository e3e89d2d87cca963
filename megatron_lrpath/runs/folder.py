"""Where each file of a run lies: every name in a run's folder and in a plan's output, and the reader of their JSON."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.locks import LOCK_NAME

MAXIMUM_BYTES = 64 * 2**20  # of a JSON file; a manifest, the largest, has 100 bytes for each rank and thread


@dataclass(frozen=True)
class RunFolder:
    """The files of the run in `path`; `docs/run-folder.md` describes their content."""

    path: Path

    @property
    def history(self) -> Path:
        """A line for each step, written during training (`runs.history`)."""
        return self.path / "history.jsonl"

    @property
    def result(self) -> Path:
        """The step that the training reached, written at its end (`runs.results`)."""
        return self.path / "result.json"

    @property
    def evaluation(self) -> Path:
        """The evaluation of the last step's model (`runs.results`)."""
        return self.path / "eval.json"

    @property
    def evaluations(self) -> Path:
        """The evaluations of the main path's checkpoints by step (`runs.results`)."""
        return self.path / "evals.json"

    @property
    def downstream(self) -> Path:
        """The scores of the last step's model on benchmarks (`evaluate.downstream`)."""
        return self.path / "downstream.json"

    @property
    def lineage(self) -> Path:
        """Identity, parent and starts of the run (`runs.lineage`)."""
        return self.path / "lineage.json"

    @property
    def error(self) -> Path:
        """Why the last start failed (`runs.failure`)."""
        return self.path / "error.json"

    @property
    def merged(self) -> Path:
        """The checkpoints and weights that a merged model was made from (`merge.preview`)."""
        return self.path / "merged.json"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints and their tracker file (`runs.checkpoints`)."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """The output of each start."""
        return self.path / "logs"

    @property
    def evaluation_job(self) -> Path:
        """The folder of the `logs` of the Slurm job that evaluates the run."""
        return self.path / "evaluation"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def lock(self) -> Path:
        """Held by the process that supervises the run."""
        return self.path / LOCK_NAME

    @property
    def evaluations_lock(self) -> Path:
        """Held while an entry is added to `evaluations`."""
        return self.evaluations.with_name(f".{self.evaluations.name}.lock")

    @property
    def written_by_training(self) -> tuple[Path, ...]:
        """The files that only the training writes, atomically: what a killed one left of them may be removed."""
        return self.lineage, self.history, self.result


@dataclass(frozen=True)
class OutputFolder:
    """The folders of a plan's output beside those of its runs."""

    path: Path

    @property
    def logs(self) -> Path:
        """The output of `lrpath eval`."""
        return self.path / "logs"

    @property
    def report(self) -> Path:
        """The report, or the table of an experiment."""
        return self.path / "report"


def report_page(folder: Path) -> Path:
    """The page of the report in `folder`."""
    return folder / "index.html"


def report_sources(folder: Path) -> Path:
    """The record of the evaluations that the report in `folder` was made from."""
    return folder / "made-from.json"


def load_json(path: Path, maximum: int = MAXIMUM_BYTES) -> Any:
    """The JSON value in a file of at most `maximum` bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger, or does not hold JSON.
    """
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > maximum:
            raise ValueError(f"it has {size} bytes, more than the {maximum} allowed")
        content = stream.read(maximum + 1)
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_object(path: Path, problems: list[str] | None = None) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file, or none that can be used.

    Args:
        path: the file.
        problems: receives a sentence where the file is there and cannot be used.
    """
    problems = [] if problems is None else problems
    if not path.is_file():
        return None
    try:
        value = load_json(path)
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name} does not hold a JSON object")
        return None
    return value
