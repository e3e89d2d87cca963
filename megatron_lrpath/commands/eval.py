"""`lrpath eval`: perplexity of every trained version, and with --tasks its scores on benchmarks."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.commands.following import next_for
from megatron_lrpath.commands.options import EVERY, PLAN, add_device, add_runs, count_from, paradigms_of
from megatron_lrpath.console import say_error, say_next, terminal_table
from megatron_lrpath.errors import UserError
from megatron_lrpath.exits import BAD_INPUT, FAILED
from megatron_lrpath.paradigms import OURS
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.folder import OutputFolder, RunFolder, read_json_object

if TYPE_CHECKING:
    from megatron_lrpath.launch.torchrun import Ranks
    from megatron_lrpath.plan import Plan
    from megatron_lrpath.runs.results import Target


def add_task_arguments(parser: argparse.ArgumentParser, about: str) -> None:
    """Add the options of --tasks; `about` describes their effect in the command."""
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
    group.add_argument(
        "--limit", type=count_from(1), metavar="N", help="only the first N samples of each subtask"
    )
    group.add_argument(
        "--num-fewshot", type=count_from(0), metavar="N", help="examples in the prompt (default: the task's)"
    )
    group.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    group.add_argument(
        "--batch-size", default="auto", metavar="N|auto", help="prompts at once (default: auto)"
    )


def execute_tasks(args: argparse.Namespace) -> int:
    """Measure the missing benchmarks and print the table; return 0, or the worker's status if it failed."""
    from megatron_lrpath.data.record import require_tokenizer
    from megatron_lrpath.evaluate.downstream import (
        TaskSettings,
        benchmarks,
        folder_subject,
        missing,
        plan_subjects,
    )
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.runs.archive import fetch_missing

    require_harness()
    if args.nproc != 1 or args.extra:
        raise UserError(
            "--nproc and Megatron's arguments are for perplexities: --tasks asks the exported model in one process"
        )
    wanted = benchmarks(args.tasks)
    settings = TaskSettings(args.limit, args.num_fewshot, args.chat)
    if args.plan.is_dir():
        subjects, output = [folder_subject(args.plan)], args.plan
    else:
        plan = load_plan(args.plan)
        require_tokenizer(plan)
        paradigms = paradigms_of(args, plan)
        subjects, output = plan_subjects(plan, paradigms, args.run, args.models), Path(plan.output)
    left = subjects if args.force else [one for one in subjects if missing(one, wanted, settings)]
    names = []
    if not args.plan.is_dir():
        names = [one.name for one in left]
        fetch_missing(plan, [(one.run, one.run.last_step) for one in left if one.run])
    if not left:
        print("nothing to measure: all of it has been")
    elif status := run_worker(args, names, OutputFolder(output).logs / "downstream.log"):
        return status
    show([one.name for one in subjects], [one.folder for one in subjects])
    if not args.plan.is_dir():
        say_next(f"lrpath report {shlex.quote(str(args.plan))}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse --tasks that could not be measured after the training."""
    from megatron_lrpath.evaluate.downstream import benchmarks
    from megatron_lrpath.experiment.load import is_experiment

    require_harness()
    benchmarks(args.tasks)
    if is_experiment(args.plan):
        raise UserError(f"{args.plan}: an experiment; call `lrpath eval … --tasks` on its points' plans")


def require_harness() -> None:
    """Refuse --tasks if lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'megatron-lrpath[eval]'")


def run_worker(args: argparse.Namespace, names: list[str], log: Path) -> int:
    """Run the worker of --tasks; its lines go to the console, the libraries' output into `log`."""
    command = [sys.executable, "-m", "megatron_lrpath.evaluate.downstream_worker", str(args.plan)]
    command += ["--tasks", *args.tasks, "--batch-size", args.batch_size, "--device", args.device]
    command += ["--runs", *names] if names else []
    for name in ("task_data", "limit", "num_fewshot"):
        value = getattr(args, name)
        command += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    command += [f"--{name}" for name in ("chat", "force") if getattr(args, name)]
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    status, found = run_logged(command, environment, log, "its process", all_output=False)
    if found:
        say_error(f"the evaluation stopped: {found.message}\n  log: {log}; {found.again}")
    return status_of(status)


def status_of(worker: int) -> int:
    """Return the exit status of the command for that of its worker."""
    return worker if worker in (0, BAD_INPUT) else FAILED


def run_logged(
    command: Ranks | list[str], environment: dict[str, str], log: Path, who: str, all_output: bool
) -> tuple[int, failure.Failure | None]:
    """Run a worker (`who`) with its errors, or all of its output, in `log`; return its status and why it
    failed, if it did.
    """
    # Imported here to shorten the start-up: not every command of `lrpath` starts processes.
    from megatron_lrpath.launch import warm
    from megatron_lrpath.launch.runner import GRACE_SECONDS
    from megatron_lrpath.launch.torchrun import Ranks

    error_file = failure.beside(log)
    failure.clear(error_file)
    # Threads that spin at barriers are slow on a machine with other load.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **environment, **os.environ}
    environment[failure.VARIABLE] = str(error_file)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        if isinstance(command, Ranks) and warm.is_warm():  # `lrpath run` has forked this process
            status = warm.start(command, environment, GRACE_SECONDS, log).wait() or 0
        else:
            argv = command.command if isinstance(command, Ranks) else command
            stdout = stream if all_output else None
            status = subprocess.run(argv, stdout=stdout, stderr=stream, env=environment).returncode
    return status, (failure.read(error_file) or failure.of_status(who, status)) if status else None


def show(names: list[str], folders: list[Path]) -> None:
    """Print a row for each model, a column for each benchmark, scores times 100 as in the paper."""
    from rich.console import Console

    from megatron_lrpath.evaluate.downstream import in_order
    from megatron_lrpath.report.evaluations import scores

    found = [(read_json_object(RunFolder(folder).downstream) or {}).get("results", {}) for folder in folders]
    columns = in_order({task for results in found for task in results})
    titles = ("model", *(one.label for one in columns), "AVG")
    table = terminal_table(titles, "l" + "r" * (len(titles) - 1))
    for name, results in zip(names, found, strict=True):
        cells = ("–" if score is None else f"{score:.2f}" for score in scores(results, columns))
        table.add_row(name, *cells)
    Console().print(table)


HELP = "perplexity of every trained version on the validation set; with --tasks, scores on benchmarks"
EXAMPLE = """lrpath eval examples/quickstart/plan.yaml --paradigm ours
  lrpath eval plan.yaml --main-path
  lrpath eval plan.yaml --tasks paper --task-data data/benchmarks"""
TAKES_EXTRA = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the selection of models, and the machine."""
    add_runs(parser, PLAN, "only this run of the paradigm")
    parser.add_argument(
        "--main-path",
        action="store_true",
        help="instead of the versions the main path's checkpoints, which tell `lrpath advise` the level of the losses",
    )
    parser.add_argument("--force", action="store_true", help="evaluate again what has been evaluated")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes (default: 1)")
    add_device(parser)
    about = "instead of perplexity, PLAN may be a Hugging Face folder; pip install 'megatron-lrpath[eval]'"
    add_task_arguments(parser, about)


def execute(args: argparse.Namespace) -> int:
    """Evaluate trained models without a result; return 0, or 1 if the evaluation failed."""
    from megatron_lrpath.data.record import require_tokenizer
    from megatron_lrpath.data.slice import open_validation
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.plan.secrets import secret_problem
    from megatron_lrpath.runs.completions import needs_completions
    from megatron_lrpath.runs.results import (
        Target,
        is_complete,
        main_path_targets,
        model_runs,
        needs_evaluation,
        nothing_there,
    )

    if args.main_path and (args.tasks or args.run or args.paradigm not in (None, EVERY, OURS.name)):
        raise UserError(
            "--main-path evaluates the main path's checkpoints; leave out --tasks, --run and --paradigm."
        )
    if secret := secret_problem(args.extra):
        raise UserError(f"after --: {secret}")
    if args.tasks:
        return execute_tasks(args)
    plan = load_plan(args.plan)
    require_tokenizer(plan)
    if args.main_path:
        targets = main_path_targets(plan, open_validation(plan.data).fingerprint, args.force)
        if not targets:
            print("nothing to evaluate: all checkpoints of the main path are evaluated")
        status = evaluate(plan, targets, args) if targets else 0
        if status == 0:
            say_next(f"lrpath advise {shlex.quote(str(args.plan))}")
        return status
    paradigms = paradigms_of(args, plan)
    runs = model_runs(plan, paradigms)
    if args.run:
        from megatron_lrpath.runs.tasks import unknown_run

        names = [run.name for run in runs]
        if len(paradigms) == 1:
            runs = [plan.run(paradigms[0], args.run)]
        elif not (runs := [run for run in runs if run.name == args.run]):
            raise unknown_run(plan.path, args.run, names)
    trained = [run for run in runs if is_complete(plan.folder(run), run)]
    wanted = [
        run for run in trained if args.force or needs_evaluation(plan, run) or needs_completions(plan, run)
    ]
    if not trained:
        raise nothing_there(plan, "nothing to evaluate, no version is trained yet")
    if not wanted:
        print(
            f"nothing to evaluate: {len(trained)} of {len(runs)} versions are trained, all of them evaluated"
        )
        say_next(next_for(plan, paradigms))
        return 0
    kinds = ([run for run in wanted if not run.is_sft], [run for run in wanted if run.is_sft])
    status = max(evaluate(plan, [Target(run) for run in runs], args) for runs in kinds if runs)
    if status == 0:
        say_next(f"lrpath report {shlex.quote(str(args.plan))}")
    return status


def evaluate(plan: Plan, targets: list[Target], args: argparse.Namespace) -> int:
    """Run the worker under torchrun, its log in OUTPUT/logs, its results on the console."""
    from megatron_lrpath.launch import torchrun
    from megatron_lrpath.runs.archive import fetch_missing
    from megatron_lrpath.runs.results import evaluation_of

    fetch_missing(plan, [(target.run, target.step) for target in targets if target.at is None])
    kind = "-main-path" if targets[0].at is not None else "-sft" if targets[0].run.is_sft else ""
    log = OutputFolder(Path(plan.output)).logs / f"eval{kind}.log"
    options = [
        "--plan",
        str(plan.path),
        "--device",
        args.device,
        *(["--again"] if args.force else []),
        "--runs",
    ]
    options += [*(target.name for target in targets), *getattr(args, "extra", ())]
    command = torchrun.Ranks("megatron_lrpath.evaluate.worker", tuple(options), args.nproc)
    threads = str(max(1, (os.cpu_count() or 1) // args.nproc))
    print(f"evaluating {what(plan, targets, args.force)} …", flush=True)
    status, found = run_logged(command, {"OMP_NUM_THREADS": threads}, log, "torchrun", all_output=True)
    if found:
        say_error(f"the evaluation failed: {found.message}\n  log: {log}; {found.again}")
        return status_of(BAD_INPUT if found.status == BAD_INPUT else status)
    for target in targets:
        evaluation = evaluation_of(plan, target)
        if not evaluation:
            print(f"  {target.name:24} no evaluation: removed by the training, or its loss is not finite")
            continue
        answers = evaluation.get("answers")
        held = f", of held-out answers {answers['perplexity']:.3f}" if answers else ""
        sets = evaluation.get("sets") or {}
        further = "".join(f", on {name} {score['perplexity']:.3f}" for name, score in sets.items())
        print(f"  {target.name:24} perplexity {evaluation['perplexity']:.3f}{held}{further}")
    return 0


def what(plan: Plan, targets: list[Target], again: bool) -> str:
    """Return the models and their validation sets; if only a new set is missing, that set alone."""
    from megatron_lrpath.runs.results import FIRST_SET, missing_sets
    from megatron_lrpath.wording import listing, plural

    every = [FIRST_SET, *plan.data.more_sets]
    by_sets: dict[tuple[str, ...], list[Target]] = {}
    for target in targets:
        wanted = every if again else missing_sets(plan, plan.folder(target.run), target.step)
        by_sets.setdefault(tuple([FIRST_SET] if target.at is not None else wanted or every), []).append(
            target
        )
    parts = [
        f"{plural(len(held), 'model')} on {listing([name or plan.data.valid for name in names])}"
        for names, held in by_sets.items()
    ]
    return listing(parts)
