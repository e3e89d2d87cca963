"""One model on one benchmark, by lm-evaluation-harness."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.evaluate.benchmarks import Benchmark
from megatron_lrpath.evaluate.downstream import Settings
from megatron_lrpath.evaluate.local_data import local_datasets

TASKS = Path(__file__).with_name("tasks")


@functools.cache
def task_manager() -> Any:
    """The index of the harness's tasks and of this project's (thousands of files, seconds)."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS))


class Harness:
    """The harness's tasks and this project's, loaded once and asked of one model after the other."""

    def __init__(self, wanted: list[Benchmark], data: Path | None, settings: Settings) -> None:
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
        """The score of the Hugging Face model in a folder on a benchmark, and how it came about.

        Answers of the model are kept in `cache` as they come, so that a killed evaluation goes on.

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
        """The model, kept for the next benchmark."""
        if getattr(self, "_loaded", (None, None))[0] != folder:
            from lm_eval.models.huggingface import HFLM

            lm = HFLM(pretrained=str(folder), device=device, batch_size=batch_size, trust_remote_code=False)
            if self.settings.chat and not lm.tokenizer.chat_template:
                raise UserError(f"--chat: the tokenizer of {folder} has no chat template")
            self._loaded = (folder, lm)
        return self._loaded[1]


def result(benchmark: Benchmark, answers: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What is recorded of the harness's answer: score (0 to 1), samples, versions, and the subtasks' scores."""
    measured = answers["results"][benchmark.task]
    metric = benchmark.metric or first_metric(measured)
    if metric not in measured:
        known = [name for name in measured if "," in name and "_stderr" not in name]
        raise UserError(f"{benchmark.task}: has no metric {metric}; it has {', '.join(known)}")
    subtasks = {name: row[metric] for name, row in answers["results"].items() if metric in row}
    return {
        "score": measured[metric],
        "stderr": finite(measured.get(metric.replace(",", "_stderr,"))),
        "metric": metric,
        "samples": sum(row["effective"] for row in answers["n-samples"].values()),
        "fewshot": sorted(set(answers["n-shot"].values())),
        "settings": asdict(settings),
        "lm_eval": version(),
        "task_version": answers["versions"].get(benchmark.task),
        "subtasks": {name: score for name, score in sorted(subtasks.items()) if name != benchmark.task},
    }


def first_metric(measured: dict[str, Any]) -> str:
    """The metric that the task's file names first."""
    return next(name for name in measured if "," in name and "_stderr" not in name)


def finite(value: object) -> float | None:
    """A number, or None for what the harness writes where it has none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def version() -> str:
    """The harness's version."""
    return importlib.metadata.version("lm_eval")


def quiet() -> None:
    """Leave the harness's own talk to its log: warnings and errors."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
