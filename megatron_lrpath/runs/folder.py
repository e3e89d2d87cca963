"""The path of each file in a run's folder and in a plan's output, and the reader of their JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.locks import LOCK_NAME
from megatron_lrpath.reading import why
from megatron_lrpath.sealed import read_sealed


class Entry:
    """A file or folder of this name in the folder whose attribute it is; returns its path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: RunFolder | OutputFolder, kind: type) -> Path:
        return owner.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """The files of the run in `path`; `docs/run-folder.md` describes their content and their writers."""

    path: Path

    lineage = Entry("lineage.json")  # runs.lineage
    history = Entry("history.jsonl")  # runs.history
    checkpoints = Entry("checkpoints")  # runs.checkpoints
    result = Entry("result.json")  # runs.results
    error = Entry("error.json")  # runs.failure
    evaluation = Entry("eval.json")  # runs.results
    evaluations = Entry("evals.json")  # of the main path's checkpoints; runs.results
    evaluations_lock = Entry(".evals.json.lock")
    downstream = Entry("downstream.json")  # evaluate.downstream
    exported = Entry("huggingface")  # export.folder
    completions = Entry("completions.json")  # runs.completions
    merged = Entry("merged.json")  # merge.preview
    logs = Entry("logs")
    evaluation_job = Entry("evaluation")  # contains the `logs` of the Slurm job that evaluates the run
    tensorboard = Entry("tensorboard")
    lock = Entry(LOCK_NAME)

    @property
    def sealed(self) -> tuple[Path, ...]:
        """The files that contain their own checksum."""
        return (
            self.lineage,
            self.result,
            self.error,
            self.evaluation,
            self.evaluations,
            self.downstream,
            self.completions,
            self.merged,
        )

    @property
    def written_by_training(self) -> tuple[Path, ...]:
        """The files that only the training writes, atomically; leftovers of a killed one may be removed."""
        return self.lineage, self.history, self.result


@dataclass(frozen=True)
class OutputFolder:
    """The files in a plan's output that are not in the folder of a run."""

    path: Path

    plan = Entry("plan.yaml")  # of `--set`; runs.overridden
    logs = Entry("logs")  # of `lrpath eval`
    report = Entry("report")
    slurm = Entry("slurm")  # launch.slurm.ledger
    set_aside = Entry("set-aside")  # runs.rewinds
    trials = Entry("trials")  # trials.record
    compare_starts = Entry("compare-starts")  # upkeep.compare_starts


def report_page(folder: Path) -> Path:
    """Return the page of the report in `folder`."""
    return folder / "index.html"


def report_sources(folder: Path) -> Path:
    """Return the record of the evaluations in the report in `folder`."""
    return folder / "made-from.json"


def read_json_object(path: Path, problems: list[str] | None = None) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file is missing or cannot be used.

    Args:
        path: the file.
        problems: receives a sentence if the file exists and cannot be used.
    """
    problems = [] if problems is None else problems
    if not path.is_file():
        return None
    try:
        return read_sealed(path)[0]
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({why(error)})")
        return None


def inspect(folder: Path) -> tuple[list[str], list[str]]:
    """Return the problems of a run's JSON files, and the names of older files without a checksum."""
    problems: list[str] = []
    unverified: list[str] = []
    for path in RunFolder(folder).sealed:
        try:
            if not read_sealed(path)[1]:
                unverified.append(path.name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            problems.append(f"{path.name} cannot be read ({why(error)})")
    return problems, unverified
