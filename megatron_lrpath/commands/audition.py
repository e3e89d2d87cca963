"""`lrpath audition`: short branches on candidate data, to choose the data and the replay of the next version."""

from __future__ import annotations

import argparse

from megatron_lrpath.commands.options import number_in
from megatron_lrpath.commands.trials import add_training, add_trial, carry_out

HELP = (
    "train short branches on candidate data off one checkpoint, to choose the next version's data and replay"
)
EXAMPLE = "lrpath audition plan.yaml --slices v5 v5-filtered --replay 0 0.2 --dry-run"
TAKES_EXTRA = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the candidates, and the options of a trial."""
    add_trial(parser, "checkpoint of the main path (default: the newest one)")
    parser.add_argument(
        "--slices",
        nargs="+",
        required=True,
        metavar="NAME",
        help="slices in the plan's folder that no version has read; the first is the one to compare with",
    )
    parser.add_argument(
        "--replay",
        type=number_in(0, 0.99, "a share from 0 to 0.99"),
        nargs="+",
        default=[0.0],
        metavar="SHARE",
        help="shares that are drawn again from the versions so far, for every slice (default: 0)",
    )
    add_training(parser)


def execute(args: argparse.Namespace) -> int:
    """Train the branches and print the comparison; return 0 when complete, 1 when a branch failed."""
    from megatron_lrpath.experiment.trial import make_audition
    from megatron_lrpath.plan import load_plan

    plan = load_plan(args.plan)
    trial = make_audition(plan, args.slices, args.replay, args.begin, args.steps, args.repeats)
    return carry_out(args, plan, trial)
