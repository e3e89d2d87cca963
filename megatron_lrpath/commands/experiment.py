"""`lrpath experiment`: show the plans of an experiment file, without training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.commands.following import next_for_experiment
from megatron_lrpath.console import say_next, terminal_table
from megatron_lrpath.wording import short_number

if TYPE_CHECKING:
    from megatron_lrpath.experiment.load import Experiment

HELP = "check an experiment file and show its plans and the trainings that they share"
EXAMPLE = (
    "lrpath experiment examples/paper/table-2.yaml   (then: lrpath run, lrpath report with the same file)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the experiment and the output format."""
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="the experiment file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--write", action="store_true", help="write the plan files into OUTPUT/plans")


def execute(args: argparse.Namespace) -> int:
    """Print the experiment; return 0."""
    from megatron_lrpath.experiment.load import load_experiment
    from megatron_lrpath.experiment.run import write_plans

    experiment = load_experiment(args.experiment)
    if args.write:
        write_plans(experiment)
    facts = as_json(experiment)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        show(experiment, facts)
        say_next(next_for_experiment(experiment))
    return 0


def as_json(experiment: Experiment) -> dict[str, Any]:
    """Return the points, the trainings, and the savings from sharing."""
    from megatron_lrpath.experiment.run import experiment_tasks, point_tasks

    tasks = experiment_tasks(experiment)
    alone = [
        task for point in experiment.points for task in point_tasks(experiment, point, experiment.paradigms)
    ]
    plans = {point.name: point.plan for point in experiment.points}
    steps, all_steps = (sum(task.run.steps for task in some) for some in (tasks, alone))
    return {
        "name": experiment.name,
        "about": experiment.about,
        "points": [
            {"name": point.name, "plan": str(point.plan.path), "values": point.values}
            for point in experiment.points
        ],
        "trainings": [
            {
                "name": task.key,
                "steps": task.run.steps,
                "parent": task.parent,
                "shared_with": len(task.aliases),
            }
            for task in tasks
        ],
        "total_steps": steps,
        "total_tokens": sum(plans[task.point].tokens_of(task.run) for task in tasks),
        "steps_without_sharing": all_steps,
    }


def show(experiment: Experiment, facts: dict[str, Any]) -> None:
    """Print the same as a table."""
    from rich.console import Console
    from rich.text import Text

    rows = []
    for point in facts["points"]:
        mine = [one for one in facts["trainings"] if one["name"].startswith(point["name"] + "/")]
        steps = sum(one["steps"] for one in mine)
        rows.append((point["name"], f"{len(mine)}", f"{steps:,}"))
    table = terminal_table(("variation", "trainings", "steps"), "LRR", rows)
    console = Console(highlight=False)
    if experiment.about:
        console.print(Text(experiment.about))
    console.print(table)
    saved = 1 - facts["total_steps"] / facts["steps_without_sharing"]
    console.print(
        f"{len(facts['points'])} plans, {len(facts['trainings'])} trainings, {facts['total_steps']:,} steps "
        f"({short_number(facts['total_tokens'])} tokens); what the plans share is trained once, under the first of "
        f"them ({saved:.0%} saved)"
    )
    plans = experiment.points[0].plan.path.parent
    console.print(f"plan of each variation: {plans}/<variation>.yaml", soft_wrap=True, markup=False)
