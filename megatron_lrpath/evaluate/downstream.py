"""Which models are to be measured on which benchmarks, and what has been: `downstream.json` in each run's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.evaluate.benchmarks import Benchmark
from megatron_lrpath.evaluate.targets import is_trained, model_runs, read_json
from megatron_lrpath.files import atomic_write_json
from megatron_lrpath.plan import Plan, Run

RESULTS = "downstream.json"


@dataclass(frozen=True)
class Settings:
    """What a score depends on beside model and task.

    Attributes:
        limit: only the first samples of every (sub)task, None for all.
        num_fewshot: examples in the prompt, None for the task's own number.
        chat: whether prompts go through the model's chat template.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False


@dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Attributes:
        name: `ours/branch-v2`, or the name of a Hugging Face folder.
        folder: where its results stand.
        checkpoint: the checkpoint of its last step, None for a Hugging Face folder.
        step: that step.
        fingerprint: of the checkpoint, or of the folder's weights.
        run: the plan's run.
    """

    name: str
    folder: Path
    checkpoint: Path | None
    step: int | None
    fingerprint: str
    run: Run | None = None


def plan_subjects(
    plan: Plan, paradigms: Iterable[str], name: str | None = None, models: str = "all"
) -> list[Subject]:
    """The trained models of a plan: `models` are all, versions or fine-tuned; `name` chooses one run.

    Raises:
        UserError: there is no such run, or nothing is trained.
    """
    runs = model_runs(plan, paradigms)
    tuned = {"all": (True, False), "versions": (False,), "fine-tuned": (True,)}[models]
    chosen = [run for run in runs if name in (None, run.name) and (run.kind == "sft") in tuned]
    if not chosen:
        wanted = f"run {name!r}" if name else f"{models} models"
        raise UserError(f"{plan.path} has no {wanted}; it has {', '.join(run.name for run in runs)}.")
    trained = [run for run in chosen if is_trained(plan, run)]
    if not trained:
        raise UserError(f"no version is trained yet that could be measured: lrpath run {plan.path}")
    return [run_subject(plan, run) for run in trained]


def run_subject(plan: Plan, run: Run) -> Subject:
    """The model at the end of a run."""
    from megatron_lrpath.training.branch import require_checkpoint
    from megatron_lrpath.training.checkpoints.on_disk import CHECKPOINTS, checkpoint_folder
    from megatron_lrpath.training.context import ParentCheckpoint
    from megatron_lrpath.training.lineage import checkpoint_fingerprint

    folder = plan.folder(run)
    checkpoints = folder / CHECKPOINTS
    require_checkpoint(ParentCheckpoint(checkpoints, run.last_step))
    fingerprint = checkpoint_fingerprint(checkpoints, run.last_step)
    place = checkpoint_folder(checkpoints, run.last_step)
    return Subject(f"{run.paradigm}/{run.name}", folder, place, run.last_step, fingerprint, run)


def folder_subject(folder: Path) -> Subject:
    """The model in a Hugging Face folder, known by the names, sizes and first bytes of its weights.

    Raises:
        UserError: there is no such model.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise UserError(f"{folder}: neither a plan nor a Hugging Face folder (config.json and safetensors)")
    digest = hashlib.sha256()
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as stream:
            for number in range(16):
                stream.seek(size * number // 16)
                digest.update(stream.read(65536))
    return Subject(folder.resolve().name, folder, None, None, digest.hexdigest())


def results_of(subject: Subject) -> dict[str, Any]:
    """Task -> result of this very model; none where the results are another model's."""
    stored = read_json(subject.folder / RESULTS) or {}
    return dict(stored.get("results", {})) if stored.get("checkpoint") == subject.fingerprint else {}


def missing(subject: Subject, wanted: Sequence[Benchmark], settings: Settings) -> list[Benchmark]:
    """The benchmarks that this model has not been measured on with these settings."""
    known, said = results_of(subject), asdict(settings)
    return [one for one in wanted if known.get(one.task, {}).get("settings") != said]


def add_result(subject: Subject, benchmark: Benchmark, result: dict[str, Any]) -> None:
    """Record a result; those of earlier weights are dropped."""
    results = results_of(subject) | {benchmark.task: result}
    stored = {"step": subject.step, "checkpoint": subject.fingerprint, "results": results}
    atomic_write_json(subject.folder / RESULTS, stored)
