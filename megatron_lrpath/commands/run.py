"""`lrpath run`: train the runs of a plan on this machine."""

from __future__ import annotations

import argparse

from megatron_lrpath.commands import eval as eval_tasks
from megatron_lrpath.commands.options import (
    AUTO,
    PLAN_OR_EXPERIMENT,
    WRITTEN,
    add_machine,
    add_runs,
    add_set,
    count_from,
    overridden,
    request_of,
    training_options,
)

HELP = "train a plan on this machine, in dependency order; a second call resumes it"
EXAMPLE = "lrpath run plan.yaml --jobs 2 -- --log-interval 5   (after --: Megatron arguments for every run)"
TAKES_EXTRA = True  # the arguments after `--` arrive as `args.extra`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the selection of runs, and the use of the machine."""
    add_runs(parser, PLAN_OR_EXPERIMENT, "only this run, and those it starts from")
    add_set(parser, WRITTEN)
    parser.add_argument(
        "--jobs",
        type=count_from(1, AUTO),
        metavar="N|auto",
        default=AUTO,
        help="runs side by side; the cores or GPUs are shared out among them (default: auto)",
    )
    add_machine(parser, "trained versions", "processes of each run (default: what the plan needs)")
    eval_tasks.add_task_arguments(parser, "at the end; pip install 'megatron-lrpath[eval]'")


def execute(args: argparse.Namespace) -> int:
    """Train, evaluate, and measure `--tasks`; return 0 when complete, 1 when a run failed, 130 after Ctrl-C."""
    if not args.tasks:
        return train(args)
    eval_tasks.check(args)  # now, not after the training
    return train(args) or eval_tasks.execute_tasks(
        argparse.Namespace(**vars(args) | {"nproc": 1, "extra": (), "force": False})
    )


def train(args: argparse.Namespace) -> int:
    """Train and evaluate perplexities; return the exit status. With --set, `args.plan` becomes
    OUTPUT/plan.yaml.
    """
    from megatron_lrpath.experiment.load import is_experiment, load_experiment
    from megatron_lrpath.launch.local import carry_out
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.readiness import fetch_archived, require_ready

    changed = overridden(args)
    if changed is None and is_experiment(args.plan):
        from megatron_lrpath.experiment.run import carry_out_experiment, experiment_request

        experiment, options = load_experiment(args.plan), training_options(args)
        plans = [point.plan for point in experiment.points]
        request = experiment_request(experiment, request_of(options))
        require_ready(plans, request)
        fetch_archived(plans, request)
        return carry_out_experiment(experiment, options)
    plan = changed.plan if changed else load_plan(args.plan)
    options = training_options(args, plan)
    asked = changed.asked if changed else plan
    require_ready([asked], request_of(options))
    fetch_archived([asked], request_of(options))
    if changed:
        args.plan = changed.write()
    return carry_out(plan, options)
