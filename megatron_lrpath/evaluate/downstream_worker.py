"""Measure models on benchmarks with lm-evaluation-harness, in a separate process; export models on demand."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import logging
import math
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_lrpath.console import quiet
from megatron_lrpath.errors import UserError
from megatron_lrpath.evaluate.downstream import (
    Benchmark,
    Subject,
    TaskSettings,
    add_result,
    benchmarks,
    folder_subject,
    missing,
    run_subject,
)
from megatron_lrpath.evaluate.local_data import local_datasets
from megatron_lrpath.exits import BAD_INPUT
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.runs import failure


@functools.cache
def task_manager() -> Any:
    """Return the index of the harness's tasks and of this project's (thousands of files, seconds)."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(Path(__file__).with_name("tasks")))


class Harness:
    """The tasks of the harness and of this project, loaded once and used for one model after another."""

    def __init__(self, wanted: list[Benchmark], data: Path | None, settings: TaskSettings) -> None:
        self.settings, self.data = settings, data
        self.manager = task_manager()
        unknown = [one.task for one in wanted if one.task not in self.manager.all_tasks]
        if unknown:
            raise UserError(
                f"lm-evaluation-harness {version()} has no task {', '.join(unknown)}; `lm-eval ls tasks` lists "
                "all, `paper` names the nine of the paper."
            )

    def measure(
        self, model: Path, benchmark: Benchmark, cache: Path, device: str, batch_size: str
    ) -> dict[str, Any]:
        """Return the score of the Hugging Face model in a folder on a benchmark, with its details.

        The model's answers are stored in `cache`, so that an interrupted evaluation can resume.

        Raises:
            UserError: data or chat template are missing.
        """
        from lm_eval import simple_evaluate

        started = time.monotonic()
        lm = self._model(model, device, batch_size)
        with local_datasets(self.data):
            answers = simple_evaluate(
                model=lm,
                tasks=[benchmark.task],
                num_fewshot=self.settings.num_fewshot,
                limit=self.settings.limit,
                use_cache=str(cache),
                bootstrap_iters=100,
                log_samples=False,
                apply_chat_template=self.settings.chat,
                fewshot_as_multiturn=self.settings.chat,
                task_manager=self.manager,
            )
        return result(benchmark, answers, self.settings) | {"seconds": round(time.monotonic() - started, 1)}

    def _model(self, folder: Path, device: str, batch_size: str) -> Any:
        """Return the model, cached for the next benchmark."""
        if getattr(self, "_loaded", (None, None))[0] != folder:
            from lm_eval.models.huggingface import HFLM

            lm = HFLM(pretrained=str(folder), device=device, batch_size=batch_size, trust_remote_code=False)
            if self.settings.chat and not lm.tokenizer.chat_template:
                raise UserError(f"--chat: the tokenizer of {folder} has no chat template")
            self._loaded = (folder, lm)
        return self._loaded[1]


def result(benchmark: Benchmark, answers: dict[str, Any], settings: TaskSettings) -> dict[str, Any]:
    """Return the record of a result: score (0 to 1), samples, versions, and the subtasks' scores."""
    measured = answers["results"][benchmark.task]
    known = [name for name in measured if "," in name and "_stderr" not in name]
    metric = benchmark.metric or known[0]  # the first metric of the task's file
    if metric not in measured:
        raise UserError(f"{benchmark.task}: has no metric {metric}; it has {', '.join(known)}")
    subtasks = {name: row[metric] for name, row in answers["results"].items() if metric in row}
    stderr = measured.get(metric.replace(",", "_stderr,"))
    return {
        "score": measured[metric],
        # the harness writes text or NaN if it has no value
        "stderr": float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
        "metric": metric,
        "samples": sum(row["effective"] for row in answers["n-samples"].values()),
        "fewshot": sorted(set(answers["n-shot"].values())),
        "settings": asdict(settings),
        "lm_eval": version(),
        "task_version": answers["versions"].get(benchmark.task),
        "subtasks": {name: score for name, score in sorted(subtasks.items()) if name != benchmark.task},
    }


def version() -> str:
    """Return the harness's version."""
    return importlib.metadata.version("lm_eval")


CACHE = "downstream"  # in a run's folder: the exported model and its answers until all are measured


def main(argv: list[str] | None = None) -> None:
    """Run `lrpath eval --tasks`; report a user's error in one message with exit status 2."""
    quiet()
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--runs", nargs="*", default=[], metavar="PARADIGM/RUN")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--task-data", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--batch-size", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args(argv)
    if args.task_data is not None:  # the data are in that folder; nothing is downloaded
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        with failure.recorded():
            measure(args)
    except UserError as error:
        print(f"lrpath: error: {error}", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)


def measure(args: argparse.Namespace) -> None:
    """Measure every model on every missing benchmark; print one line for each result."""
    import torch

    logging.getLogger("lm_eval").setLevel(logging.WARNING)  # the harness's own messages stay in its log
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = TaskSettings(args.limit, args.num_fewshot, args.chat)
    wanted = benchmarks(args.tasks)
    harness = Harness(wanted, args.task_data, settings)
    batch_size = "8" if args.batch_size == "auto" and device == "cpu" else args.batch_size
    plan = None if args.source.is_dir() else load_plan(args.source)
    for subject in subjects(args, plan):
        if args.force:
            shutil.rmtree(subject.folder / CACHE, ignore_errors=True)
        left = wanted if args.force else missing(subject, wanted, settings)
        if left:
            model = model_folder(subject, plan)
            cache = subject.folder / CACHE / f"answers-{subject.fingerprint[:16]}"
            cache.parent.mkdir(exist_ok=True)
            for benchmark in left:
                score = harness.measure(model, benchmark, cache, device, batch_size)
                add_result(subject, benchmark, score)
                print(
                    f"{subject.name} {benchmark.label}: {100 * score['score']:.2f} "
                    f"({score['samples']} samples, {score['seconds']:.0f} s)",
                    flush=True,
                )
        shutil.rmtree(subject.folder / CACHE, ignore_errors=True)


def subjects(args: argparse.Namespace, plan: Plan | None) -> list[Subject]:
    """Return the models that the arguments name."""
    if plan is None:
        return [folder_subject(args.source)]
    names = (name.partition("/") for name in args.runs)
    return [run_subject(plan, plan.run(paradigm, run)) for paradigm, _, run in names]


def model_folder(subject: Subject, plan: Plan | None) -> Path:
    """Return the model as a Hugging Face folder: the given folder, or the checkpoint exported into a cache.

    An export of the same weights from an interrupted evaluation is reused.
    """
    if plan is None or subject.run is None or subject.step is None:
        return subject.folder
    from megatron_lrpath.export.folder import fresh_export  # imports torch and its checkpoints

    return fresh_export(plan, subject.run, subject.step, subject.folder / CACHE / "model")


if __name__ == "__main__":
    main()
