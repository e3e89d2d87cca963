"""`lrpath eval --tasks`: trained versions on downstream benchmarks, by lm-evaluation-harness."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, about: str) -> None:
    """The options that belong to --tasks; `about` says what they mean for the command."""
    group = parser.add_argument_group("downstream benchmarks", about)
    group.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="`paper` (C3, GSM8K, MMLU, CSL, C-EVAL, BBH, CMMLU, GAOKAO, AGIEval), some of these, or any task "
        "or group of lm-evaluation-harness",
    )
    group.add_argument(
        "--task-data", type=Path, metavar="DIR", help="read all benchmark data here, without a network"
    )
    group.add_argument(
        "--models",
        choices=("all", "versions", "fine-tuned"),
        default="all",
        help="of a plan: versions as they are, fine-tuned ones (default: all)",
    )
    group.add_argument("--limit", type=_count, metavar="N", help="only the first N samples of each subtask")
    group.add_argument(
        "--num-fewshot", type=_count_or_none, metavar="N", help="examples in the prompt (default: the task's)"
    )
    group.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    group.add_argument(
        "--batch-size", default="auto", metavar="N|auto", help="prompts at once (default: auto)"
    )


def execute(args: argparse.Namespace) -> int:
    """Measure what is missing, print the table; 0, or the worker's status where it failed."""
    from megatron_lrpath.evaluate.benchmarks import benchmarks
    from megatron_lrpath.evaluate.downstream import Settings, folder_subject, missing, plan_subjects
    from megatron_lrpath.plan import PARADIGMS, load_plan

    require_harness()
    refuse_ignored(args)
    wanted = benchmarks(args.tasks)
    settings = Settings(args.limit, args.num_fewshot, args.chat)
    if args.plan.is_dir():
        subjects, output = [folder_subject(args.plan)], args.plan
    else:
        plan = load_plan(args.plan)
        paradigms = PARADIGMS if args.paradigm == "all" else (args.paradigm,)
        subjects, output = plan_subjects(plan, paradigms, args.run, args.models), Path(plan.output)
    left = subjects if args.force else [one for one in subjects if missing(one, wanted, settings)]
    if left:
        names = [one.name for one in left] if not args.plan.is_dir() else []
        status = run_worker(args, names, output / "logs" / "downstream.log")
        if status:
            return status
    else:
        print("nothing to measure: all of it has been")
    show([one.name for one in subjects], [one.folder for one in subjects])
    return 0


def check(args: argparse.Namespace) -> None:
    """Stop at what could not be measured after a plan has been carried out."""
    from megatron_lrpath.errors import UserError
    from megatron_lrpath.evaluate.benchmarks import benchmarks
    from megatron_lrpath.experiment.load import is_experiment

    require_harness()
    benchmarks(args.tasks)
    if is_experiment(args.plan):
        raise UserError(f"{args.plan}: an experiment; call `lrpath eval … --tasks` on its points' plans")


def require_harness() -> None:
    """Stop where lm-evaluation-harness is not installed."""
    from importlib.util import find_spec

    from megatron_lrpath.errors import UserError

    if find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'megatron-lrpath[eval]'")


def refuse_ignored(args: argparse.Namespace) -> None:
    """Stop at options of the perplexities that mean nothing here."""
    from megatron_lrpath.errors import UserError

    if args.nproc != 1 or args.extra:
        raise UserError(
            "--nproc and Megatron's arguments are for perplexities: --tasks asks the exported model in one process"
        )


def run_worker(args: argparse.Namespace, names: list[str], log: Path) -> int:
    """Run the worker; its lines come to the console, what the libraries say goes into `log`."""
    words = [sys.executable, "-m", "megatron_lrpath.evaluate.downstream_worker", str(args.plan)]
    words += ["--tasks", *args.tasks, "--batch-size", args.batch_size, "--device", args.device]
    words += ["--runs", *names] if names else []
    for option, value in (
        ("--task-data", args.task_data),
        ("--limit", args.limit),
        ("--num-fewshot", args.num_fewshot),
    ):
        words += [option, str(value)] if value is not None else []
    words += [f"--{name}" for name in ("chat", "force") if getattr(args, name)]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(words, stderr=stream, env=environment).returncode
    if status:
        from megatron_lrpath.launch.cause import find_cause

        print(
            f"lrpath: error: the evaluation stopped: {find_cause(log)}\n  log: {log}; called again, it goes on",
            file=sys.stderr,
        )
    return status if status in (0, 2) else 1


def show(names: list[str], folders: list[Path]) -> None:
    """Print a row a model, a column a benchmark, scores times 100 as in the paper."""
    from rich.console import Console
    from rich.table import Table

    from megatron_lrpath.evaluate.benchmarks import in_order
    from megatron_lrpath.evaluate.downstream import RESULTS
    from megatron_lrpath.evaluate.targets import read_json

    found = [(read_json(folder / RESULTS) or {}).get("results", {}) for folder in folders]
    columns = in_order({task for results in found for task in results})
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model")
    for column in (*(one.label for one in columns), "AVG"):
        table.add_column(column, justify="right")
    for name, results in zip(names, found, strict=True):
        scores = [100 * results[one.task]["score"] if one.task in results else None for one in columns]
        known = [score for score in scores if score is not None]
        mean = sum(known) / len(known) if len(known) == len(scores) and known else None
        table.add_row(name, *("–" if score is None else f"{score:.2f}" for score in (*scores, mean)))
    Console().print(table)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _count_or_none(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)
