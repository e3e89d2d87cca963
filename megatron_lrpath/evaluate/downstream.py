"""Downstream benchmarks: their names, the models to measure, and the results so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.console import warn
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.runs.checkpoints import (
    checkpoint_fingerprint,
    checkpoint_folder,
    files_fingerprint,
    require_checkpoint,
)
from megatron_lrpath.runs.folder import RunFolder, read_json_object
from megatron_lrpath.runs.results import is_complete, model_fingerprint, model_runs
from megatron_lrpath.sealed import write_sealed


@dataclass(frozen=True)
class Benchmark:
    """A column of the table.

    Attributes:
        label: its heading.
        task: the task or group of lm-evaluation-harness (or of `evaluate/tasks`) that measures it.
        metric: the task's metric, as `metric,filter`; empty for the task's first one.
    """

    label: str
    task: str
    metric: str = ""


PAPER: tuple[Benchmark, ...] = (
    Benchmark("C3", "lrpath_c3", "acc_norm,none"),
    Benchmark("GSM8K", "gsm8k", "exact_match,flexible-extract"),
    Benchmark("MMLU", "mmlu", "acc,none"),
    Benchmark("CSL", "lrpath_csl", "acc_norm,none"),
    Benchmark("C-EVAL", "ceval-valid", "acc,none"),
    Benchmark("BBH", "bbh_fewshot", "exact_match,none"),
    Benchmark("CMMLU", "cmmlu", "acc,none"),
    Benchmark("GAOKAO", "lrpath_gaokao", "acc,none"),
    Benchmark("AGIEval", "agieval", "acc,none"),
)


def benchmarks(names: Iterable[str]) -> list[Benchmark]:
    """Return the benchmarks of these names without duplicates: `paper`, one of its headings in any case, or a
    task's name.
    """
    headings = {one.label.casefold(): one for one in PAPER}
    by_task = {one.task: one for one in PAPER}
    found: list[Benchmark] = []
    for name in names:
        one = headings.get(name.casefold()) or by_task.get(name) or Benchmark(name, name)
        found += [new for new in (PAPER if name.casefold() == "paper" else (one,)) if new not in found]
    return found


def in_order(tasks: Iterable[str]) -> list[Benchmark]:
    """Return the benchmarks of these tasks: the paper's in the paper's order, then the others by name."""
    named = benchmarks(sorted(tasks))
    return sorted(named, key=lambda one: (PAPER.index(one) if one in PAPER else len(PAPER), one.label))


@dataclass(frozen=True)
class TaskSettings:
    """The settings that a score depends on, in addition to model and task.

    Attributes:
        limit: only the first samples of every (sub)task; None for all.
        num_fewshot: examples in the prompt; None for the task's default.
        chat: whether prompts use the model's chat template.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: `ours/branch-v2`, or the name of a Hugging Face folder.
        folder: the folder of its results.
        checkpoint: the checkpoint of its last step; None for a Hugging Face folder.
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
    """Return the trained models of a plan: `models` is all, versions or fine-tuned; `name` selects one run.

    Raises:
        UserError: there is no such run, or no model is trained.
    """
    runs = model_runs(plan, paradigms)
    tuned = {"all": (True, False), "versions": (False,), "fine-tuned": (True,)}[models]
    chosen = [run for run in runs if name in (None, run.name) and run.is_sft in tuned]
    if not chosen:
        wanted = f"run {name!r}" if name else f"{models} models"
        raise UserError(f"{plan.path} has no {wanted}; it has {', '.join(run.name for run in runs)}.")
    trained = [run for run in chosen if is_complete(plan.folder(run), run)]
    if not trained:
        raise UserError(f"no version is trained yet: lrpath run {plan.path}")
    return [run_subject(plan, run) for run in trained]


def run_subject(plan: Plan, run: Run) -> Subject:
    """Return the model at the end of a run, whose checkpoint may have left the disk."""
    folder = plan.folder(run)
    checkpoints = RunFolder(folder).checkpoints
    fingerprint = model_fingerprint(folder, run.last_step)
    if fingerprint is None:
        require_checkpoint(checkpoints, run.last_step)
        fingerprint = checkpoint_fingerprint(checkpoints, run.last_step)
    place = checkpoint_folder(checkpoints, run.last_step)
    return Subject(run.key, folder, place, run.last_step, fingerprint, run)


def folder_subject(folder: Path) -> Subject:
    """Return the model in a Hugging Face folder, identified by the names, sizes and sampled bytes of its
    weights.

    Raises:
        UserError: there is no such model.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise UserError(f"{folder}: neither a plan nor a Hugging Face folder (config.json and safetensors)")
    return Subject(folder.resolve().name, folder, None, None, files_fingerprint(weights))


def results_of(subject: Subject) -> dict[str, Any]:
    """Return the results of this model by task; empty if the results belong to another model."""
    problems: list[str] = []
    stored = read_json_object(RunFolder(subject.folder).downstream, problems) or {}
    for problem in problems:
        warn(f"{subject.folder}: {problem}; its benchmarks are measured again.")
    return dict(stored.get("results", {})) if stored.get("checkpoint") == subject.fingerprint else {}


def missing(subject: Subject, wanted: Sequence[Benchmark], settings: TaskSettings) -> list[Benchmark]:
    """Return the benchmarks without a result for this model and these settings."""
    known, current = results_of(subject), asdict(settings)
    return [one for one in wanted if known.get(one.task, {}).get("settings") != current]


def add_result(subject: Subject, benchmark: Benchmark, result: dict[str, Any]) -> None:
    """Record a result; drop the results of earlier weights."""
    results = results_of(subject) | {benchmark.task: result}
    stored = {"step": subject.step, "checkpoint": subject.fingerprint, "results": results}
    write_sealed(RunFolder(subject.folder).downstream, stored)
