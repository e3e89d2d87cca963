"""`lrpath cancel`: end a plan's Slurm jobs."""

from __future__ import annotations

import argparse
import shlex

from megatron_lrpath.commands.options import PLAN_OR_EXPERIMENT, add_runs, paradigms_of
from megatron_lrpath.console import say_next

HELP = "end the Slurm jobs of a plan (or experiment); running trainings save first"
EXAMPLE = "lrpath cancel plan.yaml --paradigm ours --run branch-v3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan and the selection of jobs."""
    add_runs(parser, PLAN_OR_EXPERIMENT, "only this run, and what waits for it")
    parser.add_argument("--now", action="store_true", help="do not wait for running trainings to save")


def execute(args: argparse.Namespace) -> int:
    """End the jobs and print which; return 0."""
    from megatron_lrpath.experiment.load import is_experiment, load_experiment
    from megatron_lrpath.launch.slurm.ledger import Ledger
    from megatron_lrpath.launch.slurm.submit import cancel, plan_keys
    from megatron_lrpath.plan import load_plan

    paradigms = paradigms_of(args)
    if is_experiment(args.plan):
        from megatron_lrpath.experiment.run import chosen_keys

        experiment = load_experiment(args.plan)
        output, keys = str(experiment.output), chosen_keys(experiment, paradigms, args.run)
    else:
        plan = load_plan(args.plan)
        output, keys = str(plan.output), plan_keys(plan, paradigms, args.run)
    ended = cancel(Ledger.of(output), keys, args.now)
    for entry, how in ended:
        print(f"{entry.key} (job {entry.number}): {how}")
    path = shlex.quote(str(args.plan))
    if not ended:
        print(f"no job of {args.plan} is waiting or running")
    say_next(f"lrpath submit {path} continues from the last save" if ended else f"lrpath status {path}")
    return 0
