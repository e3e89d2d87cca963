"""`lrpath sft`: fine-tune trained versions on chats or instructions."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace

from megatron_lrpath.commands.options import (
    PLAN,
    add_machine,
    add_runs,
    count_from,
    request_of,
    training_options,
)
from megatron_lrpath.console import say_next
from megatron_lrpath.errors import UserError

HELP = "fine-tune the trained versions on chats or instructions (section `sft` of the plan)"
EXAMPLE = "lrpath sft plan.yaml --paradigm ours --run sft-v2   (--prepare: only make the data ready)"
TAKES_EXTRA = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the selection of runs, and the use of the machine."""
    add_runs(parser, PLAN, "only this fine-tuning, such as sft-v2")
    parser.add_argument("--prepare", action="store_true", help="tokenize the data and stop")
    parser.add_argument(
        "--output", metavar="DIR", help="with --prepare: the output that the plan will be submitted with"
    )
    parser.add_argument(
        "--workers", type=count_from(1), metavar="N", help="processes that tokenize (default: all cores)"
    )
    parser.add_argument(
        "--jobs", type=count_from(1), metavar="N", help="fine-tunings side by side (default: as fits)"
    )
    add_machine(parser, "fine-tuned models", "processes of each fine-tuning")


def execute(args: argparse.Namespace) -> int:
    """Prepare, fine-tune and evaluate; return the exit status as `lrpath run`."""
    from megatron_lrpath.data.record import require_tokenizer
    from megatron_lrpath.launch.local import carry_out
    from megatron_lrpath.launch.resources import cores
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.readiness import fetch_archived, require_ready
    from megatron_lrpath.sft.prepare import prepare, print_summary

    plan = load_plan(args.plan)
    if args.output:
        if not args.prepare:
            raise UserError("--output goes with --prepare; else the plan's own `output` holds the runs")
        plan = replace(plan, output=args.output)
    options = training_options(args, plan, only_sft=True)
    if args.prepare:
        require_tokenizer(plan)
    else:
        require_ready([plan], request_of(options))
        fetch_archived([plan], request_of(options))
    if args.prepare or args.workers:  # otherwise carry_out prepares the data
        print_summary(prepare(plan, args.workers or cores()), plan.sft_folder)
    path = shlex.quote(str(args.plan))
    if args.prepare:
        if not args.output:
            say_next(f"lrpath sft {path}")
        return 0
    status = carry_out(plan, options)
    if status == 0:
        say_next(f"lrpath chat {path}")
    return status
