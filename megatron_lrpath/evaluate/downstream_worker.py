"""Measures models on benchmarks, in a process of its own: exports each on demand, then asks the harness."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.errors import UserError
from megatron_lrpath.evaluate.benchmarks import Benchmark, benchmarks
from megatron_lrpath.evaluate.downstream import (
    Settings,
    Subject,
    add_result,
    folder_subject,
    missing,
    run_subject,
)
from megatron_lrpath.files import atomic_write_text
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.quiet import quiet

if TYPE_CHECKING:
    from megatron_lrpath.evaluate.harness import Harness

CACHE = "downstream"
"""The folder in a run's folder that holds the exported model and its answers until all is measured."""


def parse(words: list[str]) -> argparse.Namespace:
    """Our words; `lrpath eval --tasks` writes them."""
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
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure; a user's error is one message and exit code 2."""
    quiet()
    said = parse(sys.argv[1:] if words is None else words)
    if said.task_data is not None:  # what is to be read is there; nobody is asked for it
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        measure(said)
    except UserError as error:
        print(f"lrpath: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def measure(said: argparse.Namespace) -> None:
    """Measure every subject on every benchmark that is missing; a line for each result."""
    import torch

    from megatron_lrpath.evaluate.harness import Harness, quiet

    quiet()
    device = said.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(said.limit, said.num_fewshot, said.chat)
    wanted = benchmarks(said.tasks)
    harness = Harness(wanted, said.task_data, settings)
    batch_size = "8" if said.batch_size == "auto" and device == "cpu" else said.batch_size
    plan = None if said.source.is_dir() else load_plan(said.source)
    for subject in subjects(said, plan):
        if said.force:
            shutil.rmtree(subject.folder / CACHE, ignore_errors=True)
        left = wanted if said.force else missing(subject, wanted, settings)
        if left:
            model = model_folder(subject, plan)
            for benchmark in left:
                measure_one(harness, subject, model, benchmark, device, batch_size)
        shutil.rmtree(subject.folder / CACHE, ignore_errors=True)


def subjects(said: argparse.Namespace, plan: Plan | None) -> list[Subject]:
    """The models that the words name."""
    if plan is None:
        return [folder_subject(said.source)]
    names = (name.partition("/") for name in said.runs)
    return [run_subject(plan, plan.run(paradigm, run)) for paradigm, _, run in names]


def measure_one(
    harness: Harness, subject: Subject, model: Path, benchmark: Benchmark, device: str, batch_size: str
) -> None:
    """Measure, record, and say so."""
    cache = subject.folder / CACHE / f"answers-{subject.fingerprint[:16]}"
    cache.parent.mkdir(exist_ok=True)
    result = harness.measure(model, benchmark, cache, device, batch_size)
    add_result(subject, benchmark, result)
    print(
        f"{subject.name} {benchmark.label}: {100 * result['score']:.2f} "
        f"({result['samples']} samples, {result['seconds']:.0f} s)",
        flush=True,
    )


def model_folder(subject: Subject, plan: Plan | None) -> Path:
    """The model as a Hugging Face folder: the subject itself, or its checkpoint exported into a cache.

    An export of the same weights that an interrupted evaluation has left is used again.
    """
    if subject.checkpoint is None or plan is None or subject.run is None or subject.step is None:
        return subject.folder
    from megatron_lrpath.export.card import origin_of
    from megatron_lrpath.export.folder import Wishes, export_checkpoint

    target = subject.folder / CACHE / "model"
    note = target.with_name("model.checkpoint")
    if target.is_dir() and note.is_file() and note.read_text() == subject.fingerprint:
        return target
    print(f"{subject.name}: exporting", flush=True)
    export_checkpoint(
        subject.checkpoint, target, origin_of(plan, subject.run, subject.step), Wishes(force=True)
    )
    atomic_write_text(note, subject.fingerprint)
    return target


if __name__ == "__main__":
    main()
