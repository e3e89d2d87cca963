"""`lrpath advise`: choose alpha and the decay from the losses logged so far."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lrpath.commands.following import next_for
from megatron_lrpath.commands.options import add_plan, lr_share, percentage, share
from megatron_lrpath.console import say_next
from megatron_lrpath.errors import UserError

if TYPE_CHECKING:
    from megatron_lrpath.advise.advice import Advice
    from megatron_lrpath.plan import Plan

HELP = "predict loss and cost for every alpha and decay from the runs so far"
EXAMPLE = "lrpath advise plan.yaml --within 0.5%   or   lrpath advise plan.yaml --budget 0.5 --apply"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the target, and the selection of fitted runs."""
    add_plan(parser, "the plan file; its runs are fitted")
    parser.add_argument(
        "--with",
        dest="others",
        type=Path,
        nargs="+",
        default=[],
        metavar="PLAN",
        help="further plans whose branches leave the same main path",
    )
    parser.add_argument(
        "--within",
        type=percentage,
        metavar="P%",
        help="choose the least cost whose perplexity is within P%% of the best",
    )
    parser.add_argument(
        "--budget",
        type=share,
        metavar="COST",
        help="choose the lowest loss for at most this share of PTFS's steps",
    )
    parser.add_argument(
        "--max-loss",
        dest="limits",
        type=limit,
        nargs="+",
        default=[],
        metavar="VERSION=P%",
        help="let no such version's perplexity lie more than P%% above what its best alpha gives",
    )
    parser.add_argument(
        "--allow-long",
        action="store_true",
        help="offer alphas above 1 as well: branches that begin before their version's data (not the first version's)",
    )
    parser.add_argument(
        "--any-decay", action="store_true", help="choose among other decays than the plan's, too"
    )
    parser.add_argument(
        "--min-lr-share",
        type=lr_share,
        nargs="+",
        default=[],
        metavar="F",
        help="also predict decays that end at F·max_lr (0 to 1)",
    )
    parser.add_argument(
        "--fit-on",
        metavar="VERSION",
        help="fit only what had been trained when this version ended; compare the rest with the measured",
    )
    parser.add_argument(
        "--apply", action="store_true", help="put the alphas by version into the plan; all else in it stays"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw curves and predictions (.png or .svg)"
    )


def execute(args: argparse.Namespace) -> int:
    """Print the advice and save it for the report; return 0, or 1 if no alphas meet the target."""
    from rich.console import Console

    from megatron_lrpath.advise.advice import advise
    from megatron_lrpath.advise.apply import apply_alphas, require_applicable
    from megatron_lrpath.advise.show import for_report, show, write_figure
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.report.style import save_advice

    plan = load_plan(args.plan)
    if args.apply:
        if args.fit_on:
            raise UserError("--apply takes advice from all that was trained; leave --fit-on out")
        require_applicable(plan)
    advice = advise(
        plan,
        [load_plan(path) for path in args.others],
        within=args.within,
        budget=args.budget,
        floors=args.min_lr_share,
        any_decay=args.any_decay,
        fit_on=args.fit_on,
        limits=dict(args.limits),
        allow_long=args.allow_long,
    )
    if args.figure:
        write_figure(advice, args.figure)
    if args.fit_on is None:  # otherwise it is a test of the law, not advice
        save_advice(plan, for_report(advice, datetime.now().astimezone()), advice.to_dict())
    if args.json:
        print(json.dumps(advice.to_dict(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        show(advice, Console())
        if args.figure:
            print(f"Figure: {args.figure}")
    if args.apply and advice.allocation:
        said = apply_alphas(plan, advice.allocation.changes)
        print(said, file=sys.stderr if args.json else sys.stdout)
    if not args.json:
        say_next(following(args, plan, advice))
    return 0 if advice.allocation or advice.chosen else 1


def following(args: argparse.Namespace, plan: Plan, advice: Advice) -> str:
    """Return the text after the advice: how to apply it if it changes something, else the plan's next command."""
    one = advice.allocation
    if args.fit_on is None and not args.apply and one and one.applies and one.changes:
        return "the same command with --apply, which writes the alphas into the plan"
    from megatron_lrpath.plan import load_plan

    return next_for(load_plan(args.plan) if args.apply else plan)


def limit(text: str) -> tuple[str, float]:
    """Parse a limit: `v1=1%` -> ("v1", 0.01)."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r}: write a version and a percentage, like v1=1%")
    return name, percentage(value)
