"""`lrpath submit`: carry out a plan as Slurm jobs."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.commands.options import PLAN_OR_EXPERIMENT, add_paradigms, add_plan, paradigms_of

if TYPE_CHECKING:
    from rich.tree import Tree

    from megatron_lrpath.launch.slurm.submit import Decision, Submission

HELP = "submit a plan (or experiment) to Slurm; called again it adds only what is missing"
EXAMPLE = "lrpath submit plan.yaml --paradigm ours --nodes 4 --time 1-00:00:00 --dry-run"
TAKES_EXTRA = True  # Megatron arguments for every training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The plan, what of it, and an option for every setting of the cluster."""
    from megatron_lrpath.launch.slurm.settings import SETTINGS

    add_plan(parser, PLAN_OR_EXPERIMENT)
    add_paradigms(parser)
    parser.add_argument("--run", metavar="NAME", help="only this run, and those it starts from")
    parser.add_argument("--dry-run", action="store_true", help="print jobs, graph and scripts, no more")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="settings of the cluster")
    group = parser.add_argument_group("settings of the cluster", "each overrides the settings file")
    for setting in SETTINGS:
        group.add_argument(setting.option, metavar=setting.kind.upper(), help=setting.about)


def execute(args: argparse.Namespace) -> int:
    """Submit, or show what would be submitted; 0."""
    submission, follow = submission_of(args)
    if args.dry_run:
        show_dry_run(submission, args.json)
        return 0
    rows = [row(submission, decision, number) for decision, number in submission.carry_out()]
    if args.json:
        print_json(rows)
    else:
        show_table(submission, rows)
        print(f"\nfollow them: lrpath status {shlex.quote(str(follow))}")
    return 0


def submission_of(args: argparse.Namespace) -> tuple[Submission, Path]:
    """What is to be submitted, and the file to ask for its status: the copy where the output is another."""
    from megatron_lrpath.experiment.load import is_experiment, load_experiment
    from megatron_lrpath.launch.slurm.ledger import SubmittedPlan
    from megatron_lrpath.launch.slurm.settings import read_settings, within_job
    from megatron_lrpath.launch.slurm.submit import Submission

    settings = within_job(read_settings(args.settings, vars(args)), os.environ)
    paradigms = paradigms_of(args)
    extra = tuple(args.extra)
    if is_experiment(args.plan):
        from megatron_lrpath.experiment.run import experiment_submission

        experiment = load_experiment(args.plan)
        return experiment_submission(experiment, settings, paradigms, args.run, extra), args.plan
    submitted = SubmittedPlan.of(args.plan, settings.data, settings.output)
    moved = settings.data or settings.output
    submission = Submission.of(submitted, settings, paradigms, args.run, extra)
    return submission, submitted.latest if moved else args.plan


def row(submission: Submission, decision: Decision, number: int | None) -> dict[str, Any]:
    """A job for the table and for JSON."""
    place = decision.job.allocation
    return {
        "key": decision.job.key,
        "kind": decision.job.kind,
        "action": decision.action,
        "job": number,
        "nodes": place.nodes,
        "processes_per_node": place.per_node,
        "waits_for": [{"key": wait.key, "step": wait.step} for wait in decision.job.waits],
        "arguments": [*place.arguments, *submission.extra] if decision.job.kind != "report" else [],
    }


def show_dry_run(submission: Submission, as_json: bool) -> None:
    """Print what would be submitted: the jobs, the graph, and every script with the call of sbatch."""
    from rich.console import Console

    decisions = submission.look()
    rows = [row(submission, decision, decision.old) for decision in decisions]
    for decision, shown in zip(decisions, rows, strict=True):
        if decision.is_new:
            files = submission.files(decision.job)
            shown["sbatch"] = [
                "sbatch",
                *files.options,
                *planned_dependency(decision),
                str(files.script_file),
            ]
            shown["script"], shown["spec"] = files.script, files.spec
    if as_json:
        return print_json(rows)
    show_table(submission, rows)
    console = Console(highlight=False)
    console.print(graph(submission))
    for shown in rows:
        if "script" in shown:
            console.out(f"\n# {shlex.join(shown['sbatch'])}\n{shown['script']}", end="", highlight=False)


def planned_dependency(decision: Decision) -> list[str]:
    """The option of sbatch, with keys of jobs where their numbers will stand."""
    waits = decision.job.waits
    kind = "afterany" if any(wait.step is not None for wait in waits) else "afterok"
    return [f"--dependency={kind}:{':'.join(wait.key for wait in waits)}"] if waits else []


def print_json(rows: list[dict[str, Any]]) -> None:
    """Print the jobs as JSON."""
    import json

    print(json.dumps({"jobs": rows}, indent=2))


def show_table(submission: Submission, rows: list[dict[str, Any]]) -> None:
    """Print the jobs as a table."""
    from rich.console import Console

    from megatron_lrpath.console import terminal_table

    titles = ("job", "number", "", "nodes", "processes", "waits for")
    table = terminal_table(titles, "L" * len(titles), box=None)
    for shown in rows:
        processes = f"{shown['nodes'] * shown['processes_per_node']}"
        waits = ", ".join(wait_text(wait) for wait in shown["waits_for"])
        waits = "all evaluations" if shown["kind"] == "report" and shown["waits_for"] else waits
        number = "" if shown["job"] is None else str(shown["job"])
        table.add_row(shown["key"], number, shown["action"], str(shown["nodes"]), processes, waits)
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(
        f"{submission.name}: {len(rows)} jobs, results in {submission.output}", markup=False, soft_wrap=True
    )
    console.print(table)
    layout: list[str] = next((shown["arguments"] for shown in rows if shown["kind"] == "train"), [])
    if layout:
        console.print(f"layout: {' '.join(layout)}", markup=False, soft_wrap=True)


def wait_text(wait: dict[str, Any]) -> str:
    """`ours/main`, or `ours/main at step 4000` for a checkpoint on the way."""
    return wait["key"] if wait["step"] is None else f"{wait['key']} at step {wait['step']}"


def graph(submission: Submission) -> Tree:
    """The graph as a tree: each job under what it waits for, the report under the plan."""
    from rich.tree import Tree

    tree = Tree(submission.name)
    nodes: dict[str, Tree] = {}
    for job in submission.jobs:
        wait = job.waits[0] if job.waits and job.kind != "report" else None
        step = f" from step {wait.step}" if wait and wait.step is not None else ""
        label = f"{job.key}{step}" if job.kind != "report" else "report after all"
        nodes[job.key] = (nodes[wait.key] if wait else tree).add(label)
    return tree
