"""`lrpath probe`: short branches at other learning rates, to choose the rate of the next versions."""

from __future__ import annotations

import argparse

from megatron_lrpath.commands.options import number_in
from megatron_lrpath.commands.trials import add_training, add_trial, carry_out
from megatron_lrpath.errors import UserError

HELP = "train short branches at other learning rates off one checkpoint, to choose the next versions' rate"
EXAMPLE = "lrpath probe plan.yaml --rates 0.7 1.4 --dry-run"
TAKES_EXTRA = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the rates, and the options of a trial."""
    add_trial(parser, "checkpoint of the main path, at the end of a version (default: the newest one)")
    parser.add_argument(
        "--rates",
        type=number_in(0.01, 100, "a ratio from 0.01 to 100"),
        nargs="+",
        default=[0.7, 1.4],
        metavar="RATIO",
        help="ratios to the rate that the plan gives the next version, which is tried too (default: 0.7 1.4)",
    )
    parser.add_argument(
        "--decay",
        type=number_in(0.01, 0.99, "a share of the steps, from 0.01 to 0.99"),
        default=0.5,
        metavar="SHARE",
        help="share of the steps that decay at the end; before, the main path continues at the rate (default: 0.5)",
    )
    add_training(parser)


def execute(args: argparse.Namespace) -> int:
    """Train the branches and print the comparison; return 0 when complete, 1 when a branch failed."""
    from megatron_lrpath.experiment.trial import make_probe
    from megatron_lrpath.plan import load_plan

    if len(set(args.rates)) < len(args.rates) or 1.0 in args.rates:
        raise UserError("--rates: give each ratio once; 1 is always tried")
    plan = load_plan(args.plan)
    return carry_out(
        args, plan, make_probe(plan, args.rates, args.begin, args.steps, args.repeats, args.decay)
    )
