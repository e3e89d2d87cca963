#!/usr/bin/env python3
"""Merge torch_dist checkpoints of one run with given weights into a checkpoint for evaluation or export.

`lrpath merge PLAN` chooses checkpoints and weights by a plan; this takes them as they are given.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lrpath.console import ToolParser, run_tool
from megatron_lrpath.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's arguments."""
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--checkpoints", type=Path, required=True, help="Megatron's folder, with iter_* in it"
    )
    parser.add_argument("--steps", type=int, nargs="+", required=True, help="whose checkpoints, ascending")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each, sum 1 (default: equal ones)")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder that gets iter_STEP, of the last step"
    )
    return parser


def merge(args: argparse.Namespace) -> int:
    """Merge the checkpoints and print the result; return 0."""
    from megatron_lrpath.merge.torch_dist import merge_checkpoints

    if args.steps != sorted(set(args.steps)):
        raise UserError(
            f"--steps: {', '.join(map(str, args.steps))} do not ascend, each once; the merge has the last step"
        )
    weights = args.weights or [1 / len(args.steps)] * len(args.steps)
    if len(weights) != len(args.steps) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UserError(f"--weights: {len(args.steps)} numbers that sum to 1 are needed, not {weights}")
    folder = merge_checkpoints(args.checkpoints, args.steps, weights, args.output, args.steps[-1])
    print(f"{folder}: merged {len(args.steps)} checkpoints", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 for bad input."""
    return run_tool(build_parser(), merge, argv)


if __name__ == "__main__":
    sys.exit(main())
