"""`lrpath eval`: the perplexity of every trained version's model on the fixed validation set."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.commands import eval_tasks

if TYPE_CHECKING:
    from megatron_lrpath.evaluate.targets import Target
    from megatron_lrpath.plan import Plan, Run

HELP = "perplexity of every trained version on the validation set; with --tasks, scores on benchmarks"
EXAMPLE = """lrpath eval examples/quickstart/plan.yaml --paradigm ours
  lrpath eval plan.yaml --main-path
  lrpath eval plan.yaml --tasks paper --task-data data/benchmarks"""
TAKES_EXTRA = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The plan, what of it, and where to run."""
    parser.add_argument("plan", type=Path, metavar="PLAN", help="the plan file")
    parser.add_argument("--paradigm", choices=("ours", "ptfs", "cpt", "all"), default="all")
    parser.add_argument("--run", metavar="NAME", help="only this run of the paradigm")
    parser.add_argument(
        "--main-path",
        action="store_true",
        help="instead of the versions the main path's checkpoints, which tell `lrpath advise` the level of the losses",
    )
    parser.add_argument("--force", action="store_true", help="evaluate again what has been evaluated")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    about = "instead of perplexity, PLAN may be a Hugging Face folder; pip install 'megatron-lrpath[eval]'"
    eval_tasks.add_arguments(parser, about)


def execute(args: argparse.Namespace) -> int:
    """Evaluate what is trained and not evaluated yet; 0, or 1 where the evaluation failed."""
    from megatron_lrpath.data.slice import open_validation
    from megatron_lrpath.errors import UserError
    from megatron_lrpath.evaluate.along import main_path_targets
    from megatron_lrpath.evaluate.targets import Target, is_trained, model_runs, needs_evaluation
    from megatron_lrpath.plan import PARADIGMS, load_plan

    if args.main_path and (args.tasks or args.run or args.paradigm not in ("all", "ours")):
        raise UserError(
            "--main-path evaluates the main path's checkpoints; leave out --tasks, --run and --paradigm."
        )
    if args.tasks:
        return eval_tasks.execute(args)
    plan = load_plan(args.plan)
    if args.main_path:
        targets = main_path_targets(plan, open_validation(plan.data).fingerprint, args.force)
        if not targets:
            print("nothing to evaluate: all checkpoints of the main path are evaluated")
        return evaluate(plan, targets, args) if targets else 0
    paradigms = PARADIGMS if args.paradigm == "all" else (args.paradigm,)
    runs = model_runs(plan, paradigms)
    if args.run:
        runs = [plan.run(paradigms[0], args.run)] if len(paradigms) == 1 else named(plan, runs, args.run)
    trained = [run for run in runs if is_trained(plan, run)]
    wanted = trained if args.force else [run for run in trained if needs_evaluation(plan, run)]
    if not wanted:
        done = f"{len(trained)} of {len(runs)} versions are trained, all of them evaluated"
        print("nothing to evaluate: " + (done if trained else "no version is trained yet (lrpath run PLAN)"))
        return 0
    kinds = ([run for run in wanted if run.kind != "sft"], [run for run in wanted if run.kind == "sft"])
    return max(evaluate(plan, [Target(run) for run in runs], args) for runs in kinds if runs)


def named(plan: Plan, runs: list[Run], name: str) -> list[Run]:
    """The runs of that name in any paradigm."""
    from megatron_lrpath.errors import UserError

    found = [run for run in runs if run.name == name]
    if not found:
        raise UserError(
            f"{plan.path} has no version's run {name!r}; it has {', '.join(run.name for run in runs)}."
        )
    return found


def evaluate(plan: Plan, targets: list[Target], args: argparse.Namespace) -> int:
    """Run the worker under torchrun, its log in OUTPUT/logs, its results on the console."""
    from megatron_lrpath.evaluate.along import along
    from megatron_lrpath.evaluate.targets import EVALUATION, read_json

    kind = "-main-path" if targets[0].at is not None else "-sft" if targets[0].run.kind == "sft" else ""
    log = Path(plan.output) / "logs" / f"eval{kind}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    names = [target.name for target in targets]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(args.nproc),
    ]
    worker = ["-m", "megatron_lrpath.evaluate.worker", "--plan", str(plan.path), "--device", args.device]
    command = [*launcher, *worker, "--runs", *names, *getattr(args, "extra", ())]
    threads = str(max(1, (os.cpu_count() or 1) // args.nproc))
    # Threads that spin at barriers crawl on a machine that others use too.
    environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    print(f"evaluating {len(targets)} models on {plan.data.valid} …", flush=True)
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
    if status:
        from megatron_lrpath.launch.cause import find_cause

        print(f"lrpath: error: the evaluation failed: {find_cause(log)}\n  log: {log}", file=sys.stderr)
        return 1
    for target in targets:
        folder = plan.folder(target.run)
        evaluation = along(folder).get(target.at) if target.at is not None else read_json(folder / EVALUATION)
        if not evaluation:
            print(f"  {target.name:24} no evaluation: removed by the training, or its loss is not finite")
            continue
        answers = evaluation.get("answers")
        held = f", of held-out answers {answers['perplexity']:.3f}" if answers else ""
        print(f"  {target.name:24} perplexity {evaluation['perplexity']:.3f}{held}")
    return 0
