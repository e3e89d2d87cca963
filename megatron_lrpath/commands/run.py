"""`lrpath run`: carry out a plan on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_lrpath.commands import eval as eval_tasks
from megatron_lrpath.paradigms import PARADIGMS

HELP = "train a plan here, in dependency order; called again it goes on where it was"
EXAMPLE = "lrpath run plan.yaml --jobs 2 -- --log-interval 5   (after --: Megatron arguments for every run)"
TAKES_EXTRA = True  # what follows `--` on the command line arrives as `args.extra`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The plan, what of it, and how the machine is shared."""
    parser.add_argument("plan", type=Path, metavar="PLAN", help="the plan (or experiment) file")
    parser.add_argument("--paradigm", choices=(*PARADIGMS, "all"), default="all")
    parser.add_argument("--run", metavar="NAME", help="only this run, and those it starts from")
    parser.add_argument(
        "--nproc",
        type=positive_count,
        metavar="N",
        help="processes of each run (default: what the plan needs)",
    )
    parser.add_argument(
        "--jobs",
        type=count_or_auto,
        metavar="N|auto",
        default="auto",
        help="runs side by side; the cores or GPUs are shared out among them (default: auto)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--evaluate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="evaluate the trained versions at the end (default: yes)",
    )
    eval_tasks.add_task_arguments(parser, "at the end; pip install 'megatron-lrpath[eval]'")


def execute(args: argparse.Namespace) -> int:
    """Train, evaluate, and measure `--tasks`; 0 when complete, 1 when a run failed, 130 after Ctrl-C."""
    if not args.tasks:
        return train(args)
    eval_tasks.check(args)  # now, not after the training
    return train(args) or eval_tasks.execute_tasks(
        argparse.Namespace(**vars(args) | {"nproc": 1, "extra": (), "force": False})
    )


def train(args: argparse.Namespace) -> int:
    """Train and evaluate perplexities; the exit status."""
    from megatron_lrpath.experiment.load import is_experiment, load_experiment
    from megatron_lrpath.launch.local import Options, carry_out
    from megatron_lrpath.plan import load_plan

    options = Options(
        paradigms=PARADIGMS if args.paradigm == "all" else (args.paradigm,),
        run=args.run,
        nproc=args.nproc,
        jobs=None if args.jobs == "auto" else args.jobs,
        device=args.device,
        evaluate=args.evaluate,
        extra=tuple(getattr(args, "extra", ())),
    )
    if is_experiment(args.plan):
        from megatron_lrpath.experiment.run import carry_out_experiment

        return carry_out_experiment(load_experiment(args.plan), options)
    return carry_out(load_plan(args.plan), options)


def positive_count(text: str) -> int:
    """An option's whole number from 1 on."""
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number


def count_or_auto(text: str) -> int | str:
    """The same, or `auto`."""
    return text if text == "auto" else positive_count(text)
