"""`lrpath merge`: preview a version's branch by merging the main path's checkpoints, without training."""

from __future__ import annotations

import argparse
import shlex

from megatron_lrpath.commands.options import add_plan, lr_share
from megatron_lrpath.console import say_next

HELP = "preview a branch without training: merge the main path's checkpoints with the weights of a decay"
EXAMPLE = "lrpath merge plan.yaml --version v2 --decay minus-sqrt --min-lr-share 0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the version and the decay."""
    add_plan(parser)
    parser.add_argument("--version", required=True, metavar="V", help="the version whose branch is previewed")
    parser.add_argument(
        "--decay",
        choices=("cosine", "linear", "minus-sqrt", "exponential", "multi-step"),
        help="default: the plan's",
    )
    parser.add_argument("--min-lr-share", type=lr_share, metavar="F", help="the decay ends at F·max_lr")
    parser.add_argument(
        "--from-step", type=int, metavar="S", help="the decay begins at S (default: branch point)"
    )


def execute(args: argparse.Namespace) -> int:
    """Merge, print the weights and how to evaluate; return 0."""
    from megatron_lrpath.merge.preview import plan_preview, write_preview
    from megatron_lrpath.plan import load_plan

    preview = plan_preview(load_plan(args.plan), args.version, args.decay, args.min_lr_share, args.from_step)
    path = write_preview(preview)
    for step, weight in zip(preview.steps, preview.weights, strict=True):
        print(f"  main path at step {step:>8}: {weight:.4f}")
    print(f"merged into {preview.folder}")
    say_next(f"lrpath eval {shlex.quote(str(path))} --paradigm ours --run {preview.run.name}")
    return 0
