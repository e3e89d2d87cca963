"""`lrpath lr`: the learning rate of every step of a run."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from megatron_lrpath.commands.options import add_plan, paradigms_of
from megatron_lrpath.console import terminal_table
from megatron_lrpath.paradigms import PARADIGMS

if TYPE_CHECKING:
    from megatron_lrpath.plan import Run

HELP = "print the learning rate of every step of a run"
EXAMPLE = "lrpath lr examples/quickstart/plan.yaml --paradigm ours --run branch-v2 --json"
ROWS = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the run, and the output format."""
    add_plan(parser)
    parser.add_argument(
        "--paradigm",
        choices=PARADIGMS,
        help="the run's paradigm (default: the paradigm with a run of this name)",
    )
    parser.add_argument(
        "--run", required=True, metavar="NAME", help="the run: main, branch-v2, scratch-v2, …"
    )
    parser.add_argument(
        "--json", action="store_true", help="print every step as JSON instead of a table of some steps"
    )


def execute(args: argparse.Namespace) -> int:
    """Print the rates; return 0."""
    from rich.console import Console

    from megatron_lrpath.plan import load_plan

    plan = load_plan(args.plan)
    run = plan.run(paradigms_of(args, plan)[0], args.run)
    if args.json:
        steps = range(run.first_step + 1, run.last_step + 1)
        rates = [run.path.lr_at(step - 1) for step in steps]
        answer = {"paradigm": run.paradigm, "run": run.name, "steps": list(steps), "lr": rates}
        print(json.dumps(answer, allow_nan=False))
    else:
        rows = ((f"{step:,}", f"{run.path.lr_at(step - 1):.6e}") for step in telling_steps(run, ROWS))
        look = {"title": run.key, "title_justify": "left"}
        Console().print(terminal_table(("step", "learning rate"), "rr", rows, **look))
    return 0


def telling_steps(run: Run, count: int) -> list[int]:
    """Return about `count` steps of a run, evenly spaced, with the first, the last and the bends of the
    curve.
    """
    first, last = run.first_step + 1, run.last_step
    spread = {first + (last - first) * index // (count - 1) for index in range(count)}
    corners = {corner + 1 for corner in run.path.corners}
    return sorted(spread | {corner for corner in corners if first <= corner <= last})
